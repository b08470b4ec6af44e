"""DeSTA2 (Lu et al. 2024, arXiv 2409.20007) and DeSTA2.5-Audio (Lu et al. 2025, 2507.02768).

Four blocks of Whisper are each read by 64 learned queries, with one Q-Former for all; a softmax mix
over the blocks becomes 64 vectors in the prompt of Llama, and the transcript follows them as text
(the caller brings it, such as what Whisper writes). The vectors have no order in time:
`audio_lens.analysis.time_profile.time_profile` says what each listens to.

Both models name the layers they read by the same numbers and mean other ones: DeSTA2 as released
counts the hidden states that Whisper returns, the first of which enters block 0, DeSTA2.5-Audio
what blocks give. `TAPS_2` and `TAPS_25` are in the latter sense. (The code that DeSTA2 was trained
with reads as DeSTA2.5-Audio does: ``desta2(..., taps=TAPS_25[12])`` is that.) Whatever lies behind
the last of them, such as Whisper's final norm, does not reach the language model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from einops import rearrange
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.inputs import InputError
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.compose.assemble import Placeholder, compose
from audio_lens.models.compose.model import HookedComposed
from audio_lens.models.config import LoadingError
from audio_lens.models.layers import Context, LayerNorm, PartConfig, Stack
from audio_lens.models.loading.checkpoints import stored_file
from audio_lens.models.loading.stored import reads_checkpoint
from audio_lens.models.loading.weights import fill, read_weights, renamed
from audio_lens.models.mixins.templates import chat_prompt
from audio_lens.models.parts.connectors import Connector
from audio_lens.models.parts.qformer import QFormerConfig, ReadingBlock, qformer_weight_names

Turn = Mapping[str, str]
Own = TypeVar("Own", bound="HookedDesta")

PLACEHOLDER = "<|reserved_special_token_87|>"  # one token of Llama 3, without a meaning there
LOCATOR = "<|AUDIO|>"  # where a clip belongs in what is asked
TAPS_2 = {12: (1, 4, 7, 10), 24: (4, 10, 16, 22), 32: (2, 6, 10, 14, 18, 22, 26, 30)}
TAPS_25 = {4: (0, 1, 2, 3), 12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31)}
"""Blocks whose `hook_resid_post` is read, by the number of blocks that Whisper has."""

_BERT = {
    theirs.replace("attention.attention", "attention.self").replace("_query", ""): ours
    for theirs, ours in qformer_weight_names("qformer", "connector").items()
}
WEIGHT_NAMES = {
    "layer_prompts.{l}": "connector.queries.{l}",
    "layer_weights": "connector.tap_weights",
    **_BERT,
    "proj.0": "connector.norm",
    "proj.1": "connector.linear",
}
"""The connector's names in `qformer_connector.pth` of DeSTA2, to ours."""


class DestaConnector(Connector, Stack):
    """Queries of several encoder blocks, each set reading its own; a mix, a norm, a linear map.

    The queries are side by side, block after block, and so are the positions they read: queries
    and patterns are as those of a Q-Former with one window per block that is read.
    ``hook_tap_weights`` (``segments t taps``) is how much of each block a token is made of.
    """

    cfg: QFormerConfig

    def __init__(self, cfg: QFormerConfig, taps: Sequence[int], d_out: int):
        super().__init__(cfg, ReadingBlock)
        self.taps = tuple(taps)
        sets = [torch.empty(1, cfg.n_queries, cfg.d_model) for _ in self.taps]
        self.queries = nn.ParameterList(map(nn.Parameter, sets))
        self.tap_weights = nn.Parameter(torch.empty(cfg.n_queries, len(self.taps)))
        self.norm = LayerNorm(cfg.d_model, 1e-5)
        self.linear = nn.Linear(cfg.d_model, d_out)
        self.hook_tap_weights, self.hook_mixed = HookPoint(), HookPoint()

    def carry(self, *tapped: Float[Tensor, "b s d"]) -> Float[Tensor, "b t d_out"]:
        n_clips, memory = len(tapped[0]), Context(memory=torch.cat(tapped, dim=1))
        queries = self.hook_embed(torch.cat(list(self.queries), dim=1).repeat(n_clips, 1, 1))
        found = self.run_blocks(queries, memory, 0, self.cfg.n_layers)
        shares = self.hook_tap_weights(self.tap_weights.softmax(-1).repeat(n_clips, 1, 1))
        by_tap = rearrange(found, "b (k t) d -> b t k d", k=len(self.taps))
        mixed = self.hook_mixed((by_tap * shares[..., None]).sum(2))
        return self.linear(self.norm(mixed))

    def token_pattern(self, pattern: Float[Tensor, "b q k"]) -> Float[Tensor, "b t s"]:
        """What tokens read of encoder positions, in whatever block, by their shares of these."""
        n_taps = len(self.taps)
        apart = rearrange(pattern, "b (p t) (q s) -> p q b t s", p=n_taps, q=n_taps)
        own = apart.diagonal().movedim(-1, 0)
        return einsum("k b t s, t k -> b t s", own, self.tap_weights.softmax(-1).to(own))

    def token_count(self, n_frames: int) -> int:
        return self.cfg.n_queries

    def token_seconds(self, frames: Float[Tensor, " frames"]) -> Float[Tensor, " tokens"]:
        return frames.new_full((self.cfg.n_queries,), torch.nan)


