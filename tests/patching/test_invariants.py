"""What every sweep must satisfy, on every family: Exact, Identity, Total, and user hooks.

Exact is a property test of every site: whatever is asked of a sweep, its values are those of one
full forward with hooks per cell (loops.py). The long form of it is marked slow, and runs take a
share of it (share.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import loops
import pytest
import torch
from subjects import (
    ENDING,
    SITES,
    THOROUGH,
    all_logits,
    batch,
    ends_in_words,
    has_time,
    layouts_of,
    pair,
    spread,
    tiny_model,
    usual_layout,
)

from audio_lens import Span, metrics, patching
from audio_lens.models.embedded import default_pair
from audio_lens.patching import Site, SiteError
from audio_lens.patching.engine import hooked, routes
from families import FAMILIES


def over(sites: list[tuple[str, Site]]) -> pytest.MarkDecorator:
    """Runs a test for families and sites of theirs."""
    return pytest.mark.parametrize(
        ("family", "site"), sites, ids=[f"{family}-{site}" for family, site in sites]
    )


IN_DEPTH = [(name, site) for name, site in SITES if name in THOROUGH]


def along(family: str, site: Site) -> dict[str, Any]:
    """Options of a small sweep over a block and a few windows, or tokens where there is no time."""
    block = {"layers": [1]} if site.n_layers else {}
    axes = ("layer",) if site.n_layers else ()
    if not has_time(family, site):
        return {"axes": (*axes, "position"), **block}
    spans = [Span(0.0, 0.1), Span(0.12, 0.14)] if family in THOROUGH else [Span(0.0, 0.2)]
    return {"axes": (*axes, "time"), "windows": spans, **block}


# -------------------------------------------------------------------------------- metrics


def one_number(logits):
    return logits[..., 1].mean()


def early_position(family: str, layout: str) -> int:
    """A position of the output that is attended in every row, and not the last where it can be."""
    model = tiny_model(family)
    attended = model.output_attended(model.as_inputs(batch(family, 0, layout))).all(0)
    positions = attended.nonzero().flatten().tolist()
    return positions[max(0, len(positions) - 3)]


ANY_OUTPUT: dict[str, Callable[[int], Any]] = {
    "all_logits": lambda early: all_logits,
    "one_number": lambda early: one_number,
}
ANY_HEAD = ANY_OUTPUT | {
    "early_logit_diff": lambda early: metrics.logit_diff(5, 3, position=early),
    "early_prob": lambda early: metrics.prob(4, position=early),
    "early_kl": lambda early: metrics.kl(position=early),
}
METRICS: dict[str | None, dict[str, Callable[[int], Any]]] = {
    None: ANY_OUTPUT,
    "streams": ANY_HEAD
    | {
        "text_logit_diff": lambda early: metrics.logit_diff(5, 3, position=early),
        "text_kl": lambda early: metrics.kl(position=early),
    },
    "ctc": ANY_HEAD
    | {
        "ctc_log_prob": lambda early: metrics.ctc_log_prob([3]),
        "forced_choice": lambda early: metrics.forced_choice(4, [4, 5]),
        "several": lambda early: {
            "early": metrics.log_prob(4, position=early),
            "transcripts": metrics.ctc_diff([3], [4]),
        },
    },
    "classes": ANY_HEAD
    | {
        "logit_diff": lambda early: metrics.logit_diff(0, 1),
        "forced_choice": lambda early: metrics.forced_choice(1, [1, 2, 4]),
        "several_with_opaque": lambda early: {"all": all_logits, "kl": metrics.kl()},
    },
    "tokens": ANY_HEAD
    | {
        "logit_diff": lambda early: metrics.logit_diff(5, 9),
        "log_prob": lambda early: metrics.log_prob(33),
        "kl": lambda early: metrics.kl(),
        "sequence_log_prob": lambda early: metrics.sequence_log_prob(ENDING),
        "several": lambda early: {
            "early": metrics.log_prob(4, position=early),
            "last": metrics.logit_diff(5, 9),
        },
        "several_with_opaque": lambda early: {"all": all_logits, "kl": metrics.kl()},
    },
}


def metric_of(family: str, name: str, layout: str) -> Any:
    """A metric that the family's output allows.

    Of several streams it is of the first if it is of the text, else of the last.
    """
    cfg = tiny_model(family).cfg
    metric = METRICS[cfg.output_kind][name](early_position(family, layout))
    if cfg.output_kind == "streams" and isinstance(metric, metrics.Metric):
        stream, _ = cfg.streams[0 if name.startswith("text_") else -1]
        return metrics.of_stream(stream, metric)
    return metric


def metrics_of(family: str, layout: str, site: Site) -> list[str]:
    """Names of the metrics for a layout that a site can change."""
    cfg = tiny_model(family).cfg
    left_out = set() if ends_in_words(batch(family, 0, layout)) else {"sequence_log_prob"}
    if site.part in cfg.further_decoders:
        left_out |= {"text_logit_diff", "text_kl"}
    return [name for name in METRICS[cfg.output_kind] if name not in left_out]


# -------------------------------------------------------------------------------- exact


@dataclass(frozen=True)
class Case:
    """Everything that can be asked of a sweep of one site."""

    family: str
    site: str
    direction: str
    layout: str
    axes: tuple[str, ...]
    windows: Any
    layers: list[int] | None
    layer_window: int
    metric: str
    same_text: bool
    source: str | None
    cells_per_forward: int | None
    attn_mode: str
    dtype: torch.dtype

    def assert_exact(self, check: Callable, choose: Callable[[int], Sequence[int]]) -> None:
        """Hold a sweep against the loop, with a function of loops.py."""
        model = tiny_model(self.family, self.dtype)
        with model.attention(self.attn_mode):
            check(model, choose, **self.options())

    def options(self) -> dict[str, Any]:
        """The arguments of the sweep."""
        asked = pair(self.family, self.layout, self.same_text, dtype=self.dtype)
        asked |= {"site": self.site, "axes": self.axes, "direction": self.direction}
        asked["metric"] = metric_of(self.family, self.metric, self.layout)
        given = {
            "windows": self.windows,
            "layers": self.layers,
            "source": self._source(),
            "cells_per_forward": self.cells_per_forward,
        }
        asked |= {name: option for name, option in given.items() if option is not None}
        return asked | ({"layer_window": self.layer_window} if self.layer_window > 1 else {})

    def _source(self) -> Any:
        """A third run, as inputs or as its activations."""
        if self.source is None:
            return None
        model = tiny_model(self.family, self.dtype)
        inputs = model.as_inputs(batch(self.family, 7, self.layout, self.dtype))
        if self.source == "inputs":
            return inputs
        place = Site.parse(self.site, model)
        names = [place.hook_name(layer) for layer in range(place.n_layers or 0) or [None]]
        with torch.no_grad(), model.attention("explicit"):
            cache = model.run_with_cache(inputs, names_filter=names)[1]
        return {name: cache[name] for name in names}


def case_of(family: str, site: Site, direction: str | None, lot: int) -> Case:
    """A case that fits the site, the same for the same lot."""
    rng = random.Random(f"{family} {site} {direction} {lot}")
    layout = rng.choice(layouts_of(family))
    timed = ["time", "time"] if has_time(family, site, layout) else []
    along = rng.choice([*timed, "position", None])
    possible = [*(["layer"] if site.n_layers else []), *([site.unit] if site.unit else [])]
    axes = [axis for axis in possible if rng.random() < 0.5] + ([along] if along else [])
    axes = axes or ["position"]
    layers = None
    if site.n_layers and (site.unit in axes or rng.random() < 0.5):
        most = 1 if site.unit in axes else site.n_layers
        layers = rng.sample(range(site.n_layers), rng.randint(1, most))
    windowed = "layer" in axes and layers is None
    return Case(
        family=family,
        site=str(site),
        direction=direction or rng.choice(["denoise", "noise"]),
        layout=layout,
        axes=tuple(rng.sample(axes, len(axes))),
        windows=windows_of(rng, family, site, layout) if "time" in axes else None,
        layers=layers,
        layer_window=rng.choice([1, 2]) if windowed else 1,
        metric=rng.choice(metrics_of(family, layout, site)),
        same_text=rng.random() < 0.5,
        source=rng.choice([None, None, None, "inputs", "activations"]),
        cells_per_forward=rng.choice([None, rng.randint(1, 7)]),
        attn_mode=rng.choice(["auto", "explicit", "sdpa"]),
        dtype=rng.choice([torch.float64, torch.float64, torch.float32]),
    )


def windows_of(rng: random.Random, family: str, site: Site, layout: str) -> Any:
    """Windows that overlap, touch, lie at the edges, hold one position; or regular ones."""
    centres = centres_of(family, site, layout)
    longest = max(centres.values(), key=len)
    regular = ["position", 0.1, (0.1, 0.06)] if len(set(longest)) > 1 else [0.1]
    if rng.random() < 0.4:
        return rng.choice(regular)
    spans = []
    for _ in range(rng.randint(1, 3)):
        clip = rng.choice(list(centres))
        first, last = sorted(rng.choices(centres[clip], k=2))
        start_s = max(0.0, first - rng.choice([0.0, 0.004, 0.01]))
        spans.append(Span(start_s, last + rng.choice([0.001, 0.015, 3.0]), clip=clip))
    return spans


def centres_of(family: str, site: Site, layout: str) -> dict[int, list[float]]:
    """Where the site's positions of every clip of the first prompt lie, in seconds."""
    (row, *_) = tiny_model(family).timeline(batch(family, 0, layout)).rows
    found: dict[int, list[float]] = {}
    for track in row.segments(site.positions_of):
        here = track.valid & track.seconds.isfinite()
        of_track = track.clip[here].tolist(), track.seconds[here].tolist()
        for clip, second in zip(*of_track, strict=True):
            found.setdefault(clip, []).append(second)
    return found


