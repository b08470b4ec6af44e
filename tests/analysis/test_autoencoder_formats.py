"""Autoencoders as others publish them: fixtures made by their formulas, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from audio_lens.analysis import autoencoders
from audio_lens.analysis.autoencoders import Autoencoder
from audio_lens.errors import InputError

M, D, K = 24, 8, 3
ROWS = torch.randn(50, D, generator=torch.Generator().manual_seed(9))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / D**0.5


def audiosae(folder: Path, **changed) -> Path:
    """A folder as AudioSAE publishes it; None leaves a tensor out."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        "encoder.weight": drawn(M, D, seed=1),
        "encoder.bias": drawn(M, seed=2),
        "decoder.weight": drawn(D, M, seed=3),
        "b_dec": drawn(D, seed=4),
        "k": torch.tensor(K),
        "threshold": torch.tensor(0.3),
    } | changed
    torch.save({name: x for name, x in held.items() if x is not None}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"k": K}}))
    return folder


def sparsify(folder: Path, settings: dict | None = None, **changed) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        "encoder.weight": drawn(M, D, seed=1),
        "encoder.bias": drawn(M, seed=2),
        "W_dec": drawn(M, D, seed=3),
        "b_dec": drawn(D, seed=4),
    } | changed
    save_file({n: x for n, x in held.items() if x is not None}, folder / "sae.safetensors")
    told = {"activation": "topk", "expansion_factor": 3, "num_latents": 0, "k": K, "d_in": D}
    told |= {"normalize_decoder": True, "multi_topk": False, "skip_connection": False}
    (folder / "cfg.json").write_text(json.dumps(told | (settings or {})))
    return folder


def saelens(folder: Path, settings: dict | None = None, **changed) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        "W_enc": drawn(D, M, seed=1),
        "b_enc": drawn(M, seed=2),
        "W_dec": drawn(M, D, seed=3),
        "b_dec": drawn(D, seed=4),
    } | changed
    save_file({n: x for n, x in held.items() if x is not None}, folder / "sae_weights.safetensors")
    told = {"architecture": "topk", "k": K, "d_in": D, "d_sae": M, "dtype": "float32"}
    told |= {"metadata": {"hook_name": "encoder.blocks.2.hook_resid_post", "model_name": "w"}}
    (folder / "cfg.json").write_text(json.dumps(told | (settings or {})))
    return folder


def keep_largest(values: torch.Tensor) -> torch.Tensor:
    top, at = values.relu().topk(K, dim=-1)
    return torch.zeros_like(values).scatter(-1, at, top)


# -------------------------------------------------------------------------------- their formulas


def test_audiosae_layers_are_counted_from_one_and_its_threshold_is_used(tmp_path: Path) -> None:
    found = autoencoders.read(audiosae(tmp_path / "layer_7"))
    values = ((ROWS - drawn(D, seed=4)) @ drawn(M, D, seed=1).T + drawn(M, seed=2)).relu()
    latents = values * (values > 0.3)
    assert (found.kind, found.k, found.site, found.layer) == (
        "batchtopk",
        K,
        "encoder.resid_post",
        6,
    )
    assert torch.allclose(found.encode(ROWS), latents, atol=1e-6)
    back = latents @ drawn(D, M, seed=3).T + drawn(D, seed=4)
    assert torch.allclose(found(ROWS), back, atol=1e-5)


def test_audiosae_without_a_threshold_keeps_the_largest(tmp_path: Path) -> None:
    found = autoencoders.read(audiosae(tmp_path / "other", threshold=None))
    assert (found.kind, found.site, found.layer) == ("topk", None, None)
    assert (found.encode(ROWS) > 0).sum(1).max() == K


def test_sparsify_is_read(tmp_path: Path) -> None:
    found = autoencoders.read(sparsify(tmp_path / "encoder.layers.3"), site="encoder.resid_post")
    values = (ROWS - drawn(D, seed=4)) @ drawn(M, D, seed=1).T + drawn(M, seed=2)
    assert torch.allclose(found.encode(ROWS), keep_largest(values), atol=1e-6)
    assert (found.site, found.layer) == ("encoder.resid_post", 3)


@pytest.mark.parametrize("takes_off", [True, False])
@pytest.mark.parametrize("rescales", [True, False])
def test_saelens_is_read(takes_off: bool, rescales: bool, tmp_path: Path) -> None:
    settings = {"apply_b_dec_to_input": takes_off, "rescale_acts_by_decoder_norm": rescales}
    found = autoencoders.read(saelens(tmp_path / "sae", settings))
    centre, decoder = drawn(D, seed=4), drawn(M, D, seed=3)
    values = (ROWS - takes_off * centre) @ drawn(D, M, seed=1) + drawn(M, seed=2)
    lengths = decoder.norm(dim=-1) if rescales else torch.ones(M)
    latents = keep_largest(values * lengths)
    assert torch.allclose(found.encode(ROWS), latents, atol=1e-5)
    assert torch.allclose(found(ROWS), (latents / lengths) @ decoder + centre, atol=1e-5)
    assert (found.site, found.layer) == ("encoder.resid_post", 2)


