"""The command line: what it prints, what it writes, and how it says that something is wrong."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import transformers
from typer.testing import CliRunner

import audio_lens
from audio_lens import HookedAudioTransformer, Span, cli, files, patching, report, results
from audio_lens.cli import complete, shared
from audio_lens.models import embedded as shipped
from audio_lens.models.loading.checkpoints import embedded_path
from audio_lens.patching.clip_pair import ClipPair
from audio_lens.patching.engine.checkpoint import Checkpoint
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.schedule import Schedule

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
    load = shared.load

    def load_once(name, device=None, dtype=None):
        is_usual = device in (None, "cpu") and dtype in (None, torch.float32)
        return embedded if name == "embedded" and is_usual else load(name, device, dtype)

    monkeypatch.setattr(shared, "load", load_once)

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
    assert "clean" in page and "corrupted" in page
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


def test_map_of_several_sites_and_both_directions_is_one_page(run, clips):
    files = ["--clean", str(clips.clean), "--corrupted", str(clips.corrupted)]
    several = ["--site", "connector.out, resid_pre", "--direction", "both", "--axes", "time"]
    result = run("map", *files, *ASKED, *several, "--out", "several.html", "--json")
    assert result.exit_code == 0, result.output
    maps = [(one["site"], one["direction"]) for one in json.loads(result.stdout)["maps"]]
    assert maps == [
        (site, way)
        for site in ("connector.out", "decoder.resid_pre")
        for way in ("denoise", "noise")
    ]
    kept = run("map", *files, *ASKED, *several, "--save", "several.nc")
    assert kept.exit_code == 2 and "keep one map" in kept.stderr


def test_every_site_of_a_list_has_its_own_axes(run, clips):
    several = ["--site", "connector.out,decoder.attn.z", "--window", "0.3", "--layer", "3"]
    refused = run(*own(clips, *several))
    assert refused.exit_code == 2 and "connector.out" in refused.stderr
    result = run(*own(clips, *several[:-2], "--json"))
    assert result.exit_code == 0, result.stderr
    both = [one["top"][0] for one in json.loads(result.stdout)["maps"]]
    assert ["start_s" in cell for cell in both] == [True, False]
    assert ["head" in cell and "layer" in cell for cell in both] == [False, True]


def test_map_of_chosen_layers_by_one_answer(run, clips, tmp_path):
    answer = ["--answer", "seven", "--metric", "log_prob", "--layer", "1", "-l", "3"]
    files = ["map", "--clean", clips.clean, "--corrupted", clips.corrupted, "-q", ASKED[1]]
    result = run(*files, *answer, "--axes", "layer", "--save", "new/folder/map.nc")
    assert result.exit_code == 0, result.output
    assert "metric: log-probability of" in result.stdout
    saved = patching.load(tmp_path / "new" / "folder" / "map.nc")
    assert saved.coords["layer"] == [1, 3]


def test_a_token_can_be_named_by_its_id(run, clips, embedded):
    ids = [f"id:{embedded.to_single_token(word)}" for word in ("seven", "two")]
    named = ["--answer", ids[0], "--against", ids[1], "--axes", "layer", "--json"]
    one, other = (json.loads(run(*own(clips, *words)).stdout) for words in (named, named[4:]))
    assert one["metric"] == other["metric"] and one["top"] == other["top"]


def textgrid(tier, word):
    """One word, in the short form of Praat."""
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n0.6\n<exists>\n1\n'
    return f'{head}"IntervalTier"\n"{tier}"\n0\n0.6\n1\n0.1\n0.5\n"{word}"\n'


def test_words_of_a_textgrid_stand_below_the_wave(run, clips, monkeypatch, tmp_path):
    (tmp_path / "clean.TextGrid").write_text(textgrid("words", "digit"))
    (tmp_path / "other.TextGrid").write_text(textgrid("spoken", "number"))
    drawn = {}
    monkeypatch.setattr(report, "map_page", lambda *arguments, **options: drawn.update(options))
    said = ["--textgrid", "clean.TextGrid", "--corrupted-textgrid", "other.TextGrid"]
    run(*own(clips, *QUICK, *said))
    assert drawn["words"] == [Span(0.1, 0.5, "digit")]
    assert drawn["corrupted_words"] == [Span(0.1, 0.5, "number")]
    assert_one_red_line(run("map", *said), "of your own clip")


def test_map_takes_overlapping_windows(run, clips, tmp_path):
    result = run(*own(clips, "--axes", "time", "--stride", "0.2", "--save", "map.nc"))
    assert result.exit_code == 0, result.output
    spans = patching.load(tmp_path / "map.nc").coords["time"]
    assert [(span.start_s, span.end_s) for span in spans[:2]] == [(0.0, 0.1), (0.2, 0.3)]


def test_map_without_options_takes_the_shipped_pair(run, clips, monkeypatch):
    pair = SimpleNamespace(
        clean=clips.clean, corrupted=clips.corrupted, question="which digit is last?",
        answer="seven", against="two", words=[Span(0.2, 0.4, "seven")],
        corrupted_words=[],
    )  # fmt: skip
    monkeypatch.setattr(shipped, "default_pair", lambda: pair, raising=False)
    drawn = {}
    monkeypatch.setattr(report, "map_page", lambda *arguments, **options: drawn.update(options))
    result = run("map", *QUICK)
    assert result.exit_code == 0, result.output
    assert "which digit is last?" in result.stdout
    assert drawn["words"] == pair.words


def test_map_on_the_clips_in_the_package(run, tmp_path):
    result = run("map", "--axes", "time", "--site", "connector.out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "map.html").is_file()


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_command_runs_in_every_precision(run, clips, dtype):
    asked = [clips.clean, "--question", "which digit is first?", "--dtype", dtype]
    for command in (
        own(clips, *QUICK, "--save", "map.nc", "--dtype", dtype),
        ["attention", *asked],
        ["lens", *asked],
        ["ask", *asked],
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
    assert patching.load("map.nc").meta["dtype"] == dtype


def test_same_answers_are_said_plainly(run, clips, monkeypatch, embedded):
    monkeypatch.setattr(embedded, "generate", lambda inputs, **_: ["seven"])
    assert "answers both clips the same" in run(*own(clips, *QUICK)).stdout


def test_swapped_answers_are_noticed(run, clips, monkeypatch, embedded):
    said = iter(["seven", "two", "two", "seven"])
    monkeypatch.setattr(embedded, "generate", lambda inputs, **_: [next(said)])
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
        (["--answer", "seven hundred"], "not one: use a word that is one (mind the leading space)"),
        (["--answer", "id:seven"], "'id:seven' names no token"),
        (["--answer", "id:123456"], "123456"),
        (["--metric", "ctc_diff"], "does not fit"),
        (["--layer", "99"], "99"),
        (["--window", "0"], "positive"),
        (["--window", "0", "--stride", "0.5"], "positive"),
        (["--model", "no_such_directory/at_all/here"], "no_such_directory"),
        (["--language", "en"], "takes no language"),
        (["--device", "cuda:97"], "no such device: cuda:97"),
        (["--device", "gpu"], "no such device: gpu"),
    ],
)
def test_bad_input_is_one_red_line(run, clips, options, complaint, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_one_red_line(run(*own(clips, *options)), complaint)


@pytest.fixture
def unloadable(monkeypatch, run):
    """Loading a model fails the test: what is wrong must be said before."""
    monkeypatch.setattr(shared, "load", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--axes", "layer,tone"], "unknown axis 'tone'"),
        (["--axes", "layer,head,time", "--site", "decoder.attn.z"], "one or two axes"),
        (["--clean", "nothing.wav"], "nothing.wav"),
        (["--corrupted", "text.wav"], "text.wav cannot be read as audio"),
        (["--metric", "log_prob"], "--metric log_prob reads one answer: leave out --against"),
        (["--textgrid", "gone.TextGrid"], "there is no file gone.TextGrid"),
        (["--out", "clean.wav/map.html"], "there is no folder"),
        (["--out", "."], "is a folder"),
        (["--save", "."], "is a folder"),
        (["--checkpoint", "."], "is a folder"),
        (["--save", "/dev/null"], "is a device"),
        (["--checkpoint", "/dev/full"], "is a device"),
        (["--out", "/proc/map.html"], "/proc/map.html cannot be written"),
        (["--save", "/proc/map.nc"], "/proc/map.nc cannot be written"),
        (["--out", "one", "--save", "./one"], "--out and --save are one file"),
        (["--save", "one", "--checkpoint", "one"], "--save and --checkpoint are one file"),
        (["--out", "clean.wav"], "--out would overwrite clean.wav, which is read"),
        (["--save", "corrupted.wav"], "--save would overwrite corrupted.wav"),
        (["--checkpoint", "link.ckpt"], "--checkpoint would overwrite link.ckpt"),
        (["--checkpoint-every", "3"], "--checkpoint-every belongs to --checkpoint"),
        (["--answer", ""], "--answer is empty"),
        (["--question", ""], "--question is empty"),
    ],
)
def test_what_needs_no_model_is_said_before_it_is_loaded(
    run, clips, unloadable, options, complaint, tmp_path
):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "link.ckpt").symlink_to(clips.clean)
    sound = clips.clean.read_bytes()
    assert_one_red_line(run(*own(clips, *options)), complaint)
    assert clips.clean.read_bytes() == sound


def test_a_checkpoint_of_a_model_is_not_overwritten(run, clips, unloadable, whisper):
    over = ["--model", whisper, "--save", whisper / "model.safetensors"]
    assert_one_red_line(run(*own(clips, *over)), "--save would overwrite")


def test_an_output_that_fails_costs_no_other(run, clips, monkeypatch, tmp_path):
    """The disk of --save fills up while the map is made; the page is written all the same."""
    honest = files.write

    def write(path, data):
        if path.suffix == ".nc":
            raise files.OutputError(f"{path} cannot be written (No space left on device)")
        return honest(path, data)

    monkeypatch.setattr(results.result, "write", write)
    result = run(*own(clips, *QUICK, "--save", "map.nc"))
    assert_one_red_line(result, "map.nc cannot be written (No space left on device)")
    assert "html written to map.html" in result.stdout and "netcdf" not in result.stdout
    assert (tmp_path / "map.html").is_file() and not (tmp_path / "map.nc").exists()


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


def test_directions_and_metrics_are_those_that_are_named(run, clips):
    result = run(*own(clips, "--direction", "sideways"))
    assert result.exit_code == cli.BAD_INPUT and "'denoise', 'noise'" in result.stderr
    metric = run(*own(clips, "--metric", "wer"))
    assert metric.exit_code == cli.BAD_INPUT and "'logit_diff', 'log_prob'" in metric.stderr
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

    monkeypatch.setattr(shared, "load", fail)
    result = run("info")
    assert result.exit_code == 1 and result.stderr.strip() == "error: boom [red]"


def test_version(run):
    assert run("--version").stdout == f"audio-lens {audio_lens.__version__}\n"


def test_models_fit_into_80_columns(run):
    shown = run("models").stdout
    table = shown[: shown.index("of each part")].splitlines()
    assert max(map(len, table)) <= 80
    assert any("audio_spectrogram_transformer" in line for line in table)


def test_info_shows_parts_and_hooks(run, embedded):
    short, long = run("info"), run("info", "embedded", "--hooks")
    for part in ("encoder", "connector", "decoder", "0.02", "0.04", "221 hook points"):
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
def talking(tmp_path):
    """The shipped checkpoint in a folder, that has much to say and may say 30 tokens."""
    folder = tmp_path / "talking"
    shutil.copytree(embedded_path(), folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"eos_token_id": 409, "max_new_tokens": 30}
    path.write_text(json.dumps(settings))
    return folder


def test_a_cut_is_printed_and_the_limit_can_be_set(run, clips, talking):
    asked = ("ask", clips.clean, "-q", "which digit is first?", "-m", talking)
    model = HookedAudioTransformer.from_pretrained(talking)
    inputs = model.prepare(clips.clean, text="which digit is first?")
    usual = run(*asked)
    with pytest.warns(UserWarning, match="cut after 30 new tokens"):
        assert usual.stdout.strip() == model.generate(inputs)[0]
    assert "cut after 30 new tokens, by max_new_tokens=30 of the generation" in usual.stderr
    assert str(clips.clean) in usual.stderr
    few = run(*asked, "--max-new-tokens", 5, "--json")
    with pytest.warns(UserWarning, match="cut after 5 new tokens"):
        expected = model.generate(inputs, max_new_tokens=5)
    assert list(json.loads(few.stdout).values()) == expected
    assert "cut after 5 new tokens, by max_new_tokens." in few.stderr
    quiet = run("ask", clips.clean, "-q", "which digit is first?")
    assert "cut" not in quiet.stderr


def test_the_limit_of_a_page_and_of_a_map_can_be_set(run, clips, talking):
    options = ("--max-new-tokens", 3, "-m", talking)
    page = run("attention", clips.clean, "-q", "which digit is first?", "--layer", 0, *options)
    assert "warning: the text was cut after 3 new tokens" in page.stderr
    mapped = run(*own(clips, *QUICK, "--json"), *options)
    assert mapped.stderr.count("cut after 3 new tokens") == 2
    assert json.loads(mapped.stdout)["answers"]["clean"]


@pytest.fixture
def speaking_whisper(whisper, run, monkeypatch):
    """The tiny Whisper with a tokenizer of two words."""
    model = HookedAudioTransformer.from_pretrained(str(whisper))
    model.tokenizer = SimpleNamespace(
        batch_decode=lambda ids, skip_special_tokens: [" [seven] "] * len(ids),
        encode=lambda word, add_special_tokens: {"seven": [5], "two": [6]}[word],
        unk_token_id=None,
    )
    monkeypatch.setattr(shared, "load", lambda *_: model)


def test_transcribe_writes_what_whisper_says(run, clips, speaking_whisper):
    assert run("transcribe", clips.clean).stdout.strip() == "[seven]"


def test_map_of_whisper_is_over_its_encoder(run, clips, speaking_whisper):
    files = ["map", "--clean", clips.clean, "--corrupted", clips.corrupted]
    words = ["--answer", "seven", "--against", "two"]
    encoder = run(*files, *words, "--site", "encoder.resid_pre", "--json")
    assert encoder.exit_code == 0, encoder.output
    assert {cell["layer"] for cell in json.loads(encoder.stdout)["top"]} == {0}
    assert_one_red_line(run(*files, *words, "--site", "decoder.resid_pre"), "position")
    assert_one_red_line(run(*files, *words, "--question", "what?"), "takes no question")


def test_both_clips_of_a_pair_have_the_tokens_of_the_clean_one(whisper, clips, monkeypatch):
    model = HookedAudioTransformer.from_pretrained(str(whisper))
    model.generation_config.lang_to_id = {"<|de|>": 3, "<|en|>": 4}
    found = iter([[3], [4]])
    monkeypatch.setattr(model, "_languages", lambda features: next(found))
    pair = ClipPair(clips.clean, clips.corrupted)
    clean, corrupted = pair.inputs(model)
    assert clean.tokens.tolist() == corrupted.tokens.tolist() == [[1, 3]]
    assert not torch.equal(clean.features, corrupted.features)
    chosen, _ = replace(pair, language="en").inputs(model)
    assert chosen.tokens.tolist() == [[1, 4]]


def test_each_command_names_the_other_for_the_other_kind(run, clips, whisper):
    wrong = run("ask", clips.clean, "-q", "what?", "--model", whisper)
    assert_one_red_line(wrong, "audio-lens transcribe")
    assert_one_red_line(run("transcribe", clips.clean, "-m", "embedded"), "audio-lens ask")


COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_examples_and_every_command_speaks_json(run, command):
    text = run(command, "--help").stdout
    assert "Example" in text and f"audio-lens {command}" in text
    assert "[green]" not in text
    for option in ("--json", "--debug", "--verbose"):
        assert option in text or (command, option) == ("explore", "--json")  # it shows a page


# -------------------------------------------------------------------------------- exit codes


def test_exit_codes_are_those_of_the_help(run, monkeypatch):
    text = run("--help").stdout
    assert "0 done, 2 input that cannot be used, 1 anything else, 130 interrupted" in text
    assert run("models").exit_code == 0
    assert run("info", "no/such/folder").exit_code == run("map", "--nonsense").exit_code == 2
    for error, code in ((RuntimeError, 1), (ValueError, 2), (OSError, 2), (KeyboardInterrupt, 130)):

        def fail(name, error=error):
            raise error("no")

        monkeypatch.setattr(shared, "load", fail)
        assert run("info").exit_code == code


def test_an_interrupted_map_goes_on_from_its_checkpoint(run, clips, monkeypatch):
    whole = json.loads(run(*own(clips, "--axes", "layer", "--json")).stdout)
    command = own(clips, "--axes", "layer", "--checkpoint", "map.ckpt", "--json", "--verbose")
    measured, measure = [], Readout.measure_together

    def interrupt(readout, rows, run):
        measured.append(run)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(readout, rows, run)

    with monkeypatch.context() as patched:
        patched.setattr(Schedule, "next", lambda _, queue, __: [queue.popleft(), queue.popleft()])
        patched.setattr(Readout, "measure_together", interrupt)
        stopped = run(*command)
    assert stopped.exit_code == cli.INTERRUPTED and stopped.stdout == ""
    assert "kept in map.ckpt; the same command goes on from there" in stopped.stderr
    rest = run(*command)
    assert rest.exit_code == 0 and "of 6 cells were done before" in rest.stderr
    tops = json.loads(rest.stdout)["top"], whole["top"]
    values = [{cell["layer"]: cell["value"] for cell in top} for top in tops]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_interval_of_checkpoints_is_an_option(run, clips, monkeypatch):
    intervals, make = [], Checkpoint.__init__

    def noted(self, path, identity, every_s):
        intervals.append(every_s)
        make(self, path, identity, every_s)

    monkeypatch.setattr(Checkpoint, "__init__", noted)
    command = own(clips, "--axes", "layer", "--checkpoint", "map.ckpt", "--json")
    for options in ([], ["--checkpoint-every", "0.5"], ["--checkpoint-every", "0"]):
        assert run(*command, *options).exit_code == 0
    assert intervals == [2.0, 0.5, 0.0]
    for wrong in ("-1", "nan"):
        assert run(*command, "--checkpoint-every", wrong).exit_code == cli.BAD_INPUT


def test_a_map_without_values_is_not_reproduced(run, tmp_path):
    assert run("map", "--axes", "layer", "--save", "map.nc").exit_code == 0
    saved = patching.load(tmp_path / "map.nc")
    saved.values[:] = float("nan")
    saved.save(tmp_path / "map.nc")
    result = run("reproduce", "map.nc")
    assert_one_red_line(result, "holds no value, only NaN")
    assert "agree" not in result.output


def test_an_interrupt_before_there_is_anything_says_so(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "load", interrupt)
    assert "nothing was kept" in run("info").stderr
    assert "the same command starts again" in run("map", "--checkpoint", "map.ckpt").stderr


# -------------------------------------------------------------------------------- what is said


def test_verbose_tells_what_is_done(run, clips):
    command = own(clips, *QUICK, "--json")
    quiet, verbose = run(*command), run(*command, "--verbose")
    assert "each cell runs:" in verbose.stderr and "each cell runs:" not in quiet.stderr
    assert json.loads(verbose.stdout)["top"] == json.loads(quiet.stdout)["top"]


def test_progress_is_for_terminals_and_for_who_asks(run, clips):
    command = own(clips, *QUICK)
    assert "3 of 3 cells" not in run(*command).stderr
    assert "3 of 3 cells" in run(*command, "--progress").stderr


def test_verified_cells_are_reported(run, clips):
    told = json.loads(run(*own(clips, *QUICK, "--verify", "2", "--json")).stdout)
    assert any("2 random cells verified" in note for note in told["report"])


def test_json_holds_no_infinity(capsys):
    shared.print_json({"a": [float("inf"), 1.5], "b": (float("nan"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None]}


# -------------------------------------------------------------------------------- reproduce


def test_a_map_is_reproduced_from_its_file(run, clips, tmp_path):
    run(*own(clips, *QUICK, "--save", "map.nc"))
    result = run("reproduce", "map.nc", "--save", "again.nc")
    assert result.exit_code == 0, result.output
    assert "3 values agree" in result.stdout
    again = [patching.load(tmp_path / name) for name in ("map.nc", "again.nc")]
    torch.testing.assert_close(again[0].values, again[1].values)
    told = json.loads(run("reproduce", "map.nc", "--json").stdout)
    assert told["agrees"] and told["n_cells"] == 3 and told["changed"] == {}


def test_reproduce_overwrites_nothing_it_reads(run, clips, monkeypatch):
    run(*own(clips, *QUICK, "--save", "map.nc"))
    monkeypatch.setattr(shared, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for path in ("map.nc", "clean.wav"):
        assert_one_red_line(run("reproduce", "map.nc", "--save", path), "--save would overwrite")


def test_changed_clips_are_noticed(run, clips, tmp_path):
    run(*own(clips, *QUICK, "--save", "map.nc"))
    moved = clips.clean.rename(tmp_path / "moved.wav")
    assert_one_red_line(run("reproduce", "map.nc"), "clean clip is not at", "clean")
    assert run("reproduce", "map.nc", "--clean", moved).exit_code == 0
    soundfile.write(clips.corrupted, np.zeros(RATE), RATE)
    assert_one_red_line(run("reproduce", "map.nc", "--clean", moved), "hash of the file differs")


def test_values_that_do_not_agree_exit_with_one(run, clips):
    run(*own(clips, *QUICK, "--save", "map.nc"))
    saved = patching.load("map.nc")
    saved.values += 1
    saved.meta["torch"] = "1.0"
    saved.save("map.nc")
    result = run("reproduce", "map.nc")
    assert result.exit_code == cli.FAILED
    assert "do not agree" in result.stdout and "torch" in result.stdout


def test_what_is_no_map_is_refused(run, clips, unloadable):
    assert_one_red_line(run("reproduce", "nothing.nc"), "there is no file nothing.nc")
    assert_one_red_line(run("reproduce", clips.clean), "does not hold a saved sweep")


# -------------------------------------------------------------------------------- completion


def completed(words):
    """What bash is offered at the end of a line."""
    count = len(words.split(" ")) - 1
    environment = {
        "COMP_WORDS": words, "COMP_CWORD": str(count), "_AUDIO_LENS_COMPLETE": "complete_bash",
    }  # fmt: skip
    result = CliRunner().invoke(cli.app, [], prog_name="audio-lens", env=environment)
    return result.output.split()


def test_completion_can_be_installed(run, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = CliRunner().invoke(cli.app, ["--show-completion", "bash"], prog_name="audio-lens")
    assert shown.exit_code == 0 and "_AUDIO_LENS_COMPLETE=complete_bash" in shown.output
    assert "--install-completion" in run("--help").stdout


def test_completion_offers_sites_axes_and_models():
    assert "reproduce" in completed("audio-lens re")
    assert "connector.out" in completed("audio-lens map --site conn")
    assert not any("cross" in site for site in completed("audio-lens map --site decoder."))
    whisper = completed("audio-lens map -m openai/whisper-tiny --site decoder.cross_attn.")
    assert "decoder.cross_attn.z" in whisper
    assert completed("audio-lens map --axes layer,t") == ["layer,time"]
    assert completed("audio-lens info emb") == ["embedded"]


def test_every_site_of_the_shipped_model_is_offered(embedded):
    offered = completed("audio-lens map --site ")
    assert {str(site) for site in patching.sites_of(embedded)} <= set(offered)
    for site in offered:
        if site.startswith("decoder."):
            patching.Site.parse(site, embedded)


def test_checkpoints_at_hand_are_offered(tmp_path, monkeypatch, whisper):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--someone--her-model").mkdir()
    assert [name for name, _ in complete.models("some")] == ["someone/her-model"]
    offered = [name for name, _ in complete.models(str(whisper))]
    assert offered == [str(whisper)]


def test_completion_and_help_import_nothing_heavy():
    script = "import sys, audio_lens.cli; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["models"], "qwen2_audio"),
        (["models", "--json"], '"entries"'),
        (["map", "--help"], "--axes"),
        (["map", "--axes", "tone"], "unknown axis 'tone'"),
        (["map", "--site", "encoder.tone"], "no site of any model"),
        (["map", "--clean", "gone.wav"], "there is no file gone.wav"),
        (["attention", "--site", "encoder.mlp"], "has no heads"),
    ],
)
def test_what_needs_no_model_does_not_wait_for_torch(command, says):
    without = "import sys; sys.modules['torch'] = None; from audio_lens import cli; cli.main()"
    made = subprocess.run([sys.executable, "-c", without, *command], capture_output=True, text=True)
    assert says in made.stdout + made.stderr and made.returncode in (0, cli.BAD_INPUT)
