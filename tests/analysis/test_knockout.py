"""Knock-out, mass, value zeroing, specialist heads: on planted toys, real speech and families."""

from __future__ import annotations

import pytest
import torch

from analysis.toy_items import hearing, item_of, items_of
from audio_lens import (
    AudioInputs,
    Edit,
    InputError,
    Item,
    Items,
    Result,
    edits,
    intervene,
    metrics,
    places,
)
from audio_lens.analysis import knockout
from audio_lens.items import ANALYSES, ControlError, rerun
from audio_lens.models.layers import Attention, RMSNorm
from audio_lens.sites import SiteError
from families import FAMILIES
from items.speech import spoken_items
from toys import AUDIO_TOKENS, MARKER, QUERY, Cue, copy_toy, two_stream_toy

LAYER, HEAD, N_LAYERS = 2, 1, 5


@pytest.fixture(scope="module")
def toy():
    return hearing(copy_toy(N_LAYERS, LAYER, HEAD))


@pytest.fixture(scope="module")
def heard() -> Items:
    return items_of([Cue(h, read=(h + 1) % 4, at_token=2 + h) for h in range(4)])


# -------------------------------------------------------------------------------- toy A


def test_only_the_copying_block_loses_the_answer(toy, heard) -> None:
    result = knockout.knock_out(toy, heard)
    assert result.dims == ("metric", "stimulus", "layer")
    lost = result.select(metric="logit_diff").values
    assert torch.equal(lost, torch.tensor([[0.0, 0, 1, 0, 0]] * 4).double())
    assert "falls most in block 2: by 1 [1, 1] of 1" in result.report[1]
    assert torch.equal(result.controls["identity"].values, torch.zeros(2, 4).double())
    assert result.controls["text_keys"].select(metric="logit_diff").values.abs().max() == 0


def test_only_the_copying_head_does(toy, heard) -> None:
    result = knockout.knock_out(toy, heard, per_head=True)
    lost = result.select(metric="logit_diff").mean().values
    expected = torch.zeros(N_LAYERS, 2).double()
    expected[LAYER, HEAD] = 1
    assert torch.equal(lost, expected)
    assert knockout.knock_out(toy, heard, heads=0, metric=None).values.abs().max() == 0


def test_only_the_key_of_the_cue_carries_it(toy, heard) -> None:
    """Places by item: the token of the cue, and all the others."""
    cue = {x.id: 2 + int(x.answer) for x in heard}
    at_cue = knockout.knock_out(toy, heard, keys=lambda x: cue[x.id])
    others = [places.AUDIO - [cue[x.id]] for x in heard]
    elsewhere = knockout.knock_out(toy, heard, keys=others, controls=["identity"])
    assert at_cue.select(metric="logit_diff", layer=LAYER).values.tolist() == [1.0] * 4
    assert elsewhere.values.abs().max() < 1e-12
    assert at_cue.controls["random_keys"].values.abs().max() < 1e-12


def test_windows_stand_beside_the_sum_of_their_blocks(toy, heard) -> None:
    result = knockout.knock_out(toy, heard, window=3)
    assert result.coords["layer"] == [0, 1, 2] and result.meta["window"] == "3"
    lost = result.select(metric="logit_diff").mean()
    assert lost.values.tolist() == [1, 1, 1]
    assert lost.controls["sum_of_singles"].values.tolist() == [1, 1, 1]
    told = next(line for line in result.report if "One by one" in line and "logit_diff" in line)
    assert "blocks [0, 1, 2, 3, 4] lose 0, 0, 1, 0, 0 of logit_diff" in told
    whole = knockout.knock_out(toy, heard, window=N_LAYERS)
    assert whole.coords["layer"] == [0] and not any("together:" in line for line in whole.report)


