"""Two measures of TARS (2601.05543) that go by one name there: the reward, and the drift."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.encoder_lens.forced import check_writes
from audio_lens.analysis.modality_gap.forms import TEMPLATE, Forms, Said
from audio_lens.analysis.prompts import with_tokens
from audio_lens.arguments import whole
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Item, ItemError, Items, found, method, statistics
from audio_lens.items.batches import prepared
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.mixins.settings import end_tokens
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

SITE = "decoder.resid_post"
EDGES = 2  # positions of a completion that the reward leaves out: its first and its last
OTHER = "other_item"
SHORT = "a completion of fewer than 3 tokens, of which the reward reads none"
States = Float[Tensor, "layers _ d"]


def reward(
    speech: Sequence[States], text: Sequence[States], is_right: Sequence[bool]
) -> tuple[Float[Tensor, " speech"], float]:
    """TARS's representation reward of some completions of one question, heard and read.

    Of each completion the first and the last position are left out and the rest is averaged; the
    reward of a spoken run is the cosine with a written one, averaged over layers. Written runs
    that are *right* are gone through in turn; without any, the reward is 0. Every written run
    gets the mean of the spoken ones.

    Args:
        speech, text: states of every completion, by layer; TARS takes layers 1 to the last, which
            the final norm has gone over.
        is_right: whether each written run answers rightly.

    Returns:
        The rewards of the spoken runs, and that of the written ones.

    Raises:
        InputError: no runs, completions of fewer than 3 tokens, or not as many marks as runs.
    """
    if not speech or len(text) != len(is_right):
        raise InputError(
            f"{len(speech)} spoken and {len(text)} written runs with {len(is_right)} marks"
        )
    pooled = [_pooled(states) for states in text]
    right = [states for states, ok in zip(pooled, is_right, strict=True) if ok]
    own = [_pooled(states) for states in speech]
    if not right:
        return torch.zeros(len(own), dtype=torch.float64), 0.0
    pairs = zip(own, itertools.cycle(right), strict=False)
    found_ = torch.stack([_cosine(one, other).mean() for one, other in pairs])
    return found_, float(found_.mean())


def _pooled(states: States) -> Float[Tensor, "layers d"]:
    if states.shape[1] <= EDGES:
        raise InputError(f"a completion of {states.shape[1]} tokens: the reward needs 3 or more")
    return states[:, 1:-1].double().mean(1)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.cosine_similarity(one, other, dim=-1).cpu()


@method("modality_gap.tars_reward")
def tars_reward(
    model: HookedAudioTransformer,
    items: Items,
    *,
    right: Callable[[Item, str], bool] | None = None,
    words: Said = None,
    template: str = TEMPLATE,
    max_new_tokens: int = 64,
    options: dict[str, Any] | None = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The `reward` of what a model answers to items heard and read, by layer.

    One greedy completion of each form, where the training has several that are drawn. Items whose
    written form is answered wrongly get 0, as there. Items of which a completion is shorter than
    3 tokens are left out and counted.

    Args:
        model, items, words, template: as in `gap`.
        right: whether a text answers an item; None looks for the answer in it.
        max_new_tokens: of a completion.
        options: further ones of ``model.generate``.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        seed: of the control and intervals.
        progress: as in `patching.sweep`.

    Returns:
        Cosines by "layer", 0 to the last, which the final norm has gone over. The control
        "other_item" pairs what is heard with the written completion of another item.

    Raises:
        As `gap`; ItemError where no item is left.
    """
    check_writes(model)
    forms = Forms.of(model, items, words, template, SITE, None)
    others = statistics.other_item(len(items), forms.said, seed=seed)
    limit = {"max_new_tokens": whole("max_new_tokens", max_new_tokens, least=1), **(options or {})}
    heard, read, ok = [], [], []
    with track("TARS reward", len(items), "items", show=progress) as advance, evaluating(model):
        for row, item in enumerate(items):
            heard.append(_completed(forms, prepared(item, model), limit)[0])
            states, text = _completed(forms, forms.written(row), limit)
            read.append(states)
            ok.append((right or _has_answer)(item, text))
            advance(1, row + 1)
    long = [
        row for row in range(len(items)) if min(_length(heard[row]), _length(read[row])) > EDGES
    ]
    if not long:
        raise ItemError(f"no item of {len(items)} is left: each has {SHORT}")
    axes = {"layer": forms.layers}

    def of(order: Sequence[int]) -> Float[Tensor, "n layers"]:
        values = torch.full((len(items), len(forms.layers)), torch.nan, dtype=torch.float64)
        for row in long:
            if _length(read[order[row]]) > EDGES:
                cosine = _cosine(_pooled(heard[row]), _pooled(read[order[row]]))
                values[row] = cosine * float(ok[order[row]])
        return values[long]

    drawn: dict[str, Any] = {"by": by, "seed": seed}
    part = items[long]
    result = found(
        of(range(len(items))), axes, part, dropped={SHORT: len(items) - len(long)}, **drawn
    )
    result.controls = {OTHER: found(of(others.tolist()), axes, part, **drawn)}
    result.meta |= {"title": "TARS reward", "value": "cosine of completions"}
    result.report = [
        f"Reward, the mean over layers: {float(result.mean().values.mean()):.3f}; with another "
        f"item's written completion {float(result.controls[OTHER].mean().values.nanmean()):.3f}.",
        f"{sum(ok)} of {len(items)} items are answered rightly in writing; the others have 0.",
        "This is what TARS trains on, not the drift that it reports: see tars_drift.",
    ]
    return result


