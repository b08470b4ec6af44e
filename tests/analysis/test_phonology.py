"""Phonetic arithmetic: planted sums of features, plain loops, sounds that do not add up."""

from __future__ import annotations

import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from audio_lens import Item, Items, collect
from audio_lens.analysis import phonology
from audio_lens.analysis.phonology import Sounds
from audio_lens.errors import ExtraError, InputError
from audio_lens.timeline import Span

FEATURES = {  # voice, then place (two numbers), then whether air flows on
    f"{'pbtdkg'[2 * place + voiced]}{'' if stop else 'h'}": (
        2 * voiced - 1,
        *((1, -1), (-1, 1), (0, 0))[place],
        2 * stop - 1,
    )
    for place, voiced, stop in product(range(3), range(2), range(2))
}


def planted(adds_up: bool = True, samples: int = 6, noise: float = 0.1) -> Sounds:
    """Sounds whose second layer is a sum over features; the first one is drawn for each sound."""
    draw = torch.Generator().manual_seed(0)
    axes, own = torch.randn(4, 64, generator=draw), torch.randn(len(FEATURES), 64, generator=draw)
    labels, rows = [], []
    for number, (label, values) in enumerate(FEATURES.items()):
        mean = torch.tensor(values, dtype=torch.float32) @ axes if adds_up else own[number]
        for _ in range(samples):
            labels.append(label)
            hiss = noise * torch.randn(2, 64, generator=draw)
            rows.append(torch.stack([own[number], mean]) + hiss)
    return Sounds(labels, torch.stack(rows), [0, 1])


def test_kinds_are_those_of_equal_differences() -> None:
    kinds = phonology.kinds_of(FEATURES)
    voice = next(pairs for pairs in kinds.values() if ("b", "p") in pairs or ("p", "b") in pairs)
    assert {frozenset(pair) for pair in voice} == {
        frozenset(pair) for pair in ("bp", "dt", "gk", ("bh", "ph"), ("dh", "th"), ("gh", "kh"))
    }
    for changed, pairs in kinds.items():
        assert len(pairs) > 1
        assert tuple(-x for x in changed) not in kinds
    # from 0 to 1 is another difference than from -1 to 0
    assert not phonology.kinds_of({"a": (0,), "b": (1,), "c": (-1,)})


def test_sums_are_found_where_they_were_planted() -> None:
    result = phonology.analogies(planted(), FEATURES, least=5, draws=40)
    own, added = result.estimate.tolist()
    assert abs(own) < 0.1 and added > 0.9
    other = result.controls["other_sound"].estimate
    assert other[1] < 0.3
    assert result.controls["no_arithmetic"].estimate[1] < added - 0.2
    assert result.coords["layer"] == [0, 1] and "highest at layer 1" in result.report[0]


def test_pairs_that_differ_alike_are_told_from_mismatched_ones() -> None:
    result = phonology.consistency(planted(), FEATURES, least=5, draws=100)
    own, added = result.estimate.tolist()
    assert added > 0.9 and added > own + 0.1
    permuted = result.controls["permuted_labels"].estimate
    assert abs(float(permuted[1]) - 0.5) < 0.15
    silent = phonology.consistency(planted(adds_up=False), FEATURES, least=5, draws=100)
    assert abs(float(silent.estimate[1]) - 0.5) < 0.15


def test_of_one_sample_each_it_is_the_plain_formula() -> None:
    known = {label: FEATURES[label] for label in "bpdt"}
    rows = planted(samples=1).values[:, :1]
    labels = planted(samples=1).labels
    x = F.normalize(rows.double(), dim=-1)
    at = {label: x[labels.index(label), 0] for label in "bpdt"}
    result = phonology.analogies(Sounds(labels, rows, [7]), known, least=1, draws=3, centre=False)
    for name, value in zip(result.coords["stimulus"], result.values[:, 0], strict=True):
        a, _, b, _, c, _, d = name.split()
        wanted = F.cosine_similarity(at[a], at[b] + at[c] - at[d], dim=0)
        assert value.item() == pytest.approx(wanted.item(), abs=1e-9)


def test_a_large_mean_is_taken_off() -> None:
    shifted = planted(adds_up=False)
    shifted = Sounds(shifted.labels, shifted.values + 30, shifted.layers)
    asked = {"least": 5, "draws": 20}
    plain = phonology.analogies(shifted, FEATURES, centre=False, **asked).estimate
    centred = phonology.analogies(shifted, FEATURES, **asked).estimate
    assert plain.min() > 0.9 and centred.max() < 0.2


def test_a_sound_is_the_mean_of_its_positions(embedded) -> None:
    clip = torch.randn(16_000, generator=torch.Generator().manual_seed(0)).numpy() / 10
    items = Items([Item(clip, "Which digit is first?", id="one", sampling_rate=16_000)])
    acts = collect(embedded, items, "encoder.resid_post", layers=[1, 2])
    said = {"one": [Span(0.1, 0.3, "b"), Span(0.3, 0.5, ""), Span(0.5, 0.9, "p")]}
    found = phonology.sounds(acts, said)
    seconds = torch.as_tensor(acts.table()["second"])
    assert found.labels == ["b", "p"] and found.layers == [1, 2]
    inside = (seconds >= 0.5) & (seconds < 0.9)
    expected = acts.array(layer=2)[inside].double().mean(0)
    assert torch.allclose(found.values[1, 1], expected)
    with pytest.raises(InputError, match=r"nothing is known .* 'one'"):
        phonology.sounds(acts, {})
    with pytest.raises(InputError, match="no sound has a position"):
        phonology.sounds(acts, {"one": [Span(0.1, 0.3, "")]})


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no 2 pairs .* 50 samples"):
        phonology.analogies(planted(), FEATURES)
    with pytest.raises(InputError, match="no 3 pairs"):
        few = {label: FEATURES[label] for label in "bpdt"}
        phonology.consistency(planted(), few, least=2)
    with pytest.raises(InputError, match="draws"):
        phonology.analogies(planted(), FEATURES, draws=0)
    with pytest.raises(InputError, match="features are -1, 0 or 1"):
        phonology.kinds_of({"b": (2,), "p": (0,)})
    with pytest.raises(InputError, match="b and p have the same features"):
        phonology.kinds_of({"b": (1,), "p": (1,)})
    with pytest.raises(InputError, match="2 sounds at 1 layers"):
        Sounds(["b", "p"], torch.zeros(2, 3, 4), [0])
    monkeypatch.setitem(sys.modules, "panphon", None)
    with pytest.raises(ExtraError, match=r"audio_lens\[phones\]"):
        phonology.analogies(planted(), least=2)


def test_panphon_knows_sounds_by_both_names() -> None:
    pytest.importorskip("panphon")
    known = phonology.features(["B", "P", "d", "t", "t͡ʃ", "CH", "AY", "ER"])
    assert set(known) == {"B", "P", "d", "t", "t͡ʃ", "CH"} and known["CH"] == known["t͡ʃ"]
    del known["CH"]
    assert any({"B", "P"} in map(set, pairs) for pairs in phonology.kinds_of(known).values())
