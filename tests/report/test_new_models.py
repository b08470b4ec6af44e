"""Pages of several ears, streams of codes, tokens without time, and texts that are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tokenizers
import torch
import transformers
from browsing import until
from pages import Page
from typer.testing import CliRunner

from audio_lens import HookedAudioTransformer, InputError, cli, metrics, patching
from audio_lens.analysis.attention import read_attention, sites_of
from audio_lens.analysis.logit_lens import read_streams
from audio_lens.analysis.prompts import Prompt
from audio_lens.models.compose.assemble import Placeholder
from audio_lens.report import attention_page, cache_page, map_page
from audio_lens.report.packing import coarser
from families import FAMILIES
from families.audio_llms import extractor
from families.base import AUDIO_TOKEN, randomise
from models.test_composed import D_EAR, Beside, composed, language_model, tokenizer, whisper

rng = np.random.default_rng(0)


def noise(seconds: float, rate: int) -> np.ndarray:
    return rng.normal(0, 0.1, round(seconds * rate)).astype(np.float32)


def words(count: int = 100, **named: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of words w0, w1 ..."""
    ids = {f"w{i}": i for i in range(count)} | named
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "w3"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w3")


def tiny(name: str, **options):
    family = FAMILIES[name]
    return family.hooked(family.build(**options))


@pytest.fixture
def moshi():
    return tiny("moshi")


@pytest.fixture
def conversation(moshi):
    """A second of both voices, with words along; codes behind the initial ones."""
    rate, steps = moshi.cfg.sampling_rate, 12
    text = [rng.integers(5, 90, steps).tolist()]
    return moshi.prepare(noise(0.96, rate), text, rate, own=noise(0.96, rate))


@pytest.fixture
def kyutai():
    model = tiny("kyutai_stt")
    model.feature_extractor = transformers.KyutaiSpeechToTextFeatureExtractor(
        sampling_rate=model.cfg.sampling_rate,
        audio_delay_seconds=0.16,
        audio_silence_prefix_seconds=0.24,
    )
    model.tokenizer = words()
    return model


@pytest.fixture
def musicgen():
    model = tiny("musicgen")
    model.tokenizer = words()
    return model


@pytest.fixture
def music(musicgen):
    """Half a second that goes on from a text of four words."""
    rate = musicgen.cfg.sampling_rate
    return musicgen.prepare(noise(0.5, rate), "w7 w8 w9 w10", sampling_rate=rate)


@pytest.fixture
def desta():
    return tiny("desta2")


@pytest.fixture
def timeless(desta):
    n_queries = FAMILIES["desta2"].batch()["input_ids"].eq(AUDIO_TOKEN).sum(1)[0]
    wave = noise(1.0, 16_000)
    made = extractor(desta)(
        [wave], sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
    )
    row = [7, *[AUDIO_TOKEN] * int(n_queries), 8, 9]
    return desta.as_inputs(
        {
            "input_ids": torch.tensor([row]),
            "input_features": made["input_features"],
            "feature_attention_mask": made["attention_mask"],
        }
    ), wave


def heat(page: Page, site: int = 0) -> tuple[dict, dict]:
    view = page.data["views"][site]
    return view, view["traces"][1]


# ------------------------------------------------------------------------ steps of a decoder


def test_steps_attend_to_steps(moshi, conversation):
    prompt = Prompt.of(moshi, conversation)
    assert sites_of(prompt) == ["decoder.attn"]
    (found,) = read_attention(prompt, ["decoder.attn"])
    assert found.is_timed and found.name == "decoder, steps to steps"
    seconds = moshi.timeline(conversation).seconds("decoder")
    timed = seconds.isfinite()
    _, cache = moshi.run_with_cache(conversation, attention=True)
    pattern = cache["decoder.blocks.1.attn.hook_pattern"][0][:, timed][..., timed]
    centres = [sum(query.span) / 2 for query in found.queries]
    assert centres == pytest.approx(seconds[timed].tolist(), abs=1e-6)
    np.testing.assert_allclose(found.share[1], pattern.numpy(), atol=1e-6)
    assert found.on_audio[1] == pytest.approx(pattern.sum(-1).numpy(), abs=1e-5)


def test_depth_decoders_have_no_seconds_to_attend_to(moshi, conversation):
    prompt = Prompt.of(moshi, conversation)
    with pytest.raises(InputError, match=r"at depth\.attn: in this model there is decoder\.attn"):
        sites_of(prompt, "depth.attn")


