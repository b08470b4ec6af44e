"""Training sparse autoencoders: planted directions, what is learned from, checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import planted
import pytest
import torch

from audio_lens import Item, Items, collect
from audio_lens.analysis import autoencoders
from audio_lens.analysis.autoencoders import Autoencoder, learning, training
from audio_lens.analysis.autoencoders.rows import Source, Stream
from audio_lens.errors import InputError
from audio_lens.items import Activations
from audio_lens.items.shards import ActivationsError

SHORT = {"steps": 40, "batch": 64, "progress": False}


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return planted.rows(20_000)


@pytest.fixture(scope="module")
def revived(rows: torch.Tensor) -> tuple[Autoencoder, float]:
    """Trained from a start of which 70 % are dead, and the CPU seconds that took."""
    start = time.process_time()
    found = autoencoders.train(
        rows, 64, 4, start=planted.born_dead(), known=planted.directions(), progress=False
    )
    return found, time.process_time() - start


# -------------------------------------------------------------------------------- planted truth


def test_planted_directions_are_found_though_most_latents_are_born_dead(revived) -> None:
    found, seconds = revived
    assert seconds <= 10
    assert planted.mean_best_cosine(found) >= 0.95
    assert autoencoders.found_share(planted.directions(), found.directions) >= 0.95
    assert found.history["found"][-1] >= 0.95
    assert found.history["dead"][0] < 0.7  # the first revival comes before the first note
    assert found.history["dead"][-1] == 0


def test_without_revival_the_dead_stay_dead(rows: torch.Tensor) -> None:
    found = autoencoders.train(
        rows, 64, 4, start=planted.born_dead(), resample=0, steps=300, progress=False
    )
    assert found.history["dead"][-1] == pytest.approx(45 / 64)
    assert planted.mean_best_cosine(found) < 0.8


def test_topk_has_k_latents_in_every_row(revived) -> None:
    active = (revived[0].encode(planted.rows(2000, seed=5)) > 0).sum(1)
    assert active.min() == active.max() == 4


def test_directions_have_unit_length(revived) -> None:
    assert torch.allclose(revived[0].directions.norm(dim=1), torch.ones(64), atol=1e-5)


def test_kept_by_the_batch_and_by_the_threshold_there_are_as_many(rows: torch.Tensor) -> None:
    found = autoencoders.train(rows, 64, 4, kind="batchtopk", steps=800, progress=False)
    assert found.history["l0"][-1] == pytest.approx(4, abs=0.01)
    active = (found.encode(planted.rows(4000, seed=5)) > 0).sum(1).float()
    assert active.mean() == pytest.approx(4, rel=0.05)
    assert active.min() < active.max()
    alone = found.encode(planted.rows(1, seed=6))  # whatever else is in the batch
    beside = found.encode(torch.cat([planted.rows(1, seed=6), rows[:9]]))[:1]
    assert torch.allclose(alone, beside, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind, most", [("relu", 0.65), ("jumprelu", 0.12)])
def test_other_kinds_come_to_the_number_that_was_asked_for(
    rows: torch.Tensor, kind: str, most: float
) -> None:
    found = autoencoders.train(rows, 64, 4, kind=kind, rate=5e-3, steps=1500, progress=False)
    quality = autoencoders.evaluate(found, planted.rows(4000, seed=5)).mean()
    fvu, l0 = quality.values.tolist()
    assert l0 == pytest.approx(4, rel=0.1)
    assert fvu < most
    assert planted.mean_best_cosine(found) > 0.9


def test_gradients_of_thresholds_are_those_of_the_rectangle() -> None:
    values = torch.tensor([[0.12, 0.5, 0.06]], requires_grad=True)
    threshold = torch.tensor([0.1, 0.1, 0.1], requires_grad=True)
    kept, counts = autoencoders.activating.jump(values, threshold)
    assert torch.allclose(kept, torch.tensor([[0.12, 0.5, 0.0]]))
    assert counts.tolist() == [2]
    kept.sum().backward(retain_graph=True)
    assert values.grad.tolist() == [[1, 1, 0]]
    assert torch.allclose(threshold.grad, torch.tensor([-1.0, 0, -1.0]))
    counts.sum().backward()
    assert values.grad.tolist() == [[1, 1, 0]]
    assert torch.allclose(threshold.grad, torch.tensor([-11.0, 0, -11.0]))


@pytest.mark.parametrize("case", ["even", "one row", "sampled column", "few positive", "none"])
def test_the_largest_of_a_batch_are_those_of_all_rows_together(case: str) -> None:
    """Also where the values that are sampled are unlike the others."""
    values = torch.randn(50, 61, generator=torch.Generator().manual_seed(2))
    if case == "one row":
        values[3] += 20
    elif case == "sampled column":
        values[:, 0] += 20
    elif case != "even":
        values -= 2.5 if case == "few positive" else 9
    kept, least = autoencoders.activating.largest_of_all(values, 2)
    expected = values.flatten().sort(descending=True).values[:100]
    assert torch.equal(kept, torch.where(values >= expected[-1], values, 0.0).relu())
    assert least == (float("inf") if case == "none" else expected[expected > 0].min().item())


def test_the_step_is_the_one_of_the_plain_formula() -> None:
    """Against the formula written out, with autograd and Adam over all of it."""
    x = planted.rows(64)
    setting = learning.Setting(16, 3, "topk", 10, 64, 1e-2, 0, 0, 1000)
    learner = learning.Learner.of(setting, x, None)
    own = {name: p.detach().clone().requires_grad_() for name, p in learner.own.items()}
    adam = torch.optim.Adam(own.values(), 1e-2)
    lost, l0 = learner.learn(x)
    scaled = x * learner.scale
    values = (scaled - own["centre"]) @ own["reads"].T + own["offsets"]
    kept = torch.zeros_like(values)
    for row, value in enumerate(values):
        for at in value.argsort(descending=True)[:3]:
            kept[row, at] = value[at].relu()
    back = kept @ own["directions"] + own["centre"]
    loss = (scaled - back).square().sum() / (scaled - scaled.mean(0)).square().sum()
    loss.backward()
    adam.step()
    directions = own["directions"] / own["directions"].norm(dim=1, keepdim=True)
    assert lost == pytest.approx(loss.item(), rel=1e-5)
    assert l0 == pytest.approx((kept > 0).sum().item() / 64)
    for name, expected in (own | {"directions": directions}).items():
        assert torch.allclose(learner.own[name], expected, atol=1e-5), name


def test_vectors_are_scaled_to_the_root_of_their_size(rows: torch.Tensor) -> None:
    setting = learning.Setting(16, 3, "topk", 10, 64, 1e-2, 0, 0, 1000)
    learner = learning.Learner.of(setting, 17 * rows, None)
    assert (17 * rows * learner.scale).norm(dim=1).mean() == pytest.approx(32**0.5, rel=1e-5)


def test_the_scale_of_activations_does_not_matter(rows: torch.Tensor) -> None:
    small = autoencoders.train(rows, 64, 4, **SHORT)
    large = autoencoders.train(1024 * rows, 64, 4, **SHORT)
    assert torch.allclose(small.directions, large.directions, atol=1e-4)
    assert torch.allclose(1024 * small.encode(rows[:9]), large.encode(1024 * rows[:9]), rtol=1e-2)


def test_a_seed_gives_one_autoencoder_and_another_another(rows: torch.Tensor) -> None:
    first, again = (autoencoders.train(rows, 64, 4, **SHORT) for _ in range(2))
    other = autoencoders.train(rows, 64, 4, seed=1, **SHORT)
    assert torch.equal(first.directions, again.directions)
    assert not torch.allclose(first.directions, other.directions)


# -------------------------------------------------------------------------------- what is read


def test_every_row_comes_once_an_epoch_in_another_order_from_all_pieces() -> None:
    x = torch.arange(3000.0)[:, None]
    stream = Stream(Source.of(x), seed=0, pool_bytes=4 * 1024)  # four pieces of 256
    assert stream.n_pools == 3
    first, second = (torch.cat([stream.next(100) for _ in range(30)])[:, 0] for _ in range(2))
    for epoch in (first, second):
        assert torch.equal(epoch.sort().values, x[:, 0])
    assert not torch.equal(first, second)
    assert len(set((first[:100] // 256).tolist())) >= 3


def test_a_stream_goes_on_from_three_numbers() -> None:
    x = torch.arange(3000.0)[:, None]
    stream = Stream(Source.of(x), seed=4, pool_bytes=4 * 1024)
    for _ in range(13):
        stream.next(77)
    later = Stream(Source.of(x), 4, 4 * 1024, stream.epoch, stream.pool, stream.offset)
    for _ in range(50):
        assert torch.equal(stream.next(77), later.next(77))


def _unequal(embedded) -> Items:
    draw = np.random.default_rng(0)
    return Items(
        Item(
            draw.normal(size=16_000 // 10 * tenths).astype(np.float32) / 10,
            "Which digit is first?",
            labels={"long": tenths > 15},
            sampling_rate=16_000,
        )
        for tenths in (6, 12, 23)
    )


def test_no_row_of_padding_is_read(embedded, tmp_path: Path) -> None:
    """The rows are those of the positions that hold a clip, one by one, and no others."""
    items = _unequal(embedded)
    acts = collect(embedded, items, "encoder.resid_post", layers=[1], to=tmp_path / "acts")
    inputs = items.prepare(embedded)  # one batch: shorter clips are padded
    valid = embedded.timeline(inputs).mask("encoder")
    assert not valid.all()
    source = Source.of(acts)
    held = torch.cat([piece.read() for piece in source.pieces])
    assert len(held) == int(valid.sum())
    expected = torch.cat([acts.filter(lambda _: True).array()])
    stream = Stream(source, 0)
    epoch = stream.next(len(held))
    order = [(expected - row).abs().sum(1).argmin().item() for row in epoch]
    assert sorted(order) == list(range(len(held)))


def test_filtered_activations_give_the_rows_of_their_items(embedded, tmp_path: Path) -> None:
    acts = collect(
        embedded, _unequal(embedded), "encoder.resid_post", layers=[1], to=tmp_path / "acts"
    ).filter(long=False)
    rows = torch.cat([piece.read() for piece in Source.of(acts).pieces])
    assert torch.equal(rows, acts.array())


def test_a_plain_tensor_and_activations_of_it_train_alike(embedded) -> None:
    acts = collect(embedded, _unequal(embedded), "encoder.resid_post", layers=[1])
    own = autoencoders.train(acts, 32, 4, **SHORT)
    plain = autoencoders.train(torch.cat(list(acts.chunks())), 32, 4, **SHORT)
    assert torch.equal(own.directions, plain.directions)
    assert (own.site, own.layer) == ("encoder.resid_post", 1)


# -------------------------------------------------------------------------------- checkpoints


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "relu"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    kind: str, rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"kind": kind, "steps": 60, "batch": 64, "resample": 10, "dead_after": 300}
    asked |= {"progress": False, "every": 7}
    whole = autoencoders.train(rows, 64, 4, **asked)
    path, made = tmp_path / "ae.safetensors", learning.Learner.learn

    def failing(self, given):
        if self.step == 33:
            raise Stopped
        return made(self, given)

    monkeypatch.setattr(learning.Learner, "learn", failing)
    with pytest.raises(Stopped):
        autoencoders.train(rows, 64, 4, to=path, **asked)
    monkeypatch.setattr(learning.Learner, "learn", made)
    assert Autoencoder.load(path).meta["steps"] == "28"
    later = autoencoders.train(rows, 64, 4, to=path, **asked)
    for name in ("reads", "offsets", "directions", "centre"):
        assert torch.equal(getattr(whole, name), getattr(later, name)), name
    assert whole.history == later.history
    assert whole.threshold is None or torch.equal(whole.threshold, later.threshold)
    monkeypatch.setattr(learning.Learner, "learn", None)  # a run that has ended is read
    again = autoencoders.train(rows, 64, 4, to=path, **asked)
    assert torch.equal(again.directions, whole.directions)


def test_a_file_of_another_run_is_not_gone_on_from(rows: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "ae.safetensors"
    autoencoders.train(rows, 64, 4, to=path, **SHORT)
    with pytest.raises(InputError, match=r"another run.*seed"):
        autoencoders.train(rows, 64, 4, to=path, seed=1, **SHORT)
    with pytest.raises(InputError, match=r"another run.*rows"):
        autoencoders.train(rows + 1, 64, 4, to=path, **SHORT)


def test_a_file_holds_what_there_is(revived, tmp_path: Path) -> None:
    found, again = revived[0], Autoencoder.load(revived[0].save(tmp_path / "ae.safetensors"))
    for name in ("reads", "offsets", "directions", "centre"):
        assert torch.equal(getattr(found, name), getattr(again, name))
    assert (found.kind, found.k, found.meta) == (again.kind, again.k, again.meta)
    assert json.dumps(found.history) == json.dumps(again.history)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "given, says",
    [
        ({"width": 0}, "width must be"),
        ({"k": 65}, "k must be .* 1 to 64"),
        ({"kind": "top"}, "kind is one of topk, batchtopk, relu, jumprelu, got 'top'"),
        ({"steps": 0}, "steps"),
        ({"rate": 0.0}, "rate"),
        ({"site": "encoder.resid_post"}, "a plain tensor has no sites"),
        ({"known": torch.zeros(3, 5)}, "known directions are n by 32"),
        ({"start": planted.born_dead(), "kind": "relu"}, "start is 64 latents of 32"),
        ({"activations": torch.zeros(5, 2, 3)}, r"activations are .* got \[5, 2, 3\]"),
        ({"activations": torch.full((600, 32), torch.nan)}, "NaN"),
        ({"activations": torch.zeros(600, 32)}, "all activations are 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(given: dict, says: str) -> None:
    asked = {"activations": planted.rows(600), "width": 64, "k": 4} | given
    with pytest.raises(InputError, match=says):
        training.train(**asked, progress=False)


def test_several_layers_and_heads_are_refused(embedded) -> None:
    items = _unequal(embedded)
    acts = collect(embedded, items, ["encoder.resid_post", "encoder.attn.z"])
    with pytest.raises(InputError, match=r"several layers"):
        autoencoders.train(acts, 32, 4, **SHORT)
    with pytest.raises(InputError, match=r"without heads"):
        autoencoders.train(acts, 32, 4, site="encoder.attn.z", layer=0, **SHORT)
    with pytest.raises(ActivationsError, match=r"was not collected"):
        autoencoders.train(acts, 32, 4, site="connector.out", **SHORT)
    assert isinstance(acts, Activations)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"kind": "sparse"}, "kind is one of"),
        ({"k": None}, "needs k"),
        ({"k": 65}, "k must be"),
        ({"threshold": torch.tensor(1.0)}, "threshold of kind 'topk' is none"),
        ({"kind": "jumprelu", "threshold": torch.tensor(1.0)}, "64 numbers"),
        ({"kind": "batchtopk", "threshold": torch.tensor(-1.0)}, "below 0"),
    ],
)
def test_what_is_no_autoencoder_is_refused(changed: dict, says: str) -> None:
    whole = {name: getattr(planted.born_dead(), name) for name in ("reads", "offsets", "k")}
    whole |= {"directions": whole["reads"], "centre": torch.zeros(32)}
    with pytest.raises(InputError, match=says):
        Autoencoder(**(whole | changed))


def test_vectors_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match=r"have 5 entries, the autoencoder's 32"):
        planted.born_dead().encode(torch.zeros(2, 5))


def test_files_that_hold_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}")
    for path in (tmp_path / "x", tmp_path / "none"):
        with pytest.raises(InputError, match=r"holds no autoencoder"):
            Autoencoder.load(path)
