"""Activation patching with time in seconds."""

from audio_lens.patching.engine import sweep
from audio_lens.patching.result import Cell, SweepResult, load
from audio_lens.patching.sites import Site, SiteError, sites_of
from audio_lens.timeline import Span

__all__ = ["Cell", "Site", "SiteError", "Span", "SweepResult", "load", "sites_of", "sweep"]
