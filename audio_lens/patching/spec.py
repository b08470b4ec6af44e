"""What a sweep asks: every argument of `sweep` but those that only say how it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformer_lens import ActivationCache

from audio_lens import metrics
from audio_lens.arguments import names, number, whole
from audio_lens.edits.do import Do
from audio_lens.errors import InputError, KindError
from audio_lens.inputs import AudioInputs
from audio_lens.patching.checks import check_pair, check_reaches
from audio_lens.places import Where
from audio_lens.provenance import recorded
from audio_lens.sites import Site
from audio_lens.timeline import Band, Span, Timeline

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Inputs = AudioInputs | Mapping[str, Any]
Windows = float | tuple[float, ...] | Sequence[Span | tuple[float, float]] | Literal["position"]
Bands = Sequence[Band | tuple] | Literal["patch"]
Direction = Literal["denoise", "noise"]
Precision = Literal["exact", "tf32", "bf16"]
# how it is done, not what is asked
_HOW = ("verify", "checkpoint", "checkpoint_every_s", "progress", "method", "steps")
_NO_MATTER = ("cells_per_forward", "memory_gb")  # no value depends on them: not recorded


@dataclass(frozen=True, eq=False, kw_only=True)
class SweepSpec:
    """What a sweep asks of a model, checked; made by `of` from the arguments of `sweep`.

    Fields with a default are the arguments as they were given. What windows, bands, layers and
    axes come to on the model is in `CellTable.of`, and checked there.

    Attributes:
        timeline: of clean and corrupted alike.
        sites: patched together as one by `sweep`, side by side by `attribute`.
        source: what to patch from in place of the other run: inputs, or activations by name.
        do: what to do in place of patching from another run.
        record: the arguments as results keep them.
    """

    clean: AudioInputs
    corrupted: AudioInputs
    timeline: Timeline = field(repr=False)
    sites: tuple[Site, ...]
    axes: tuple[str, ...]
    metric: Any
    record: Mapping[str, Any] = field(repr=False)
    windows: Windows | None = None
    bands: Bands | None = None
    direction: Direction = "denoise"
    layers: int | Sequence[int] | None = None
    layer_window: int = 1
    source: AudioInputs | ActivationCache | Mapping[str, Any] | None = None
    do: Do | None = None
    where: Where = "all"
    groups: Mapping[str, Where] | None = None
    cells_per_forward: int | None = None
    memory_gb: float | int | None = None
    precision: Precision = "exact"
    refine: float | int | None = None

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        *,
        clean: Inputs,
        corrupted: Inputs,
        site: str | Sequence[str],
        axes: str | Sequence[str],
        metric: Any,
        **options: Any,
    ) -> SweepSpec:
        """The spec of these arguments.

        Args:
            options: further fields. What says how it is done (``progress``, ``method`` ...) is
                left out, so that a function can hand on all that it was given:
                ``SweepSpec.of(**locals())``.

        Raises:
            TypeError: an argument that sweeps do not have.
            SiteError, InputError, ValueError: as `sweep`, but for what a `CellTable` checks.
        """
        given = {name: value for name, value in options.items() if name not in _HOW}
        if unknown := given.keys() - set(_options()):
            raise KindError(f"a sweep takes no {', '.join(sorted(unknown))}")
        if given.get("refine") is None:
            given.pop("refine", None)
        metrics.check(metric)
        asked = {"site": site, "axes": axes, "metric": metric, **given}
        is_alone = corrupted is clean
        clean = model.as_inputs(clean)
        corrupted = clean if is_alone else model.as_inputs(corrupted)
        timeline = check_pair(model, clean, corrupted)
        given["source"] = _source(model, clean, timeline, given.get("source"))
        spec = SweepSpec(
            clean=clean,
            corrupted=corrupted,
            timeline=timeline,
            sites=tuple(Site.parse(name, model) for name in names("site", site)),
            axes=tuple(names("axes", axes)),
            metric=metric,
            record=recorded({name: asked[name] for name in asked if name not in _NO_MATTER}),
            **given,
        )
        spec._check_options(model)
        check_reaches(model, spec.sites, metric)
        return spec

    def _check_options(self, model: HookedAudioTransformer) -> None:
        precision = self.precision
        if self.do is not None and self.source is not None:
            raise InputError("do= says what is put in: source= goes into it, as edits.Put(source)")
        if self.do is not None and not isinstance(self.do, Do):
            raise InputError(f"do is one of audio_lens.edits (Put, Scale ...), got {self.do!r}")
        if self.do is not None and self.do.spans_blocks:
            raise InputError(
                f"{type(self.do).__name__} goes from block to block, and a cell edits one: keep it "
                "in force with intervene, or give it to patching.run"
            )
        if self.direction not in ("denoise", "noise"):
            raise InputError(f"direction is 'denoise' or 'noise', got {self.direction!r}")
        if self.cells_per_forward is not None:
            whole("cells_per_forward", self.cells_per_forward, least=1)
        if self.memory_gb is not None:
            number("memory_gb", self.memory_gb, above=0, unit="GB")
        if self.refine is not None:
            number("refine", self.refine, above=0, unit="the baseline gap")
        whole("layer_window", self.layer_window, least=1)
        if precision not in ("exact", "tf32", "bf16"):
            raise InputError(f"precision is 'exact', 'tf32' or 'bf16', got {precision!r}")
        if precision == "tf32" and model.device.type != "cuda":
            raise InputError("precision 'tf32' exists on CUDA only; the model is elsewhere")
        if precision != "exact" and model.dtype != torch.float32:
            raise InputError(
                f"precision {precision!r} is for float32 models; this is {model.dtype}"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments as `plan` takes them, with inputs in place of a processor's mappings."""
        names = [name for name in _options() if name != "refine"]
        own = {
            name: getattr(self, name) for name in ("clean", "corrupted", "axes", "metric", *names)
        }
        return own | {"site": [str(site) for site in self.sites]}

    @property
    def base(self) -> AudioInputs:
        """The inputs of the run that is patched."""
        return self.corrupted if self.direction == "denoise" else self.clean

    @property
    def other(self) -> AudioInputs:
        """The inputs of the run that activations come from, unless a source is named."""
        return self.clean if self.direction == "denoise" else self.corrupted

    @property
    def told_direction(self) -> str:
        """The direction as results tell it: "edit" where one run alone is edited."""
        return "edit" if self.do is not None and self.clean is self.corrupted else self.direction

    @property
    def need_do(self) -> Do:
        """The edit of a sweep.

        Raises:
            ValueError: where it patches from a run.
        """
        if self.do is None:
            raise InputError("this sweep patches from a run: it has no edit")
        return self.do

    @property
    def reads_all(self) -> bool:
        """Whether a metric is a bare function of all logits."""
        return not all(isinstance(m, metrics.Metric) for m in metrics.named(self.metric).values())


def _options() -> list[str]:
    """The arguments that a spec keeps as they are given."""
    return [f.name for f in fields(SweepSpec) if f.default is not MISSING]


def _source(
    model: HookedAudioTransformer, clean: AudioInputs, timeline: Timeline, source: Any
) -> AudioInputs | ActivationCache | Mapping[str, Any] | None:
    """Activations by hook name as they are, anything else as inputs.

    Raises:
        InputError: inputs of another shape.
    """
    keys = list(source.keys()) if hasattr(source, "keys") else []
    if source is None or any(name in model.hook_dict for name in keys):
        return source
    inputs = model.as_inputs(source)
    check_pair(model, clean, inputs, ("clean", "the source"), timeline)
    return inputs
