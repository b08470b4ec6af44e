"""The embedded model's material, questions, prompts, training loop, checkpoint and clips."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioForConditionalGeneration

from audio_lens import HookedAudioTransformer, minimal_pair
from audio_lens.models.embedded import CHECKPOINT, CLIPS, DIGITS
from audio_lens.models.embedded.training import (
    acoustics,
    batches,
    card,
    checkpoint,
    material,
    network,
    questions,
    scenes,
    stages,
    train,
)
from audio_lens.models.embedded.training.ears import Ears
from audio_lens.models.embedded.training.teacher import Targets

VALUE = {word: number for number, word in enumerate(DIGITS)}


def word(text: str, length: int, speaker: str = "noise") -> material.Utterance:
    """A stand-in for a spoken word: a burst of noise that no other word shares."""
    draw = np.random.default_rng([VALUE[text], length])
    return material.Utterance(text, speaker, draw.normal(0, 0.1, length).astype(np.float32))


@pytest.fixture(scope="module")
def bank() -> batches.Bank:
    return batches.Bank({"noise": [word(text, 3000 + 500 * n) for n, text in enumerate(DIGITS)]})


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def loaded():
    return Qwen2AudioForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)


def small_model(tokenizer):
    config = checkpoint.build_config(tokenizer)
    config.audio_config.encoder_layers = 1
    config.text_config.num_hidden_layers = 2
    return checkpoint.build_model(config, seed=3)


# Scenes


@pytest.mark.parametrize("roomy", [0.0, 1.0])
def test_words_are_where_the_labels_say(bank, roomy):
    for seed in range(40):
        clip = batches.draw_clip(bank, np.random.default_rng(seed), roomy)
        wave, silence = clip.scene.wave, np.ones(len(clip.scene.wave), bool)
        assert scenes.SHORTEST_S <= len(wave) / material.RATE <= scenes.LONGEST_S
        assert len(wave) % scenes.TOKEN == 0
        for placed, number in zip(clip.scene.words, clip.words, strict=True):
            start, stop = (round(t * material.RATE) for t in (placed.start_s, placed.end_s))
            assert start % scenes.GRID == 0
            assert placed.word == bank.words[number].word
            np.testing.assert_array_equal(wave[start:stop], bank.words[number].wave)
            silence[start:stop] = False
        assert not wave[silence].any()


def test_roomy_clips_have_silence_of_every_length(bank):
    drawn = [
        batches.draw_clip(bank, np.random.default_rng(seed), train.ROOM.roomy)
        for seed in range(400)
    ]
    lengths = np.array([len(clip.scene.wave) / material.RATE for clip in drawn])
    heads = np.array([clip.scene.words[0].start_s for clip in drawn])
    tails = lengths - [clip.scene.words[-1].end_s for clip in drawn]
    for silences in (heads, tails):
        assert np.histogram(silences, np.arange(0, 2.5, 0.25))[0].all()
    assert np.histogram(lengths, np.arange(1, 4.1, 0.5))[0].all()


def test_padding_is_zero_whatever_the_surroundings_and_leaves_the_words(bank):
    drawn = [batches.draw_clip(bank, np.random.default_rng(seed), 1.0) for seed in range(60)]
    cut = [clip for clip in drawn if clip.recorded is not None]
    assert 20 <= len(cut) <= 40
    for clip in cut:
        first, stop = clip.recorded
        assert 0 <= first <= clip.scene.words[0].start_s * material.RATE
        assert clip.scene.words[-1].end_s * material.RATE <= stop <= len(clip.scene.wave)
        heard = batches.padded(clip.scene.wave + np.float32(0.5), clip.recorded)
        np.testing.assert_array_equal(heard[first:stop], clip.scene.wave[first:stop] + 0.5)
        assert not heard[:first].any() and not heard[stop:].any()


def test_frame_labels_name_the_sounding_digit(bank):
    clip = batches.draw_clip(bank, np.random.default_rng(5))
    labels = batches.frame_labels([clip], clip.tokens)[0]
    for frame, label in enumerate(labels.tolist()):
        middle = clip.scene.wave[int((frame + 0.5) * scenes.TOKEN)]
        assert (label == batches.SILENCE) == (middle == 0)


def test_scene_refuses_overlap_and_two_speakers():
    with pytest.raises(ValueError, match="overlaps"):
        scenes.compose([word("one", 8000), word("two", 8000)], [0.0, 0.4], 2.0)
    with pytest.raises(ValueError, match="leaves"):
        scenes.compose([word("one", 8000)], [0.6], 1.0)
    with pytest.raises(ValueError, match="one speaker"):
        scenes.compose([word("one", 8000), word("two", 8000, "b")], [0.0, 1.0], 2.0)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_minimal_pair_differs_only_in_its_slot(index):
    words = [word("seven", 5000), word("two", 4000), word("five", 6100)]
    clean, corrupted = scenes.minimal_pair(words, index, word("nine", 7777), [0.1, 0.2, 0.2, 0.3])
    assert len(clean.wave) == len(corrupted.wave)
    kept = np.ones(len(clean.wave), bool)
    start = round(clean.words[index].start_s * material.RATE)
    kept[start : start + 7777] = False
    np.testing.assert_array_equal(clean.wave[kept], corrupted.wave[kept])
    assert corrupted.words[index].word == "nine"
    others = [i for i in range(3) if i != index]
    assert all(clean.words[i] == corrupted.words[i] for i in others)


# Questions


def brute_force(text: str, digits: tuple[str, ...]) -> str:
    """The answer read off the question's text."""
    place = {"first": 0, "second": 1, "third": 2, "last": -1}
    asked = text.rstrip("?").split()
    values = [VALUE[digit] for digit in digits]
    named = [digits[place[token]] for token in asked if token in place]
    if "many" in asked:
        return DIGITS[len(digits)]
    if "odd" in asked:
        return "yes" if VALUE[named[0]] in (1, 3, 5, 7, 9) else "no"
    if asked[-1] in ("larger", "largest"):
        return DIGITS[max(values)]
    if asked[-1] in ("smaller", "smallest"):
        return DIGITS[min(values)]
    if asked[-1] in DIGITS:
        return digits[digits.index(asked[-1]) + 1]
    return named[0]


