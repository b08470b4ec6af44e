"""What every sweep must satisfy, on every family: Exact, Identity and Total."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_lens import HookedAudioTransformer, patching
from audio_lens.patching import Site, sites_of

MODELS = {
    family: HookedAudioTransformer.from_hf(tiny.tiny_hf(family, dtype=torch.float64))
    for family in tiny.FAMILIES
}
SITES = {family: [str(site) for site in sites_of(model)] for family, model in MODELS.items()}
EVERY_SITE = [(family, site) for family in tiny.FAMILIES for site in SITES[family]]


def pair(family: str, seed: int = 0, padding: str = "right") -> tuple[dict, dict]:
    """A clean and a corrupted batch of unequal prompts; the decoder of Whisper reads the same."""
    made = [
        tiny.hf_inputs(family, seed=s, padding=padding, dtype=torch.float64)
        for s in (seed, seed + 100)
    ]
    text = {key: made[0][key] for key in made[0] if key != "input_features"}
    return made[0], {**made[1], **text}


def last_logits(logits):
    """A metric of many directions at once: a fixed mixture of all logits of all positions."""
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).cos()
    return logits.flatten(1) @ weights


def loop(model, base, source, site: Site, cells: list[tuple]) -> torch.Tensor:
    """Each cell as one full forward with a hook that patches just it; the slow, obvious way."""
    layers = range(site.n_layers) if site.n_layers else [None]
    names = [site.hook_name(layer) for layer in layers]
    _, cache = model.run_with_cache(source, names_filter=names)
    values = []
    for layer, unit, positions in cells:

        def patch(x, hook, unit=unit, positions=positions):
            x = x.clone()
            for row, where in enumerate(positions):
                index = [row] + [slice(None)] * (x.ndim - 1)
                index[site.position_dim] = where
                if unit is not None:
                    index[site.unit_dim] = unit
                x[tuple(index)] = cache[hook.name][tuple(index)]
            return x

        values.append(
            last_logits(model.run_with_hooks(base, fwd_hooks=[(site.hook_name(layer), patch)]))
        )
    return torch.stack(values, dim=-1)


def as_loop_cell(model, inputs, site: Site, cell: tuple) -> tuple:
    """A cell's coordinates as layer, head and the positions of every row."""
    *place, where = cell
    layer = place.pop(0) if site.n_layers else None
    head = place.pop(0) if place else None
    if isinstance(where, patching.Span):
        return layer, head, positions_in(model, model.as_inputs(inputs), site, where)
    return layer, head, [torch.tensor([where])] * len(model.as_inputs(inputs))


def positions_in(model, inputs, site: Site, span) -> list[torch.Tensor]:
    """Per row of the site's tensor, the positions inside the span."""
    timeline = model.timeline(inputs)
    return [
        timeline[row].inside(site.positions_of, span).nonzero().flatten()
        for row in range(len(timeline))
    ]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("family", "name"), EVERY_SITE)
