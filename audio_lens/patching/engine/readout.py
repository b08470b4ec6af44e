"""What a sweep's metrics read of a run, so that nothing else is computed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from fancy_einsum import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.inputs import AudioInputs
from audio_lens.metrics import MetricError, Reading, at_positions, measured
from audio_lens.models.base import HookedAudioTransformer


class Readout:
    """Several metrics of one run, reading the same rows of logits.

    A model that pools has one row per prompt.

    Attributes:
        positions: the positions read in every prompt; every one, if a metric is a bare function.
        tokens: the columns of the vocabulary that are read; None for all.
        by_row: whether all metrics look at every row alone, so that many runs are one call.
    """

    def __init__(
        self,
        model: HookedAudioTransformer,
        measures: dict[str, Callable],
        inputs: AudioInputs,
    ):
        self.model, self.inputs, self.names = model, inputs, list(measures)
        self.batch, self.width = model.output_attended(inputs).shape
        readings = [one for one in measures.values() if isinstance(one, Reading)]
        self.reads_all = len(readings) < len(measures)
        if self.reads_all:
            everywhere = torch.arange(self.width, device=model.device)
            self.positions, self.tokens = everywhere.expand(self.batch, -1), None
            self.by_row = False
            self._measures = [self._whole(one) for one in measures.values()]
        else:
            self._combine(readings)

    def _combine(self, readings: list[Reading]) -> None:
        """Read every metric's positions once, and only the columns they read."""
        distinct = [row.unique() for row in torch.cat([one.positions for one in readings], dim=1)]
        most = max(map(len, distinct))
        self.positions = torch.stack(  # rows that read fewer name their last position again
            [torch.cat([row, row[-1:].expand(most - len(row))]) for row in distinct]
        )
        columns = [one.tokens for one in readings if one.tokens is not None]
        self.by_row = len(columns) == len(readings) and all(one.by_row for one in readings)
        if len(columns) < len(readings):
            self.tokens = None
            self._measures = [self._part(one, slice(None)) for one in readings]
            return
        self.tokens = torch.cat(columns, dim=-1)
        ends = list(itertools.accumulate((len(own.T) for own in columns), initial=0))
        self._measures = [
            self._part(one, slice(*bounds))
            for one, bounds in zip(readings, itertools.pairwise(ends), strict=True)
        ]

    def _whole(self, measure: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The metric as a function of all rows, of which it gets the output's own shape."""
        return (lambda rows: measure(rows[:, 0])) if self.model.pools else measure

    def _part(self, reading: Reading, columns: slice) -> Callable[[Tensor], Tensor]:
        """The metric as a function of the rows and columns that are read."""
        slots = self.slots.gather(1, reading.positions)

        def measure(rows: Float[Tensor, "nb r c"]) -> Float[Tensor, " nb"]:
            own = at_positions(rows, slots.repeat(len(rows) // self.batch, 1))
            wanted = reading.of_rows(own) if self.tokens is None else own[..., columns]
            return reading.value(wanted)

        return measure

    @functools.cached_property
    def slots(self) -> Int[Tensor, "b t"]:
        """Which of the rows read is that of a position; -1 for none."""
        slots = torch.full((self.batch, self.width), -1, device=self.positions.device)
        order = torch.arange(self.positions.shape[1], device=self.positions.device)
        return slots.scatter_(1, self.positions, order.expand_as(self.positions))

    @property
    def demanded(self) -> Bool[Tensor, "b t"]:
        """Which positions are read."""
        return self.slots >= 0

    def logits(
        self, hidden: Float[Tensor, "m d"], prompt: Int[Tensor, " m"], position: Int[Tensor, " m"]
    ) -> Float[Tensor, "m c"]:
        """The logits read of final hidden states at given positions of given prompts."""
        if not self._unembeds:
            return self._columns(
                self.model.read_rows(hidden, self.inputs, prompt, position), prompt
            )
        unembed, divisor = self.model.output_stack.unembed, self.model.cfg.output.logits_divisor
        columns = unembed.weight[self.tokens][prompt]
        chosen = einsum("row d_model, row column d_model -> row column", hidden, columns)
        if unembed.bias is not None:
            chosen = chosen + unembed.bias[self.tokens][prompt]
        return chosen / divisor

    @functools.cached_property
    def _unembeds(self) -> bool:
        """Whether what is read are columns of an unembedding, so that these suffice."""
        n_plain = self.model.cfg.n_unembedded
        return self.tokens is not None and n_plain > 0 and int(self.tokens.max()) < n_plain

    def _columns(
        self, logits: Float[Tensor, "m *r v"], prompt: Int[Tensor, " m"]
    ) -> Float[Tensor, "m *r c"]:
        """The columns read, of logits of given prompts."""
        if self.tokens is None:
            return logits
        columns = self.tokens[prompt]
        columns = columns if logits.ndim == 2 else columns[:, None].expand(-1, logits.shape[1], -1)
        return logits.gather(-1, columns)

    def of_sequences(
        self, hidden: Float[Tensor, "n t d"], prompt: Int[Tensor, " n"]
    ) -> Float[Tensor, "n r c"]:
        """What is read of the final hidden states of whole rows, each of a given prompt."""
        if self.model.pools:
            logits = self.model.read_out(hidden, self.inputs[prompt.tolist()])
            return self._columns(logits[:, None], prompt)
        positions = self.positions[prompt]
        rows = at_positions(hidden, positions)
        prompts = prompt.repeat_interleave(rows.shape[1])
        read = self.logits(rows.flatten(0, 1), prompts, positions.flatten())
        return read.unflatten(0, rows.shape[:2])

    def of_run(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b r c"]:
        """What is read of the final hidden states of a whole batch."""
        return self.of_sequences(hidden, torch.arange(self.batch, device=hidden.device))

    def of_logits(self, logits: Float[Tensor, "b *t v"]) -> Float[Tensor, "b r c"]:
        """What is read of the output of a whole batch."""
        rows = logits[:, None] if self.model.pools else at_positions(logits, self.positions)
        return self._columns(rows, torch.arange(self.batch, device=logits.device))

    def measure(self, rows: Float[Tensor, "b r c"], run: str) -> Float[Tensor, " metrics *batch"]:
        """Every metric of one run: a scalar or one value per row each, alike for all metrics.

        Args:
            run: which one, for errors: "the clean run", "cell 3 ..." .

        Raises:
            MetricError: a metric that fails, or gives something else.
        """
        return self._measured(rows, run)

    def measure_together(
        self, rows: Float[Tensor, "n b r c"], run: str
    ) -> Float[Tensor, "metrics b n"]:
        """Every metric of several runs, where all look at every row alone.

        Raises:
            MetricError: as `measure`, and for a metric that gives one number for many rows.
        """
        values = self._measured(rows.flatten(0, 1), run)
        if values.ndim == 1:
            raise MetricError("a metric that looks at every row alone gives a value for each")
        return values.unflatten(1, rows.shape[:2]).transpose(1, 2)

    def _measured(
        self, rows: Float[Tensor, "nb r c"], run: str
    ) -> Float[Tensor, " metrics *batch"]:
        precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
        named = zip(self.names, self._measures, strict=True)
        values = [
            measured(name, one, precise, len(rows), run).detach().cpu() for name, one in named
        ]
        if len({value.shape for value in values}) > 1:
            raise MetricError(
                "metrics of one sweep must all give a scalar, or all one value per row"
            )
        return torch.stack(values)
