"""Published weights: read without running code, and put into place by name, strictly."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from audio_lens.models.config import LoadingError
from audio_lens.models.loading.weights import fill, read_pickle, read_weights, renamed

HELD = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.3.weight": torch.ones(2)}


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], x) for name, x in expected.items()
    )


# -------------------------------------------------------------------------------- reading


def test_safetensors_of_a_file_or_of_the_shards_of_a_directory(tmp_path: Path) -> None:
    for number, (name, tensor) in enumerate(HELD.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
    assert same(read_weights(tmp_path), HELD)
    assert same(read_weights(tmp_path / "model-0.safetensors"), {"a.weight": HELD["a.weight"]})


@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "as written before torch 1.6"])
def test_tensors_of_a_pt(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": HELD, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path, "model"), HELD)
    assert read_pickle(path)["epoch"] == 3
    with pytest.raises(LoadingError, match="holds no 'weights', but model, epoch"):
        read_weights(path, "weights")
    with pytest.raises(LoadingError, match="holds more than tensors: model, epoch"):
        read_weights(path)


class Dangerous:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Dangerous()}, "zipped.pt")
    Path("bare.pt").write_bytes(pickle.dumps({"model": Dangerous()}))
    for name in ("zipped.pt", "bare.pt"):
        with pytest.raises(LoadingError, match=f"{name} cannot be read as plain tensors"):
            read_weights(name)
    assert not Path("ran").exists()


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match="holds no safetensors"):
        read_weights(tmp_path)
    with pytest.raises(LoadingError, match="no such file or directory"):
        read_weights(tmp_path / "nothing")
    with pytest.raises(LoadingError, match="no such file"):
        read_pickle(tmp_path / "nothing.pt")
    for name in ("broken.safetensors", "broken.pt"):
        (tmp_path / name).write_text("text")
        with pytest.raises(LoadingError, match=f"{name} (is corrupt|cannot be read)"):
            read_weights(tmp_path / name)


# -------------------------------------------------------------------------------- names


def test_names_with_layers_and_what_is_left_out() -> None:
    table = {"a": "first", "b.{l}": "blocks.{l}.second", "c": None, "d.scale": "d.gain"}
    state = {**HELD, "c.weight": torch.ones(1), "d.scale": torch.zeros(1)}
    expected = {
        "first.weight": HELD["a.weight"],
        "blocks.3.second.weight": HELD["b.3.weight"],
        "d.gain": torch.zeros(1),
    }
    assert same(renamed(state, table), expected)
    with pytest.raises(LoadingError, match=r"weights without a place in this model: b\.3\.weight"):
        renamed(HELD, {"a": "first"})


# -------------------------------------------------------------------------------- filling


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.early, self.late = nn.Linear(3, 2), nn.Linear(2, 2, bias=False)


def weights() -> dict[str, torch.Tensor]:
    return {
        "early.weight": torch.ones(2, 3),
        "early.bias": torch.zeros(2),
        "late.weight": torch.eye(2),
    }


def test_parts_are_filled_apart_and_share_their_tensors() -> None:
    model, given = TwoParts(), weights()
    fill(model, {"late.weight": given["late.weight"]}, parts=["late"])
    assert model.late.weight.data_ptr() == given["late.weight"].data_ptr()
    assert model.early.weight.is_meta
    fill(model, given)
    assert model.late(model.early(torch.ones(1, 3))).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"early.bias": None}, r"missing weights: early\.bias; unexpected weights: none"),
        ({"later.weight": torch.ones(1)}, r"missing weights: none; unexpected .*: later\.weight"),
        ({"late.weight": torch.ones(3, 2)}, r"late\.weight is \(3, 2\), not \(2, 2\)"),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_weights_that_do_not_fit_are_refused(change: dict, problem: str) -> None:
    given = {name: x for name, x in {**weights(), **change}.items() if x is not None}
    with pytest.raises(LoadingError, match=problem):
        fill(TwoParts(), given)


def test_shared_tensors_become_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.device("meta"):
                self.read, self.write = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    model, shared = Tied(), torch.eye(2)
    fill(model, {"read.weight": shared, "write.weight": shared})
    assert model.read.weight is model.write.weight
