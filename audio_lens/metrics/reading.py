"""What a metric is: a function of logits that says which of them it reads."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.errors import AudioLensError, KindError
from audio_lens.inputs import AudioInputs, InputError

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

MetricFn = Callable[[Float[Tensor, "b t v"]], Tensor]


class MetricError(AudioLensError, ValueError):
    """A metric that fails, or gives no number; the message says of which run."""


@dataclass(frozen=True)
class Reading:
    """A metric as a function of logits ``b t v``, and what it reads of them.

    A sweep computes no more than that.

    Attributes:
        positions: the positions it reads in every row.
        tokens: the columns of the vocabulary it reads in every row; None for all.
        value: from the logits at those positions and columns to one value per row.
        by_row: whether `value` looks at every row alone and knows nothing of the batch, so that
            it takes the rows of many runs at once.
    """

    positions: Int[Tensor, "b r"]
    tokens: Int[Tensor, "b c"] | None
    value: Callable[[Float[Tensor, "b r c"]], Float[Tensor, " b"]]
    by_row: bool = False

    def __call__(self, logits: Float[Tensor, "b *t v"]) -> Float[Tensor, " b"]:
        by_position = logits if logits.ndim == 3 else logits[:, None]  # a classifier's
        return self.value(self.of_rows(at_positions(by_position, self.positions)))

    def of_rows(self, rows: Float[Tensor, "b r v"]) -> Float[Tensor, "b r c"]:
        """The columns it reads, of logits at its positions."""
        if self.tokens is None:
            return rows
        return rows.gather(-1, self.tokens[:, None].expand(-1, rows.shape[1], -1))


def at_positions(x: Float[Tensor, "b t d"], positions: Int[Tensor, "b r"]) -> Tensor:
    """The given positions of every row, ``b r d``."""
    return x[torch.arange(len(x), device=x.device)[:, None], positions]


class Metric(ABC):
    """A metric that needs a model and inputs before it can read logits."""

    needs_reference: ClassVar[bool] = False  # whether it compares with the clean run
    names_stream: ClassVar[bool] = False  # whether it says which of several streams it reads
    kinds: ClassVar[dict[str, type[Metric]]] = {}  # of this package, as files of results call them

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith(f"{__package__}."):
            Metric.kinds[cls.__name__.removeprefix("_")] = cls

    @property
    @abstractmethod
    def name(self) -> str:
        """What the metric is called in results and pictures."""

    def bind(
        self,
        model: HookedAudioTransformer,
        inputs: AudioInputs | Mapping[str, Any],
        reference: Float[Tensor, "b *t v"] | None = None,
    ) -> Reading:
        """The metric as a function of logits, one value per row.

        Args:
            reference: logits of the clean run, for metrics that compare with it.

        Raises:
            TokenError: a word that is not exactly one token.
            InputError: answers that do not fit the batch, positions outside it, or a model that
                writes several streams, where `of_stream` says which is meant.
        """
        if model.cfg.output_kind == "streams" and not self.names_stream:
            streams = ", ".join(name for name, _ in model.cfg.streams)
            raise InputError(
                f"{model.cfg.family} writes several streams ({streams}): say which is meant, as in "
                f"metrics.of_stream({model.cfg.streams[0][0]!r}, metric)"
            )
        return self._bind(model, model.as_inputs(inputs), reference)

    def of_rows(self, rows: Sequence[int], count: int) -> Metric:
        """The metric of some rows of a batch; where it names a word for each row, of theirs.

        Args:
            rows: which.
            count: how many rows the batch has.

        Raises:
            InputError: words for another number of rows.
        """
        return self

    @abstractmethod
    def _bind(
        self,
        model: HookedAudioTransformer,
        inputs: AudioInputs,
        reference: Float[Tensor, "b *t v"] | None,
    ) -> Reading:
        """What `bind` gives, for inputs that are `AudioInputs`."""


def bound(
    metric: Metric | MetricFn,
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    reference: Float[Tensor, "b *t v"] | None = None,
) -> MetricFn:
    """The metric as a function of logits.

    A plain function is one already; it gets a copy, since it may edit what others read too.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(metric, Metric):
        return metric.bind(model, inputs, reference)
    if isinstance(metric, Reading):  # takes a copy of what it reads
        return metric
    check(metric)
    return functools.partial(_of_copy, metric)


def check(metric: Any) -> None:
    """Raise for what is no metric, nor a mapping from names to metrics.

    Raises:
        KindError: naming what was given.
    """
    for name, one in named(metric).items() if isinstance(metric, Mapping) else [("", metric)]:
        if not (isinstance(one, (Metric, Reading)) or callable(one)) or not isinstance(name, str):
            raise KindError(f"a metric maps logits to numbers, got {type(one).__name__}")


def _of_copy(metric: MetricFn, logits: Float[Tensor, "b *t v"]) -> Any:
    return metric(logits.clone())


def measured(
    name: str, measure: MetricFn, logits: Float[Tensor, "b *t v"], batch: int, run: str
) -> Float[Tensor, "*b"]:
    """What a bound metric gives of a run: a scalar or one value per row.

    Truth values and whole numbers are counted as numbers of the logits' precision.

    Args:
        run: which one, for errors: "the clean run", "cell 3 ..." .

    Raises:
        MetricError: a metric that fails, or gives something else.
    """
    with blamed(name, run):
        value = torch.as_tensor(measure(logits))
        if value.is_complex():
            raise MetricError(f"metric {name!r} must give real numbers, got {value.dtype}")
        if value.shape not in ((), (batch,)):
            raise MetricError(
                f"metric {name!r} must give a scalar or one value per row ([{batch}]), got shape "
                f"{tuple(value.shape)}"
            )
    return value if value.is_floating_point() else value.to(logits.dtype)


@contextmanager
def blamed(name: str, run: str) -> Iterator[None]:
    """Whatever fails here is the metric's doing, and says of which run.

    Raises:
        MetricError: for every exception.
    """
    try:
        yield
    except MetricError as error:
        raise MetricError(f"{error} (on {run})") from error
    except Exception as error:
        kind = type(error).__name__
        raise MetricError(f"metric {name!r} fails on {run}: {kind}: {error}") from error


def named(metric: Any) -> dict[str, Any]:
    """One metric or a mapping of them, by name.

    Raises:
        ValueError: for an empty mapping.
    """
    if isinstance(metric, Mapping):
        if not metric:
            raise InputError("the mapping of metrics is empty")
        return dict(metric)
    return {getattr(metric, "name", None) or getattr(metric, "__name__", "metric"): metric}


def check_head(model: HookedAudioTransformer) -> None:
    if model.cfg.output_kind is None:
        raise InputError(
            f"{model.cfg.family} without a head gives hidden states (b t d), not logits: pass your "
            "own function of them as metric"
        )
