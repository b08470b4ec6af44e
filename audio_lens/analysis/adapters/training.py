"""Training an adapter on the answers of items, from wherever its first block begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from audio_lens.analysis.adapters.groups import MODULES, linears_of
from audio_lens.analysis.adapters.wearing import peft, put_on
from audio_lens.analysis.prompts import with_tokens
from audio_lens.arguments import number, numbers, whole
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Item, ItemError, Items
from audio_lens.models import HookedAudioTransformer, TokenError
from audio_lens.progress import track
from audio_lens.running import evaluating

METRICS = ("right", "log_prob")


def train(
    model: HookedAudioTransformer,
    items: Items,
    *,
    part: str | None = None,
    layers: Sequence[int] | None = None,
    modules: Sequence[str] = MODULES,
    rank: int = 8,
    scale: float = 2.0,
    steps: int = 60,
    rate: float = 2e-3,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> list[float]:
    """Put an adapter on a model and train it on the items' answers; the rest stays as it is.

    The adapter stays on, live: `model.lora`, `save`, `take_off`. Each step is one batch of items of
    equal layout, in an order drawn from the seed; Adam, whose rate falls to 0 (cosine).

    Args:
        model: the model.
        items: with answers: single tokens, several (teacher-forced), or classes.
        part: "encoder" or "decoder"; None takes the decoder, or else the encoder.
        layers: which blocks; None takes all.
        modules: linear maps of a block, by the ends of their names.
        rank: of the adapters.
        scale: of what they add (``alpha / r``).
        steps: of training.
        rate: of learning, at first.
        size: of the batches.
        seed: of the adapters' start and of the order.
        progress: as in `patching.sweep`.

    Returns:
        The loss of every step: cross-entropy in nats per token of the answers.

    Raises:
        ExtraError: no peft.
        InputError: a part, blocks or modules that are not there, a model that carries an adapter
            already, or that writes neither one stream of tokens nor classes.
        ItemError: items without answers, or answers that the model cannot give.
    """
    peft()
    part = part_of(model, part)
    names = linears_of(model, part, modules)
    check_counts(rank=rank, steps=steps, size=size)
    number("scale", scale, above=0)
    number("rate", rate, above=0)
    asked = [*names] if layers is None else numbers("layers", layers, least=0, most=len(names) - 1)
    if not asked:
        raise InputError("layers= names one block or more")
    answers = answers_of(model, items)
    ranks = {name: rank for layer in sorted(set(asked)) for name in names[layer]}
    with evaluating(model), frozen(model):
        start = Start(part, min(asked))
        benches = [one.at(model, start) for one in Bench.each(model, items, answers, size)]
        trained = put_on(model, ranks, scale, seed)
        return descend(model, benches, trained, steps, rate, seed, progress)


def part_of(model: HookedAudioTransformer, part: str | None) -> str:
    """The part that carries the adapters."""
    if part is not None:
        return part
    return "encoder" if model.cfg.decoder is None else "decoder"


def check_counts(**counts: int) -> None:
    """Raise unless these are whole numbers of 1 or more."""
    for name, count in counts.items():
        whole(name, count, least=1)


@contextmanager
def frozen(model: HookedAudioTransformer) -> Iterator[None]:
    """Inside a ``with`` block no weight that is there now is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# -------------------------------------------------------------------------------- answers


def answers_of(model: HookedAudioTransformer, items: Items) -> list[list[int]]:
    """The tokens of every item's answer, or its class.

    Raises:
        InputError: a model that writes something else.
        ItemError: naming an item without an answer, or one that the model cannot give.
    """
    kind = model.cfg.output_kind
    if kind not in ("tokens", "classes"):
        raise InputError(
            f"answers are trained on models that write one stream of tokens, or classes; "
            f"{model.cfg.family} writes {kind or 'nothing'}"
        )
    return [_answer(model, item) for item in items]


def _answer(model: HookedAudioTransformer, item: Item) -> list[int]:
    if item.answer is None:
        raise ItemError(f"{item.name} has no answer to train on")
    try:
        return [model.to_single_token(item.answer)]
    except TokenError as error:
        if model.cfg.output_kind == "classes" or model.tokenizer is None:
            raise ItemError(f"{item.name}: {error}") from error
    ids = model.tokenizer.encode(item.answer, add_special_tokens=False)
    if not ids or model.tokenizer.unk_token_id in ids:
        raise ItemError(f"{item.name}: the tokenizer cannot write the answer {item.answer!r}")
    return ids


# -------------------------------------------------------------------------------- batches


State = tuple[Tensor, Tensor | None]  # what enters a block, and what the decoder hears beside it
WHOLE = "whole"


