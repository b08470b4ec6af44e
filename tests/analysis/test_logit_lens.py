"""The logit lens over items: planted toys, real speech of unseen speakers, and bad input."""

import math

import answering
import pytest
import torch

from audio_lens import Items, Words, intervene
from audio_lens.analysis import logit_lens
from audio_lens.analysis.logit_lens.reading import residuals_of, through_lens
from audio_lens.analysis.logit_lens.vocabulary import first_tokens, reads_text
from audio_lens.inputs import InputError
from audio_lens.items import ANALYSES, ControlError, ItemError, rerun
from audio_lens.models import TokenError
from audio_lens.places import Ground
from families import FAMILIES
from items import speech

QUICK = ("whisper", "wav2vec2_ctc", "moshi", "musicgen", "beats")


@pytest.fixture(scope="module")
def spoken() -> Items:
    by_answer = speech.spoken_items(160, seed=9).by("answer")
    return Items(
        item for number in range(4) for item in [part[number] for part in by_answer.values()]
    )


# -------------------------------------------------------------------------------- toys


def test_information_of_the_copying_toy_rises_where_it_copies():
    result = logit_lens.information(answering.copying(), answering.items())
    assert result.dims == ("stimulus", "layer") and result.coords["layer"] == list(range(6))
    assert result.estimate.tolist() == [0.25, 0.25, 0.25, 1, 1, 1]
    assert result.controls["no_audio"].estimate.tolist() == [0.25] * 6
    assert result.controls["other_item"].estimate[3:].tolist() == [0, 0, 0]
    assert result.meta["chance"] == "0.25" and "onset 3 (3 to 3)" in result.report[0]


def test_landmarks_of_the_copying_toy():
    result = logit_lens.critical(answering.copying(), answering.items())
    assert result.coords["landmark"] == ["critical", "onset", "peak"]
    assert result.estimate.tolist() == [4, 3, 3]
    assert result.low.tolist() == pytest.approx([4, 3, 3]) == result.high.tolist()
    assert result.select(stimulus="1").values.tolist() == [4, 3, 3]  # "c1", by itself


def test_an_early_block_moves_the_rise():
    result = logit_lens.information(answering.copying(layer=0), answering.items())
    assert result.estimate.tolist() == [0.25, 1, 1, 1, 1, 1]


def test_probability_of_the_copying_toy_is_a_softmax():
    result = logit_lens.probability(answering.copying(), answering.items())
    late = math.e / (math.e + 9)  # one logit of 1 among ten tokens
    assert result.estimate.tolist() == pytest.approx([0.1] * 3 + [late] * 3, abs=1e-12)


def test_right_items_keep_rising_and_wrong_ones_fall():
    items = answering.items()
    result = logit_lens.outcomes(answering.forgetting(), items)
    assert result.select(outcome="right").estimate.tolist() == [1] * 7  # all "c0"
    assert result.select(outcome="wrong").estimate.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert "3 of 12 items end up right. Of the others 0.00" in result.report[0]


def test_several_places_are_an_axis():
    places = {"question": "last", "clip": "audio"}
    result = logit_lens.information(answering.copying(), answering.items(), places)
    assert result.dims == ("stimulus", "layer", "group")
    assert result.select(group="question").estimate[3:].tolist() == [1, 1, 1]
    clip = result.select(group="clip").estimate  # behind the cue all positions may look at it
    assert clip.tolist() == pytest.approx([0.25] * 3 + [(0.25 * 6 + 4) / 10] * 3)


def test_a_result_is_made_again_from_its_file(tmp_path):
    toy, items = answering.copying(), answering.items()
    result = logit_lens.information(toy, items, seed=3)
    again = rerun(result.save(tmp_path / "information.nc"), toy, items)
    assert torch.equal(again.values, result.values) and torch.equal(again.low, result.low)


