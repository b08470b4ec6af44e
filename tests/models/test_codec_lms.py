"""Moshi and Kyutai's speech to text: delays, decoding, windows, seconds, and where they differ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from torch import Tensor, nn

from audio_lens import HookedAudioTransformer, InputError, metrics, patching
from audio_lens.models.config import LoadingError
from audio_lens.models.families.kyutai_stt import HookedKyutaiSTT
from audio_lens.models.families.moshi import HookedMoshi
from audio_lens.models.kinds.streams import UNKNOWN, delayed, undelayed
from audio_lens.models.layers import KVCache
from families import kyutai_stt, moshi
from families.moshi import N_CODES, N_TEXTS, N_VOICE
from generation import new_tokens, quiet, settings_for, with_settings

RATE, STEP_S = 200, 0.08  # of the tiny Mimi
N_STEPS = 6
FAMILIES = {"moshi": moshi, "kyutai_stt": kyutai_stt}
DELAY_S, PREFIX_S = 0.5, 0.16

each = pytest.mark.parametrize("name", FAMILIES)


def talkative(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A random Hugging Face model that does not fall into saying one token forever."""
    hf = FAMILIES[name].build(attn="sdpa", dtype=dtype, **options)
    with torch.no_grad():
        for module in hf.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(4)
    return hf


def extractor() -> transformers.KyutaiSpeechToTextFeatureExtractor:
    return transformers.KyutaiSpeechToTextFeatureExtractor(
        sampling_rate=RATE,
        audio_delay_seconds=DELAY_S,
        audio_silence_prefix_seconds=PREFIX_S,
    )


def random_codes(n_steps: int = N_STEPS, seed: int = 0) -> Tensor:
    """``2 k t``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, N_CODES, (2, N_VOICE, n_steps), generator=generator)


def random_text(n_steps: int = N_STEPS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 90, (2, n_steps), generator=generator).tolist()


def waves(*seconds: float, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(0, 0.2, round(RATE * s)).astype(np.float32) for s in seconds]


def conversation(model: HookedMoshi, **options: Any) -> Any:
    return model.conversation(random_codes(seed=2), random_codes(seed=3), random_text(), **options)


# -------------------------------------------------------------------------------- delays


def test_delays() -> None:
    codes = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    entering = delayed(codes, (0, 1, 2), initial=0)
    assert entering[0].tolist() == [
        [0, 1, 2, 3, UNKNOWN, UNKNOWN],
        [0, 0, 4, 5, 6, UNKNOWN],
        [0, 0, 0, 7, 8, 9],
    ]
    assert torch.equal(undelayed(entering, (0, 1, 2)), codes)
    assert undelayed(entering[..., :4], (0, 1, 2)).tolist() == [[[1], [4], [7]]]
    assert undelayed(entering[..., :2], (0, 1, 2)).shape == (1, 3, 0)


def test_delays_of_another_number_of_codebooks() -> None:
    with pytest.raises(InputError, match="3 codebooks were given, the model has 2"):
        delayed(torch.zeros(1, 3, 4, dtype=torch.long), (0, 1), initial=0)


# -------------------------------------------------------------------------------- depth decoder


@torch.no_grad()
def depth_logits(hf: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """Of Hugging Face's depth decoder, called without a mask: ``(b t) k v``."""
    rows = rearrange(hidden, "b t d -> (b t) 1 d")
    return hf.depth_decoder(
        input_ids=rearrange(ids, "b t k -> (b t) k"), last_hidden_state=rows
    ).logits


@pytest.mark.parametrize("mode", ["explicit", "sdpa"])
def test_the_depth_decoder_is_causal_as_fused_and_not_as_written_out_attention(mode: str) -> None:
    hf = moshi.build(attn="sdpa")
    model = HookedAudioTransformer.from_hf(hf)
    model.attn_mode = mode
    made = moshi.batch(lengths=(7,))
    logits, cache = model.run_with_cache(made, names_filter="decoder.hook_out")
    ours = rearrange(logits[..., N_TEXTS:], "b t (k v) -> (b t) k v", k=N_VOICE)
    asked = cache["decoder.hook_out"], moshi.depth_ids(made)
    assert torch.allclose(depth_logits(hf, *asked), ours, atol=1e-5)
    hf.depth_decoder.set_attn_implementation("eager")
    leaking = depth_logits(hf, *asked)
    assert (leaking[:, 0] - ours[:, 0]).abs().max() > 0.1


