"""`audio-lens attention` and `audio-lens lens`: what they print and write, and what they refuse."""

import json

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from audio_lens import HookedAudioTransformer, cli
from audio_lens.cli import shared
from families import FAMILIES

RATE = 16_000
RANDOM = np.random.default_rng(0)
ASKED = ["--question", "which digit is first?"]


@pytest.fixture
def models(embedded):
    """The models that `run` knows by name."""
    options = {"ctc": {"head": "ForCTC"}, "whisper": {}}
    names = {"ctc": "wav2vec2", "whisper": "whisper"}
    built = {name: FAMILIES[names[name]].build(**options[name]) for name in names}
    made = {name: HookedAudioTransformer.from_hf(hf) for name, hf in built.items()}
    made["whisper"].feature_extractor = made["whisper"].make_feature_extractor()
    made["ctc"].feature_extractor = made["ctc"].make_feature_extractor()
    return made | {"embedded": embedded}


@pytest.fixture
def run(tmp_path, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared, "load", lambda name, *_: models[name])

    def invoke(*arguments):
        words = [str(argument) for argument in arguments]
        return CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})

    return invoke


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, RANDOM.normal(0, 0.1, int(0.6 * RATE)), RATE)
    return path


def refused(result, *parts):
    assert result.exit_code == cli.BAD_INPUT, result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


def test_attention_of_the_shipped_clip(run, tmp_path):
    result = run("attention")
    assert result.exit_code == 0, result.output
    for part in ("sharpest heads of decoder.attn", "entropy (bits)", "written to attention.html"):
        assert part in result.stdout
    page = (tmp_path / "attention.html").read_text()
    assert "Where the heads listen in seven-two-five.wav" in page


def test_attention_json_is_all_there_is_on_stdout(run, clip):
    result = run(
        "attention", clip, *ASKED, "--site", "decoder.attn", "--layer", 1, "--layer", -1,
        "--head", 2, "--json", "--out", "one.html",
    )  # fmt: skip
    told = json.loads(result.stdout)
    ((page, facts),) = told.items()
    assert page == "one.html" and facts["model"] == "embedded"
    heads = facts["sites"]["decoder.attn"]["heads"]
    assert [(head["layer"], head["head"]) for head in heads] == [(1, 2), (5, 2)]
    assert all(0 < head["on_audio"] <= 1 and head["peak_s"] < 0.6 for head in heads)


def test_lens_prints_what_layers_would_write(run, clip):
    result = run("lens", clip, *ASKED, "--token", " seven", "--layer", 2, "--json")
    lines = json.loads(result.stdout)["lens.html"]["parts"]["decoder"]
    assert [line["layer"] for line in lines] == ["2", "out"]
    assert all(line["norm"] > 0 and line["text"] for line in lines)
    result = run("lens", clip, *ASKED, "--norms", "--part", "encoder")
    assert result.exit_code == 0 and "would write" not in result.stdout


def test_whisper_and_ctc_models(run, clip):
    result = run("attention", clip, "--model", "ctc", "--json")
    assert list(json.loads(result.stdout)["attention.html"]["sites"]) == ["encoder.attn"]
    assert run("lens", clip, "--model", "ctc").exit_code == 0
    result = run("attention", clip, "--model", "whisper", "--json")
    sites = json.loads(result.stdout)["attention.html"]["sites"]
    assert list(sites) == ["decoder.cross_attn", "encoder.attn"]


def test_several_clips_go_to_a_folder(run, clip, tmp_path):
    other = tmp_path / "other.wav"
    other.write_bytes(clip.read_bytes())
    folder = tmp_path / "pages"
    folder.mkdir()
    result = run("lens", clip, other, *ASKED, "--norms", "--out", folder)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == ["lens-clip.html", "lens-other.html"]
    refused(run("lens", clip, other, *ASKED, "--out", "none"), "need a folder")
    refused(run("lens", clip, clip, *ASKED), "overwrite each other")


def test_what_cannot_be_shown_is_said(run, clip):
    refused(run("attention", "no.wav", *ASKED), "no.wav")
    refused(run("attention", clip), "--question")
    refused(run("attention", clip, *ASKED, "--text", "so"), "--text")
    refused(run("attention", clip, *ASKED, "--layer", 9), "layers 0 to 5")
    refused(run("attention", clip, *ASKED, "--site", "decoder.mlp"), "has no heads")
    refused(run("attention", clip, *ASKED, "--site", "depth.attn"), "there is decoder.attn")
    refused(run("attention", clip, *ASKED, "--model", "ctc"), "takes no question")
    refused(run("attention", clip, "--text", "so", "--model", "ctc"), "writes no text")
    refused(run("lens", clip, *ASKED, "--part", "encoder", "--token", " two"), "no vocabulary")
    refused(run("lens", "--textgrid", "words.TextGrid"), "your own clip")


@pytest.mark.parametrize("command", ["attention", "lens"])
def test_help_has_examples(run, command):
    assert "Examples" in run(command, "--help").stdout
