"""Soundwave (Zhang et al. 2025, arXiv 2502.12900): Whisper shrunk to where it changes, and Llama.

Two frames of Whisper at a time become one of 40 ms, as wide as Llama. A head gives each the token
of Llama's vocabulary that it sounds like; of every run of equal ones, the first frame goes on. How
many do depends on what is heard. They look back at the frames and enter the prompt.

After `Soundwave.py` of FreedomIntelligence/Soundwave, in whose computation two things are not what
the paper describes; both are kept, since the weights were trained with them:

- The transformer layer of the adapter takes time for the batch, so that its attention runs over one
  position: every frame attends to itself alone, whatever queries and keys say.
- The mask of the look-back hides the frames that were dropped, not padding: kept frames find each
  other and nothing else. What was dropped reaches Llama in no way.

The label for nothing (CTC's blank) is treated as any other: a frame of each of its runs is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, WhisperConfig

from audio_lens.hooks import HookPoint
from audio_lens.models.compose.assemble import Placeholder, compose
from audio_lens.models.compose.runs import mask_of
from audio_lens.models.compose.shrinking import HookedShrinking, ShrinkingConnector
from audio_lens.models.config import LoadingError
from audio_lens.models.families.whisper import HookedWhisper, encoder_weight_names
from audio_lens.models.layers import Attention, Context, LayerNorm, PartConfig
from audio_lens.models.layers.lone import LoneBlock
from audio_lens.models.loading.checkpoints import load_pretrained, processor_of
from audio_lens.models.loading.generation import stored_settings
from audio_lens.models.loading.stored import read_config, reads_checkpoint
from audio_lens.models.loading.weights import fill, read_weights, renamed
from audio_lens.models.parts.language_model import (
    LanguageModel,
    language_model_config,
    weight_names,
)

STACKED = 2  # encoder frames side by side
PLACEHOLDER = "<audio_patch>"
SYSTEM = (
    "You are a helpful language and speech assistant. You are able to understand the speech content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)
TEMPLATE = (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n{SYSTEM}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n{audio}{question}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n"
)
_NAMED = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    PLACEHOLDER,
)
_BETWEEN = re.compile(rf"({'|'.join(map(re.escape, _NAMED))}|(?<=<\|end_header_id\|>)\n)")
"""What stands between the texts of a prompt: tokens by name, and the line break of a header."""

_ADAPTER = "model.asr_transformer_encoder.layers.0"
_LOOK_BACK = "model.lbm.encoder_attn"
WEIGHT_NAMES: dict[str, str | None] = {
    **encoder_weight_names("model.audio_tower"),
    "model.mm_projector1": "connector.adapter",
    f"{_ADAPTER}.self_attn.q_proj": None,  # of attention to one position: these say nothing
    f"{_ADAPTER}.self_attn.k_proj": None,
    f"{_ADAPTER}.self_attn.v_proj": "connector.blocks.0.attn.v_proj",
    f"{_ADAPTER}.self_attn.out_proj": "connector.blocks.0.attn.o_proj",
    f"{_ADAPTER}.norm1": "connector.blocks.0.ln1",
    f"{_ADAPTER}.norm2": "connector.blocks.0.ln2",
    f"{_ADAPTER}.linear1": "connector.blocks.0.mlp.fc_in",
    f"{_ADAPTER}.linear2": "connector.blocks.0.mlp.fc_out",
    "model.out_norm": "connector.ln_adapted",
    "model.audio_feature_head": "connector.head",
    f"{_LOOK_BACK}.q_proj": "connector.cross_attn.q_proj",
    f"{_LOOK_BACK}.k_proj": "connector.cross_attn.k_proj",
    f"{_LOOK_BACK}.v_proj": "connector.cross_attn.v_proj",
    f"{_LOOK_BACK}.out_proj": "connector.cross_attn.o_proj",
    "model.lbm.atten_layer_norm": "connector.ln_cross",
    **weight_names("model", head="lm_head"),
}
"""The published names, once queries, keys and values are apart (`without_fused`), to ours."""


# -------------------------------------------------------------------------------- the connector


class SoundwaveConnector(ShrinkingConnector):
    """Pairs of frames, a linear map, a block without exchange, a norm; and the look-back.

    The keys of `cross_attn` are all frames, so that a row of `cross_attn.hook_pattern`
    (``b h q k``) tells which of them a kept one finds; those that were dropped have 0.
    """

    def __init__(self, cfg: PartConfig, d_in: int):
        super().__init__(frames_per_token=STACKED)
        self.adapter = nn.Linear(STACKED * d_in, cfg.d_model)
        self.blocks = nn.ModuleList([LoneBlock(cfg)])
        self.ln_adapted = LayerNorm(cfg.d_model, cfg.eps)
        self.head = nn.Linear(cfg.d_model, cfg.need_d_vocab, bias=False)
        self.cross_attn = Attention(cfg, causal=False, d_memory=cfg.d_model)
        self.ln_cross = LayerNorm(cfg.d_model, cfg.eps)
        self.hook_stacked, self.hook_adapter_out = HookPoint(), HookPoint()
        self.hook_cross_attn_out, self.hook_resid_mid_cross = HookPoint(), HookPoint()

    def adapt(self, x: Float[Tensor, "b frames d_in"]) -> Float[Tensor, "b t d"]:
        whole = x[:, : self.token_count(x.shape[1]) * STACKED]
        stacked = self.hook_stacked(rearrange(whole, "b (t k) d -> b t (k d)", k=STACKED))
        resid = self.hook_adapter_out(self.adapter(stacked))
        return self.ln_adapted(self.blocks[0](resid, Context()))

    def label_logits(self, frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        return self.head(frames)

    def shrink(
        self, frames: Float[Tensor, "b t d"], kept: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        resid = super().shrink(frames, kept)
        attn, allowed = self.cross_attn, mask_of(kept, frames.shape[1])[:, None, None]
        z = attn.mix(attn.queries(resid), *attn.keys_values(frames), allowed)
        found = self.hook_cross_attn_out(attn.output(attn.hook_z(z)))
        return self.ln_cross(self.hook_resid_mid_cross(resid + found))


class HookedSoundwave(HookedShrinking):
    """Soundwave with every activation hooked."""

    def _encoded(self, prompt: str) -> list[int]:
        """The prompt piece by piece, as the published code has it.

        Every piece of text is encoded as if it stood alone: a tokenizer that begins texts with a
        token of its own begins each with it.
        """
        tokens: list[int] = []
        for piece in filter(None, _BETWEEN.split(prompt)):
            if piece == PLACEHOLDER:
                tokens.append(self.need_audio_token)
            elif piece in _NAMED:
                tokens.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                tokens += self.tokenizer(piece)["input_ids"]
        return tokens


# -------------------------------------------------------------------------------- checkpoints


@reads_checkpoint
def soundwave(
    checkpoint: str | Path, whisper: str | Path | None = None, dtype: torch.dtype | None = None
) -> HookedSoundwave:
    """Soundwave, from a directory with the published files.

    Args:
        checkpoint: holds ``config.json``, the safetensors, and for texts the tokenizer's files.
        whisper: hub id or directory of the Whisper it hears with; None takes the one that the
            config names. Its weights are read only where the checkpoint brings none.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        LoadingError: a file that is missing or corrupt, a config of another model, or weights that
            are missing, misshapen or without a place.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise LoadingError(f"{folder} holds no config.json, so it is no directory of Soundwave")
    config = read_config(folder / "config.json")
    text = soundwave_text_config(config, str(checkpoint))
    whisper = whisper or config.get("audio_tower")
    if whisper is None:
        raise LoadingError("the config names no Whisper (audio_tower): pass whisper=")
    state = read_weights(folder)
    dtype = dtype or next(iter(state.values())).dtype
    ear = _shape_of_ear(whisper) if _has_ear(state) else _whole_ear(whisper, dtype)
    found, problem = processor_of(str(folder))
    tokenizer = getattr(found, "tokenizer", found)
    model = soundwave_of(
        state, text, ear, tokenizer, token_id=config.get("audio_patch_token"), dtype=dtype
    )
    model.generation_config = stored_settings(folder, model.generation_config)
    model.tokenizer_problem = problem
    return model