def test_a_bias_is_a_weight_shared_out_anew() -> None:
    toy = hearing(two_stream_toy(1.0, 0.7, layer=1))
    toy.attend(1, 0, QUERY, MARKER, 1.5)  # soft attention
    items = items_of([Cue(1, read=2), Cue(3, read=0, loud=0.5), Cue(2, read=1, loud=-1)])
    for beta in (0.5, 2.0, 7.0):
        biased, weighed, other = (
            knockout.knock_out(toy, items, do=do, controls=["identity"])
            for do in (
                edits.Bias(torch.tensor(beta).double().log().item(), "audio"),
                edits.Weights(beta, "audio"),
                edits.Weights(beta, "audio", renormalise=False),
            )
        )
        assert (biased.values - weighed.values).abs().max() < 1e-12
        assert biased.values.abs().max() > 0.01
        assert (other.values - weighed.values).abs().max() > 0.01
        assert (biased.meta["site"], weighed.meta["site"]) == (
            "decoder.attn.attn_scores",
            "decoder.attn.pattern",
        )


@pytest.mark.parametrize(("score", "rises"), [(2.0, True), (-2.0, False)])
def test_multiplying_moves_attention_by_the_sign_of_the_scores(score, rises) -> None:
    """Positive scores: more to the audio the larger alpha is; negative ones: less (MATA's trap)."""
    toy = hearing(copy_toy(3, 1, 0))
    toy.attend(1, 0, QUERY, MARKER, score)
    items = items_of([Cue(1, read=2), Cue(2, read=0)])
    keys = lambda item: 6  # noqa: E731  # where the cue is

    def masses(mode: str) -> list[float]:
        return [
            knockout.mass(toy, items, keys=6, layers=1, heads=0, do=do).mean().values.item()
            for alpha in (0.0, 0.2, 0.5, 1.0)
            for do in [edits.Multiply(alpha, 6, mode)]
        ]

    mult, by_size = masses("mult"), masses("mult_abs")
    assert mult == sorted(mult, reverse=not rises) and len(set(mult)) == 4
    assert by_size == sorted(by_size) and len(set(by_size)) == 4
    result = knockout.knock_out(toy, items, do=edits.Multiply(0.5, 6), layers=1, heads=0)
    share = "0%" if rises else "100%"
    assert any(f"negative in block 1: {share}. mult lowers" in line for line in result.report)
    negative = knockout.negative_scores(toy, items, keys=keys)
    assert negative.select(layer=1, head=0).values.tolist() == [0.0 if rises else 1.0] * 2


# -------------------------------------------------------------------------------- mass


def test_mass_is_what_patterns_hold(toy, heard) -> None:
    result = knockout.mass(toy, heard)
    assert result.dims == ("stimulus", "layer", "head")
    share = result.mean().values
    assert share[LAYER, HEAD] == pytest.approx(1, abs=1e-12)
    assert share[0].tolist() == pytest.approx([10 / 12] * 2, abs=1e-12)
    assert result.controls["even"].mean().values == pytest.approx(10 / 12)
    assert "head 1 of block 2" in result.report[0]
    part = knockout.mass(toy, heard, queries=[10, 11], keys=[0, 1, 2])
    assert part.select(layer=0, head=0).values.tolist() == pytest.approx(
        [(3 / 11 + 3 / 12) / 2] * 4, abs=1e-12
    )
    assert part.controls["random_keys"].select(layer=0, head=0).values.tolist() == pytest.approx(
        [(3 / 11 + 3 / 12) / 2] * 4, abs=1e-12
    )


def test_mass_is_read_with_edits_in_force(toy, heard) -> None:
    none = knockout.mass(toy, heard, do=edits.Weights(0.0, "audio", renormalise=False))
    assert none.values.abs().max() == 0 and none.controls["even"].values.min() > 0
    shared = knockout.mass(toy, heard, layers=0, do=edits.Bias(-0.5, "audio"))
    raised = 10 * torch.tensor(-0.5).double().exp().item()
    assert shared.values.flatten().tolist() == pytest.approx([raised / (raised + 2)] * 8)


def test_groups_are_drawn_in_place_of_items(toy, heard) -> None:
    spoken_by = Items(item.replaced(group="ab"[n % 2]) for n, item in enumerate(heard))
    result = knockout.knock_out(toy, spoken_by, layers=[LAYER], by="group")
    assert "2 of group" in result.meta["interval"] and result.low[1, 0] == 1


