"""Contrastive and gated decoding: what answers become without touching any activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.answers import RIGHT, TOLD, Answers
from audio_lens.analysis.encoder_lens.forced import check_writes
from audio_lens.analysis.prompts import with_tokens
from audio_lens.analysis.steering.rules import RULES, Rule
from audio_lens.arguments import listed, names, number, whole
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Items, found, method
from audio_lens.items.controls import other_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.mixins.settings import end_tokens
from audio_lens.patching import run
from audio_lens.progress import track
from audio_lens.results import Result

OTHER, IDENTITY = CONTROLS = ("other_item", "identity")


@method("steering.contrast")
def contrast(
    model: HookedAudioTransformer,
    items: Items,
    rule: Rule | str = "AAD",
    strengths: Sequence[float | int] | None = None,
    *,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How items are answered when their logits are set against those of a run beside, by strength.

    The logits of all items are held in memory, of both runs.

    Args:
        model: a model that writes text.
        items: with answers of one token; of "GACL", whose texts hold what ``other_text`` holds
            otherwise, which is what the run beside lacks.
        rule: "AAD", "TAD" or "GACL", or one of `AAD`, `TAD`, `GACL` with settings.
        strengths: of the rule; None takes a few.
        controls: "other_item", the run beside of another item; "identity", strength 0.
        by, size, seed, progress: as in `sweep`.

    Returns:
        Axes "metric" (as of `sweep`) and "strength".

    Raises:
        InputError: another rule or control, or strengths that are none.
        ItemError: answers that are not one token, or texts of which nothing can be left out.
        TokenError: words of TAD that are not one token.
    """
    check_writes(model)
    chosen = rule_of(rule)
    given = chosen.strengths if strengths is None else strengths
    steps = [float(number("strengths", x)) for x in listed("strengths", given, object, "numbers")]
    if not steps or len(set(steps)) < len(steps):
        raise InputError(f"strengths are one number or more, each once; got {given!r}")
    rules = [replace(chosen, strength=strength) for strength in steps]
    wanted = names("controls", controls)
    odd = [name for name in wanted if name not in CONTROLS]
    if odd:
        raise InputError(f"controls are some of {', '.join(CONTROLS)}, got {odd[0]!r}")
    asked = Answers.of(model, items)
    beside = chosen.beside(items)
    own = _logits(model, items, size, progress)
    other = _logits(model, beside, size, progress)

    def of(rows: Sequence[int], rule: Rule) -> Float[Tensor, "n m"]:
        return asked.of_logits(rule(model, own, other[list(rows)]), range(len(items)))

    def told(rows: Sequence[int]) -> Float[Tensor, "n m strengths"]:
        return torch.stack([of(rows, one) for one in rules], dim=-1)

    def result_of(values: Tensor, axes: dict[str, list], **more: Any) -> Result:
        axes = {"metric": asked.names, **axes}
        return found(values, axes, items, by=by, seed=seed, **more)

    plain, axes = asked.of_logits(own, range(len(items))), {"strength": steps}
    held: dict[str, Result] = {}
    if OTHER in wanted:
        lenders = other_item(len(items), asked.right.tolist(), seed=seed).tolist()
        held[OTHER] = result_of(told(lenders), axes)
    if IDENTITY in wanted:
        nothing = replace(chosen, strength=0.0)
        held[IDENTITY] = result_of(of(range(len(items)), nothing), {})
    meta = {"title": f"answers under {chosen.name}"}
    result = result_of(told(range(len(items))), axes, controls=held, meta=meta)
    result.report = [_said(result, chosen.name, plain.mean(0).tolist()), TOLD]
    return result


def rule_of(given: Rule | str) -> Rule:
    """A rule, by its name or as it is.

    Raises:
        InputError: another name.
    """
    if isinstance(given, Rule):
        return given
    if given not in RULES:
        raise InputError(f"a rule is one of {', '.join(RULES)}, got {given!r}")
    return RULES[given]()  # type: ignore[call-arg]


@torch.no_grad()
def _logits(
    model: HookedAudioTransformer, items: Items, size: int, progress: bool | None
) -> Float[Tensor, "n v"]:
    """The logits that write each item's answer."""
    found: list[Tensor | None] = [None] * len(items)
    with track("answers", len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            logits = cast(Tensor, run(model, batch.inputs, []))
            for row, one in zip(batch.rows, logits[:, -1].float().cpu(), strict=True):
                found[row] = one
            done += len(batch)
            advance(len(batch), done)
    return torch.stack([one for one in found if one is not None])


@torch.no_grad()
def decode(
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    beside: AudioInputs,
    rule: Rule | str = "AAD",
    *,
    max_new_tokens: int = 16,
) -> list[str]:
    """Write greedily by a rule; both runs read what is written.

    For short answers: every step reads both prompts again. Edits in force act in both runs.

    Args:
        model: a model that writes text.
        inputs: the prompts.
        beside: the prompts of the run beside, row by row, of ``rule.beside(items)``.
        rule: as in `contrast`.
        max_new_tokens: how many tokens to write at most.

    Raises:
        InputError: not as many prompts beside, or a model that writes no text.
    """
    chosen = rule_of(rule)
    count = whole("max_new_tokens", max_new_tokens, least=1)
    if len(inputs) != len(beside):
        raise InputError(f"{len(inputs)} prompts need as many beside them, got {len(beside)}")
    check_writes(model)
    tokenizer = model.need_tokenizer("text")
    sides = [inputs, beside]
    heard = [model.encode(one) for one in sides]
    ends = torch.tensor(end_tokens(model.generation_config), device=inputs.tokens.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(ends[0])
    new = inputs.tokens[:, :0]
    is_over = torch.zeros(len(inputs), dtype=torch.bool, device=new.device)
    for step in range(count):
        grown = [
            with_tokens(one, torch.cat([one.tokens, new], dim=1)) if step else one for one in sides
        ]
        own, other = (
            model(one, encoder_out=encoded)[:, -1]
            for one, encoded in zip(grown, heard, strict=True)
        )
        said = chosen(model, own, other, step).argmax(-1).masked_fill(is_over, pad)
        new, is_over = torch.cat([new, said[:, None]], dim=1), is_over | torch.isin(said, ends)
        if bool(is_over.all()):
            break
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _said(result: Result, name: str, unedited: Sequence[float]) -> str:
    before = dict(zip(result.coords["metric"], unedited, strict=True))[RIGHT]
    one = result.mean().select(metric=RIGHT)
    moved = ", ".join(
        f"{value:.2f} at {strength:g}"
        for strength, value in zip(result.coords["strength"], one.values.tolist(), strict=True)
    )
    told = f"{RIGHT} is {before:.2f}; by {name} {moved}"
    if OTHER in one.controls:
        told += f"; with another item beside {one.controls[OTHER].values.min():.2f} to "
        told += f"{one.controls[OTHER].values.max():.2f}"
    return f"{told}."
