"""Codecs: equal to Hugging Face's, live at every hook, in time, and strict about what they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audio_lens.hooks import DeadHookError, HookedRoot, HookNameError, HookPoint
from audio_lens.inputs import InputError
from audio_lens.models.loading.checkpoints import LoadingError
from audio_lens.models.parts.codecs import HookedCodec
from families.base import randomise

_SEANET = {"num_filters": 4, "codebook_size": 16}
_ENCODEC = {
    **_SEANET,
    "upsampling_ratios": [4, 3, 2],
    "hidden_size": 8,
    "target_bandwidths": [8.0],
    "sampling_rate": 12_000,
}
_MIMI = {
    **_SEANET,
    "upsampling_ratios": [4, 2],
    "hidden_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "upsample_groups": 16,
    "sliding_window": 6,
    "sampling_rate": 1_600,
}
_DAC = {
    "encoder_hidden_size": 4,
    "decoder_hidden_size": 16,
    "downsampling_ratios": [2, 4],
    "n_codebooks": 3,
    "codebook_size": 16,
    "codebook_dim": 4,
    "sampling_rate": 8_000,
}
CONFIGS = {
    "encodec": (transformers.EncodecConfig, _ENCODEC),
    "encodec, not causal": (
        transformers.EncodecConfig,
        {
            **_ENCODEC,
            "use_causal_conv": False,
            "upsampling_ratios": [4, 2, 2],
            "target_bandwidths": [12.0],
        },
    ),
    "mimi": (transformers.MimiConfig, _MIMI),
    "dac": (transformers.DacConfig, _DAC),
    "dac, odd ratio": (transformers.DacConfig, {**_DAC, "downsampling_ratios": [2, 3]}),
}
HOOKS = ("hook_latent", "hook_codes", "hook_quantized", "hook_audio")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

each_codec = pytest.mark.parametrize("name", CONFIGS)


def build(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> nn.Module:
    """A random codec of Hugging Face, codebooks too."""
    config_class, options = CONFIGS[name]
    config = config_class(**{**options, **overrides})
    hf = randomise(transformers.AutoModel.from_config(config))
    generator = torch.Generator().manual_seed(1)
    for key, buffer in hf.named_buffers():
        if key.endswith((".embed", ".embed_sum")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif key.endswith(".cluster_usage"):
            buffer.copy_(1 + torch.rand(buffer.shape, generator=generator))
    return hf.to(dtype)


def codec_of(name: str, **options: Any) -> HookedCodec:
    return HookedCodec.from_hf(build(name, **options))


def noise(n_samples: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n_samples, generator=generator, dtype=dtype)


@torch.no_grad()
def reference(hf: nn.Module, audio: Tensor) -> dict[str, Tensor]:
    """Hugging Face's activations under our names; its audio is cut to the length it heard."""
    waves, kind = audio[:, None], hf.config.model_type
    if kind == "dac":
        out = hf(waves)
        latent, quantized = hf.encoder(waves), out.quantized_representation
        codes, sound = out.audio_codes, out.audio_values
    elif kind == "mimi":
        out = hf(waves)
        latent, quantized = hf.encoder(waves).latents, hf.quantizer.decode(out.audio_codes)
        codes, sound = out.audio_codes, out.audio_values[:, 0]
    else:
        out = hf(waves, bandwidth=hf.config.target_bandwidths[-1])
        latent, codes = hf.encoder(waves), out.audio_codes[0]
        quantized, sound = hf.quantizer.decode(codes.transpose(0, 1)), out.audio_values[:, 0]
    latent, quantized = latent.transpose(1, 2), quantized.transpose(1, 2)
    return dict(zip(HOOKS, (latent, codes, quantized, sound), strict=True))