def desta_connector(
    tensors: Mapping[str, Tensor], ear: PartConfig, taps: Sequence[int]
) -> DestaConnector:
    """A connector of these weights, whose shapes say how large it is.

    Args:
        tensors: by the names they have in the connector.
        ear: Whisper's encoder.
        taps: blocks of it to read, in rising order.

    Raises:
        LoadingError: weights that are missing, unknown or do not fit Whisper and the taps.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    lacking = [
        n for n in ("tap_weights", "linear.bias", "blocks.0.mlp.fc_in.bias") if n not in shapes
    ]
    if lacking:
        raise LoadingError(f"these are no weights of a DeSTA connector: no {', '.join(lacking)}")
    n_queries, n_taps = shapes["tap_weights"]
    if n_taps != len(taps) or list(taps) != sorted(set(taps)):
        raise LoadingError(f"taps= names {n_taps} blocks of Whisper in rising order, got {taps}")
    layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    cfg = QFormerConfig(
        n_layers=len(layers),
        n_heads=ear.n_heads,
        n_key_value_heads=ear.n_heads,
        d_model=ear.d_model,
        d_head=ear.d_head,
        d_mlp=shapes["blocks.0.mlp.fc_in.bias"][0],
        n_ctx=None,
        act_fn="gelu",
        eps=1e-12,
        normalization_type="LN",
        model_name=ear.model_name,
        attn_biases=("q", "k", "v", "o"),
        final_norm=False,
        n_queries=n_queries,
        n_window=ear.need_n_ctx,
        d_memory=ear.d_model,
    )
    with torch.device("meta"):
        connector = DestaConnector(cfg, taps, shapes["linear.bias"][0])
    fill(connector, tensors)
    return connector


class HookedDesta(HookedComposed):
    """DeSTA2 or DeSTA2.5-Audio with every activation hooked.

    It is asked by whole prompts that hold the transcript of every clip: `prompt` makes them.

    Attributes:
        system: what the conversations of the published examples begin with.
        published_taps: blocks of Whisper that are read, by how many it has.
        prefix: before the names of the connector's weights.
    """

    system: ClassVar[str]
    published_taps: ClassVar[Mapping[int, tuple[int, ...]]]
    prefix: ClassVar[str] = ""

    @classmethod
    def of(
        cls: type[Own],
        state: Mapping[str, Tensor],
        encoder: Any,
        decoder: Any,
        taps: Sequence[int] | None = None,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Own:
        """The model of a connector's published weights; else as `desta2` and `desta25`."""
        ear = _heard_by(encoder, dtype)
        size = ear.cfg.need_encoder.n_layers
        taps = cls.published_taps.get(size) if taps is None else taps
        if taps is None:
            raise LoadingError(
                f"nothing is published for a Whisper of {size} blocks: name those that the "
                "connector reads with taps="
            )
        table = {
            cls.prefix + theirs: ours.removeprefix("connector.")
            for theirs, ours in WEIGHT_NAMES.items()
        }
        connector = desta_connector(renamed(state, table), ear.cfg.need_encoder, taps)
        return compose(
            ear,
            connector.to(ear.dtype),
            decoder,
            Placeholder(PLACEHOLDER),
            tokenizer=tokenizer,
            name=cls.__name__.removeprefix("Hooked").lower(),
            dtype=dtype,
            family=cls,
        )

    def prompt(self, question: str | Sequence[Turn], *transcripts: str) -> str:
        """A whole prompt for `prepare`, with a place for every clip and its transcript behind it.

        Args:
            question: asked about one clip; or a conversation in which ``<|AUDIO|>`` stands where
                each clip belongs.
            transcripts: of the clips in their order, as Whisper writes them.

        Raises:
            InputError: as many transcripts as clips are needed.
            TokenError: the model was loaded without a tokenizer.
        """
        turns = self.asked(question) if isinstance(question, str) else list(question)
        tokenizer = self.need_tokenizer("a prompt")
        context = chat_prompt(tokenizer, turns, add_generation_prompt=True)
        first, *others = context.split(LOCATOR)
        if len(others) != len(transcripts):
            raise InputError(
                f"this is about {len(others)} clip(s), with {len(transcripts)} transcript(s): pass "
                f"one for each {LOCATOR}"
            )
        pairs = zip(transcripts, others, strict=True)
        return first + "".join(self.spoken(words) + text for words, text in pairs)

    @abstractmethod
    def asked(self, question: str) -> list[Turn]:
        """The conversation in which the published examples ask about a clip."""

    @abstractmethod
    def spoken(self, transcript: str) -> str:
        """What stands in a prompt for a clip."""

    def templated(self, conversation: list) -> str:
        """Raises: the chat template alone does not know what is said.

        Raises:
            InputError: always.
        """
        raise InputError(
            "this model reads a transcript beside the audio: "
            "prepare(audio, model.prompt(question, transcript))"
        )

    def _pieces(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


class HookedDesta2(HookedDesta):
    """DeSTA2 with every activation hooked.

    Its tokens are those of the published `chat`: the tokenizer begins them with a second
    ``<|begin_of_text|>``, which the place of the audio does not count, so that the vectors come
    before the blank lines that end the header of the audio's turn, and the transcript after these.
    """

    system = "You are a helpful voice assistant."
    published_taps = TAPS_2

    def asked(self, question: str) -> list[Turn]:
        return [
            {"role": "system", "content": self.system},
            {"role": "audio", "content": LOCATOR},
            {"role": "user", "content": question},
        ]

    def spoken(self, transcript: str) -> str:
        return PLACEHOLDER + transcript

    def _encoded(self, prompt: str) -> list[int]:
        before, *after = prompt.split(PLACEHOLDER)
        if len(after) > 1:
            raise InputError(f"DeSTA2 takes one clip per prompt, this one has {len(after)}")
        tokens, place = self.tokenizer.encode(before + "".join(after)), len(self._pieces(before))
        return tokens[:place] + [self.audio_token_id] * len(after) + tokens[place:]


class HookedDesta25(HookedDesta):
    """DeSTA2.5-Audio with every activation hooked.

    Transcripts become tokens apart from what is around them, as published, where they have no
    blanks at their ends, and are one blank for clips without speech.
    """

    system = "Focus on the audio clips and instructions."
    published_taps = TAPS_25
    prefix = "perception.connector."
    begin, end = "<start_audio>", "<end_audio>"  # as text: they are several tokens

    def asked(self, question: str) -> list[Turn]:
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": f"{LOCATOR}\n{question}"},
        ]

    def spoken(self, transcript: str) -> str:
        return f"{self.begin}{PLACEHOLDER}{transcript}{self.end}"

    def _encoded(self, prompt: str) -> list[int]:
        first, *others = prompt.split(PLACEHOLDER)
        tokens = self._pieces(first)
        for spoken in others:
            transcript, end, text = spoken.partition(self.end)
            tokens += [self.audio_token_id, *self._pieces(transcript), *self._pieces(end + text)]
        return tokens