def test_answers_are_right():
    draw = np.random.default_rng(0)
    lists = [tuple(draw.choice(DIGITS, count)) for count in (1, 2, 3) for _ in range(60)]
    asked = [
        (question, digits)
        for digits in lists
        for kind, form in questions.KINDS.items()
        for phrasing in range(len(form.phrasings))
        if (question := questions.ask(kind, digits, phrasing))
    ]
    assert {question.kind for question, _ in asked} == set(questions.KINDS)
    assert all(q.answer == brute_force(q.text, digits) for q, digits in asked)


def test_ambiguous_questions_are_not_asked():
    assert questions.ask("larger", ("two", "two")) is None
    assert questions.ask("after first", ("two", "two", "one")) is None
    assert questions.ask("third", ("two", "one")) is None


def test_conflict_without_instruction_is_never_trained():
    draw = np.random.default_rng(1)
    told = [batches.draw_task(("one", "two", "three"), draw).text for _ in range(3000)]
    open_transcripts = [t for t in told if "transcript" in t and "Trust" not in t]
    assert open_transcripts
    assert all("says: one two three." in text for text in open_transcripts)


# Prompts and checkpoint


def test_checkpoint_loads_strictly_and_is_small(loaded):
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    shipped = [p for p in CHECKPOINT.parent.rglob("*") if p.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in shipped if path.is_file()) <= 25e6


def test_every_answer_is_one_token_with_and_without_space():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for answer in questions.ANSWERS:
        plain, spaced = tokenizer(answer).input_ids, tokenizer(f" {answer}").input_ids
        assert plain == spaced and len(plain) == 1
        assert tokenizer.decode(plain) == f" {answer}"


@pytest.mark.parametrize("question_first", [False, True])
@pytest.mark.parametrize("text", ["Which digit is last?", "The transcript says: one two. Which?"])
def test_training_rows_are_the_processor_s_prompts(processor, question_first, text):
    wave = word("nine", 40 * scenes.TOKEN).wave
    turns = questions.conversation(text, question_first)
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, audio=wave, sampling_rate=material.RATE, return_tensors="pt")
    task = batches.Task(text, question_first, "seven")
    row = batches.Prompter(processor).row(task, 40)
    assert row[:-1] == inputs.input_ids[0].tolist()
    assert processor.tokenizer.decode(row[-1]) == " seven"


