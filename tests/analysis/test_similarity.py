"""CKA, RSA, and shapes of layers: known spaces, slow obvious computations, and models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis import answering
from audio_lens import HookedAudioTransformer
from audio_lens.analysis import similarity
from audio_lens.analysis.similarity.kernels import gram, hsic, hsic_without
from audio_lens.analysis.similarity.shapes import SHAPES, by_row
from audio_lens.errors import InputError
from audio_lens.items import ANALYSES, collect, rerun
from items import speech


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(noise(n, n, seed=9))[0]


# -------------------------------------------------------------------------------- CKA and RSA


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_sees_through_rotations_and_scalings_and_not_through_stretching(unbiased: bool) -> None:
    x = noise(40, 6)
    stretch = torch.diag(torch.tensor([10.0, 1, 1, 1, 1, 1]).double())
    assert similarity.cka(x, x, unbiased) == pytest.approx(1)
    assert similarity.cka(x, 3 * x @ rotation(6) + 5, unbiased) == pytest.approx(1)
    assert similarity.cka(x, x @ stretch, unbiased) < 0.9
    assert similarity.cka(x, noise(40, 6, seed=1), unbiased) < 0.3


def test_independent_rows_are_not_alike_unless_the_estimate_is_biased() -> None:
    """CORRECTIONS A6: n = 24 in 500 dimensions."""
    x, y = noise(24, 500), noise(24, 500, seed=1)
    assert abs(similarity.cka(x, y)) < 0.1
    assert 0.9 < similarity.cka(x, y, unbiased=False) < 0.97
    several = [similarity.cka(x, noise(24, 500, seed=i)) for i in range(2, 30)]
    assert abs(sum(several) / len(several)) < 0.03


def test_the_biased_estimate_is_the_published_formula() -> None:
    x, y = noise(30, 5), noise(30, 7, seed=1) + noise(30, 7)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert similarity.cka(x, y, unbiased=False) == pytest.approx(expected.item())


def test_the_unbiased_estimate_is_the_mean_over_quadruples() -> None:
    """Song et al.: over all ordered quadruples of different rows, of the U-statistic's kernel."""
    k, l = gram(noise(7, 3)), gram(noise(7, 2, seed=1))
    total, count = 0.0, 0
    for i, j, q, r in torch.cartesian_prod(*[torch.arange(7)] * 4).tolist():
        if len({i, j, q, r}) == 4:
            total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
            count += 1
    assert hsic(k, l).item() == pytest.approx((total / count).item())


def test_leaving_rows_out_is_computed_without_leaving_them_out() -> None:
    x, y = noise(9, 3), noise(9, 2, seed=1)
    _, without = hsic_without(gram(x), gram(y))
    for row in range(9):
        kept = [i for i in range(9) if i != row]
        assert without[row].item() == pytest.approx(hsic(gram(x[kept]), gram(y[kept])).item())


def test_batches_come_near_the_whole() -> None:
    x = noise(400, 8)
    y = x @ noise(8, 8, seed=3) + noise(400, 8, seed=4)
    whole = similarity.cka(x, y)
    assert similarity.cka(x, y, batch=64) == pytest.approx(whole, abs=0.05)
    assert similarity.cka(x, y, batch=400) == pytest.approx(whole)


def test_rbf_kernels_see_what_is_not_linear() -> None:
    x = noise(200, 1)
    assert similarity.cka(x, x**2, kernel="rbf", bandwidth=0.5) > 0.2
    assert abs(similarity.cka(x, x**2)) < 0.1
    assert abs(similarity.cka(x, noise(200, 1, seed=5), kernel="rbf", bandwidth=0.5)) < 0.05


@pytest.mark.parametrize("distance", ["correlation", "cosine", "euclidean"])
def test_rsa_is_the_rank_correlation_of_distances(distance: str) -> None:
    scipy = pytest.importorskip("scipy", reason="the reference is scipy's")
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    x = noise(12, 5)
    y = (x @ noise(5, 5, seed=2)).round()  # with ties
    ours = similarity.rsa(x, y, distance)
    expected = spearmanr(pdist(x.numpy(), distance), pdist(y.numpy(), distance)).statistic
    assert scipy and ours == pytest.approx(expected, abs=1e-2)
    assert similarity.rsa(x, x, distance) == pytest.approx(1)


# -------------------------------------------------------------------------------- shapes


def even(n_directions: int, n_dims: int = 8) -> Tensor:
    """Rows of equal spread along some directions, rotated."""
    signs = torch.eye(n_directions, n_dims, dtype=torch.float64)
    return torch.cat([signs, -signs]) @ rotation(n_dims)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_shapes_of_equal_directions_are_their_number(k: int) -> None:
    assert similarity.effective_rank(even(k) + 7) == pytest.approx(k)
    assert similarity.isotropy(even(k) + 7) == pytest.approx((k - 1) / 7, abs=1e-9)


def test_mean_cosines_are_of_every_two() -> None:
    x = noise(10, 4) + 1
    units = x / x.norm(dim=1, keepdim=True)
    expected = (units @ units.T)[~torch.eye(10, dtype=torch.bool)].mean()
    assert similarity.mean_cosine(x) == pytest.approx(expected.item())
    assert similarity.mean_cosine(noise(10, 4) + 100) > 0.99