@torch.no_grad()
def test_the_codes_of_a_step_depend_on_earlier_ones_only() -> None:
    model = HookedAudioTransformer.from_hf(moshi.build(dtype=torch.float64))
    inputs = conversation(model)
    before = model(inputs)
    streams = inputs.further_tokens.clone()
    streams[:, 2, 4] = (streams[:, 2, 4] + 1) % N_CODES  # of the third codebook, at position 4
    after = model(replace(inputs, further_tokens=streams))
    changed = (before - after).abs().amax(0)
    of_stream = {
        name: model.stream(changed, name).gt(1e-9).any(-1).tolist() for name, _ in model.cfg.streams
    }
    later = [False] * 4 + [True] * 3
    assert of_stream == {
        "text": later,
        "audio.0": later,
        "audio.1": later,
        "audio.2": later,
        "audio.3": [False] * 3 + [True] * 4,
    }


@torch.no_grad()
def test_hugging_face_agrees_where_its_labels_are_those_of_the_next_position() -> None:
    """It delays audio labels by itself, and shifts no text."""
    hf = moshi.build(attn="sdpa")
    model = HookedAudioTransformer.from_hf(hf)
    inputs = conversation(model)
    said = random_codes(N_STEPS + 1, seed=3)
    said[..., :-1] = random_codes(seed=3)
    text = inputs.tokens[:, 1:]
    labels = {
        "text_labels": torch.cat([text, text[:, :1]], dim=1),
        "audio_labels": said,
    }
    codes = inputs.further_tokens[..., : 1 + N_STEPS]
    given = {
        "input_ids": inputs.tokens,
        "moshi_audio_codes": codes[:, :N_VOICE],
        "user_audio_codes": codes[:, N_VOICE:],
    }
    spoken = rearrange(model(inputs)[..., N_TEXTS:], "b t (k v) -> b t k v", k=N_VOICE)
    theirs = rearrange(hf(**given, **labels).audio_logits, "(b t) k v -> b t k v", b=2)
    assert torch.allclose(theirs[:, :-1], spoken[:, :-1], atol=1e-5)
    unshifted = hf(**given, text_labels=inputs.tokens, audio_labels=codes[:, :N_VOICE])
    theirs = rearrange(unshifted.audio_logits, "(b t) k v -> b t k v", b=2)
    assert (theirs[:, :-1] - spoken[:, :-1]).abs().max() > 0.1


def test_attention_of_the_depth_decoder() -> None:
    """Patterns are zero between steps; a hook that opens a score opens it; heads add up."""
    model = HookedAudioTransformer.from_hf(moshi.build(dtype=torch.float64))
    inputs = conversation(model)
    block = "depth.blocks.0.attn"
    names = [f"{block}.hook_{name}" for name in ("pattern", "result", "z")]
    names.append("depth.blocks.0.hook_attn_out")
    _, cache = model.run_with_cache(inputs, names_filter=names)
    pattern = cache[f"{block}.hook_pattern"]
    n_steps = inputs.tokens.shape[1]
    steps = torch.arange(n_steps).repeat_interleave(N_VOICE)
    inside = (steps[:, None] == steps) & torch.ones(len(steps), len(steps)).tril().bool()
    assert torch.equal(pattern > 0, inside.expand_as(pattern))
    assert torch.allclose(pattern.sum(-1), torch.ones(()).double())
    attn = model.depth.blocks[0].attn
    assert torch.allclose(
        cache[f"{block}.hook_result"].sum(2), attn.output(cache[f"{block}.hook_z"])
    )

    def opened(scores: Tensor, hook: Any) -> Tensor:
        scores[..., -1, 0] = 3.0
        return scores

    seen = {}

    def look(pattern: Tensor, hook: Any) -> None:
        seen["pattern"] = pattern

    hooks = [(f"{block}.hook_attn_scores", opened), (f"{block}.hook_pattern", look)]
    model.run_with_hooks(inputs, fwd_hooks=hooks)
    assert (seen["pattern"][..., -1, 0] > 0).all()
    assert torch.allclose(seen["pattern"].sum(-1), torch.ones(()).double())
    assert torch.allclose(seen["pattern"][..., :-1, :], pattern[..., :-1, :], atol=1e-6)