# -------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_codec
def test_equals_hugging_face(name: str, dtype: torch.dtype) -> None:
    hf = build(name, dtype)
    codec = HookedCodec.from_hf(hf)
    for n_steps in (1, 2, 31):
        n_samples = n_steps * codec.cfg.hop
        n_samples -= 0 if "dac" in name else codec.cfg.hop // 3  # DAC is told whole steps
        audio = noise(n_samples, dtype=dtype)
        theirs, (sound, cache) = reference(hf, audio), codec.run_with_cache(audio)
        assert torch.equal(cache["hook_codes"], theirs["hook_codes"])
        assert cache["hook_codes"].shape == (2, codec.cfg.n_codebooks, n_steps)
        assert torch.equal(sound, cache["hook_audio"][:, :n_samples])
        assert sound.shape[1] == n_samples or "odd" in name
        ours = {**cache, "hook_audio": sound}
        for hook in HOOKS:
            difference = (theirs[hook] - ours[hook]).abs().max() / theirs[hook].abs().max()
            assert difference <= TOLERANCE[dtype], hook


@each_codec
def test_encode_and_decode_are_the_two_halves(name: str) -> None:
    codec, audio = codec_of(name), noise(500)
    codes = codec.encode(audio)
    assert torch.equal(codec.decode(codes)[:, :500], codec(audio))
    assert codes.shape[-1] == codec.cfg.n_steps(500) == len(codec.seconds(codes.shape[-1]))


def test_dac_fills_the_last_step_with_silence() -> None:
    codec, audio = codec_of("dac"), noise(13)
    filled = torch.cat([audio, torch.zeros(2, 3)], dim=1)
    assert torch.equal(codec.encode(audio), codec.encode(filled))
    assert codec(audio).shape == audio.shape


@each_codec
def test_fewer_codebooks_are_the_coarsest(name: str) -> None:
    hf, audio = build(name), noise(200)
    whole, coarse = HookedCodec.from_hf(hf), HookedCodec.from_hf(hf, n_codebooks=2)
    codes = whole.encode(audio)
    assert torch.equal(coarse.encode(audio), codes[:, :2])
    assert torch.equal(coarse.decode(codes[:, :2]), whole.decode(codes[:, :2]))
    assert torch.equal(coarse(audio), whole.decode(codes[:, :2])[:, :200])
    with pytest.raises(InputError, match="up to 2 codebooks"):
        coarse.decode(codes)


# -------------------------------------------------------------------------------- hooks


@each_codec
def test_what_a_hook_writes_changes_all_that_follows(name: str) -> None:
    codec, audio = codec_of(name), noise(240)
    sound, before = codec.run_with_cache(audio)
    edits: Mapping[str, Callable[[Tensor], Tensor]] = {
        "hook_latent": lambda act: -3 * act,
        "hook_codes": lambda act: (act + 1) % codec.cfg.n_codes,
        "hook_quantized": lambda act: act + 1,
        "hook_audio": lambda act: act / 2,
    }
    for index, (hook, edit) in enumerate(edits.items()):
        with codec.hooks([(hook, lambda act, hook, edit=edit: edit(act))]):
            changed, after = codec.run_with_cache(audio)
        assert all(torch.equal(before[h], after[h]) for h in HOOKS[:index])
        assert not any(torch.equal(before[h], after[h]) for h in HOOKS[index:]), hook
        assert not torch.equal(changed, sound)


def test_the_codes_pass_their_hook_once() -> None:
    codec, audio = codec_of("mimi"), noise(64)
    seen: list[Tensor] = []
    watch = [("hook_codes", lambda act, hook: seen.append(act.clone()))]
    codec.run_with_hooks(audio, fwd_hooks=watch)
    assert len(seen) == 1
    with codec.hooks(watch):
        codec.decode(codec.encode(audio))
    assert len(seen) == 3


def test_a_hook_that_edits_in_place_leaves_the_callers_codes() -> None:
    codec = codec_of("encodec")
    codes = codec.encode(noise(100))
    kept = codes.clone()
    with codec.hooks([("hook_codes", lambda act, hook: act.zero_())]):
        silent = codec.decode(codes)
    assert torch.equal(codes, kept)
    assert torch.equal(silent, codec.decode(torch.zeros_like(codes)))


