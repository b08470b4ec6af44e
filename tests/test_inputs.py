"""`prepare` and `AudioInputs`: what goes in, how batches are cut, and clear errors for the rest."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from audio_lens import AudioError, AudioInputs, HookedAudioTransformer, InputError, TokenError
from audio_lens.inputs import padded
from audio_lens.models.loading.checkpoints import embedded_path
from tiny import PAD, START, tiny_whisper_hf

RATE = 16_000
QUESTION = "which digit is first ?"


def noise(seconds: float = 1.0, rate: int = RATE, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))


@pytest.fixture(scope="module")
def whisper() -> HookedAudioTransformer:
    """A tiny Whisper that reads the embedded model's words."""
    processor = SimpleNamespace(
        tokenizer=transformers.AutoTokenizer.from_pretrained(embedded_path()),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=20),
    )
    return HookedAudioTransformer.from_hf(tiny_whisper_hf(vocab_size=411), processor)


@pytest.fixture(params=["whisper", "embedded"])
def prepare(request: pytest.FixtureRequest) -> Callable[..., AudioInputs]:
    """`prepare` of a model of each family, with a question where one is needed."""
    model = request.getfixturevalue(request.param)

    def call(audio: Any, text: Any = QUESTION, **options: Any) -> AudioInputs:
        return model.prepare(audio, text, **options)

    return call


def same(first: AudioInputs, second: AudioInputs) -> bool:
    return first.digest() == second.digest()


# -------------------------------------------------------------------------------- audio


def test_paths_arrays_and_tensors_agree(prepare: Callable, tmp_path: Path) -> None:
    clip = noise().astype(np.float32)
    soundfile.write(tmp_path / "clip.wav", clip, RATE, subtype="FLOAT")
    inputs = prepare(tmp_path / "clip.wav")
    assert same(inputs, prepare(str(tmp_path / "clip.wav")))
    assert same(inputs, prepare(clip, sampling_rate=RATE))
    assert same(inputs, prepare(torch.from_numpy(clip), sampling_rate=RATE))
    assert same(inputs, prepare([clip], sampling_rate=RATE))
    assert same(inputs, prepare(np.stack([clip, clip], axis=1), sampling_rate=RATE))
    assert same(inputs, prepare((np.stack([clip, clip]), RATE)))
    assert len(inputs) == 1
    assert len(inputs.audio[0]) == RATE
    assert inputs.feature_mask.sum() == 100


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_any_sampling_rate(prepare: Callable, rate: int) -> None:
    inputs = prepare(noise(1.0, rate), sampling_rate=rate)
    assert abs(len(inputs.audio[0]) - RATE) <= 1
    assert inputs.sampling_rate == RATE


def test_clips_as_data_sets_hold_them(prepare: Callable, tmp_path: Path) -> None:
    clip = noise().astype(np.float32)
    soundfile.write(tmp_path / "clip.wav", clip, RATE, subtype="FLOAT")
    expected = prepare([clip, clip], sampling_rate=RATE)
    held = {"array": clip, "sampling_rate": RATE}
    content = {"bytes": (tmp_path / "clip.wav").read_bytes(), "path": None}
    assert same(prepare([held, held]), expected)
    assert same(prepare([content, {"path": str(tmp_path / "clip.wav")}]), expected)
    assert same(prepare([(clip, RATE), clip.tolist()], sampling_rate=RATE), expected)
    alone = prepare(clip, sampling_rate=RATE)
    for one in (held, content, (torch.from_numpy(clip), RATE)):
        assert same(prepare(one), alone)
    assert same(prepare(clip.tolist(), sampling_rate=RATE), alone)