# -------------------------------------------------------------------------------- specialists


@pytest.fixture(scope="module")
def specialists():
    """Head 0 of block 1 brings the heard class if it is loud; head 1 of block 2 looks away then."""
    toy = two_stream_toy(1.0, 0.5, layer=1)
    toy.attend(2, 1, QUERY, MARKER, -60.0)
    return hearing(toy)


def test_the_head_that_hears_goes_with_right_answers(specialists) -> None:
    cues = [Cue(n % 4, read=(n + 1) % 4, loud=float(n % 3 > 0)) for n in range(12)]
    result = knockout.audio_specialists(specialists, items_of(cues))
    estimate = result.mean().values
    assert estimate[1, 0] == pytest.approx(1) and estimate[2, 1] == pytest.approx(-1)
    known = estimate.isfinite()
    assert known.sum() == 2  # the others attend to all items alike
    assert result.low[1, 0] == pytest.approx(1) and result.high[2, 1] == pytest.approx(-1)
    null = result.controls["permuted_labels"]
    assert abs(null.values[1, 0]) < 0.1 and -0.9 < null.low[1, 0] < 0 < null.high[1, 0] < 0.9
    assert "layer 1, head 0, layer 2, head 1" in result.report[1]


def test_what_is_right_may_be_given(specialists) -> None:
    cues = [Cue(n % 4, read=(n + 1) % 4, loud=float(n % 2)) for n in range(8)]
    turned = knockout.audio_specialists(
        specialists, items_of(cues), correct=[1.0 - n % 2 for n in range(8)]
    )
    assert turned.mean().values[1, 0] == pytest.approx(-1)
    with pytest.raises(InputError, match="8 items need as many values of correct, got 2"):
        knockout.audio_specialists(specialists, items_of(cues), correct=[0, 1])
    with pytest.raises(ControlError, match="the 8 labels are all the same"):
        knockout.audio_specialists(specialists, items_of(cues), correct=[1] * 8)
    speakers = Items(x.replaced(group="ab"[n % 2]) for n, x in enumerate(items_of(cues)))
    with pytest.raises(ControlError, match="within every group"):
        knockout.audio_specialists(specialists, speakers, by="group")


# -------------------------------------------------------------------------------- value zeroing


def test_zeroed_values_move_what_reads_them() -> None:
    toy = hearing(two_stream_toy(1.0, 0.5, layer=1))
    items = items_of([Cue(1, read=2), Cue(3, read=0)])
    result = knockout.value_zeroing(toy, items)
    assert result.dims == ("metric", "stimulus", "group", "layer")
    together = result.mean()
    lost = together.select(metric="logit_diff").values  # 1 of the heard class, 0.5 of the read
    assert lost.tolist() == [[0, 1, 0], [0, -0.5, 0]]
    distance = together.select(metric="distance").values
    assert distance[:, [0, 2]].abs().max() < 1e-12
    last = torch.zeros(4).double()  # the question's flag, what was heard, what was read
    last[:3] = torch.tensor([1.0, 1.0, 0.5])
    without = [last * torch.tensor([1, 0, 1, 1]), last * torch.tensor([1, 1, 0, 1])]
    expected = [1 - torch.cosine_similarity(last, x, dim=0).item() for x in without]
    assert distance[:, 1].tolist() == pytest.approx(expected)
    shares = together.select(metric="share").values[:, 1]
    assert shares.tolist() == pytest.approx([e / sum(expected) for e in expected])
    assert result.controls["identity"].select(metric="logit_diff").values.abs().max() == 0
    assert result.controls["identity"].select(metric="distance").values.abs().max() < 1e-12


def test_positions_one_by_one_are_the_published_score(toy, heard) -> None:
    """Only the cue's own position moves the question, in the copying block."""
    everywhere = {n: n for n in range(AUDIO_TOKENS + 2)}
    result = knockout.value_zeroing(toy, heard, keys=everywhere, layers=LAYER, controls=())
    share = result.select(metric="share", layer=LAYER).values
    for row, item in enumerate(heard):
        assert share[row].argmax() == 2 + int(item.answer)
        assert share[row].max() == pytest.approx(1, abs=1e-9)


