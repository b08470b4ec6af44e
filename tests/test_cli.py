"""The command line: what it prints, what it writes, and how it says that something is wrong."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import transformers
from typer.testing import CliRunner

from audio_lens import HookedAudioTransformer, Span, cli, patching
from audio_lens.models import embedded as shipped

RATE = 16_000
RANDOM = np.random.default_rng(0)
ASKED = ["--question", "which digit is first?", "--answer", "seven", "--against", "two"]
QUICK = ["--axes", "time", "--window", "0.2"]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A tiny random Whisper that has no tokenizer files."""
    path = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=16, num_mel_bins=8, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8,
        decoder_ffn_dim=8, max_source_positions=50, max_target_positions=300,
        decoder_start_token_id=1, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(path)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(path)
    return path


@pytest.fixture
def clips(tmp_path):
    """Two clips of 0.6 s that differ between 0.2 and 0.4 s."""
    clean = RANDOM.normal(0, 0.1, int(0.6 * RATE)).astype(np.float32)
    corrupted = clean.copy()
    corrupted[int(0.2 * RATE) : int(0.4 * RATE)] = 0
    for name, samples in (("clean", clean), ("corrupted", corrupted)):
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE, subtype="FLOAT")
    return SimpleNamespace(clean=tmp_path / "clean.wav", corrupted=tmp_path / "corrupted.wav")


@pytest.fixture
def run(tmp_path, monkeypatch, embedded):
    """Runs a command with a terminal wide enough; the embedded model is loaded once."""
    monkeypatch.chdir(tmp_path)
    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda name: embedded if name == "embedded" else load(name))

    def invoke(*arguments):
        words = [str(argument) for argument in arguments]
        return CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})

    return invoke


def own(clips, *options):
    return ["map", "--clean", clips.clean, "--corrupted", clips.corrupted, *ASKED, *options]


def assert_one_red_line(result, *parts):
    assert result.exit_code == cli.BAD_INPUT, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


def test_map_prints_writes_and_saves(run, clips, tmp_path):
    result = run(*own(clips, *QUICK, "--out", "seven.html", "--save", "seven.nc"))
    assert result.exit_code == 0, result.output
    for part in ("which digit is first?", "clean.wav", "strongest cells", "seven.html", "seven.nc"):
        assert part in result.stdout
    page = (tmp_path / "seven.html").read_text()
    assert "What decides &#39;seven&#39; against &#39;two&#39;" in page
    assert page.count("<audio") == 2
    saved = patching.load(tmp_path / "seven.nc")
    assert saved.axes == ("time",) and len(saved.coords["time"]) == 3
    assert saved.meta["question"] == "which digit is first?"
    assert saved.meta["corrupted"].startswith("corrupted.wav: ")


def test_map_json_is_all_there_is_on_stdout(run, clips):
    result = run(*own(clips, "--axes", "layer", "--json"))
    told = json.loads(result.stdout)
    assert set(told["metric"]) == set(told["answers"]) == {"clean", "corrupted"}
    strengths = [abs(cell["effect"]) for cell in told["top"]]
    assert strengths == sorted(strengths, reverse=True) and len(strengths) == 6
    assert told["written"] == {"html": "map.html"}


def test_all_audio_at_once_recovers_the_clean_answer(run, clips):
    """Patching the connector over the whole clip is the clean run."""
    options = ["--site", "connector.out", "--axes", "time", "--window", "5", "--json"]
    told = json.loads(run(*own(clips, *options)).stdout)
    (cell,) = told["top"]
    assert cell["recovery"] == pytest.approx(1, abs=1e-3)
    assert cell["value"] == pytest.approx(told["metric"]["clean"], abs=1e-4)


def test_map_takes_overlapping_windows(run, clips, tmp_path):
    result = run(*own(clips, "--axes", "time", "--stride", "0.2", "--save", "map.nc"))
    assert result.exit_code == 0, result.output
    spans = patching.load(tmp_path / "map.nc").coords["time"]
    assert [(span.start_s, span.end_s) for span in spans[:2]] == [(0.0, 0.1), (0.2, 0.3)]


def test_map_without_options_takes_the_shipped_pair(run, clips, monkeypatch, tmp_path):
    pair = SimpleNamespace(
        clean=clips.clean, corrupted=clips.corrupted, question="which digit is last?",
        answer="seven", against="two", words=[Span(0.2, 0.4, "seven")],
        corrupted_words=[],
    )  # fmt: skip
    monkeypatch.setattr(shipped, "default_pair", lambda: pair, raising=False)
    result = run("map", *QUICK)
    assert result.exit_code == 0, result.output
    assert "which digit is last?" in result.stdout
    assert '"seven"' in (tmp_path / "map.html").read_text()