def test_reading_rows_have_no_audio(processor):
    prompter = batches.Prompter(processor)
    task = batches.draw_reading(np.random.default_rng(2))
    text = processor.tokenizer.decode(prompter.row(task, 0))
    assert "AUDIO" not in text and "The transcript says" in text


def test_short_forward_equals_hugging_face(processor, loaded):
    model = loaded[0].eval()
    waves = [word("one", length * scenes.TOKEN).wave for length in (25, 40, 100)]
    prompter = batches.Prompter(processor)
    tasks = [
        batches.Task("Which digit is first?", first, "one")
        for first in (True, False)
        for _ in waves
    ]
    heard = batches.features(waves)
    prompts = prompter.prompts(tasks, [0, 1, 2] * 2, heard.tokens)
    with torch.no_grad():
        audio = network.hear(model.model.audio_tower, heard.mel, heard.tokens)[1]
        connected = model.model.multi_modal_projector(audio)
        ours = network.think(model, connected, heard.tokens, prompts)[:, 0]
        for row, wave in enumerate(waves * 2):
            told = questions.conversation(tasks[row].text, tasks[row].question_first)
            text = processor.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
            inputs = processor(
                text=text, audio=wave, sampling_rate=material.RATE, return_tensors="pt"
            )
            theirs = model(**inputs).logits[0, -1]
            torch.testing.assert_close(ours[row], theirs, atol=1e-3, rtol=1e-4)


# Training


@pytest.mark.slow
def test_resumed_training_equals_uninterrupted(monkeypatch, tmp_path, bank):
    processor = checkpoint.build_processor()
    prompter = batches.Prompter(processor)
    monkeypatch.setattr(
        train, "REASON", stages.Stage("reason", 2, 3, 1e-3, settle=1, zero=2, warmup=1)
    )
    monkeypatch.setattr(stages, "SAVE_EVERY", 1)
    weights = {}
    for name, killed in (("whole", False), ("resumed", True)):
        workdir = tmp_path / name
        workdir.mkdir()
        if killed:
            calls = itertools.count()

            def dying(*arguments, smudge=train.smudge, calls=calls):
                if next(calls) == 1:
                    raise KeyboardInterrupt
                return smudge(*arguments)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train, "smudge", dying)
                train.reason(small_model(processor.tokenizer), bank, prompter, workdir)
        parts = train.reason(small_model(processor.tokenizer), bank, prompter, workdir)
        weights[name] = parts.state_dict()
    for key, value in weights["whole"].items():
        torch.testing.assert_close(weights["resumed"][key], value, rtol=0, atol=0)


def test_learning_rate_rises_and_falls_to_zero():
    stage = stages.Stage("any", 100, 1, 1.0, settle=40, zero=100, warmup=10)
    rates = [stages.learning_rate(stage, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:41]) == {1.0}
    assert rates[100] == pytest.approx(0)


