"""Music Flamingo: Audio Flamingo 3 with a rotary time embedding between encoder and connector."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hypothesis import assume
from torch import Tensor, nn

from families import audio_llms
from families.audio_llms import BATCHES, config, windowed_batch, windowed_family
from families.audioflamingo3 import EAR, tokens_of
from families.base import AUDIO_TOKEN, TINY_LANGUAGE_MODEL, ready

BEGIN, FINISH = 91, 92
LANGUAGE = {"model_type": "qwen2", **TINY_LANGUAGE_MODEL}


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.MusicFlamingoForConditionalGeneration:
    tokens = {
        "audio_token_id": AUDIO_TOKEN,
        "audio_bos_token_id": BEGIN,
        "audio_eos_token_id": FINISH,
    }
    options = {**tokens, **overrides}
    hf_config = config(transformers.MusicFlamingoConfig, EAR, LANGUAGE, options)
    model = transformers.MusicFlamingoForConditionalGeneration(hf_config)
    model = ready(model, seed, torch.float32, attn)
    angles = model.model.pos_emb
    tables = {name: table.clone() for name, table in angles.named_buffers()}
    model.to(dtype)
    for name, table in tables.items():  # float32 whatever the dtype, as from_pretrained leaves them
        setattr(angles, name, table)
    return model


def batch(**options: Any) -> dict[str, Tensor]:
    return windowed_batch(
        tokens_of, **{"lengths": (203, 173), "around": (BEGIN, FINISH), **options}
    )


def reference(hf: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    turned: list[Tensor] = []
    handle = hf.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: turned.append(args[0])
    )
    with handle:
        found = audio_llms.reference(hf, batch)
    return {**found, "connector.hook_turned": turned[0]}


def draw(data: Any) -> tuple[dict, dict]:
    """Not with a last window that is too short for a token: Hugging Face fails there."""
    model, inputs = audio_llms.draw_windowed(data)
    last = [audio_llms.windows(clip)[-1] for prompt in inputs["lengths"] for clip in prompt]
    assume(all(map(tokens_of, last)))
    return model, inputs


MUSICFLAMINGO = windowed_family(
    "musicflamingo",
    tokens_of,
    build,
    {
        "another share turns": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 900.0,
                "partial_rotary_factor": 0.45,
            }
        },
        "other frame step": {"audio_frame_step": 0.02},
    },
    batch=batch,
    reference=reference,
    batches={
        name: {**options, "lengths": [203]} if name == "one frame over a window" else options
        for name, options in BATCHES.items()
    },
    draw=draw,
)
