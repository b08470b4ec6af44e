"""Audio LLMs that cut clips into windows: their processors, generation, time maps and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from audio_lens import HookedAudioTransformer, InputError, TokenError
from audio_lens.audio import AudioError
from audio_lens.models.config import LoadingError
from audio_lens.models.layers import KVCache
from families import FAMILIES
from families.audio_llms import N_FRAMES, extractor
from families.base import AUDIO_TOKEN, PAD, Family
from families.musicflamingo import BEGIN, FINISH

RATE = 16_000
WINDOW = N_FRAMES * 160  # samples
NAMES = ("audioflamingo3", "musicflamingo", "voxtral", "glmasr")
PROCESSORS = {
    "audioflamingo3": transformers.AudioFlamingo3Processor,
    "musicflamingo": transformers.MusicFlamingoProcessor,
    "glmasr": transformers.GlmAsrProcessor,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<sound>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
)
QUESTION = "what is said"


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A hundred words, with the special tokens of all four families."""
    special = {"<sound>": AUDIO_TOKEN, "<|sound_bos|>": BEGIN, "<|sound_eos|>": FINISH}
    words = ["<pad>", "<start>", "<end>", "<unknown>", "user", "assistant", "what", "is", "said"]
    words += ["2", "4"]
    words += [f"w{index}" for index in range(len(words), 100)]
    ids = {word: index for index, word in enumerate(words) if index not in special.values()}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids | special, "<unknown>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        additional_special_tokens=list(special),
        chat_template=TEMPLATE,
    )


def processor_of(family: Family, model: HookedAudioTransformer) -> Any:
    """The family's own processor; Voxtral's needs mistral-common, so its pieces alone."""
    pieces = {"feature_extractor": extractor(model), "tokenizer": tokenizer()}
    if family.name == "voxtral":
        return transformers.VoxtralProcessor(**pieces)
    return PROCESSORS[family.name](**pieces, audio_token="<sound>", chat_template=TEMPLATE)


def hearing(family: Family) -> HookedAudioTransformer:
    """A tiny model with a processor."""
    hf = family.build()
    hf.generation_config.pad_token_id = PAD
    model = HookedAudioTransformer.from_hf(hf)
    return HookedAudioTransformer.from_hf(hf, processor_of(family, model))


def clip(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).astype(np.float32)


CLIPS = {
    "within a window": [clip(20_001)],
    "a whole window": [clip(WINDOW)],
    "two windows and a bit": [clip(2 * WINDOW + 7001)],
    "a batch": [clip(20_000), clip(WINDOW + 12_345, seed=1)],
}
each_clips = pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS)


def same(ours: Tensor | None, theirs: Tensor) -> bool:
    """Equal, where None stands for a mask that leaves out nothing."""
    return bool(theirs.bool().all()) if ours is None else torch.equal(ours.to(theirs.dtype), theirs)


# -------------------------------------------------------------------------------- processors


