"""Attribution patching: what it must equal, and what it must find."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from jaxtyping import TypeCheckError

import tiny
from audio_lens import HookedAudioTransformer, metrics, patching
from audio_lens.patching import SiteError, sites_of
from audio_lens.patching.attribution.attribute import attribute
from audio_lens.patching.attribution.taps import key_effects, query_effects
from toys import (
    ANSWER,
    AUDIO_TOKENS,
    QUERY,
    Cue,
    Toy,
    cancelling_toy,
    copy_toy,
    not_asking,
    prompt,
    saturated_toy,
    two_stream_toy,
)

WRONG_VALUE = (ValueError, TypeCheckError)  # the tests' type checker is quicker than our message
MODELS = {
    family: HookedAudioTransformer.from_hf(tiny.tiny_hf(family, dtype=torch.float64))
    for family in tiny.FAMILIES
}
EVERY_SITE = [(family, str(site)) for family in tiny.FAMILIES for site in sites_of(MODELS[family])]
LENGTHS = {"whisper": (201, 173), "qwen2_audio": ((120, 90), (150,))}  # two clips in one prompt


def pair(family: str) -> tuple[dict, dict]:
    """Two padded batches of the same text, as a Hugging Face processor returns them."""
    clean, other = (
        tiny.hf_inputs(family, LENGTHS[family], padding="left", dtype=torch.float64, seed=seed)
        for seed in (0, 1)
    )
    return clean, {**clean, "input_features": other["input_features"]}


def mixed_logits(logits):
    """A metric of many directions at once: a fixed mixture of all logits of all positions."""
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).cos()
    return logits.flatten(1) @ weights


def placed(model, site, inputs) -> dict:
    """Axes and windows that split a site as finely as a test can afford."""
    has_time = model.timeline(model.as_inputs(inputs)).has_time(site.positions_of)
    units = [axis for axis in ("layer", site.unit) if axis in site.axes]
    if has_time:
        return {"axes": (*units, "time"), "windows": [(0.0, 0.5), (0.45, 0.9), (0.9, 2.2)]}
    return {"axes": (*units, "position")}


def change(result):
    """The effect of every cell in units of the metric."""
    base = result.corrupted if result.direction == "denoise" else result.clean
    return result.values - base.reshape(*base.shape, *[1] * len(result.axes))


# -------------------------------------------------------------------------------- truth


def slow_change(model, base, source, site, layer) -> torch.Tensor:
    """Gradient times difference at every element of one activation, for every prompt."""
    name = site.hook_name(layer)
    kept = {}

    def grow(x, hook):
        kept["x"] = x.detach().requires_grad_()
        return kept["x"]

    from_source = model.run_with_cache(source, names_filter=name)[1][name].detach()
    values = mixed_logits(model.run_with_hooks(base, fwd_hooks=[(name, grow)]))
    difference = torch.where(from_source == kept["x"], 0.0, from_source - kept["x"].detach())
    return torch.stack(
        [
            torch.autograd.grad(value, kept["x"], retain_graph=True)[0] * difference
            for value in values
        ]
    )


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("family", "name"), EVERY_SITE)
def test_every_cell_is_gradient_times_difference(family, name, direction):
    """Every site, with padding, grouped keys and several clips: equal to the obvious loop."""
    model = MODELS[family]
    clean, corrupted = pair(family)
    site = patching.Site.parse(name, model)
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    where = placed(model, site, base)
    with model.attention("explicit"):
        fast = attribute(
            model,
            clean=clean,
            corrupted=corrupted,
            site=name,
            metric=mixed_logits,
            direction=direction,
            layers=[0, 2] if site.n_layers else None,
            **where,
        )
        slow = {
            layer: slow_change(model, base, source, site, layer)
            for layer in ([0, 2] if site.n_layers else [None])
        }
    timeline = model.timeline(model.as_inputs(base))
    cells = list(itertools.product(*(fast.coords[axis] for axis in fast.axes)))
    found = change(fast).flatten(1)
    for column, cell in enumerate(cells):
        at = dict(zip(fast.axes, cell, strict=True))
        product = slow[at.get("layer")]
        if site.unit in at:
            product = product.select(1 + site.unit_dim, at[site.unit]).unsqueeze(1 + site.unit_dim)
        expected = cut(product, site, timeline, at).sum(dim=list(range(1, product.ndim)))
        there = found[:, column].isfinite()
        assert there.any()
        scale = slow[at.get("layer")].abs().sum()
        assert (found[:, column] - expected)[there].abs().max() <= 1e-10 * scale
    assert found[found.isfinite()].abs().max() > 0


def cut(product, site, timeline, at):
    """The product with everything outside the cell's positions set to 0."""
    mask = torch.zeros(product.shape[1], product.shape[1 + site.position_dim])
    entries = [(row, None) for row in range(len(timeline))]
    if site.positions_of != "decoder":
        entries = [(n, c) for n in range(len(timeline)) for c in range(timeline[n].n_clips)]
    for entry, (row, clip) in enumerate(entries):
        if "position" in at:
            mask[entry, at["position"]] = 1
        elif at["time"].clip < timeline[row].n_clips and clip in (None, at["time"].clip):
            mask[entry] = timeline[row].inside(site.positions_of, at["time"]).double()
    shape = [1] * product.ndim
    shape[1], shape[1 + site.position_dim] = mask.shape
    return product * mask.reshape(shape)


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize(("family", "name"), EVERY_SITE)
def test_small_patches_do_what_is_estimated(family, name):
    """Moving a layer a thousandth of the way has a thousandth of the estimated effect."""
    model = MODELS[family]
    clean, corrupted = pair(family)
    site = patching.Site.parse(name, model)
    layer = 1 if site.n_layers else None
    with model.attention("explicit"):
        estimate = attribute(
            model,
            clean=clean,
            corrupted=corrupted,
            site=name,
            axes="layer" if site.n_layers else "position",
            metric=mixed_logits,
            layers=[1] if site.n_layers else None,
        )
        point = site.hook_name(layer)
        _, cache = model.run_with_cache(clean, names_filter=point)

        def moved(share):
            def patch(x, hook):
                return torch.where(x == cache[point], x, x + share * (cache[point] - x))

            return mixed_logits(model.run_with_hooks(corrupted, fwd_hooks=[(point, patch)]))

        with torch.no_grad():
            measured = (moved(1e-3) - moved(-1e-3)) / 2e-3
    expected = change(estimate).nansum(-1)  # NaN at positions that a prompt does not have
    assert torch.allclose(expected, measured, rtol=1e-2, atol=2e-3 * measured.abs().max())