@pytest.mark.parametrize("name", SHAPES)
def test_values_of_rows_are_influences(name: str) -> None:
    """Against the change when a row counts a little more."""
    x, shape = noise(15, 4) + 0.5, SHAPES[name]
    values, ones = by_row(shape, x), torch.ones(15, dtype=torch.float64)
    assert values.mean().item() == pytest.approx(shape(x, ones).item())
    step = 1e-6
    for row in (0, 7):
        more = ones + step * torch.nn.functional.one_hot(torch.tensor(row), 15)
        slope = (shape(x, more) - shape(x, ones)) / step
        assert values[row].item() - values.mean().item() == pytest.approx(
            15 * slope.item(), abs=1e-3
        )


# -------------------------------------------------------------------------------- models


def test_layers_that_change_nothing_are_alike(tmp_path) -> None:
    toy, items = answering.copying(3, 1), answering.items(3)
    options = {"site": "decoder.resid_post", "where": "audio"}
    result = similarity.layers(toy, items, **options)
    assert result.dims == ("stimulus", "layer", "other_layer")
    assert torch.allclose(result.estimate, torch.ones(3, 3).double())
    assert result.estimate[1, 2].item() == pytest.approx(
        similarity.cka(*[collect(toy, items, "decoder.resid_post", "audio", "mean")[1]] * 2)
    )
    assert result.controls["other_item"].estimate.abs().max() < 0.5
    again = rerun(result.save(tmp_path / "cka.nc"), toy, items)
    assert torch.equal(again.values, result.values) and result.plot().data


def test_two_sites_are_compared_and_laid_on_one_depth() -> None:
    toy, items = answering.copying(3, 1), answering.items(3)
    acts = collect(toy, items, ["decoder.resid_pre", "decoder.resid_post"], "audio", "mean")
    options = {"site": "decoder.resid_pre", "other_site": "decoder.resid_post"}
    result = similarity.by_depth(similarity.between(acts, acts, **options))
    assert result.dims == ("stimulus", "depth", "other_depth")
    assert result.coords["depth"] == [0, 0.5, 1]
    assert result.controls["other_item"].dims == result.dims


def test_shapes_of_layers(tmp_path) -> None:
    toy, items = answering.copying(3, 1), answering.items(3)
    result = similarity.shape(toy, items, site="decoder.resid_post", where="last")
    assert result.coords["metric"][:2] == ["norm", "cosine_to_last"]
    assert result.select(metric="cosine_to_last").estimate[-1].item() == pytest.approx(1)
    assert result.select(metric="norm").estimate[1] > result.select(metric="norm").estimate[0]
    again = rerun(result.save(tmp_path / "shape.nc"), toy, items)
    assert torch.equal(again.values.nan_to_num(), result.values.nan_to_num())


@pytest.mark.real
@pytest.mark.slow
def test_layers_of_the_shipped_model(embedded: HookedAudioTransformer) -> None:
    items = speech.spoken_items(40, takes=range(12))
    told = ANALYSES["similarity"].function(embedded, items)
    assert list(told) == ["encoder", "encoder_shape", "decoder", "decoder_shape"]
    cka = told["encoder"]
    assert torch.allclose(cka.estimate.diagonal(), torch.ones(4).double())
    assert torch.allclose(cka.estimate, cka.estimate.mT)
    assert cka.estimate[0, 1] > cka.estimate[0, 3]
    assert cka.controls["other_item"].estimate.abs().max() < 0.3
    assert (cka.low <= cka.estimate + 1e-9).all() and (cka.estimate <= cka.high + 1e-9).all()


# -------------------------------------------------------------------------------- bad input

X = noise(6, 3)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "rows": (lambda: similarity.cka(X, X[:5]), "got 6 and 5"),
    "few rows": (lambda: similarity.cka(X[:3], X[:3]), "4 rows are needed or more, got 3"),
    "kernel": (lambda: similarity.cka(X, X, kernel="poly"), "kernel is one of linear, rbf"),
    "batches": (lambda: similarity.cka(X, X, False, batch=4), "for the unbiased estimate"),
    "a batch": (lambda: similarity.cka(X, X, batch=3), "batch must be"),
    "bandwidth": (lambda: similarity.cka(X, X, bandwidth=0), "bandwidth must be"),
    "NaN": (lambda: similarity.cka(X, X / 0), "NaN or infinite"),
    "shape": (lambda: similarity.cka(X[0], X), "n by d, got 3"),
    "distance": (lambda: similarity.rsa(X, X, "l1"), "distance is one of"),
    "no spread": (lambda: similarity.effective_rank(torch.ones(3, 2)), "do not vary"),
    "one dimension": (lambda: similarity.isotropy(X[:, :1]), "two dimensions or more"),
    "no length": (lambda: similarity.mean_cosine(X * 0), "no length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_named(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()


def test_activations_that_cannot_be_compared_are_named() -> None:
    toy, items = answering.copying(3, 1), answering.items(2)
    frames = collect(toy, items, "decoder.resid_post", "audio")
    means = collect(toy, items, "decoder.resid_post", "audio", "mean")
    with pytest.raises(InputError, match="several rows each"):
        similarity.between(frames, frames)
    with pytest.raises(InputError, match="same items in one order"):
        similarity.between(means, collect(toy, items[:6], "decoder.resid_post", pool="mean"))
    few = collect(toy, items[:4], "decoder.resid_post", pool="mean")
    with pytest.raises(InputError, match="5 items or more, got 4"):
        similarity.between(few, few)
    with pytest.raises(InputError, match="no layers to place"):
        similarity.by_depth(similarity.between(means, means).select(layer=0, other_layer=0))