def few(lot: int) -> Callable[[int], list[int]]:
    """Chooses up to five cells."""
    return lambda n: random.Random(lot).sample(range(n), min(5, n))


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("lots", [range(1), pytest.param(range(1, 6), marks=pytest.mark.slow)])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@over(IN_DEPTH)
def test_exact(family, site, direction, lots):
    """Every site: whatever is asked, a few cells equal one full forward each."""
    for lot in lots:
        case = case_of(family, site, direction, lot)
        print(case)
        case.assert_exact(loops.assert_few_exact, few(lot))


@pytest.mark.mostly_slow(3)
@over([(name, site) for name, site in spread(0) if name not in THOROUGH])
def test_exact_in_every_family(family, site):
    """The same of every family, in one case a site, and with each family another few sites."""
    case = case_of(family, site, None, 0)
    print(case)
    case.assert_exact(loops.assert_few_exact, few(0))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@over(SITES)
def test_exact_in_all_cells(family, site, direction):
    """The same in more cells, for more of what can be asked."""
    for lot in range(100, 108):
        case = case_of(family, site, direction, lot)
        print(case)
        if family in THOROUGH:
            case.assert_exact(loops.assert_exact, range)
        else:
            case.assert_exact(loops.assert_few_exact, few(lot))


@pytest.mark.mostly_slow(4)
@over(IN_DEPTH)
def test_every_block_and_unit(family, site):
    """The map people ask for: layer, unit and time (or position) at once, and it is no flat one."""
    model = tiny_model(family)
    is_timed = has_time(family, site)
    spans = [Span(0.0, 0.1), Span(0.12, 0.14), Span(0.13, 2.5)]
    result = loops.assert_exact(
        model,
        loops.evenly(4),
        site=str(site),
        axes=(
            *[a for a in ("layer", "head") if a in site.axes],
            "time" if is_timed else "position",
        ),
        metric=all_logits,
        cells_per_forward=5,
        **pair(family, same_text=False),
        **({"windows": spans} if is_timed else {}),
    )
    flat = result.values.flatten(1)
    assert (flat - flat[:, -1:]).nan_to_num().abs().max() > 1e-6