def soundwave_text_config(config: Mapping[str, Any], model_name: str = "") -> LlamaConfig:
    """The language model that a published ``config.json`` tells of.

    Raises:
        LoadingError: if it is of another model.
    """
    if "adapter_size" not in config:
        raise LoadingError("this config has no adapter_size, so it is of no Soundwave")
    own = {key: value for key, value in config.items() if key != "model_type"}
    text = LlamaConfig(**own)
    text.name_or_path = model_name
    return text


def soundwave_of(
    state: Mapping[str, Tensor],
    text: LlamaConfig,
    ear: WhisperConfig | HookedWhisper,
    tokenizer: Any = None,
    token_id: int | None = None,
    dtype: torch.dtype | None = None,
) -> HookedSoundwave:
    """The model of published weights.

    Args:
        state: by their published names.
        ear: the shape of Whisper where the weights bring its encoder, otherwise the model.
        token_id: of the placeholder, where there is no tokenizer to ask.

    Raises:
        LoadingError: for weights that are missing, misshapen or without a place.
    """
    if _has_ear(state) != isinstance(ear, WhisperConfig):
        brings = "bring their own encoder" if _has_ear(state) else "bring no encoder"
        raise LoadingError(f"the weights {brings}, so ear cannot be a {type(ear).__name__}")
    tensors = renamed(without_fused(state), WEIGHT_NAMES)
    if isinstance(ear, WhisperConfig):
        heard = HookedWhisper.config_from_hf(ear)
    else:
        heard = ear.cfg
        tensors |= {f"encoder.{name}": x for name, x in ear.encoder.state_dict().items()}
    cfg = language_model_config(text, text.name_or_path)
    with torch.device("meta"):
        parts = (
            HookedWhisper(replace(heard, decoder=None, output_kind=None)),
            SoundwaveConnector(_connector_config(cfg), heard.need_encoder.d_model),
            LanguageModel(cfg),
        )
    model = compose(
        *parts,
        Placeholder(PLACEHOLDER, token_id if tokenizer is None else None),
        tokenizer=tokenizer,
        template=TEMPLATE,
        keeps_padding=True,
        name="soundwave",
        family=HookedSoundwave,
    )
    fill(model, {name: x.to(dtype or x.dtype) for name, x in tensors.items()})
    model.cfg.model_name = text.name_or_path or model.cfg.model_name
    if tokenizer is not None:
        end = tokenizer.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def without_fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with queries, keys and values of the connector apart, as views."""
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, fused, kind = name.rpartition("in_proj_")
        if fused:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            apart |= {f"{before}{part}_proj.{kind}": piece for part, piece in parts}
        else:
            apart[name] = tensor
    return apart


def _has_ear(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights bring the encoder."""
    return any(name.startswith("model.audio_tower.") for name in state)


def _shape_of_ear(whisper: str | Path) -> WhisperConfig:
    try:
        return WhisperConfig.from_pretrained(whisper)
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise LoadingError(f"no shape of Whisper at {whisper} (pass whisper=): {cause}") from error


def _whole_ear(whisper: str | Path, dtype: torch.dtype) -> HookedWhisper:
    ear = load_pretrained(whisper, dtype)
    if not isinstance(ear, HookedWhisper):
        raise LoadingError(f"{whisper} is a {ear.cfg.family}, and Soundwave hears with a Whisper")
    return ear


def _connector_config(text: PartConfig) -> PartConfig:
    """The shape of torch's own transformer layer and attention, as wide as the language model."""
    return PartConfig(
        n_layers=1,
        n_heads=text.n_heads,
        n_key_value_heads=text.n_heads,
        d_model=text.d_model,
        d_head=text.d_model // text.n_heads,
        d_mlp=2 * text.d_model,
        n_ctx=None,
        act_fn="relu",
        eps=1e-5,
        normalization_type="LN",
        attn_biases=("q", "k", "v", "o"),
        d_vocab=text.d_vocab,
    )
