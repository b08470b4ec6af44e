"""What every sweep must satisfy, on every family: Exact, Identity, Total, and user hooks.

Exact is a property test of every site: whatever is asked of a sweep, its values are those of one
full forward with hooks per cell (loops.py). The long form of it is marked slow.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import loops
import pytest
import tiny
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from audio_lens import HookedAudioTransformer, Span, metrics, patching
from audio_lens.models.embedded import default_pair
from audio_lens.patching import Site, SiteError, sites_of

FRAMES = 14  # encoder positions, of which the longest clip fills 12
ENDING = (7, 8)  # tokens that prompts without padding at their end end with


# -------------------------------------------------------------------------------- models, batches


@functools.cache
def tiny_model(family: str, dtype: torch.dtype = torch.float64) -> HookedAudioTransformer:
    """Three layers a part, 0.28 s of audio, 6 neurons; grouped keys in Qwen2-Audio (6 over 2)."""
    width = {"decoder_ffn_dim": 6} if family == "whisper" else {"intermediate_size": 6}
    return HookedAudioTransformer.from_hf(
        tiny.tiny_hf(family, dtype=dtype, max_source_positions=FRAMES, encoder_ffn_dim=6, **width)
    )


LAYOUTS = {
    "right": {"lengths": (23, 14), "words": (6, 4), "padding": "right"},
    "left": {"lengths": (23, 14), "words": (6, 4), "padding": "left"},
    "one": {"lengths": (23,), "words": (5,)},
    "clips": {"lengths": ((15, 10), 11), "words": (6, 4), "padding": "left"},
}
LAYOUTS_OF = {"whisper": ("right", "left", "one"), "qwen2_audio": tuple(LAYOUTS)}


def batch(family: str, seed: int, layout: str = "left", dtype=torch.float64) -> dict:
    """One run's inputs; runs of one layout correspond and differ in audio and words."""
    made = tiny.hf_inputs(family, seed=seed, n_frames=2 * FRAMES, dtype=dtype, **LAYOUTS[layout])
    if family == "whisper":
        n_mel = torch.tensor(LAYOUTS[layout]["lengths"])
        made["attention_mask"] = (torch.arange(2 * FRAMES) < n_mel[:, None]).long()
    if layout != "right":
        made["decoder_input_ids" if family == "whisper" else "input_ids"][:, -2:] = torch.tensor(
            ENDING
        )
    return made


def pair(family: str, layout: str = "left", same_text: bool = True, **options: Any) -> dict:
    """A clean and a corrupted run; with the same text, they differ in their audio alone."""
    clean, corrupted = (batch(family, seed, layout, **options) for seed in (0, 100))
    if same_text:
        corrupted = {**clean, "input_features": corrupted["input_features"]}
    return {"clean": clean, "corrupted": corrupted}


SITES = [(family, site) for family in tiny.FAMILIES for site in sites_of(tiny_model(family))]
EVERY_SITE = pytest.mark.parametrize(
    ("family", "site"), SITES, ids=[f"{family}-{site}" for family, site in SITES]
)


def along(family: str, site: Site) -> dict[str, Any]:
    """Options of a small sweep over a block and a few windows, or tokens where there is no time."""
    block = {"layers": [1]} if site.n_layers else {}
    axes = ("layer",) if site.n_layers else ()
    if family == "whisper" and site.positions_of == "decoder":
        return {"axes": (*axes, "position"), **block}
    return {"axes": (*axes, "time"), "windows": [Span(0.0, 0.1), Span(0.12, 0.14)], **block}


# -------------------------------------------------------------------------------- metrics


def all_logits(logits):
    """A metric of many directions at once: all logits of all positions along one unit vector."""
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).cos()
    return logits.flatten(1) @ (weights / weights.norm())


def one_number(logits):
    return logits[..., 11].mean()


EARLY = {"right": 2, "left": -3, "one": 1, "clips": -4}  # attended in every row, and not the last

METRICS: dict[str, Callable[[str], Any]] = {
    "all_logits": lambda layout: all_logits,
    "one_number": lambda layout: one_number,
    "logit_diff": lambda layout: metrics.logit_diff(5, 9),
    "early_logit_diff": lambda layout: metrics.logit_diff(5, 9, position=EARLY[layout]),
    "log_prob": lambda layout: metrics.log_prob(33),
    "early_prob": lambda layout: metrics.prob(33, position=EARLY[layout]),
    "kl": lambda layout: metrics.kl(),
    "sequence_log_prob": lambda layout: metrics.sequence_log_prob(ENDING),
    "several": lambda layout: {
        "early": metrics.log_prob(4, position=EARLY[layout]),
        "last": metrics.logit_diff(5, 9),
    },
    "several_with_opaque": lambda layout: {"all": all_logits, "kl": metrics.kl()},
}


