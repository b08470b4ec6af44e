"""Attribution patching of every family: equal to gradients of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subjects import SITES, all_logits, pair, tiny_model
from torch import Tensor

from audio_lens import metrics
from audio_lens.patching import Site, attribute
from families import FAMILIES

LAYER = 1
BESIDE = [name for name in FAMILIES if tiny_model(name).written_beside(None)]
OF_PLAIN_ATTENTION = [
    name for name in FAMILIES if name not in ("granite_speech", "beats", "kimi_audio")
]
QUERIES_AND_KEYS = [
    (name, str(site))
    for name, site in SITES
    if site.last in ("q", "k") and site.part == "encoder" and name in OF_PLAIN_ATTENTION
]


def gradients(name: str, base: dict, points: list[str]) -> dict[str, Tensor]:
    """Of every row's metric, by the activations at these points: ``rows *shape`` each."""
    model, kept = tiny_model(name), {}

    def keep(x, hook):
        kept[hook.name] = x if x.requires_grad else x.detach().requires_grad_()
        return kept[hook.name]

    logits = model.run_with_hooks(base, fwd_hooks=[(point, keep) for point in points])
    values = metrics.bound(metric_of(name), model, model.as_inputs(base))(logits)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    rows = [torch.autograd.grad(value, list(kept.values()), **options) for value in values]
    return dict(zip(kept, map(torch.stack, zip(*rows, strict=True)), strict=True))


def metric_of(name: str) -> Any:
    """Of everything; of models that write beside their decoder, of the text at a position."""
    if name not in BESIDE:
        return all_logits
    return metrics.of_stream("text", metrics.read_at(all_logits, position=-2))


def summed(product: Tensor, site: Site) -> Tensor:
    """By position, over everything else."""
    return product.movedim(site.position_dim, 0).flatten(1).sum(1)


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_is_gradient_times_difference(name, part):
    """Sites of one block on one part's positions, each position by itself."""
    model = tiny_model(name)
    sites = [site for of, site in SITES if of == name and site.part == site.positions_of == part]
    if not sites:
        pytest.skip(f"{name} has no {part}")
    runs = pair(name, same_text=False)
    points = {site: site.hook_name(LAYER) for site in sites}
    with model.attention("explicit"):
        estimates = attribute(
            model,
            site=[str(site) for site in sites],
            axes=("layer", "position"),
            layers=[LAYER],
            metric=metric_of(name),
            **runs,
        )
        _, source = model.run_with_cache(runs["clean"], names_filter=list(points.values()))
        _, base = model.run_with_cache(runs["corrupted"], names_filter=list(points.values()))
        slopes = gradients(name, runs["corrupted"], list(points.values()))
    for site, point in points.items():
        found = estimates[str(site)]
        apart = (source[point] - base[point]).masked_fill(source[point] == base[point], 0)
        expected = torch.stack([summed(slope * apart, site) for slope in slopes[point]])
        expected = expected[:, found.coords["position"]].reshape(found.values[..., 0, :].shape)
        effects = found.values[..., 0, :] - found.corrupted[..., None]
        there = effects.isfinite()
        gap = (effects - expected.detach())[there].abs().max()
        assert gap <= 1e-9 * expected.abs().sum(), site


@pytest.mark.mostly_slow(8)
@pytest.mark.parametrize(("name", "site"), QUERIES_AND_KEYS)
def test_qk_fix_is_the_patched_pattern_times_its_gradient(name, site):
    """Whatever is added to the scores, as if each query or key had been patched by itself."""
    model, runs = tiny_model(name), pair(name)
    place = Site.parse(site, model)
    point = place.hook_name(LAYER)
    pattern = point.rpartition("hook_")[0] + "hook_pattern"
    estimate = attribute(
        model,
        site=site,
        axes=("layer", "head", "position"),
        layers=[LAYER],
        metric=lambda logits: all_logits(logits).sum(),
        method="qk_fix",
        **runs,
    )
    slope = gradients(name, runs["corrupted"], [pattern])[pattern].sum(0)
    _, base = model.run_with_cache(runs["corrupted"], names_filter=pattern)
    _, source = model.run_with_cache(runs["clean"], names_filter=point)
    positions, n_heads = estimate.coords["position"], len(estimate.coords["head"])
    for head, i in ((0, 1), (1, len(positions) // 2), (n_heads - 1, len(positions) - 1)):

        def overwrite(x, hook, head=head, position=positions[i]):
            x[:, position, head] = source[point][:, position, head]

        with torch.no_grad(), model.hooks([(point, overwrite)]):
            _, patched = model.run_with_cache(runs["corrupted"], names_filter=pattern)
        expected = ((patched[pattern] - base[pattern]) * slope).sum()
        found = estimate.values[0, head, i] - estimate.corrupted
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("name", [*BESIDE, "moshi"])
@pytest.mark.parametrize("method", ["ig", "grad_drop"])
def test_other_methods_reach_through_models_that_speak(name, method):
    """Integrated gradients explain the change; dropped layers are those of the parts they pass."""
    options = {"steps": 64} if method == "ig" else {}
    found = attribute(
        tiny_model(name),
        site="decoder.resid_pre",
        axes=("layer", "position"),
        metric=metric_of(name),
        method=method,
        **options,
        **pair(name, same_text=False),
    )
    assert found.effect.nan_to_num().abs().max() > 1e-6
    if method == "ig":
        assert float(found.meta["unexplained"]) < 1e-2


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_written_beside_the_decoder_is_refused(name):
    model, asked = tiny_model(name), pair(name)
    with pytest.raises(ValueError, match=r"through the speaker .* read the text alone"):
        attribute(model, site="decoder.mlp_out", metric=all_logits, **asked)
    asked |= {"site": "decoder.mlp_out", "metric": metric_of(name)}
    for point in ("hook_logits", "speaker.blocks.0.hook_mlp_out"):
        model.add_hook(point, lambda x, hook: x)
        with pytest.raises(ValueError, match=point):
            attribute(model, **asked)
        model.reset_hooks()


@pytest.mark.parametrize(("name", "site"), [("moshi", "depth.z"), ("kimi_audio", "speaker.z")])
def test_stacks_that_speak_are_refused(name, site):
    with pytest.raises(ValueError, match=f"does not reach into {site.partition('.')[0]}"):
        attribute(tiny_model(name), site=site, metric=all_logits, **pair(name))