# -------------------------------------------------------------------------------- several sites

UNIONS = {
    "whisper": [
        (("encoder.attn_out", "encoder.mlp_out"), ("layer", "time")),
        (("encoder.attn.z", "encoder.attn.pattern"), ("head", "layer")),
        (("decoder.attn.z", "decoder.cross_attn.z"), ("layer", "head", "position")),
        (("decoder.cross_attn.k", "decoder.cross_attn.v"), ("time", "layer")),
        (("decoder.resid_pre", "decoder.mlp_out"), ("layer", "position")),
    ],
    "qwen2_audio": [
        (("encoder.attn.q", "encoder.attn.k", "encoder.attn.v"), ("layer", "head", "time")),
        (("decoder.attn.k", "decoder.attn.v"), ("layer", "head")),
        (("decoder.attn_out", "decoder.mlp_out"), ("time", "layer")),
        (("decoder.attn.z", "decoder.mlp.post"), ("layer", "position")),
        (("decoder.resid_pre", "decoder.attn.pattern"), ("layer", "position")),
        (("encoder.attn.z", "encoder.resid_mid", "encoder.mlp_out"), ("layer",)),
    ],
}


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize(
    ("direction", "metric"), [("denoise", "all_logits"), ("noise", "logit_diff")]
)
@pytest.mark.parametrize(
    ("family", "union", "axes"), [(name, *union) for name in UNIONS for union in UNIONS[name]]
)
def test_several_sites_are_one_intervention(family, union, axes, direction, metric):
    loops.assert_exact(
        tiny_model(family),
        loops.evenly(5),
        site=list(union),
        axes=axes,
        metric=metric_of(family, metric, "left"),
        direction=direction,
        **pair(family),
        **({"windows": [Span(0.0, 0.1), Span(0.08, 0.3)]} if "time" in axes else {}),
    )


