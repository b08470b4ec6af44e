"""Hand-made audio LLMs whose circuits are known, to hold methods against planted truth.

All are Qwen2-Audio in shape, so that hooks, timelines and sweeps run as on a real model, with the
encoder and the norms taken out: every 40 ms of "mel" enters the residual stream as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from audio_lens.inputs import AudioInputs
from audio_lens.models.config import AudioConfig
from audio_lens.models.families.qwen2_audio import HookedQwen2Audio
from audio_lens.models.families.whisper import HookedWhisper
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

    width = WIDTH
    n_neurons = 4

    def __init__(self, n_layers: int, n_heads: int = 2):
        shape = {
            "n_heads": n_heads,
            "n_key_value_heads": n_heads,
            "d_model": self.width,
            "d_head": 1 + N_CLASSES,
            "d_mlp": self.n_neurons,
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
        super().__init__(AudioConfig("toy", "toy", encoder, decoder, self.width, n_frames))
        self.audio_token_id = AUDIO
        self.decoder.rotary = _NoPositions()
        self.decoder.ln_final = _NoNorm()
        for block in self.decoder.blocks:
            block.ln1, block.ln2 = _NoNorm(), _NoNorm()
        self.double().requires_grad_(False)
        for parameter in self.parameters():
            parameter.zero_()
        self.connector.linear.weight.copy_(torch.eye(self.width))
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


# -------------------------------------------------------------------------------- with an encoder

END = TEXT_CUE  # of a text; the tokens before it are words
WORDS = ("a", "b", "c", "d", "<end>", "<5>", "<6>", "<7>", "<question>", "<unknown>")


def word_tokenizer(words: tuple[str, ...], unknown: str) -> PreTrainedTokenizerFast:
    """One token for each of these words, by their order; those in <> are signs and no text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    signs = [word for word in words if word.startswith("<")]
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)
    made.add_special_tokens({"additional_special_tokens": signs})
    return made


class EncoderToy(HookedWhisper):
    """Whisper in shape, of zero weights without norms or positions, on raw samples.

    Every sample of a clip is a frame: ``(c + 1) / 10`` says class c, and 0 says nothing. A marked
    frame is read by head 0 of cross-attention in the decoder's block 0, for the question.
    """

    def __init__(self, n_encoder: int, n_decoder: int = 2, n_heads: int = 2):
        shape = {
            "n_heads": n_heads,
            "n_key_value_heads": n_heads,
            "d_model": WIDTH,
            "d_head": 1 + N_CLASSES,
            "d_mlp": N_CLASSES,
            "act_fn": "relu",
            "eps": 0.0,
            "normalization_type": "LN",
        }
        encoder = PartConfig(n_layers=n_encoder, n_ctx=AUDIO_TOKENS, **shape)
        decoder = PartConfig(
            n_layers=n_decoder, n_ctx=128, causal=True, d_vocab=VOCABULARY, **shape
        )
        super().__init__(AudioConfig("toy", "toy", encoder, decoder, WIDTH, AUDIO_TOKENS))
        for part in (self.encoder, self.decoder):
            part.ln_final = _NoNorm()
            for block in part.blocks:
                block.ln1, block.ln2, block.ln_cross = _NoNorm(), _NoNorm(), _NoNorm()
        self.double().requires_grad_(False)
        for parameter in self.parameters():
            parameter.zero_()
        self.decoder.token_embed.weight[QUESTION, QUERY] = 1.0
        for c in range(N_CLASSES):
            self.decoder.token_embed.weight[c, TEXT_MARKER] = 1.0
            self.decoder.token_embed.weight[c, TEXT_CLASS.start + c] = 1.0
            self.decoder.unembed.weight[c, ANSWER.start + c] = 1.0
        self.decoder.unembed.weight[END, TEXT_MARKER] = 0.5  # a word is enough
        self.copy_head(self.decoder.blocks[0].cross_attn, 0, (QUERY, MARKER), AUDIO_CLASS, 1.0)
        self.tokenizer = word_tokenizer(WORDS, "<unknown>")
        self.generation_config = GenerationConfig(
            eos_token_id=END, pad_token_id=END, decoder_start_token_id=QUESTION
        )
        self.setup()

    @staticmethod
    def copy_head(
        attn: nn.Module,
        head: int,
        seeks: tuple[int, int],
        source: slice,
        gain: float,
        classes: range = range(N_CLASSES),
    ) -> None:
        """Make a head move classes to the answer, for positions flagged one way from another."""
        asked, found = seeks
        attn.W_Q[head, asked, 0] = SHARP * attn.d_head**0.5
        attn.W_K[head, found, 0] = 1.0
        for c in classes:
            attn.W_V[head, source.start + c, 1 + c] = 1.0
            attn.W_O[head, 1 + c, ANSWER.start + c] = gain

    def enter_encoder(self, inputs: AudioInputs) -> Tensor:
        return inputs.features.transpose(1, 2)

    def prepare(self, audio, text=None, sampling_rate=None) -> AudioInputs:
        clips = self.load_clips(audio, sampling_rate)
        features = torch.zeros(len(clips), WIDTH, AUDIO_TOKENS, dtype=torch.float64)
        for row, clip in enumerate(clips):
            for frame, sample in enumerate(clip.tolist()):
                if (c := round(10 * sample) - 1) in range(N_CLASSES):
                    features[row, [MARKER, AUDIO_CLASS.start + c], frame] = 1.0
        return AudioInputs(
            features,
            torch.full((len(clips), 1), QUESTION),
            clips_per_row=(1,) * len(clips),
            audio=clips,
            text=text,
            remake=self.prepare,
        )


