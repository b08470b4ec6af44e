"""Defence: attacks that keep to their ball, a planted adversarial neuron, and the shipped clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.answering import NAMES, RATE, SAMPLES, AnsweringToy, copying
from audio_lens import Item, Items
from audio_lens.analysis import defence
from audio_lens.analysis.defence import Attack, Ranking
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import ANALYSES, ItemError, Pairs, rerun
from audio_lens.models.embedded import clip_pairs
from audio_lens.results import Result
from audio_lens.sites import SiteError
from toys import AUDIO_CLASS, TEXT_CLASS, Cue, prompt

FLAG, TARGET = TEXT_CLASS.start, 3  # what noise adds to every frame, and what a neuron makes of it


class FlaggedToy(AnsweringToy):
    """The copying toy, whose prompts are flagged where the clip's last sample is not 0."""

    def prepare(self, audio, text=None, sampling_rate=None) -> AudioInputs:
        prompts = []
        for clip in audio:
            said = np.asarray(clip["array"])
            made = prompt(Cue(heard=int(said[:-1].argmax())))
            made.features[0, FLAG] += float(said[-1])
            prompts.append(made)
        return AudioInputs.joined(prompts)


def flagged_toy() -> FlaggedToy:
    """A neuron of block 1 turns the flag into class 3 in front of the block that copies."""
    toy = FlaggedToy(5)
    toy.load_state_dict(copying().state_dict())
    toy.neuron(1, 2, {FLAG: 1.0}, {FLAG: 1.0}, {AUDIO_CLASS.start + TARGET: 4.0})
    return toy


def flagged(count: int = 4) -> Attack:
    """Clips of the classes 0 to 2, with a flag and without."""

    def clip(heard: int, flag: float) -> np.ndarray:
        samples = np.zeros(SAMPLES, np.float32)
        samples[heard], samples[-1] = 1.0, flag
        return samples

    sides = [
        Items(
            Item(clip(n % 3, flag), "which?", answer=NAMES[n % 3], id=f"{n}", sampling_rate=RATE)
            for n in range(count)
        )
        for flag in (0.0, 1.0)
    ]
    nothing = Result(torch.ones(count), ("stimulus",), {"stimulus": [f"{n}" for n in range(count)]})
    return Attack(Pairs(*sides), [NAMES[TARGET]] * count, 1.0, nothing)


def asked(count: int = 8) -> Items:
    """The shipped clips, asked without a transcript."""
    return Items(
        Item(pair.clean, pair.question, answer=pair.answer, against=pair.against, group=pair.voice)
        for pair in clip_pairs()[:count]
    )


# -------------------------------------------------------------------------------- planted


def test_the_planted_neuron_is_found_and_its_defence_beats_random_ones():
    toy, made = flagged_toy(), flagged(6)
    ranking = defence.rank(toy, made.pairs, "decoder.mlp.post")
    assert ranking.top(5).nonzero().tolist() == [[1, 2]]  # one of 20
    assert ranking.random(5, seed=0).nonzero().tolist() != [[1, 2]]
    result = defence.defend(
        toy, made, ranking, how=["patch", "prune"], percents=[5, 100], progress=False
    )
    right = result.select(metric="right", input="attacked")
    bare = result.controls["undefended"].select(metric="right")
    assert bare.mean().values.tolist() == [1, 0]
    assert (right.select(percent=5).mean().values == 1).all()
    drawn = right.controls["random_neurons"].select(percent=5)
    assert (drawn.mean().values == 0).all()
    assert (result.controls["whole_stream"].select(metric="right").values == 1).all()
    target = result.controls["undefended"].select(metric="target", input="attacked")
    assert (target.values == 1).all()


def test_defences_are_the_slow_loops(tmp_path):
    toy, made = flagged_toy(), flagged(3)
    ranking = defence.rank(toy, made.pairs, "decoder.mlp.post")
    result = defence.defend(
        toy, made, ranking, how=["patch", "prune", "bias"], percents=[15], bias=0.25, progress=False
    )
    clean, attacked = (side.prepare(toy) for side in (made.pairs.clean, made.pairs.corrupted))
    _, cache = toy.run_with_cache(clean)
    chosen = ranking.top(15)

    def hooks(how):
        def change(layer):
            def fn(x, hook):
                new = {"patch": cache[hook.name], "prune": x * 0, "bias": x + 0.25}[how]
                return torch.where(chosen[layer], new, x)

            return fn

        return [(f"decoder.blocks.{n}.mlp.hook_post", change(n)) for n in range(5)]

    for how in ("patch", "prune", "bias"):
        for name, inputs in (("clean", clean), ("attacked", attacked)):
            logits = toy.run_with_hooks(inputs, fwd_hooks=hooks(how))[:, -1].log_softmax(-1)
            wanted = logits.gather(-1, torch.tensor([[0], [1], [2]]))[:, 0]
            at = {"metric": "log_prob", "input": name, "defence": how, "percent": 15}
            torch.testing.assert_close(result.select(**at).values, wanted.double())
    again = Result.load(result.save(tmp_path / "defended.nc"))
    torch.testing.assert_close(again.values, result.values)


def test_scores_do_not_depend_on_padding():
    scores = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    ranking = Ranking("decoder.mlp.post", [0, 4], scores)
    assert ranking.top(50).tolist() == [[True, False], [True, False]]
    assert ranking.random(25, seed=1).sum() == 1 and ranking.count(1) == 1
    edits = ranking.edits(ranking.top(75), defence.defending.Put(0.0), "all")
    assert [(edit.layer, edit.neuron) for edit in edits] == [(0, None), (4, [0])]