def test_pages_of_a_conversation(moshi, conversation, tmp_path):
    path = attention_page(moshi, conversation, tmp_path / "a.html")
    view, _ = heat(Page(path))
    assert view["timed"] and len(view["queries"]) == 12
    page = Page(cache_page(moshi, conversation, tmp_path / "c.html"))
    assert list(page.data["parts"]) == ["depth", "decoder"]
    decoder, depth = (page.data["parts"][part] for part in ("decoder", "depth"))
    assert np.diff(decoder["edges"]) == pytest.approx(0.08, abs=1e-4)
    assert depth["edges"][-1] <= 0.961 + 0.08
    assert decoder["names"][1] == ["#100"]
    assert "audio.1 by 0.08 s" in page.text["li"]


def test_the_lens_of_streams_reads_the_text(moshi, conversation):
    (decoder, depth) = read_streams(
        Prompt.of(moshi, conversation), ["decoder", "depth"], lens=True, tokens=[7]
    )
    with torch.no_grad():
        logits = moshi.stream(moshi(conversation), "text")[0]
    chances = logits.softmax(-1)[torch.cat([decoder.audio.index, decoder.text.index])]
    assert decoder.lens.probs[-1, :, 0] == pytest.approx(chances.amax(-1).numpy(), abs=1e-5)
    assert decoder.lens.watched["7"][-1] == pytest.approx(chances[:, 7].numpy(), abs=1e-5)
    assert (
        depth.lens is None and len(depth.audio) + len(depth.text) == 13 * 4 - 1
    )  # one lies behind
    with pytest.raises(InputError, match="the text has 100 tokens, so none is 120"):
        read_streams(Prompt.of(moshi, conversation), ["decoder"], lens=True, tokens=[120])


def test_what_lies_ahead_is_heard_before_it_is_shown(moshi):
    rate = moshi.cfg.sampling_rate
    inputs = moshi.prepare(noise(0.8, rate), sampling_rate=rate)
    assert inputs.shape[1] == 1
    shown = Prompt.of(moshi, inputs).shown(None)
    expected = moshi.continued(inputs, shown.inputs.shape[1] - 1)
    assert torch.equal(shown.inputs.tokens, expected.tokens)
    assert len(shown.places("decoder")) == 10
    longer = Prompt.of(moshi, inputs).shown(5)
    assert longer.inputs.shape[1] == 6


def test_transcripts_are_shown_up_to_their_last_word(kyutai, tmp_path):
    """The text lags, so that the last words are written in the silence behind the clip."""
    rate = kyutai.cfg.sampling_rate
    inputs = kyutai.prepare(noise(0.8, rate), sampling_rate=rate)
    whole = kyutai.continued(inputs)
    seconds = kyutai.timeline(whole).seconds("decoder")
    assert seconds[-1] > 0.8
    prompt = Prompt.of(kyutai, inputs).shown()
    assert prompt.places("decoder").index[-1] == whole.shape[1] - 1
    page = Page(cache_page(kyutai, inputs, tmp_path / "c.html"))
    assert page.data["parts"]["decoder"]["edges"][-1] == pytest.approx(float(seconds[-1]), abs=0.05)
    assert page.data["parts"]["decoder"]["layout"]["xaxis"]["range"][1] >= float(seconds[-1])
    written = kyutai.tokenizer.decode(kyutai(whole)[0].argmax(-1).tolist())
    assert written in page.text["td"]
    assert "text by 0.16 s" in page.text["li"]
    view, _ = heat(Page(attention_page(kyutai, inputs, tmp_path / "a.html")))
    assert len(view["queries"]) == int(seconds.isfinite().sum())


# ------------------------------------------------------------------------ words that are read