@pytest.fixture
def made_up(monkeypatch, bank):
    """The training script on noise: words, surroundings and teacher, two steps a stage."""
    draw = np.random.default_rng(0)
    ends = np.cumsum([0, *(-(-len(said.wave) // scenes.GRID) for said in bank.words)])
    taught = Targets(draw.normal(size=(ends[-1], 384)).astype(np.float16), ends)
    hiss = [acoustics.coloured_noise(draw, 8 * material.RATE, 1.0)]
    monkeypatch.setattr(acoustics, "rooms", lambda names: [np.ones(1, np.float32)])
    monkeypatch.setattr(acoustics, "noises", lambda names, draw, coloured: hiss)
    monkeypatch.setattr(train, "training_words", lambda workdir: bank)
    monkeypatch.setattr(train, "targets", lambda bank, workdir: taught)
    for name in ("HEADS", "ROOM", "LATE", "AGAIN"):
        short = dataclasses.replace(getattr(train, name), steps=2, size=3)
        monkeypatch.setattr(train, name, short)
    monkeypatch.setattr(train, "ECHOES", 16)
    monkeypatch.setattr(train, "ECHOES_AT_ONCE", 8)
    return taught


@pytest.mark.slow
def test_the_last_stages_go_on_from_the_shipped_checkpoint(made_up, monkeypatch, tmp_path):
    """They hear roomy clips that were not drawn before."""
    drawn = []

    def draw_clips(*arguments, draw_clips=train.draw_clips):
        drawn.append(arguments[2:])
        return draw_clips(*arguments)

    monkeypatch.setattr(train, "draw_clips", draw_clips)
    into = tmp_path / "made" / "checkpoint"
    into.parent.mkdir()
    train.train_on(tmp_path, into)
    roomy, late = train.ROOM.roomy, train.JOIN.steps + train.SETTLE.steps
    heads = [([train.SEED, 12, step],) for step in (0, 1)]
    heard = [([train.SEED, 9, batch], roomy) for batch in (2, 3)]
    told = [([train.SEED, 7, step], train.LATE.roomy) for step in (late, late + 1)]
    told += [([train.SEED, 7, step], train.AGAIN.roomy) for step in (late + 2, late + 3)]
    assert drawn == heads + heard + told and min(roomy, train.LATE.roomy) > 0.5
    old, new = (
        Qwen2AudioForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (CHECKPOINT, into)
    )
    assert old.keys() == new.keys()
    for name, weights in old.items():
        moved = (new[name] - weights).abs().max().item()
        assert moved == 0 if "embed_positions" in name else 0 < moved < 1e-3, name
    record = json.loads((into.parent / "training.json").read_text())
    shipped = json.loads((CHECKPOINT.parent / "training.json").read_text())
    assert record["notes"] == shipped["notes"]
    for name in ("heads", "room", "late", "again"):
        assert record["stages"].pop(name)["steps"] == 2
        shipped["stages"].pop(name, None)
    assert record["stages"] == shipped["stages"]


@pytest.mark.slow
def test_room_leaves_the_encoder_and_heads_leave_all_as_it_is(made_up, bank, processor, tmp_path):
    model = small_model(processor.tokenizer)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    ears = Ears(model.model.audio_tower)
    drawn = ears.to_digit.weight.detach().clone()
    train.fit_heads(ears, bank, made_up, tmp_path)
    assert ears.tower is model.model.audio_tower and not torch.equal(ears.to_digit.weight, drawn)
    assert all(torch.equal(weights, before[n]) for n, weights in model.state_dict().items())
    train.answer(train.ROOM, model, bank, batches.Prompter(processor), tmp_path)
    for name, weights in model.state_dict().items():
        learns = name.startswith("model.language_model.") or name == "lm_head.weight"
        assert torch.equal(weights, before[name]) != learns, name


# Material


def test_held_out_voices_share_no_variant_with_training():
    def variants(voices):
        return {voice.name.partition("+")[2] for voice in voices}

    assert len(material.held_out_voices()) >= 12
    assert not variants(material.held_out_voices()) & variants(material.train_voices())


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_espeak_words_are_trimmed_and_repeatable(tmp_path):
    voice = material.held_out_voices()[0]
    one = material.espeak_word(voice, "three", tmp_path / "a")
    two = material.espeak_word(voice, "three", tmp_path / "b")
    np.testing.assert_array_equal(one.wave, two.wave)
    hop = material.RATE // 100
    assert np.abs(one.wave[:hop]).max() > 0 and np.abs(one.wave[-hop:]).max() > 0


@pytest.mark.real
def test_real_words_by_speaker():
    try:
        spoken = material.fsdd_words(material.UNSEEN_SPEAKERS, range(2))
    except material.MissingData as missing:
        pytest.skip(str(missing))
    assert set(spoken) == {"nicolas", "theo"}
    assert {utterance.word for utterance in spoken["theo"]} == set(DIGITS)


def test_missing_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("AUDIO_LENS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(material.MissingData, match="nowhere"):
        material.fsdd_words(["theo"], range(1))


def test_plain_mel_equals_whisper_s(processor):
    wave = word("five", 50 * scenes.TOKEN).wave
    padded = torch.nn.functional.pad(torch.from_numpy(wave), (0, 64_000 - len(wave)))
    theirs = processor.feature_extractor(wave, sampling_rate=material.RATE, return_tensors="pt")
    ours = acoustics.log_mel(padded[None])
    torch.testing.assert_close(ours, theirs.input_features, atol=1e-5, rtol=1e-5)


# What is shipped


def test_shipped_clips_are_minimal_pairs():
    index = json.loads((CLIPS / "clips.json").read_text())
    assert 6 <= len(index["clips"]) <= 10
    for pair in index["pairs"]:
        waves = [soundfile.read(CLIPS / pair[side])[0] for side in ("clean", "corrupted")]
        words = [index["clips"][pair[side]]["words"] for side in ("clean", "corrupted")]
        assert len(waves[0]) == len(waves[1])
        swapped = [i for i, (a, b) in enumerate(zip(*words, strict=True)) if a["word"] != b["word"]]
        assert swapped == [pair["swapped"]]
        first = words[0][swapped[0]]["start_s"]
        last = max(side[swapped[0]]["end_s"] for side in words)
        differ = np.flatnonzero(waves[0] != waves[1]) / material.RATE
        assert first <= differ.min() and differ.max() <= last


def test_card_keeps_the_patching_section(tmp_path):
    path = tmp_path / "README.md"
    begin, end = card.PATCHING
    path.write_text(f"outdated\n{begin}\nby hand\n{end}\n")
    metrics = json.loads((CHECKPOINT.parent / "metrics.json").read_text())
    card.write_card(metrics, {"stages": {}, "notes": []}, 1, path)
    assert f"{begin}\nby hand\n{end}" in path.read_text()
    assert "outdated" not in path.read_text()


# Silence


@pytest.fixture(scope="module")
def spoken():
    """Clips of three different digits in 2.32 s by speakers that were not trained on."""
    try:
        said = material.fsdd_words(material.UNSEEN_SPEAKERS, range(3))
    except material.MissingData as missing:
        pytest.skip(str(missing))
    draw, clips = np.random.default_rng(0), []
    while len(clips) < 24:
        words = said[str(draw.choice(sorted(said)))]
        words = [u for u in words if scenes.seconds(u) < 0.6]
        chosen = [words[number] for number in draw.choice(len(words), 3, replace=False)]
        if len({utterance.word for utterance in chosen}) == 3:
            clips.append(scenes.compose(chosen, (0.2, 0.88, 1.56), 2.32))
    return clips


def says_second(model, waves):
    inputs = model.prepare(waves, "Which digit is second?", sampling_rate=material.RATE)
    with torch.no_grad():
        return [model.tokenizer.decode(t).strip() for t in model(inputs)[:, -1].argmax(-1)]


@pytest.mark.real
@pytest.mark.slow
def test_silence_up_to_four_seconds_leaves_the_answer(spoken):
    model = HookedAudioTransformer.from_pretrained("embedded")
    right = [
        clip
        for clip, said in zip(spoken, says_second(model, [c.wave for c in spoken]), strict=True)
        if said == clip.digits[1]
    ]
    assert len(right) >= 18
    fill = round(scenes.LONGEST_S * material.RATE) - len(right[0].wave)
    floors = {(0, fill // 2): 0.9, (0, fill): 0.9, (fill // 2, fill // 2): 0.9, (fill, 0): 0.7}
    for ends, floor in floors.items():
        said = says_second(model, [np.pad(clip.wave, ends) for clip in right])
        kept = np.mean([word == clip.digits[1] for word, clip in zip(said, right, strict=True)])
        assert kept >= floor, (ends, kept)


@pytest.mark.real
def test_the_shorter_clip_of_a_padded_pair_is_answered(spoken):
    model = HookedAudioTransformer.from_pretrained("embedded")
    long = np.concatenate([spoken[1].wave, spoken[0].wave])[: 4 * material.RATE]
    pair = minimal_pair(
        model, spoken[0].wave, long, text="Which digit is second?", sampling_rate=material.RATE
    )
    assert "padded with 1.6800 s" in pair.how["length"]
    with torch.no_grad():
        said = model(pair.clean)[0, -1].argmax()
    assert model.tokenizer.decode(said).strip() == spoken[0].digits[1]
