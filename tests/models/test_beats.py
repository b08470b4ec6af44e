"""BEATs: published checkpoints, its features, and its patches in seconds and hertz."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from audio_lens import AudioInputs, InputError, LoadingError, TokenError
from audio_lens.models.families.beats import HookedBeats
from audio_lens.models.families.beats_config import DEVIATION, MEAN, log_mel
from families.beats import batch, build, hooked
from published.beats import PUBLISHED, TINY, published_shapes

RATE = 16_000


@functools.cache
def model_of(**options: Any) -> HookedBeats:
    return hooked(build(**options))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    n_samples = round(seconds * RATE)
    return np.random.default_rng(seed).normal(size=n_samples).astype(np.float32) / 10


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def prepared(model: HookedBeats, clips: Any, **options: Any) -> AudioInputs:
    return model.prepare(clips, sampling_rate=RATE, **options)


# -------------------------------------------------------------------------------- checkpoints


def checkpoint(**options: Any) -> dict[str, Any]:
    """What a published file holds, with the names of its classes."""
    published = build(**options)
    names = {label: f"/m/{label}" for label in range(TINY["predictor_class"])}
    return {"cfg": published.cfg, "model": published.state_dict(), "label_dict": names}


def saved(path: Path, held: dict[str, Any]) -> Path:
    torch.save(held, path / "beats.pt")
    return path / "beats.pt"


def test_released_checkpoints_have_a_place_for_every_weight() -> None:
    weights = {name: torch.zeros(shape) for name, shape in published_shapes().items()}
    model = HookedBeats.from_published({"cfg": PUBLISHED, "model": weights})
    assert (model.cfg.encoder.n_layers, model.cfg.encoder.d_model, len(model.cfg.labels)) == (
        12,
        768,
        527,
    )
    assert model.cfg.encoder.stream_multiplier == pytest.approx(24**0.25)


def test_a_file_gives_what_memory_gives(tmp_path: Path) -> None:
    held = checkpoint()
    from_file = HookedBeats.from_checkpoint(saved(tmp_path, held))
    assert from_file.cfg.labels[3] == "/m/3"
    torch.testing.assert_close(from_file(**batch()), model_of()(**batch()), rtol=0, atol=0)
    assert HookedBeats.from_checkpoint(tmp_path / "beats.pt", torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"layer_norm_first": True}, "layer_norm_first"),
        ({"gru_rel_pos": False}, "gru_rel_pos"),
        ({"relative_position_embedding": False}, "relative_position_embedding"),
        ({"activation_fn": "glu"}, "activation_fn"),
        ({"input_patch_size": -1}, "input_patch_size"),
        ({"encoder_layers": 2}, "unexpected weights: encoder.blocks.2"),
        ({"encoder_layers": 4}, "missing weights: encoder.blocks.3"),
        ({"embed_dim": 25}, "another shape"),
    ],
)
def test_shapes_that_are_not_implemented_or_do_not_fit_are_refused(
    change: dict[str, Any], problem: str
) -> None:
    held = checkpoint()
    with pytest.raises(LoadingError, match=problem):
        HookedBeats.from_published({**held, "cfg": {**held["cfg"], **change}})


def test_weights_that_are_unknown_or_contradict_each_other_are_refused() -> None:
    held = checkpoint()
    weights = held["model"]
    table = "encoder.layers.1.self_attn.relative_attention_bias.weight"
    for name, tensor, problem in (
        ("decoder.weight", torch.zeros(1), "without a place"),
        (table, weights[table] + 1, "all share one"),
    ):
        with pytest.raises(LoadingError, match=problem):
            HookedBeats.from_published({**held, "model": {**weights, name: tensor}})


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match="no such file"):
        HookedBeats.from_checkpoint(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(LoadingError, match="cannot be read"):
        HookedBeats.from_checkpoint(tmp_path / "text.pt")
    with pytest.raises(LoadingError, match="holds no cfg"):
        HookedBeats.from_checkpoint(saved(tmp_path, {"model": checkpoint()["model"]}))


# -------------------------------------------------------------------------------- features


def test_features_are_kaldis() -> None:
    """Against transformers' own filters and windows, which are held against torchaudio there."""
    wave = noise(1.3).astype(np.float64)
    filters = mel_filter_bank(
        257, 128, 20, 8000, RATE, None, "kaldi", triangularize_in_mel_space=True
    )
    levels = spectrogram(
        wave * 2**15,
        window_function(400, "povey", periodic=False),
        400,
        160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    )
    theirs = torch.from_numpy((levels - MEAN) / (2 * DEVIATION))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        ours = log_mel(torch.from_numpy(wave).to(dtype)[None])[0]
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def test_clips_are_padded_with_silence_before_features_are_made() -> None:
    model, long, short = model_of(), noise(1.0), noise(0.6, seed=1)
    made = prepared(model, [long, short])
    padded = np.pad(short, (0, len(long) - len(short)))
    torch.testing.assert_close(made.features[1:], prepared(model, padded).features)
    assert made.n_valid(0) == 98 and made.n_valid(1) == 59  # 163 samples to a frame: 9600 / 163
    assert prepared(model, long).feature_mask is None