# -------------------------------------------------------------------------------- linear toys

HEARD = {"clean": prompt(Cue(1)), "corrupted": prompt(Cue(3)), "metric": metrics.logit_diff(1, 3)}
BOTH = {**HEARD, "clean": prompt(Cue(1, read=1)), "corrupted": prompt(Cue(3, read=3))}
LINEAR = [
    ("resid_pre", ("layer", "time")),
    ("resid_pre", ("layer", "position")),
    ("resid_mid", ("position", "layer")),
    ("resid_post", ("layer",)),
    ("attn_out", ("layer", "position")),
    ("attn.z", ("layer", "head")),
    ("attn.v", ("layer", "head", "time")),
    ("attn.result", ("head",)),
    ("mlp_out", ("layer",)),
    ("connector.in", ("time",)),
    ("connector.out", ("position",)),
]


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("method", ["atp", "ig"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("site", "axes"), LINEAR)
def test_linear_paths_are_exact(site, axes, direction, method):
    """Where patterns do not change, the estimate is the measurement."""
    toy = two_stream_toy(2.0, 1.0)
    options = {**BOTH, "site": site, "axes": axes, "direction": direction}
    estimate = attribute(toy, method=method, **options)
    exact = patching.sweep(toy, progress=False, **options)
    assert estimate.dims == exact.dims and estimate.coords == exact.coords
    assert torch.allclose(estimate.values, exact.values, atol=1e-12)
    assert torch.equal(estimate.clean, exact.clean)
    assert torch.equal(estimate.corrupted, exact.corrupted)


def test_top_finds_the_copying_head():
    strongest = attribute(copy_toy(), site="attn.z", axes=("layer", "head"), **HEARD).top(1)[0]
    assert (strongest.layer, strongest.head, strongest.effect) == (2, 1, 1.0)


def test_a_pickle_holds_the_estimates_and_not_what_was_asked():
    asked = {**HEARD, "metric": lambda logits: logits[:, -1, 1]}  # which no pickle takes
    toy = copy_toy()
    found = attribute(toy, site="attn.z", axes=("layer", "head"), **asked)
    kept = pickle.loads(pickle.dumps(found))
    assert torch.equal(kept.values, found.values) and kept.meta == found.meta
    with pytest.raises(ValueError, match="before it is pickled"):
        kept.confirm(toy)


# -------------------------------------------------------------------------------- the cells


@pytest.fixture(params=tiny.FAMILIES)
def case(request) -> tuple:
    """A model and the arguments all its attributions share."""
    clean, corrupted = pair(request.param)
    shared = {"clean": clean, "corrupted": corrupted, "metric": mixed_logits}
    return MODELS[request.param], shared


def test_a_run_patched_into_itself_changes_nothing(case):
    model, shared = case
    same = {**shared, "corrupted": shared["clean"]}
    for site in ("encoder.attn.attn_scores", "decoder.resid_pre"):
        assert change(attribute(model, site=site, axes="layer", **same)).abs().max() == 0


def test_what_is_no_axis_is_summed(case):
    model, shared = case
    by_head = attribute(model, site="encoder.attn.z", axes=("layer", "head"), **shared)
    for axes, dim in (("layer", 2), ("head", 1)):
        summed = attribute(model, site="encoder.attn.z", axes=axes, **shared)
        assert torch.allclose(change(summed), change(by_head).sum(dim), rtol=1e-9)


def test_layers_in_windows_are_summed(case):
    model, shared = case
    single = change(attribute(model, site="decoder.mlp_out", axes="layer", **shared))
    paired = attribute(model, site="decoder.mlp_out", axes="layer", layer_window=2, **shared)
    assert paired.coords["layer"] == [0, 1]
    assert torch.allclose(change(paired), single[:, :-1] + single[:, 1:], rtol=1e-9)


def test_windows_that_a_stimulus_lacks_are_nan(case):
    """As in a sweep: the second clip of the first prompt, and the end of shorter clips."""
    model, shared = case
    estimate = attribute(model, site="encoder.resid_pre", windows=0.5, layers=[0], **shared)
    exact = patching.sweep(
        model, site="encoder.resid_pre", windows=0.5, layers=[0], progress=False, **shared
    )
    assert torch.equal(estimate.values.isnan(), exact.values.isnan())


def test_several_metrics_each_have_their_own_backward(case):
    model, shared = case
    several = {"mixed": mixed_logits, "answer": metrics.log_prob(7)}
    together = attribute(
        model, site="decoder.attn.z", axes="layer", **{**shared, "metric": several}
    )
    assert together.dims == ("metric", "stimulus", "layer")
    for i, metric in enumerate(several.values()):
        alone = attribute(
            model, site="decoder.attn.z", axes="layer", **{**shared, "metric": metric}
        )
        assert torch.allclose(together.values[i], alone.values, rtol=1e-9)


def test_a_scalar_metric_sums_what_its_rows_do(case):
    model, shared = case
    options = {"site": "encoder.resid_pre", "axes": "layer"}
    rows = attribute(model, **options, **shared)
    total = attribute(
        model, **options, **{**shared, "metric": lambda logits: mixed_logits(logits).mean()}
    )
    assert total.dims == ("layer",)
    assert torch.allclose(change(total), change(rows).mean(0), rtol=1e-9)


@pytest.mark.parametrize("method", ["atp", "ig", "atp*"])
def test_half_precision_is_summed_in_float32(method):
    """And agrees with a float64 model as well as eight bits allow."""
    shared = {"site": "decoder.attn.q", "axes": "layer", "metric": metrics.log_prob(7)}
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        model = HookedAudioTransformer.from_hf(tiny.tiny_hf("qwen2_audio", dtype=dtype))
        clean, corrupted = pair("qwen2_audio")
        inputs = {"clean": clean, "corrupted": corrupted}
        found.append(attribute(model, method=method, **inputs, **shared))
    assert found[0].values.dtype == torch.float32
    rough, fine = (change(result).double() for result in found)
    assert (rough - fine).abs().max() < 0.2 * fine.abs().max()


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize(("family", "name"), EVERY_SITE)
def test_reading_few_positions_changes_nothing(family, name):
    """Metrics that say what they read spare the last block work, and no estimate notices."""
    model = MODELS[family]
    clean, corrupted = pair(family)
    site = patching.Site.parse(name, model)
    named = {"answer": metrics.log_prob(7), "early": metrics.logit_diff(9, 11, position=-2)}
    whole = {
        key: lambda logits, metric=metric: metric.bind(model, corrupted)(logits)
        for key, metric in named.items()
    }
    shared = {"clean": clean, "corrupted": corrupted, "site": name}
    shared |= {"axes": "layer" if site.n_layers else "position"}
    few, many = (attribute(model, metric=metric, **shared) for metric in (named, whole))
    for one, other in zip(
        (few.values, few.clean, few.corrupted),
        (many.values, many.clean, many.corrupted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_edited_logits_are_what_the_metric_reads(case):
    model, shared = case
    options = {"site": "decoder.attn.z", "axes": "layer", **shared, "metric": metrics.log_prob(7)}
    with model.hooks([("hook_logits", lambda logits, hook: 2 * logits)]):
        hooked = attribute(model, **options)
        exact = patching.sweep(model, progress=False, **options)
    assert torch.allclose(hooked.clean, exact.clean)
    assert (hooked.clean - attribute(model, **options).clean).abs().min() > 1e-6


# -------------------------------------------------------------------------------- the work


def counted(model, part: str) -> tuple[list, list]:
    """Hooks that note every forward of a block, and the notes."""
    notes: list = []
    handle = getattr(model, part).blocks[1].register_forward_hook(lambda *_: notes.append(part))
    return notes, handle


def test_two_forwards_and_one_backward(case, monkeypatch):
    """However many cells and sites."""
    model, shared = case
    backwards = []
    plain = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *a, **k: (backwards.append(1), plain(*a, **k))
    )
    notes, handles = zip(*(counted(model, part) for part in ("encoder", "decoder")), strict=True)
    several = ["decoder.resid_pre", "decoder.resid_mid", "decoder.mlp_out"]
    found = attribute(model, site=several, axes=("layer", "position"), **shared)
    for handle in handles:
        handle.remove()
    assert [len(n) for n in notes] == [2, 2] and len(backwards) == 1
    assert list(found) == several
    alone = attribute(model, site="decoder.resid_mid", axes=("layer", "position"), **shared)
    values = (found["decoder.resid_mid"].values, alone.values)
    torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


def test_the_encoder_runs_without_gradients_for_decoder_sites(case):
    model, shared = case
    tracked = []
    handle = model.encoder.blocks[0].register_forward_hook(
        lambda module, args, out: tracked.append(out.requires_grad)
    )
    attribute(model, site="decoder.resid_mid", axes="layer", method="ig", steps=3, **shared)
    handle.remove()
    assert tracked == [False, False]


def test_the_model_is_left_as_it_was(case):
    model, shared = case
    name, parameter = next(iter(model.named_parameters()))
    parameter.requires_grad_(True)
    with torch.no_grad():
        attribute(model, site="decoder.attn.q", axes="layer", method="qk_fix", **shared)
    with pytest.raises(ValueError, match="gradient"):
        attribute(
            model, axes="position", **{**shared, "metric": lambda x: x.argmax(-1)[:, 0].double()}
        )
    assert parameter.requires_grad and parameter.grad is None, name
    assert not model.list_hooks() and model.attn_mode == "auto"
    parameter.requires_grad_(False)


@pytest.mark.parametrize("name", ["decoder.blocks.1.hook_mlp_out", "blocks.1.attn.hook_pattern"])
def test_hooks_of_the_user_are_in_force(case, name):
    """An edit of one's own takes part in both runs and in the gradient, in place too."""
    model, shared = case
    options = {"site": "decoder.mlp_out", "axes": "layer", **shared}

    def halved(x, hook):
        return 0.5 * x

    def halve(x, hook):
        x *= 0.5

    with model.hooks([(name, halved)]):
        hooked = attribute(model, **options)
    with model.hooks([(name, halve)]):
        in_place = attribute(model, **options)
    assert name in hooked.report[-1]
    assert torch.allclose(in_place.values, hooked.values, rtol=1e-9)
    assert (hooked.values - attribute(model, **options).values).abs().max() > 1e-6


def test_an_estimate_says_so_when_saved(case, tmp_path):
    model, shared = case
    estimate = attribute(model, site="decoder.attn.z", axes=("layer", "head"), **shared)
    loaded = patching.load(estimate.save(tmp_path / "map.nc"))
    assert loaded.meta["method"] == estimate.method == "atp"
    assert "estimates" in loaded.report[0] and "confirm" in loaded.report[0]
    assert torch.equal(loaded.values, estimate.values)
    assert estimate.to_xarray().sizes["head"] == model.cfg.decoder.n_heads


# -------------------------------------------------------------------------------- queries and keys

QUERIES_AND_KEYS = [
    (family, name) for family, name in EVERY_SITE if name.endswith(("_q", "_k", ".q", ".k"))
]


def test_closed_forms_are_the_softmax():
    """A row in which one score moves, in saturated rows too, against softmax itself."""
    generator = torch.Generator().manual_seed(0)

    def drawn(spread):
        return spread * torch.randn(60, 7, 9, generator=generator, dtype=torch.float64)

    gradient = drawn(1.0)
    for scores, shift in ((drawn(2.0), drawn(1.0)), (drawn(40.0), drawn(60.0))):
        scores = scores.masked_fill(torch.ones(7, 9).triu(1).bool(), -torch.inf)
        p = scores.softmax(-1)
        for key in range(9):
            alone = shift * (torch.arange(9) == key)
            direct = (((scores + alone).softmax(-1) - p) * gradient).sum((-1, -2))
            found = key_effects(scores, shift, gradient)[:, key]
            assert torch.allclose(found, direct, atol=1e-12)
        direct = (((scores + shift).softmax(-1) - p) * gradient).sum(-1)
        assert torch.allclose(query_effects(scores, shift, gradient), direct, atol=1e-12)


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(("family", "name"), QUERIES_AND_KEYS)
def test_qk_fix_is_the_patched_pattern_times_its_gradient(family, name):
    """Grouped, rotated, padded, causal and cross: as if each query or key had been patched."""
    model = MODELS[family]
    clean, corrupted = pair(family)
    site = patching.Site.parse(name, model)
    point, pattern = site.hook_name(1), site.hook_name(1).rpartition("hook_")[0] + "hook_pattern"
    estimate = attribute(
        model,
        clean=clean,
        corrupted=corrupted,
        site=name,
        axes=("layer", "head", "position"),
        layers=[1],
        metric=mixed_logits,
        method="qk_fix",
    )
    _, source = model.run_with_cache(clean, names_filter=point)
    kept = {}

    def grow(p, hook):
        kept["p"] = p.detach().requires_grad_()
        return kept["p"]

    value = mixed_logits(model.run_with_hooks(corrupted, fwd_hooks=[(pattern, grow)])).sum()
    (gradient,) = torch.autograd.grad(value, kept["p"])
    n_heads, positions = len(estimate.coords["head"]), estimate.coords["position"]
    for head, i in ((0, 1), (n_heads - 1, len(positions) // 2), (1, len(positions) - 1)):

        def patch(x, hook, head=head, position=positions[i]):
            x[:, position, head] = source[point][:, position, head]

        def keep(p, hook):
            kept["patched"] = p.detach()

        with torch.no_grad():
            model.run_with_hooks(corrupted, fwd_hooks=[(point, patch), (pattern, keep)])
        per_entry = ((kept["patched"] - kept["p"].detach()) * gradient).flatten(1).sum(1)
        owner = torch.arange(2).repeat_interleave(torch.tensor([len(per_entry) - 1, 1]))
        expected = torch.zeros(2, dtype=torch.float64).index_add(0, owner, per_entry)
        found = change(estimate)[:, 0, head, i]
        there = found.isfinite()
        assert torch.allclose(found[there], expected[there], rtol=1e-5, atol=1e-5)


SATURATED = {
    "q": {"clean": prompt(Cue(1)), "corrupted": not_asking(prompt(Cue(1)))},
    "k": {"clean": prompt(Cue(1)), "corrupted": prompt(Cue(1, loud=0.0))},
}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("side", ["q", "k"])
def test_saturated_attention_needs_the_qk_fix(side, direction):
    """METHODS toy C: patching a query or key moves everything, and its gradient is nothing."""
    toy, position = saturated_toy(), {"q": AUDIO_TOKENS + 1, "k": 6}[side]
    options = {**SATURATED[side], "metric": metrics.logit_diff(1, 3), "direction": direction}
    options |= {"site": f"attn.{side}", "axes": ("layer", "head", "position")}
    exact = patching.sweep(toy, progress=False, **options).effect
    assert exact[1, 1, position] == pytest.approx(1.0)
    atp, fixed = (attribute(toy, method=method, **options).effect for method in ("atp", "qk_fix"))
    assert atp.abs().max() < 1e-10
    assert torch.allclose(fixed, exact, atol=1e-4)


# -------------------------------------------------------------------------------- dropped gradients


def test_cancelling_paths_need_dropped_gradients():
    """METHODS toy D: 0.8 of the effect is left, the gradient is exactly 0."""
    n_layers, writer = 5, 1
    toy = cancelling_toy(n_layers, writer)
    options = {
        "clean": prompt(Cue(0)),
        "corrupted": prompt(Cue(1)),
        "metric": lambda logits: logits[:, -1, 1],
        "direction": "noise",
        "site": "attn.z",
        "axes": ("layer", "head"),
    }
    exact = patching.sweep(toy, progress=False, **options)
    assert change(exact)[writer, 0] == pytest.approx(0.8)
    assert change(attribute(toy, **options)).abs().max() == 0
    for method in ("grad_drop", "atp*"):
        estimate = attribute(toy, method=method, **options)
        assert change(estimate)[writer, 0] == pytest.approx(1 / (n_layers - 1))
        assert not estimate.is_signed and "magnitudes" in estimate.report[1]


@pytest.mark.parametrize("site", ["decoder.attn.z", "encoder.mlp_out"])
def test_dropped_gradients_are_runs_with_constant_layers(case, site):
    """A layer whose outputs are constants passes nothing back; other layers are averaged."""
    model, shared = case
    site = patching.Site.parse(site, model)
    estimate = attribute(model, site=str(site), axes="layer", method="grad_drop", **shared)
    blocks = [(part, layer) for part in ("encoder", "decoder") for layer in range(3)]
    blocks = [block for block in blocks if block[0] in (site.part, "decoder")]
    total = torch.zeros(2, 3, dtype=torch.float64)
    for part, dropped in blocks:
        names = [f"{part}.blocks.{dropped}.hook_{x}_out" for x in ("attn", "cross_attn", "mlp")]
        constant = [(n, lambda x, hook: x.detach()) for n in names if n in model.hook_dict]
        with model.hooks(constant):
            alone = attribute(model, site=str(site), axes="layer", **shared)
        others = [layer for layer in range(3) if (site.part, layer) != (part, dropped)]
        total[:, others] += change(alone)[:, others].abs()
    assert torch.allclose(change(estimate).abs(), total / (len(blocks) - 1), rtol=1e-6)
    assert (estimate.effect >= 0).all()


def test_star_fixes_queries_and_keys_and_drops_gradients(case):
    model, shared = case
    for site, alone in (("decoder.attn.k", "qk_fix"), ("decoder.attn.v", "atp")):
        star = attribute(model, site=site, axes="layer", method="atp*", **shared)
        drop = attribute(model, site=site, axes="layer", method="grad_drop", **shared)
        assert torch.equal(star.values, drop.values) == (alone == "atp")


# -------------------------------------------------------------------------------- integrated


def kinked_toy():
    """relu(2 x - 0.7) of the copied class: flat at 0, steep at 1, one kink between."""
    toy, x = copy_toy(), ANSWER.start + 1
    toy.neuron(3, 0, {x: 2.0, QUERY: -0.7}, {QUERY: 1.0}, {x: 1.0})
    return toy


def test_integrated_gradients_close_the_gap_over_a_kink():
    toy = kinked_toy()
    options = {**HEARD, "metric": lambda logits: logits[:, -1, 1]}
    options |= {"site": "connector.out", "axes": "time", "windows": [(0.2, 0.3)]}
    exact = patching.sweep(toy, progress=False, **options)
    gaps, off = [], []
    for steps in (1, 5, 25):
        estimate = attribute(toy, method="ig", steps=steps, **options)
        assert estimate.meta["steps"] == str(steps)
        gaps.append(float(estimate.meta["unexplained"]))
        off.append((estimate.values - exact.values).abs().item())
    assert gaps[-1] < 0.02 < gaps[0] and off[-1] < 0.05 < off[0]
    assert (attribute(toy, **options).values - exact.values).abs() > 1


@pytest.mark.parametrize("site", ["encoder.resid_pre", "decoder.resid_pre"])
def test_inputs_explain_the_change(case, site):
    """Entrances of both parts together, in real blocks: the gap falls with steps squared."""
    model, shared = case
    options = {"site": site, "axes": "layer", "layers": [0], "method": "ig", **shared}
    coarse, fine = (attribute(model, steps=steps, **options) for steps in (4, 20))
    missing = float(fine.meta["unexplained"])
    assert missing < 0.1 * float(coarse.meta["unexplained"])
    assert "% of the metric's change unexplained" in fine.report[1]
    if site == "encoder.resid_pre":  # where audio enters: its cells are all there is to explain
        assert (fine.recovery - 1).abs().max().item() == pytest.approx(missing, rel=0.01)


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"site": []}, ValueError, "at least one|one site"),
        ({"site": ["resid_pre", "decoder.resid_pre"]}, ValueError, "once"),
        ({"site": "resid_pree"}, SiteError, "nearest names"),
        ({"axes": ("head",)}, SiteError, "choose one or more"),
        ({"direction": "both"}, WRONG_VALUE, "direction"),
        ({"method": "exact"}, WRONG_VALUE, "method"),
        ({"steps": 4}, ValueError, "steps belong to method 'ig'"),
        ({"method": "ig", "steps": 0}, ValueError, "of 1 to"),
        ({"method": "qk_fix"}, ValueError, "queries and keys, not decoder.resid_pre"),
        ({"method": "grad_drop", "axes": "position"}, ValueError, "'layer' among the axes"),
        ({"method": "atp*", "layer_window": 2}, ValueError, "without layer_window"),
        ({"metric": lambda x: x[:, -1].argmax(-1).double()}, ValueError, "no gradient"),
        ({"metric": metrics.kl(), "direction": "noise"}, ValueError, "flat"),
        ({"metric": lambda x: x[:, -1, 1].relu()}, ValueError, "flat at the base run"),
        ({"metric": lambda x: x[:, -1, 1] * torch.nan}, ValueError, "not finite"),
        ({"metric": lambda x: x[:, -1, 1] - x[:, -1, 1].mean()}, ValueError, "mixes rows"),
        ({"metric": lambda x: x}, ValueError, "scalar or one value per row"),
    ],
)
def test_what_cannot_work_is_refused(options, error, says):
    pair = {"clean": prompt(Cue(1)).repeat(2), "corrupted": prompt(Cue(3)).repeat(2)}
    shared = {**pair, "metric": metrics.logit_diff(1, 3), "axes": "layer"}
    with pytest.raises(error, match=says):
        attribute(two_stream_toy(2.0, 1.0), **{**shared, **options})


def test_one_layer_leaves_nothing_to_drop():
    with pytest.raises(ValueError, match="two layers"):
        attribute(Toy(1), site="attn.z", axes="layer", method="grad_drop", **HEARD)


def test_the_qk_fix_refuses_edited_patterns(case):
    model, shared = case
    model.add_hook("decoder.blocks.1.attn.hook_pattern", lambda p, hook: p * 0.9)
    with pytest.raises(ValueError, match="without your hooks"):
        attribute(model, site="decoder.attn.q", axes="layer", method="qk_fix", **shared)
    model.reset_hooks()
