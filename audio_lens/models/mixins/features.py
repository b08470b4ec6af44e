"""Input features of waveforms in torch, so that gradients pass from the model to the sound.

Feature extractors of transformers take arrays. Here is what they compute, by their kind: the
log-mel frames of Whisper, waveforms as they are or normalised, and the filter banks of Kaldi.
Families that make their features in torch themselves need none of these.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.audio_utils import mel_filter_bank

from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.mixins.host import Host

Clips = Sequence[Any]  # waveforms, all arrays or all tensors
PREEMPHASIS = 0.97
KALDI_FFT, KALDI_WINDOW, KALDI_HOP = 512, 400, 160  # samples at 16 kHz
_TINY_VARIANCE = 1e-7  # added to that of waveforms before they are divided


class Features(Host):
    """How a `HookedAudioTransformer` makes features of sound; mixed into it.

    Attributes:
        no_gradient_because: why no gradient reaches the sound, for people; empty where it does.
    """

    extracted_mask: ClassVar[str] = "attention_mask"  # as the feature extractor calls it
    no_gradient_because: ClassVar[str] = ""

    def features(
        self, waveform: Float[Tensor, "*b samples"] | Sequence[Float[Tensor, " _"]]
    ) -> Float[Tensor, " segments *shape"]:
        """Features of waveforms, equal to those of `prepare`; gradients pass through them.

        Whoever runs the model on them says so by `with_waveform`, or gives them to inputs of the
        same layout: ``model(inputs.with_features(model.features(waveform)))``. Models with further
        encoders hear what `with_waveform` makes for these as well.

        Args:
            waveform: mono sound at the model's rate (``cfg.sampling_rate``) within [-1, 1]:
                ``samples``, ``b samples`` for clips of equal length, or a list of clips; in the
                order of ``inputs.audio``. It may require gradients, in float32 or float64.

        Returns:
            What `AudioInputs.features` holds, padded as `prepare` pads it, in the precision of the
            waveform: one entry per clip, or per window of it where the model cuts clips.

        Raises:
            InputError: what is no waveform, or a model that no gradient reaches: it hears codes,
                reads text, or has a feature extractor that is not known here.
            AudioError: NaN, samples beyond full scale, a clip that is too short or too long.
        """
        return self.features_of(self._waves(waveform))

    def with_waveform(
        self,
        inputs: AudioInputs,
        waveform: Float[Tensor, "*b samples"] | Sequence[Float[Tensor, " _"]],
    ) -> AudioInputs:
        """The same prompts about other sound, through which gradients pass.

        ``model(model.with_waveform(inputs, waveform))`` is the run of these waveforms, one per clip
        of the inputs and as long. Choices that the inputs hold fixed stay.

        Raises:
            InputError, AudioError: as `features`, or clips that do not give the shapes of these
                inputs.
        """
        waves = self._waves(waveform)
        if len(waves) != sum(inputs.clips_per_row):
            raise InputError(f"{len(waves)} waveforms for {sum(inputs.clips_per_row)} clips")
        made = inputs.with_features(self.features_of(waves), self.heard_beside(list(waves)))
        made.audio = [wave.detach().cpu().float().numpy() for wave in waves]
        made.remake = inputs.remake
        return made

    def _waves(self, waveform: Any) -> list[Float[Tensor, " _"]]:
        """The clips of what is given; checked as those of `prepare` are."""
        if self.no_gradient_because:
            raise InputError(
                f"{self.cfg.family} has no features that gradients reach: "
                f"{self.no_gradient_because}"
            )
        alone = isinstance(waveform, Tensor) and waveform.ndim == 1
        waves = [waveform] if alone else list(waveform)
        if not waves or any(not isinstance(wave, Tensor) or wave.ndim != 1 for wave in waves):
            raise InputError("waveforms are a tensor (samples), (b samples), or a list of tensors")
        if any(not wave.is_floating_point() for wave in waves):
            raise InputError(f"waveforms are floating-point, got {waves[0].dtype}")
        for wave in waves:
            self._checked_clip(wave.detach().cpu(), self.cfg.sampling_rate)
        return [wave.to(torch.promote_types(wave.dtype, torch.float32)) for wave in waves]

    # ---------------------------------------------------------------- what families refine

    def _checked_clip(self, source: Any, sampling_rate: int | None) -> Float[Any, " samples"]:
        """One clip, mono at the model's rate, checked to fit the model."""
        return self.load_audio(source, sampling_rate)

    def features_of(self, clips: Clips) -> Float[Tensor, " segments *shape"]:
        """The features of clips as inputs hold them."""
        return self.extract_features(list(clips))["features"]

    def heard_beside(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """What goes beside the features of these clips: nothing, here."""
        return {}

    def extract_features(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """Log-mel features padded to the model's length, and the mask of frames with audio."""
        n_samples = self.cfg.need_n_frames * self.cfg.hop
        made = self.extracted(clips, padding="max_length", max_length=n_samples, truncation=False)
        return {
            "features": made["input_features"].to(self.device),
            "mask": made[self.extracted_mask].bool().to(self.device),
        }

    def extracted(self, clips: Clips, **options: Any) -> Mapping[str, Tensor]:
        """What the feature extractor makes of clips; of tensors so that gradients pass.

        Raises:
            InputError: tensors, for an extractor that is not known here.
        """
        if not isinstance(clips[0], Tensor):
            return self.feature_extractor(
                clips,
                sampling_rate=self.cfg.sampling_rate,
                return_attention_mask=True,
                return_tensors="pt",
                **options,
            )
        kind = type(self.feature_extractor).__name__
        if kind not in _KINDS:
            raise InputError(f"no gradient passes through a {kind}: known are {', '.join(_KINDS)}")
        return _KINDS[kind](clips, self.feature_extractor, **options)


# -------------------------------------------------------------------------------- kinds


def whisper_frames(
    clips: Sequence[Float[Tensor, " _"]],
    extractor: Any,
    padding: bool | str = True,
    max_length: int = 0,
    pad_to_multiple_of: int = 1,
    truncation: bool = False,
) -> dict[str, Tensor]:
    """Log-mel frames of clips padded with silence, and the mask of frames with audio.

    Raises:
        InputError: an extractor that adds noise, or clips to be cut.
    """
    if extractor.dither or truncation:
        raise InputError("features that noise is added to, or whose clips are cut, are not made")
    longest = max(map(len, clips))
    width = max(longest, max_length) if padding == "max_length" else longest
    width += -width % pad_to_multiple_of
    waves = torch.stack([F.pad(clip, (0, width - len(clip))) for clip in clips])
    heard = heard_of([len(clip) for clip in clips], width)
    mask = heard[:, :: extractor.hop_length][:, : width // extractor.hop_length]
    return {"input_features": log_mel(waves, extractor), "attention_mask": mask}


def log_mel(waves: Float[Tensor, "b samples"], extractor: Any) -> Float[Tensor, "b mels frames"]:
    """Log power in mel bands, 80 dB below the loudest of the clip at least, scaled."""
    window = torch.hann_window(extractor.n_fft).to(waves)
    spectrum = torch.stft(
        waves, extractor.n_fft, extractor.hop_length, window=window, return_complex=True
    )[..., :-1]
    power = spectrum.real.square() + spectrum.imag.square()
    levels = (torch.from_numpy(extractor.mel_filters).to(waves).T @ power).clamp(min=1e-10).log10()
    return (levels.maximum(levels.amax((1, 2), keepdim=True) - 8) + 4) / 4


def moss_frames(
    clips: Sequence[Float[Tensor, " _"]], extractor: Any, **padding: Any
) -> dict[str, Tensor]:
    """As Whisper's, always of whole windows; the mask has another name."""
    window = {"padding": "max_length", "max_length": extractor.n_samples}
    made = whisper_frames(clips, extractor, **{**padding, **window})
    return {"input_features_mask": made.pop("attention_mask"), **made}


def qwen_frames(
    clips: Sequence[Float[Tensor, " _"]], extractor: Any, **padding: Any
) -> dict[str, Tensor]:
    """As Whisper's, of clips filled up to half a second; the frames are filled up to chunks."""
    made = whisper_frames([filled(c, extractor.min_length) for c in clips], extractor, **padding)
    room = (0, -made["attention_mask"].shape[1] % (2 * extractor.n_window))
    return {name: F.pad(x, room) for name, x in made.items()}


def waveforms(
    clips: Sequence[Float[Tensor, " _"]], extractor: Any, padding: bool = True
) -> dict[str, Tensor]:
    """Clips, each with mean 0 and variance 1 if the extractor says so, padded to the longest."""
    if extractor.do_normalize:
        clips = [(c - c.mean()) / (c.var(correction=0) + _TINY_VARIANCE).sqrt() for c in clips]
    padded = pad_sequence(
        list(clips), batch_first=True, padding_value=float(extractor.padding_value)
    )
    heard = heard_of([len(clip) for clip in clips], padded.shape[1])
    return {"input_values": padded, "attention_mask": heard}


def ast_frames(clips: Sequence[Float[Tensor, " _"]], extractor: Any) -> dict[str, Tensor]:
    """Kaldi's filter banks, filled up with zeros or cut to a fixed length, then normalised."""
    rows = []
    for clip in clips:
        window = torch.hann_window(KALDI_WINDOW, periodic=False, dtype=torch.float64).to(clip)
        frames = filter_bank(clip, window, extractor.num_mel_bins)[: extractor.max_length]
        rows.append(F.pad(frames, (0, 0, 0, extractor.max_length - len(frames))))
    made = torch.stack(rows)
    if extractor.do_normalize:
        made = (made - extractor.mean) / (2 * extractor.std)
    return {"input_values": made}


_KINDS: dict[str, Callable[..., dict[str, Tensor]]] = {
    kind.__name__: make
    for kind, make in (
        (transformers.WhisperFeatureExtractor, whisper_frames),
        (transformers.MossTranscribeDiarizeFeatureExtractor, moss_frames),
        (transformers.Qwen3ASRFeatureExtractor, qwen_frames),
        (transformers.Wav2Vec2FeatureExtractor, waveforms),
        (transformers.ASTFeatureExtractor, ast_frames),
    )
}


# -------------------------------------------------------------------------------- pieces


def filter_bank(
    waves: Float[Tensor, "*b samples"], window: Float[Tensor, " width"], n_mels: int
) -> Float[Tensor, "*b frames mels"]:
    """Kaldi's log-mel filter banks at 16 kHz: a frame reads 400 samples from every 160th on."""
    frames = waves.unfold(-1, KALDI_WINDOW, KALDI_HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    spectrum = torch.fft.rfft((frames - PREEMPHASIS * before) * window, n=KALDI_FFT)
    power = spectrum.real.square() + spectrum.imag.square()
    bands = power @ kaldi_filters(n_mels).to(waves)
    return bands.clamp(min=torch.finfo(torch.float32).eps).log()


@functools.cache
def kaldi_filters(n_mels: int) -> Float[Tensor, "bins mels"]:
    """Triangles on Kaldi's mel scale; the lowest may be narrower than a bin, and hold none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filters = mel_filter_bank(
            KALDI_FFT // 2 + 1,
            n_mels,
            20.0,
            8000.0,
            16_000,
            None,
            "kaldi",
            triangularize_in_mel_space=True,
        )
    return torch.from_numpy(filters)


def filled(clip: Float[Any, " _"], n_samples: int) -> Float[Any, " _"]:
    """A clip with silence behind it, up to so many samples at least."""
    room = (0, max(0, n_samples - len(clip)))
    return F.pad(clip, room) if isinstance(clip, Tensor) else np.pad(clip, room)


def heard_of(lengths: Sequence[int], width: int) -> Bool[Tensor, "b steps"]:
    """Which of so many steps hold audio, in rows that begin with so many."""
    return torch.arange(width) < torch.tensor(list(lengths))[:, None]
