"""Activation patching with time in seconds."""

from audio_lens.patching.checkpoint import CheckpointError
from audio_lens.patching.engine import Plan, VerificationError, plan, sweep
from audio_lens.patching.result import Cell, SweepResult, load
from audio_lens.patching.sites import Site, SiteError, sites_of
from audio_lens.timeline import Span

__all__ = [
    "Cell",
    "CheckpointError",
    "Plan",
    "Site",
    "SiteError",
    "Span",
    "SweepResult",
    "VerificationError",
    "load",
    "plan",
    "sites_of",
    "sweep",
]
