"""WavLM: speech encoders with a gated position bias; patterns are compared by their head mean."""

from __future__ import annotations

from unittest import mock

import torch.nn.functional as F
from torch import Tensor, nn

from audio_lens import AudioInputs
from families.wav2vec2 import CLASSES, CTC, PRE_NORM, family, reference

_ATTEND = F.multi_head_attention_forward


def fused(*args: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
    """Attention as torch computes it where nobody wants the patterns."""
    return _ATTEND(*args, **{**options, "need_weights": False})


def reference_of(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names; WavLM itself never fuses attention, so torch is told to."""
    if hf.config._attn_implementation == "eager":
        return reference(hf, batch)
    with mock.patch.object(F, "multi_head_attention_forward", fused):
        return reference(hf, batch)


def head_mean(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    """Everything, of patterns their mean over heads: Hugging Face gives no more."""
    return tensor.mean(1) if name.endswith("hook_pattern") else tensor


_FEW_BUCKETS = {"num_buckets": 16, "max_bucket_distance": 12}
WAVLM = family(
    "wavlm",
    "WavLM",
    {
        "large: pre-norm": PRE_NORM,
        "classes": CLASSES,
        "all distances near": {"num_buckets": 320, "max_bucket_distance": 800},
    },
    _FEW_BUCKETS,
    reference=reference_of,
    mask_of=head_mean,
)
WAVLM_CTC = family(
    "wavlm_ctc",
    "WavLM",
    {},
    {**PRE_NORM, **CTC, **_FEW_BUCKETS},
    reference=reference_of,
    mask_of=head_mean,
)
