"""Convergence: change points that are planted together, apart, and nowhere."""

from __future__ import annotations

import pytest
import torch

from audio_lens.analysis import convergence
from audio_lens.analysis.convergence import Measure, agreement, change_points
from audio_lens.errors import InputError
from audio_lens.items import ItemError, demo_items
from audio_lens.items.statistics import TwoPieces, changepoint
from audio_lens.results import Result

N_ITEMS, N_STEPS = 30, 25
DEPTHS = [step / (N_STEPS - 1) for step in range(N_STEPS)]
FAST = {"resamples": 400}


def planted(at: int, name: str, part: str = "encoder", noise: float = 0.3, seed: int = 0):
    """Items whose curves rise from 0 to 1 at a step."""
    draw = torch.Generator().manual_seed(seed + len(name) + at)
    curves = (torch.arange(N_STEPS) >= at).double() * torch.ones(N_ITEMS, 1).double()
    return Measure(
        name,
        part,
        curves + noise * torch.randn(N_ITEMS, N_STEPS, generator=draw).double(),
        DEPTHS,
    )


def test_a_shared_change_point_is_told_from_chance():
    three = [planted(12, name) for name in ("a", "bb", "ccc")]
    result = agreement(three, **FAST)
    assert result.meta["encoder verdict"] == "together"
    assert float(result.meta["encoder p_uniform"]) < 0.02
    assert float(result.meta["encoder p_permuted"]) < 0.02
    assert result.select(metric="apart").values.nan_to_num().max() == 0
    chance = result.controls["uniform"].select(metric="apart", measure="a", other="bb")
    assert float(chance.values) == pytest.approx(1 / 3, abs=0.05)  # of two even draws


def test_shifted_change_points_are_rejected():
    three = [planted(at, name) for at, name in ((5, "a"), (12, "bb"), (20, "ccc"))]
    result = agreement(three, **FAST)
    assert result.meta["encoder verdict"] == "apart"
    assert float(result.meta["encoder p_uniform"]) > 0.2
    shift = result.select(metric="shift", measure="bb", other="a")
    assert float(shift.values) == pytest.approx(7 / 24)
    assert float(shift.low) > 0 and any("bb differ" in line for line in result.report)


def test_change_points_next_to_each_other_are_near_but_not_the_same():
    result = agreement([planted(12, "a"), planted(12, "bb"), planted(13, "ccc")], **FAST)
    assert result.meta["encoder verdict"] == "near"


def test_parts_are_never_compared():
    four = [planted(12, "a"), planted(12, "b"), *(planted(4, x, "decoder") for x in ("c", "d"))]
    result = agreement(four, **FAST)
    across = result.select(measure=["a", "b"], other=["c", "d"])
    assert across.values.isnan().all()
    assert {f"{part} verdict" for part in ("encoder", "decoder")} <= set(result.meta)
    with pytest.raises(InputError, match="no two measures are of one part"):
        agreement([planted(12, "a"), planted(12, "c", "decoder")])


def test_few_layers_are_said_to_be_too_few():
    few = [Measure(x, "encoder", torch.eye(4)[[3, 3]], [0.25, 0.5, 0.75, 1.0]) for x in ("a", "b")]
    result = agreement(few, **FAST)
    assert result.meta["encoder verdict"] == "open"
    assert float(result.meta["encoder least_p"]) == pytest.approx(1 / 3, abs=0.1)
    assert any("cannot be told from chance" in line for line in result.report)


def test_change_points_are_those_of_statistics_between_two_steps(tmp_path):
    one, flat = planted(6, "a"), Measure("flat", "encoder", torch.ones(5, 9), DEPTHS[:9])
    result = change_points([one, flat], **FAST)
    first = changepoint(one.curves, DEPTHS, resamples=400)
    depth = result.select(metric="depth", measure="a")
    assert float(depth.values) == pytest.approx(first.at - 0.5 / 24)
    assert float(depth.low) == pytest.approx(first.low - 0.5 / 24)
    assert float(result.select(metric="gain", measure="a").values) == pytest.approx(first.gain)
    assert float(result.select(metric="from_half", measure="a").values) == pytest.approx(
        abs(0.5 - float(depth.values))
    )
    assert result.select(metric="depth", measure="flat").values.isnan()
    assert any("does not change" in line for line in result.report)
    assert agreement([one, flat], **FAST).meta["encoder verdict"] == "open"
    again = Result.load(result.save(tmp_path / "points.nc"))
    torch.testing.assert_close(again.values, result.values, equal_nan=True)


