"""Steering: planted directions of toys, the baselines against their formulas, and real speech."""

from __future__ import annotations

import pytest
import torch

from analysis.toy_items import hearing, item_of
from audio_lens import Edit, Items, edits, intervene
from audio_lens.analysis import steering
from audio_lens.analysis.steering import AAD, GACL, TAD, Direction, monitoring
from audio_lens.errors import InputError
from audio_lens.items import ANALYSES, ItemError, demo_items, rerun
from audio_lens.sites import SiteError
from items.speech import conflict_items
from toys import AUDIO_CLASS, Cue, Toy, two_stream_toy

SITE, CUE = "decoder.resid_pre", [Cue(0).at_token]
READ = 1  # the layer in which the toy's heads read


def said(heard: int, read: tuple[int, ...] = (0, 3), **known) -> Items:
    return Items(item_of(Cue(heard, one), **known) for one in read)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return hearing(two_stream_toy(1.0, 0.25))


@pytest.fixture(scope="module")
def found(toy) -> list[Direction]:
    return steering.directions(toy, said(1), said(2), SITE, where=CUE, progress=False)


@pytest.fixture(scope="module")
def swept(toy, found):
    return steering.sweep(toy, asked(), found, [-1, 0.25, 1, 2], where=CUE, progress=False)


def asked() -> Items:
    """Class 2 is heard, and the question is whether 1 is answered."""
    return Items(
        item_of(Cue(2, read)).replaced(answer="1", against="2", id=f"{read}") for read in (0, 3)
    )


# -------------------------------------------------------------------------------- directions


def test_a_direction_leads_from_the_one_mean_to_the_other(toy, found):
    assert [one.layer for one in found] == [0, 1, 2]
    for one in found[: READ + 1]:  # behind, every position holds a little of it
        expected = torch.zeros(toy.width)
        expected[AUDIO_CLASS.start + 1], expected[AUDIO_CLASS.start + 2] = 1.0, -1.0
        torch.testing.assert_close(one.vector, expected)
        assert one.read(one.start).item() == 0 and one.read(one.end).item() == 1
    alone = steering.direction(toy, said(1), said(2), SITE, layer=0, where=CUE)
    assert torch.equal(alone.vector, found[0].vector)
    assert alone.meta["model"] == "toy" and alone.meta["where"] == "[6]"
    assert alone.meta["a"].startswith("2 items")


def test_items_count_alike_and_places_may_differ_by_item(toy):
    """Against the obvious: the mean over each item's positions, then over items."""
    a, b = said(1, (0, 2, 3)), said(2)
    spots = {"0": slice(0, 10), "2": [6], "3": [6, 7]}
    one = steering.direction(toy, a, b, SITE, layer=1, where=lambda item: spots[item.text])
    rows = []
    for items in (a, b):
        _, cache = toy.run_with_cache(items.prepare(toy), return_cache_object=False)
        resid = cache["decoder.blocks.1.hook_resid_pre"]
        own = [x[spots[item.text]].mean(0) for x, item in zip(resid, items, strict=True)]
        rows.append(torch.stack(own).mean(0))
    torch.testing.assert_close(one.vector.double(), rows[0] - rows[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["probe", "mass_mean"])
def test_probes_point_where_the_classes_differ(toy, kind):
    """What varies within the classes, how loud the marker is, is not of the direction."""
    pytest.importorskip("sklearn")
    a, b = (
        Items(item_of(Cue(c, 0, loud=loud), id=f"{loud}") for loud in (0.6, 0.8, 1.0))
        for c in (1, 2)
    )
    given = {"layer": 0, "where": CUE, "progress": False}
    one = steering.direction(toy, a, b, SITE, kind=kind, **given)
    means = steering.direction(toy, a, b, SITE, **given)
    assert torch.cosine_similarity(one.vector, means.vector, dim=0) > 0.99
    assert one.read(one.start).item() == pytest.approx(0, abs=1e-6)
    assert one.read(one.end).item() == pytest.approx(1)
    if kind == "mass_mean":
        with pytest.raises(InputError, match="items of one side are all alike"):
            steering.direction(toy, said(1), said(2), SITE, kind=kind, **given)


def test_a_head_probe_takes_the_heads_that_tell(toy):
    pytest.importorskip("sklearn")
    site = "decoder.attn.z"
    items = {heard: said(heard, (0, 0, 3, 3, 0, 3)) for heard in (1, 2)}
    one = steering.direction(
        *(toy, items[1], items[2], site), layer=READ, where="last", kind="head_probe"
    )
    assert one.vector.shape == (2, toy.decoder.blocks[0].attn.d_head)
    assert one.vector[0].norm() > 0.5 and one.vector[1].norm() == 0  # head 1 reads the text
    assert one.read(one.end).item() == pytest.approx(1)
    with intervene(toy, one.edit(1.0)):
        assert toy(said(2).prepare(toy))[:, -1].argmax(-1).tolist() == [1, 1]


class Turned:
    """A dictionary whose latents are the activations in another basis, twice as large."""

    def __init__(self, width: int):
        draw = torch.Generator().manual_seed(0)
        self.basis = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]

    def encode(self, x):
        return 2 * (x @ self.basis)

    def decode(self, latents):
        return latents @ self.basis.mT / 2