def commit_toy(settled: int, n_layers: int = 5) -> EncoderToy:
    """METHODS toy F: each of the first ``settled`` encoder blocks takes the heard class to the
    next; those behind change nothing.
    """
    toy = EncoderToy(n_layers)
    for block in toy.encoder.blocks[:settled]:
        for c in range(N_CLASSES):
            heard, following = (AUDIO_CLASS.start + (c + i) % N_CLASSES for i in (0, 1))
            block.mlp.fc_in.weight[c, heard] = 1.0
            block.mlp.fc_out.weight[heard, c] = -1.0
            block.mlp.fc_out.weight[following, c] = 1.0
    return toy


def loop_toy(layer: int = 1, head: int = 1, looping: int = 3) -> EncoderToy:
    """Writes the heard word and ends; but one head of self-attention copies what was written, for
    one of the words, and that never ends. Another head copies so weakly that it does no harm.
    """
    toy = EncoderToy(n_encoder=1)
    attn = toy.decoder.blocks[layer].attn
    seeks = (TEXT_MARKER, TEXT_MARKER)
    toy.copy_head(attn, head, seeks, TEXT_CLASS, 2.0, range(looping, looping + 1))
    toy.copy_head(attn, 1 - head, seeks, TEXT_CLASS, 0.1)
    return toy


def two_path_toy(through: float = 0.5) -> Toy:
    """A linear one: a head brings the heard class, and a later head adds ``through`` of that.

    The answer reads the first head directly and by way of the second.
    """
    toy = Toy(n_layers=3)
    toy.copy_head(0, 0, MARKER, AUDIO_CLASS, gain=1.0)
    toy.attend(1, 1, QUERY, QUERY, SHARP)
    for c in range(N_CLASSES):
        toy.carry(1, 1, ANSWER.start + c, ANSWER.start + c, through)
    return toy


# -------------------------------------------------------------------------------- with a rotation


class SubspaceToy(HearingToy):
    """METHODS toy G: the copying toy in 32 dimensions, all of it turned by one random rotation.

    The heard class lies in three directions of the cue (four classes, whose sum means nothing), and
    a third sample of the clip says who speaks: a vector half as long that nothing reads.
    """

    width = 32

    def __init__(self, n_layers: int = 3, layer: int = 1, gain: float = 8.0, seed: int = 0):
        super().__init__(n_layers)
        self.copy_head(layer, 1, MARKER, AUDIO_CLASS, gain)
        draw = torch.Generator().manual_seed(seed)
        square = torch.randn(self.width, self.width, generator=draw, dtype=torch.float64)
        self.turned = torch.linalg.qr(square)[0]
        self.connector.linear.weight.copy_(self.turned)
        for weight in (self.decoder.token_embed.weight, self.decoder.unembed.weight):
            weight.copy_(weight @ self.turned.T)
        for block in self.decoder.blocks:
            for weight in (block.attn.W_Q, block.attn.W_K, block.attn.W_V):
                weight.copy_(self.turned @ weight)
            block.attn.W_O.copy_(block.attn.W_O @ self.turned.T)

    @property
    def planted(self) -> Tensor:
        """What says the class, ``32 3``."""
        classes = self.turned[:, AUDIO_CLASS]
        return torch.linalg.svd(classes - classes.mean(1, keepdim=True))[0][:, : N_CLASSES - 1]

    def encode(self, inputs, resid=None, start=0, stop=None) -> Tensor:
        frames = inputs.features[:, :, ::4].transpose(1, 2)
        return self.connector(nn.functional.pad(frames, (0, self.width - WIDTH)))

    def prepare(self, audio, text, sampling_rate=None) -> AudioInputs:
        inputs = super().prepare(audio, text)
        for row, clip in enumerate(audio):
            speaker = round(1000 * float(clip["array"][2]))
            inputs.features[row, TEXT_CLASS.start + speaker, 4 * Cue(0).at_token] = 0.5
        return inputs


class DormantToy(HearingToy):
    """Two pathways, of which the model uses one (2311.17030): the class is heard at two tokens.

    A head brings the answer from the later one. Another would bring it from the cue (token 6), but
    reads dimensions there that are the same in every run; the class that is heard at the cue lies
    in others, which nothing reads. Directions that join both (`illusion`) exchange the answer,
    which the whole cue does not.
    """

    LATER = 8  # the token whose class is answered
    SECOND = TEXT_MARKER  # its flag

    def __init__(self, gain: float = 8.0, dormant: float = 40.0):
        super().__init__(n_layers=3)
        self.decoder.token_embed.weight[:, self.SECOND] = 0.0  # of the text's cue
        self.copy_head(1, 0, self.SECOND, AUDIO_CLASS, gain)
        self.copy_head(1, 1, MARKER, TEXT_CLASS, dormant)

    @property
    def illusion(self) -> Tensor:
        """What is heard at the cue, joined with what could be read there: ``d 3``."""
        both = torch.zeros(self.width, N_CLASSES, dtype=torch.float64)
        for c in range(N_CLASSES):
            both[AUDIO_CLASS.start + c, c] = both[TEXT_CLASS.start + c, c] = 0.5**0.5
        return torch.linalg.svd(both - both.mean(1, keepdim=True))[0][:, : N_CLASSES - 1]

    def prepare(self, audio, text, sampling_rate=None) -> AudioInputs:
        inputs = super().prepare(audio, text)
        cue, later = (inputs.features[:, :, 4 * at] for at in (Cue(0).at_token, self.LATER))
        later[:, AUDIO_CLASS] = cue[:, AUDIO_CLASS]
        later[:, self.SECOND] = 1.0
        return inputs


def said_by(speaker: int, heard: int) -> dict:
    """A clip in which a `SubspaceToy` hears a class, said by one of four."""
    clip = spoken(heard)
    clip["array"][2] = speaker / 1000
    return clip