def test_positions_of_a_cache_are_steps() -> None:
    codec, audio = codec_of("mimi"), noise(160)
    whole = codec.run_with_cache(audio)[1]
    _, cache = codec.run_with_cache(audio, pos_slice=slice(2, 5))
    assert set(cache) == set(HOOKS) - {"hook_audio"}
    assert torch.equal(cache["hook_codes"], whole["hook_codes"][:, :, 2:5])
    assert torch.equal(cache["hook_latent"], whole["hook_latent"][:, 2:5])


def test_gradients_reach_what_the_decoder_reads() -> None:
    codec = codec_of("encodec")
    kept: list[Tensor] = []

    def tracked(act: Tensor, hook: HookPoint) -> Tensor:
        kept.append(act.detach().requires_grad_())
        return kept[-1]

    codec.run_with_hooks(noise(96), fwd_hooks=[("hook_quantized", tracked)]).sum().backward()
    assert kept[0].grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in codec.parameters())


def test_unknown_and_dead_hooks_raise() -> None:
    codec, audio = codec_of("dac"), noise(40)
    with pytest.raises(HookNameError, match="nearest names: hook_latent"):
        codec.run_with_cache(audio, names_filter="hook_latents")
    with pytest.raises(DeadHookError), codec.hooks([("hook_audio", lambda act, hook: None)]):
        codec.encode(audio)


class Speaker(HookedRoot):
    """A model with a codec inside."""

    output_part = "decoder"

    def __init__(self, codec: HookedCodec):
        super().__init__()
        self.hook_heard = HookPoint()
        self.codec = codec
        self.setup()

    def forward(self, audio: Tensor) -> Tensor:
        return self.hook_heard(self.codec(audio))


def test_inside_a_model_hooks_are_prefixed_and_the_codec_still_stands_alone() -> None:
    alone, audio = codec_of("mimi"), noise(64)
    expected = alone.run_with_cache(audio)[1]
    model = Speaker(codec_of("mimi"))
    _, cache = model.run_with_cache(audio)
    assert set(cache) == {"hook_heard", *(f"codec.{hook}" for hook in HOOKS)}
    own = model.codec.run_with_cache(audio)[1]
    assert set(own) == set(HOOKS)
    for hook in HOOKS:
        assert torch.equal(cache[f"codec.{hook}"], expected[hook])
        assert torch.equal(own[hook], expected[hook])
    model.train()
    assert model.training and not model.codec.training


# -------------------------------------------------------------------------------- time

_32_KHZ = {"sampling_rate": 32_000, "upsampling_ratios": [8, 5, 4, 4]}


@pytest.mark.parametrize(
    "config, rate, first_s",
    [
        (transformers.EncodecConfig(), 75, 1 / 150),
        (
            transformers.EncodecConfig(sampling_rate=32_000, upsampling_ratios=[8, 5, 4, 4]),
            50,
            0.01,
        ),
        (transformers.MimiConfig(), 12.5, 0.04),
        (transformers.DacConfig(sampling_rate=44_100), 44_100 / 512, 256 / 44_100),
        (transformers.DacConfig(downsampling_ratios=[2, 4, 5, 8]), 50, 0.01),
    ],
    ids=["encodec 24k", "encodec 32k", "mimi", "dac 44k", "dac 16k"],
)
def test_steps_of_published_shapes(config: Any, rate: float, first_s: float) -> None:
    from audio_lens.models.parts.codecs import CODECS

    cfg = CODECS[config.model_type].config_from_hf(config)
    assert cfg.frame_rate == pytest.approx(rate)
    assert cfg.seconds(3).tolist() == pytest.approx(
        [first_s, first_s + 1 / rate, first_s + 2 / rate]
    )