def test_a_rate_per_clip(prepare: Callable) -> None:
    slow, fast = noise(1.0, 8_000), noise(1.0, RATE)
    inputs = prepare([slow, fast], sampling_rate=[8_000, RATE])
    for row, (clip, rate) in enumerate(((slow, 8_000), (fast, RATE))):
        alone = prepare(clip, sampling_rate=rate)
        assert np.array_equal(inputs.audio[row], alone.audio[0])
    with pytest.raises(AudioError, match=r"2 clip\(s\) need one sampling rate, or as many, got 3"):
        prepare([slow, fast], sampling_rate=[1, 2, 3])


def test_rates_of_several_clips_per_prompt(embedded: HookedAudioTransformer) -> None:
    slow, fast = noise(1.0, 8_000), noise(1.0, RATE)
    inputs = embedded.prepare([[slow, fast], [fast]], QUESTION, sampling_rate=[[8_000, RATE], RATE])
    assert inputs.clips_per_row == (2, 1)
    assert [len(clip) for clip in inputs.audio] == [RATE, RATE, RATE]


def test_a_stacked_batch_is_refused(prepare: Callable) -> None:
    with pytest.raises(AudioError, match="if these are 4 clips of 16000 samples, pass a list"):
        prepare(np.stack([noise()] * 4), sampling_rate=RATE)
    for two in (np.stack([noise()] * 2), [noise(), torch.zeros(2, RATE)]):
        with pytest.raises(AudioError, match="may be two channels or two clips"):
            prepare(two, sampling_rate=RATE)


def test_batches_of_unequal_clips_and_texts(prepare: Callable) -> None:
    clips, texts = [noise(1.0), noise(0.5)], [QUESTION, "how many ?"]
    inputs = prepare(clips, texts, sampling_rate=RATE)
    assert len(inputs) == 2
    assert inputs.feature_mask.sum(1).tolist() == [100, 50]
    assert inputs.attention_mask[:, -1].all()  # padded on the left
    for row in range(2):
        alone = prepare(clips[row], texts[row], sampling_rate=RATE)
        kept = inputs.attended[row]
        assert torch.equal(inputs.tokens[row][kept], alone.tokens[0])
        assert torch.equal(inputs.features[row], alone.features[0])
    one_text = prepare(clips, sampling_rate=RATE)
    assert len(one_text) == 2


def test_padded_rows_answer_as_they_do_alone(prepare: Callable, request: Any) -> None:
    model = request.getfixturevalue(request.node.callspec.params["prepare"])
    clips, texts = [noise(1.0), noise(0.5)], [QUESTION, "how many ?"]
    batch = model(prepare(clips, texts, sampling_rate=RATE))
    for row in range(2):
        alone = model(prepare(clips[row], texts[row], sampling_rate=RATE))
        assert torch.allclose(batch[row, -1], alone[0, -1], atol=1e-4)


def test_several_clips_in_one_prompt(embedded: HookedAudioTransformer) -> None:
    clips = [noise(1.0), noise(0.5, seed=1)]
    inputs = embedded.prepare([clips, clips[:1]], QUESTION, sampling_rate=RATE)
    assert inputs.clips_per_row == (2, 1)
    assert inputs.features.shape[0] == 3
    n_audio = (inputs.tokens == embedded.audio_token_id).sum(1).tolist()
    assert n_audio == [25 + 12, 25]
    timeline = embedded.timeline(inputs)
    assert timeline[0].n_clips == 2
    assert timeline[0].duration_s(1) == pytest.approx(0.5)


def test_the_placeholder_may_stand_anywhere(embedded: HookedAudioTransformer) -> None:
    before = embedded.prepare(noise(), f"<|AUDIO|> {QUESTION}", sampling_rate=RATE)
    after = embedded.prepare(noise(), f"{QUESTION} <|AUDIO|>", sampling_rate=RATE)
    assert before.tokens[0, 0] == embedded.audio_token_id
    assert after.tokens[0, -1] == embedded.audio_token_id
    conversation = [
        {
            "role": "user",
            "content": [{"type": "audio", "audio_url": "-"}, {"type": "text", "text": QUESTION}],
        }
    ]
    by_template = embedded.prepare(noise(), conversation, sampling_rate=RATE)
    assert same(by_template, embedded.prepare(noise(), QUESTION, sampling_rate=RATE))