def test_steps_read_words(musicgen, music, tmp_path):
    prompt = Prompt.of(musicgen, music)
    assert sites_of(prompt) == ["decoder.cross_attn", "decoder.attn"]
    (found,) = read_attention(prompt, ["decoder.cross_attn"])
    assert found.name == "decoder, steps to text (cross)"
    assert [query.label for query in found.queries] == ["w7", "w8", "w9", "w10"]
    _, cache = musicgen.run_with_cache(music, attention=True)
    pattern = cache["decoder.blocks.2.cross_attn.hook_pattern"][0]
    timed = musicgen.timeline(music).seconds("decoder").isfinite()
    np.testing.assert_allclose(found.share[2], pattern[:, timed].mT.numpy(), atol=1e-6)
    assert found.share.sum(2) == pytest.approx(1.0, abs=1e-5)
    assert found.on_audio[2] == pytest.approx(pattern[:, timed].mean(1).numpy(), abs=1e-5)
    halved = coarser(found)
    assert halved.share[..., 0] == pytest.approx(found.share[..., :2].mean(-1), abs=1e-6)
    page = Page(attention_page(musicgen, music, tmp_path / "a.html"))
    view, _ = heat(page)
    assert view["share_of"].startswith("of the attention of all steps") and not view["timed"]
    assert page.text["dd"].startswith("w7 w8 w9 w10") or "w7 w8 w9 w10" in page.text["dd"]


def test_click_on_a_word_plays_where_it_is_read(tmp_path, browse):
    rate = 4000  # browsers play no less than 3000 Hz
    model = tiny("musicgen", codec={"sampling_rate": rate, "target_bandwidths": [6.0]})
    model.tokenizer = words()
    music = model.prepare(noise(0.4, rate), "w7 w8 w9 w10", sampling_rate=rate)
    page = browse(attention_page(model, music, tmp_path / "a.html", layers=[1], heads=[0]))
    page.locator("#queries button").nth(2).click()
    until(page, "started.length > 0")
    until(page, "document.getElementById('status').textContent.startsWith('w9: ')")
    assert "% of the attention of all steps is on it" in page.text_content("#status")
    assert page.text_content("#share-head") == "per word"
    assert "where it is read" in page.text_content("#how")
    page.select_option("#site", "1")
    until(page, "document.getElementById('share-head').textContent === 'on audio'")


def test_padded_words_are_no_rows(musicgen):
    batch = FAMILIES["musicgen"].batch(words=(7, 4))
    rate = musicgen.cfg.sampling_rate
    inputs = musicgen.as_inputs(batch)
    prompt = Prompt.of(musicgen, inputs, row=1, audio=noise(0.12, rate))
    (found,) = read_attention(prompt, ["decoder.cross_attn"])
    wanted = [f"w{i}" for i in batch["input_ids"][1, :4].tolist()]
    assert [query.label for query in found.queries] == wanted


def test_codes_are_not_words(musicgen, music, tmp_path):
    page = Page(cache_page(musicgen, music, tmp_path / "c.html"))
    decoder, encoder = (page.data["parts"][part] for part in ("decoder", "encoder"))
    assert decoder["names"][1] == ["#16"]
    assert np.diff(decoder["edges"]) == pytest.approx(0.02, abs=1e-4)
    assert encoder["edges"] == [] and encoder["names"] == [["w7", "w8", "w9", "w10"]]
    assert [view["key"] for view in page.data["views"]] == ["norm", "norm"]
    with pytest.raises(InputError, match=r"no vocabulary .*audio\.0, .*which are codes"):
        cache_page(musicgen, music, tmp_path / "c.html", parts="decoder", lens=True)
    with pytest.raises(InputError, match="this model writes codes"):
        attention_page(musicgen, music, tmp_path / "a.html", answer=4)


def test_texts_alone_have_nothing_to_hear(musicgen, tmp_path):
    inputs = musicgen.prepare(text="w7 w8")
    with pytest.raises(InputError, match="no waveform to show and play: pass audio="):
        attention_page(musicgen, inputs, tmp_path / "a.html")
    with pytest.raises(InputError, match=r"the clip in the inputs at most 0\.00 s"):
        attention_page(musicgen, inputs, tmp_path / "a.html", audio=noise(0.5, 400))


# ------------------------------------------------------------------------ tokens without time


def test_tokens_without_time_have_columns_of_their_own(desta, timeless, tmp_path):
    inputs, wave = timeless
    n_audio = int((inputs.tokens == AUDIO_TOKEN).sum())
    page = Page(cache_page(desta, inputs, tmp_path / "c.html", audio=wave))
    decoder, encoder = (page.data["parts"][part] for part in ("decoder", "encoder"))
    assert decoder["edges"] == []
    wanted = ["#7", *(f"[audio {i}]" for i in range(n_audio)), "#8", "#9"]
    assert decoder["names"] == [wanted]
    assert encoder["edges"][-1] == pytest.approx(1.0, abs=0.03)


