"""Paths: what a part of the decoder does to another directly, and the circuit they make."""

from audio_lens.analysis.paths.nodes import Nodes, Receiver, Sender
from audio_lens.analysis.paths.patching import path

__all__ = ["Nodes", "Receiver", "Sender", "path"]
