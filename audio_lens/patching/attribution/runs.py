"""The runs behind attribution patching: two forwards, and the backwards a method asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors

from audio_lens import metrics
from audio_lens.errors import InputError
from audio_lens.hooks import local_name
from audio_lens.inputs import AudioInputs
from audio_lens.patching.attribution.taps import Entrance, QueryKeyTap, Tap, precise
from audio_lens.patching.cells import CellTable
from audio_lens.patching.checks import batch_dims, check_finite, rounding_notes
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.trace import blocks_of, heard, stack_of
from audio_lens.patching.spec import SweepSpec
from audio_lens.progress import track
from audio_lens.sites import Site, in_blocks, parts_from

if TYPE_CHECKING:
    from audio_lens.hooks import HookFn, HookPoint
    from audio_lens.models.base import HookedAudioTransformer
    from audio_lens.models.layers import Block

Method = Literal["atp", "ig", "qk_fix", "grad_drop", "atp*"]
UNSIGNED = ("grad_drop", "atp*")
FIXES_QUERIES_AND_KEYS = ("qk_fix", "atp*")
Layer = tuple[str, int]  # a part and the index of one of its blocks


@contextmanager
def differentiable(model: HookedAudioTransformer) -> Iterator[None]:
    """Gradients on, but none for parameters; hooks that edit in place may go on doing so."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    may_edit = allow_mutation_on_saved_tensors() if model.list_hooks(dir="fwd") else nullcontext()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), may_edit:
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def layers_from(model: HookedAudioTransformer, site: Site) -> list[Layer]:
    """The blocks of the site's part and of the parts behind it."""
    parts = model.cfg.parts
    return [
        (part, layer)
        for part in parts_from(model, site.part)
        for layer in range(parts[part].n_layers)
    ]