# -------------------------------------------------------------------------------- real speech


@pytest.fixture(scope="module")
def spoken(embedded) -> Items:
    """Clips of unseen speakers that the model tells apart."""
    pairs, _ = spoken_items(48, seed=0, takes=range(20)).pairs(stream="audio").kept(embedded)
    return Items(pairs.clean)


@pytest.fixture(scope="module")
def few() -> Items:
    """Clips that methods are tried on, told apart or not."""
    return spoken_items(3, seed=0)


@pytest.fixture(scope="module")
def curve(embedded, spoken) -> Result:
    return knockout.knock_out(embedded, spoken)


@pytest.mark.slow
def test_the_last_position_listens_in_blocks_3_and_4(curve) -> None:
    lost = curve.select(metric="logit_diff").mean()
    assert sorted(torch.argsort(-lost.values)[:2].tolist()) == [3, 4]
    assert (lost.values[3:5] >= 1.5).all() and (lost.low[3:5] > 0.3).all()
    assert lost.controls["random_keys"].values.abs().max() < 0.1
    assert lost.controls["identity"].values.abs() < 1e-4
    assert set(curve.controls) == {"random_keys", "text_keys", "identity"}
    assert any("With the other clip" in line for line in curve.report)
    assert any(
        "Control random_keys (" in line and "of 58 such keys" in line for line in curve.report
    )


@pytest.mark.slow
def test_without_audio_in_all_blocks_little_is_left(embedded, spoken, curve) -> None:
    """Of about 18 logits between the right clip and the other one."""
    whole = knockout.knock_out(embedded, spoken, queries="text", window=6, controls=())
    unedited = knockout.knock_out(embedded, spoken, layers=0, controls=())
    told = next(line for line in unedited.report if "logit_diff" in line)
    left = float(told.rpartition(" of ")[2].rstrip(".")) - whole.mean().values[1, 0]
    assert abs(left) < 1
    gap = next(line for line in curve.report if "unedited, logit_diff falls by" in line)
    assert float(gap.partition("falls by ")[2].split()[0]) > 10


def test_a_curve_equals_forwards_with_the_edit_in_force(embedded, few) -> None:
    items = few[:2]
    curve = knockout.knock_out(embedded, items, controls=["identity"])
    for layer, site in ((3, "decoder.attn.attn_scores"), (5, "decoder.attn.attn_scores")):
        for row, item in enumerate(items):
            inputs = embedded.prepare([item.clip], [item.text])
            told = metrics.logit_diff(item.answer, item.against).bind(embedded, inputs)
            with intervene(embedded, Edit(site, edits.Block("audio"), layer=layer, where="last")):
                edited = told(embedded(inputs)).item()
            expected = told(embedded(inputs)).item() - edited
            found = curve.select(metric="logit_diff", layer=layer).values[row].item()
            assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_items_that_need_no_audio_stand_beside(embedded, spoken) -> None:
    """Here other clips stand for them: their own curve is the control."""
    result = knockout.knock_out(embedded, spoken[:4], text_only=spoken[4:8], controls=())
    control = result.controls["text_only"]
    assert control.dims == ("metric", "layer")
    assert any("4 items that need no audio lose" in line for line in result.report)
    plain = knockout.knock_out(embedded, spoken[4:8], controls=())
    torch.testing.assert_close(control.values, plain.mean().values)


@pytest.mark.slow
def test_mass_is_no_evidence(embedded, spoken, curve) -> None:
    """The last position attends to audio alone in blocks 3 and 4, and loses little without it."""
    share = knockout.mass(embedded, spoken).mean()
    assert (share.values[3:5] > 0.95).all() and share.controls["even"].values < 0.8
    lost = curve.select(metric="logit_diff").mean().values[3:5]
    assert (lost < 5).all()


@pytest.mark.slow
def test_value_zeroing_finds_the_same_blocks(embedded, spoken) -> None:
    result = knockout.value_zeroing(embedded, spoken[:8], controls=["identity"]).mean()
    audio = result.select(group="audio")
    assert audio.select(metric="distance").values.argmax() in (3, 4)
    assert (audio.select(metric="share").values[3:5] > 0.9).all()
    assert result.controls["identity"].select(metric="distance").values.abs().max() < 1e-6