def test_attention_to_tokens_without_time_raises(desta, timeless, tmp_path):
    inputs, wave = timeless
    with pytest.raises(InputError, match=r"no seconds: .*profile\.time_profile says"):
        attention_page(desta, inputs, tmp_path / "a.html", audio=wave, sites="decoder.attn")
    view, _ = heat(Page(attention_page(desta, inputs, tmp_path / "a.html", audio=wave)))
    assert view["site"] == "encoder.attn"


# ------------------------------------------------------------------------ two ears, two streams


@pytest.fixture
def two_ears():
    second = FAMILIES["wav2vec2"].build()
    return HookedAudioTransformer.compose(
        {"encoder": whisper(), "second": second},
        randomise(Beside(D_EAR, second.config.hidden_size)),
        language_model(),
        AUDIO_TOKEN,
        tokenizer=tokenizer(),
        template="user {audio} {question} answer",
    )


def test_every_ear_has_its_pictures(two_ears, tmp_path):
    clip = noise(0.9, 16_000)
    inputs = two_ears.prepare(clip, "what is said ?", sampling_rate=16_000)
    page = Page(attention_page(two_ears, inputs, tmp_path / "a.html", answer=3))
    assert [view["site"] for view in page.data["views"]] == [
        "decoder.attn", "encoder.attn", "second.attn",
    ]  # fmt: skip
    _, cache = two_ears.run_with_cache(inputs, attention=True)
    prompt = Prompt.of(two_ears, inputs)
    (found,) = read_attention(prompt, ["second.attn"], cache=cache)
    seconds = two_ears.timeline(inputs).seconds("second")
    assert [sum(q.span) / 2 for q in found.queries][1:-1] == pytest.approx(
        seconds[1 : len(found.queries) - 1].tolist(), abs=1e-6
    )
    own = cache["second.blocks.0.attn.hook_pattern"][0]
    np.testing.assert_allclose(found.share[0], own.numpy(), atol=1e-6)
    page = Page(cache_page(two_ears, inputs, tmp_path / "c.html"))
    assert list(page.data["parts"]) == ["decoder", "second", "encoder"]
    assert page.data["parts"]["second"]["edges"][-1] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("keeps_padding", [False, True])
def test_placeholders_outside_the_vocabulary_are_audio(keeps_padding, tmp_path):
    model = composed(
        merge=Placeholder("<speech>", -200),
        tokenizer=tokenizer(),
        template="user {audio} {question}",
        keeps_padding=keeps_padding,
    )
    inputs = model.prepare(noise(0.9, 16_000), "what is said ?", sampling_rate=16_000)
    assert (inputs.tokens == -200).any()
    page = Page(cache_page(model, inputs, tmp_path / "c.html"))
    names = page.data["parts"]["decoder"]["names"]
    assert names[1] == ["user", "what", "is", "said", "?"]
    assert "user[audio]what is said ?" in page.text["dd"].replace(" [", "[").replace("] ", "]")
    view, _ = heat(Page(attention_page(model, inputs, tmp_path / "a.html", answer=0)))
    assert [query["label"] for query in view["queries"]] == ["what", "is", "said", "?"]


@pytest.fixture
def kimi():
    model = tiny("kimi_audio")
    return model, FAMILIES["kimi_audio"].clips(model, waves := [noise(1.3, 16_000)]), waves[0]


def test_two_streams_share_the_positions(kimi, tmp_path):
    model, inputs, wave = kimi
    prompt = Prompt.of(model, inputs, audio=wave)
    assert sites_of(prompt) == ["decoder.attn", "speaker.attn", "encoder.attn"]
    (decoder,) = read_streams(prompt, ["decoder"], lens=True)
    with torch.no_grad():
        chances = model.stream(model(inputs), "text")[0].softmax(-1)
    order = torch.cat([decoder.audio.index, decoder.text.index])
    assert decoder.lens.probs[-1, :, 0] == pytest.approx(chances[order].amax(-1).numpy(), abs=1e-5)
    labels = [f"#{t}" for t in model.text_of(inputs)[0][decoder.text.index].tolist()]
    assert decoder.labels == labels
    page = Page(cache_page(model, inputs, tmp_path / "c.html", audio=wave))
    assert list(page.data["parts"]) == ["speaker", "decoder", "encoder"]
    assert page.data["parts"]["speaker"]["edges"] == page.data["parts"]["decoder"]["edges"]


