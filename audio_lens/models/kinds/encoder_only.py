"""What encoders without a decoder write: CTC labels at every position, or the class of a clip."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import AudioConfig
from audio_lens.models.layers import needed
from audio_lens.models.mixins.vocabulary import TokenError

IGNORED = -100  # pads labels


@dataclass(frozen=True)
class CTCConfig:
    """How a CTC head is trained.

    Attributes:
        blank: the label that stands for none.
        reduction: over the batch: "sum", or "mean" of each clip's loss per label.
        zero_infinity: whether clips with more labels than frames count nothing.
    """

    blank: int
    reduction: Literal["sum", "mean"] = "mean"
    zero_infinity: bool = False

    def loss(
        self,
        logits: Float[Tensor, "b t v"],
        labels: Int[Tensor, "b n"],
        lengths: Int[Tensor, " b"],
    ) -> Float[Tensor, ""]:
        """The loss as transformers computes it: in float32; labels are padded with -100 or blank.

        ``lengths`` is how many frames of each clip hold audio.
        """
        is_label = (labels != IGNORED) & (labels != self.blank)
        log_probs = logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1)
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN knows fewer shapes
            return F.ctc_loss(
                log_probs,
                labels[is_label],
                lengths,
                is_label.sum(-1),
                blank=self.blank,
                reduction=self.reduction,
                zero_infinity=self.zero_infinity,
            )

    def best_path(
        self, logits: Float[Tensor, "b t v"], attended: Bool[Tensor, "b t"]
    ) -> list[list[int]]:
        """The labels of the likeliest path: the best of each frame, repeats and blanks left out."""
        paths = [
            best[held].tolist() for best, held in zip(logits.argmax(-1), attended, strict=True)
        ]
        return [[i for i, _ in itertools.groupby(path) if i != self.blank] for path in paths]


@dataclass(kw_only=True)
class EncoderOnlyConfig(AudioConfig):
    """Shape of a model whose encoder makes the output.

    Attributes:
        ctc: how its CTC head is trained, if it has one.
    """

    ctc: CTCConfig | None = None

    @property
    def need_ctc(self) -> CTCConfig:
        """How the CTC head is trained.

        Raises:
            InputError: where there is none.
        """
        return needed(self.ctc, f"{self.family} has no CTC head")


class PooledClassifier(nn.Module):
    """Logits of a clip's class: a projection of every frame, their mean, a linear map."""

    def __init__(self, d_model: int, d_projected: int, n_classes: int):
        super().__init__()
        self.project = nn.Linear(d_model, d_projected)
        self.unembed = nn.Linear(d_projected, n_classes)
        self.hook_projected, self.hook_pooled = HookPoint(), HookPoint()

    def forward(
        self, hidden: Float[Tensor, "b t d"], valid: Bool[Tensor, "b t"] | None
    ) -> Float[Tensor, "b v"]:
        projected = self.hook_projected(self.project(hidden))
        if valid is None:
            pooled = projected.mean(1)
        else:
            total = projected.masked_fill(~valid[..., None], 0).sum(1)
            pooled = total / valid.sum(1, keepdim=True)
        return self.unembed(self.hook_pooled(pooled))


class EncoderOutput(HookedAudioTransformer):
    """Loss, labels and transcription of a model whose encoder makes the output; mixed into it.

    The model has the head that ``cfg.output_kind`` names; where that is "ctc", ``cfg.ctc`` (of an
    `EncoderOnlyConfig`) says how it is trained.
    """

    cfg: EncoderOnlyConfig

    def loss(self, logits: Float[Tensor, "b *t v"], inputs: AudioInputs) -> Float[Tensor, ""]:
        """CTC loss, or cross-entropy of the class.

        Raises:
            InputError: inputs without labels.
        """
        if inputs.labels is None:
            raise InputError("the loss compares with labels: prepare(audio, text=...) gives them")
        if self.cfg.output_kind == "ctc":
            lengths = self.output_attended(inputs).sum(-1)
            return self.cfg.need_ctc.loss(logits, inputs.labels, lengths)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(precise, inputs.labels[:, 0])

    @torch.no_grad()
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        return_type: Literal["text", "tokens"] = "text",
        **mapping: Any,
    ) -> list[str] | Int[Tensor, "b n"]:
        """What the model makes of each clip: the transcript (CTC, best path), or the class.

        Args:
            inputs: `AudioInputs`, or the mapping a Hugging Face processor returns (which may also
                be given as keywords).
            return_type: "text" gives transcripts or names of classes; "tokens" label ids, padded
                with the blank, or ids of classes (``b 1``).

        Raises:
            InputError: a bare encoder, which writes nothing, or an unknown ``return_type``.
            TokenError: text of a CTC model without a tokenizer.
        """
        if return_type not in ("text", "tokens"):
            raise InputError(f"return_type must be text or tokens, got {return_type!r}")
        if self.cfg.output_kind is None:
            raise InputError("a bare encoder writes nothing: load a checkpoint with a head")
        is_text = return_type == "text"
        if is_text and self.cfg.output_kind == "ctc":
            self.need_tokenizer("text")
        batch = self.as_inputs(inputs, mapping)
        logits = self(batch)
        if self.cfg.output_kind == "classes":
            best = logits.argmax(-1)
            return [self.cfg.labels[i] for i in best.tolist()] if is_text else best[:, None]
        paths = self.cfg.need_ctc.best_path(logits, self.output_attended(batch))
        if is_text:
            return [self.tokenizer.decode(path, group_tokens=False) for path in paths]
        return padded_labels(paths, self.cfg.need_ctc.blank).to(logits.device)

    def labels_of(self, texts: Sequence[str | Sequence[int]]) -> Int[Tensor, "b n"]:
        """Labels that say each text (a transcript or the name of a class), or these ids.

        Raises:
            InputError: text for a bare encoder.
            TokenError: a transcript that the tokenizer cannot write, or no such class.
        """
        if self.cfg.output_kind is None:
            raise InputError("a bare encoder takes no text: load a checkpoint with a head")
        rows = [self._label_row(text) for text in texts]
        for label in itertools.chain(*rows):
            self._checked_token(label)
        return padded_labels(rows, IGNORED).to(self.device)

    def _label_row(self, text: str | Sequence[int]) -> list[int]:
        if not isinstance(text, str):
            return [int(label) for label in text]
        if self.cfg.output_kind == "classes":
            return [self.to_single_token(text)]
        tokenizer = self.need_tokenizer("a transcript")
        labels = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.unk_token_id in labels:
            raise TokenError(
                f"the tokenizer cannot write all of {text!r}: it knows "
                + " ".join(sorted(tokenizer.get_vocab())[:40])
            )
        return labels


def padded_labels(rows: Sequence[Sequence[int]], pad: int) -> Int[Tensor, "b n"]:
    """Rows of labels as one tensor, padded after the end."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)
