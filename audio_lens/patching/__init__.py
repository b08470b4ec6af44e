"""Activation patching with time in seconds."""

from audio_lens.patching.ablate import ablate
from audio_lens.patching.attribution.attribute import Attribution, attribute
from audio_lens.patching.attribution.confirm import Confirmation
from audio_lens.patching.clip_pair import ChangedFileError, ClipPair
from audio_lens.patching.engine.checkpoint import CheckpointError
from audio_lens.patching.patch import Patch, patch
from audio_lens.patching.plan import Plan, VerificationError
from audio_lens.patching.rerun import Rerun, RerunError, rerun
from audio_lens.patching.result import Cell, SweepResult, load
from audio_lens.patching.run import run
from audio_lens.patching.sweep import plan, sweep
from audio_lens.patching.transformer_lens import (
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_pre,
)
from audio_lens.sites import Site, SiteError, sites_of
from audio_lens.timeline import Band, Span

__all__ = [
    "Attribution",
    "Band",
    "Cell",
    "ChangedFileError",
    "CheckpointError",
    "ClipPair",
    "Confirmation",
    "Patch",
    "Plan",
    "Rerun",
    "RerunError",
    "Site",
    "SiteError",
    "Span",
    "SweepResult",
    "VerificationError",
    "ablate",
    "attribute",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "load",
    "patch",
    "plan",
    "rerun",
    "run",
    "sites_of",
    "sweep",
]