def test_weights_of_the_depth_decoder_have_an_axis_for_codebooks() -> None:
    block = HookedAudioTransformer.from_hf(moshi.build()).depth.blocks[0]
    x = torch.randn(2, 3 * N_VOICE, block.mlp.W_in.shape[1])
    by_book = rearrange(x, "b (t k) d -> b t k d", k=N_VOICE)
    queries = torch.einsum("btkd,khde->btkhe", by_book, block.attn.W_Q).flatten(1, 2)
    assert torch.allclose(block.attn.queries(x), queries, atol=1e-5)
    values = torch.einsum("btkd,khde->btkhe", by_book, block.attn.W_V).flatten(1, 2)
    assert torch.allclose(block.attn.keys_values(x)[1], values, atol=1e-5)
    up = torch.einsum("btkd,kdf->btkf", by_book, block.mlp.W_in)
    gate = torch.einsum("btkd,kdf->btkf", by_book, block.mlp.W_gate)
    post = torch.nn.functional.silu(gate) * up
    out = torch.einsum("btkf,kfd->btkd", post, block.mlp.W_out).flatten(1, 2)
    assert torch.allclose(block.mlp(x), out, atol=1e-4)
    assert block.attn.b_O.shape == block.mlp.b_out.shape == (x.shape[-1],)


# -------------------------------------------------------------------------------- windows


def window_batch(name: str, padding: str) -> dict[str, Tensor]:
    return FAMILIES[name].batch(lengths=(12, 7), padding=padding, dtype=torch.float64)


@torch.no_grad()
def stepped(hf: nn.Module, name: str, made: dict[str, Tensor]) -> Tensor:
    """Hugging Face's logits of the text, one position at a time."""
    past, logits = None, []
    for at in range(made["input_ids"].shape[1]):
        one = {key: x[..., at : at + 1] for key, x in made.items()}
        given = kyutai_stt.as_hf(one) if name == "kyutai_stt" else one
        out = hf(**{**given, "attention_mask": None}, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("window", [4, 6])
@each
def test_a_window_is_what_hugging_face_sees_step_by_step(name: str, window: int) -> None:
    """And not what it sees in a whole prompt."""
    hf = FAMILIES[name].build(dtype=torch.float64, attn="sdpa", sliding_window=window)
    made = FAMILIES[name].batch(lengths=(12, 12), dtype=torch.float64)
    with torch.no_grad():
        text = HookedAudioTransformer.from_hf(hf)(made)[..., :N_TEXTS]
        given = kyutai_stt.as_hf(made) if name == "kyutai_stt" else made
        at_once = hf(**given).logits
    assert torch.allclose(stepped(hf, name, made), text, atol=1e-9)
    assert torch.allclose(at_once[:, :window], text[:, :window], atol=1e-9)
    assert (at_once - text).abs().max() > 0.1


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("mode", ["explicit", "sdpa"])
@each
def test_windows_do_not_see_padding(name: str, mode: str, padding: str) -> None:
    model = HookedAudioTransformer.from_hf(
        FAMILIES[name].build(dtype=torch.float64, sliding_window=4)
    )
    made = window_batch(name, padding)
    alone = {k: x[1:] for k, x in made.items()}
    kept = alone.pop("attention_mask")[0].bool()
    alone = {k: x[..., kept] for k, x in alone.items()}
    with model.attention(mode), torch.no_grad():
        whole = model(made)
        assert whole.isfinite().all()
        text = whole[1:, kept, :N_TEXTS]
        assert torch.allclose(text, model(alone)[..., :N_TEXTS], atol=1e-6)


@pytest.mark.parametrize("window", [4, 3000])
@each
def test_cached_equals_full(name: str, window: int) -> None:
    """One position, then a few, then one by one."""
    model = HookedAudioTransformer.from_hf(
        FAMILIES[name].build(dtype=torch.float64, sliding_window=window)
    )
    inputs = model.as_inputs(FAMILIES[name].batch(lengths=(11, 11), dtype=torch.float64))
    full, past, parts = model(inputs)[..., :N_TEXTS], KVCache(), []
    for start, stop in [(0, 1), (1, 8), (8, 9), (9, 10), (10, 11)]:
        step = type(inputs)(
            features=inputs.features,
            tokens=inputs.tokens[:, start:stop],
            further_tokens=inputs.further_tokens[..., start:stop],
            clips_per_row=inputs.clips_per_row,
        )
        parts.append(model(step, past=past)[..., :N_TEXTS])
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-9)


@each
def test_sweeps_of_windowed_models_are_exact(name: str) -> None:
    model = HookedAudioTransformer.from_hf(
        FAMILIES[name].build(dtype=torch.float64, sliding_window=4)
    )
    clean, corrupted = (
        FAMILIES[name].batch(lengths=(9, 6), seed=seed, dtype=torch.float64) for seed in (0, 1)
    )
    for site in ("decoder.resid_pre", "decoder.attn.z"):
        patching.sweep(
            model,
            clean=clean,
            corrupted=corrupted,
            site=site,
            axes=("layer", "position"),
            metric=lambda logits: logits[:, -1, 3] - logits[:, 4, 5],
            verify=8,
            progress=False,
        )


