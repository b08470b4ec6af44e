"""Qwen-Audio from a directory with the published files."""

from __future__ import annotations

import base64
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from safetensors.torch import save_file
from torch import Tensor

from audio_lens import InputError
from audio_lens.audio import AudioError
from audio_lens.models.config import LoadingError
from audio_lens.recipes.qwen_audio import (
    HookedQwenAudio,
    qwen_audio,
    qwen_audio_config,
    qwen_audio_of,
    qwen_tokenizer,
)
from families.qwen_audio import OPENING, batch, build, config, hooked
from published.qwen_audio import QWenLMHeadModel

MERGED = ("he", "ll", "hell", "hello", " h", " hello", "us", "er", "user", "\n\n", "12", "é", "io")
N_WORDS = 256 + len(MERGED)
PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, START_TURN, END_TURN = N_WORDS, N_WORDS + 1, N_WORDS + 2
PLACEHOLDER = N_WORDS + 208  # behind three marks and 205 spare ones
TAG = PLACEHOLDER + 3312


def ranks() -> dict[bytes, int]:
    """Bytes, and a few words made of them."""
    words = [bytes([i]) for i in range(256)] + [word.encode() for word in MERGED]
    return {word: rank for rank, word in enumerate(words)}


def words_file(folder: Path) -> Path:
    lines = (f"{base64.b64encode(word).decode()} {rank}" for word, rank in ranks().items())
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    return folder / "qwen.tiktoken"


