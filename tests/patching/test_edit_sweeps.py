"""Sweeps of edits equal one whole forward with the edit in force, cell by cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subjects import SITES, all_logits, batch, tiny_model

from audio_lens import Edit, InputError, edits, intervene, metrics, patching
from audio_lens.sites import Site, SiteError

QUICK = SITES[3::120]
CASES = [
    pytest.param(name, site, id=f"{name}: {site}", marks=[] if (name, site) in QUICK else slow)
    for slow in [[pytest.mark.slow]]
    for name, site in SITES
]


def dos_of(model: Any, site: Site) -> list[edits.Do]:
    if site.last == "attn_scores":
        return [edits.Scale(0.5), edits.Multiply(0.4, "all")]
    if site.last == "pattern":
        return [edits.Put(0.0), edits.Scale(2.0)]
    basis = None if site.unit == "neuron" else edits.Add(0.7)
    return [edits.Scale(-0.5), edits.Put("mean"), *([basis] if basis else [])]


def places_of(model: Any, inputs: Any, site: Site) -> dict[str, torch.Tensor]:
    valid = model.timeline(inputs).mask(site.positions_of)
    later = valid & (valid.cumsum(1) > valid.sum(1, keepdim=True) // 2)
    return {"later": later, "earlier": valid & ~later, "none of one row": _but_first_row(later)}


def _but_first_row(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    if len(mask) > 1:
        mask[0] = False
    return mask


@pytest.mark.parametrize(("name", "site"), CASES)
def test_groups_of_edits_equal_whole_forwards(name: str, site: Site) -> None:
    model = tiny_model(name)
    inputs = model.as_inputs(batch(name, 0))
    groups = places_of(model, inputs, site)
    axes = ["group"] if site.n_layers is None else ["layer", "group"]
    unit = [site.unit] if site.unit == "head" else []
    for do in dos_of(model, site):
        result = patching.ablate(
            model, inputs, site=str(site), axes=[*axes, *unit], value=do, metric=all_logits,
            groups=groups, verify=2,
        )  # fmt: skip
        for cell in torch.randperm(len(result.cells()), generator=torch.Generator().manual_seed(1))[
            :3
        ]:
            place = result.cells()[int(cell)]
            layer = {} if place.layer is None else {"layer": place.layer}
            head = {} if place.head is None else {"head": place.head}
            edit = Edit(str(site), do, where=groups[place.group], **layer, **head)
            with torch.no_grad():
                whole = all_logits(_edited(model, inputs, edit))
            found = result.select(group=place.group, **layer, **head).values.reshape(whole.shape)
            known = ~found.isnan()
            torch.testing.assert_close(found[known], whole[known], rtol=1e-10, atol=1e-10)
            assert known.any()


def _edited(model: Any, inputs: Any, edit: Edit) -> torch.Tensor:
    """Of an edit whose place may be empty in a row."""
    where = edit.where
    if bool(where.any(1).all()):
        with intervene(model, edit):
            return model(inputs)
    filled = where.clone()
    filled[~where.any(1), -1] = True
    with intervene(model, Edit(edit.site, edit.do, edit.layer, edit.head, where=filled)):
        changed = model(inputs)
    plain = model(inputs)
    rows = (
        where.any(1) if len(where) == len(changed) else torch.ones(len(changed), dtype=torch.bool)
    )
    return torch.where(rows.reshape(-1, *[1] * (changed.ndim - 1)), changed, plain)


METRIC = metrics.logit_diff("two", "seven")


@pytest.fixture(scope="module")
def inputs(embedded):
    noise = torch.randn(24_000, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    return embedded.prepare([noise[:16_000], noise], "Which digit is second?", 16_000)


def test_a_knock_out_by_layer_is_one_sweep(embedded, inputs) -> None:
    result = patching.ablate(
        embedded, inputs, site="decoder.attn.attn_scores", axes="layer",
        value=edits.Block("audio"), where="last", metric=METRIC, verify=3,
    )  # fmt: skip
    for layer in range(6):
        edit = Edit("decoder.attn.attn_scores", edits.Block("audio"), layer=layer, where="last")
        expected = patching.run(embedded, inputs, edit, METRIC)
        torch.testing.assert_close(
            result.select(layer=layer).values.to(expected), expected, rtol=1e-3, atol=1e-3
        )
    assert result.direction == "edit"
    change = result.values - result.clean[:, None]
    torch.testing.assert_close(result.change, change)
    top = result.top(1)[0]
    assert abs(top.change) == pytest.approx(float(change.mean(0).abs().max()), rel=1e-4)


def test_windows_of_layers_are_edited_one_after_the_other(embedded, inputs) -> None:
    result = patching.ablate(
        embedded, inputs, site="decoder.resid_pre", axes="layer", layer_window=2,
        value=edits.Scale(0.5), where="last", metric=METRIC, verify=2,
    )  # fmt: skip
    edit = Edit("decoder.resid_pre", edits.Scale(0.5), layer=[2, 3], where="last")
    expected = patching.run(embedded, inputs, edit, METRIC)
    torch.testing.assert_close(
        result.select(layer=2).values.to(expected), expected, rtol=1e-3, atol=1e-3
    )


def test_ablations_plot_save_and_come_back(embedded, inputs, tmp_path) -> None:
    result = patching.ablate(
        embedded, inputs, site="decoder.attn.z", axes=("layer", "group"), metric=METRIC,
        groups={"audio": "audio", "last": "last"},
    )  # fmt: skip
    assert "change" in result.plot().data[0].hovertemplate
    again = patching.load(result.save(tmp_path / "map.nc"))
    assert again.direction == "edit"
    assert again.coords["group"] == ["audio", "last"]
    torch.testing.assert_close(again.change, result.change)
    assert not any("alike" in note for note in result.report)


def test_rerun_makes_a_map_of_edits_again(embedded, inputs) -> None:
    result = patching.ablate(
        embedded, inputs, site="decoder.attn.attn_scores", axes="layer", layers=[2, 3],
        value=edits.Block("audio"), where="last", metric=METRIC,
    )  # fmt: skip
    again = patching.rerun(result, embedded, clean=inputs, corrupted=inputs)
    assert again.agrees


@pytest.mark.parametrize("source", ["a vector", "a basis", "an affine map", "inputs"])
def test_maps_of_tensors_are_made_again_from_their_file(embedded, inputs, tmp_path, source) -> None:
    width = embedded.cfg.need_decoder.d_model
    vector = torch.randn(width, generator=torch.Generator().manual_seed(3))
    backwards = [clip[::-1].copy() for clip in inputs.audio]
    do = {
        "a vector": edits.Put(0.1 * vector),
        "a basis": edits.Project(vector[:, None]),
        "an affine map": edits.Erase(vector[:, None], vector[:, None] / width, vector),
        "inputs": edits.Mix(inputs.with_audio(backwards, 16_000)),
    }[source]
    where = torch.zeros(inputs.tokens.shape, dtype=torch.bool)
    where[:, -3:] = True
    arguments = {"site": "decoder.resid_pre", "axes": ("layer", "group"), "layers": [1, 4]}
    groups = {"all": where, "last": "last"}
    result = patching.ablate(
        embedded, inputs, value=do, metric=METRIC, groups=groups, where=where, **arguments
    )
    saved = patching.load(result.save(tmp_path / "map.nc"))
    assert patching.rerun(saved, embedded, clean=inputs, corrupted=inputs).agrees


def test_what_no_file_holds_is_named(embedded, inputs) -> None:
    class Same(torch.nn.Module):
        def encode(self, x: Any) -> Any:
            return x

        def decode(self, latents: Any) -> Any:
            return latents

    do = edits.Latents(Same(), torch.relu)
    result = patching.ablate(
        embedded, inputs, site="decoder.resid_pre", axes="layer", layers=[2], value=do,
        metric=METRIC,
    )  # fmt: skip
    with pytest.raises(patching.RerunError, match="do of this map was your own"):
        patching.rerun(result, embedded, clean=inputs, corrupted=inputs)


def test_edits_in_force_are_recorded_and_made_again(embedded, inputs, tmp_path) -> None:
    """With a tensor; outside of `intervene`, from the file."""
    width = embedded.cfg.need_decoder.d_model
    vector = 3 * torch.randn(width, generator=torch.Generator().manual_seed(3))
    given = [
        Edit("decoder.resid_post", edits.Add(vector), layer=0),
        Edit("decoder.attn.attn_scores", edits.Block("audio"), layer=[3, 4], where="last"),
    ]
    arguments = {"site": "decoder.attn_out", "axes": "layer", "layers": [1, 5], "metric": METRIC}
    plain = patching.ablate(embedded, inputs, **arguments)
    with intervene(embedded, *given):
        result = patching.ablate(embedded, inputs, **arguments)
    assert not torch.allclose(plain.values, result.values)
    saved = patching.load(result.save(tmp_path / "map.nc"))
    again = patching.rerun(saved, embedded, clean=inputs, corrupted=inputs)
    assert again.agrees
    assert not list(embedded.list_hooks(dir="fwd"))
    with intervene(embedded, *given):
        assert patching.rerun(saved, embedded, clean=inputs, corrupted=inputs).agrees
    with (
        intervene(embedded, given[1], Edit("decoder.resid_post", edits.Scale(2), layer=0)),
        pytest.raises(patching.RerunError, match="hooks"),
    ):
        embedded(inputs)
        patching.rerun(saved, embedded, clean=inputs, corrupted=inputs)


def test_attributions_under_edits_are_confirmed_under_them(embedded, inputs, tmp_path) -> None:
    noise = torch.randn(24_000, generator=torch.Generator().manual_seed(5)).numpy() * 0.1
    pair = {"clean": inputs, "corrupted": inputs.with_audio([noise[:16_000], noise], 16_000)}
    edit = Edit("decoder.resid_post", edits.Scale(1.2), layer=0)
    with intervene(embedded, edit):
        found = patching.attribute(
            embedded, **pair, site="decoder.attn_out", axes="layer", metric=METRIC, method="atp"
        )
        assert len(found.confirm(embedded, top_k=2, controls=()).rows) == 2
    with pytest.raises(InputError, match="confirm under the same"):
        found.confirm(embedded, top_k=2, controls=())
    saved = patching.load(found.save(tmp_path / "map.nc"))
    assert patching.rerun(saved, embedded, **pair).agrees


def test_a_plain_sweep_keeps_to_a_place(embedded, inputs) -> None:
    noise = torch.randn(24_000, generator=torch.Generator().manual_seed(5)).numpy() * 0.1
    other = inputs.with_audio([noise[:16_000], noise], 16_000)
    arguments = {"clean": inputs, "corrupted": other, "site": "resid_pre", "metric": METRIC}
    groups = patching.sweep(
        embedded, axes=("layer", "group"), groups={"a": "audio", "t": "text"}, **arguments
    )
    kept = patching.sweep(embedded, axes=("layer",), where="audio", **arguments)
    torch.testing.assert_close(groups.select(group="a").values, kept.values)
    assert not torch.allclose(groups.select(group="t").values, kept.values)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"axes": "group"}, SiteError, "go together"),
        ({"axes": "layer", "groups": {"a": "audio"}}, SiteError, "go together"),
        ({"axes": ("group", "position"), "groups": {"a": "audio"}}, SiteError, "alone"),
        ({"axes": "group", "groups": {}}, SiteError, "empty"),
        ({"axes": "group", "groups": {"a": (7.0, 8.0)}}, InputError, "selects no position"),
        ({"axes": "layer", "where": "sound"}, InputError, "no place"),
        ({"axes": "layer", "value": edits.Block("audio")}, SiteError, "Block edits"),
        ({"axes": "layer", "value": "median"}, InputError, "values come from"),
    ],
)
def test_edits_that_make_no_sweep_are_refused(embedded, inputs, options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        patching.ablate(embedded, inputs, site="decoder.resid_pre", metric=METRIC, **options)
