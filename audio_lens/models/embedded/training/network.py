"""Fast forward passes of a Hugging Face Qwen2-Audio for training and for scoring.

The encoder runs on the frames that a batch has rather than on the four seconds it is padded to.
Padding is masked as a key there, so both give the same states (a test holds them together).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2AudioForConditionalGeneration
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder


def hear(
    tower: Qwen2AudioEncoder, mel: Float[Tensor, "batch 80 frames"], tokens: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch positions d"], Float[Tensor, "batch tokens d"]]:
    """Encode clips.

    Args:
        tower: the encoder.
        mel: features with a multiple of four frames, at least four of them behind each clip
            that is not as long as the encoder takes.
        tokens: length of each clip in audio tokens of 40 ms.

    Returns:
        States of the last layer (50 per second), and pooled and normed (25 per second).
    """
    states = functional.gelu(tower.conv1(mel))
    states = functional.gelu(tower.conv2(states)).transpose(1, 2)
    positions = states.shape[1]
    states = states + tower.embed_positions.weight[:positions]
    padding = torch.arange(positions) >= 2 * tokens[:, None, None, None]
    mask = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    mask = mask.expand(-1, 1, positions, -1)
    for layer in tower.layers:
        states = layer(states, mask)
    pooled = tower.avg_pooler(states.transpose(1, 2)).transpose(1, 2)
    return states, tower.layer_norm(pooled)


@dataclass(frozen=True)
class PromptBatch:
    """Questions about clips, ready for the language model.

    Attributes:
        ids: prompt with one token per 40 ms of audio, then the answer; padded behind.
        clip: which clip each row is about; empty for rows without audio.
        asked: index of each row's last prompt token, where the answer is predicted.
        answer: token of the right answer.
    """

    ids: Int[Tensor, "rows length"]
    clip: Int[Tensor, " heard"]
    asked: Int[Tensor, " rows"]
    answer: Int[Tensor, " rows"]


def think(
    model: Qwen2AudioForConditionalGeneration,
    audio: Float[Tensor, "batch tokens d"],
    tokens: Int[Tensor, " batch"],
    prompts: PromptBatch,
) -> Float[Tensor, "rows 2 vocabulary"]:
    """Logits of the answer, and of what follows it.

    Args:
        model: the whole model; its connector is not applied.
        audio: connector outputs.
        tokens: how many of them each clip has.
        prompts: what is asked.
    """
    embeddings = model.get_input_embeddings()(prompts.ids)
    there = torch.arange(audio.shape[1]) < tokens[:, None]
    heard = audio[prompts.clip][there[prompts.clip]].to(embeddings.dtype)
    slots = (prompts.ids == model.config.audio_token_id)[..., None]
    return _answer(model, embeddings.masked_scatter(slots, heard), prompts)


def read(
    model: Qwen2AudioForConditionalGeneration, prompts: PromptBatch
) -> Float[Tensor, "rows 2 vocabulary"]:
    """:func:`think` for prompts without audio."""
    return _answer(model, model.get_input_embeddings()(prompts.ids), prompts)


def _answer(
    model: Qwen2AudioForConditionalGeneration, embeddings: Tensor, prompts: PromptBatch
) -> Tensor:
    states = model.model.language_model(inputs_embeds=embeddings, use_cache=False)
    rows = torch.arange(len(embeddings))[:, None]
    last = states.last_hidden_state[rows, prompts.asked[:, None] + torch.arange(2)]
    return model.lm_head(last)