@pytest.mark.slow
def test_the_analysis_gives_curve_and_mass(embedded, few, tmp_path) -> None:
    run = ANALYSES["knockout"]
    assert run.summary == "In which blocks does the answer depend on attention to the audio?"
    found = run.function(embedded, few, seed=1)
    assert list(found) == ["knock_out", "mass"] and found["knock_out"].n_kept == 3
    told = found["knock_out"].to_dict()
    assert told["axes"] == ["metric", "layer"] and told["seed"] == "1"
    saved = found["knock_out"].save(tmp_path / "knock_out.nc")
    assert Result.load(saved).report == found["knock_out"].report
    again = rerun(saved, embedded, few)
    torch.testing.assert_close(again.values, found["knock_out"].values)
    figure = found["knock_out"].plot(metric="logit_diff")
    assert figure.layout.title.text == "no attention from last to audio in decoder.attn"


@pytest.mark.slow
def test_an_edit_of_other_kinds_is_made_again_from_its_file(embedded, spoken, tmp_path) -> None:
    given = edits.Multiply(0.5, "audio", "mult_abs")
    result = knockout.knock_out(embedded, spoken[:2], do=given, controls=["identity"])
    again = rerun(result.save(tmp_path / "mata.nc"), embedded, spoken[:2])
    torch.testing.assert_close(again.values, result.values)
    assert any("mult_abs raises" in line for line in result.report)


# -------------------------------------------------------------------------------- families


def of_family(name: str, **batch):
    """A tiny random model, and items that are seeds of random batches of one row."""
    family = FAMILIES[name]
    model = family.hooked(family.build(dtype=torch.float64))
    for module in model.modules():  # a softmax in float32 rounds otherwise where it is fused
        if isinstance(module, Attention):
            module.softmax_float32 = False
        if isinstance(module, RMSNorm):
            module.precision = torch.float64

    def prepared(clips, *texts) -> AudioInputs:
        made = (family.batch(seed=int(x["array"][0]), dtype=torch.float64, **batch) for x in clips)
        return AudioInputs.joined([model.as_inputs(one) for one in made])

    model.prepare, model.to_single_token = prepared, int
    return model, Items(
        Item(torch.tensor([float(n)]), "?", "7", "9", sampling_rate=16_000) for n in (1, 2)
    )


def by_hand(model, items, hook, names) -> torch.Tensor:
    """What hooks cost every item in the logit difference."""
    lost = []
    for item in items:
        inputs = model.prepare([item.clip], ["?"])
        told = metrics.logit_diff(7, 9).bind(model, inputs)
        edited = model.run_with_hooks(inputs, fwd_hooks=[(name, hook) for name in names])
        lost.append((told(model(inputs)) - told(edited)).item())
    return torch.tensor(lost, dtype=torch.float64)


def test_whisper_reads_audio_by_cross_attention() -> None:
    """The clip fills the window: no other key is there, and nothing takes its place."""
    model, items = of_family("whisper", lengths=(220,), words=(5,))
    result = knockout.knock_out(model, items, window=2)
    assert result.meta["site"] == "decoder.cross_attn.pattern"
    assert set(result.controls) == {"random_keys", "identity", "sum_of_singles"}

    def deaf(pattern, hook):
        return torch.cat([pattern[:, :, :-1], 0 * pattern[:, :, -1:]], dim=2)

    names = [f"decoder.blocks.{layer}.cross_attn.hook_pattern" for layer in (1, 2)]
    found = result.select(metric="logit_diff", layer=1).values
    torch.testing.assert_close(found, by_hand(model, items, deaf, names), rtol=1e-9, atol=1e-10)
    share = knockout.mass(model, items)
    assert share.values.allclose(torch.ones_like(share.values))
    zeroed = knockout.value_zeroing(model, items)
    assert zeroed.dims == ("metric", "stimulus", "group", "layer")
    assert zeroed.coords["metric"] == ["distance", "log_prob", "logit_diff"]
    part = knockout.knock_out(model, items, keys=(0.0, 0.5), queries="all", layers=[0])
    assert part.values.abs().max() > 1e-3