@pytest.mark.parametrize(
    ("union", "axes"),
    [
        (("encoder.mlp_out", "decoder.mlp_out"), ("time",)),
        (("connector.out", "decoder.resid_mid"), ("time",)),
        (("decoder.attn.q", "decoder.attn.k"), ("layer", "head")),
        (("decoder.attn.z", "decoder.mlp.post"), ("layer", "head")),
        (("decoder.attn.z", "decoder.attn.z"), ("layer",)),
        ((), ("layer",)),
    ],
)
def test_sites_that_do_not_go_together_are_refused(union, axes):
    """Other parts, other numbers of heads, heads and none, the same twice, none at all."""
    with pytest.raises(SiteError):
        patching.sweep(
            tiny_model("qwen2_audio"),
            site=list(union),
            axes=axes,
            metric=all_logits,
            progress=False,
            **pair("qwen2_audio"),
        )


def test_a_union_of_one_is_that_site(family):
    options = {"axes": ("layer",), "metric": all_logits, "progress": False, **pair(family)}
    one, other = (
        patching.sweep(tiny_model(family), site=site, **options)
        for site in ("encoder.mlp_out", ["encoder.mlp_out"])
    )
    torch.testing.assert_close(one.values, other.values, rtol=1e-12, atol=0)


# -------------------------------------------------------------------------------- layers, sources


@pytest.mark.parametrize("site", ["encoder.resid_pre", "encoder.attn.z", "decoder.mlp_out"])
def test_adjacent_layers_together(family, site):
    """`layer_window`: blocks l and l+1, named by the first."""
    result = loops.assert_exact(
        tiny_model(family), site=site, axes="layer", metric=all_logits, layer_window=2,
        **pair(family),
    )  # fmt: skip
    assert result.coords["layer"] == [0, 1]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_source_replaces_the_other_run_but_not_the_baselines(family, direction):
    model = tiny_model(family)
    options = {"site": "encoder.resid_pre", "axes": ("layer",), "metric": metrics.kl()}
    options |= {"direction": direction, **pair(family)}
    third = model.as_inputs(batch(family, 7))
    result = loops.assert_exact(model, source=third, **options)
    plain = loops.assert_exact(model, **options)
    for name in ("clean", "corrupted"):
        torch.testing.assert_close(getattr(result, name), getattr(plain, name), rtol=0, atol=1e-12)
    assert (result.values - plain.values).abs().min() > 1e-6


# -------------------------------------------------------------------------------- equal rows, NaN


def test_where_the_source_equals_the_base_nothing_changes():
    """Text in front of the audio is the same in both runs, and so is the whole of one prompt."""
    family = "qwen2_audio"
    runs = pair(family)
    runs["corrupted"]["input_features"] = runs["corrupted"]["input_features"].clone()
    runs["corrupted"]["input_features"][0] = runs["clean"]["input_features"][0]
    model = tiny_model(family)
    for site in ("decoder.resid_pre", "decoder.attn.z", "decoder.attn.v"):
        result = loops.assert_exact(
            model,
            loops.evenly(6),
            site=site,
            axes=("position", "layer"),
            metric=all_logits,
            **runs,
        )
        gap = (result.values - result.corrupted[:, None, None]).abs() / result.corrupted.abs().max()
        first_audio = model.timeline(runs["clean"])[1].clips("decoder").tolist().index(0)
        prefix = [p < first_audio for p in result.coords["position"]]
        assert gap[0].nan_to_num().max() <= 1e-12
        assert gap[1][prefix].nan_to_num().max() <= 1e-12
        assert gap[1].nan_to_num().max() > 1e-6