def test_answers_in_two_streams_stand_behind_the_prompt(kimi, tmp_path):
    model, inputs, wave = kimi
    answered = Prompt.of(model, inputs, audio=wave).shown(4)
    n = inputs.shape[1]
    written = model.generate(inputs, max_new_tokens=4, return_type="tokens")[0, n:]
    assert torch.equal(answered.inputs.further_tokens[0, 0, n:], written)
    with torch.no_grad():
        again = model.stream(model(answered.inputs), "text")[0, n - 1 : -1].argmax(-1)
    assert torch.equal(again, written)
    page = Page(attention_page(model, inputs, tmp_path / "a.html", audio=wave, answer=4))
    view, _ = heat(page)
    assert [query["label"] for query in view["queries"]][-4:] == [
        f"#{token}" for token in answered.tokens[n:]
    ]


# ------------------------------------------------------------------------ maps


@pytest.mark.parametrize("name, site", [("musicgen", "decoder.resid_pre"), ("moshi", "depth.z")])
def test_maps_lie_on_the_steps_of_the_codec(name, site, tmp_path, request):
    model = request.getfixturevalue(name)
    clean = request.getfixturevalue({"musicgen": "music", "moshi": "conversation"}[name])
    rate = model.cfg.sampling_rate
    other = noise(clean.audio[0].size / rate, rate)
    corrupted = clean.with_audio([other], rate)
    result = patching.sweep(
        model,
        clean=clean,
        corrupted=corrupted,
        site=site,
        axes=("layer", "time"),
        windows=0.16,
        metric=metrics.of_stream("audio.1", metrics.logit_diff(3, 5)),
    )
    path = map_page(result, clean.audio[0], tmp_path / "m.html", sampling_rate=rate)
    page = Page(path)
    (view,) = page.data["views"]
    spans = view["trace"]["meta"]["spans"]
    assert spans[0] == [0, 0.16] and spans[-1][1] == pytest.approx(len(clean.audio[0]) / rate)
    assert page.data["rate"] == rate


def test_maps_of_words_lie_on_positions(musicgen, music, tmp_path):
    result = patching.sweep(
        musicgen,
        clean=music,
        corrupted=music.with_text("w7 w20 w9 w10"),
        site="encoder.resid_pre",
        axes=("layer", "position"),
        metric=metrics.of_stream("audio.0", metrics.logit_diff(3, 5)),
    )
    rate = musicgen.cfg.sampling_rate
    page = Page(map_page(result, music.audio[0], tmp_path / "m.html", sampling_rate=rate))
    (view,) = page.data["views"]
    assert view["trace"]["x"] == ["0", "1", "2", "3"] and view["trace"]["meta"]["spans"] == []


def test_maps_of_tokens_without_time(desta, timeless, tmp_path):
    inputs, wave = timeless
    silent = replace(inputs, features=torch.zeros_like(inputs.features))
    options = {"clean": inputs, "corrupted": silent, "metric": metrics.logit_diff(3, 5)}
    with pytest.raises(ValueError, match="have no time; address them by position"):
        patching.sweep(desta, site="connector.out", axes=("time",), **options)
    result = patching.sweep(desta, site="connector.out", axes=("position",), **options)
    (view,) = Page(map_page(result, wave, tmp_path / "m.html")).data["views"]
    assert view["layout"]["xaxis3"]["title"]["text"] == "position"


def test_maps_need_the_rate_of_their_clip(musicgen, music, tmp_path):
    result = patching.sweep(
        musicgen,
        clean=music,
        corrupted=music.with_text("w7 w20 w9 w10"),
        site="decoder.resid_pre",
        axes=("time",),
        metric=metrics.of_stream("audio.0", metrics.logit_diff(3, 5)),
    )
    with pytest.raises(ValueError, match="pass the clip of the sweep, and sampling_rate="):
        map_page(result, music.audio[0], tmp_path / "m.html")


# ------------------------------------------------------------------------ the command line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command on directories of saved tiny models, which it makes when they are named."""
    monkeypatch.chdir(tmp_path)
    for name in ("clean", "corrupted"):
        soundfile.write(f"{name}.wav", noise(0.8, 16_000), 16_000)

    def invoke(name: str, command: str):
        if not (tmp_path / name).is_dir():
            save(name, tmp_path / name)
        parts = command.split()
        option = [name] if parts[0] == "info" else ["--model", name]
        return CliRunner().invoke(cli.app, [*parts, *option], env={"COLUMNS": "200"})

    return invoke