# -------------------------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def speaking() -> tuple[nn.Module, HookedMoshi]:
    hf = talkative("moshi")
    return hf, HookedAudioTransformer.from_hf(hf)


def test_moshi_says_what_it_says_in_hugging_face(speaking: tuple) -> None:
    """Its text and all its codes, over a prompt, with a user who then is silent."""
    hf, model = speaking
    n_new = 12
    own, user, text = random_codes(seed=3), random_codes(seed=2), random_text()
    theirs = hf.generate(
        input_ids=torch.tensor(text),
        moshi_audio_codes=own,
        user_audio_codes=user,
        max_new_tokens=n_new,
        return_audio_codes=True,
        return_audio_waveforms=False,
        do_sample=False,
    )
    made = model.continued(model.conversation(user, own, text), n_new)
    assert torch.equal(made.tokens, theirs.sequences)
    codes = undelayed(made.further_tokens[:, :N_VOICE], model.delays[:N_VOICE])
    assert torch.equal(codes, theirs.audio_codes)
    assert len(made.tokens.unique()) > 8
    assert len(codes.unique()) > 8
    assert torch.equal(model.generate(conversation(model), n_new, "tokens"), made.tokens)


def test_the_continuation_is_what_its_own_logits_say(speaking: tuple) -> None:
    """Text and codes are the most probable under a forward of the whole."""
    _, model = speaking
    prompt = conversation(model)
    made = model.continued(prompt, 8)
    logits, n_given = model(made), prompt.tokens.shape[1]
    for stream, _ in model.cfg.streams:
        chosen = model.stream(logits, stream).argmax(-1)[:, n_given - 1 : -1]
        if stream == "text":
            assert torch.equal(chosen, made.tokens[:, n_given:])
        else:  # late codes of the prompt enter first
            late = int(stream != "audio.0")
            entered = made.further_tokens[:, int(stream[-1]), n_given:]
            assert torch.equal(chosen[:, late:], entered[:, late:])


def test_moshi_answers_while_the_user_speaks(speaking: tuple) -> None:
    """With audio alone, the user's codes enter as they lie ahead."""
    _, model = speaking
    prompt = model.prepare(waves(0.9, 0.7), sampling_rate=RATE)
    assert prompt.tokens.tolist() == [[N_TEXTS]] * 2
    assert (prompt.further_tokens[:, :N_VOICE, 1:] == UNKNOWN)[..., 1:].all()
    made = model.continued(prompt, 10)
    heard = undelayed(made.further_tokens[:, N_VOICE:], model.delays[N_VOICE:])
    assert torch.equal(heard, model.encoded(prompt.audio)[..., : heard.shape[-1]])
    assert torch.equal(model.as_inputs(made).tokens, made.tokens)


def test_hooks_steer_what_is_said(speaking: tuple) -> None:
    _, model = speaking
    columns = model.cfg.columns("audio.1")

    def only_seven(logits: Tensor, hook: Any) -> Tensor:
        logits[..., columns.start + 7] = 1e4
        return logits

    with model.hooks([("hook_logits", only_seven)]):
        made = model.continued(conversation(model), 6)
    assert (made.further_tokens[:, 1, -5:] == 7).all()
    assert (made.further_tokens[:, 0, -5:] != 7).any()


@pytest.mark.parametrize("window", [9, 375])
def test_kyutai_writes_what_it_writes_in_hugging_face(window: int) -> None:
    hf = talkative("kyutai_stt", sliding_window=window)
    model = HookedAudioTransformer.from_hf(hf, extractor())
    clips = waves(2.1, 1.5)
    heard = extractor()(clips, sampling_rate=RATE, return_tensors="pt")
    theirs = hf.generate(**heard, do_sample=False)
    made = model.continued(model.prepare(clips, sampling_rate=RATE))
    assert torch.equal(made.tokens, theirs)
    assert len(theirs.unique()) > 8
    assert torch.equal(model.generate(heard, return_type="tokens"), theirs)
    again = model.prepare(clips, text=made.tokens[:, 1:].tolist(), sampling_rate=RATE)
    assert torch.equal(again.further_tokens, made.further_tokens)
    assert torch.equal(model(again)[:, :-1].argmax(-1), made.tokens[:, 1:])


