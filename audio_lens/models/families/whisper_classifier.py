"""Whisper's encoder with a head for the class of a clip, in place of the text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.audio import Rates
from audio_lens.inputs import AudioInputs, InputError, texts_per_clip
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import LoadingError, check_switches
from audio_lens.models.families.whisper import (
    FRAME_S,
    UNDERSTOOD,
    HookedWhisper,
    WhisperEncoder,
    encoder_config,
    encoder_weight_names,
)
from audio_lens.models.kinds.ear import Ear
from audio_lens.models.kinds.encoder_only import (
    EncoderOnlyConfig,
    EncoderOutput,
    PooledClassifier,
)
from audio_lens.timeline import Row, Timeline


@dataclass(kw_only=True)
class WhisperClassifierConfig(EncoderOnlyConfig):
    """Shape of a Whisper encoder with a classifier.

    Attributes:
        d_classifier: width in which the classifier pools.
    """

    d_classifier: int


class HookedWhisperClassifier(EncoderOutput, Ear, HookedAudioTransformer, beside=HookedWhisper):
    """`WhisperForAudioClassification` with every activation hooked.

    The head takes the mean over all positions, those of the padding up to 30 s included.
    """

    cfg: WhisperClassifierConfig
    encoder: WhisperEncoder
    lends_encoder = True
    hf_class = "WhisperForAudioClassification"
    weight_names: ClassVar = {
        **encoder_weight_names("encoder"),
        "projector": "head.project",
        "classifier": "head.unembed",
    }

    def __init__(self, cfg: WhisperClassifierConfig):
        super().__init__(cfg)
        encoder = cfg.need_encoder
        self.encoder = WhisperEncoder(encoder, cfg.need_n_mels)
        self.head = PooledClassifier(encoder.d_model, cfg.d_classifier, encoder.need_d_vocab)
        self.setup()

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> WhisperClassifierConfig:
        """The shape of a `WhisperConfig` with classes.

        Raises:
            LoadingError: a weighted sum of layers, or another switch that is not implemented.
        """
        check_switches(hf_config, UNDERSTOOD.split())
        if hf_config.use_weighted_layer_sum:
            raise LoadingError(
                f"{cls.hf_class} with use_weighted_layer_sum=True is not implemented"
            )
        encoder = encoder_config(hf_config, hf_config.name_or_path)
        return WhisperClassifierConfig(
            family="whisper",
            model_name=hf_config.name_or_path,
            encoder=replace(encoder, d_vocab=hf_config.num_labels),
            decoder=None,
            n_mels=hf_config.num_mel_bins,
            n_frames=2 * hf_config.max_source_positions,
            output_kind="classes",
            labels=tuple(hf_config.id2label[label] for label in range(hf_config.num_labels)),
            d_classifier=hf_config.classifier_proj_size,
        )

    def read_out(self, hidden: Float[Tensor, "b t d"], inputs: AudioInputs) -> Tensor:
        """Logits of the classes, ``b v``."""
        return self.head(hidden, None)

    def frame_count(self, n_valid: int) -> int:
        """Pairs of mel frames, the last one begun included."""
        return (n_valid - 1) // 2 + 1

    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        """Frame i is centred at 0.02 i seconds."""
        return FRAME_S * torch.arange(count, dtype=torch.float64)

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Encoder frame i is centred at 0.02 i seconds."""
        inputs = self.as_inputs(inputs)
        length = self.cfg.need_encoder.need_n_ctx
        lengths = [inputs.n_valid(clip) for clip in range(len(inputs))]
        return Timeline(
            [
                Row({"encoder": [self.encoder_track(length, n, 0, 0)]}, [n * self.cfg.step_s])
                for n in lengths
            ]
        )

    # ---------------------------------------------------------------- inputs

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what `WhisperFeatureExtractor` returns, and ``labels``."""
        given = self._mapping_tensors(mapping, ("input_features", "attention_mask", "labels"))
        features, labels = given["input_features"], given.get("labels")
        self.check_features(features)
        if labels is not None:
            if labels.is_floating_point() or labels.numel() != len(features):
                raise InputError("labels must be the id of one class for every clip")
            labels = labels.reshape(-1, 1).long()
            self.check_tokens(labels)
        frames = given.get("attention_mask")
        return self._inputs(features, None if frames is None else frames.bool(), labels)

    def _inputs(
        self,
        features: Float[Tensor, "b mels frames"],
        frames: Bool[Tensor, "b frames"] | None,
        labels: Tensor | None,
        **made: Any,
    ) -> AudioInputs:
        return AudioInputs(
            features=features,
            tokens=torch.zeros(len(features), 0, dtype=torch.long, device=features.device),
            clips_per_row=(1,) * len(features),
            feature_mask=frames,
            labels=labels,
            **made,
        )

    def prepare(self, audio: Any, text: Any = None, sampling_rate: Rates = None) -> AudioInputs:
        """Inputs from clips, one per prompt.

        Args:
            audio: a path, array, tensor or mapping (see `audio.load`), or a list of them (a
                batch is a list, not an array).
            text: what the loss compares with: the class of each clip, by name or as ``[id]``.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.

        Raises:
            AudioError: unusable audio, or a clip that is too long.
            TokenError: no such class.
        """
        clips = self.load_clips(audio, sampling_rate)
        texts = texts_per_clip(text, len(clips))
        made = self.extract_features(clips)
        return self._inputs(
            made["features"],
            made["mask"],
            None if text is None else self.labels_of(texts),
            audio=clips,
            text=None if text is None else texts,
            sampling_rate=self.cfg.sampling_rate,
            remake=self.prepare,
        )