@torch.no_grad()
def lit_by_click(codec: HookedCodec, sample: int, n_steps: int) -> np.ndarray:
    """Steps whose latent a click changes."""
    audio = noise(n_steps * codec.cfg.hop)[:1]
    clicked = audio.clone()
    clicked[:, sample] += 1
    before, after = (
        codec.run_with_cache(x, names_filter="hook_latent")[1]["hook_latent"][0]
        for x in (audio, clicked)
    )
    return np.flatnonzero((before - after).abs().amax(-1) > 1e-12)


@torch.no_grad()
def heard_from_step(codec: HookedCodec, step: int, n_steps: int) -> np.ndarray:
    """Samples that change with what one step's codes stand for."""
    before = codec.decode(torch.zeros(1, 1, n_steps, dtype=torch.long))[0]

    def nudge(act: Tensor, hook: HookPoint) -> Tensor:
        act[:, step] += 1
        return act

    with codec.hooks([("hook_quantized", nudge)]):
        after = codec.decode(torch.zeros(1, 1, n_steps, dtype=torch.long))[0]
    return np.flatnonzero((before - after).abs() > 1e-12)


@pytest.mark.parametrize("name", ["encodec", "mimi"])
def test_causal_codecs_hear_and_speak_from_the_step_that_holds_the_sample(name: str) -> None:
    codec, n_steps = codec_of(name), 24  # EnCodec's first steps read their own reflection
    hop, half_s = codec.cfg.hop, 0.5 / codec.cfg.frame_rate
    for sample in (12 * hop, 13 * hop - 1, 15 * hop + 3):
        first = lit_by_click(codec, sample, n_steps)[0]
        begin_s = codec.seconds(n_steps)[first].item() - half_s
        assert begin_s <= sample / codec.cfg.sampling_rate + 1e-9 < begin_s + 2 * half_s
    for step in (12, 17):
        first = heard_from_step(codec, step, n_steps)[0] / codec.cfg.sampling_rate
        assert first == pytest.approx(codec.seconds(n_steps)[step].item() - half_s, abs=1e-9)


@pytest.mark.parametrize("name", ["encodec, not causal", "dac", "dac, odd ratio"])
def test_other_codecs_hear_and_speak_about_the_centre_of_the_step(name: str) -> None:
    hf, n_steps = build(name), 60
    for parameter in (p for key, p in hf.named_parameters() if ".lstm." in key):
        parameter.data.zero_()  # what is left of the LSTM is its skip
    codec = HookedCodec.from_hf(hf)
    seconds, rate = codec.seconds(n_steps), codec.cfg.sampling_rate
    for sample in (n_steps * codec.cfg.hop // 2, n_steps * codec.cfg.hop // 2 + 7):
        lit = seconds[lit_by_click(codec, sample, n_steps)]
        middle = (lit[0] + lit[-1]).item() / 2
        assert middle == pytest.approx(sample / rate, abs=0.51 / codec.cfg.frame_rate)
    for step in (28, 33):
        heard = heard_from_step(codec, step, n_steps)
        middle = (heard[0] + heard[-1]) / 2 / rate
        assert middle == pytest.approx(seconds[step].item(), abs=0.3 / codec.cfg.frame_rate)


# -------------------------------------------------------------------------------- taking over


def test_the_hugging_face_model_is_shared_and_left_as_it_was() -> None:
    hf = build("dac").train()
    codec = HookedCodec.from_hf(hf)
    assert hf.training and all(parameter.requires_grad for parameter in hf.parameters())
    assert not codec.training and not any(p.requires_grad for p in codec.parameters())
    ours = {key.removeprefix("hf."): value for key, value in codec.state_dict().items()}
    theirs = hf.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].data_ptr() == theirs[key].data_ptr() for key in theirs)
    assert torch.equal(codec.encode(noise(80)), codec.encode(noise(80)))  # no dropout of codebooks


