"""Paths: what a part of the decoder does to another directly, and the circuit they make."""

from audio_lens.analysis.paths.attributing import eap, eap_ig
from audio_lens.analysis.paths.circuits import Circuit, prune, random_circuit
from audio_lens.analysis.paths.faith import faithfulness, minimality
from audio_lens.analysis.paths.graph import Graph
from audio_lens.analysis.paths.nodes import Nodes, Receiver, Sender
from audio_lens.analysis.paths.patching import path
from audio_lens.analysis.paths.study import study

__all__ = [
    "Circuit",
    "Graph",
    "Nodes",
    "Receiver",
    "Sender",
    "eap",
    "eap_ig",
    "faithfulness",
    "minimality",
    "path",
    "prune",
    "random_circuit",
    "study",
]