# -------------------------------------------------------------------------------- exact


@dataclass(frozen=True)
class Case:
    """Everything that can be asked of a sweep of one site."""

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
    lot: int  # decides which cells are compared

    def options(self, family: str, site: str) -> dict[str, Any]:
        """The arguments of the sweep."""
        asked = pair(family, self.layout, self.same_text, dtype=self.dtype)
        asked |= {"site": site, "axes": self.axes, "metric": METRICS[self.metric](self.layout)}
        given = {
            "windows": self._windows(),
            "layers": self.layers,
            "source": self._source(family, site),
            "cells_per_forward": self.cells_per_forward,
        }
        asked |= {name: option for name, option in given.items() if option is not None}
        return asked | ({"layer_window": self.layer_window} if self.layer_window > 1 else {})

    def _windows(self) -> Any:
        if not isinstance(self.windows, list):
            return self.windows
        return [Span(start_s, end_s, clip=clip) for start_s, end_s, clip in self.windows]

    def _source(self, family: str, site: str) -> Any:
        """A third run, as inputs or as its activations."""
        if self.source is None:
            return None
        model = tiny_model(family, self.dtype)
        inputs = model.as_inputs(batch(family, 7, self.layout, self.dtype))
        if self.source == "inputs":
            return inputs
        place = Site.parse(site, model)
        names = [place.hook_name(layer) for layer in range(place.n_layers or 0) or [None]]
        with torch.no_grad(), model.attention("explicit"):
            cache = model.run_with_cache(inputs, names_filter=names)[1]
        return {name: cache[name] for name in names}

    def few(self, n_cells: int) -> list[int]:
        return random.Random(self.lot).sample(range(n_cells), min(2, n_cells))


@st.composite
def windows_of(draw, layout: str) -> list[tuple[float, float, int]]:
    """Start, end and clip of windows: they overlap, touch, lie at the edges, hold one position."""
    lengths = LAYOUTS[layout]["lengths"]
    clips = lengths[0] if isinstance(lengths[0], tuple) else lengths[:1]
    spans = []
    for _ in range(draw(st.integers(1, 3))):
        clip = draw(st.integers(0, len(clips) - 1))
        last = tiny.audio_tokens(clips[clip]) - 1
        first = draw(st.integers(0, last))
        beyond = draw(st.integers(first + 1, last + 1))
        start_s = 0.04 * first + draw(st.sampled_from([0.0, 0.005, 0.01]))
        end_s = 0.04 * beyond + draw(st.sampled_from([0.0, 0.015, 3.0]))
        spans.append((start_s, end_s, clip))
    return spans


@st.composite
def cases(draw, family: str, site: Site) -> Case:
    """Cases that fit the site."""
    layout = draw(st.sampled_from(LAYOUTS_OF[family]))
    has_time = family != "whisper" or site.positions_of != "decoder"
    along = draw(st.sampled_from([*(["time"] * 2 if has_time else []), "position", None]))
    possible = [*(["layer"] if site.n_layers else []), *([site.unit] if site.unit else [])]
    whole = [axis for axis in possible if draw(st.booleans())]
    axes = [*whole, *([along] if along else [])] or ["position"]
    windows = None
    if "time" in axes:
        windows = draw(windows_of(layout) | st.sampled_from(["position", 0.1, (0.1, 0.06)]))
    layers = None
    if site.n_layers and (site.unit in axes or draw(st.booleans())):
        most = 1 if site.unit in axes else site.n_layers
        every = st.integers(0, site.n_layers - 1)
        layers = draw(st.lists(every, min_size=1, max_size=most, unique=True))
    windowed = "layer" in axes and layers is None
    ends_unpadded = layout != "right"
    return Case(
        layout=layout,
        axes=tuple(draw(st.permutations(axes))),
        windows=windows,
        layers=layers,
        layer_window=draw(st.sampled_from([1, 2])) if windowed else 1,
        metric=draw(
            st.sampled_from([m for m in METRICS if ends_unpadded or m != "sequence_log_prob"])
        ),
        same_text=draw(st.booleans()),
        source=draw(st.sampled_from([None, None, None, "inputs", "activations"])),
        cells_per_forward=draw(st.none() | st.integers(1, 7)),
        attn_mode=draw(st.sampled_from(["auto", "explicit", "sdpa"])),
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32])),
        lot=draw(st.integers(0, 99)),
    )