@each_codec
def test_moving_takes_everything_along(name: str) -> None:
    codec, audio = codec_of(name, dtype=torch.float32), noise(200)
    codec(audio)  # Mimi computes its codebooks once
    codec.to(torch.float64)
    assert codec.dtype == torch.float64
    assert codec(audio).dtype == torch.float64
    expected = HookedCodec.from_hf(build(name, torch.float32).double())(audio)
    assert torch.equal(codec(audio), expected)


def test_dac_may_keep_its_weight_norm() -> None:
    hf = build("dac")
    expected = HookedCodec.from_hf(hf)(noise(80))
    hf.apply_weight_norm()
    assert torch.allclose(HookedCodec.from_hf(hf)(noise(80)), expected, rtol=0, atol=1e-12)


@each_codec
def test_loads_a_directory(name: str, tmp_path: Path) -> None:
    hf = build(name, torch.float32)
    hf.save_pretrained(tmp_path)
    codec = HookedCodec.from_pretrained(tmp_path, n_codebooks=2, dtype=torch.float64)
    expected = HookedCodec.from_hf(build(name, torch.float32).double(), n_codebooks=2)
    assert torch.equal(codec(noise(100)), expected(noise(100)))
    assert codec.cfg.n_codebooks == 2


def test_missing_weights_raise(tmp_path: Path) -> None:
    build("mimi").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(LoadingError, match=r"missing keys: .*embed_sum"):
        HookedCodec.from_pretrained(tmp_path)


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(LoadingError, match="'gpt2' is no codec; implemented: encodec, mimi, dac"):
        HookedCodec.from_hf(gpt)
    gpt.save_pretrained(tmp_path)
    with pytest.raises(LoadingError, match="'gpt2' is no codec"):
        HookedCodec.from_pretrained(tmp_path)
    with pytest.raises(LoadingError, match="no such directory"):
        HookedCodec.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("encodec", {"normalize": True}, r"48 kHz.*normalize=True"),
        ("encodec", {"chunk_length_s": 1.0, "overlap": 0.01}, "chunk_length_s=1.0"),
        ("encodec", {"audio_channels": 2}, "audio_channels=2"),
        ("mimi", {"audio_channels": 2}, "only mono Mimi"),
        ("mimi", {"encoder_config": None}, "half a Mimi"),
    ],
)
def test_what_is_not_implemented_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(LoadingError, match=message):
        codec_of(name, **options)


@pytest.mark.parametrize("count", [0, 5])
def test_as_many_codebooks_as_there_are(count: int) -> None:
    with pytest.raises(LoadingError, match=f"this mimi has 4 codebooks, not {count}"):
        HookedCodec.from_hf(build("mimi"), n_codebooks=count)


# -------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    "audio", [torch.zeros(2, 0), torch.full((1, 9), torch.nan)], ids=["empty", "not finite"]
)
def test_unusable_audio_raises(audio: Tensor) -> None:
    with pytest.raises(InputError, match=r"finite waveforms, .* at 1600 Hz"):
        codec_of("mimi").encode(audio)


def test_codes_outside_the_codebooks_raise() -> None:
    codec = codec_of("mimi")
    with pytest.raises(InputError, match="no code 16: codebooks have 16 entries"):
        codec.decode(torch.full((1, 4, 2), 16))
    with pytest.raises(InputError, match=r"codes are \(b, up to 4 codebooks, steps\)"):
        codec.decode(torch.zeros(1, 4, 0, dtype=torch.long))
    with (
        pytest.raises(InputError, match="no code -1"),
        codec.hooks([("hook_codes", lambda act, hook: act - 16)]),
    ):
        codec.decode(torch.full((1, 4, 2), 16 - 1))


def test_reads_a_clip_at_its_own_rate() -> None:
    codec = codec_of("mimi")
    samples = np.sin(np.arange(3200) / 20).astype(np.float32)
    assert codec.load(samples, sampling_rate=3200).shape == (1, 1600)
    assert codec.load(samples, sampling_rate=1600).dtype == torch.float64
