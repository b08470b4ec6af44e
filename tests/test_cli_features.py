"""`audio-lens features`: training, what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from audio_lens.analysis import autoencoders
from audio_lens.analysis.autoencoders import Autoencoder
from audio_lens.cli import app

QUICK = ["features", "--width", "48", "--k", "4", "--steps", "20"]


def run(*options: str, code: int = 0) -> str:
    ran = CliRunner().invoke(app, [*options])
    assert ran.exit_code == code, ran.output
    return ran.output


@pytest.mark.slow
def test_latents_are_printed_and_written(tmp_path: Path) -> None:
    page, kept = tmp_path / "page.html", tmp_path / "ae.safetensors"
    told = json.loads(run(*QUICK, "--json", "--out", str(page), "--save", str(kept)))
    assert told["written"] == {"autoencoder": str(kept), "html": str(page)}
    assert told["fvu"] > 0 and told["l0"] == pytest.approx(4, abs=0.1)
    one = told["features"][0]
    assert {"latent", "share", "peak", "said", "effects", "moments"} <= one.keys()
    assert page.stat().st_size > 10_000
    made = Autoencoder.load(kept)
    assert (made.width, made.site, made.layer) == (48, "encoder.resid_post", 3)
    folder = autoencoders.write(made, tmp_path / "layer_4", "audiosae")
    text = run("features", "--autoencoder", str(folder), "--latent", str(one["latent"]))
    assert "48 latents of kind topk lose" in text and str(one["latent"]) in text


@pytest.mark.parametrize(
    "options, says",
    [
        (["--kind", "sparse"], "kind is one of topk"),
        (["--k", "99"], "k must be"),
        (["--site", "encoder.resid_pots"], "resid_p"),
        (["--autoencoder", "nowhere.safetensors"], "there is no file"),
        (["--autoencoder", __file__, "--save", "x.safetensors"], "--autoencoder names what was"),
        (["--latent", "48"], "a latent must be"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], says: str) -> None:
    assert says in " ".join(run(*QUICK, *options, code=2).split())
