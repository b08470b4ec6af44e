"""Activations given as source are of the shape that their site has, in every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from audio_lens import patching
from audio_lens.inputs import InputError
from audio_lens.patching import Patch, Site
from audio_lens.shapes import shape_of
from families import FAMILIES
from patching.subjects import SITES, all_logits, batch, layouts_of, pair, tiny_model

SWEPT = [
    "decoder.resid_pre",
    "decoder.attn.z",
    "decoder.attn.pattern",
    "decoder.mlp.post",
    "encoder.attn.k",
    "encoder.mlp_out",
    "connector.in",
    "connector.out",
    "whisper decoder.cross_attn.k",
    "whisper decoder.cross_attn.pattern",
]


@pytest.mark.mostly_slow(3)
@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_are_those_of_a_run(name):
    model, sites = tiny_model(name), [site for of, site in SITES if of == name]
    points = {site: site.hook_name(None if site.n_layers is None else 1) for site in sites}
    for layout in layouts_of(name):
        made, kept = batch(name, 0, layout), {}

        def keep(x, hook, kept=kept):
            kept[hook.name] = x.shape

        with model.attention("explicit"):
            model.run_with_hooks(made, fwd_hooks=[(point, keep) for point in points.values()])
        timeline = model.timeline(made)
        for site, point in points.items():
            expected = shape_of(model, site, timeline)
            assert expected[0] is not None and len(expected) == len(kept[point]), site
            sizes = zip(expected, kept[point], strict=True)
            assert all(n in (None, size) for n, size in sizes), (layout, site)


def asked(text: str) -> tuple[str, dict[str, Any]]:
    """A family, and a sweep of a site of it from activations, each as it should be."""
    name, _, site = text.rpartition(" ")
    name = name or "qwen2_audio"
    model, runs = tiny_model(name), pair(name)
    place = Site.parse(site, model)
    layer = None if place.n_layers is None else 1
    with model.attention("explicit"):
        _, cache = model.run_with_cache(runs["clean"], names_filter=place.hook_name(layer))
    source = {key: cache[key] for key in cache.keys()}  # noqa: SIM118
    options = {"site": site, "axes": "position", "layers": layer, "metric": all_logits}
    return name, {**runs, **options, "source": source}


@pytest.mark.parametrize("text", SWEPT)
def test_activations_of_another_shape_are_refused_before_anything_runs(text):
    name, options = asked(text)
    model, source = tiny_model(name), options.pop("source")
    ((point, held),) = source.items()
    patching.plan(model, **options, source=source)
    wrong = [torch.cat([held, held[:1]]), held[:1], held[0]]
    wrong += [held.narrow(axis, 0, held.shape[axis] - 1) for axis in range(1, held.ndim)]
    if text == "connector.in":  # its width is known in a run only
        wrong.pop()
    for one in wrong:
        with pytest.raises(InputError, match=rf"the source of {point} has shape .*equal shapes"):
            patching.plan(model, **options, source={point: one})
    for one in (0.0, np.zeros(held.shape), None):
        with pytest.raises(InputError, match=f"the source of {point} is a "):
            patching.plan(model, **options, source={point: one})


@pytest.mark.parametrize("is_hooked", [False, True])
@pytest.mark.parametrize("n", [1, 5, 33])
def test_what_enters_a_connector_at_another_width_is_refused(n, is_hooked):
    name, options = asked("connector.in")
    ((point, held),) = options.pop("source").items()
    source = {point: held[..., :1].repeat(1, 1, n)}
    hooks = [("encoder.hook_embed", lambda x, hook: x)] if is_hooked else []
    with tiny_model(name).hooks(hooks), pytest.raises(InputError, match="equal shapes"):
        patching.sweep(tiny_model(name), **options, source=source)


@pytest.mark.parametrize("text", SWEPT)
def test_a_patch_refuses_them_too(text):
    name, options = asked(text)
    ((point, held),) = options["source"].items()
    for one in (torch.cat([held, held[:1]]), held[..., :-1]):
        patches = [Patch(options["site"], options["layers"], source={point: one})]
        with pytest.raises(InputError, match="shape"), torch.no_grad():
            patching.patch(tiny_model(name), options["corrupted"], patches)
