"""What a model is made of, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio_lens.analysis.prompts import Prompt
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs
from audio_lens.models import HookedAudioTransformer

SIZES = {
    "layers": "n_layers",
    "width": "d_model",
    "heads": "n_heads",
    "kv_heads": "n_key_value_heads",
    "head_width": "d_head",
    "mlp_width": "d_mlp",
    "positions": "n_ctx",
}


def describe(model: HookedAudioTransformer) -> dict[str, Any]:
    """Family, sizes of parts and streams, seconds per position, and every hook with its shape.

    Shapes are those of one forward on a second of silence (less where the model takes less).
    """
    seconds, rate = min(1.0, model.cfg.max_audio_s), model.cfg.sampling_rate
    silence = np.zeros(int(seconds * rate), dtype=np.float32)
    question = "?" if model.takes_question else None
    prompt = Prompt.of(model, model.prepare(silence, text=question, sampling_rate=rate))
    inputs = prompt.shown().inputs
    return {
        "model": model.cfg.model_name,
        "family": model.cfg.family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sampling_rate": rate,
        "longest_clip_s": model.cfg.max_audio_s,
        "parts": _parts(model, inputs),
        "streams": dict(model.cfg.streams),
        "shapes_for": f"{seconds:g} s of silence",
        "hooks": _hook_shapes(model, inputs),
    }


def _parts(model: HookedAudioTransformer, inputs: AudioInputs) -> dict[str, dict[str, int | float]]:
    """Sizes of each part in the order sound takes, and the spacing of its audio positions."""
    timeline, parts = model.timeline(inputs), {}
    for part in timeline.rows[0].tracks:
        cfg = model.cfg.parts.get(part)
        parts[part] = {name: getattr(cfg, at) for name, at in SIZES.items()} if cfg else {}
        seconds = timeline.seconds(part)
        seconds = seconds[seconds.isfinite()].unique()
        if len(seconds) > 1:
            parts[part]["seconds_per_position"] = round((seconds[1] - seconds[0]).item(), 6)
    return parts


@torch.inference_mode()
def _hook_shapes(model: HookedAudioTransformer, inputs: AudioInputs) -> dict[str, list[int]]:
    shapes = {}

    def note(tensor: Tensor, hook: HookPoint) -> None:
        shapes[hook.name] = list(tensor.shape)

    model.run_with_hooks(inputs, fwd_hooks=[(lambda name: True, note)], return_type=None)
    return shapes