def test_an_audio_llm_with_shared_keys() -> None:
    """Six heads over two of keys and values."""
    model, items = of_family("qwen2_audio", lengths=(201,), words=(5,))
    assert (model.cfg.decoder.n_heads, model.cfg.decoder.n_key_value_heads) == (6, 2)
    audio = model.timeline(model.prepare([items[0].clip], ["?"])).audio_span
    result = knockout.knock_out(model, items, heads=[1, 4], per_head=True)
    assert result.coords["head"] == [1, 4]

    def deaf(scores, hook):
        scores = scores.clone()
        scores[:, 4, -1, audio.start : audio.stop] = -torch.inf
        return scores

    found = result.select(metric="logit_diff", layer=1, head=4).values
    expected = by_hand(model, items, deaf, ["decoder.blocks.1.attn.hook_attn_scores"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)

    def mute(v, hook):
        v = v.clone()
        v[:, audio.start : audio.stop] = 0
        return v

    zeroed = knockout.value_zeroing(model, items, layers=[1], keys="audio", controls=())
    expected = by_hand(model, items, mute, ["decoder.blocks.1.attn.hook_v"])
    found = zeroed.select(metric="logit_diff", group="audio", layer=1).values
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_encoders_alone_are_named() -> None:
    model, items = of_family("wav2vec2", lengths=(6000,))
    with pytest.raises(InputError, match="has no decoder that attends to audio: name another"):
        knockout.knock_out(model, items)

    def metric(states):
        return states[:, -1, 3]

    own = knockout.knock_out(model, items, attention="encoder.attn", keys=[0, 1], metric=metric)
    assert own.values.abs().max() > 0 and set(own.controls) == {"random_keys", "identity"}
    moved = knockout.value_zeroing(model, items, attention="encoder.attn", keys=3, metric=metric)
    assert moved.select(metric="distance").values.min() > 0


# -------------------------------------------------------------------------------- bad input


WRONG = {
    "layers lie in 0 to 4": {"layers": 5},
    "window lies in 1 to 5": {"window": 6},
    "layers lie in 0 to 2": {"layers": 3, "window": 3},
    "heads lie in 0 to 1": {"heads": [2]},
    "no control 'destroyed'; there are random_keys": {"controls": ["destroyed"]},
    "keys are given twice": {"keys": "text", "do": edits.Bias(1.0, "audio")},
    "do edits attention: edits.Block": {"do": edits.Scale(0)},
    "4 items need one place, or as many": {"keys": ["audio", "audio"]},
    "selects no position": {"keys": (7.0, 8.0)},
}


@pytest.mark.parametrize(("message", "asked"), WRONG.items(), ids=list(WRONG))
def test_bad_input_is_named_early(toy, heard, message, asked) -> None:
    with pytest.raises(InputError, match=message):
        knockout.knock_out(toy, heard, **asked)


def test_what_is_not_there_is_named(toy, heard) -> None:
    with pytest.raises(SiteError, match="cross_attn"):
        knockout.knock_out(toy, heard, attention="decoder.cross_attn")
    with pytest.raises(InputError, match="no key left"):
        knockout.knock_out(toy, heard, queries="all", keys="all", controls=["identity"])
    with pytest.raises(InputError, match="keys name at least one group"):
        knockout.value_zeroing(toy, heard, keys={})
    with pytest.raises(InputError, match="no control 'empty'"):
        knockout.value_zeroing(toy, heard, controls="empty")
    with pytest.raises(InputError, match="do edits attention"):
        knockout.mass(toy, heard, do=edits.Scale(0))
    unasked = Items([item_of(Cue(1)).replaced(answer=None)])
    with pytest.raises(ValueError, match="has no answer"):
        knockout.knock_out(toy, unasked)
    with pytest.raises(InputError, match="text_only items are measured by log_prob"):
        knockout.knock_out(toy, heard, text_only=Items([item_of(Cue(1, read=1))]))