def save(name: str, folder: Path) -> None:
    """A tiny model with its feature extractor; those that write text have a tokenizer."""
    hf = FAMILIES[name].build()
    hf.save_pretrained(folder)
    if name == "kyutai_stt":
        extractor = transformers.KyutaiSpeechToTextFeatureExtractor(
            sampling_rate=200, audio_delay_seconds=0.16, audio_silence_prefix_seconds=0.24
        )
    else:
        extractor = transformers.EncodecFeatureExtractor(sampling_rate=hf.config.sampling_rate)
    extractor.save_pretrained(folder)
    words().save_pretrained(folder)


CODEC_LMS = ("moshi", "musicgen", "kyutai_stt")


@pytest.mark.parametrize("name", CODEC_LMS)
def test_info_tells_of_every_part(run, name):
    told = json.loads(run(name, "info --json").stdout)
    parts = {"moshi": ["decoder", "depth"], "kyutai_stt": ["decoder"]}
    assert list(told["parts"]) == parts.get(name, ["encoder", "connector", "decoder"])
    step_s = 0.02 if name == "musicgen" else 0.08
    assert told["parts"]["decoder"]["seconds_per_position"] == pytest.approx(step_s)
    assert told["hooks"]["decoder.hook_embed"][1] >= 1 / step_s
    assert ("audio.0" in told["streams"]) == (name != "kyutai_stt")
    printed = run(name, "info").stdout
    assert ("writes " in printed) == (name != "kyutai_stt") and "None" not in printed


@pytest.mark.parametrize("name", CODEC_LMS)
@pytest.mark.parametrize("command", ["attention", "lens"])
def test_commands_that_draw(run, name, command, tmp_path):
    text = " --text w7" if name == "musicgen" else ""
    result = run(name, f"{command} clean.wav --json{text}")
    assert result.exit_code == 0, result.output
    ((page, facts),) = json.loads(result.stdout).items()
    assert (tmp_path / page).is_file()
    if name == "musicgen":
        assert facts["text"] == "w7"
    else:
        assert facts["written along"].count("w") >= 5


def test_music_without_a_text_has_steps_alone(run):
    told = json.loads(run("musicgen", "attention clean.wav --json").stdout)
    assert list(told["attention.html"]["sites"]) == ["decoder.attn"]
    told = json.loads(run("musicgen", "lens clean.wav --json").stdout)
    assert list(told["lens.html"]["parts"]) == ["decoder"]
    result = run("musicgen", "lens clean.wav --part encoder")
    assert result.exit_code == cli.BAD_INPUT and "no positions to show" in result.stderr


def test_the_whole_clip_is_transcribed(run, tmp_path):
    told = json.loads(run("kyutai_stt", "transcribe clean.wav --json").stdout)
    model = HookedAudioTransformer.from_pretrained(tmp_path / "kyutai_stt")
    inputs = model.prepare(tmp_path / "clean.wav")
    assert told == {"clean.wav": model.generate(inputs)[0]}


PAIR = "map --clean clean.wav --corrupted corrupted.wav --answer w7 --against w8"
REFUSED = {
    "moshi transcribes nothing": ("moshi", "transcribe clean.wav", "moshi writes text, audio.0"),
    "music is no text": ("musicgen", "transcribe clean.wav", "musicgen writes audio.0, audio.1"),
    "moshi is asked by voice": ("moshi", "ask clean.wav -q what", "model.generate"),
    "music answers nothing": ("musicgen", "ask clean.wav -q what", "model.generate"),
    "kyutai takes no question": ("kyutai_stt", "ask clean.wav -q what", "audio-lens transcribe"),
    "maps of several streams": ("moshi", PAIR, "metrics.of_stream"),
    "maps of music": ("musicgen", PAIR, "metrics.of_stream"),
    "maps of what is written along": ("kyutai_stt", PAIR, "model.continued(inputs)"),
    "a lens on codes": ("musicgen", "lens clean.wav --token w7", "which are codes"),
    "texts of steps": ("moshi", "attention clean.wav --text w7", "one id per step"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_commands_refuse(run, what):
    name, command, message = REFUSED[what]
    result = run(name, command)
    assert result.exit_code == cli.BAD_INPUT, result.output
    assert message in result.stderr and "Traceback" not in result.output