@dataclass(frozen=True)
class Start:
    """Where runs begin: what lies before is computed once.

    Attributes:
        part: "encoder", "connector" or "decoder"; "whole" where nothing is computed before.
        layer: the first block of the part that is trained.
    """

    part: str = WHOLE
    layer: int = 0

    def state(self, model: HookedAudioTransformer, inputs: AudioInputs) -> State | None:
        """What enters there."""
        if self.part == WHOLE:
            return None
        if self.part == "decoder":
            encoded = model.encode(inputs)
            heard = {} if encoded is None else {"encoder_out": encoded}
            resid = model(inputs, stop_at_layer=self.layer, **heard)
            return resid, encoded if model.decoder_needs_encoder else None
        n_layers = model.cfg.need_encoder.n_layers
        resid = model.encode(inputs, stop=self.layer if self.part == "encoder" else n_layers)
        if resid is None:
            raise InputError("these items have no audio, so that the encoder learns nothing")
        return resid, None

    def logits(
        self, model: HookedAudioTransformer, inputs: AudioInputs, state: State | None
    ) -> Float[Tensor, "b *t v"]:
        """The output of the rest."""
        if state is None:
            return model(inputs)
        resid, encoded = state
        if self.part == "connector":
            n_layers = model.cfg.need_encoder.n_layers
            return model(inputs, encoder_out=model.encode(inputs, resid, n_layers))
        start = f"{self.part}.{self.layer}"
        return model(resid, start_at_layer=start, inputs=inputs, encoder_out=encoded)


@dataclass(frozen=True)
class Bench:
    """Some items of equal layout, whose answers have equally many tokens.

    Attributes:
        rows: which items.
        inputs: the prompts, with the answers behind them but for their last tokens.
        answers: tokens, or a class each.
        state: what enters at the start.
    """

    rows: list[int]
    inputs: AudioInputs
    answers: Int[Tensor, "b n"]
    start: Start = Start()
    state: State | None = None

    @staticmethod
    def each(
        model: HookedAudioTransformer, items: Items, answers: Sequence[Sequence[int]], size: int
    ) -> list[Bench]:
        """All items in batches, to run as a whole."""
        found = []
        for batch in items.batches(model, size):
            for length in sorted({len(answers[row]) for row in batch.rows}):
                own = [i for i, row in enumerate(batch.rows) if len(answers[row]) == length]
                rows, inputs = [batch.rows[i] for i in own], batch.inputs[own]
                wanted = torch.tensor([list(answers[row]) for row in rows], device=model.device)
                if length > 1:
                    before = wanted[:, :-1].to(inputs.tokens)
                    inputs = with_tokens(inputs, torch.cat([inputs.tokens, before], dim=1))
                found.append(Bench(rows, inputs, wanted))
        return found

    @torch.no_grad()
    def at(self, model: HookedAudioTransformer, start: Start) -> Bench:
        """The same, to run from a start on."""
        return replace(self, start=start, state=start.state(model, self.inputs))

    def log_probs(self, model: HookedAudioTransformer) -> Float[Tensor, "b n v"]:
        """Of every token where one of the answer is due."""
        logits = self.start.logits(model, self.inputs, self.state)
        due = logits[:, None] if logits.ndim == 2 else logits[:, -self.answers.shape[1] :]
        return due.to(torch.promote_types(due.dtype, torch.float32)).log_softmax(-1)

    def told(self, model: HookedAudioTransformer) -> Float[Tensor, "b n"]:
        """The log-probability of every token of the answers."""
        return self.log_probs(model).gather(-1, self.answers[..., None])[..., 0]


def descend(
    model: HookedAudioTransformer,
    benches: Sequence[Bench],
    trained: Sequence[nn.Parameter],
    steps: int,
    rate: float,
    seed: int,
    progress: bool | None = None,
) -> list[float]:
    """Train some parameters; the loss of every step. It ends early where that is not finite."""
    optimizer, losses = torch.optim.Adam(trained, rate), []
    order = _order(len(benches), seed)
    with (
        track("training", steps, "steps", show=progress) as advance,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = -benches[next(order)].told(model).mean()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            for one, slope in zip(trained, torch.autograd.grad(loss, list(trained)), strict=True):
                one.grad = slope
            optimizer.step()
            advance(1, step + 1)
    for one in trained:
        one.grad = None
    return losses


def _order(count: int, seed: int) -> Iterator[int]:
    """Batches again and again, each time all of them in another order."""
    draw = np.random.default_rng(seed)
    while True:
        yield from draw.permutation(count).tolist()


@torch.no_grad()
def examined(
    model: HookedAudioTransformer, benches: Sequence[Bench], count: int
) -> Float[Tensor, "n metrics"]:
    """`METRICS` of every item: whether each token of the answer is likeliest, and all their sum.

    Answers of several tokens are teacher-forced.
    """
    found = torch.full((count, len(METRICS)), torch.nan, dtype=torch.float64)
    for bench in benches:
        log_probs = bench.log_probs(model)
        right = (log_probs.argmax(-1) == bench.answers).all(-1)
        own = log_probs.gather(-1, bench.answers[..., None])[..., 0].sum(-1)
        found[bench.rows] = torch.stack([right.double(), own.double()], dim=1).cpu()
    return found