def test_what_is_no_defence_says_why():
    toy, made = flagged_toy(), flagged(3)
    site = {"site": "decoder.mlp.post", "progress": False}
    with pytest.raises(InputError, match="how is some of patch, prune, bias, got 'patched'"):
        defence.defend(toy, made, how=["patched"], **site)
    with pytest.raises(InputError, match="percents must be"):
        defence.defend(toy, made, percents=[120], **site)
    with pytest.raises(SiteError, match="has no neurons in blocks"):
        defence.defend(toy, made, site="decoder.resid_pre")
    with pytest.raises(ItemError, match="the reference has no item"):
        defence.defend(toy, made, reference=made.pairs.clean[[0]], **site)
    ranking = defence.rank(toy, made.pairs, "decoder.mlp.post")
    with pytest.raises(InputError, match=r"leave out site="):
        defence.defend(toy, made, ranking, site="decoder.mlp.pre")


# -------------------------------------------------------------------------------- attacks


@pytest.fixture(scope="module")
def attacked(embedded) -> Attack:
    return defence.attack(embedded, asked(4)[2:], steps=8, progress=False)


def test_attacks_keep_to_the_ball_and_lower_the_cross_entropy(embedded, attacked):
    sides = zip(attacked.pairs.clean, attacked.pairs.corrupted, strict=True)
    rate = embedded.cfg.sampling_rate
    for clean, noisy in sides:
        own = embedded.load_audio(clean.clip, None)
        assert np.abs(noisy.audio - own).max() <= attacked.eps + 1e-7
        assert np.abs(noisy.audio).max() <= 1 and noisy.sampling_rate == rate
    ces = attacked.result.values
    assert float(ces.min(1).values.mean()) * 5 < float(ces[:, 0].mean())  # the contract's floor
    noise = attacked.result.controls["random_noise"].values
    assert float(noise.mean()) > 0.7 * float(ces[:, 0].mean())
    assert list(attacked.targets) == [item.against for item in attacked.pairs.clean]


@torch.no_grad()
def test_the_first_cross_entropy_is_that_of_the_clip(embedded, attacked):
    for row in range(len(attacked)):
        logits = embedded(attacked.pairs.clean[[row]].prepare(embedded))[0, -1].log_softmax(-1)
        wanted = -float(logits[embedded.to_single_token(attacked.targets[row])])
        assert float(attacked.result.values[row, 0]) == pytest.approx(wanted, rel=1e-4)
        noisy = attacked.pairs.corrupted[[row]].prepare(embedded)
        target = embedded.to_single_token(attacked.targets[row])
        least = -float(embedded(noisy)[0, -1].log_softmax(-1)[target])
        found = float(attacked.result.values[row].min())
        assert found == pytest.approx(least, rel=1e-3, abs=1e-4)


def test_attacks_are_towards_own_answers_alone(embedded):
    items = asked(3)
    with pytest.raises(InputError, match="no answer or option of these items"):
        defence.attack(embedded, items, targets=["how", "to", "do"])
    with pytest.raises(InputError, match="its own answer"):
        defence.attack(embedded, items, targets=[str(item.answer) for item in items])
    with pytest.raises(InputError, match="one answer for each of 3 items"):
        defence.attack(embedded, items, targets=["two"])
    with pytest.raises(InputError, match="eps must be"):
        defence.attack(embedded, items, eps=0)
    alone = Items([items[0].replaced(against=None)])
    with pytest.raises(ItemError, match="no item names another answer"):
        defence.attack(embedded, alone)
    wrong = Items(item.replaced(answer=item.against, against=None) for item in items)
    with pytest.raises(ItemError, match="no item of 3 is left to attack"):
        defence.attack(embedded, wrong)


def test_clips_move_no_further_once_they_are_below_the_stop(embedded):
    with pytest.raises(ItemError, match="no noise was needed"):
        defence.attack(embedded, asked(2), steps=1, stop=1000.0, progress=False)


@pytest.mark.slow
def test_whole_sites_on_the_embedded_model(embedded):
    """CORRECTIONS A3: all encoder neurons bring the clean answers back; the decoder's do not."""
    made = defence.attack(embedded, asked(), progress=False)
    ces = made.result.values
    assert float(ces.min(1).values.mean()) * 5 < float(ces[:, 0].mean())
    kept = {}
    for site in ("encoder.mlp.post", "decoder.mlp.post"):
        result = defence.defend(
            embedded, made, site=site, how=["patch"], percents=[100], progress=False
        )
        kept[site] = result.select(metric="right", input="attacked").mean().values.item()
        stream = result.controls["whole_stream"].select(metric="log_prob").values
        clean = result.controls["undefended"].select(metric="log_prob", input="clean").values
        torch.testing.assert_close(stream, clean, rtol=1e-4, atol=1e-4)
        bare = result.controls["undefended"].select(metric="right", input="attacked").mean()
        assert float(bare.values) <= 0.5
    assert kept["encoder.mlp.post"] == 1
    assert kept["decoder.mlp.post"] < 0.5


@pytest.mark.slow
def test_robustness_is_measured_again_from_its_file(embedded, tmp_path):
    options = {"steps": 8, "percents": [20], "how": ["patch"], "progress": False}
    result = defence.robustness(embedded, asked(), **options)
    assert result.meta["method"] == "defence.robustness" and "defence" in ANALYSES
    again = rerun(result.save(tmp_path / "robust.nc"), embedded)
    torch.testing.assert_close(again.values, result.values)