def test_hugging_face_hears_the_first_of_several_windows_twice() -> None:
    """So with windows of one step, as in the released config, its audio enters a step late."""
    hf = talkative("kyutai_stt")
    hf.generation_config.audio_window_size = 1
    first_samples: list[float] = []
    encode = hf.codec_model.encode

    def listening(values: Tensor, **options: Any) -> Any:
        first_samples.append(round(values[0, 0, 0].item()))
        return encode(values, **options)

    hf.codec_model.encode = listening
    ramp = torch.arange(RATE, dtype=torch.float32)[None, None]
    hf.generate(input_values=ramp, do_sample=False, max_new_tokens=5)
    assert first_samples == [0, 0, 16, 32]


def test_text_of_kyutai_is_continued_as_far_as_there_is_audio() -> None:
    model = HookedAudioTransformer.from_hf(talkative("kyutai_stt"), extractor())
    clip = waves(1.0)
    inputs = model.prepare(clip, text=[[9, 8, 7]], sampling_rate=RATE)
    assert inputs.tokens.tolist() == [[N_TEXTS - 1, 9, 8, 7]]
    made = model.continued(inputs, 5)
    assert made.tokens.shape == (1, 9)
    assert made.tokens[0, :4].tolist() == inputs.tokens[0].tolist()
    n_ahead = inputs.further_tokens.shape[2] - 4
    with pytest.raises(InputError, match=f"{n_ahead} steps of audio lie ahead"):
        model.continued(inputs, n_ahead + 1)
    with pytest.raises(InputError, match="0 steps of audio lie ahead"):
        model.continued(model.continued(inputs))


# -------------------------------------------------------------------------------- codec