def test_whisper_text_and_token_ids(whisper: HookedAudioTransformer) -> None:
    inputs = whisper.prepare(noise(), sampling_rate=RATE)
    assert inputs.tokens.tolist() == [[START]]
    word = whisper.tokenizer.encode("digit", add_special_tokens=False)
    written = whisper.prepare(noise(), "digit", sampling_rate=RATE)
    assert written.tokens.tolist() == [[START, *word]]
    assert same(written, whisper.prepare(noise(), [START, *word], sampling_rate=RATE))
    many = whisper.prepare([noise(), noise()], [[START], [START, *word]], sampling_rate=RATE)
    assert many.tokens.tolist() == [[PAD, START], [START, *word]]
    assert many.position_ids.tolist() == [[0, 0], [0, 1]]


# -------------------------------------------------------------------------------- bad input


def test_unusable_audio(prepare: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    for audio, rate, message in [
        (tmp_path / "missing.wav", None, "no audio file"),
        (tmp_path / "empty.wav", None, "is empty"),
        (np.zeros(0), RATE, "holds no samples"),
        (np.full(RATE, np.nan), RATE, "holds NaN"),
        (noise(), None, "pass sampling_rate="),
        (0.5, RATE, "a path, an array or a tensor, got float"),
    ]:
        with pytest.raises(AudioError, match=message):
            prepare(audio, sampling_rate=rate)
    with pytest.raises(InputError, match="no audio: pass at least one clip"):
        prepare([])


def test_too_long_a_clip_is_not_truncated(prepare: Callable) -> None:
    with pytest.raises(AudioError, match=r"is 4\.50 s long and this model takes .* s: cut it"):
        prepare(noise(4.5), sampling_rate=RATE)


def test_too_short_a_clip(embedded: HookedAudioTransformer) -> None:
    with pytest.raises(AudioError, match=r"20 ms long, too short for one audio token \(40 ms\)"):
        embedded.prepare(noise(0.02), QUESTION, sampling_rate=RATE)


def test_texts_must_match_the_clips(prepare: Callable) -> None:
    with pytest.raises(InputError, match=r"2 (clips|prompts) need as many texts, got 3"):
        prepare([noise(), noise()], ["a", "b", "c"], sampling_rate=RATE)


def test_prompts_must_match_their_clips(embedded: HookedAudioTransformer) -> None:
    clip = {"sampling_rate": RATE}
    with pytest.raises(InputError, match=r"needs a question: pass text=.* got NoneType"):
        embedded.prepare(noise(), **clip)
    with pytest.raises(InputError, match="got int"):
        embedded.prepare(noise(), [7], **clip)
    with pytest.raises(InputError, match=r"holds 0 placeholder\(s\) <\|AUDIO\|> for 1 clip"):
        embedded.prepare(noise(), "<|im_start|>user\nhello<|im_end|>", **clip)
    with pytest.raises(InputError, match=r"holds 2 placeholder\(s\) .* for 1 clip"):
        embedded.prepare(noise(), f"<|AUDIO|> {QUESTION} <|AUDIO|>", **clip)
    with pytest.raises(InputError, match=r"holds 1 placeholder\(s\) .* for 2 clip"):
        embedded.prepare([[noise(), noise()]], f"<|AUDIO|> {QUESTION}", **clip)
    with pytest.raises(InputError, match=r"holds 1 placeholder\(s\) .* for 0 clip"):
        embedded.prepare([[noise()], []], f"<|AUDIO|> {QUESTION}", **clip)


def test_text_needs_a_tokenizer() -> None:
    model = HookedAudioTransformer.from_hf(tiny_whisper_hf())
    with pytest.raises(TokenError, match=r"needs a tokenizer.*from_hf\(hf_model, processor="):
        model.prepare(noise(), "seven", sampling_rate=RATE)
    with pytest.raises(TokenError, match="at least one token to start from"):
        model.prepare(noise(), [], sampling_rate=RATE)


def test_words_of_one_token(embedded: HookedAudioTransformer) -> None:
    (seven,) = embedded.tokenizer.encode("seven", add_special_tokens=False)
    assert embedded.to_single_token("seven") == seven
    assert embedded.to_single_token(seven) == seven
    with pytest.raises(TokenError, match=r"'seven two' is 2 tokens \(.*\), not one"):
        embedded.to_single_token("seven two")
    with pytest.raises(TokenError, match="is 0 tokens"):
        embedded.to_single_token("")


# -------------------------------------------------------------------------------- AudioInputs


@pytest.fixture
def batch(embedded: HookedAudioTransformer) -> AudioInputs:
    """Three prompts with one, two and one clips."""
    clips = [noise(1.0, seed=seed) for seed in range(4)]
    audio = [clips[:1], clips[1:3], clips[3:]]
    texts = [QUESTION, "how many ?", QUESTION]
    return embedded.prepare(audio, texts, sampling_rate=RATE)


def test_rows_keep_their_clips(batch: AudioInputs) -> None:
    second = batch[1]
    assert second.shape == (1, batch.shape[1])
    assert second.clips_per_row == (2,)
    assert torch.equal(second.features, batch.features[1:3])
    assert torch.equal(second.feature_mask, batch.feature_mask[1:3])
    assert torch.equal(second.attention_mask, batch.attention_mask[1:2])
    assert second.text == batch.text[1:2]
    assert [len(clip) for clip in second.audio] == [RATE, RATE]
    assert same(batch[-1], batch[2])
    assert same(batch[1:], batch[[1, 2]])
    assert batch[[2, 0]].clips_per_row == (1, 1)
    assert torch.equal(batch[[2, 0]].features, batch.features[[3, 0]])
    with pytest.raises(IndexError):
        batch[3]


def test_rows_run_as_they_do_in_the_batch(
    embedded: HookedAudioTransformer, batch: AudioInputs
) -> None:
    logits = embedded(batch)
    for row in range(3):
        assert torch.allclose(embedded(batch[row])[0, -1], logits[row, -1], atol=1e-4)


def test_repeat_is_copy_after_copy(batch: AudioInputs) -> None:
    twice = batch.repeat(2)
    assert len(twice) == 6
    assert twice.clips_per_row == (1, 2, 1, 1, 2, 1)
    assert same(twice[3:], batch)


def test_to_moves_every_tensor(batch: AudioInputs) -> None:
    moved = batch.to("meta")
    assert moved.device.type == "meta"
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    assert all(tensor.is_meta for tensor in tensors)
    assert not batch.features.is_meta


def test_digest_tells_inputs_apart(prepare: Callable) -> None:
    inputs = prepare(noise(), sampling_rate=RATE)
    assert same(inputs, prepare(noise(), sampling_rate=RATE))
    assert not same(inputs, prepare(noise(seed=1), sampling_rate=RATE))
    assert not same(inputs, prepare(noise(), "how many ?", sampling_rate=RATE))


def test_counterfactual_clips(prepare: Callable, tmp_path: Path) -> None:
    clean = prepare(noise(), sampling_rate=RATE)
    corrupted = clean.with_audio(noise(seed=1), sampling_rate=RATE)
    assert same(corrupted, prepare(noise(seed=1), sampling_rate=RATE))
    assert torch.equal(corrupted.tokens, clean.tokens)
    soundfile.write(tmp_path / "other.wav", noise(seed=1), RATE, subtype="FLOAT")
    assert same(clean.with_audio(tmp_path / "other.wav"), corrupted)
    assert same(corrupted.with_audio(noise(), sampling_rate=RATE), clean)
    with pytest.raises(AudioError, match="pass sampling_rate="):
        clean.with_audio(noise(seed=1))


def test_counterfactual_texts(prepare: Callable) -> None:
    clean = prepare(noise(), "which digit is first ?", sampling_rate=RATE)
    corrupted = clean.with_text("which digit is second ?")
    assert same(corrupted, prepare(noise(), "which digit is second ?", sampling_rate=RATE))
    assert torch.equal(corrupted.features, clean.features)


def test_counterfactuals_of_a_row(embedded: HookedAudioTransformer, batch: AudioInputs) -> None:
    other = [noise(seed=7), noise(seed=8)]
    changed = batch[1].with_audio([other], sampling_rate=RATE)
    assert changed.clips_per_row == (2,)
    assert changed.text == batch[1].text
    assert not torch.equal(changed.features, batch.features[1:3])
    many = batch[1:].with_text(["how many ?", QUESTION])
    assert torch.equal(many.tokens[0], batch[1].tokens[0])


def test_unequal_counterfactuals_are_refused(prepare: Callable) -> None:
    clean = prepare([noise(), noise()], [QUESTION, QUESTION], sampling_rate=RATE)
    with pytest.raises(InputError, match="equal"):
        clean.with_audio([noise(0.5), noise(0.5)], sampling_rate=RATE)
    with pytest.raises(InputError, match="patching needs equal shapes"):
        clean.with_text("how many ?")
    with pytest.raises(InputError, match="patching needs equal shapes"):
        clean[0].check_pairs_with(clean, "the clean row", "the batch")
    first = prepare([noise(), noise()], [QUESTION, "how many ?"], sampling_rate=RATE)
    with pytest.raises(InputError, match="padded differently"):
        first.with_text(["how many ?", QUESTION])


def test_a_pickle_holds_no_model(batch: AudioInputs) -> None:
    kept = pickle.loads(pickle.dumps(batch))
    assert same(kept, batch)
    assert kept.remake is None
    assert len(pickle.dumps(batch)) < 2e6


def test_a_pickle_of_views_holds_no_more_than_they_show(batch: AudioInputs) -> None:
    wide = torch.zeros(len(batch), 1_000_000, dtype=torch.long)
    n = batch.tokens.shape[1]
    wide[:, :n] = batch.tokens
    further = torch.zeros(len(batch.features), 1_000_000)
    view = replace(batch, tokens=wide[:, :n], extra={"more": further[:, :3]})
    assert len(pickle.dumps(view)) < 2e6
    assert torch.equal(pickle.loads(pickle.dumps(view)).tokens, batch.tokens)


def test_only_prepared_inputs_can_be_remade(embedded: HookedAudioTransformer) -> None:
    made = embedded.prepare(noise(), QUESTION, sampling_rate=RATE)
    raw = embedded.as_inputs(
        {
            "input_ids": made.tokens,
            "input_features": made.features,
            "feature_attention_mask": made.feature_mask,
        }
    )
    assert same(raw, made)
    for change in (lambda: raw.with_audio("a.wav"), lambda: raw.with_text("how many ?")):
        with pytest.raises(InputError, match=r"need inputs made by model\.prepare"):
            change()


def test_clips_must_be_counted_right() -> None:
    with pytest.raises(InputError, match=r"1 prompts hold 2 clips .* features of 1 clips"):
        AudioInputs(torch.zeros(1, 20, 10), torch.zeros(1, 3, dtype=torch.long), (2,))


def test_padded_rows() -> None:
    tokens, mask = padded([[5, 6], [7]], pad=0, device=torch.device("cpu"))
    assert tokens.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[True, True], [False, True]]
    tokens, mask = padded([[5, 6], [7]], pad=0, device=torch.device("cpu"), left=False)
    assert tokens.tolist() == [[5, 6], [7, 0]]