# -------------------------------------------------------------------------------- putting together


@reads_checkpoint
def desta2(
    checkpoint: str | Path = "DeSTA-ntu/DeSTA2-8B-beta",
    encoder: Any = "openai/whisper-small",
    decoder: Any = "meta-llama/Meta-Llama-3-8B-Instruct",
    *,
    taps: Sequence[int] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> HookedDesta2:
    """DeSTA2: Whisper, the published connector and Llama 3.

    Args:
        checkpoint: a hub id, local directory or file of ``qformer_connector.pth``.
        encoder, decoder, tokenizer: as `HookedAudioTransformer.compose` takes them.
        taps: blocks of Whisper whose `hook_resid_post` is read; None is what was published for
            one of this size (`TAPS_2`).
        dtype: of all parts. What the published parts have differs, so name one; None keeps that of
            models given as such.

    Raises:
        LoadingError: files that are not there, weights that do not fit, or taps that are unknown.
        CompositionError: parts that do not fit together.
    """
    state = read_weights(_file_of(checkpoint, "qformer_connector.pth"))
    return HookedDesta2.of(state, encoder, decoder, taps, tokenizer, dtype)


@reads_checkpoint
def desta25(
    checkpoint: str | Path = "DeSTA-ntu/DeSTA2.5-Audio-Llama-3.1-8B",
    encoder: Any = "openai/whisper-large-v3",
    decoder: Any = "DeSTA-ntu/Llama-3.1-8B-Instruct",
    *,
    taps: Sequence[int] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> HookedDesta25:
    """DeSTA2.5-Audio: Whisper, the published connector and Llama 3.1.

    Args:
        checkpoint: a hub id, local directory or file of ``model.safetensors``.
        encoder, decoder, tokenizer, taps, dtype: as in `desta2`, with `TAPS_25`.

    Raises:
        LoadingError: as in `desta2`; also for a checkpoint with an adapter of the language model,
            which none of the released ones has.
        CompositionError: parts that do not fit together.
    """
    state = read_weights(_file_of(checkpoint, "model.safetensors"))
    return HookedDesta25.of(state, encoder, decoder, taps, tokenizer, dtype)


def _file_of(checkpoint: str | Path, name: str) -> Path:
    """The file itself, or the one of this name in a local directory or on the hub."""
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    try:
        return stored_file(str(checkpoint), name)
    except OSError as error:
        raise LoadingError(f"no {name} in {checkpoint}: {error}") from error


def _heard_by(encoder: Any, dtype: torch.dtype | None) -> HookedAudioTransformer:
    """A hooked model of what hears."""
    if isinstance(encoder, HookedAudioTransformer):
        return encoder
    if isinstance(encoder, (str, Path)):
        return HookedAudioTransformer.from_pretrained(encoder, dtype)
    return HookedAudioTransformer.from_hf(encoder)