@each
def test_audio_is_heard_through_the_codec(name: str) -> None:
    hf = FAMILIES[name].build()
    model = HookedAudioTransformer.from_hf(hf, extractor() if name == "kyutai_stt" else None)
    codec = hf.codec_model if name == "kyutai_stt" else hf.audio_encoder
    clip = waves(0.96)
    inputs = model.prepare(clip, sampling_rate=RATE)
    own = torch.from_numpy(clip[0])[None, None]
    if name == "kyutai_stt":
        own = torch.from_numpy(extractor()(clip, sampling_rate=RATE)["input_values"][0])[None]
        own = own[..., : own.shape[-1] // 16 * 16]
    codes = codec.encode(own, num_quantizers=N_VOICE).audio_codes
    user = inputs.further_tokens[:, -N_VOICE:]
    delays = model.delays[N_VOICE:] if name == "moshi" else (0,) * N_VOICE
    assert torch.equal(undelayed(user, delays), codes)

    def shifted(codes: Tensor, hook: Any) -> Tensor:
        return (codes + 1) % N_CODES

    with model.codec.hooks([("hook_codes", shifted)]):
        changed = model.prepare(clip, sampling_rate=RATE)
    assert torch.equal(
        undelayed(changed.further_tokens[:, -N_VOICE:], delays), (codes + 1) % N_CODES
    )
    assert not any("codec" in key for key in model.state_dict())


# -------------------------------------------------------------------------------- time


def nan_equal(ours: Tensor, expected: list[float]) -> bool:
    expected = torch.tensor(expected, dtype=torch.float64)
    return torch.allclose(ours, expected, equal_nan=True)


def test_seconds_of_a_conversation() -> None:
    model = HookedAudioTransformer.from_hf(moshi.build())
    inputs, nan = conversation(model), math.nan
    centres = [round(STEP_S * step + 0.04, 9) for step in range(N_STEPS)]
    for stream in ("text", "audio.0", "user.0"):
        assert nan_equal(model.stream_seconds(inputs, stream)[1], [nan, *centres])
    for stream in ("audio.1", "audio.3", "user.2"):
        assert nan_equal(model.stream_seconds(inputs, stream)[1], [nan, nan, *centres[:-1]])
    timeline = model.timeline(inputs)
    assert nan_equal(timeline.seconds("decoder"), [nan, *centres])
    assert timeline.duration_s() == pytest.approx(N_STEPS * STEP_S)
    written = [
        [s, *[late] * (N_VOICE - 1)]
        for s, late in zip([*centres, 0.52], [nan, *centres], strict=True)
    ]
    assert nan_equal(timeline.seconds("depth"), [s for step in written for s in step])
    with pytest.raises(ValueError, match=r"no stream named 'audio\.9'; this model has text, audio"):
        model.stream_seconds(inputs, "audio.9")


def test_seconds_count_from_where_audio_begins_in_every_row() -> None:
    model = HookedAudioTransformer.from_hf(moshi.build())
    made = moshi.batch(lengths=(6, 4), padding="left", begun=False)
    nan = math.nan
    seconds = model.stream_seconds(made, "audio.0")
    assert nan_equal(seconds[0], [nan, 0.04, 0.12, 0.2, 0.28, 0.36])
    assert nan_equal(seconds[1], [nan, nan, nan, 0.04, 0.12, 0.2])
    assert model.timeline(made)[1].valid("decoder").tolist() == [False] * 2 + [True] * 4
    already = model.stream_seconds(moshi.batch(lengths=(3,)), "audio.0")
    assert nan_equal(already[0], [0.04, 0.12, 0.2])


def test_the_text_of_kyutai_tells_of_what_was_said_a_delay_ago() -> None:
    model = HookedAudioTransformer.from_hf(kyutai_stt.build(), extractor())
    made = model.prepare(waves(1.0, 0.6), text=random_text(14), sampling_rate=RATE)
    entering = torch.arange(-1, 14) * STEP_S + STEP_S / 2
    for stream, lag in {"audio.2": PREFIX_S, "text": PREFIX_S + DELAY_S}.items():
        expected = [s if s >= 0 else math.nan for s in (entering - lag).tolist()]
        assert torch.allclose(
            model.stream_seconds(made, stream)[0],
            torch.tensor(expected, dtype=torch.float64),
            equal_nan=True,
            atol=1e-6,
        )
    timeline = model.timeline(made)
    assert [timeline[row].duration_s() for row in (0, 1)] == [1.0, 0.6]
    heard = model.as_inputs(extractor()(waves(1.0, 0.6), sampling_rate=RATE, return_tensors="pt"))
    assert [len(clip) for clip in heard.audio] == [200, 120]


def latent_of(model: HookedKyutaiSTT, wave: np.ndarray) -> Tensor:
    """What the codec's encoder makes of a clip that is prepared, ``1 t d``."""
    found: list[Tensor] = []
    with model.codec.hooks([("hook_latent", lambda x, hook: found.append(x))]):
        model.prepare(wave, sampling_rate=RATE)
    return found[0]


@torch.no_grad()
def test_a_click_enters_at_the_position_of_its_second() -> None:
    """The latent of the codec jumps in the step that holds it, and in no earlier one."""
    model = HookedAudioTransformer.from_hf(kyutai_stt.build(), extractor())
    for second in (0.03, 0.41, 0.77):
        clip = np.zeros(RATE, dtype=np.float32)
        clicked = clip.copy()
        clicked[round(second * RATE)] = 1.0
        before, after = (latent_of(model, wave) for wave in (clip, clicked))
        first = (before - after).abs().amax(-1)[0].gt(1e-6).int().argmax().item()
        seconds = model.stream_seconds(
            model.prepare(clip, text=[[5] * before.shape[1]], sampling_rate=RATE),
            "audio.0",
        )[0]
        assert abs(seconds[1 + first].item() - second) <= STEP_S / 2 + 1e-6


# -------------------------------------------------------------------------------- inputs


def test_streams_are_cut_out_of_the_logits(speaking: tuple) -> None:
    _, model = speaking
    inputs = conversation(model)
    logits = model(inputs)
    assert logits.shape == (2, 1 + N_STEPS, N_TEXTS + N_VOICE * N_CODES)
    cut = torch.cat([model.stream(logits, name) for name, _ in model.cfg.streams], dim=-1)
    assert torch.equal(cut, logits)
    values = patching.sweep(
        model,
        clean=inputs,
        corrupted=replace(inputs, tokens=inputs.tokens.flip(0)),
        site="depth.resid_pre",
        axes="layer",
        metric=metrics.of_stream("audio.3", metrics.logit_diff(3, 5, position=2)),
        progress=False,
    ).values
    assert values.shape[-1] == model.cfg.further_decoders["depth"].n_layers


def test_loss_is_of_the_text_and_of_moshis_codes(speaking: tuple) -> None:
    _, model = speaking
    inputs = conversation(model)
    logits, loss = model(inputs, return_type="both")
    text = torch.nn.functional.cross_entropy(
        model.stream(logits, "text")[:, :-1].flatten(0, 1), inputs.tokens[:, 1:].flatten()
    )
    losses = []
    for k in range(N_VOICE):
        first = int(k > 0)  # where the codebook begins
        of_code = model.stream(logits, f"audio.{k}")[:, first:-1]
        target = inputs.further_tokens[:, k, 1 + first : 1 + N_STEPS]
        losses += torch.nn.functional.cross_entropy(
            of_code.flatten(0, 1), target.flatten(), reduction="none"
        ).tolist()
    assert loss.item() == pytest.approx(text.item() + np.mean(losses), rel=1e-5)
    with pytest.raises(InputError, match="at least two positions"):
        model(model.conversation(random_codes()), return_type="loss")


def test_pairs_are_remade_from_other_audio(speaking: tuple) -> None:
    _, model = speaking
    said = waves(0.8)
    inputs = model.prepare(waves(0.8, seed=1), random_text(10)[:1], RATE, own=said)
    loud = np.random.default_rng(5).uniform(-1, 1, len(said[0])).astype(np.float32)
    other = inputs.with_audio(loud, RATE)
    assert torch.equal(other.tokens, inputs.tokens)
    assert torch.equal(other.further_tokens[:, :N_VOICE], inputs.further_tokens[:, :N_VOICE])
    assert not torch.equal(other.further_tokens, inputs.further_tokens)
    with pytest.raises(InputError, match="equal shapes"):
        inputs.with_audio(waves(0.9), RATE)


def unreadable(model: HookedMoshi) -> Iterator[tuple[dict[str, Any], str]]:
    made = moshi.batch(lengths=(3,))
    yield {**made, "user_audio_codes": None}, "no user_audio_codes"
    yield {**made, "moshi_audio_codes": None}, "the codes of both voices"
    yield {**made, "input_ids": made["input_ids"] + N_TEXTS}, "the vocabulary has 101"
    yield {**made, "user_audio_codes": made["user_audio_codes"] + N_CODES}, "a codebook has 17"
    yield {**made, "user_audio_codes": made["user_audio_codes"] * 0 - 1}, "no code -1"
    yield {**made, "user_audio_codes": made["user_audio_codes"][..., :2]}, "of different shapes"
    codes = {key: x[..., :2] for key, x in made.items() if key.endswith("codes")}
    yield {**made, **codes}, "2 steps of codes for 3 text tokens"
    codes = {key: x.repeat(2, 1, 1) for key, x in made.items() if key.endswith("codes")}
    yield {**made, **codes}, "codes of 2 prompts, and text of 1"
    codes = {key: x[:, :2] for key, x in made.items() if key.endswith("codes")}
    yield {**made, **codes}, "codes are \\(b, 8 codebooks, positions\\)"


def test_what_cannot_be_read(speaking: tuple) -> None:
    _, model = speaking
    for mapping, message in unreadable(model):
        with pytest.raises(InputError, match=message):
            model.as_inputs(mapping)
    with pytest.raises(InputError, match="one id per step"):
        model.conversation(random_codes(), random_codes(), ["hello", "you"])
    with pytest.raises(InputError, match="one id per step"):
        model.conversation(random_codes(), random_codes(), [[5, 6], [5]])
    with pytest.raises(InputError, match="8 steps of codes for 9 text tokens"):
        model.conversation(random_codes(), random_codes(), random_text(8))
    with pytest.raises(InputError, match="no code -1"):
        model.conversation(random_codes(), None, random_text(4))
    with pytest.raises(InputError, match="16 codebooks were given, the model has 8"):
        model.conversation(torch.cat([random_codes()] * 2, dim=1))


def test_kyutai_reads_ids_together_or_apart() -> None:
    model = HookedAudioTransformer.from_hf(kyutai_stt.build())
    apart = kyutai_stt.batch()
    together = model.as_inputs(kyutai_stt.as_hf(apart))
    assert torch.equal(together.further_tokens, model.as_inputs(apart).further_tokens)
    assert torch.equal(model(together), model(apart))
    with pytest.raises(InputError, match="no audio_codes"):
        model.as_inputs({"input_ids": apart["input_ids"]})
    with pytest.raises(InputError, match="unknown beside input_values: input_ids"):
        model.as_inputs({"input_values": torch.zeros(1, 1, 99), "input_ids": apart["input_ids"]})
    with pytest.raises(InputError, match="10 samples: one step has 16"):
        model.as_inputs({"input_values": torch.zeros(1, 1, 10)})


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("moshi", {"depth_sliding_window": 2}, "a window of 2"),
        (
            "moshi",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "type 'linear'",
        ),
        ("kyutai_stt", {"bos_token_id": 48_000}, "bos_token_id is 48000; there are 169"),
        ("kyutai_stt", {"audio_bos_token_id": 17}, "audio_bos_token_id is 17; there are 17"),
    ],
)
def test_configs_that_are_not_implemented(name: str, options: dict, message: str) -> None:
    hf = FAMILIES[name].build()
    of_depth = {k.removeprefix("depth_"): v for k, v in options.items() if k.startswith("depth_")}
    for key, value in (of_depth or options).items():
        setattr(hf.config.depth_decoder_config if of_depth else hf.config, key, value)
    with pytest.raises(LoadingError, match=message):
        HookedAudioTransformer.from_hf(hf)