def test_the_written_token_of_the_copying_toy_settles_where_it_is_copied():
    result = logit_lens.saturation(answering.copying(), answering.items())
    settled = dict(zip(result.coords["stimulus"], result.values[:, 0].tolist(), strict=True))
    assert settled["0"] == [1] * 6  # "c0" is what nothing gives, too
    assert settled["1"] == settled["2"] == [0, 0, 0, 1, 1, 1]


def test_unequal_answers_count_the_same():
    many = [answering.item(0, number) for number in range(30)]
    items = Items([*many, *(answering.item(c, c) for c in (1, 2, 3))])
    result = logit_lens.information(answering.copying(), items)
    assert result.estimate[0] == pytest.approx(0.25)
    assert result.values[:, 0].mean() == pytest.approx(30 / 33)


# -------------------------------------------------------------------------------- landmarks


def test_critical_layers_by_hand():
    curve = torch.tensor([0.1, 0.1, 0.5, 0.9, 1.0])
    assert logit_lens.critical_layer(curve, 0.1) == pytest.approx((1 + 2.7 + 4) / 2.4)
    excess = logit_lens.critical_layer(curve, 0.1, excess=True)
    assert excess == pytest.approx((2 * 0.38 + 3 * 0.78 + 4 * 0.88) / (0.38 + 0.78 + 0.88))
    at = logit_lens.critical_layer(curve, 0.1, layers=[10, 11, 12, 13, 14])
    assert at == pytest.approx(10 + (1 + 2.7 + 4) / 2.4)
    assert logit_lens.threshold(0.1) == pytest.approx(0.12)


@pytest.mark.parametrize("at", range(6))
def test_a_step_has_its_onset_at_its_layer(at):
    curve = torch.where(torch.arange(6) >= at, 1.0, 0.1)
    assert logit_lens.onset(curve, 0.1) == at and logit_lens.peak(curve) == at
    assert logit_lens.critical_layer(curve, 0.1) == pytest.approx((at + 5) / 2)


def test_nothing_above_the_threshold_has_no_layer():
    flat = torch.full((2, 4), 0.12)
    assert logit_lens.critical_layer(flat, 0.1).isnan().all()
    assert logit_lens.onset(flat, 0.1).isnan().all()


def test_an_early_bump_is_no_onset():
    assert logit_lens.onset(torch.tensor([0.1, 0.9, 0.1, 0.9, 0.9]), 0.1) == 3
    assert logit_lens.onset(torch.tensor([0.9, 0.9, 0.1]), 0.1).isnan()


def test_saturation_layers_by_hand():
    top = torch.tensor([[4, 1], [7, 4], [7, 1], [7, 4]])  # streams by tokens
    assert logit_lens.saturation_layer(top).tolist() == [1, 3]


# -------------------------------------------------------------------------------- enrichment


@pytest.mark.parametrize(("mode", "rescale"), [("add", "none"), ("average", "keep_norm")])
def test_enrichment_brings_back_what_a_block_forgot(mode, rescale):
    toy, items = answering.forgetting(), answering.items()
    result = logit_lens.enrichment(toy, items, 2, 5, mode=mode, rescale=rescale)
    assert result.dims == ("metric", "stimulus", "c") and result.coords["c"] == [0.2, 0.5, 1.0]
    accuracy = result.of_metric("accuracy")
    assert accuracy.controls["identity"].estimate == 0.25
    assert accuracy.estimate.tolist() == [0.25, 1, 1]
    assert accuracy.controls["other_item"].estimate[-1] == 0
    assert "more items are right than without it (0.25), at best 1.00" in result.report[0]