def test_measures_of_the_same_items_are_drawn_together():
    draw = torch.Generator().manual_seed(1)
    own = torch.randint(8, 16, (N_ITEMS,), generator=draw)  # every item changes elsewhere
    curves = (torch.arange(N_STEPS) >= own[:, None]).double()
    curves = curves + 0.01 * torch.randn(N_ITEMS, N_STEPS, generator=draw).double()
    names = [f"item {n}" for n in range(N_ITEMS)]
    same = [Measure(x, "encoder", curves, DEPTHS, names) for x in ("a", "b")]
    shift = agreement(same, **FAST).select(metric="shift", measure="a", other="b")
    assert float(shift.low) == float(shift.high) == 0
    other = Measure("b", "encoder", curves, DEPTHS, names[::-1])
    shift = agreement([same[0], other], **FAST).select(metric="shift", measure="a", other="b")
    assert float(shift.high) > 0


def test_two_pieces_leave_over_what_the_best_of_all_fits_does():
    curves = torch.randn(3, 7, generator=torch.Generator().manual_seed(2)).double()
    split, gain = TwoPieces.of(torch.arange(7).double())(curves)
    for curve, at, share in zip(curves, split.tolist(), gain.tolist(), strict=True):
        left = [
            sum(((x - x.mean()) ** 2).sum() for x in (curve[:cut], curve[cut:]))
            for cut in range(1, 7)
        ]
        assert at == min(range(6), key=left.__getitem__)
        whole = ((curve - curve.mean()) ** 2).sum()
        assert share == pytest.approx(float(1 - min(left) / whole))


def test_bad_measures_say_why():
    with pytest.raises(InputError, match="finite numbers"):
        Measure("a", "encoder", torch.full((2, 5), torch.nan), DEPTHS[:5])
    with pytest.raises(InputError, match="rise from 0 to 1"):
        Measure("a", "encoder", torch.ones(2, 5), [0.0, 0.2, 0.1, 0.3, 1.0])
    with pytest.raises(InputError, match="2 steps make no two steps"):
        Measure("a", "encoder", torch.ones(2, 2), [0.0, 1.0])
    with pytest.raises(InputError, match="pieces are one of"):
        Measure("a", "encoder", torch.ones(2, 5), DEPTHS[:5], pieces="curves")
    with pytest.raises(InputError, match="names of their own"):
        agreement([planted(3, "a"), planted(4, "a")])
    with pytest.raises(InputError, match=r"list of convergence\.Measure"):
        change_points([])
    cells = Result(torch.ones(2, 3), ("stimulus", "head"), {"stimulus": [0, 1], "head": [0, 1, 2]})
    with pytest.raises(InputError, match="not stimulus and layer"):
        Measure.of(cells, "a", "encoder", 4)


def test_measures_of_a_model_are_tested(embedded):
    items, names = demo_items()[:4], ["lens_information", "lens_probability"]
    result = convergence.converge(embedded, items, names, progress=False)
    assert result.meta["method"] == "convergence.converge"
    assert result.coords["measure"] == names and result.n_kept == 4
    assert result.meta["decoder verdict"] in ("together", "near", "apart", "open")
    with pytest.raises(InputError, match="nearest names: lens_information"):
        convergence.measures(embedded, items, ["lens_informaton"])
    without = items.of(item.replaced(other_audio=None) for item in items)
    with pytest.raises(ItemError, match="no other_audio"):
        convergence.measures(embedded, without, ["patching_last"])


@pytest.mark.slow
def test_all_measures_run_on_the_embedded_model(embedded):
    found = convergence.study(embedded, demo_items()[:6], progress=False)
    assert found["agreement"].coords["measure"] == list(convergence.MEASURES)
    assert found["change_points"].select(metric="depth").values.isfinite().all()
