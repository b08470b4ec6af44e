"""AST: its patches in seconds and hertz, held against the real feature extractor, and its files."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.audio_utils import mel_filter_bank

import tiny
from audio_lens import (
    AudioError,
    AudioInputs,
    HookedAudioTransformer,
    InputError,
    LoadingError,
    TokenError,
)
from audio_lens.timeline import Band
from families.audio_spectrogram_transformer import N_MELS, PATCH, SMALL_PATCHES, batch, build

RATE = 16_000
RELEASED = {"num_mel_bins": 128, "max_length": 1024, "num_hidden_layers": 1}


@functools.cache
def model_of(**options: Any) -> HookedAudioTransformer:
    return HookedAudioTransformer.from_hf(build(**options))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    n_samples = round(seconds * RATE)
    return np.random.default_rng(seed).normal(size=n_samples).astype(np.float32) / 10


def prepared(model: HookedAudioTransformer, clips: Any, **options: Any) -> AudioInputs:
    return model.prepare(clips, sampling_rate=RATE, **options)


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


# -------------------------------------------------------------------------------- seconds, hertz


def test_released_grid() -> None:
    """12 rows of 101 patches, along time first, behind the class and distillation tokens."""
    model = model_of(**RELEASED)
    timeline = model.timeline(prepared(model, noise(1.0)))
    seconds, hertz = timeline.seconds("encoder"), timeline.hertz("encoder")
    assert seconds[:2].isnan().all() and hertz[:2].isnan().all()
    along = 0.1 * torch.arange(101, dtype=torch.float64) + 0.0875
    torch.testing.assert_close(seconds[2:].view(12, 101), along.expand(12, 101))
    rows = hertz[2:].view(12, 101)
    assert (rows == rows[:, :1]).all() and (rows[1:] > rows[:-1]).all()
    valid = timeline.valid("encoder")
    assert valid[:2].all()
    assert valid[2:].view(12, 101).sum(1).tolist() == [10] * 12  # 98 frames: the last begins at 90
    assert timeline.duration_s() == pytest.approx(0.995)


@pytest.mark.parametrize("options", [RELEASED, SMALL_PATCHES], ids=["released", "small"])
def test_patches_read_the_filters_of_the_feature_extractor(options: dict) -> None:
    """What a patch is said to read is what its mel filters pass, to a bin of the spectrum."""
    model = model_of(**options)
    grid, n_mels = model.cfg.grid, model.cfg.n_mels
    filters = mel_filter_bank(
        num_frequency_bins=257,
        num_mel_filters=n_mels,
        min_frequency=20,
        max_frequency=8000,
        sampling_rate=RATE,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    own = getattr(model.feature_extractor, "mel_filters", filters)  # none beside torchaudio
    np.testing.assert_array_equal(own, filters)
    timeline = model.timeline(batch(n_mels=n_mels, n_frames=grid.n_frames))
    ranges = timeline.hertz_range("encoder")[2 :: grid.n_columns]
    for row, (low, high) in enumerate(ranges.tolist()):
        first = row * grid.frequency_stride
        passed = RATE / 512 * filters[:, first : first + grid.patch].any(1).nonzero()[0]
        assert low - 1e-6 <= passed[0] <= low + RATE / 512
        assert high - RATE / 512 <= passed[-1] <= high + 1e-6


@settings(max_examples=20)
@given(row=st.integers(0, 11), column=st.integers(0, 8))
def test_a_tone_burst_is_loudest_in_its_own_patch(row: int, column: int) -> None:
    model = model_of(**RELEASED)
    timeline = model.timeline(prepared(model, noise(1.0)))
    place = 2 + row * 101 + column
    centre_s = float(timeline.seconds("encoder")[place])
    seconds = np.arange(RATE) / RATE
    burst = tone(float(timeline.hertz("encoder")[place])) * (np.abs(seconds - centre_s) < 0.04)
    log_mel = prepared(model, burst.astype(np.float32)).features[0]
    power = (2 * model.feature_extractor.std * log_mel).exp()  # but for a factor
    patches = power.unfold(0, 16, 10).unfold(1, 16, 10).sum((-1, -2)).flatten()
    assert int(patches.argmax()) == place - 2


def test_rows_of_patches_as_bands() -> None:
    timeline = model_of().timeline(batch())
    hertz, bands = timeline.hertz("encoder"), timeline.bands("encoder")
    assert len(bands) == 4
    for low, high in itertools.pairwise(bands):
        assert low.high_hz == high.low_hz
    track = timeline.rows[0].track("encoder", 0)
    found = torch.stack([track.within(band) for band in bands])
    assert (found.sum(0) == hertz.isfinite()).all()
    assert all(len(hertz[row].unique()) == 1 for row in found)


def test_one_row_is_one_band() -> None:
    model = model_of(patch_size=N_MELS, time_stride=16)
    [band] = model.timeline(batch()).bands("encoder")
    assert (band.low_hz, band.high_hz) == (pytest.approx(20), pytest.approx(8000))


def test_positions_in_time_are_not_adjacent() -> None:
    model = model_of()
    timeline, n_columns = model.timeline(batch()), model.cfg.grid.n_columns
    found = timeline.positions("encoder", 0.1, 0.2)
    columns = (found[: len(found) // 4] - 2).tolist()
    assert found.tolist() == [2 + row * n_columns + c for row in range(4) for c in columns]


def test_other_families_have_no_frequency() -> None:
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf("whisper"))
    timeline = model.timeline(tiny.hf_inputs("whisper"))
    assert not timeline.has_frequency("encoder")
    with pytest.raises(ValueError, match="whole spectrum"):
        timeline.hertz("encoder")


@pytest.mark.parametrize("bad", [(100, 100), (200, 100), (0, np.inf), 3, (1,), "low"])
def test_bands_that_are_none(bad: Any) -> None:
    with pytest.raises(ValueError, match="band"):
        Band.of(bad)


# -------------------------------------------------------------------------------- inputs


def test_prepare_gives_what_the_feature_extractor_gives() -> None:
    model, clips = model_of(), [noise(0.7), noise(1.9, seed=1)]
    inputs = prepared(model, clips, text=["LABEL_3", "LABEL_0"])
    theirs = model.feature_extractor(clips, sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(model(inputs), model(**theirs), rtol=0, atol=0)
    assert inputs.labels.tolist() == [[3], [0]]
    padding = theirs["input_values"][0, -1, 0]
    is_padding = (theirs["input_values"] == padding).all(-1)
    assert torch.equal(inputs.feature_mask, ~is_padding)
    assert inputs[1:].labels.tolist() == [[0]]


def test_padding_is_heard() -> None:
    """As in transformers: so equal clips in one batch give what they give alone."""
    model = model_of()
    together = model(prepared(model, [noise(0.7), noise(1.9)]))
    torch.testing.assert_close(together[:1], model(prepared(model, noise(0.7))))


def test_loss_is_that_of_hugging_face() -> None:
    hf, labels = build(), torch.tensor([4, 1])
    model = HookedAudioTransformer.from_hf(hf)
    ours = model({**batch(), "labels": labels}, return_type="loss")
    torch.testing.assert_close(ours, hf(**batch(), labels=labels).loss)
    with pytest.raises(InputError, match="labels"):
        model(batch(), return_type="loss")
    for several in (torch.zeros(2), torch.zeros(2, 7, dtype=torch.long)):
        with pytest.raises(InputError, match="one class"):
            model({**batch(), "labels": several})


@pytest.mark.parametrize("options", [{"num_labels": 1}, {"problem_type": "regression"}])
def test_no_other_loss_is_taken_for_that_of_one_class(options: dict) -> None:
    inputs = {**batch(), "labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(InputError, match="from the logits"):
        model_of(**options)(inputs, return_type="loss")


def test_class_by_name() -> None:
    model = model_of()
    inputs = prepared(model, noise(1.0))
    [name] = model.generate(inputs)
    assert model.cfg.labels.index(name) == int(model(inputs).argmax())
    with pytest.raises(TokenError, match="LABEL_"):
        prepared(model, noise(1.0), text="dog")


def test_clips_it_cannot_take() -> None:
    with pytest.raises(InputError, match="399 samples"):
        prepared(model_of(), noise(399 / RATE))
    with pytest.raises(InputError, match="no audio"):
        prepared(model_of(), [])
    with pytest.raises(AudioError, match=r"2\.13 s"):
        prepared(model_of(), noise(2.2))
    with pytest.raises(InputError, match=f"{N_MELS} mel bins"):
        model_of()(batch(n_frames=100))
    with pytest.raises(InputError, match="attention_mask"):
        model_of()({**batch(), "attention_mask": torch.ones(2, 10)})


def test_bare_encoder_puts_out_hidden_states() -> None:
    hf = build(bare=True)
    model = HookedAudioTransformer.from_hf(hf)
    assert "hook_logits" not in model.hook_dict
    torch.testing.assert_close(model(batch()), hf(**batch()).last_hidden_state)


def test_pooled_hooks_move_the_answer() -> None:
    model = model_of()
    silent = model.run_with_hooks(
        batch(), fwd_hooks=[("classifier.hook_pooled", lambda x, hook: torch.zeros_like(x))]
    )
    assert silent.shape == (2, 7)
    assert torch.equal(silent[0], silent[1])


# -------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("bare", [True, False])
def test_names_on_disk_are_not_those_in_memory(tmp_path: Path, bare: bool) -> None:
    """`save_pretrained` writes the names of older versions; files with today's load as well."""
    hf = build(bare=bare)
    hf.save_pretrained(tmp_path)
    expected = HookedAudioTransformer.from_hf(hf)(batch())
    on_disk = load_file(tmp_path / "model.safetensors")
    assert any("attention.attention.query" in key for key in on_disk)
    assert torch.equal(HookedAudioTransformer.from_pretrained(tmp_path)(batch()), expected)
    save_file(hf.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(HookedAudioTransformer.from_pretrained(tmp_path)(batch()), expected)


def test_feature_extractor_of_the_checkpoint(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    options = {"num_mel_bins": N_MELS, "max_length": 213, "mean": 0.0, "std": 0.5}
    transformers.ASTFeatureExtractor(**options).save_pretrained(tmp_path)
    model = HookedAudioTransformer.from_pretrained(tmp_path)
    assert model.feature_extractor.mean == 0.0
    assert prepared(model, noise(1.0)).features[0, :, -1].abs().max() == 0  # padding, unnormalised


def test_a_feature_extractor_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LoadingError, match="mel bins"):
        HookedAudioTransformer.from_hf(build(), transformers.ASTFeatureExtractor())
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=N_MELS)
    with pytest.raises(InputError, match="1024"):
        prepared(HookedAudioTransformer.from_hf(build(), extractor), noise(1.0))


def test_unknown_shapes_are_refused() -> None:
    for name, value in {"patch_size": [PATCH, PATCH], "num_labels": 0}.items():
        config = build().config
        setattr(config, name, value)
        with pytest.raises(LoadingError, match=r"patch_size|no classes"):
            type(model_of()).config_from_hf(config)


def test_a_feature_of_tomorrow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.ASTConfig, "__init__", _with_gate(transformers.ASTConfig))
    assert HookedAudioTransformer.from_hf(build())
    with pytest.raises(LoadingError, match="use_gate=True"):
        HookedAudioTransformer.from_hf(build(use_gate=True))


def _with_gate(config: type) -> Any:
    """Its constructor, with a switch that today's does not have."""
    make = config.__init__

    def init(self: Any, use_gate: bool = False, **options: Any) -> None:
        make(self, **options)
        self.use_gate = use_gate

    return init