def test_a_column_is_the_latent_that_differs_most_as_far_as_it_does(toy, found):
    dictionary = Turned(toy.width)
    along = dictionary.basis.mT @ found[1].vector
    most = int(along.abs().argmax())
    one = steering.direction(
        *(toy, said(1), said(2), SITE),
        layer=1,
        where=CUE,
        kind="column",
        dictionary=dictionary,
    )
    torch.testing.assert_close(one.vector, along[most] * dictionary.basis[:, most])
    assert one.meta["column"] == str(most)
    second = steering.direction(
        *(toy, said(1), said(2), SITE),
        layer=1,
        where=CUE,
        kind="column",
        dictionary=dictionary,
        column=3,
    )
    torch.testing.assert_close(second.vector, along[3] * dictionary.basis[:, 3])


def test_directions_are_written_with_where_they_come_from(found, tmp_path):
    vectors, beside = found[1].save(tmp_path / "listen")
    assert (vectors.name, beside.name) == ("listen.safetensors", "listen.json")
    again = Direction.load(vectors)
    assert torch.equal(again.vector, found[1].vector) and torch.equal(again.end, found[1].end)
    assert (again.site, again.layer, again.how, again.meta) == (SITE, 1, "means", found[1].meta)
    bare = Direction(torch.ones(4), SITE, 0)
    assert Direction.load(bare.save(tmp_path / "bare.json")[1]).start is None
    back = found[1].turned()
    assert back.read(found[1].end) == 0 and torch.equal(back.vector, -found[1].vector)
    edits.save(found[1].toward(0.5), tmp_path / "edit.json")
    assert edits.load(tmp_path / "edit.json")[0].do.target == 0.5


def test_bad_directions_say_why(found, tmp_path):
    for vector, words in (
        (torch.zeros(4), "length above 0"),
        (torch.ones(4) * torch.nan, "finite"),
        (torch.ones(2, 2, 2), "one for each head"),
    ):
        with pytest.raises(InputError, match=words):
            Direction(vector, SITE)
    with pytest.raises(InputError, match="of its own shape"):
        Direction(torch.ones(4), SITE, start=torch.ones(3), end=torch.ones(4))
    with pytest.raises(InputError, match="both means"):
        Direction(torch.ones(4), SITE, start=torch.ones(4))
    with pytest.raises(InputError, match=r"activations end in \[3\], the direction is \[15\]"):
        found[0].read(torch.ones(2, 3))
    (tmp_path / "other.json").write_text("{}")
    for name in ("other", "nowhere"):
        with pytest.raises(InputError, match="holds no direction"):
            Direction.load(tmp_path / name)


# -------------------------------------------------------------------------------- the sweep


def test_a_planted_direction_moves_a_linear_reading_where_it_is_still_read(swept):
    diff = swept.select(metric="logit_diff").estimate
    expected = torch.tensor([-3.0, -0.5, 1, 3]).double()  # -1, and 2 for each time it is added
    for layer in (0, READ):
        torch.testing.assert_close(diff[layer], expected)
    torch.testing.assert_close(diff[2], torch.full((4,), -1.0).double())  # read before
    right = swept.select(metric="right").estimate
    assert right[:2, 2:].min() == 1 and right[2].max() == 0
    assert swept.controls["identity"].select(metric="logit_diff").estimate == -1
    assert swept.controls["random_direction"].select(metric="right").estimate[:, 2].max() < 1
    assert swept.report[0].startswith("right is 0.00 unedited, at most 1.00 (layer 0, alpha 1)")