def encoded(text: str) -> list[int]:
    """As tiktoken does it: piece by piece, always the pair whose whole has the lowest rank."""
    known, ids = ranks(), []
    for piece in PATTERN.findall(unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [
                (known[a + b], i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in known
            ]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [known[part] for part in parts]
    return ids


def written(
    folder: Path,
    published: QWenLMHeadModel,
    state: dict[str, Tensor] | None = None,
    chat_format: str = "chatml",
) -> Path:
    """A directory with the published files."""
    (folder / "config.json").write_text(json.dumps({**published.config, "model_type": "qwen"}))
    generation = {"chat_format": chat_format, "eos_token_id": END, "pad_token_id": END}
    generation |= {"do_sample": True, "top_p": 0.5, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    state = published.state_dict() if state is None else state
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors")
    words_file(folder)
    return folder


def wordy() -> QWenLMHeadModel:
    """Random, with a vocabulary for the words of the file."""
    return build(vocab_size=TAG + 10, audio_start_id=TAG)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedQwenAudio:
    return qwen_audio(written(tmp_path_factory.mktemp("qwen"), wordy()))


def tone(n_samples: int = 9_999) -> np.ndarray:
    return np.sin(np.arange(n_samples) / 7).astype(np.float32)


# -------------------------------------------------------------------------------- loading


@torch.no_grad()
def test_from_a_directory(tmp_path: Path) -> None:
    published, made = build(), batch()
    model = qwen_audio(written(tmp_path, published))
    inputs = model.as_inputs(made)
    ours, theirs = (x[inputs.attended] for x in (model(inputs), published(**made)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert model.cfg.model_name == str(tmp_path)
    assert qwen_audio(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_queries_keys_and_values_are_views() -> None:
    published = build()
    model, fused = hooked(published), published.transformer.h[1].attn.c_attn
    attn = model.decoder.blocks[1].attn
    for index, part in enumerate((attn.q_proj, attn.k_proj, attn.v_proj)):
        offset = index * len(part.weight) * part.weight.shape[1] * part.weight.element_size()
        assert part.weight.data_ptr() == fused.weight.data_ptr() + offset
        assert torch.equal(part.bias, fused.bias.chunk(3)[index])


@pytest.mark.parametrize("chat_format, ends", [("chatml", [END, END + 1, END + 2]), ("raw", [END])])
def test_when_to_stop(tmp_path: Path, chat_format: str, ends: list[int]) -> None:
    model = qwen_audio(written(tmp_path, wordy(), chat_format=chat_format))
    assert model.generation_config.eos_token_id == ends
    assert model.generation_config.pad_token_id == END
    assert model.generation_config.repetition_penalty == 1.1


def test_weights_and_files_are_checked(tmp_path: Path) -> None:
    published = build()
    state = published.state_dict()
    for name in ("transformer.h.1.attn.c_attn.bias", "transformer.audio.blocks.0.mlp.2.weight"):
        lacking = {key: x for key, x in state.items() if key != name}
        with pytest.raises(LoadingError, match="missing weights"):
            qwen_audio(written(tmp_path, published, lacking))
    with pytest.raises(LoadingError, match=r"without a place in this model: transformer\.odd"):
        qwen_audio(written(tmp_path, published, {**state, "transformer.odd.bias": torch.ones(3)}))
    old = {**state, "transformer.h.0.attn.masked_bias": torch.tensor([-1e4])}
    assert qwen_audio(written(tmp_path, published, old)).tokenizer is not None
    (tmp_path / "qwen.tiktoken").unlink()
    assert "no qwen.tiktoken" in qwen_audio(tmp_path).tokenizer_problem
    (tmp_path / "config.json").unlink()
    with pytest.raises(LoadingError, match=r"no config\.json"):
        qwen_audio(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"no_bias": False}, "no_bias=False is not implemented"),
        ({"rotary_pct": 0.5}, r"rotary_pct=0\.5 is not implemented"),
        ({"avg_pool": False}, "avg_pool=False is not implemented"),
    ],
)
def test_variants_that_are_not_implemented(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadingError, match=message):
        qwen_audio_config(config(**changes))
    with pytest.raises(LoadingError, match="no audio encoder"):
        qwen_audio_config({"model_type": "qwen"})
    with pytest.raises(LoadingError, match="do not fill a stream of 48"):
        qwen_audio_config({**config(), "kv_channels": 9})


def test_the_released_size() -> None:
    """Every weight of Qwen-Audio, by name and shape, has its place; none is allocated."""
    ear = {"n_mels": 80, "n_ctx": 1500, "n_state": 1280, "n_head": 20, "n_layer": 32}
    released = config(
        vocab_size=155947,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        seq_length=2048,
        audio_start_id=155163,
        **ear,
    )
    with torch.device("meta"):
        published = QWenLMHeadModel(released)
    state = published.state_dict()
    model = qwen_audio_of(qwen_audio_config(released), state)
    fused = [name for name in state if "c_attn" in name]
    assert len(model.state_dict()) == len(state) + 2 * len(fused)
    assert model.audio_token_id == 151851
    assert model.token_count(3000) == 750
    assert model.token_seconds(750)[[0, 749]].tolist() == pytest.approx([0.01, 29.97])


# -------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "text",
    [
        "hello hellhello 1212 user's",
        "  two\n\n three \n four...\n",
        "cafe\u0301 Ünïcode 音频 \t x",
        "a<|im_start|>user\n<audio>b</audio><|0.07|><|midi_velocity_127|><|speech_edit|>",
    ],
)
def test_words_are_those_of_tiktoken(tmp_path: Path, text: str) -> None:
    tokenizer = qwen_tokenizer(words_file(tmp_path))
    marks = {
        "<|im_start|>": START_TURN,
        "<audio>": TAG,
        "</audio>": TAG + 1,
        "<|0.07|>": PLACEHOLDER + 20 + 7,
        "<|midi_velocity_127|>": TAG - 16,
        "<|speech_edit|>": TAG - 1,
    }
    expected: list[int] = []
    for piece in regex.split(f"({'|'.join(map(regex.escape, marks))})", text):
        expected += [marks[piece]] if piece in marks else encoded(piece)
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == unicodedata.normalize("NFC", text)
    assert len(tokenizer) == TAG + 2


def turn(role: str, *content: int) -> list[int]:
    return [START_TURN, *encoded(role), *encoded("\n"), *content, END_TURN, *encoded("\n")]


def heard(n_samples: int) -> list[int]:
    """What stands for a clip in the published prompts."""
    n_frames = (n_samples // 160 - 1) // 2 + 1
    return [TAG, *[PLACEHOLDER] * (n_frames // 2), TAG + 1]


def test_a_question_stands_behind_numbered_clips(model: HookedQwenAudio) -> None:
    """As published, where every piece is encoded on its own."""
    waves = [tone(9_999), tone(16_000)]
    inputs = model.prepare([waves], text="hello?", sampling_rate=16_000)
    clips = [
        [*encoded(f"Audio {i}:"), *heard(len(wave)), *encoded("\n")]
        for i, wave in enumerate(waves, start=1)
    ]
    content = [*clips[0], *clips[1], *encoded("hello?")]
    expected = [
        *turn("system", *encoded("You are a helpful assistant.")),
        *turn("user", *content),
        *[START_TURN, *encoded("assistant"), *encoded("\n")],
    ]
    assert inputs.tokens.tolist() == [expected]
    assert inputs.clips_per_row == (2,)


def test_conversations_and_whole_prompts(model: HookedQwenAudio) -> None:
    clip = {"type": "audio", "audio_url": "a.wav"}
    conversation = [
        {"role": "system", "content": "user"},
        {"role": "user", "content": [clip, {"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "hell"},
        {"role": "user", "content": "us"},
    ]
    inputs = model.prepare(tone(), text=conversation, sampling_rate=16_000)
    first = [*encoded("Audio 1:"), *heard(9_999), *encoded("\n"), *encoded("hello")]
    assert inputs.tokens.tolist() == [
        [
            *turn("system", *encoded("user")),
            *turn("user", *first),
            *turn("assistant", *encoded("hell")),
            *turn("user", *encoded("us")),
            *[START_TURN, *encoded("assistant"), *encoded("\n")],
        ]
    ]
    whole = model.prepare(tone(), text="<audio>a.wav</audio><|en|>hello", sampling_rate=16_000)
    assert whole.tokens.tolist() == [[*heard(9_999), PLACEHOLDER + 8, *encoded("hello")]]


def test_features_reach_as_far_as_the_longest_clip(model: HookedQwenAudio) -> None:
    """In whole frames of 20 ms; steps of 10 ms that are not whole are no audio."""
    inputs = model.prepare([tone(9_999), tone(16_100)], text="us", sampling_rate=16_000)
    assert inputs.features.shape == (2, 20, 100)
    assert inputs.feature_mask.sum(1).tolist() == [62, 100]
    assert model.encoder_length(inputs) == 50
    alone = inputs[0]
    torch.testing.assert_close(model(alone)[:, -1], model(inputs)[:1, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(AudioError, match="too few for one audio token"):
        model.prepare(tone(320 + 159), text="us", sampling_rate=16_000)
    assert model.prepare(tone(480), text="us", sampling_rate=16_000).features.shape[-1] == 4


def test_features_of_another_shape_are_refused() -> None:
    model, made = hooked(build()), batch()
    for features in (made["input_features"][:, :9], made["input_features"][..., :33]):
        with pytest.raises(InputError, match="an even number of frames, at most 220"):
            model({**made, "input_features": features, "feature_attention_mask": None})


# -------------------------------------------------------------------------------- long prompts


def test_prompts_over_the_length_of_plain_attention_are_refused() -> None:
    made = batch(lengths=[100], words=[7])
    length = made["input_ids"].shape[1]
    assert hooked(build(seq_length=length))(made).shape[1] == length
    with pytest.raises(InputError, match=f"{length} tokens are more than the {length - 1}"):
        hooked(build(seq_length=length - 1))(made)
    model = hooked(build(seq_length=length + 2))
    assert model.generate(made, max_new_tokens=3, return_type="tokens").shape[1] == length + 3
    with pytest.raises(InputError, match=f"{length + 3} tokens are more than"):
        model.generate(made, max_new_tokens=4, return_type="tokens")


@torch.no_grad()
def test_tags_have_vectors_of_their_own() -> None:
    """And the rows of the tags in the table are never read."""
    published, made = build(), batch()
    before = hooked(published)(made)
    published.transformer.wte.weight[OPENING:] += 1
    assert torch.equal(hooked(published)(made), before)
    published.transformer.audio.audio_bos_eos_token.weight[1] += 1
    assert not torch.equal(hooked(published)(made), before)