def test_stimuli_without_the_window_are_nan(family):
    """The second clip is over at 0.14 s."""
    result = patching.sweep(
        tiny_model(family),
        site="encoder.resid_pre",
        axes=("time", "layer"),
        windows=[(0.1, 0.2), (0.16, 0.2)],
        metric=all_logits,
        progress=False,
        **pair(family),
    )
    assert result.values.isnan().any(-1).tolist() == [[False, False], [False, True]]
    assert result.values[1, 1].isnan().all()


# -------------------------------------------------------------------------------- identity, total


@pytest.mark.mostly_slow(4)
@over(spread(1))
def test_identity(family, site):
    """Patching a run with its own activations changes nothing."""
    clean = batch(family, 0)
    plan = patching.plan(
        tiny_model(family),
        clean=clean,
        corrupted=clean,
        site=str(site),
        axes=("layer", "position") if site.n_layers else ("position",),
        layers=[1] if site.n_layers else None,
        metric=all_logits,
    )
    result = plan.run(only=loops.evenly(12)(len(plan)), progress=False)
    baseline = result.clean.reshape(*result.clean.shape, *[1] * len(result.axes))
    change = (result.values - baseline)[result.values.isfinite()]
    assert len(change) and change.abs().max() <= 1e-12 * result.clean.abs().max()


STREAMS = ("resid_pre", "resid_post", "normalized_resid_mid", "normalized_resid_post")


def is_total(name: str, part: str) -> bool:
    """Whether the output depends on nothing but the stream of this part."""
    model = tiny_model(name)
    if part == "decoder":
        return not (model.decoder_needs_encoder or model.written_beside(None))
    taps = getattr(model.connector, "taps", ()) if hasattr(model, "connector") else ()
    return part == "encoder" and not (model.cfg.ears or taps)


TOTAL = [(name, site) for name, site in SITES if site.last in STREAMS and is_total(name, site.part)]


@pytest.mark.mostly_slow(4)
@over([(name, site) for turn, (name, site) in enumerate(TOTAL) if turn % 2 or name in THOROUGH])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_total(family, site, direction):
    """All positions of the residual stream at any layer give the other run."""
    result = patching.sweep(
        tiny_model(family),
        site=str(site),
        axes="layer",
        metric=all_logits,
        direction=direction,
        progress=False,
        **pair(family),
    )
    assert torch.allclose(result.effect, torch.ones_like(result.effect), atol=1e-9)


@pytest.mark.parametrize("layout", ["left", "right", "clips"])
def test_whole_connector_is_the_decoders_first_residual_on_the_audio_span(layout):
    clips = range(2 if layout == "clips" else 1)
    options = {
        "metric": all_logits,
        "progress": False,
        "windows": [Span(0.0, 3.0, clip=clip) for clip in clips],
        **pair("qwen2_audio", layout),
    }
    model = tiny_model("qwen2_audio")
    connector = patching.sweep(model, site="connector.out", axes="time", **options)
    decoder = patching.sweep(
        model, site="decoder.resid_pre", axes=("layer", "time"), layers=[0], **options
    )
    torch.testing.assert_close(
        connector.values, decoder.values[:, 0], rtol=1e-12, atol=0, equal_nan=True
    )
    if layout != "clips":
        assert torch.allclose(connector.recovery, torch.ones_like(connector.recovery), atol=1e-9)


def test_whispers_decoder_alone_does_not_give_the_clean_run():
    """Its cross-attention still reads the corrupted audio."""
    result = patching.sweep(
        tiny_model("whisper"),
        site="decoder.resid_pre",
        axes="layer",
        metric=all_logits,
        progress=False,
        **pair("whisper"),
    )
    assert (result.recovery - 1).abs().min() > 1e-3


# -------------------------------------------------------------------------------- user hooks

USER_HOOKS = {
    "position by position": lambda x, hook: 0.7 * x,
    "across positions": lambda x, hook: (x + x.roll(1, dims=1)) / 2,
    "across prompts": lambda x, hook: (x + x.roll(1, dims=0)) / 2,
}