def test_the_released_shapes() -> None:
    """Of the configurations of transformers, whose defaults are those of the released models."""
    moshiko = HookedMoshi.config_from_hf(transformers.MoshiConfig(audio_vocab_size=2048))
    assert (moshiko.decoder.n_layers, moshiko.decoder.d_mlp, moshiko.window) == (32, 11264, 3000)
    depth = moshiko.further_decoders["depth"]
    assert (depth.n_layers, depth.n_codebooks, depth.d_mlp) == (6, 8, 2816)
    assert moshiko.decoder.d_vocab == 32_000 + 8 * 2048
    assert moshiko.step_s == 0.08
    stt = HookedKyutaiSTT.config_from_hf(transformers.KyutaiSpeechToTextConfig())
    assert (stt.decoder.n_layers, stt.n_codebooks, stt.window, stt.step_s) == (48, 32, 375, 0.08)
    assert stt.initial_text == 48_000


def test_codes_that_lie_ahead_count_to_the_length_of_the_clip(speaking: tuple) -> None:
    _, model = speaking
    user = random_codes(10)[:1]
    alone, answered = model.conversation(user), model.conversation(user, user, [[7] * 6])
    lengths = [model.timeline(inputs).duration_s(0) for inputs in (alone, answered)]
    assert lengths == [pytest.approx(0.8), pytest.approx(0.8)]