def test_an_average_is_a_sum_of_other_size():
    toy, items = answering.forgetting(), answering.items(1)
    inputs = next(iter(items.batches(toy))).inputs
    _, cache = toy.run_with_cache(inputs)
    read = "decoder.blocks.{}.hook_resid_pre"
    with intervene(toy, logit_lens.enrich(2, 5, 0.5, mode="average")):
        _, changed = toy.run_with_cache(inputs)
    wanted = (cache[read.format(5)] + 0.5 * cache[read.format(2)]) / 1.5
    assert torch.allclose(changed[read.format(5)][:, -1], wanted[:, -1], atol=1e-12)
    assert torch.equal(changed[read.format(5)][:, :-1], cache[read.format(5)][:, :-1])
    assert torch.equal(changed[read.format(2)], cache[read.format(2)])


def test_enrichment_holds_while_the_model_writes():
    toy, items = answering.forgetting(), answering.items(1)
    inputs = next(iter(items.batches(toy))).inputs
    first = inputs.tokens.shape[1]
    assert toy.generate(inputs, 1, return_type="tokens")[:, first].tolist() == [0, 0, 0, 0]
    with intervene(toy, logit_lens.enrich(2, 5)):
        assert toy.generate(inputs, 1, return_type="tokens")[:, first].tolist() == [0, 1, 2, 3]


def test_the_setting_is_chosen_on_other_items():
    toy, items = answering.forgetting(), answering.items(6)
    result = logit_lens.selected(toy, items, sources=[0, 2], targets=[4, 5], c=[0.1, 1.0])
    assert (result.meta["source"], result.meta["target"], result.meta["c"]) == ("2", "5", "1")
    assert result.of_metric("accuracy").estimate.tolist() == [1]
    assert result.n_kept < len(items) and "was best on 16 items" in result.report[0]


def test_the_grid_leaves_out_targets_in_front_of_their_source():
    result = logit_lens.grid(answering.forgetting(), answering.items(1), [2, 4], [3, 5], [1.0])
    accuracy = result.of_metric("accuracy").estimate[..., 0]
    assert accuracy[1, 0].isnan() and accuracy[0, 1] == 1 and result.meta["unedited"] == "0.25"


@pytest.mark.slow
def test_enrichment_does_not_help_where_nothing_is_forgotten(embedded, spoken):
    accuracy = logit_lens.enrichment(embedded, spoken, 4, 5).of_metric("accuracy")
    plain = accuracy.controls["identity"].estimate
    assert (accuracy.estimate - plain).abs().max() <= 0.05
    assert accuracy.controls["other_item"].estimate[-1] <= plain - 0.05


# -------------------------------------------------------------------------------- real speech


@pytest.mark.slow
def test_the_answer_of_real_speech_rises_to_what_is_written(embedded, spoken):
    told = logit_lens.information(embedded, spoken)
    assert told.estimate[-1] >= 0.85 and told.estimate[0] <= 0.15
    assert (told.low <= told.estimate).all() and (told.estimate <= told.high).all()
    for control in told.controls.values():
        assert (control.estimate <= 0.25).all()
    silent = told.controls["no_audio"]
    assert (silent.low <= 0.1).all() and (silent.high >= 0.1).all()
    assert told.n_kept == 40 and told.meta["options"].count(",") == 9


@pytest.mark.slow
def test_wrong_items_end_wrong(embedded):
    result = logit_lens.outcomes(embedded, speech.spoken_items(96, seed=9))
    right, wrong = (result.select(outcome=name).estimate for name in ("right", "wrong"))
    assert right[-1] == 1 and not wrong[-1] >= 0.1


def test_values_are_those_of_each_item_by_itself(embedded, spoken):
    few = spoken[:4]
    told = logit_lens.information(embedded, few)
    options = told.meta["options"].split(", ")
    ids = torch.tensor([embedded.to_single_token(option) for option in options])
    for item in list(few)[:3]:
        logits, cache = embedded.run_with_cache(embedded.prepare([item.clip], [item.text]))
        lens = cache.logit_lens().values[:, 0, ids]
        assert torch.allclose(lens[-1], logits[0, -1, ids], atol=1e-4)
        right = [options[i] == item.answer for i in lens.argmax(-1).tolist()]
        assert told.select(stimulus=item.id).values.tolist() == [float(one) for one in right]