# -------------------------------------------------------------------------------- time, frequency


def test_released_patches_lie_in_time_and_frequency() -> None:
    timeline = model_of().timeline(prepared(model_of(), noise(10.0)))
    seconds, hertz = timeline.seconds("encoder"), timeline.hertz("encoder")
    assert len(seconds) == 998 // 16 * 8
    assert seconds[:9].tolist() == pytest.approx([0.0875] * 8 + [0.2475])
    assert (hertz[1:8] > hertz[:7]).all() and hertz[8] == hertz[0]
    edges = timeline.hertz_range("encoder")
    assert edges[0, 0] == pytest.approx(20) and edges[7, 1] == pytest.approx(8000)
    assert timeline.duration_s() == pytest.approx(10, abs=0.025)


@pytest.mark.parametrize("hertz", [150, 900, 2200, 6000])
def test_a_tone_is_heard_by_the_patches_whose_band_holds_it(hertz: float) -> None:
    """In the features that each patch reads."""
    inputs = prepared(model_of(), tone(hertz))
    levels = inputs.features[0, :, :96].unflatten(0, (8, 16)).amax((1, 2))
    low, high = model_of().timeline(inputs).hertz_range("encoder")[int(levels.argmax())]
    assert low <= hertz <= high


def test_padding_is_left_out_by_the_count_of_patches() -> None:
    """59 of 98 frames count, two to a patch: 30 patches, three columns and the six lowest rows."""
    model = model_of()
    inputs = prepared(model, [noise(1.0), noise(0.6, seed=1)])
    valid = model.timeline(inputs)[1].valid("encoder")
    assert valid.tolist() == [True] * 30 + [False] * 18
    _, cache = model.run_with_cache(inputs, names_filter="encoder.blocks.0.attn.hook_pattern")
    pattern = cache["encoder.blocks.0.attn.hook_pattern"][1]
    assert pattern[..., 30:].abs().max() == 0 and pattern[..., :30].min() > 0
    track = model.encoder_track(48, inputs.n_valid(1), clip=0, start_s=0.0)
    assert torch.equal(track.valid, valid) and track.hertz is not None


# -------------------------------------------------------------------------------- classes


def test_loss_is_that_of_every_class_by_itself() -> None:
    held = checkpoint()
    model = HookedBeats.from_published(held)
    inputs = prepared(model, [noise(0.5), noise(0.5, 1)], text=["/m/3", [0, 5]])
    logits, loss = model(inputs, return_type="both")
    wanted = torch.zeros(2, 7)
    wanted[0, 3] = wanted[1, 0] = wanted[1, 5] = 1
    expected = F.binary_cross_entropy(logits.sigmoid(), wanted)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    labels = torch.tensor([[3, -100], [0, 5]])
    torch.testing.assert_close(model(**batch(), labels=labels), model(**batch()))
    assert model.generate(inputs) == [f"/m/{i}" for i in logits.argmax(-1).tolist()]


def test_what_cannot_be_heard_or_compared_is_refused() -> None:
    model, bare = model_of(), model_of(finetuned_model=False)
    with pytest.raises(InputError, match="a patch reads 2800"):
        prepared(model, noise(0.1))
    with pytest.raises(TokenError, match="no class"):
        prepared(model, noise(0.5), text="dog")
    with pytest.raises(InputError, match="takes no text"):
        prepared(bare, noise(0.5), text="dog")
    with pytest.raises(InputError, match="compares with labels"):
        model(prepared(model, noise(0.5)), return_type="loss")
    with pytest.raises(InputError, match="which is last"):
        model(source=torch.zeros(1, 9000), padding_mask=torch.arange(9000)[None] < 100)
    with pytest.raises(InputError, match="unknown input_values"):
        model(input_values=torch.zeros(1, 9000))
    with pytest.raises(InputError, match="128 mel bins"):
        model(AudioInputs(torch.zeros(1, 80, 100), torch.zeros(1, 0, dtype=torch.long), (1,)))
    with pytest.raises(LoadingError):
        HookedBeats.config_from_hf(object())
