"""Targets for the student encoder: what Whisper-tiny.en's encoder makes of single words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from audio_lens.models.embedded.training.acoustics import log_mel
from audio_lens.models.embedded.training.material import RATE, Utterance, data_root
from audio_lens.models.embedded.training.scenes import GRID

POSITIONS = 64
LEAD = 4


def whisper_encoder() -> WhisperEncoder:
    """The real encoder, cut to its first 64 positions (1.28 s)."""
    folder = data_root() / "models" / "whisper_tiny_en"
    settings = json.loads((folder / "config.json").read_text())
    encoder = WhisperEncoder(WhisperConfig(**settings | {"max_source_positions": POSITIONS}))
    weights = load_file(folder / "encoder_fp16.safetensors")
    weights = {name.rpartition("encoder.")[2]: w.float() for name, w in weights.items()}
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:POSITIONS]
    encoder.load_state_dict(weights)
    return encoder.eval()


@dataclass(frozen=True)
class Targets:
    """Standardised teacher states of many words, one after the other.

    Attributes:
        states: half precision, all words' positions of 20 ms.
        offsets: where each word's states begin, and where the last one's end.
    """

    states: Float[np.ndarray, "positions 384"]
    offsets: np.ndarray

    def of(self, word: int) -> Float[np.ndarray, "positions 384"]:
        return self.states[self.offsets[word] : self.offsets[word + 1]]


def teach(words: Sequence[Utterance], batch: int = 64) -> Targets:
    """Run the teacher over words, each alone with 80 ms of silence before it."""
    encoder = whisper_encoder()
    states = []
    for first in tqdm(range(0, len(words), batch), desc="teacher", unit="batch"):
        chunk = words[first : first + batch]
        outputs = _states(encoder, chunk)
        lengths = [-(-len(utterance.wave) // GRID) for utterance in chunk]
        states += [o[LEAD : LEAD + n].half() for o, n in zip(outputs, lengths, strict=True)]
    lengths = [len(state) for state in states]
    stacked = torch.cat(states).float()
    stacked = (stacked - stacked.mean(0)) / stacked.std(0)
    return Targets(stacked.half().numpy(), np.concatenate([[0], np.cumsum(lengths)]))


@torch.no_grad()
def _states(encoder: WhisperEncoder, words: Sequence[Utterance]) -> Tensor:
    waves = torch.zeros(len(words), POSITIONS * GRID + RATE // 10)
    for row, utterance in zip(waves, words, strict=True):
        row[LEAD * GRID : LEAD * GRID + len(utterance.wave)] = torch.from_numpy(utterance.wave)
    mel = log_mel(waves)[..., : 2 * POSITIONS]
    with torch.autocast("cpu", torch.bfloat16):
        return encoder(mel).last_hidden_state.float()