def test_other_layers_are_as_long(toy, found):
    longer = Direction(3 * found[0].vector, SITE, 1)
    result = steering.sweep(toy, asked(), [found[0], longer], [1.0], where=CUE, progress=False)
    other = result.controls["other_layer"].select(metric="logit_diff", alpha=1.0)
    own = result.select(metric="logit_diff", alpha=1.0)
    torch.testing.assert_close(other.select(layer=0).values, own.select(layer=0).values)


def test_sweeps_are_made_again_from_their_files(toy, swept, tmp_path):
    again = rerun(swept.save(tmp_path / "sweep.nc"), toy, asked())
    torch.testing.assert_close(again.values, swept.values)


def test_sums_may_keep_their_length(toy, found):
    inputs = asked().prepare(toy)
    name = "decoder.blocks.0.hook_resid_pre"
    with intervene(toy, found[0].edit(2.0, where=CUE, keep_norm=True)):
        _, cache = toy.run_with_cache(inputs, names_filter=name, return_cache_object=False)
    _, plain = toy.run_with_cache(inputs, names_filter=name, return_cache_object=False)
    torch.testing.assert_close(cache[name].norm(dim=-1), plain[name].norm(dim=-1))


def test_what_is_lacking_is_added_and_no_more(toy, found):
    """The state at the cue reads 0 in what class 2 says, 1 in what class 1 says."""
    name, one = "decoder.blocks.1.hook_resid_pre", found[1]
    inputs = Items([*said(2, (0,)), *said(1, (0,)).of([item_of(Cue(1, 3), id="b")])]).prepare(toy)
    for target, expected in ((0.25, [0.25, 1.0]), (1.0, [1.0, 1.0])):
        with intervene(toy, one.toward(target, where=CUE)):
            _, cache = toy.run_with_cache(inputs, names_filter=name, return_cache_object=False)
        read = one.read(cache[name][:, CUE[0]])
        assert read.tolist() == pytest.approx(expected)


# -------------------------------------------------------------------------------- back-patching


def test_back_patching_is_a_put_of_the_late_state(toy):
    items = Items([*said(1, (0, 3)), item_of(Cue(2, 0), id="two")])
    result = steering.back_patch(toy, items, where="last", progress=False)
    assert result.coords["src"] == [1, 2] and result.coords["dst"] == [0, 1]
    assert result.select(src=1, dst=1).values.isnan().all()
    inputs = items.prepare(toy)
    _, cache = toy.run_with_cache(inputs, return_cache_object=False)
    late = cache["decoder.blocks.2.hook_resid_pre"]
    with intervene(toy, Edit(SITE, edits.Put(late), layer=0, where="last")):
        logits = toy(inputs)[:, -1]
    right = torch.tensor([1, 1, 2])
    expected = logits.log_softmax(-1)[torch.arange(3), right]
    torch.testing.assert_close(result.select(metric="log_prob", src=2, dst=0).values, expected)
    plain = toy(inputs)[:, -1].log_softmax(-1)[torch.arange(3), right]
    torch.testing.assert_close(result.controls["identity"].select(metric="log_prob").values, plain)
    other = result.controls["other_item"].select(metric="right", src=2, dst=1).values
    assert not other.isnan().any()  # each has one with another answer
    alone = steering.back_patch(toy, said(1), 2, 1, progress=False)
    assert alone.controls["other_item"].values.isnan().all()


# -------------------------------------------------------------------------------- rules


LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.5, 1.0, 0.0]])
BESIDE = torch.tensor([[1.9, 1.0, 0.0], [5.0, 1.0, 0.0]])


def test_rules_are_their_formulas(toy):
    torch.testing.assert_close(AAD(0.5)(toy, LOGITS, BESIDE), 1.5 * LOGITS - 0.5 * BESIDE)
    doubted = TAD(2.5, "0", "1")(toy, LOGITS, BESIDE)  # margins 1 and 0.9: the audio adds 0.1
    torch.testing.assert_close(doubted[0], torch.tensor([-0.5, 1.0, 0.0]))
    torch.testing.assert_close(doubted[1], torch.tensor([-2.0, 1.0, 0.0]))
    backed = TAD(2.5, "0", "1", tau=0.05)(toy, LOGITS, BESIDE)
    assert torch.equal(backed[0], LOGITS[0]) and torch.equal(TAD()(toy, LOGITS, BESIDE, 1), LOGITS)
    gated = GACL(0.5)(toy, LOGITS, BESIDE)
    assert torch.equal(gated[0], LOGITS[0])  # both prefer the same
    torch.testing.assert_close(gated[1], (LOGITS[1] + BESIDE[1]) / 2)
    unsure = GACL(0.5, sure=0.99)(toy, LOGITS, BESIDE)
    assert torch.equal(unsure, LOGITS)