def test_map_on_the_clips_in_the_package(run, tmp_path):
    result = run("map", "--axes", "time", "--site", "connector.out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "map.html").is_file()


def test_same_answers_are_said_plainly(run, clips, monkeypatch, embedded):
    monkeypatch.setattr(embedded, "generate", lambda inputs, max_new_tokens: ["seven"])
    assert "answers both clips the same" in run(*own(clips, *QUICK)).stdout


def test_swapped_answers_are_noticed(run, clips, monkeypatch, embedded):
    said = iter(["seven", "two", "two", "seven"])
    monkeypatch.setattr(embedded, "generate", lambda inputs, max_new_tokens: [next(said)])
    ways = [["--answer", a, "--against", b] for a, b in (("seven", "two"), ("two", "seven"))]
    outputs = [run(*own(clips, *QUICK, *way)).stdout for way in ways]
    assert sum("swapped?" in output for output in outputs) == 1


def test_equal_clips_stop_before_the_map(run, clips, tmp_path):
    clips.corrupted = clips.clean
    assert_one_red_line(run(*own(clips)), "meaningless")
    assert not (tmp_path / "map.html").exists()


def test_clips_of_unequal_length_are_lengthened(run, clips):
    soundfile.write(clips.corrupted, np.zeros(RATE // 4), RATE)
    result = run(*own(clips, *QUICK))
    assert result.exit_code == 0, result.output
    assert "lengthened with silence to 0.60 s" in result.stderr


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--site", "decoder.resid_prr"], "resid_pre"),
        (["--axes", "layer,tone"], "tone"),
        (["--answer", "seven hundred"], "one token"),
        (["--window", "0"], "positive"),
        (["--window", "0", "--stride", "0.5"], "positive"),
        (["--model", "no_such_directory/at_all/here"], "no_such_directory"),
        (["--language", "en"], "takes no --language"),
    ],
)
def test_bad_input_is_one_red_line(run, clips, options, complaint, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_one_red_line(run(*own(clips, *options)), complaint)


@pytest.fixture
def unloadable(monkeypatch, run):
    """Loading a model fails the test: what is wrong must be said before."""
    monkeypatch.setattr(cli, "_load", lambda name: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--axes", "layer,tone"], "unknown axis 'tone'"),
        (["--axes", "layer,head,time", "--site", "decoder.attn.z"], "one or two axes"),
        (["--clean", "nothing.wav"], "nothing.wav"),
        (["--corrupted", "text.wav"], "text.wav cannot be read as audio"),
        (["--out", "no_folder/map.html"], "no folder"),
        (["--out", "."], "is a folder"),
        (["--save", "."], "is a folder"),
        (["--answer", ""], "--answer is empty"),
        (["--question", ""], "--question is empty"),
    ],
)
def test_what_needs_no_model_is_said_before_it_is_loaded(
    run, clips, unloadable, options, complaint, tmp_path
):
    (tmp_path / "text.wav").write_text("no sound")
    assert_one_red_line(run(*own(clips, *options)), complaint)


@pytest.mark.parametrize("command", [["ask", "-q", "what?"], ["transcribe"]])
def test_every_clip_is_looked_for_before_the_model_is_loaded(run, clips, unloadable, command):
    assert_one_red_line(run(*command, clips.clean, "missing.wav"), "missing.wav")


def test_an_empty_question_is_refused(run, clips, unloadable):
    assert_one_red_line(run("ask", clips.clean, "-q", ""), "--question is empty")


def test_nothing_is_generated_before_a_bad_clip_or_site(run, clips, monkeypatch, embedded):
    monkeypatch.setattr(embedded, "generate", lambda *_, **__: pytest.fail("generated"))
    soundfile.write("long.wav", np.zeros(40 * RATE), RATE)
    assert_one_red_line(run("ask", clips.clean, "long.wav", "-q", "what?"), "40")
    assert_one_red_line(run(*own(clips, "--site", "decoder.resid_prr")), "resid_pre")


def test_a_direction_is_one_of_two(run, clips):
    result = run(*own(clips, "--direction", "sideways"))
    assert result.exit_code == cli.BAD_INPUT and "'denoise', 'noise'" in result.stderr
    noise = json.loads(run(*own(clips, *QUICK, "--direction", "noise", "--json")).stdout)
    assert all(cell["effect"] == pytest.approx(1 - cell["recovery"]) for cell in noise["top"])


def test_own_clips_need_their_answers(run, clips):
    result = run("map", "--clean", clips.clean, "--answer", "seven")
    assert_one_red_line(result, "--corrupted, --against")


def test_an_audio_llm_needs_a_question(run, clips):
    options = ["--answer", "seven", "--against", "two"]
    result = run("map", "--clean", clips.clean, "--corrupted", clips.corrupted, *options)
    assert_one_red_line(result, "question")


def test_debug_shows_the_traceback(run):
    result = run("ask", "nothing.wav", "-q", "what?", "--debug")
    assert isinstance(result.exception, ValueError)


def test_other_failures_exit_with_one(run, monkeypatch):
    def fail(name):
        raise RuntimeError("boom [red]")

    monkeypatch.setattr(cli, "_load", fail)
    result = run("info")
    assert result.exit_code == 1 and result.stderr.strip() == "error: boom [red]"


def test_info_shows_parts_and_hooks(run, embedded):
    short, long = run("info"), run("info", "embedded", "--hooks")
    for part in ("encoder", "connector", "decoder", "0.02", "0.04", "215 hook points"):
        assert part in short.stdout
    assert "decoder.blocks.1" not in short.stdout
    assert all(name in long.stdout for name in embedded.hook_dict)


def test_info_json_holds_every_shape(run, embedded):
    facts = json.loads(run("info", "--json").stdout)
    assert set(facts["hooks"]) == set(embedded.hook_dict)
    assert facts["hooks"]["connector.hook_out"] == [1, 100, 192]
    assert facts["parts"]["decoder"]["kv_heads"] == embedded.cfg.decoder.n_key_value_heads
    assert facts["parts"]["encoder"]["seconds_per_position"] == 0.02
    assert facts["parameters"] == sum(p.numel() for p in embedded.parameters())


def test_info_of_whisper(run, whisper):
    facts = json.loads(run("info", whisper, "--json").stdout)
    assert facts["family"] == "whisper" and facts["longest_clip_s"] == 1.0
    assert "seconds_per_position" not in facts["parts"]["decoder"]
    assert facts["hooks"]["decoder.blocks.1.cross_attn.hook_pattern"] == [1, 2, 1, 50]


def test_ask_answers_each_clip(run, clips, embedded):
    question = ["--question", "which digit is first?"]
    both = run("ask", clips.clean, clips.corrupted, *question, "--json")
    answers = json.loads(both.stdout)
    inputs = embedded.prepare(clips.clean, text="which digit is first?")
    assert answers[str(clips.clean)] == embedded.generate(inputs, max_new_tokens=16)[0]
    assert len(answers) == 2
    assert str(clips.clean) not in run("ask", clips.clean, *question).stdout


@pytest.fixture
def speaking_whisper(whisper, run, monkeypatch):
    """The tiny Whisper with a tokenizer of two words."""
    model = HookedAudioTransformer.from_pretrained(str(whisper))
    model.tokenizer = SimpleNamespace(
        batch_decode=lambda ids, skip_special_tokens: [" [seven] "] * len(ids),
        encode=lambda word, add_special_tokens: {"seven": [5], "two": [6]}[word],
        unk_token_id=None,
    )
    monkeypatch.setattr(cli, "_load", lambda name: model)


def test_transcribe_writes_what_whisper_says(run, clips, speaking_whisper):
    assert run("transcribe", clips.clean).stdout.strip() == "[seven]"


def test_map_of_whisper_is_over_its_encoder(run, clips, speaking_whisper):
    files = ["map", "--clean", clips.clean, "--corrupted", clips.corrupted]
    words = ["--answer", "seven", "--against", "two"]
    encoder = run(*files, *words, "--site", "encoder.resid_pre", "--json")
    assert encoder.exit_code == 0, encoder.output
    assert {cell["layer"] for cell in json.loads(encoder.stdout)["top"]} == {0}
    assert_one_red_line(run(*files, *words, "--site", "decoder.resid_pre"), "position")
    assert_one_red_line(run(*files, *words, "--question", "what?"), "takes no --question")


def test_both_clips_of_a_pair_have_the_tokens_of_the_clean_one(whisper, clips, monkeypatch):
    model = HookedAudioTransformer.from_pretrained(str(whisper))
    found, asked = iter(["de", "en"]), []

    def prompt(written, language, task):
        asked.append(language)
        return written or [1, {"de": 3, "en": 4}[language or next(found)]]

    monkeypatch.setattr(model, "_prompt_of", prompt)
    case = cli.Case(clips.clean, clips.corrupted, None, "seven", "two")
    clean, corrupted = cli._prepare_pair(model, case, {"language": None})
    assert clean.tokens.tolist() == corrupted.tokens.tolist() == [[1, 3]]
    assert not torch.equal(clean.features, corrupted.features)
    chosen, _ = cli._prepare_pair(model, case, {"language": "en"})
    assert chosen.tokens.tolist() == [[1, 4]] and "en" in asked


def test_each_command_names_the_other_for_the_other_kind(run, clips, whisper):
    wrong = run("ask", clips.clean, "-q", "what?", "--model", whisper)
    assert_one_red_line(wrong, "audio-lens transcribe")
    assert_one_red_line(run("transcribe", clips.clean, "-m", "embedded"), "audio-lens ask")


@pytest.mark.parametrize("command", ["map", "info", "transcribe", "ask"])
def test_help_gives_an_example(run, command):
    text = run(command, "--help").stdout
    assert "Example" in text and f"audio-lens {command}" in text
    assert "[green]" not in text