def for_all(strategy: st.SearchStrategy, examples: int, name: str) -> Callable:
    """Runs a function at once on so many examples, other ones for every name."""

    def run(check: Callable) -> None:
        check = given(strategy)(check)
        settings(max_examples=examples, database=None)(seed(zlib.crc32(name.encode()))(check))()

    return run


def assert_case_is_exact(family: str, site: str, direction: str, case: Case, choose) -> None:
    model = tiny_model(family, case.dtype)
    with model.attention(case.attn_mode):
        loops.assert_exact(model, choose, direction=direction, **case.options(family, site))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@EVERY_SITE
def test_exact(family, site, direction):
    """Every site: whatever is asked, a few cells equal one full forward each."""

    @for_all(cases(family, site), 6, f"{family} {site} {direction}")
    def holds(case):
        assert_case_is_exact(family, str(site), direction, case, case.few)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@EVERY_SITE
def test_exact_in_all_cells(family, site, direction):
    """The same in every cell, for more of what can be asked."""

    @for_all(cases(family, site), 8, f"all {family} {site} {direction}")
    def holds(case):
        assert_case_is_exact(family, str(site), direction, case, range)


@EVERY_SITE
def test_every_block_and_unit(family, site):
    """The map people ask for: layer, unit and time (or position) at once, and it is no flat one."""
    model = tiny_model(family)
    has_time = family != "whisper" or site.positions_of != "decoder"
    spans = [Span(0.0, 0.1), Span(0.12, 0.14), Span(0.13, 2.5)]
    result = loops.assert_exact(
        model,
        loops.evenly(4),
        site=str(site),
        axes=(
            *[a for a in ("layer", "head") if a in site.axes],
            "time" if has_time else "position",
        ),
        metric=all_logits,
        cells_per_forward=5,
        **pair(family, same_text=False),
        **({"windows": spans} if has_time else {}),
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


@pytest.mark.parametrize(
    ("direction", "metric"), [("denoise", "all_logits"), ("noise", "logit_diff")]
)
@pytest.mark.parametrize(
    ("family", "union", "axes"), [(f, *union) for f in tiny.FAMILIES for union in UNIONS[f]]
)
def test_several_sites_are_one_intervention(family, union, axes, direction, metric):
    loops.assert_exact(
        tiny_model(family),
        loops.evenly(5),
        site=list(union),
        axes=axes,
        metric=METRICS[metric]("left"),
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


@EVERY_SITE
def test_identity(family, site):
    """Patching a run with its own activations changes nothing."""
    clean = batch(family, 0)
    result = patching.sweep(
        tiny_model(family),
        clean=clean,
        corrupted=clean,
        site=str(site),
        axes=("layer", "position") if site.n_layers else ("position",),
        layers=[1] if site.n_layers else None,
        metric=all_logits,
        progress=False,
    )
    baseline = result.clean.reshape(-1, *[1] * len(result.axes))
    change = (result.values - baseline)[result.values.isfinite()]
    assert len(change) and change.abs().max() <= 1e-12 * result.clean.abs().max()


@pytest.mark.parametrize(
    ("direction", "metric"), [("denoise", "all_logits"), ("noise", "logit_diff")]
)
@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("whisper", "encoder.resid_pre"),
        ("whisper", "encoder.resid_post"),
        ("qwen2_audio", "encoder.resid_pre"),
        ("qwen2_audio", "decoder.resid_pre"),
        ("qwen2_audio", "decoder.resid_post"),
    ],
)
def test_total(family, site, metric, direction):
    """All positions of the residual stream at any layer give the other run."""
    result = patching.sweep(
        tiny_model(family),
        site=site,
        axes="layer",
        metric=METRICS[metric]("left"),
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
            metric=METRICS[metric]("left"),
            **along(family, Site.parse(site, model)),
            **pair(family),
        )
    assert any(name in line for line in result.report)


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


def hooked_sweeps(family: str) -> st.SearchStrategy:
    names = list(tiny_model(family).hook_dict)
    sites = [str(site) for of, site in SITES if of == family]
    every = (sites, names, list(USER_HOOKS), ["all_logits", "logit_diff", "early_logit_diff"])
    return st.tuples(*map(st.sampled_from, every))


@pytest.mark.parametrize("examples", [25, pytest.param(100, marks=pytest.mark.slow)])
def test_user_hooks_anywhere(family, examples):
    @for_all(hooked_sweeps(family), examples, family)
    def holds(drawn):
        assert_exact_under_hook(family, *drawn)


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