class Estimate:
    """Effects of all cells of some tables, from the same runs.

    Attributes:
        names: of the metrics.
        dims: the dims in front of the axes (several metrics, several stimuli) and their names.
        clean, corrupted: every metric of the two runs.
        end_values: of "ig", where its way ends: all that enters is the source run's, and read with
            the base run's next tokens, of models that write more than one at a time.
        report: what there is to know about the estimates.
        meta: method, and steps.
    """

    def __init__(
        self,
        model: HookedAudioTransformer,
        spec: SweepSpec,
        tables: list[CellTable],
        method: str,
        steps: int,
        progress: bool | None = None,
    ):
        self.model, self.method, self.steps = model, method, steps
        self.base = spec.base
        self.sites = [table.site for table in tables]
        kept: dict[str, Tensor] = {}
        self.taps = {
            (table.site, layer): self._tap(table, layer, kept)
            for table in tables
            for layer in table.cells.layers
        }
        self.entrances = [Entrance(name) for name in self._entrances()] if method == "ig" else []
        taps = [*self.entrances, *self.taps.values()]
        tapped = {tap.name for tap in taps}
        self.reader, its_reader = (
            _MetricReader(model, inputs, spec.metric, tapped) for inputs in (spec.base, spec.other)
        )
        source_hidden = self._run_source(its_reader, kept)
        self.run = _BaseRun(model, self.base, taps, self.reader.hooks, method in UNSIGNED)
        with torch.set_grad_enabled(method != "ig"):  # that one has its gradients elsewhere
            base_hidden = self.run.hidden()
        runs = (its_reader, source_hidden), (self.reader, base_hidden.detach())
        self._measure(*(runs if spec.direction == "denoise" else runs[::-1]))
        self._differentiate(base_hidden, progress)

    def _tap(self, table: CellTable, layer: int | None, source: dict[str, Tensor]) -> Tap:
        if self.method not in FIXES_QUERIES_AND_KEYS or not QueryKeyTap.fits(self.model, table):
            return Tap(table, layer, source)
        block = blocks_of(stack_of(self.model, table.site.part))[in_blocks(layer)]
        return QueryKeyTap(table, layer, source, getattr(block, table.site.sublayer))

    def _entrances(self) -> list[str]:
        """Where audio and text enter, no earlier than the sites need."""
        cfg = self.model.cfg
        if cfg.decoder is None or cfg.encoder is None:
            return [f"{self.model.output_part}.blocks.0.hook_resid_pre"]
        heard = [end_of_encoder(self.model)]
        if any(site.part in cfg.is_heard_in for site in self.sites):
            heard = [f"{part}.blocks.0.hook_resid_pre" for part in cfg.is_heard_in]
        elif "connector.in" in map(str, self.sites):
            heard = ["connector.hook_in"]
        merged = ("decoder.hook_token_embed", "decoder.hook_text_embed")
        read = [name for name in merged if name in self.model.hook_dict]
        return [*heard, *(read or ["decoder.blocks.0.hook_resid_pre"])]

    # ---------------------------------------------------------------- the two runs

    @torch.no_grad()
    def _run_source(self, reader: _MetricReader, kept: dict[str, Tensor]) -> Float[Tensor, "b t d"]:
        """Final hidden states of the source run; fills ``kept`` with what is needed of it."""
        named = {tap.name for tap in (*self.taps.values(), *self.entrances)}
        needed = {name for tap in self.taps.values() for name in tap.reads} | named

        def keep(x: Tensor, hook: HookPoint) -> None:
            kept[str(hook.name)] = x.detach()

        hooks: list[tuple[str | Callable[[str], bool], HookFn]]
        hooks = [(name, keep) for name in sorted(named)]
        if needed > named:  # of rotated queries and keys, whatever runs
            hooks.append((lambda name: name in needed, keep))
        with self.model.hooks([*hooks, *reader.hooks]):
            hidden = _hidden(self.model, reader.inputs, self.model.encode(reader.inputs))
        for entrance in self.entrances:
            entrance.source = kept[entrance.name]
        return hidden

    @torch.no_grad()
    def _measure(
        self,
        clean: tuple[_MetricReader, Float[Tensor, "b t d"]],
        corrupted: tuple[_MetricReader, Float[Tensor, "b t d"]],
    ) -> None:
        """Measure both runs, each by its own inputs."""
        if self.reader.compares:
            reader, hidden = clean
            reference = reader.logits(hidden)
            for reader, _ in (clean, corrupted):
                reader.compare_with(reference)
        both = {
            run: reader.measure(hidden, f"the {run} run")
            for run, (reader, hidden) in {"clean": clean, "corrupted": corrupted}.items()
        }
        self.names = self.reader.names
        check_finite(both, self.names)
        self.clean, self.corrupted = both["clean"], both["corrupted"]
        pair = (self.corrupted, self.clean)
        is_denoise = corrupted[0] is self.reader
        self.base_values, self.source_values = pair if is_denoise else pair[::-1]
        if self.method == "ig":
            _, hidden = clean if is_denoise else corrupted
            self.end_values = self.reader.measure(hidden, "the base run with all of the other's")
        names, coords = batch_dims(self.reader.metric, self.names, len(self.base), self.base_values)
        self.dims = {name: coords[name] for name in names}
        self.n_rows = 1 if self.base_values.ndim == 1 else len(self.base)

    # ---------------------------------------------------------------- backwards

    def _differentiate(self, base_hidden: Float[Tensor, "b t d"], progress: bool | None) -> None:
        """Sum what every backward says about every tap, and about the entrances."""
        self.effects: dict[tuple, Float[Tensor, "sets rows units"] | float] = {}
        self.explained = self.base_values.new_zeros(len(self.names), self.n_rows)
        with track("attribution", self._n_passes, "backwards", show=progress) as advance:
            for count, (hidden, dropped) in enumerate(self._passes(base_hidden), start=1):
                self._take_from(hidden, dropped)
                advance(1, count)

    def _take_from(self, hidden: Float[Tensor, "b t d"], dropped: Layer | None) -> None:
        """Add one backward per metric to what is known."""
        self.run.dropped = dropped
        for i, name in enumerate(self.names):
            slope = self._slope(name, hidden)
            if hidden.requires_grad:
                hidden.backward(slope, retain_graph=True)
            for place, tap in self.taps.items():
                effects = self._weight(tap, dropped) * self._taken(tap, tap.site.positions_of)
                self.effects[i, place] = self.effects.get((i, place), 0.0) + effects
            for entrance in self.entrances:
                part = entrance.name.partition(".")[0]
                self.explained[i] += self._taken(entrance, part) / self.steps

    @property
    def _n_passes(self) -> int:
        if self.method == "ig":
            return self.steps
        return len(self._droppable) if self.method in UNSIGNED else 1

    @property
    def _droppable(self) -> list[Layer]:
        """The layers whose outputs are left out in turn."""
        layers = [layer for site in self.sites for layer in layers_from(self.model, site)]
        return list(dict.fromkeys(layers))

    def _passes(
        self, hidden: Float[Tensor, "b t d"]
    ) -> Iterator[tuple[Float[Tensor, "b t d"], Layer | None]]:
        """What to differentiate, and the layer whose outputs have no gradient in it."""
        if self.method == "ig":
            for step in range(self.steps):
                for entrance in self.entrances:
                    entrance.share = (step + 0.5) / self.steps
                yield self.run.hidden(), None
        elif self.method in UNSIGNED:
            for layer in self._droppable:
                yield hidden, layer
        else:
            yield hidden, None

    def _weight(self, tap: Tap, dropped: Layer | None) -> float:
        """The share of one backward in a tap's estimate."""
        if dropped is None:
            return 1 / self.steps if self.method == "ig" else 1.0
        counted = set(layers_from(self.model, tap.site)) - {(tap.site.part, tap.layer)}
        return 1 / len(counted) if dropped in counted else 0.0

    def _taken(self, tap: Tap | Entrance, part: str) -> Tensor | float:
        """What a tap made of the last backward, per row (or of all rows, for a scalar metric)."""
        effects = tap.take(self._owner(part), self.n_rows)
        return abs(effects) if self.method in UNSIGNED else effects

    def _owner(self, part: str) -> Int[Tensor, " batch"]:
        """The row that each entry of a part's batch axis belongs to: prompts, or segments."""
        segments = torch.tensor(self.base.segments_per_row, device=self.base.device)
        rows = torch.arange(len(segments), device=segments.device)
        heard = (*self.model.cfg.is_heard_in, "connector")
        owner = rows.repeat_interleave(segments) if part in heard else rows
        return owner if self.n_rows > 1 else torch.zeros_like(owner)

    def _slope(self, name: str, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The gradient of a metric, summed over rows, by the final hidden states.

        Raises:
            ValueError: if there is none, or a row's value depends on another row.
        """
        leaf = hidden.detach().requires_grad_()
        with metrics.blamed(name, "the run that is patched"):
            value = self.reader.value(name, leaf)
        if not (isinstance(value, Tensor) and value.requires_grad):
            raise InputError(
                f"metric {name!r} has no gradient, which attribution needs: use one that is "
                "differentiable in the logits (a logit difference, a log-probability), or sweep"
            )
        (slope,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        if value.ndim and len(value) > 1:
            _check_rows_apart(name, value, slope, leaf)
        if not slope.any() and self.method != "ig":
            raise InputError(
                f"metric {name!r} is flat at the base run, so gradients say nothing there: use "
                "another metric or direction, or method 'ig'"
            )
        return slope

    # ---------------------------------------------------------------- results

    def shaped(self, baseline: Float[Tensor, " metrics *batch"]) -> Float[Tensor, "..."]:
        """A baseline without the dims that a single metric or stimulus does not have."""
        return baseline.reshape([len(names) for names in self.dims.values()])

    def values(self, table: CellTable) -> Float[Tensor, "..."]:
        """The base run's metric plus the effect, ``[metric?, stimulus?, *axes]``.

        Unsigned effects are counted towards the other run. NaN where a stimulus lacks the cell.
        """
        effects = self._effects(table)  # metric row layer set unit
        base = self.base_values.reshape(*effects.shape[:2], 1, 1, 1)
        if self.method in UNSIGNED:
            towards = (self.source_values - self.base_values).sign()
            effects = effects * towards.reshape(base.shape)
        values = base + effects
        if "stimulus" in self.dims:
            values = values.masked_fill(~table.covered.T[None, :, None, :, None], torch.nan)
        places = table.place_axes
        values = values.unflatten(3, [len(table.coords[axis]) for axis in places] or [1])
        dims = ["layer", *(places or ["everywhere"]), table.site.unit]
        axes = [2 + dims.index(axis) for axis in table.axes]
        spare = [dim for dim in range(2, values.ndim) if dim not in axes]
        lengths = [len(names) for names in (*self.dims.values(), *table.coords.values())]
        return values.permute(0, 1, *axes, *spare).reshape(lengths)

    def _effects(self, table: CellTable) -> Float[Tensor, "metrics rows layers sets units"]:
        n_units = len(table.coords[table.site.unit]) if table.site.unit in table.axes else 1
        nothing = self.base_values.new_zeros(len(table.positions), self.n_rows, n_units)
        per_metric = [
            torch.stack(
                [
                    nothing + sum(self.effects[i, (table.site, layer)] for layer in layers)
                    for layers in table.cells.blocks
                ]
            )
            for i in range(len(self.names))
        ]
        return torch.stack(per_metric).movedim(3, 1)

    @property
    def meta(self) -> dict[str, str]:
        """What it takes to make the estimates again, and how far off their sum is."""
        if self.method != "ig":
            return {"method": self.method}
        return {"method": "ig", "steps": str(self.steps), "unexplained": f"{self._unexplained:.3g}"}

    @property
    def _unexplained(self) -> float:
        """What the inputs' cells lack to the metric's change, as a share of it; the worst row."""
        moved = (self.end_values - self.base_values).reshape(self.explained.shape)
        return float(((moved - self.explained).abs() / moved.abs()).max())

    @property
    def report(self) -> list[str]:
        """Notes for people."""
        notes = ["these are estimates (attribution patching), not measurements: confirm them"]
        if self.method in UNSIGNED:
            notes.append("estimates are magnitudes: means over dropped layers, without a sign")
        if self.method == "ig":
            notes.append(
                f"integrated gradients of {self.steps} steps leave {self._unexplained:.1%} of the "
                "metric's change unexplained (the worst stimulus): use more steps if that is much"
            )
        hooked = list(self.model.list_hooks(dir="fwd"))
        notes += rounding_notes(self.model)
        return notes + ([f"your hooks were in force: {', '.join(hooked)}"] if hooked else [])


class _MetricReader:
    """The metrics, as functions of the final hidden states of a run of some inputs.

    Where every metric says which positions it reads, and nobody looks at what comes later than the
    last block's attention, that runs for those positions alone, as its only `hooks` see to.
    """

    def __init__(
        self, model: HookedAudioTransformer, inputs: AudioInputs, metric: Any, tapped: set[str]
    ):
        self.model, self.inputs, self.metric = model, inputs, metric
        self._wanted = metrics.named(metric)
        self.names = list(self._wanted)
        self.compares = any(getattr(m, "needs_reference", False) for m in self._wanted.values())
        self._is_narrow = False
        if not self.compares:
            self._set({name: self._bound(one, None) for name, one in self._wanted.items()})
            busy = tapped | set(model.list_hooks(dir="fwd"))
            is_opaque = self._readout.reads_all or model.cfg.decoder is None or model.writes_behind
            self._is_narrow = not (is_opaque or any(map(self._is_late, busy)))

    def _bound(self, metric: Any, reference: Float[Tensor, "b *t v"] | None) -> Callable:
        return metrics.bound(metric, self.model, self.inputs, reference)

    def _set(self, measures: dict[str, Callable]) -> None:
        self._measures = measures
        self._readout = Readout(self.model, measures, self.inputs)

    @property
    def _last_block(self) -> str:
        return f"decoder.blocks.{len(self._blocks) - 1}."

    @property
    def _blocks(self) -> list[Block]:
        return blocks_of(stack_of(self.model, "decoder"))

    def _is_late(self, name: str) -> bool:
        """Whether a point lies behind the last block's attention."""
        in_block = ("ln2.", "mlp.", "hook_mlp_out", "hook_resid_post")
        late = ("hook_logits", "decoder.hook_out", "decoder.ln_final.")
        return name.startswith((*late, *(self._last_block + last for last in in_block)))

    @property
    def hooks(self) -> list[tuple[str, Callable]]:
        """Forward hooks that leave only the positions that are read."""
        if not self._is_narrow:
            return []
        name = f"{self._last_block}hook_{self._blocks[-1].mlp_stage}"
        rows = self._readout.positions
        return [(name, lambda x, hook: metrics.at_positions(x, rows.to(x.device)))]

    def compare_with(self, clean: Float[Tensor, "b *t v"]) -> None:
        """Bind metrics that compare with the clean run to its logits."""
        self._set({name: self._bound(one, clean) for name, one in self._wanted.items()})

    def logits(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b *t v"]:
        """The output of the run."""
        logits = self.model.read_out(hidden, self.inputs)
        return logits if self.model.cfg.output_kind is None else self.model.hook_logits(logits)

    def measure(self, hidden: Float[Tensor, "b t d"], run: str) -> Float[Tensor, " metrics *batch"]:
        """Every metric of a run: a scalar or one value per row each. ``run`` says which it is."""
        read = self._readout
        if not self._is_narrow:
            return read.measure(read.of_logits(self.logits(hidden)), run)
        prompts = torch.arange(len(hidden), device=hidden.device)
        prompts = prompts.repeat_interleave(hidden.shape[1])
        rows = read.logits(hidden.flatten(0, 1), prompts, read.positions.flatten())
        return read.measure(rows.unflatten(0, hidden.shape[:2]), run)

    def value(self, name: str, hidden: Float[Tensor, "b t d"]) -> Any:
        """One metric of a run, to differentiate."""
        logits = self.logits(hidden)
        logits = logits.to(precise(logits))
        measure = self._measures[name]
        if not self._is_narrow:
            return measure(logits)
        slots = self._readout.slots.gather(1, measure.positions)
        return measure.value(measure.of_rows(metrics.at_positions(logits, slots)))


class _BaseRun:
    """The base run with its taps, as often as wanted; the encoder runs once if no tap needs more.

    Attributes:
        dropped: the layer whose outputs pass no gradient back, in the next backward.
    """

    def __init__(
        self,
        model: HookedAudioTransformer,
        base: AudioInputs,
        taps: list[Tap | Entrance],
        hooks: list[tuple[str, Callable]],
        can_drop: bool,
    ):
        self.model, self.base, self.end = model, base, end_of_encoder(model)
        self.dropped: Layer | None = None
        names = [tap.name for tap in taps]
        is_behind = all(name.startswith("decoder.") or name == self.end for name in names)
        with torch.no_grad():
            self.encoded = model.encode(base) if is_behind else None
        dropped = [part for part in model.cfg.parts if part not in model.cfg.further_decoders]
        drops = self._drops(["decoder"] if is_behind else dropped)
        tapped = [hook for tap in taps for hook in tap.hooks]
        self.hooks = [*tapped, *(drops if can_drop else []), *hooks]

    def _drops(self, parts: list[str]) -> list[tuple[str, Callable]]:
        return [
            (f"{part}.blocks.{layer}.{name}", self._droppable((part, layer)))
            for part in parts
            for layer in range(self.model.cfg.parts[part].n_layers)
            for name in writes_of(self.model, part)
        ]

    def _droppable(self, layer: Layer) -> Callable:
        def pass_back(gradient: Tensor) -> Tensor | None:
            return torch.zeros_like(gradient) if self.dropped == layer else None

        def watch(x: Tensor, hook: HookPoint) -> None:
            if x.requires_grad:
                x.register_hook(pass_back)

        return watch

    def hidden(self) -> Float[Tensor, "b t d"]:
        """Final hidden states of the base run, its entrances moved as far as they say."""
        encoded, hooks = self.encoded, self.hooks
        if encoded is not None:
            hooks = [(name, fn) for name, fn in hooks if name != self.end]
            for fn in (fn for name, fn in self.hooks if name == self.end):
                encoded = fn(encoded, hook=self.model.hook_dict[self.end])
        with self.model.hooks(hooks):
            encoded = self.model.encode(self.base) if encoded is None else encoded
            return _hidden(self.model, self.base, encoded)


def writes_of(model: HookedAudioTransformer, part: str) -> list[str]:
    """The points of a block whose activations are added to the residual stream."""
    prefix = f"{part}.blocks.0.hook_"
    names = [name for name in model.hook_dict if name.startswith(prefix)]
    return [local_name(name) for name in names if name.endswith("_out")]


def _hidden(
    model: HookedAudioTransformer, inputs: AudioInputs, encoded: Tensor | None
) -> Float[Tensor, "b r d"]:
    """Final hidden states of all positions, or of those that a `_MetricReader`'s hook leaves."""
    if model.cfg.decoder is None:
        return heard(encoded)
    stack = stack_of(model, "decoder")
    *_, last = blocks_of(stack)
    resid = model.decode(inputs, encoded, stop=len(stack.blocks) - 1)
    with model.running(inputs):
        return stack.finish(last(resid, model.decoder_context(inputs, encoded)))


def end_of_encoder(model: HookedAudioTransformer) -> str:
    """The point whose activation the decoder receives."""
    return "connector.hook_out" if "connector.hook_out" in model.hook_dict else "encoder.hook_out"


def _check_rows_apart(name: str, value: Tensor, slope: Tensor, leaf: Tensor) -> None:
    """Weigh the rows' values: where they are independent, each row's slope takes its weight."""
    weights = torch.arange(1, len(value) + 1).to(value)
    (weighed,) = torch.autograd.grad((weights * value).sum(), leaf)
    off = (weighed - weights[:, None, None] * slope).abs().max()
    if off > max(1e-4, 8 * torch.finfo(leaf.dtype).eps) * weighed.abs().max():
        raise InputError(
            f"metric {name!r} mixes rows: a value per row must depend on that row's logits alone "
            "(or give one scalar for the batch)"
        )