def assert_exact_under_hook(family: str, site: str, name: str, kind: str, metric: str) -> None:
    """A sweep under a user's hook equals the loop under the same hook, and the report names it."""
    model = tiny_model(family)
    with model.hooks([(name, USER_HOOKS[kind])]):
        result = loops.assert_exact(
            model,
            site=site,
            metric=metric_of(family, metric, usual_layout(family)),
            **along(family, Site.parse(site, model)),
            **pair(family),
        )
    assert any(name in line for line in result.report)


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(
    "name",
    [
        "encoder.hook_embed",
        "encoder.blocks.0.hook_mlp_out",
        "encoder.blocks.1.attn.hook_pattern",
        "encoder.blocks.2.hook_resid_post",
        "decoder.hook_embed",
        "decoder.blocks.0.attn.hook_v",
        "decoder.blocks.1.hook_resid_pre",
        "decoder.blocks.1.attn.hook_pattern",
        "decoder.blocks.2.mlp.hook_post",
        "decoder.ln_final.hook_normalized",
        "hook_logits",
    ],
)
@pytest.mark.parametrize("site", ["encoder.attn.z", "decoder.resid_pre"])
def test_user_hooks_stay_in_force(family, site, name):
    """Upstream of the patch, at it, downstream, in regions a sweep need not run, on patterns."""
    assert_exact_under_hook(family, site, name, "across positions", "logit_diff")


def assert_exact_under_hooks(family: str, lots: range) -> None:
    """Sweeps of any site under any hook."""
    names, kinds = list(tiny_model(family).hook_dict), list(USER_HOOKS)
    sites = [site for of, site in SITES if of == family]
    for lot in lots:
        rng = random.Random(f"{family} {lot}")
        site, name, kind = (rng.choice(of) for of in (sites, names, kinds))
        metric = rng.choice(metrics_of(family, usual_layout(family), site))
        print(site, name, kind, metric)
        assert_exact_under_hook(family, str(site), name, kind, metric)


