"""Hand-made audio LLMs whose circuits are known, to hold methods against planted truth.

All are Qwen2-Audio in shape, so that hooks, timelines and sweeps run as on a real model, with the
encoder and the norms taken out: every 40 ms of "mel" enters the residual stream as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from audio_lens.inputs import AudioInputs
from audio_lens.models.config import AudioConfig
from audio_lens.models.families.qwen2_audio import HookedQwen2Audio
from audio_lens.models.layers import PartConfig

N_CLASSES = 4
AUDIO_TOKENS = 10
MARKER, QUERY, TEXT_MARKER = 0, 1, 2  # dimensions of the residual stream that flag a position
AUDIO_CLASS = slice(3, 3 + N_CLASSES)
TEXT_CLASS = slice(AUDIO_CLASS.stop, AUDIO_CLASS.stop + N_CLASSES)
ANSWER = slice(TEXT_CLASS.stop, TEXT_CLASS.stop + N_CLASSES)
WIDTH = ANSWER.stop
SHARP = 60.0  # a score gap at which softmax is one-hot in float64 to 1e-26

# vocabulary: answers 0..3, text cues 4..7, the question, the audio placeholder
TEXT_CUE, QUESTION, AUDIO = N_CLASSES, 2 * N_CLASSES, 2 * N_CLASSES + 1
VOCABULARY = AUDIO + 1
REST, REST_QUERY = 0, TEXT_CLASS.stop - 1  # a token that asks for nothing, and its flag


class _NoPositions(nn.Module):
    def forward(self, positions: Tensor, dtype: torch.dtype) -> None:
        return None


class _NoNorm(nn.Identity):
    pass


class Toy(HookedQwen2Audio):
    """The skeleton: a decoder of zero weights without norms or positions, on raw frames."""

    def __init__(self, n_layers: int, n_heads: int = 2):
        shape = {
            "n_heads": n_heads,
            "n_key_value_heads": n_heads,
            "d_model": WIDTH,
            "d_head": 1 + N_CLASSES,
            "d_mlp": 4,
            "act_fn": "relu",
            "eps": 0.0,
            "attn_biases": (),
        }
        encoder = PartConfig(n_layers=0, n_ctx=2 * AUDIO_TOKENS, normalization_type="LN", **shape)
        decoder = PartConfig(
            n_layers=n_layers,
            n_ctx=64,
            normalization_type="RMS",
            causal=True,
            gated_mlp=True,
            rotary_base=1.0,
            d_vocab=VOCABULARY,
            **shape,
        )
        n_frames = 4 * AUDIO_TOKENS
        super().__init__(AudioConfig("toy", "toy", encoder, decoder, WIDTH, n_frames))
        self.audio_token_id = AUDIO
        self.decoder.rotary = _NoPositions()
        self.decoder.ln_final = _NoNorm()
        for block in self.decoder.blocks:
            block.ln1, block.ln2 = _NoNorm(), _NoNorm()
        self.double().requires_grad_(False)
        for parameter in self.parameters():
            parameter.zero_()
        self.connector.linear.weight.copy_(torch.eye(WIDTH))
        self.decoder.token_embed.weight[QUESTION, QUERY] = 1.0
        for c in range(N_CLASSES):
            self.decoder.token_embed.weight[TEXT_CUE + c, TEXT_MARKER] = 1.0
            self.decoder.token_embed.weight[TEXT_CUE + c, TEXT_CLASS.start + c] = 1.0
            self.decoder.unembed.weight[c, ANSWER.start + c] = 1.0
        self.setup()

    def encode(self, inputs, resid=None, start=0, stop=None) -> Tensor:
        return self.connector(inputs.features[:, :, ::4].transpose(1, 2))

    def copy_head(self, layer: int, head: int, marker: int, source: slice, gain: float) -> None:
        """Make a head carry the class at the marked position to the answer, for the question."""
        self.attend(layer, head, QUERY, marker, SHARP)
        for c in range(N_CLASSES):
            self.carry(layer, head, source.start + c, ANSWER.start + c, gain)

    def attend(
        self, layer: int, head: int, asked: int, found: int, score: float, channel: int = 0
    ) -> None:
        """Give positions flagged ``found`` a score from positions flagged ``asked``."""
        attn = self.decoder.blocks[layer].attn
        attn.W_Q[head, asked, channel] = score * attn.d_head**0.5
        attn.W_K[head, found, channel] = 1.0

    def carry(self, layer: int, head: int, read: int, written: int, gain: float = 1.0) -> None:
        """Make a head move a dimension of what it attends to into another."""
        attn = self.decoder.blocks[layer].attn
        channel = 1 + (read - AUDIO_CLASS.start) % N_CLASSES
        attn.W_V[head, read, channel] = 1.0
        attn.W_O[head, channel, written] = gain

    def neuron(
        self,
        layer: int,
        index: int,
        gate: dict[int, float],
        reads: dict[int, float],
        writes: dict[int, float],
    ) -> None:
        """``relu(gate . x) * (reads . x)``, added to the stream with the weights ``writes``."""
        mlp = self.decoder.blocks[layer].mlp
        for dim, weight in gate.items():
            mlp.gate.weight[index, dim] = weight
        for dim, weight in reads.items():
            mlp.fc_in.weight[index, dim] = weight
        for dim, weight in writes.items():
            mlp.fc_out.weight[dim, index] = weight


@dataclass(frozen=True)
class Cue:
    """What a prompt says: a class heard at an audio token, and a class read in the text.

    ``loud`` is how much of the marker the audio token has.
    """

    heard: int
    read: int = 0
    at_token: int = 6
    loud: float = 1.0


def prompt(cue: Cue) -> AudioInputs:
    """``[audio x 10, text cue, question]``, with the heard class in one audio token."""
    features = torch.zeros(1, WIDTH, 4 * AUDIO_TOKENS, dtype=torch.float64)
    frame = 4 * cue.at_token
    features[0, MARKER, frame] = cue.loud
    features[0, AUDIO_CLASS.start + cue.heard, frame] = 1.0
    tokens = torch.tensor([[AUDIO] * AUDIO_TOKENS + [TEXT_CUE + cue.read, QUESTION]])
    return AudioInputs(features, tokens, clips_per_row=(1,))


def copy_toy(n_layers: int = 5, layer: int = 2, head: int = 1) -> Toy:
    """METHODS toy A: one head of one layer moves the heard class to the answer."""
    toy = Toy(n_layers)
    toy.copy_head(layer, head, MARKER, AUDIO_CLASS, gain=1.0)
    return toy


def two_stream_toy(w_audio: float, w_text: float, layer: int = 1) -> Toy:
    """METHODS toy E: head 0 brings the heard class with one weight, head 1 the read class."""
    toy = Toy(n_layers=3)
    toy.copy_head(layer, 0, MARKER, AUDIO_CLASS, gain=w_audio)
    toy.copy_head(layer, 1, TEXT_MARKER, TEXT_CLASS, gain=w_text)
    return toy


def gate_toy(gate: str, layer: int = 1) -> Toy:
    """METHODS toy B: the MLP joins "heard class 1" (head 0) and "read class 1" (head 1).

    The joined bit, "and" or "or", is the logit of token 0.
    """
    heard, read, joined = ANSWER.start + 1, ANSWER.start + 2, ANSWER.start
    toy = Toy(n_layers=3)
    toy.attend(layer, 0, QUERY, MARKER, SHARP)
    toy.carry(layer, 0, AUDIO_CLASS.start + 1, heard)
    toy.attend(layer, 1, QUERY, TEXT_MARKER, SHARP)
    toy.carry(layer, 1, TEXT_CLASS.start + 1, read)
    both = {heard: 1.0, read: 1.0, QUERY: -1.0}  # relu(a + b - 1)
    if gate == "and":
        toy.neuron(layer, 0, both, {QUERY: 1.0}, {joined: 1.0})
    else:  # a + b - relu(a + b - 1)
        toy.neuron(layer, 0, {QUERY: 1.0}, {heard: 1.0, read: 1.0}, {joined: 1.0})
        toy.neuron(layer, 1, both, {QUERY: 1.0}, {joined: -1.0})
    return toy


def saturated_toy(gap: float = 30.0, layer: int = 1, head: int = 1) -> Toy:
    """METHODS toy C: a loud marker draws all attention, by a score gap, off the text cue.

    Keys: without the marker (``loud=0``) the head rests on the text cue. Queries: so it does for a
    prompt that is `not_asking`. Either way both patterns are one-hot, and gradients vanish.
    """
    toy = Toy(n_layers=3)
    toy.decoder.token_embed.weight[REST, REST_QUERY] = 1.0
    for asked in (QUERY, REST_QUERY):
        toy.attend(layer, head, asked, TEXT_MARKER, gap, channel=0)
    toy.attend(layer, head, QUERY, MARKER, 2 * gap, channel=1)
    toy.carry(layer, head, AUDIO_CLASS.start + 1, ANSWER.start + 1)
    return toy


def cancelling_toy(n_layers: int = 5, writer: int = 1, canceller: int = 3) -> Toy:
    """METHODS toy D: a head writes x, a later MLP adds -min(x, 0.2): 0.8 is left of 1.

    At x = 0 the gradients of the two ways out cancel exactly.
    """
    x = ANSWER.start + 1
    toy = Toy(n_layers)
    toy.attend(writer, 0, QUERY, MARKER, SHARP)
    toy.carry(writer, 0, AUDIO_CLASS.start + 1, x)
    toy.neuron(canceller, 0, {QUERY: 1.0}, {x: 1.0}, {x: -1.0})
    toy.neuron(canceller, 1, {x: 1.0, QUERY: -0.2}, {QUERY: 1.0}, {x: 1.0})
    return toy


def not_asking(inputs: AudioInputs) -> AudioInputs:
    """The prompt with a last token that asks for nothing."""
    tokens = inputs.tokens.clone()
    tokens[:, -1] = REST
    return replace(inputs, tokens=tokens)


def diluting_toy(writer: int = 1, diluter: int = 3, gain: float = 1.2) -> Toy:
    """A head brings the heard class, and a later layer writes the read class over it.

    What is heard with less than ``gain`` loses. The layers between and behind write nothing.
    """
    toy = HearingToy(n_layers=5)
    toy.copy_head(writer, 0, MARKER, AUDIO_CLASS, gain=1.0)
    toy.copy_head(diluter, 1, TEXT_MARKER, TEXT_CLASS, gain=gain)
    return toy


class HearingToy(Toy):
    """A toy that takes clips: their first sample says the class, the second how loud it is heard.

    ``spoken`` makes them. Silence says nothing. A text is the class that is read.
    """

    def prepare(self, audio, text, sampling_rate=None) -> AudioInputs:
        made = []
        for clip, said in zip(audio, text, strict=True):
            inputs = prompt(Cue(heard=0, read=int(said)))
            frame = inputs.features[0, :, 4 * Cue(0).at_token]
            frame.zero_()
            heard, loud = (round(1000 * float(x)) for x in clip["array"][:2])
            if heard:
                frame[MARKER], frame[AUDIO_CLASS.start + heard - 1] = 1.0, loud / 100
            made.append(inputs)
        return AudioInputs.joined(made)

    def to_single_token(self, text) -> int:
        return int(text)


def spoken(heard: int, loud: float = 1.0) -> dict:
    """A clip in which a `HearingToy` hears a class."""
    samples = torch.zeros(1600)
    samples[0], samples[1] = (heard + 1) / 1000, loud / 10
    return {"array": samples.numpy(), "sampling_rate": 16_000}


def hearing_copy_toy(n_layers: int = 5, layer: int = 2, head: int = 1) -> HearingToy:
    """`copy_toy` with clips."""
    toy = HearingToy(n_layers)
    toy.copy_head(layer, head, MARKER, AUDIO_CLASS, gain=1.0)
    return toy
