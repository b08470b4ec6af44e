"""The encoder with its teacher: what it is trained towards beside the answers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from audio_lens.models.embedded.training.batches import (
    SILENCE,
    Heard,
    SampledClip,
    frame_labels,
)
from audio_lens.models.embedded.training.network import hear
from audio_lens.models.embedded.training.teacher import Targets

CLASSES = SILENCE + 1


def place(taught: Targets, clips: Sequence[SampledClip], positions: int) -> tuple[Tensor, Tensor]:
    """Teacher states where the words are, and a mask of where that is."""
    states = torch.zeros(len(clips), positions, taught.states.shape[1])
    there = torch.zeros(len(clips), positions, dtype=torch.bool)
    for row, clip in enumerate(clips):
        for placed, word in zip(clip.scene.words, clip.words, strict=True):
            state = taught.of(word)
            first = round(placed.start_s * 50)
            states[row, first : first + len(state)] = torch.from_numpy(state)
            there[row, first : first + len(state)] = True
    return states, there


class Ears(nn.Module):
    """The encoder with two heads that are thrown away: teacher states, and the sounding digit."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        width = tower.config.d_model
        self.tower = tower
        self.to_teacher = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 384))
        self.to_digit = nn.Linear(width, CLASSES)

    def listen(
        self, heard: Heard, clips: Sequence[SampledClip], taught: Targets
    ) -> tuple[Tensor, Tensor]:
        """What the encoder makes of clips, and how far that is from teacher and labels.

        Returns:
            Pooled states, 25 per second, and the loss: mean square error of the teacher's states
            inside words plus cross entropy of the digit that sounds in each 40 ms.
        """
        states, audio = hear(self.tower, heard.mel, heard.tokens)
        return audio, self.judge(states, audio, clips, taught)

    def judge(
        self, states: Tensor, audio: Tensor, clips: Sequence[SampledClip], taught: Targets
    ) -> Tensor:
        """The loss of :meth:`listen` for states, 50 per second, and pooled ones."""
        wanted, there = place(taught, clips, states.shape[1])
        tokens = torch.tensor([clip.tokens for clip in clips])
        inside = torch.arange(audio.shape[1]) < tokens[:, None]
        labels = frame_labels(clips, audio.shape[1])[inside]
        digit = functional.cross_entropy(self.to_digit(audio[inside]).float(), labels)
        told = self.to_teacher(states[there]).float()
        return functional.mse_loss(told, wanted[there]) + digit
