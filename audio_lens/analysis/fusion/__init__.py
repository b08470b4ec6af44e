"""Where audio and text meet in a decoder: causal tracing, its fine grid, and an intervention."""

from audio_lens.analysis.fusion.grid import fcct
from audio_lens.analysis.fusion.intervention import iri
from audio_lens.analysis.fusion.plans import enrichment
from audio_lens.analysis.fusion.tracing import trace

__all__ = ["enrichment", "fcct", "iri", "trace"]