def test_contrasts_are_made_of_both_runs(toy):
    items = Items([*said(1, (0, 3)), item_of(Cue(2, 0), id="two")])
    result = steering.contrast(toy, items, "AAD", [1.0], progress=False)
    own = toy(items.prepare(toy))[:, -1]
    silent = toy(AAD().beside(items).prepare(toy))[:, -1]
    right = torch.tensor([1, 1, 2])
    expected = (2 * own - silent).log_softmax(-1)[torch.arange(3), right]
    found = result.select(metric="log_prob", strength=1.0).values
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = own.log_softmax(-1)[torch.arange(3), right]
    nothing = result.controls["identity"].select(metric="log_prob").values
    torch.testing.assert_close(nothing, plain, atol=1e-5, rtol=1e-5)
    assert result.report[0].startswith("right is 1.00; by AAD 1.00 at 1")
    again = rerun(result, toy, items)
    torch.testing.assert_close(again.values, result.values)


# -------------------------------------------------------------------------------- writing


def test_what_is_written_is_read_along_the_direction(embedded):
    items = demo_items()[:2]
    inputs = items.prepare(embedded)
    draw = torch.Generator().manual_seed(0)
    one = Direction(torch.randn(embedded.cfg.need_decoder.d_model, generator=draw), SITE, 2)
    later = Direction(one.vector, SITE, 4)
    run = steering.write(embedded, inputs, one, 0.5, max_new_tokens=3, watch=later)
    with intervene(embedded, one.edit(0.5)):
        tokens, cache = embedded.generate(
            inputs, 3, return_type="tokens", return_cache=True, names_filter=[f"{ENTERS.format(4)}"]
        )
        texts = embedded.generate(inputs, 3)
    assert run.texts == texts and torch.equal(run.tokens, tokens[:, inputs.tokens.shape[1] :])
    states = cache[ENTERS.format(4)][:, inputs.tokens.shape[1] - 1 : -1]
    expected = later.read(states).double()
    torch.testing.assert_close(run.read, expected)
    held = steering.write(embedded, inputs, one, target=2.0, max_new_tokens=1)
    assert held.read.min() >= 2 - 1e-4


ENTERS = "decoder.blocks.{}.hook_resid_pre"


def test_nothing_is_read_behind_the_end(embedded):
    end = embedded.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    found = monitoring._behind(embedded, torch.tensor([[5, end, 5], [5, 5, 5]]))
    assert found.tolist() == [[False, False, True], [False] * 3]


def test_what_items_are_answered_is_monitored(embedded):
    draw = torch.Generator().manual_seed(0)
    one = Direction(torch.randn(embedded.cfg.need_decoder.d_model, generator=draw), SITE, 2)
    result = steering.monitor(
        embedded, demo_items()[:2], one, [0.0, 1.0], max_new_tokens=1, progress=False
    )
    read = result.values[..., 0]
    torch.testing.assert_close(read[:, 1], read[:, 0] + 1)
    chance = result.controls["random_direction"].values[..., 0]
    assert (chance[:, 1] - chance[:, 0]).abs().max() < 0.5
    assert result.report[0].startswith("Added 0 times: '") and result.axes == ("alpha", "token")


def test_rules_write(embedded):
    items = demo_items()[:2]
    inputs, rule = items.prepare(embedded), AAD(1.0)
    beside = rule.beside(items).prepare(embedded)
    plain = steering.decode(embedded, inputs, beside, AAD(0.0), max_new_tokens=3)
    assert plain == embedded.generate(inputs, 3)
    told = steering.decode(embedded, inputs, beside, rule, max_new_tokens=1)
    logits = 2 * embedded(inputs)[:, -1] - embedded(beside)[:, -1]
    expected = embedded.tokenizer.batch_decode(logits.argmax(-1)[:, None])
    assert told == [text.strip() for text in expected]


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kind": "best"}, InputError, "kind is one of means, probe"),
        ({"layer": 7}, SiteError, "has layers 0 to 2"),
        ({"layer": None}, InputError, "say which by layer="),
        ({"where": ["last", "last"]}, InputError, "a function of it here, not a list"),
        ({"kind": "head_probe"}, InputError, "a site of heads, such as attn.z"),
        ({"site": "decoder.attn.z"}, InputError, "a site without heads"),
        ({"kind": "column"}, InputError, "needs dictionary="),
        ({"column": 3}, InputError, "for kind 'column', not for 'means'"),
        ({"where": "last"}, InputError, "items a and b do not differ"),
    ],
)
def test_bad_questions_say_why(toy, options, error, words):
    given = {"site": SITE, "layer": 0, "where": CUE} | options
    with pytest.raises(error, match=words):
        steering.direction(toy, said(1), said(2), progress=False, **given)