def test_saelens_jumprelu_and_standard_are_read(tmp_path: Path) -> None:
    values = (ROWS - drawn(D, seed=4)) @ drawn(D, M, seed=1) + drawn(M, seed=2)
    threshold = drawn(M, seed=5).abs()
    jump = saelens(tmp_path / "a", {"architecture": "jumprelu"}, threshold=threshold)
    standard = saelens(tmp_path / "b", {"architecture": "standard"})
    kept = values.relu() * (values > threshold)
    assert torch.allclose(autoencoders.read(jump).encode(ROWS), kept, atol=1e-6)
    assert torch.allclose(autoencoders.read(standard).encode(ROWS), values.relu(), atol=1e-6)


# -------------------------------------------------------------------------------- both ways


def own(kind: str) -> Autoencoder:
    threshold = {"batchtopk": torch.tensor(0.2), "jumprelu": drawn(M, seed=7).abs()}.get(kind)
    return Autoencoder(
        *(drawn(M, D, seed=1), drawn(M, seed=2), drawn(M, D, seed=3), drawn(D, seed=4)),
        kind=kind,
        k=K,
        threshold=threshold,
        site="encoder.resid_post",
        layer=2,
    )


@pytest.mark.parametrize(
    "format, kind",
    [("audiosae", "topk"), ("audiosae", "batchtopk"), ("sparsify", "topk")]
    + [("saelens", kind) for kind in ("topk", "batchtopk", "relu", "jumprelu")],
)
def test_what_is_written_is_read_again(format: str, kind: str, tmp_path: Path) -> None:
    made = own(kind)
    again = autoencoders.read(autoencoders.write(made, tmp_path / "layer_3", format))
    assert torch.allclose(again.encode(ROWS), made.encode(ROWS), atol=1e-6)
    assert torch.allclose(again(ROWS), made(ROWS), atol=1e-6)
    if format != "sparsify":
        assert (again.site, again.layer) == ("encoder.resid_post", 2)


def test_names_and_shapes_are_those_of_the_formats(tmp_path: Path) -> None:
    autoencoders.write(own("batchtopk"), tmp_path / "layer_1", "audiosae")
    held = torch.load(tmp_path / "layer_1" / "ae.pt", weights_only=True)
    assert {name: tuple(x.shape) for name, x in held.items()} == {
        "encoder.weight": (M, D),
        "encoder.bias": (M,),
        "decoder.weight": (D, M),
        "b_dec": (D,),
        "k": (),
        "threshold": (),
    }
    autoencoders.write(own("topk"), tmp_path / "sparse", "sparsify")
    assert set(load_file(tmp_path / "sparse" / "sae.safetensors")) == {
        *("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    }
    autoencoders.write(own("batchtopk"), tmp_path / "lens", "saelens")
    held = load_file(tmp_path / "lens" / "sae_weights.safetensors")
    assert held["W_enc"].shape == (D, M) and held["threshold"].shape == (M,)
    assert json.loads((tmp_path / "lens" / "cfg.json").read_text())["architecture"] == "jumprelu"


# -------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "make, changed, says",
    [
        (audiosae, {"extra": torch.zeros(2)}, "not known: extra"),
        (audiosae, {"b_dec": None}, "lacks b_dec"),
        (audiosae, {"decoder.weight": torch.zeros(M, D)}, r"decoder.weight is \(24, 8\), expected"),
        (audiosae, {"threshold": torch.tensor(-1.0)}, "threshold is -1"),
        (sparsify, {"W_skip": torch.zeros(D, D)}, "not known: W_skip"),
        (sparsify, {"settings": {"activation": "groupmax"}}, "activation 'groupmax'"),
        (sparsify, {"settings": {"skip_connection": True}}, "skip_connection makes it more"),
        (sparsify, {"settings": {"new": 1}}, "settings that are not known: new"),
        (sparsify, {"settings": {"d_in": 9}}, "d_in is 9"),
        (saelens, {"settings": {"architecture": "gated"}}, "architecture 'gated'"),
        (saelens, {"settings": {"normalize_activations": "layer_norm"}}, "normalize_activations"),
        (saelens, {"settings": {"new": 1}}, "not known: new"),
        (saelens, {"W_dec": torch.zeros(M, 3)}, r"W_dec is \(24, 3\), expected \(24, 8\)"),
        (saelens, {"threshold": torch.zeros(M)}, "threshold belongs to jumprelu"),
    ],
)
def test_what_is_not_known_is_refused_by_name(make, changed, says, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        autoencoders.read(make(tmp_path / "layer_2", **changed))


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = audiosae(tmp_path / "layer_1")
    (folder / "ae.pt").write_bytes(pickle.dumps({"k": Evil()}))
    with pytest.raises(InputError, match=r"ae.pt"):
        autoencoders.read(folder)
    assert "ran" not in capsys.readouterr().out


def test_folders_and_formats_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds none of ae.pt"):
        autoencoders.read(tmp_path)
    with pytest.raises(InputError, match=r"no format 'audio_sae'; nearest names: audiosae"):
        autoencoders.read(audiosae(tmp_path / "layer_1"), "audio_sae")
    with pytest.raises(InputError, match=r"cannot be read|no such file"):
        autoencoders.read(tmp_path, "saelens")
    with pytest.raises(InputError, match=r"sparsify holds kind topk, not 'relu'"):
        autoencoders.write(own("relu"), tmp_path / "x", "sparsify")
    assert not (tmp_path / "x").exists()
