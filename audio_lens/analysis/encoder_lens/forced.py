"""A model's own greedy texts, read again by it in one pass: what each layer holds of each token."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.analysis.prompts import with_tokens
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.kinds.streams import CodecTime
from audio_lens.models.mixins.settings import end_tokens


@dataclass(frozen=True)
class Forced:
    """Prompts with what the model wrote to them.

    Attributes:
        inputs: the prompts and all they need to be read again, the last token left out.
        tokens: what was written.
        is_text: True where that is text: before the end, and no sign of the tokenizer's.
        start: the position of ``inputs`` that writes the first token.
        lengths: of every text in tokens, its end left out.
    """

    inputs: AudioInputs
    tokens: Int[Tensor, "b n"]
    is_text: Bool[Tensor, "b n"]
    start: int
    lengths: Int[Tensor, " b"]


def check_writes(model: HookedAudioTransformer) -> None:
    """Raise unless the model has a decoder that writes one stream of tokens.

    Raises:
        InputError: naming what it has instead.
    """
    cfg = model.cfg
    if isinstance(model, CodecTime):
        raise InputError(f"{cfg.family} writes along with the sound: its texts have no prompt")
    if cfg.decoder is None or cfg.output_kind != "tokens":
        raise InputError(f"{cfg.family} has no decoder that writes text, one token after the other")


def forced(
    model: HookedAudioTransformer, inputs: AudioInputs, max_new_tokens: int | None = None
) -> Forced:
    """What the model writes to prompts, ready to be read again."""
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    tokens = model.generate(inputs, return_type="tokens", **limit)
    n_prompt = inputs.tokens.shape[1]
    new = tokens[:, n_prompt:]
    ends = torch.tensor(end_tokens(model.generation_config), device=new.device)
    is_end = torch.isin(new, ends)
    is_written = is_end.long().cumsum(1) == 0
    signs = torch.tensor(getattr(model.tokenizer, "all_special_ids", []), device=new.device)
    return Forced(
        with_tokens(inputs, tokens[:, :-1]) if new.shape[1] > 1 else inputs,
        new,
        is_written & ~torch.isin(new, signs),
        n_prompt - 1,
        is_written.sum(1),
    )


@torch.no_grad()
def decoder_streams(
    model: HookedAudioTransformer, given: Forced
) -> Iterator[Float[Tensor, "b n d"]]:
    """The residual stream behind every block of the decoder, at the positions that write."""
    names = [
        f"decoder.blocks.{layer}.hook_{block.last_stage}"
        for layer, block in enumerate(model.output_stack.blocks)
    ]
    _, cache = model.run_with_cache(
        given.inputs, names_filter=names, return_cache_object=False, return_type=None
    )
    for name in names:
        yield cache[name][:, given.start :]


@torch.no_grad()
def top_tokens(model: HookedAudioTransformer, given: Forced) -> Int[Tensor, "layers b n"]:
    """The likeliest token by every layer of the decoder, by final norm and unembedding."""
    found = []
    for stream in decoder_streams(model, given):
        with model.without_hooks():
            hidden = model.output_stack.finish(stream)
            found.append(model.read_out(hidden, given.inputs).argmax(-1))
    return torch.stack(found)


def right_tokens(
    model: HookedAudioTransformer, tokens: Int[Tensor, " n"], truth: str
) -> Bool[Tensor, " n"]:
    """Which tokens stand in a transcript, in order; case and spaces do not count."""
    tokenizer = model.need_tokenizer("a transcript")
    wanted = tokenizer.encode(" " + truth.strip(), add_special_tokens=False)
    said, true = (
        [tokenizer.decode([int(token)]).strip().lower() for token in row]
        for row in (tokens.tolist(), wanted)
    )
    right = torch.zeros(len(tokens), dtype=torch.bool)
    matcher = difflib.SequenceMatcher(None, true, said, autojunk=False)
    for block in matcher.get_matching_blocks():
        right[block.b : block.b + block.size] = True
    return right