def test_bad_sweeps_say_why(toy, found):
    with pytest.raises(InputError, match="directions are what"):
        steering.sweep(toy, asked(), [])
    with pytest.raises(InputError, match="one for each layer: got"):
        steering.sweep(toy, asked(), [found[0], found[0]])
    with pytest.raises(InputError, match="alphas are one number or more"):
        steering.sweep(toy, asked(), found, [])
    with pytest.raises(InputError, match="controls are some of random_direction"):
        steering.sweep(toy, asked(), found, controls=["chance"])
    with pytest.raises(InputError, match="shape"):
        steering.sweep(toy, asked(), Direction(torch.ones(3), SITE, 0))
    with pytest.raises(InputError, match="takes alpha= or target="):
        steering.write(toy, asked().prepare(toy), found[0])
    with pytest.raises(InputError, match="no position for each written token"):
        steering.write(toy, asked().prepare(toy), Direction(torch.ones(3), "connector.out"), 1.0)
    with pytest.raises(InputError, match="a source lies behind its target"):
        steering.back_patch(toy, asked(), 1, 2)
    with pytest.raises(InputError, match="has no states in layers"):
        steering.back_patch(toy, asked(), site="connector.out")
    with pytest.raises(InputError, match="controls are some of other_item"):
        steering.back_patch(toy, asked(), controls=["chance"])


def test_bad_rules_say_why(toy):
    with pytest.raises(InputError, match="a rule is one of AAD, TAD, GACL"):
        steering.contrast(toy, asked(), "DoLa")
    with pytest.raises(InputError, match="strength must be a number of 0 to 1"):
        steering.contrast(toy, asked(), GACL(), [2.0])
    with pytest.raises(InputError, match="controls are some of other_item"):
        steering.contrast(toy, asked(), controls=["chance"])
    inputs = asked().prepare(toy)
    with pytest.raises(InputError, match="2 prompts need as many beside them, got 1"):
        steering.decode(toy, inputs, inputs[:1])
    with pytest.raises(ItemError, match="no other_text"):
        ANALYSES["steering"].function(toy, asked())


# -------------------------------------------------------------------------------- real speech


@pytest.mark.slow
def test_the_study_of_the_demonstration_items(embedded):
    told = ANALYSES["steering"].function(embedded, demo_items(), progress=False)
    assert set(told) == {"sweep", "back_patch", "aad", "gacl"}
    assert told["sweep"].axes == ("layer", "alpha")


@pytest.mark.slow
@pytest.mark.real
def test_a_direction_makes_a_reader_listen(embedded):
    """ANALYSIS section 4: told text, some layer and strength takes 0 to 0.6, random ones do not."""
    heard, read = (conflict_items(32, trust, seed=23) for trust in ("audio", "text"))
    found = steering.directions(
        embedded, heard, read, SITE, where="last", layers=[1, 5], progress=False
    )
    test = conflict_items(32, "text", seed=24)
    result = steering.sweep(embedded, test, found, [1.5], progress=False)
    right = result.select(metric="right", alpha=1.5)
    assert right.controls["identity"].estimate <= 0.1
    assert right.select(layer=1).estimate >= 0.6 and right.select(layer=5).estimate <= 0.2
    assert right.controls["random_direction"].estimate.max() <= 0.1


@pytest.mark.slow
@pytest.mark.real
def test_decoding_listens_unless_it_is_told_to_read(embedded):
    """2506.07233 and 2606.05161, where no instruction decides; another item beside does not."""
    for trust, least, most in ((None, 0.8, 1.0), ("text", 0.0, 0.1)):
        items = conflict_items(32, trust, seed=24)
        for rule, strength in (("AAD", 2.0), ("GACL", 1.0)):
            result = steering.contrast(embedded, items, rule, [strength], progress=False)
            right = result.select(metric="right", strength=strength)
            assert least <= right.estimate.item() <= most
            assert right.controls["other_item"].estimate.item() <= 0.1