def test_the_last_stream_is_what_the_model_writes():
    toy, items = answering.forgetting(), answering.items(1)
    inputs = next(iter(items.batches(toy))).inputs
    own = toy(inputs)[:, -1].softmax(-1)[torch.arange(4), torch.arange(4)]
    last = logit_lens.probability(toy, items).values[:, -1]
    assert torch.allclose(last, own, atol=1e-14)


def test_a_begun_answer_is_read_behind_its_prefix(embedded, spoken):
    few = spoken[:6]
    begun = logit_lens.prefixed(embedded, few, "The digit is")
    plain, longer = few.prepare(embedded).tokens, begun.prepare(embedded).tokens
    assert torch.equal(longer[:, : plain.shape[1]], plain)
    assert embedded.tokenizer.decode(longer[0, plain.shape[1] :]).strip() == "The digit is"
    places = {"end": "last", "prefix": Words("digit is")}
    result = logit_lens.information(embedded, begun, places)
    assert result.estimate[0, 0] <= 0.5 and result.n_kept == 6


def test_the_command_line_has_both_results():
    told = ANALYSES["logit_lens"].function(answering.copying(), answering.items(2))
    assert list(told) == ["information", "outcomes"]
    assert ANALYSES["logit_lens"].summary.endswith("?")


# -------------------------------------------------------------------------------- tuned lens


def test_a_tuned_lens_is_nearer_to_what_is_written(embedded, spoken, tmp_path):
    train, test = spoken[:16].split()
    lens = logit_lens.train(embedded, train, steps=5)
    plain = logit_lens.divergence(embedded, test, "all").estimate
    tuned = logit_lens.divergence(embedded, test, "all", lens=lens).estimate
    assert (tuned[:-1] < plain[:-1]).all() and tuned[-1] == plain[-1] == 0
    again = logit_lens.TunedLens.load(lens.save(tmp_path / "lens.safetensors"))
    resid = torch.randn(7, 3, embedded.cfg.decoder.d_model)
    assert torch.equal(again(resid), lens(resid)) and torch.equal(lens(resid)[-1], resid[-1])
    assert again.meta == lens.meta and again.model == "embedded"
    with pytest.raises(InputError, match="this tuned lens is of embedded with other weights"):
        logit_lens.information(answering.copying(), answering.items(), lens=lens)


def test_a_translator_of_zeros_is_the_plain_lens():
    toy, items = answering.forgetting(), answering.items(2)
    d = toy.cfg.decoder.d_model
    zeros = torch.zeros(6, d, d).double(), torch.zeros(6, d).double()
    lens = logit_lens.TunedLens.of(toy, *zeros)
    plain, tuned = (logit_lens.probability(toy, items, lens=one) for one in (None, lens))
    assert torch.equal(plain.values, tuned.values) and tuned.meta["lens"] == "tuned"


def test_a_file_without_a_tuned_lens_is_named(tmp_path):
    (tmp_path / "other").write_bytes(b"no")
    for name in ("other", "gone"):
        with pytest.raises(InputError, match="holds no tuned lens"):
            logit_lens.TunedLens.load(tmp_path / name)


# -------------------------------------------------------------------------------- families


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_the_last_stream_of_every_family_is_its_text_or_it_is_refused(name):
    family = FAMILIES[name]
    model = family.hooked(family.build())
    if not reads_text(model):
        with pytest.raises(InputError, match="has no vocabulary that a logit lens could read"):
            logit_lens.information(model, answering.items())
        return
    inputs = model.as_inputs(family.batch())
    held = residuals_of(model, [*range(len(inputs))], inputs, {"": "all"})
    ground = Ground.of(model, inputs, model.output_part)
    logits = model(inputs)
    text = model.stream(logits, "text") if model.cfg.output_kind == "streams" else logits
    lens = through_lens(model, held, lambda log_probs: log_probs)
    assert torch.allclose(lens[-1], text[ground.valid].log_softmax(-1), atol=1e-4)
    assert not torch.allclose(lens[0], lens[-1], atol=1e-2)


