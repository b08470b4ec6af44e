"""The methods that `benchmarks.patching` compares, one file each, and what they are given."""

from benchmarks.peers.expert import Expert
from benchmarks.peers.hooks_loop import HooksLoop, HooksLoopEncoderOnce
from benchmarks.peers.interventions import Pyvene
from benchmarks.peers.lens import TransformerLens
from benchmarks.peers.method import Method
from benchmarks.peers.own import AudioLens
from benchmarks.peers.traces import NNsight, NNsightSkips

METHODS: dict[str, type[Method]] = {
    "audio_lens": AudioLens,
    "loop": HooksLoop,
    "loop-encoder-once": HooksLoopEncoderOnce,
    "expert": Expert,
    "transformer_lens": TransformerLens,
    "nnsight": NNsight,
    "nnsight-skips": NNsightSkips,
    "pyvene": Pyvene,
}
