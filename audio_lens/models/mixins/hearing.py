"""Audio, and what processors make of it, as inputs of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens import audio as audio_io
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.mixins.features import Features
from audio_lens.models.mixins.running import Running


class Hearing(Features, Running):
    """How a `HookedAudioTransformer` takes what it hears; mixed into it.

    Attributes:
        mixes_lengths: why a longer clip in the batch changes what a clip gives, for people; empty
            where it does not.
    """

    features_key: ClassVar[str] = "input_features"  # of a processor's mapping
    mixes_lengths: ClassVar[str] = ""
    _has_told_of_lengths = False

    @property
    def decoder_needs_encoder(self) -> bool:
        """Whether decoder blocks read the encoder (cross-attention)."""
        return self.cfg.decoder is not None and hasattr(self.decoder.blocks[0], "cross_attn")

    def encode(
        self,
        inputs: AudioInputs,
        resid: Float[Tensor, "segments frames d"] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor | None:
        """What the decoder receives of the audio; with ``stop``, the residual entering that block.

        ``resid`` is the residual stream entering block ``start``; None starts from the features.
        None without an encoder, and of prompts without audio. Prompts about the same clips are
        heard once, where no hook looks at what comes before the decoder.

        Raises:
            InputError: no audio, where something needs it.
        """
        if self.cfg.encoder is None:
            return None
        is_whole = resid is None and start == 0 and stop is None
        if not len(inputs.features):
            if is_whole and self.reads_text_alone:
                return None
            raise InputError("these inputs hold no audio, so there is nothing for the encoder")
        if not (is_whole and len(inputs) > 1 and self._hears_unseen()):
            with self.running(inputs):
                return self.hear(inputs, resid, start, stop)
        distinct, segments = inputs.heard_once()
        with self.running(distinct):
            heard = self.hear(distinct, None, 0, None)
        return heard if heard is None or distinct is inputs else heard[segments]

    @property
    def reads_text_alone(self) -> bool:
        """Whether prompts need no audio: language models, which read it among their tokens."""
        return self.cfg.decoder is not None and not self.decoder_needs_encoder

    def _hears_unseen(self) -> bool:
        """Whether nobody looks at what comes before the decoder, and equal clips give the same."""
        behind = ("decoder.", "hook_", *(f"{name}." for name in self.cfg.further_decoders))
        return not self.training and not any(
            point.has_hooks()
            for name, point in self.hook_dict.items()
            if not name.startswith(behind)
        )

    def as_inputs(
        self,
        inputs: object,
        mapping: Mapping[str, Any] | None = None,
    ) -> AudioInputs:
        """`AudioInputs` from whatever stands for them, with keywords beside it (``mapping``).

        Raises:
            InputError: if it is neither `AudioInputs` nor a mapping of a Hugging Face processor.
        """
        if isinstance(inputs, AudioInputs):
            if mapping:
                raise InputError(f"unknown arguments beside the inputs: {', '.join(mapping)}")
            return inputs
        if inputs is not None and not isinstance(inputs, Mapping):
            raise InputError(
                f"inputs must be AudioInputs (model.prepare) or a processor's mapping, got "
                f"{type(inputs).__name__}"
            )
        made = self.inputs_from_mapping({**(inputs or {}), **(mapping or {})})
        if self.mixes_lengths and not self._has_told_of_lengths:
            self.tell_of_lengths(made.clip_lengths())
        return made

    def tell_of_lengths(self, lengths: Sequence[int]) -> None:
        """Warn, once for this model, if clips of these lengths change each other's answers."""
        if len(set(lengths)) < 2 or not self.mixes_lengths or self._has_told_of_lengths:
            return
        self._has_told_of_lengths = True
        warnings.warn(
            f"clips of unequal length in one batch change each other's answers in "
            f"{self.cfg.family}: {self.mixes_lengths}. Cut or pad them to equal length, or use "
            "batches of one clip (said once; model.mixes_lengths holds the reason)",
            stacklevel=3,
        )

    def _mapping_tensors(
        self, mapping: Mapping[str, Any], known: Sequence[str], needs_audio: bool = True
    ) -> dict[str, Tensor]:
        """What a processor's mapping holds of the known entries, on the model's device.

        The features are among it; unless audio is needed, those of no clip where it has none.

        Raises:
            InputError: for other entries, and for features that are missing or not finite.
        """
        unknown = [key for key in mapping if key not in known]
        if unknown:
            raise InputError(
                f"{self.cfg.family} takes {', '.join(known)}; got unknown {', '.join(unknown)}"
            )
        if mapping.get(self.features_key) is None:
            if needs_audio:
                raise InputError(f"inputs hold no {self.features_key}: pass audio")
            mapping = {**mapping, self.features_key: self.no_features()}
        device = self.device
        given = {
            key: _tensor(key, mapping[key]).to(device)
            for key in known
            if mapping.get(key) is not None
        }
        if not given[self.features_key].isfinite().all():
            raise InputError(f"{self.features_key} hold NaN or infinite values")
        return given

    @staticmethod
    def _positions_of(tokens: Tensor, given: Tensor | None) -> Int[Tensor, "b t"] | None:
        """The positions a mapping gives, one per token."""
        if given is not None and given.shape[-1] != tokens.shape[1]:
            raise InputError(f"{given.shape[-1]} positions were given for {tokens.shape[1]} tokens")
        return None if given is None else given.expand(tokens.shape)

    def no_features(self) -> Float[Tensor, "0 mels frames"]:
        """The features of no clip."""
        cfg = self.cfg
        return torch.zeros(0, cfg.n_mels or 1, cfg.n_frames or 1, device=self.device)

    def check_features(self, features: Tensor) -> None:
        """Raise unless the features are the log-mel frames this model takes.

        Raises:
            InputError: naming both shapes.
        """
        cfg = self.cfg
        if features.ndim != 3 or tuple(features.shape[1:]) != (cfg.n_mels, cfg.n_frames):
            raise InputError(
                f"features must be (clips, {cfg.n_mels} mel bins, {cfg.n_frames} frames), padded "
                f"to {cfg.segment_s:g} s; got {tuple(features.shape)}"
            )

    def load_audio(self, source: Any, sampling_rate: int | None) -> Float[Any, " samples"]:
        """One clip, mono at the model's rate, checked to fit the model.

        Raises:
            AudioError: if it cannot be read or is longer than the model takes.
        """
        if isinstance(source, list) and audio_io.is_clip(source):
            source = {"array": source}  # a list of samples
        longest_s = self.cfg.max_audio_s
        samples = audio_io.load(source, self.cfg.sampling_rate, sampling_rate, longest_s)
        if len(samples) / self.cfg.sampling_rate > longest_s:
            raise audio_io.too_long("the clip", len(samples) / self.cfg.sampling_rate, longest_s)
        return samples

    def load_clips(self, audio: Any, sampling_rate: audio_io.Rates) -> list[Float[Any, " _"]]:
        """One clip, or a list of them, each as `load_audio` gives it; rates may differ by clip.

        A list of numbers is one clip.

        Raises:
            AudioError: as `load_audio`, or if there are not as many rates as clips.
            InputError: if there is none.
        """
        sources = audio_io.sources_of(audio)
        if not sources:
            raise InputError("no audio: pass at least one clip")
        rated = audio_io.with_rates(sources, sampling_rate)
        return [self.load_audio(source, rate) for source, rate in rated]


def _tensor(key: str, given: Any) -> Tensor:
    """What a mapping holds, as a tensor.

    Raises:
        InputError: if it can be none.
    """
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{key} cannot be made a tensor: {error}") from error