def test_exact(family, name, direction):
    """Every site: the sweep equals one full forward per cell, in float64 to 1e-10."""
    model = MODELS[family]
    site = Site.parse(name, model)
    clean, corrupted = pair(family, padding="left" if family == "qwen2_audio" else "right")
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    has_time = model.timeline(model.as_inputs(base)).has_time(site.positions_of)
    spans = [patching.Span(0.0, 0.5), patching.Span(0.5, 0.7), patching.Span(0.65, 2.5)]
    axes = [axis for axis in ("layer", "head") if axis in site.axes]
    options = {"windows": spans} if has_time else {}
    with model.attention("explicit"):
        result = patching.sweep(
            model,
            clean=clean,
            corrupted=corrupted,
            site=name,
            axes=(*axes, "time" if has_time else "position"),
            metric=last_logits,
            direction=direction,
            cells_per_forward=5,
            progress=False,
            **options,
        )
        cells = list(itertools.product(*(result.coords[axis] for axis in result.axes)))
        few = sorted({0, *range(3, len(cells), max(1, len(cells) // 5)), len(cells) - 1})
        slow = loop(
            model, base, source, site, [as_loop_cell(model, base, site, cells[i]) for i in few]
        )
    fast = result.values.flatten(1)[:, few]
    there = fast.isfinite()  # NaN where a row has only padding at the position
    assert there.any(1).all() and (there.all() or not has_time)
    assert (fast - slow)[there].abs().max() <= 1e-10 * slow.abs().max()
    assert (slow - slow[:, :1]).abs().max() > 0, "the loop itself sees no difference between cells"


@pytest.mark.parametrize("family", tiny.FAMILIES)
@given(data=st.data())
@settings(max_examples=10)
def test_exact_for_any_windows(family, data):
    """Overlapping, touching and one-frame windows, odd batch sizes, several layers."""
    model = MODELS[family]
    clean, corrupted = pair(family, seed=data.draw(st.integers(0, 50)))
    site = Site.parse("encoder.resid_pre", model)
    edges = st.tuples(st.integers(0, 80), st.integers(2, 100))
    spans = [
        (start / 50, (start + length) / 50)
        for start, length in data.draw(st.lists(edges, min_size=1, max_size=4))
    ]
    layers = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True))
    result = patching.sweep(
        model,
        clean=clean,
        corrupted=corrupted,
        site=str(site),
        axes=("time", "layer"),
        windows=spans,
        layers=layers,
        metric=last_logits,
        progress=False,
        cells_per_forward=data.draw(st.integers(1, 7)),
    )
    inputs = model.as_inputs(corrupted)
    cells = [
        (layer, None, positions_in(model, inputs, site, patching.Span.of(span)))
        for span in spans
        for layer in layers
    ]
    slow = loop(model, corrupted, clean, site, cells)
    fast = result.values.flatten(1)
    there = fast.isfinite()  # NaN where a window lies behind the end of a shorter clip
    beyond = [[len(where[row]) == 0 for *_, where in cells] for row in range(2)]
    assert torch.equal(~there, torch.tensor(beyond))
    assert (fast - slow)[there].abs().max() <= 1e-10 * slow.abs().max()


@pytest.mark.parametrize(("family", "name"), EVERY_SITE)
def test_identity(family, name):
    """Patching a run with its own activations changes nothing."""
    model = MODELS[family]
    clean, _ = pair(family)
    site = Site.parse(name, model)
    result = patching.sweep(
        model,
        clean=clean,
        corrupted=clean,
        site=name,
        axes=("layer", "position") if site.n_layers else ("position",),
        layers=[1] if site.n_layers else None,
        metric=last_logits,
        progress=False,
    )
    baseline = result.clean[:, None, None] if site.n_layers else result.clean[:, None]
    change = (result.values - baseline)[result.values.isfinite()]
    assert len(change) and change.abs().max() <= 1e-12 * result.clean.abs().max()


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
def test_total(family, site):
    """All positions of the residual stream at any layer give the clean run."""
    clean, corrupted = pair(family)
    result = patching.sweep(
        MODELS[family],
        clean=clean,
        corrupted=corrupted,
        site=site,
        axes="layer",
        metric=last_logits,
        progress=False,
    )
    assert torch.allclose(result.recovery, torch.ones_like(result.recovery), atol=1e-9)


def test_whole_connector_is_the_decoders_first_residual_on_the_audio_span():
    model = MODELS["qwen2_audio"]
    clean, corrupted = pair("qwen2_audio")
    options = {
        "clean": clean,
        "corrupted": corrupted,
        "metric": last_logits,
        "progress": False,
        "windows": [(0.0, 3.0)],
    }
    connector = patching.sweep(model, site="connector.out", axes="time", **options)
    decoder = patching.sweep(
        model, site="decoder.resid_pre", axes=("layer", "time"), layers=[0], **options
    )
    assert torch.allclose(connector.values, decoder.values[:, 0], rtol=1e-12)
    assert torch.allclose(connector.recovery, torch.ones(2, 1, dtype=torch.float64), atol=1e-9)


def test_whispers_decoder_alone_does_not_give_the_clean_run():
    """Its cross-attention still reads the corrupted audio."""
    clean, corrupted = pair("whisper")
    result = patching.sweep(
        MODELS["whisper"],
        clean=clean,
        corrupted=corrupted,
        site="decoder.resid_pre",
        axes="layer",
        metric=last_logits,
        progress=False,
    )
    assert (result.recovery - 1).abs().min() > 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_user_hooks_stay_in_force(family):
    """A sweep under a user's hook equals the loop under the same hook."""
    model = MODELS[family]
    clean, corrupted = pair(family)
    site = Site.parse("encoder.resid_pre", model)
    with model.hooks([("encoder.blocks.2.hook_mlp_out", lambda x, hook: 0.5 * x)]):
        result = patching.sweep(
            model,
            clean=clean,
            corrupted=corrupted,
            site=str(site),
            axes=("layer", "time"),
            windows=[(0.0, 1.0)],
            metric=last_logits,
            progress=False,
        )
        where = positions_in(model, model.as_inputs(corrupted), site, patching.Span(0.0, 1.0))
        cells = [(layer, None, where) for layer in range(3)]
        slow = loop(model, corrupted, clean, site, cells)
    assert torch.allclose(result.values[..., 0], slow, rtol=1e-10)
    free = patching.sweep(
        model,
        clean=clean,
        corrupted=corrupted,
        site=str(site),
        axes=("layer", "time"),
        windows=[(0.0, 1.0)],
        metric=last_logits,
        progress=False,
    )
    assert (free.values[..., 0] - slow).abs().max() > 1e-3
