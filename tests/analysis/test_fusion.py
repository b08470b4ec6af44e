"""Causal tracing of fusion, its grid, and IRI: planted toys, real speech, a loop by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audio_lens import HookedAudioTransformer, Item, ItemError, Items, Words, intervene, metrics
from audio_lens.analysis import fusion
from audio_lens.analysis.fusion.groups import Groups, attribute_of, options_of
from audio_lens.errors import InputError
from audio_lens.items import ANALYSES, ControlError, rerun
from audio_lens.sites import SiteError
from families import FAMILIES
from items.speech import spoken_items
from toys import diluting_toy, hearing_copy_toy, spoken

LAYER, HEAD = 2, 1  # of the copying toy
STEP = [float(layer <= LAYER) for layer in range(5)]  # where the cue is at the audio


def heard(digit: int, other: int, loud: float = 1.0, **known) -> Item:
    """An item of a toy: what is heard is right, and another clip says what is wrong."""
    said = {"answer": str(digit), "against": str(other), "other_audio": spoken(other)}
    return Item(spoken(digit, loud), str(known.pop("read", 0)), **said, **known)


@pytest.fixture(scope="module")
def toy():
    return hearing_copy_toy(5, LAYER, HEAD)


@pytest.fixture(scope="module")
def cues() -> Items:
    return Items(heard(digit, 3) for digit in range(3))


# -------------------------------------------------------------------------------- toys


@pytest.fixture(scope="module")
def told(toy, cues):
    """What `audio-lens analyse fusion` would give of the toy."""
    return ANALYSES["fusion"].function(toy, cues.pairs(), seed=1, progress=False)


def test_the_copy_toy_is_traced_exactly(told):
    curves = {group: told.select(group=group).estimate for group in told.coords["group"]}
    assert set(curves) == {"text", "audio", "early", "last"}
    expected = torch.tensor([STEP] * 2).double()
    torch.testing.assert_close(curves["audio"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(curves["last"], 1 - expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(curves["text"], curves["last"], rtol=0, atol=1e-12)
    assert curves["early"].abs().max() < 1e-12
    assert "'audio' at 0, 1, 2; 'last' at 3, 4; at no layer by 'early'" in told.report[0]
    assert told.meta["method"] == "fusion.trace" and told.meta["seed"] == "1"
    assert ANALYSES["fusion"].summary.startswith("Where in the decoder")


def test_another_item_recovers_what_destroying_does(told):
    """CORRECTIONS A2: half of a logit difference, nothing of a log-probability."""
    assert told.controls["destroyed"].estimate.tolist() == [0.0, 0.5]
    other = told.controls["other_item"].select(group="audio").estimate
    assert other[0].abs().max() < 1e-12
    assert other[1].tolist() == pytest.approx([0.5 * step for step in STEP])
    assert told.controls["identity"].values.abs().max() == 0


def test_silence_is_the_corruption_of_items_and_what_it_answers_rightly_is_dropped(toy, cues):
    """Silence is answered 0 by the toy; a metric that names a word for each item follows."""
    named = {"prob": metrics.prob([item.answer for item in cues])}
    controls = ["identity", "destroyed"]
    result = fusion.trace(toy, cues, metric=named, layers=[2, 3], controls=controls)
    assert result.dropped == {"the corrupted side is answered rightly too": 1}
    assert result.n_kept == 2 and result.coords["stimulus"] == ["1", "2"]
    assert result.select(group="audio", metric="prob").estimate.tolist() == pytest.approx([1, 0])
    assert result.controls["destroyed"].estimate.tolist() == [0.0]


def test_the_grid_finds_the_one_head(toy, cues):
    places = {"audio mid": [5, 6], "last": "last"}
    result = fusion.fcct(toy, cues.pairs(), heads=True, groups=places, controls=[])
    last = result.select(metric="logit_diff", group="last")
    writes = {name: last.select(component=name).estimate for name in result.coords["component"]}
    copying = torch.tensor([float(layer == LAYER) for layer in range(5)]).double()
    torch.testing.assert_close(writes["attn_out"], copying)
    torch.testing.assert_close(writes[f"head {HEAD}"], copying)
    torch.testing.assert_close(writes["resid_post"], 1 - copying.cumsum(0).eq(0).double())
    assert not writes["head 0"].any() and not writes["mlp_out"].any()
    mid = result.select(metric="logit_diff", component="resid_post", group="audio mid")
    assert mid.estimate.tolist() == [1, 1, 0, 0, 0]  # behind a block, not in front of it


def diluted(count: int = 4) -> Items:
    """Items that are right where they are heard loudly, and read over where faintly."""
    return Items(
        heard(digit, (digit + step) % 4, loud, read=(digit + step) % 4, group=f"voice {digit}")
        for digit in range(count)
        for step in (1, 2)
        for loud in (1.5, 1.0)
    )


def test_what_is_diluted_late_is_brought_back():
    """The heard answer is given again to the layer that writes over it; other givers do nothing."""
    result = fusion.iri(diluting_toy(), diluted(), lambdas=[0.4])
    chosen = {name: float(result.meta[name]) for name in ("lambda_attn", "lambda_mlp")}
    assert chosen == {"lambda_attn": 0.4, "lambda_mlp": 0.0}
    gains = result.select(metric="right").estimate
    assert gains[0].tolist() == [0.0] * 2 and gains[-1].tolist() == [0.5] * 2
    assert result.controls["random_sites"].select(metric="right").values.abs().max() == 0
    assert result.controls["identity"].values.abs().max() == 0
    assert result.report[0].endswith("more are right") and "0.50 are right" in result.report[0]
    assert result.dropped == {"layers and lambdas were chosen on them": 8} and result.n_kept == 8


def test_layers_that_give_are_those_that_recover():
    toy, items = diluting_toy(writer=1, diluter=3), diluted()
    writes = ["attn_out", "mlp_out"]
    grid = fusion.fcct(toy, items, components=writes, groups={"last": "last"}, controls=())
    (edit,) = fusion.enrichment(grid, 0.3, 0.3)
    assert (edit.do.givers, edit.do.weights) == ([1], [pytest.approx(1.0)])
    assert edit.do.takers == [0, 1, 2, 3, 4] and edit.site == "decoder.attn_out"
    with pytest.raises(ControlError, match="random_sites: 4 wanted, and 1 others"):
        fusion.plans.Plan("attn_out", dict.fromkeys(range(4), 1.0), [4]).elsewhere(5, 0)


# -------------------------------------------------------------------------------- real speech


@pytest.fixture(scope="module")
def items() -> Items:
    return spoken_items(7, seed=3)


@pytest.fixture(scope="module")
def traced(embedded, items):
    return fusion.trace(embedded, items.pairs(), layers=[0, 2, 5])


@pytest.mark.real
@pytest.mark.slow
def test_the_last_token_is_the_bottleneck_late_and_the_audio_holds_the_answer_early(traced):
    for metric in traced.coords["metric"]:
        audio, last, text = (
            traced.select(metric=metric, group=group) for group in ("audio", "last", "text")
        )
        assert (audio.low[:2] > 0.7).all() and audio.high[-1] < 0.4
        assert (last.high[:2] < 0.4).all() and last.low[-1] > 0.8
        assert (text.estimate - last.estimate).abs().max() < 0.1
    assert "'audio' at 0, 2;" in traced.report[0] and "'last' at 5" in traced.report[0]
    assert traced.n_kept >= 5


@pytest.mark.real
@pytest.mark.slow
def test_controls_lie_where_they_must(traced):
    assert traced.controls["identity"].values.abs().max() == 0
    destroyed = traced.controls["destroyed"].estimate
    for group, layers in (("audio", [0, 2]), ("last", [5])):
        other = traced.controls["other_item"].select(group=group, layer=layers).estimate
        assert ((other - destroyed[:, None]).abs() < 0.2).all()
    flat = traced.select(group=["early", "question", "late"])
    assert flat.estimate.abs().max() < 0.1


@pytest.mark.real
def test_one_cell_by_hand(embedded, items):
    """Clean states of the audio put in by a hook, item by item."""
    pairs, name = items.pairs(), "decoder.blocks.2.hook_resid_pre"
    traced = fusion.trace(embedded, pairs, layers=[2], groups={"audio": "audio"}, controls=[])
    over, under = [], []
    audio = embedded.timeline(embedded.prepare([items[0].clip], [items[0].text]))[0].audio_span
    for item in traced.coords["stimulus"]:
        (pair,) = (pair for pair in pairs if pair.clean.id == item)
        clean, corrupted = (
            embedded.prepare([side.clip], [side.text]) for side in (pair.clean, pair.corrupted)
        )
        metric = metrics.logit_diff(pair.clean.answer, pair.clean.against).bind(embedded, clean)

        def put(x, hook, states):
            x = x.clone()
            x[:, audio] = states[:, audio]
            return x

        with torch.no_grad():
            logits, cache = embedded.run_with_cache(clean, names_filter=name)
            before = metric(embedded(corrupted))
            hook = lambda x, hook, cache=cache: put(x, hook, cache[name])  # noqa: E731
            after = metric(embedded.run_with_hooks(corrupted, fwd_hooks=[(name, hook)]))
        over.append(float(after - before))
        under.append(float(metric(logits) - before))
    cell = traced.select(metric="logit_diff", group="audio", layer=2)
    assert cell.values.tolist() == pytest.approx(
        [a / b for a, b in zip(over, under, strict=True)], abs=1e-4
    )
    assert float(cell.estimate) == pytest.approx(sum(over) / sum(under), abs=1e-4)


@pytest.mark.real
def test_all_positions_of_a_layer_are_all_there_is(embedded, items):
    result = fusion.trace(embedded, items[:4].pairs(), groups={"all": "all"}, controls=[])
    assert (result.values == 1).all() and not result.controls


@pytest.mark.real
def test_none_of_iri_changes_nothing_to_the_last_bit(embedded, items):
    grid = fusion.fcct(embedded, items[:2].pairs(), groups={"last": "last"}, controls=[])
    inputs = embedded.prepare([items[0].clip], [items[0].text])
    with torch.no_grad():
        plain, written = embedded(inputs), embedded.generate(inputs)
        with intervene(embedded, *fusion.enrichment(grid, 0.0, 0.0)):
            assert torch.equal(embedded(inputs), plain)
            assert embedded.generate(inputs) == written
        with intervene(embedded, *fusion.enrichment(grid, 0.2, 0.1)):
            assert not torch.equal(embedded(inputs), plain)


@pytest.mark.real
@pytest.mark.slow
def test_iri_is_a_null_result_where_nothing_is_diluted(embedded):
    """CORRECTIONS A18: the embedded model has no late attenuation."""
    result = fusion.iri(embedded, spoken_items(24, seed=5))
    assert result.select(metric="right").low.max() <= 0
    assert result.plot(metric="right") is not None
    assert "no gain that can be told from 0" in result.report[0]


def test_a_trace_is_made_again_from_its_file(toy, cues, tmp_path):
    result = fusion.trace(toy, cues.pairs(), layers=[2, 3], controls=["other_item"], seed=2)
    again = rerun(result.save(tmp_path / "trace.nc"), toy, cues.pairs())
    assert torch.equal(again.values, result.values) and again.report == result.report


# -------------------------------------------------------------------------------- groups


def test_options_are_the_shortest_stretch_that_has_them_all():
    text = "Is it one voice or two? Choose one: (a) one (b) two."
    assert options_of(Item("x", text, options=["one", "two"])) == "one (b) two"
    assert options_of(Item("x", "(a) Happy (b) sad", options=["happy", "sad"])) == "Happy (b) sad"
    assert options_of(Item("x", "someone, two", options=["one", "two"])) is None
    assert options_of(Item("x", None, options=["one", "two"])) is None
    asked = Item("x", "What is the emotion?", labels={"attribute": "Emotion"})
    assert attribute_of(asked) == "emotion" and attribute_of(asked.replaced(text="What?")) is None


def test_parts_of_a_prompt_share_out_its_text(embedded):
    tone = np.sin(np.arange(16_000) / 20).astype(np.float32)
    text = "Choose one digit of these: two, nine. Which is second?"
    item = Item(tone, text, "two", options=["two", "nine"], sampling_rate=16_000)
    named = item.replaced(labels={"attribute": "second"})
    inputs = embedded.prepare([item.clip], [text])
    parts = Groups.of_prompt([item]).masks(embedded, inputs, [item])
    words = lambda mask: embedded.tokenizer.decode(inputs.tokens[mask])  # noqa: E731
    assert words(parts["options"]).strip() == "two, nine"
    assert words(parts["early"]).endswith("these:") and ". Which" in words(parts["late"])
    shared = sum(parts[name].int() for name in ("early", "options", "late", "last"))
    assert torch.equal(shared.bool(), parts["text"]) and shared.max() == 1
    classes = Groups.of_tokens().masks(embedded, inputs, [named])
    assert words(classes["attribute"]).strip() == "second"
    assert torch.equal(sum(mask.int() for mask in classes.values()), torch.ones_like(inputs.tokens))


def test_prompts_without_a_group_are_left_out_of_it(toy):
    """Of three prompts one has no cue word; given places must be there."""
    items = Items(heard(digit, 3) for digit in range(3))
    with pytest.raises(ItemError, match=r"item '0', group 'cue': .*needs a tokenizer"):
        fusion.trace(toy, items.pairs(), groups={"cue": Words("cue")})
    with pytest.raises(ItemError, match=r"item '1', group 'none': .*selects no position"):
        fusion.trace(toy, items.pairs(), groups={"none": _none_of_second})


def _none_of_second(item: Item):
    return slice(0, 0) if item.id == "1" else "last"


def test_one_batch_may_lack_another_item(toy):
    """With batches of one there is nobody to borrow from: the control is empty, and says so."""
    items = Items(heard(digit, 3) for digit in range(3))
    result = fusion.trace(toy, items.pairs(), size=1, layers=[0, 3], controls=["other_item"])
    assert result.controls["other_item"].values.isnan().all()
    assert any("3 pairs have no other of the same layout" in note for note in result.report)
    assert result.select(group="audio", metric="log_prob").estimate.tolist() == [1.0, 0.0]


# -------------------------------------------------------------------------------- other models


def test_whisper_is_traced_over_its_text(monkeypatch):
    """Audio reaches its decoder by cross-attention: of groups of audio there is none."""
    model = HookedAudioTransformer.from_hf(FAMILIES["whisper"].build())
    model.feature_extractor = model.make_feature_extractor()
    monkeypatch.setattr(model, "to_single_token", int, raising=False)
    clips = [0.3 * np.sin(np.arange(8000) * pitch).astype(np.float32) for pitch in (0.1, 0.5, 1, 2)]
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.cross_attn.o_proj.weight.mul_(100)  # what is heard then rules what is said
        said = [int(model(model.prepare([(c, 16_000)]))[0, -1].argmax()) for c in clips]
    two = sorted(set(said))[:2]
    one, other = (clips[said.index(token)] for token in two)
    sides = [(one, two[0], other), (other, two[1], one)]
    items = Items(
        Item(clip, answer=str(token), other_audio=against, sampling_rate=16_000)
        for clip, token, against in sides
    )
    result = fusion.fcct(model, items.pairs(), controls=["identity"])
    assert result.coords["component"] == ["attn_out", "cross_attn_out", "mlp_out", "resid_post"]
    assert "audio early" not in result.coords["group"]
    assert any("by cross-attention" in note for note in result.report)
    behind = result.select(component="resid_post", group="last", layer=result.coords["layer"][-1])
    assert behind.values.flatten().tolist() == pytest.approx([1.0] * behind.values.numel())


def test_models_without_a_decoder_are_refused():
    model = HookedAudioTransformer.from_hf(FAMILIES["wav2vec2"].build(head="ForCTC"))
    items = Items([Item(np.ones(8000, np.float32) / 9, answer="a", sampling_rate=16_000)])
    for study in (fusion.trace, fusion.fcct, fusion.iri):
        with pytest.raises(InputError, match="wav2vec2 has none"):
            study(model, items)


# -------------------------------------------------------------------------------- bad input


def test_what_cannot_be_traced_is_named(toy, cues):
    pairs = cues.pairs()
    with pytest.raises(InputError, match="no control 'other' here; there is identity"):
        fusion.trace(toy, pairs, controls=["other"])
    with pytest.raises(SiteError, match=r"not at connector\.out"):
        fusion.trace(toy, pairs, site="connector.out")
    with pytest.raises(SiteError, match="lie in 0 to 4"):
        fusion.trace(toy, pairs, layers=[5])
    with pytest.raises(ControlError, match="two kept pairs or more"):
        fusion.trace(toy, pairs[:1])
    with pytest.raises(InputError, match="here is none"):
        fusion.trace(toy, pairs, groups={})
    with pytest.raises(InputError, match="no components"):
        fusion.fcct(toy, pairs, components=[])
    with pytest.raises(ItemError, match="no answer"):
        fusion.trace(toy, Items([Item(spoken(1), "0")]))
    with pytest.raises(InputError, match="lambdas"):
        fusion.iri(diluting_toy(), diluted(), lambdas=[-0.1])
    with pytest.raises(ItemError, match="splits nothing"):
        fusion.iri(diluting_toy(), diluted(1))
    late = {"components": ["attn_out", "mlp_out"], "layers": [3, 4], "groups": {"last": "last"}}
    grid = fusion.fcct(toy, pairs, controls=[], **late)
    with pytest.raises(InputError, match="no layer recovers anything"):
        fusion.enrichment(grid, 0.1, 0.1)
