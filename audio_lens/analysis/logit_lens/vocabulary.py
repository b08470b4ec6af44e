"""What a model's streams can be read as: tokens of text, and the first ones of options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models import HookedAudioTransformer, TokenError
from audio_lens.models.config import TEXT

AT_ONCE = 2**23  # logits that are computed at a time
SPELLINGS = ("{}", " {}")  # words are often other tokens at the head of a text than behind a space


def reads_text(model: HookedAudioTransformer) -> bool:
    """Whether what the model writes, position by position, is tokens or labels of text."""
    return model.cfg.output_kind in ("tokens", "ctc") or TEXT in dict(model.cfg.streams)


def check_reads_text(model: HookedAudioTransformer) -> None:
    """Raise unless the model writes text.

    Raises:
        InputError: saying what it gives instead.
    """
    if reads_text(model):
        return
    cfg = model.cfg
    gives = {"classes": "one row of classes for a clip", None: "hidden states"}
    instead = ", ".join(dict(cfg.streams)) or gives.get(cfg.output_kind, str(cfg.output_kind))
    raise InputError(
        f"{cfg.model_name} has no vocabulary that a logit lens could read: its {model.output_part} "
        f"gives {instead}"
    )


def vocabulary_size(model: HookedAudioTransformer) -> int:
    """How many tokens there are to read; of several streams, of the text.

    Raises:
        InputError: a model without a vocabulary.
    """
    cfg = model.cfg
    count = dict(cfg.streams)[TEXT] if cfg.output_kind == "streams" else cfg.output.d_vocab
    if count is None:
        raise InputError(f"the {model.output_part} of {cfg.model_name} has no vocabulary")
    return count


def token_logits(
    model: HookedAudioTransformer, hidden: Float[Tensor, "1 n d"], inputs: AudioInputs
) -> Float[Tensor, "1 n v"]:
    """What is read of final hidden states: of several streams, the text."""
    if model.cfg.output_kind == "streams":
        return model.part("decoder").unembed(hidden)
    return model.read_out(hidden, inputs)


def stream_hooks(model: HookedAudioTransformer, part: str) -> list[str]:
    """The hook names of a part's residual streams: what enters each block, what leaves the last."""
    blocks = model.part(part).blocks
    reads = [f"{part}.blocks.{layer}.hook_resid_pre" for layer in range(len(blocks))]
    return [*reads, f"{part}.blocks.{len(blocks) - 1}.hook_{blocks[-1].last_stage}"]


def first_tokens(model: HookedAudioTransformer, options: Sequence[str]) -> list[list[int]]:
    """The tokens that options begin with, a list for each.

    An option may be spelled as it stands and behind a space, which tokenizers tell apart. Of both,
    those count whose first tokens are other ones for every option.

    Raises:
        TokenError: options that begin with the same token in either spelling, that the tokenizer
            does not know, or a model without one.
    """
    spelled = [_begins(model, [form.format(option) for option in options]) for form in SPELLINGS]
    told = [first for first in spelled if first and len(set(first)) == len(options)]
    if not told:
        raise TokenError(_alike(model, options, spelled[0] or spelled[1]))
    joined = [sorted(set(tokens)) for tokens in zip(*told, strict=True)]
    is_apart = len({token for own in joined for token in own}) == sum(map(len, joined))
    return joined if is_apart else [[token] for token in told[0]]


def _begins(model: HookedAudioTransformer, texts: Sequence[str]) -> list[int] | None:
    """The first token of each text; None where the tokenizer does not know one of them."""
    tokenizer = model.need_tokenizer("the tokens of options")
    found = [tokenizer.encode(text, add_special_tokens=False)[:1] for text in texts]
    unknown = [[], [getattr(tokenizer, "unk_token_id", None)]]
    return None if any(one in unknown for one in found) else [one[0] for one in found]


def _alike(
    model: HookedAudioTransformer, options: Sequence[str], first: Sequence[int] | None
) -> str:
    if first is None:
        return f"the tokenizer does not know all of the options {list(options)}"
    one, other = next((i, j) for j in range(len(first)) for i in range(j) if first[i] == first[j])
    piece = model.tokenizer.convert_ids_to_tokens([first[one]])[0]
    return (
        f"the options {options[one]!r} and {options[other]!r} both begin with the token {piece!r}: "
        "a lens reads first tokens, and cannot tell them apart"
    )


def logits_of_streams(
    model: HookedAudioTransformer, resid: Float[Tensor, "streams n d"], inputs: AudioInputs
) -> Float[Tensor, "streams n v"]:
    """What residual streams would write, by the final norm and the unembedding."""
    count, rows, _ = resid.shape
    with model.without_hooks():  # the user's hooks had their say in the run
        hidden = model.output_stack.finish(resid.to(model.device).flatten(0, 1)[None])
        return token_logits(model, hidden, inputs)[0].unflatten(0, (count, rows))


def pieces(model: HookedAudioTransformer, n_streams: int, count: int) -> list[slice]:
    """So many positions in pieces whose logits are not too many at a time."""
    size = max(1, AT_ONCE // (vocabulary_size(model) * n_streams))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def option_log_probs(
    log_probs: Float[Tensor, "*b v"], tokens: Sequence[Sequence[int]]
) -> Float[Tensor, "*b options"]:
    """The log-probability of every option: of all spellings together."""
    return torch.stack([log_probs[..., list(own)].logsumexp(-1) for own in tokens], -1)