@pytest.mark.parametrize("family", [FAMILIES[name] for name in PROCESSORS], ids=PROCESSORS)
@each_clips
def test_prepares_what_the_processor_does(family: Family, clips: list[np.ndarray]) -> None:
    model = hearing(family)
    turn = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": QUESTION}]}
    prompt = model.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    theirs = model.processor(text=[prompt] * len(clips), audio=clips)
    for inputs in (model.prepare(clips, QUESTION, RATE), model.as_inputs(theirs)):
        assert torch.equal(inputs.tokens, theirs["input_ids"])
        assert same(inputs.attention_mask, theirs["attention_mask"])
        assert torch.equal(inputs.features, theirs["input_features"])
        assert same(inputs.feature_mask, theirs["input_features_mask"])
        assert inputs.clips_per_row == (1,) * len(clips)
        assert inputs.segments_per_row == tuple(-(-len(c) // WINDOW) for c in clips)


@each_clips
def test_moss_writes_seconds_between_the_audio(clips: list[np.ndarray]) -> None:
    hf = FAMILIES["moss_transcribe_diarize"].build()
    n_mels = HookedAudioTransformer.from_hf(hf).cfg.n_mels
    processor = transformers.MossTranscribeDiarizeProcessor(
        transformers.MossTranscribeDiarizeFeatureExtractor(feature_size=n_mels, chunk_length=2),
        tokenizer(),
        chat_template=TEMPLATE,
        audio_token="<sound>",
    )
    model = HookedAudioTransformer.from_hf(hf, processor)
    prompts = [f"user <sound> {QUESTION}"] * len(clips)
    options = {"sampling_rate": RATE, "padding": True, "padding_side": "left"}
    theirs = processor(text=prompts, audio=clips, return_tensors="pt", **options)
    for inputs in (model.prepare(clips, prompts, RATE), model.as_inputs(dict(theirs))):
        assert torch.equal(inputs.tokens, theirs["input_ids"])
        assert same(inputs.attention_mask, theirs["attention_mask"])
        assert torch.equal(inputs.features, theirs["input_features"])
        assert inputs.segments_per_row == tuple(-(-len(c) // WINDOW) for c in clips)
    two = processor.tokenizer.convert_tokens_to_ids("2")
    assert (theirs["input_ids"] == two).sum() == sum(len(c) >= WINDOW for c in clips)


@each_clips
def test_voxtral_prepares_the_features_of_whole_clips(clips: list[np.ndarray]) -> None:
    model = hearing(FAMILIES["voxtral"])
    theirs = model.processor._retrieve_input_features(
        clips,
        N_FRAMES,
        sampling_rate=RATE,
        padding=True,
        truncation=False,
        pad_to_multiple_of=WINDOW,
        return_tensors="pt",
    )
    inputs = model.prepare(clips, QUESTION, RATE)
    assert torch.equal(inputs.features, theirs)
    assert [inputs.n_valid(i) for i in range(len(theirs))] == [
        min(N_FRAMES, -(-len(c) // 160) - start)
        for c in clips
        for start in range(0, -(-len(c) // 160), N_FRAMES)
    ]
    per_window = N_FRAMES // 8
    n_audio = (inputs.tokens == AUDIO_TOKEN).sum(1).tolist()
    assert n_audio == [per_window * -(-len(c) // WINDOW) for c in clips]


def test_prompts_of_several_clips(family: Family) -> None:
    model = hearing(family)
    clips = [[clip(20_000), clip(WINDOW + 9_000, seed=1)], [clip(30_000, seed=2)]]
    texts = ["w50 <sound> w51 <sound> w52", "w50 <sound> w53"]
    inputs = model.prepare(clips, texts, RATE)
    assert inputs.clips_per_row == (2, 1)
    assert inputs.segments_per_clip == (1, 2, 1)
    again = inputs.with_text(["w60 <sound> w61 <sound> w62", "w60 <sound> w63"])
    assert torch.equal(again.features, inputs.features)


def test_music_is_enclosed_once() -> None:
    model = hearing(FAMILIES["musicflamingo"])
    texts = ["what <sound> is", "what <|sound_bos|><sound><|sound_eos|> is"]
    bare, enclosed = (model.prepare(clip(20_000), text, RATE).tokens for text in texts)
    assert torch.equal(bare, enclosed)
    assert bare[0, 1] == BEGIN and bare[0, -2] == FINISH
    assert (bare[0, 2:-2] == AUDIO_TOKEN).all()


def test_clips_too_short_or_too_long_are_refused(family: Family) -> None:
    model = hearing(family)
    if family.name != "voxtral":  # which makes a window of tokens of anything
        with pytest.raises(AudioError, match="too short"):
            model.prepare(clip(200), QUESTION, RATE)
    model.cfg.max_segments = 2
    with pytest.raises(AudioError, match="takes 4 s"):
        model.prepare(clip(2 * WINDOW + 1), QUESTION, RATE)


@pytest.mark.parametrize("name, minutes", [("audioflamingo3", 10), ("musicflamingo", 20)])
def test_released_sizes_hear_minutes(name: str, minutes: int) -> None:
    model = FAMILIES[name].hooked(FAMILIES[name].build(ear_max_source_positions=1500))
    assert model.cfg.max_audio_s == 60 * minutes


def test_voxtral_without_a_chat_template_asks_for_a_whole_prompt() -> None:
    model = hearing(FAMILIES["voxtral"])
    model.tokenizer.chat_template = None
    with pytest.raises(TokenError, match="mistral-common"):
        model.prepare(clip(20_000), QUESTION, RATE)
    inputs = model.prepare(clip(20_000), "<start> <sound> what", RATE)
    assert (inputs.tokens[0] == AUDIO_TOKEN).sum() == N_FRAMES // 8


# -------------------------------------------------------------------------------- generation


def talkative(family: Family) -> transformers.PreTrainedModel:
    """A random model that never ends and does not fall into saying one token forever."""
    hf = family.build(seed=18)
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(6)
    hf.generation_config.eos_token_id = None
    hf.generation_config.pad_token_id = PAD
    return hf


@pytest.mark.parametrize("lengths", [(199, 373), (431, 173)], ids=str)
def test_generates_what_hugging_face_does(family: Family, lengths: Sequence[int]) -> None:
    hf = talkative(family)
    batch = family.batch(lengths=lengths, padding="left")
    theirs = hf.generate(**batch, max_new_tokens=20, do_sample=False)
    ours = HookedAudioTransformer.from_hf(hf).generate(
        batch, max_new_tokens=20, return_type="tokens"
    )
    assert torch.equal(ours, theirs)
    assert all(len(set(row)) > 3 for row in ours[:, -20:].tolist())


@torch.no_grad()
def test_cached_equals_full(family: Family) -> None:
    model = family.hooked(family.build())
    whole = model.as_inputs(family.batch(lengths=[210], words=[9]))
    full, past, logits = model(whole), KVCache(), []
    n = whole.tokens.shape[1]
    for start, stop in [(0, n - 4), (n - 4, n - 2), (n - 2, n - 1), (n - 1, n)]:
        step = type(whole)(
            features=whole.features,
            tokens=whole.tokens[:, start:stop],
            clips_per_row=whole.clips_per_row,
            segments_per_clip=whole.segments_per_clip,
            feature_mask=whole.feature_mask,
        )
        logits.append(model(step, past=past))
    assert (torch.cat(logits, dim=1) - full).abs().max() <= 1e-5 * full.abs().max()


# -------------------------------------------------------------------------------- loading


@torch.no_grad()
def test_loads_from_a_directory(family: Family, tmp_path: Path) -> None:
    hf = family.build()
    hf.save_pretrained(tmp_path)
    read = type(hf).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model = HookedAudioTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    batch = family.batch(lengths=[173], words=[5], dtype=torch.bfloat16)
    model.attn_mode = "sdpa"
    theirs, ours = read(**batch).logits, model(batch)
    assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


def test_the_positions_of_voxtral_stay_float32(tmp_path: Path) -> None:
    FAMILIES["voxtral"].build().save_pretrained(tmp_path)
    model = HookedAudioTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.encoder.pos_embed.weight.dtype == torch.float32
    assert model.encoder.conv1.weight.dtype == torch.bfloat16
    batch = FAMILIES["voxtral"].batch(dtype=torch.bfloat16)
    _, cache = model.run_with_cache(batch, names_filter="encoder.blocks.0.hook_resid_pre")
    assert cache["encoder.blocks.0.hook_resid_pre"].dtype == torch.bfloat16


FOREIGN = {  # of other language models, each with a value that would matter there
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "logits_scaling": 4.0,
    "attention_bias": True,
    "mlp_bias": True,
}


@pytest.mark.parametrize("name", ["qwen2_audio", "voxtral", "qwen3_asr", "qwen2_5_omni"])
def test_switches_of_other_language_models_are_ignored(name: str) -> None:
    made = FAMILIES[name].build()
    text = made.config.get_text_config()
    foreign = {switch: x for switch, x in FOREIGN.items() if switch not in vars(type(text)())}
    assert foreign
    for switch, value in foreign.items():
        setattr(text, switch, value)
    hf = type(made)(made.config).eval()
    hf.load_state_dict(made.state_dict())
    batch = FAMILIES[name].batch()
    is_there = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = HookedAudioTransformer.from_hf(hf)(batch), hf(**batch).logits
    assert torch.allclose(ours[is_there], theirs[is_there], atol=1e-4)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
REFUSED = {
    "another encoder": ("audioflamingo3", "audio_config.model_type", "whisper", "whisper"),
    "rescaled time": ("musicflamingo", "rope_parameters", YARN, "yarn"),
    "rescaled encoder": ("glmasr", "audio_config.rope_parameters", YARN, "yarn"),
    "parts of frames": ("voxtral", "audio_config.intermediate_size", 100, "intermediate_size"),
    "uneven windows": ("glmasr", "audio_config.max_position_embeddings", 99, "99 encoder frames"),
    "another language model": ("voxtral", "text_config.model_type", "mamba", "mamba"),
}


@pytest.mark.parametrize("name, field, value, said", REFUSED.values(), ids=REFUSED)
def test_unknown_features_are_refused_by_name(name: str, field: str, value: Any, said: str) -> None:
    hf = FAMILIES[name].build()
    *path, last = field.split(".")
    owner = hf.config
    for part in path:
        owner = getattr(owner, part)
    owner.__dict__[last] = value
    with pytest.raises(LoadingError, match=said):
        HookedAudioTransformer.from_hf(hf)


# -------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    "name, tokens, first, second",
    [
        ("audioflamingo3", 750, 0.01, 0.05),
        ("musicflamingo", 750, 0.01, 0.05),
        ("voxtral", 375, 0.03, 0.11),
        ("glmasr", 375, 0.03, 0.11),
    ],
)
def test_times_of_released_windows(name: str, tokens: int, first: float, second: float) -> None:
    size = "ear_max_position_embeddings" if name == "glmasr" else "ear_max_source_positions"
    model = FAMILIES[name].hooked(FAMILIES[name].build(**{size: 1500}))
    assert model.token_count(3000) == tokens
    assert model.token_seconds(tokens)[:2].tolist() == pytest.approx([first, second])
    features = torch.zeros(2, 20, 3000)
    mask = torch.arange(3000) < torch.tensor([3000, 401])[:, None]
    n_last = tokens if name == "voxtral" else model.token_count(401)
    prompt = [7, *[AUDIO_TOKEN] * (tokens + n_last), 8]
    inputs = model.as_inputs(
        {"input_ids": [prompt], "input_features": features, "input_features_mask": mask}
    )
    seconds = model.timeline(inputs).seconds("decoder")
    assert seconds[1 + tokens].item() == pytest.approx(30 + first)
    assert model.timeline(inputs).duration_s() == pytest.approx(34.01)


@torch.no_grad()
def test_windows_of_music_are_counted_within_their_clip() -> None:
    family = FAMILIES["musicflamingo"]
    model = family.hooked(family.build())
    ends_in_a_frame = family.batch(lengths=[201, 173], words=[5, 5])
    inputs = model.as_inputs(ends_in_a_frame)
    assert inputs.segments_per_clip == (2, 1)
    alone, together = model(inputs[1]), model(inputs)[1]
    attended = inputs.attended[1]
    assert torch.allclose(alone[0, inputs[1].attended[0]], together[attended], atol=1e-5)


@torch.no_grad()
def test_what_music_sends_depends_on_the_window() -> None:
    model = FAMILIES["musicflamingo"].hooked(FAMILIES["musicflamingo"].build())
    inputs = model.as_inputs(FAMILIES["musicflamingo"].batch(lengths=[350], words=[5]))
    resid = model.encode(inputs, stop=model.cfg.encoder.n_layers)
    sent = model.send_rows(resid, inputs)
    assert torch.equal(model.send_rows(resid[1:], inputs, torch.tensor([1])), sent[1:])
    assert not torch.allclose(model.send_rows(resid[1:], inputs, torch.tensor([0])), sent[1:])
    with pytest.raises(InputError, match="send_rows"):
        model.send(resid)
