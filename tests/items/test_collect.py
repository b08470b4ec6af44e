"""Collected activations are those of whole runs, go on where they stopped, and are read lazily."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from audio_lens import (
    Activations,
    ActivationsError,
    HookedAudioTransformer,
    HookError,
    InputError,
    Item,
    Items,
    OutputError,
    collect,
)
from audio_lens.items.shards import INDEX, shard_paths
from audio_lens.items.store import Store
from audio_lens.models.embedded import clip_pairs
from audio_lens.sites import SiteError
from families import FAMILIES

SITES = ["encoder.resid_post", "decoder.attn.z", "connector.out"]


@pytest.fixture(scope="module")
def items() -> Items:
    """Clips of four lengths, and one of them twice, not in the order of their lengths."""
    pairs = clip_pairs()
    return Items(
        Item(
            p.clean,
            p.question,
            p.answer,
            p.against,
            words=p.words,
            labels={"digits": len(p.words)},
            group="ab"[number % 2],
            id=f"clip {number}",
        )
        for number, p in enumerate([*pairs, pairs[0]])
    )


@pytest.fixture(scope="module")
def acts(items: Items, embedded: HookedAudioTransformer) -> Activations:
    return collect(embedded, items, SITES, where="audio")


def of_one(model: HookedAudioTransformer, item: Item, name: str) -> tuple:
    """A hook's activation in a run of one item, and that item's timeline."""
    inputs = Items([item]).prepare(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=name)
    return cache[name][0], model.timeline(inputs)


# -------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "site, layer, name, part",
    [
        ("encoder.resid_post", 2, "encoder.blocks.2.hook_resid_post", "encoder"),
        ("decoder.attn.z", -1, "decoder.blocks.5.attn.hook_z", "decoder"),
        ("connector.out", None, "connector.hook_out", "connector"),
    ],
)
def test_rows_are_the_valid_positions_of_each_item(
    site: str, layer: int | None, name: str, part: str, acts, items, embedded
) -> None:
    table, rows = acts.table(site), acts.array(site, layer)
    assert len(rows) == acts.rows(site) == len(table["item"])
    for number, item in enumerate(items):
        whole, timeline = of_one(embedded, item, name)
        is_audio = timeline.valid(part) & (timeline.clips(part) == 0)
        own = table["item"] == number
        torch.testing.assert_close(rows[torch.as_tensor(own)], whole[is_audio])
        assert table["position"][own].tolist() == is_audio.nonzero()[:, 0].tolist()
        np.testing.assert_allclose(table["second"][own], timeline.seconds(part)[is_audio])
    assert (np.diff(table["item"]) >= 0).all() and not table["row"].any()


def test_rows_have_the_labels_of_their_items(acts: Activations, items: Items) -> None:
    table = acts.table()
    assert table["id"][0] == "clip 0" and table["group"][-1] == "a"
    assert acts.values("digits") == [items[i].labels["digits"] for i in table["item"]]
    with pytest.raises(ActivationsError, match="items have no 'speaker'; nearest names"):
        acts.values("speaker")


def test_a_pooled_row_is_the_mean_of_an_item(acts, items, embedded) -> None:
    pooled = collect(embedded, items, SITES, where="audio", pool="mean")
    table = acts.table("decoder.attn.z")
    for number in range(len(items)):
        own = torch.as_tensor(table["item"] == number)
        mean = acts["decoder.attn.z", 1][own].mean(0)
        torch.testing.assert_close(pooled["decoder.attn.z", 1][number], mean)
    of_items = pooled.table("decoder.attn.z")
    assert of_items["item"].tolist() == list(range(5)) and set(of_items["position"]) == {-1}
    first = table["item"] == 0
    assert of_items["second"][0] == pytest.approx(table["second"][first].mean())


@pytest.mark.parametrize("where", ["last", -1, [3, 5], "text", (0.3, 0.9)])
def test_places_are_those_of_sweeps(where, items, embedded) -> None:
    found = collect(embedded, items, "decoder.resid_pre", where, layers=[0])
    for number, item in enumerate(items):
        whole, timeline = of_one(embedded, item, "decoder.blocks.0.hook_resid_pre")
        own = torch.as_tensor(found.table()["item"] == number)
        at = {"last": [-1], -1: [-1], "text": timeline.text_span.tolist()}.get(
            where if not isinstance(where, list) else None, where
        )
        if isinstance(at, tuple):
            at = timeline.positions("decoder", *at)
        torch.testing.assert_close(found.array()[own], whole[at])


def test_every_item_has_its_own_place(items, embedded) -> None:
    by_word = collect(embedded, items, "encoder.resid_post", lambda x: x.words[1], layers=[1])
    listed = collect(embedded, items, "encoder.resid_post", [x.words[1] for x in items], layers=[1])
    assert torch.equal(by_word.array(), listed.array())
    table = by_word.table()
    for number, item in enumerate(items):
        seconds, word = table["second"][table["item"] == number], item.words[1]
        assert len(seconds) and ((seconds >= word.start_s) & (seconds < word.end_s)).all()
    with pytest.raises(ValueError, match="5 items need one place, or as many, got 2"):
        collect(embedded, items, "encoder.resid_post", [(0.0, 1.0), (0.0, 1.0)])


@pytest.mark.parametrize(
    "family, site, hook",
    [
        ("whisper", "encoder.resid_post", "encoder.blocks.1.hook_resid_post"),
        ("whisper", "decoder.cross_attn.k", "decoder.blocks.1.cross_attn.hook_k"),
        ("wav2vec2", "encoder.attn.z", "encoder.blocks.1.attn.hook_z"),
    ],
)
def test_clips_of_unequal_length_are_kept_as_they_are_alone(family, site, hook) -> None:
    options = {"head": "ForCTC"} if family == "wav2vec2" else {}
    model = HookedAudioTransformer.from_hf(FAMILIES[family].build(**options))
    model.feature_extractor = model.make_feature_extractor()
    draw = np.random.default_rng(0)
    clips = [draw.normal(0, 0.1, round(16_000 * s)).astype(np.float32) for s in (0.3, 0.5, 0.3)]
    items = Items(Item(clip, sampling_rate=16_000) for clip in clips)
    found = collect(model, items, site, layers=[1])
    for number, item in enumerate(items):
        whole, timeline = of_one(model, item, hook)
        own = torch.as_tensor(found.table()["item"] == number)
        torch.testing.assert_close(found.array()[own], whole[timeline.valid("encoder")])


def test_nothing_runs_behind_what_is_asked_for(items, embedded) -> None:
    ran: set[str] = set()

    def note(tensor, hook) -> None:
        ran.add(hook.name)

    with embedded.hooks([(lambda name: name.endswith("hook_resid_post"), note)]):
        collect(embedded, items[:1], "encoder.resid_post", layers=[2])
    assert ran == {f"encoder.blocks.{i}.hook_resid_post" for i in range(3)}
    ran.clear()
    with embedded.hooks([(lambda name: name.endswith("hook_resid_post"), note)]):
        collect(embedded, items[:1], ["connector.out"])
    assert not any(name.startswith("decoder") for name in ran)


# -------------------------------------------------------------------------------- on disk


def test_a_folder_holds_what_memory_would(items, embedded, tmp_path: Path, acts) -> None:
    found = collect(embedded, items, SITES, to=tmp_path / "deep" / "acts", shard_bytes=1)
    assert len(shard_paths(tmp_path / "deep" / "acts")) == 4  # one for each layout
    loaded = Activations.load(tmp_path / "deep" / "acts")
    for site in SITES:
        for layer in loaded.layers(site) or [None]:
            assert torch.equal(loaded.array(site, layer), acts.array(site, layer))
        mine, theirs = loaded.table(site), acts.table(site)
        assert all((mine[name] == theirs[name]).all() for name in mine if name != "second")
    assert found.sites == loaded.sites == tuple(SITES) and loaded.layers() == list(range(4))
    assert loaded.meta["model"] == "embedded" and loaded.meta["items_hash"] == items.digest()


def test_a_run_that_stopped_goes_on(items, embedded, tmp_path: Path, acts) -> None:
    ran = []

    class Stopped(Exception):
        pass

    def stop_at_third(tensor, hook) -> None:
        ran.append(len(tensor))
        if len(ran) == 3:
            raise Stopped

    embed = "encoder.blocks.0.hook_resid_pre"
    with pytest.raises(HookError), embedded.hooks([(embed, stop_at_third)]):
        collect(embedded, items, SITES, to=tmp_path, shard_bytes=1)
    assert len(shard_paths(tmp_path)) == 2
    with pytest.raises(ActivationsError, match=r"lacks [23] of 5 items: collect again"):
        Activations.load(tmp_path)
    before = [path.stat().st_mtime_ns for path in shard_paths(tmp_path)]
    with embedded.hooks([(embed, lambda tensor, hook: ran.append(len(tensor)))]):
        whole = collect(embedded, items, SITES, to=tmp_path, shard_bytes=1)
    assert [path.stat().st_mtime_ns for path in shard_paths(tmp_path)[:2]] == before
    assert sum(ran[:2]) + sum(ran[3:]) == 5
    for layer in range(4):
        assert torch.equal(whole["encoder.resid_post", layer], acts["encoder.resid_post", layer])
    again = collect(embedded, items, SITES, to=tmp_path)
    assert torch.equal(again.array(layer=0), whole.array(layer=0)) and len(ran) == 5


def test_a_folder_of_something_else_is_refused(items, embedded, tmp_path: Path) -> None:
    site = "encoder.resid_post"
    collect(embedded, items[:2], site, to=tmp_path / "a", pool="mean")
    for changes, told in (
        ({"items": items[:3]}, "other items, clips"),
        ({"sites": "encoder.resid_pre"}, "other sites"),
        ({"where": "all"}, "other where"),
        ({"pool": None}, "other pool"),
        ({"dtype": torch.bfloat16}, "other dtype"),
        (
            {"model": HookedAudioTransformer.from_pretrained("embedded", dtype=torch.float64)},
            "dtype",
        ),
    ):
        asked = {"model": embedded, "items": items[:2], "sites": site, "pool": "mean"} | changes
        with pytest.raises(ActivationsError, match=f"holds activations of {told}|{told}"):
            collect(**asked, to=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("x")
    with pytest.raises(ActivationsError, match=r"holds notes\.txt already"):
        collect(embedded, items, site, to=tmp_path / "b")
    with pytest.raises(OutputError, match="cannot be made a folder"):
        collect(embedded, items, site, to=tmp_path / "b" / "notes.txt")
    with pytest.raises(ActivationsError, match=f"there is no {INDEX}"):
        Activations.load(tmp_path / "b")
    shard_paths(tmp_path / "a")[0].write_bytes(b"broken")
    with pytest.raises(ActivationsError, match="is no whole shard"):
        Activations.load(tmp_path / "a")


def test_activations_are_kept_in_the_dtype_asked_for(items, embedded, tmp_path: Path) -> None:
    found = collect(
        embedded, items[:1], "encoder.resid_post", to=tmp_path, layers=[-1], dtype=torch.bfloat16
    )
    assert found.array().dtype == torch.bfloat16 and found.layers() == [3]
    assert found.to_xarray().dtype == np.float32
    assert json.loads((tmp_path / INDEX).read_text())["dtype"] == "bfloat16"


# -------------------------------------------------------------------------------- reading


def test_rows_go_to_torch_and_xarray(items, embedded, tmp_path: Path) -> None:
    found = collect(embedded, items, "encoder.resid_post", to=tmp_path, shard_bytes=1)
    rows = found.dataset(layer=2, label="digits")
    assert len(rows) == len(found) and rows[-1][1] == 3
    torch.testing.assert_close(rows[7][0], found.array(layer=2)[7])
    drawn = torch.cat([x for x, _ in DataLoader(pickle.loads(pickle.dumps(rows)), batch_size=50)])
    assert torch.equal(drawn, found.array(layer=2))
    with pytest.raises(IndexError):
        rows[len(rows)]
    labelled = found.to_xarray(layer=2)
    assert labelled.dims == ("row", "d") and labelled.name == "encoder.resid_post.2"
    one = labelled[labelled["id"] == "clip 3"]
    assert len(one) == (found.table()["item"] == 3).sum() and one["digits"][0] == 2
    chunks = list(found.chunks(layer=2))
    assert sum(map(len, chunks)) == len(found) and len(chunks) == 4


def test_items_are_chosen_by_their_labels(acts: Activations) -> None:
    part = acts.filter(digits=3, group="a")
    assert {item["id"] for item in part.items} == {"clip 0", "clip 2", "clip 4"}
    own = torch.as_tensor(np.isin(acts.table()["item"], [0, 2, 4]))
    assert torch.equal(part.array(layer=0), acts.array(layer=0)[own]) and len(part) == own.sum()
    assert len(part.filter(lambda fact: fact["id"] == "clip 4").items) == 1
    with pytest.raises(ActivationsError, match="no item is left of 3"):
        part.filter(group="b")


def test_what_was_not_collected_says_so(acts: Activations) -> None:
    with pytest.raises(ActivationsError, match=r"'encoder.resid_pre' was not collected; nearest"):
        acts["encoder.resid_pre", 0]
    with pytest.raises(ActivationsError, match=r"collected at layers \[0, 1, 2, 3\], not at 4"):
        acts["encoder.resid_post", 4]
    with pytest.raises(ActivationsError, match="not at None"):
        acts["encoder.resid_post"]
    assert acts["connector.out"].shape[1] == 192 and "5 items" in repr(acts)
    assert torch.equal(acts[3], acts["encoder.resid_post", -1])


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"sites": "decoder.attn.pattern"}, SiteError, "as wide as a batch has positions"),
        ({"sites": ["encoder.resid_post"] * 2}, SiteError, "each once"),
        ({"sites": []}, SiteError, "one site or more"),
        ({"sites": "encoder.gone"}, SiteError, "cannot be swept"),
        ({"layers": [9]}, SiteError, r"has layers 0 to 3, not \[9\]"),
        ({"sites": "connector.out", "layers": [0]}, SiteError, "has no layers"),
        ({"where": (9.0, 10.0)}, InputError, "selects no position .*items 'clip 0'"),
        ({"pool": "max"}, ValueError, "'mean' or None"),
    ],
)
def test_what_cannot_be_collected_is_refused_early(options, error, told, items, embedded) -> None:
    with pytest.raises(error, match=told):
        collect(embedded, items, **({"sites": "encoder.resid_post"} | options))


def test_no_more_is_held_than_a_shard_and_a_batch(
    items, embedded, tmp_path: Path, monkeypatch
) -> None:
    held: list[int] = []
    add = Store.add

    def watched(store: Store, rows: list, tensors: dict) -> None:
        add(store, rows, tensors)
        parts = (x for own in store._held.values() for x in own)
        held.append(sum(x.numel() * x.element_size() for x in parts))

    monkeypatch.setattr(Store, "add", watched)
    many = Items(item.replaced(id=f"{item.id}-{i}") for i in range(6) for item in items)
    found = collect(embedded, many, "encoder.resid_post", to=tmp_path, size=2, shard_bytes=500_000)
    assert len(held) > 10 and max(held) < 500_000
    assert len(shard_paths(tmp_path)) > 4 and len(found.items) == 30
