"""What a cache holds, layer by layer: norms of the residual stream, and what it would write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.logit_lens.vocabulary import (
    AT_ONCE,
    reads_text,
    stream_hooks,
    token_logits,
    vocabulary_size,
)
from audio_lens.analysis.prompts import Places, Prompt, chosen_numbers, token_label
from audio_lens.cache import AudioCache
from audio_lens.inputs import InputError
from audio_lens.models.kinds.ctc import ctc_of
from audio_lens.running import evaluating

TOP_TOKENS = 3


@dataclass(frozen=True)
class Lens:
    """What each residual stream would write, by the final norm and the unembedding.

    Attributes:
        tokens, probs: the likeliest tokens and their probabilities, best first.
        watched: the probabilities of chosen tokens, by their names.
    """

    tokens: Int[np.ndarray, "streams positions top"]
    probs: Float[np.ndarray, "streams positions top"]
    watched: dict[str, Float[np.ndarray, "streams positions"]]


@dataclass(frozen=True)
class Streams:
    """The residual streams of a part at the positions of a prompt.

    Attributes:
        names: of the streams: the layer that reads it, and "out" behind the last one.
        norms: lengths of the vectors (L2); positions that hold the clip come first, then text.
        audio, text: these positions.
        labels: the tokens of the text.
        lens: None where there is no vocabulary, or nobody asked.
    """

    part: str
    names: list[str]
    norms: Float[np.ndarray, "streams positions"]
    audio: Places
    text: Places
    labels: list[str]
    lens: Lens | None

    @property
    def need_lens(self) -> Lens:
        """What the streams would write.

        Raises:
            InputError: where there is no vocabulary, or nobody asked.
        """
        if self.lens is None:
            raise InputError(f"the streams of the {self.part} were read without a logit lens")
        return self.lens


def has_vocabulary(prompt: Prompt, part: str) -> bool:
    """Whether what the part holds at a position can be read as tokens or labels."""
    return part == prompt.model.output_part and reads_text(prompt.model)


def check_vocabulary(prompt: Prompt, parts: Sequence[str]) -> None:
    """Raise where none of the parts has a vocabulary.

    Raises:
        InputError: saying what can be shown in its place.
    """
    if any(has_vocabulary(prompt, part) for part in parts):
        return
    output = prompt.model.output_part
    other = f" (the {output} has one)" if has_vocabulary(prompt, output) else ""
    if prompt.model.cfg.streams and not other:
        other = f" (it writes {', '.join(dict(prompt.model.cfg.streams))}, which are codes)"
    raise InputError(
        f"the {' and the '.join(parts)} of {prompt.model.cfg.model_name} has no vocabulary that a "
        f"logit lens could read{other}: leave out the lens and its tokens to see norms"
    )


def stream_names(prompt: Prompt, part: str, layers: Sequence[int] | None = None) -> dict[str, str]:
    """The hook names of the residual streams of a part: by the layer that reads it, and "out".

    Raises:
        InputError: layers that the part does not have.
    """
    *reads, out = stream_hooks(prompt.model, part)
    numbers = chosen_numbers("layers", layers, len(reads), part)
    return {str(layer): reads[layer] for layer in numbers} | {"out": out}


@torch.no_grad()
def read_streams(
    prompt: Prompt,
    parts: Sequence[str],
    lens: bool,
    tokens: Sequence[str | int] = (),
    cache: AudioCache | None = None,
    layers: Sequence[int] | None = None,
) -> list[Streams]:
    """Norms, and with ``lens`` what would be written where there is a vocabulary.

    Raises:
        InputError: a cache of another batch, or layers that a part does not have.
        HookNameError: a cache without these streams.
        TokenError: a word that is not one token.
    """
    names = {part: stream_names(prompt, part, layers) for part in parts}
    reading = [part for part in parts if lens and has_vocabulary(prompt, part)]
    ids = [_token_id(prompt, token) for token in tokens] if reading else []
    watched = dict(zip(map(str, tokens), ids, strict=True)) if reading else {}
    held = _run(prompt, names) if cache is None else cache
    return [
        _read_part(prompt, part, of_part, held, watched if part in reading else None)
        for part, of_part in names.items()
    ]


def _run(prompt: Prompt, names: Mapping[str, Mapping[str, str]]) -> AudioCache:
    """The streams of all parts, of a run on the prompt."""
    wanted = [name for of_part in names.values() for name in of_part.values()]
    with evaluating(prompt.model):
        return prompt.model.run_with_cache(prompt.inputs, names_filter=wanted, return_type=None)[1]


def _read_part(
    prompt: Prompt,
    part: str,
    names: dict[str, str],
    cache: AudioCache,
    watched: Mapping[str, int] | None,
) -> Streams:
    audio, text = prompt.places(part), prompt.untimed_places(part)
    streams = []
    for name in names.values():
        found = cache[name] if cache.has_batch_dim else cache[name][None]
        own = prompt.own(part, found)
        streams.append(torch.cat([audio.of(own), text.of(own)]))
    return Streams(
        part,
        list(names),
        torch.stack([stream.float().norm(dim=-1).cpu() for stream in streams]).numpy(),
        audio,
        text,
        prompt.labels(part, text),
        None if watched is None else _read_tokens(prompt, streams, watched),
    )


def _read_tokens(
    prompt: Prompt, streams: Sequence[Float[Tensor, "n d"]], tokens: Mapping[str, int]
) -> Lens:
    """What streams would write, and how likely some tokens are, given as ids by name."""
    read = [_written(prompt, stream, list(tokens.values())) for stream in streams]
    best, probs, watched = (torch.stack(x).numpy() for x in zip(*read, strict=True))
    return Lens(best, probs, {name: watched[..., i] for i, name in enumerate(tokens)})


def _token_id(prompt: Prompt, token: str | int) -> int:
    found, count = prompt.model.to_single_token(token), vocabulary_size(prompt.model)
    if found >= count:
        raise InputError(f"the text has {count} tokens, so none is {found}")
    return found


def _written(
    prompt: Prompt, stream: Float[Tensor, "n d"], watched: Sequence[int]
) -> tuple[Int[Tensor, "n top"], Float[Tensor, "n top"], Float[Tensor, "n watched"]]:
    """Likeliest tokens, their probabilities, and those of the watched ones."""
    model, found = prompt.model, []
    size = max(1, AT_ONCE // vocabulary_size(prompt.model))
    with model.without_hooks():  # the user's hooks had their say in the run
        for piece in stream.to(model.device).split(size):
            hidden = model.output_stack.finish(piece[None])
            probs = token_logits(model, hidden, prompt.inputs)[0].float().softmax(-1).cpu()
            best = probs.topk(min(TOP_TOKENS, probs.shape[-1]))
            found.append((best.indices, best.values, probs[:, list(watched)]))
    tokens, chances, of_watched = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return tokens, chances, of_watched


def texts_of(prompt: Prompt, streams: Streams) -> list[str]:
    """What every stream would write: a transcript, or the next token of the prompt."""
    best = torch.as_tensor(streams.need_lens.tokens[..., 0])
    if prompt.model.cfg.output_kind == "ctc":
        return [_transcript(prompt, path) for path in best]
    order = torch.cat([streams.audio.index, streams.text.index]).argsort()
    if prompt.is_codec_lm:
        return [prompt.text(path[order].tolist()) for path in best]
    return [token_label(prompt.model, int(path[order[-1]])) for path in best]


def _transcript(prompt: Prompt, path: Int[Tensor, " frames"]) -> str:
    """The text of a path of CTC labels."""
    model, blank = prompt.model, ctc_of(prompt.model.cfg).blank
    labels = [i for i in path.unique_consecutive().tolist() if i != blank]
    if model.tokenizer is None:
        return " ".join(token_label(model, label) for label in labels)
    return model.tokenizer.decode(labels, group_tokens=False)