@method("modality_gap.tars_drift")
def tars_drift(
    model: HookedAudioTransformer,
    items: Items,
    *,
    answer: str | Callable[[Item], str] = "answer",
    words: Said = None,
    template: str = TEMPLATE,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How far the states of one given answer drift apart behind the heard and the read question.

    The same tokens are put behind both forms; the value is the cosine of the two states of a
    token, averaged over the tokens, by layer: 1 where it does not matter whether the question was
    heard.

    Args:
        model, items, words, template: as in `gap`.
        answer: a label or field of the items, or a function of the item: the text that both forms
            are continued by, such as a chain of thought.
        by, seed, progress: as in `tars_reward`.

    Returns:
        Cosines by "layer", the last of which the final norm has gone over. The control
        "other_item" puts the answer behind the written form of another item.

    Raises:
        As `gap`; ItemError for items without an answer.
    """
    check_writes(model)
    forms = Forms.of(model, items, words, template, SITE, None)
    others = statistics.other_item(len(items), forms.said, seed=seed).tolist()
    texts = [_answer(item, answer) for item in items]
    own, beside = [], []
    with track("TARS drift", len(items), "items", show=progress) as advance, evaluating(model):
        for row, item in enumerate(items):
            tokens = _tokens(model, texts[row])
            heard, read, other = (
                _behind(forms, inputs, tokens)
                for inputs in (
                    prepared(item, model),
                    forms.written(row),
                    forms.written(others[row]),
                )
            )
            own.append(_cosine(heard.double(), read.double()).mean(1))
            beside.append(_cosine(heard.double(), other.double()).mean(1))
            advance(1, row + 1)
    axes, drawn = {"layer": forms.layers}, {"by": by, "seed": seed}
    result = found(torch.stack(own), axes, items, **drawn)
    result.controls = {OTHER: found(torch.stack(beside), axes, items, **drawn)}
    result.meta |= {"title": "drift of a given answer", "value": "cosine of its tokens"}
    result.report = list(_told(result))
    return result


def _told(result: Result) -> Iterator[str]:
    means, other = result.mean().values, result.controls[OTHER].mean().values
    low = int(means.argmin())
    yield (
        f"Furthest apart at layer {result.coords['layer'][low]}: {float(means[low]):.3f} (behind "
        f"another item's words {float(other[low]):.3f}); in the last {float(means[-1]):.3f} "
        f"({float(other[-1]):.3f})."
    )
    yield "This is the drift that TARS reports, not the reward that it trains on: see tars_reward."


# -------------------------------------------------------------------------------- completions


def _completed(forms: Forms, inputs: AudioInputs, limit: dict[str, Any]) -> tuple[States, str]:
    """The states of what the model writes to a prompt, and its text."""
    model = forms.model
    made: Any = model.generate(
        inputs, return_type="tokens", return_cache=True, names_filter=forms.names, **limit
    )
    tokens, cache = made
    start = inputs.tokens.shape[1]
    new = tokens[0, start:]
    ends = torch.tensor(end_tokens(model.generation_config), device=new.device)
    is_end = torch.isin(new, ends).tolist()
    count = is_end.index(True) + 1 if True in is_end else len(new)
    states = torch.stack([cache[name][0, start : start + count] for name in forms.names])
    text = model.need_tokenizer("an answer").decode(new[:count].tolist(), skip_special_tokens=True)
    return _normed(model, states), text.strip()


def _behind(forms: Forms, inputs: AudioInputs, tokens: Int[Tensor, "1 n"]) -> States:
    """The states of tokens behind a prompt."""
    longer = with_tokens(inputs, torch.cat([inputs.tokens, tokens.to(inputs.tokens)], dim=1))
    return _normed(forms.model, forms.states(longer)[:, 0, -tokens.shape[1] :])


@torch.no_grad()
def _normed(model: HookedAudioTransformer, states: States) -> States:
    """The states with the last layer's gone over by the final norm, as TARS has them."""
    with model.without_hooks():
        last = model.output_stack.finish(states[-1][None])[0]
    return torch.cat([states[:-1], last[None]])


def _tokens(model: HookedAudioTransformer, text: str) -> Int[Tensor, "1 n"]:
    ids = model.need_tokenizer("an answer").encode(text, add_special_tokens=False)
    return torch.tensor([ids])


def _answer(item: Item, answer: str | Callable[[Item], str]) -> str:
    said = answer(item) if callable(answer) else item.value(answer)
    if not isinstance(said, str) or not said.strip():
        raise ItemError(f"{item.name} has no {answer if isinstance(answer, str) else 'answer'}")
    return said


def _has_answer(item: Item, text: str) -> bool:
    if item.answer is None:
        raise ItemError(f"{item.name} has no answer: pass right=")
    return item.answer.lower() in text.lower()


def _length(states: States) -> int:
    return states.shape[1]