# -------------------------------------------------------------------------------- settings


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("third", range(3))
def test_settings_act_on_moshis_text_as_in_hugging_face(speaking: tuple, third: int) -> None:
    hf, model = speaking
    own, user, text = random_codes(seed=3), random_codes(seed=2), random_text()
    given = {"input_ids": torch.tensor(text), "moshi_audio_codes": own, "user_audio_codes": user}
    given |= {"return_audio_waveforms": False, "return_audio_codes": False, "do_sample": False}
    prompt = model.conversation(user, own, text)
    n_prompt, kept = prompt.tokens.shape[1], hf.generation_config
    plain = quiet(model.continued, prompt, 6).tokens[:, n_prompt:]
    hf.generation_config = model.generation_config = transformers.GenerationConfig()
    try:
        for name, settings in list(settings_for(plain).items())[third::3]:
            with_settings(hf, **settings, pad_token_id=None)  # their Moshi cannot look for one
            made = quiet(model.continued, prompt, 6)
            theirs = quiet(hf.generate, **given, max_new_tokens=6)
            assert torch.equal(made.tokens, theirs), name
        with_settings(hf, max_length=5)
        assert quiet(model.continued, prompt).tokens.shape[1] == n_prompt + 5
        assert quiet(hf.generate, **given).shape[1] == n_prompt + 5
        model.generation_config.depth_decoder_config = {"repetition_penalty": 1.5}
        with pytest.raises(InputError, match=r"repetition_penalty=1\.5 in depth_decoder_config"):
            model.generate(prompt, return_type="tokens")
    finally:
        hf.generation_config = model.generation_config = kept


def test_settings_act_on_kyutais_text_as_in_hugging_face() -> None:
    hf = talkative("kyutai_stt")
    model = HookedAudioTransformer.from_hf(hf, extractor())
    heard = extractor()(waves(0.3, 0.2), sampling_rate=RATE, return_tensors="pt")
    plain = new_tokens(model, heard)
    for name, settings in list(settings_for(plain).items())[::3]:
        with_settings(hf, **settings)
        expected = quiet(hf.generate, **heard, do_sample=False)[:, 1:]
        assert torch.equal(new_tokens(model, heard), expected), name


def test_texts_that_end_before_their_audio_are_told() -> None:
    model = HookedAudioTransformer.from_hf(talkative("kyutai_stt"), extractor())
    inputs = model.prepare(waves(1.0), sampling_rate=RATE)
    with pytest.warns(UserWarning, match="cut after 2 new tokens"):
        model.continued(inputs, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.continued(inputs)


def test_moshi_goes_on_to_the_end_of_what_the_user_says(speaking: tuple) -> None:
    _, model = speaking
    prompt = model.prepare(waves(0.9), sampling_rate=RATE)
    n_ahead = prompt.further_tokens.shape[2] - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.continued(prompt).tokens.shape[1] == 1 + n_ahead
    assert model.token_limit(prompt) == n_ahead
    with pytest.warns(UserWarning, match="cut after 3 new tokens"):
        model.continued(prompt, 3)