# -------------------------------------------------------------------------------- options


class Spelled:
    """A tokenizer of known texts."""

    unk_token_id = 0

    def __init__(self, known: dict[str, list[int]]):
        self.known = known

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.known.get(text, [0])

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]


@pytest.mark.parametrize(
    ("known", "tokens"),
    [
        ({"dog": [1], " dog": [2], "cat": [3], " cat": [4]}, [[1, 2], [3, 4]]),
        ({"dog": [1], " dog": [1], "cat": [3], " cat": [3]}, [[1], [3]]),
        ({"dog": [1, 7], " dog": [2], "cat": [1, 8], " cat": [4]}, [[2], [4]]),
        ({"dog": [1], " dog": [9, 1], "cat": [3], " cat": [9, 3]}, [[1], [3]]),
        ({"dog": [1], "cat": [3]}, [[1], [3]]),
    ],
)
def test_first_tokens_of_options(known, tokens):
    toy = answering.copying()
    toy.tokenizer = Spelled(known)
    assert first_tokens(toy, ["dog", "cat"]) == tokens


def test_options_that_begin_alike_are_named():
    toy = answering.copying()
    toy.tokenizer = Spelled({"dog": [1, 7], "cat": [1, 8]})
    with pytest.raises(TokenError, match="'dog' and 'cat' both begin with the token '<1>'"):
        first_tokens(toy, ["dog", "cat"])
    toy.tokenizer = Spelled({})
    with pytest.raises(TokenError, match="does not know all of the options"):
        first_tokens(toy, ["dog", "cat"])


# -------------------------------------------------------------------------------- bad input


def test_items_that_cannot_be_asked_are_named():
    toy, items = answering.copying(), answering.items()
    lacking = Items(item.replaced(answer=None) for item in items)
    with pytest.raises(ItemError, match="12 items have no answer"):
        logit_lens.information(toy, lacking)
    unequal = Items([items[0], items[1].replaced(options=answering.NAMES[:2])])
    with pytest.raises(ItemError, match="options are unequal"):
        logit_lens.information(toy, unequal)
    alike = Items(item.replaced(answer="c1", options=()) for item in items)
    with pytest.raises(ItemError, match="all items have the answer 'c1'"):
        logit_lens.information(toy, alike)
    with pytest.raises(ControlError, match="other_item needs two items"):
        logit_lens.information(toy, items[:1])
    with pytest.raises(InputError, match="selects no position"):
        logit_lens.information(toy, items, (90.0, 91.0))


def test_enrichments_that_make_no_sense_are_named():
    toy, items = answering.forgetting(), answering.items()
    with pytest.raises(InputError, match="the target lies behind the source, got 4 and 2"):
        logit_lens.enrichment(toy, items, 4, 2)
    with pytest.raises(InputError, match="divides by 0"):
        logit_lens.enrich(2, 4, -1, mode="average")
    with pytest.raises(InputError, match="no amounts"):
        logit_lens.enrichment(toy, items, 2, 4, [])
    with pytest.raises(InputError, match="no target lies behind a source"):
        logit_lens.grid(toy, items, [4], [2])


def test_prefixes_and_curves_that_are_none_are_named(embedded, spoken):
    with pytest.raises(InputError, match="a prefix needs some text"):
        logit_lens.prefixed(embedded, spoken, " ")
    with pytest.raises(InputError, match="chance lies between 0 and 1"):
        logit_lens.onset(torch.zeros(3), 1.0)
    with pytest.raises(InputError, match="3 layers need as many coordinates, got 2"):
        logit_lens.peak(torch.zeros(3), layers=[0, 1])