@pytest.mark.parametrize(
    "lots",
    [range(8), *(pytest.param(range(n, n + 39), marks=pytest.mark.slow) for n in (8, 47, 86))],
)
def test_user_hooks_anywhere(family, lots):
    assert_exact_under_hooks(family, lots)


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("lots", [range(1), pytest.param(range(1, 25), marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in THOROUGH])
def test_user_hooks_in_every_family(family, lots):
    assert_exact_under_hooks(family, lots)


@pytest.mark.parametrize("site", ["encoder.resid_pre", "decoder.attn.z"])
@pytest.mark.parametrize(
    "name", ["encoder.blocks.0.hook_mlp_out", "decoder.blocks.2.hook_mlp_out", "hook_logits"]
)
def test_user_hooks_run_for_every_cell(family, site, name):
    """A hook may have effects of its own, so it sees every cell's run."""
    model, seen = tiny_model(family), []
    with model.hooks([(name, lambda x, hook: seen.append(len(x)))]):
        result = patching.sweep(
            model,
            site=site,
            axes=("layer", "position"),
            layers=[2],
            metric=metrics.logit_diff(5, 9),
            progress=False,
            **pair(family),
        )
    assert sum(seen) >= 2 * len(loops.cells_of(result))


def test_a_hook_makes_a_difference(family):
    """The hook of these tests is felt, so that comparing under it means something."""
    model = tiny_model(family)
    options = {"site": "encoder.resid_pre", "axes": "layer", "metric": all_logits, **pair(family)}
    free = patching.sweep(model, progress=False, **options)
    with model.hooks([("encoder.blocks.2.hook_mlp_out", USER_HOOKS["position by position"])]):
        hooked = patching.sweep(model, progress=False, **options)
    assert (free.values - hooked.values).abs().max() > 1e-3


# -------------------------------------------------------------------------------- the shipped model


@pytest.mark.parametrize(
    ("site", "axes", "windows"),
    [
        ("decoder.resid_pre", ("layer", "time"), [(0.2, 0.3), (0.7, 0.9), (1.0, 1.5)]),
        ("decoder.attn.z", ("layer", "head"), None),
    ],
)
def test_the_embedded_model_on_its_default_pair(embedded, site, axes, windows):
    """Trained weights and real audio in float32."""
    clips = default_pair()
    clean, corrupted = (
        embedded.prepare(path, clips.question) for path in (clips.clean, clips.corrupted)
    )
    loops.assert_exact(
        embedded,
        loops.evenly(5),
        clean=clean,
        corrupted=corrupted,
        site=site,
        axes=axes,
        metric=metrics.logit_diff(clips.answer, clips.against),
        **({"windows": windows} if windows else {}),
    )


def test_the_loop_itself_sees_differences(family):
    """Guards the guard: its cells differ from each other and from the unpatched run."""
    model = tiny_model(family)
    cells = [{"layer": layer, "time": Span(0.0, 0.1)} for layer in range(3)]
    values = loops.loop(model, cells, site="encoder.resid_pre", metric=all_logits, **pair(family))
    unpatched = all_logits(model(pair(family)["corrupted"]))
    everything = torch.cat([values[0], unpatched[:, None].detach()], dim=1)
    gaps = (everything[:, :, None] - everything[:, None, :]).abs()
    assert gaps[gaps > 0].numel() == 2 * 4 * 3 and gaps[gaps > 0].min() > 1e-6


# -------------------------------------------------------------------------------- routes


@pytest.mark.parametrize(
    ("family", "site", "route", "unknown"),
    [
        ("wavlm", "encoder.attn.k", routes.EncoderRoute, ""),
        ("mms", "encoder.mlp.post", routes.EncoderRoute, ""),
        ("mms", "encoder.adapter_out", hooked.SuffixRoute, "encoder.adapter_out is of its own"),
        ("granite_speech", "encoder.mlp_out", hooked.SuffixRoute, "the encoder is of its own"),
        ("granite_speech", "decoder.mlp_out", routes.DecoderRoute, ""),
        ("moshi", "decoder.attn.z", routes.DecoderRoute, ""),
        ("moshi", "depth.attn.z", hooked.BehindRoute, ""),
        ("kimi_audio", "encoder.mlp_out", hooked.HookedRoute, "its output is also that of the"),
    ],
)
def test_blocks_of_their_own_kind_run_whole_and_the_report_says_so(family, site, route, unknown):
    plan = patching.plan(
        tiny_model(family), site=site, axes="layer", metric=all_logits, **pair(family)
    )
    assert plan.request.route is route
    notes = plan.run(only=[1], progress=False).report
    assert any(unknown in note for note in notes) if unknown else not notes


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(
    ("site", "route"),
    [
        ("encoder.attn.z", routes.EncoderRoute),
        ("connector.in", routes.ConnectorRoute),
        ("decoder.mlp_out", routes.DecoderRoute),
        (["decoder.attn.k", "decoder.attn.v"], hooked.SuffixRoute),
    ],
)
@pytest.mark.parametrize("layout", layouts_of("kimi_audio"))
def test_the_text_alone_is_computed_without_the_blocks_that_speak(site, route, layout):
    model, family = tiny_model("kimi_audio"), "kimi_audio"
    axes = "position" if site == "connector.in" else ("layer", "position")
    options = {"site": site, "axes": axes, **pair(family, layout)}
    options["metric"] = metric_of(family, "text_kl", layout)
    plan = patching.plan(model, **options)
    assert plan.request.route is route
    computed = loops.evenly(40)(len(plan))
    with unused(model.speaker.blocks[0]):
        result = plan.run(only=computed, progress=False)
    assert not result.report
    compared = [computed[i] for i in loops.evenly(4)(len(computed))]
    loops.assert_equals_loop(model, result, lambda n: compared, **options)


def test_stacks_behind_the_decoder_run_alone():
    """Their cells cost what they cost, not what the decoder does."""
    model = tiny_model("moshi")
    options = {"axes": ("layer", "head"), "metric": all_logits, **pair("moshi", same_text=False)}
    plan = patching.plan(model, site="depth.attn.z", **options)
    assert plan.schedule.loop > 1.5 * plan.schedule.flops([0])
    plan.run(only=[0], progress=False)
    with unused(model.decoder.blocks[0]):
        plan.run(progress=False)


@contextmanager
def unused(module: torch.nn.Module) -> Iterator[None]:
    """Fails where the module runs."""
    ran: list[bool] = []
    handle = module.register_forward_hook(lambda *_: ran.append(True))
    try:
        yield
    finally:
        handle.remove()
    assert not ran


@pytest.mark.parametrize(("family", "site"), [("moshi", "depth.z"), ("kimi_audio", "speaker.z")])
def test_sites_that_nothing_read_depends_on_are_refused(family, site):
    asked = {"site": site, "axes": "layer", **pair(family)}
    asked["metric"] = metric_of(family, "text_kl", usual_layout(family))
    with pytest.raises(ValueError, match=r"can change nothing that is read.* reads the text"):
        patching.plan(tiny_model(family), **asked)
