"""DeSTA2 (arXiv 2409.20007) and DeSTA2.5-Audio (2507.02768) as published, from transformers' parts.

Written from kehanlu/DeSTA2, `desta/modeling_desta.py`, and kehanlu/DeSTA2.5-Audio,
`desta/models/modeling_desta25.py`; parameters bear the names of the released checkpoints. These
hold the connector alone: `qformer_connector.pth` of DeSTA2 without a prefix, `model.safetensors` of
DeSTA2.5-Audio under `perception.connector.`. With d = 768 (whisper-small) and w = 4096
(Llama-3-8B), or d = 1280 (whisper-large-v3) and w = 4096 (Llama-3.1-8B), and 2 or 6 layers, these
are

    layer_prompts.0 ... 3                                                (1, 64, d)
    layer_weights                                                        (64, 4)
    qformer.layer.{l}.attention.self.query, key, value.weight, bias      (d, d), (d)
    qformer.layer.{l}.attention.output.dense.weight, bias                (d, d), (d)
    qformer.layer.{l}.attention.output.LayerNorm.weight, bias            (d)
    qformer.layer.{l}.crossattention.*                                   the same
    qformer.layer.{l}.intermediate.dense.weight, bias                    (3072, d), (3072)
    qformer.layer.{l}.output.dense.weight, bias                          (d, 3072), (d)
    qformer.layer.{l}.output.LayerNorm.weight, bias                      (d)
    proj.0.weight, bias                                                  (d)
    proj.1.weight, bias                                                  (w, d), (w)

Both read encoder layers by the same numbers in a different sense: DeSTA2 counts the hidden states
that Whisper returns, of which the first enters layer 0, DeSTA2.5-Audio what its layers give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEncoder

PLACEHOLDER = "<|reserved_special_token_87|>"  # stands for audio and transcript in the prompt
LOCATOR = "<|AUDIO|>"


class Size(NamedTuple):
    """What the published classes hold in their configs: the released values are the defaults."""

    targets: tuple[int, ...] = (2, 5, 8, 11)
    prompt_size: int = 64
    n_layers: int = 2
    d_inner: int = transformers.BertConfig().intermediate_size


class Connector(nn.Module):
    """`QformerConnector`: queries of every layer read it; a mix over layers goes to Llama."""

    def __init__(self, ear: transformers.WhisperConfig, width: int, size: Size):
        super().__init__()
        d_model, n_targets = ear.d_model, len(size.targets)
        queries = [torch.randn(1, size.prompt_size, d_model) for _ in size.targets]
        self.layer_prompts = nn.ParameterList(map(nn.Parameter, queries))
        self.layer_weights = nn.Parameter(torch.zeros(size.prompt_size, n_targets))
        bert = transformers.BertConfig(
            num_hidden_layers=size.n_layers,
            num_attention_heads=ear.encoder_attention_heads,
            hidden_size=d_model,
            intermediate_size=size.d_inner,
            add_cross_attention=True,
            is_decoder=True,
            attn_implementation="eager",  # without a mask: not causal
        )
        self.qformer = BertEncoder(bert)
        self.proj = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, width))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        found = [
            self.qformer(prompt.expand(len(state), -1, -1), encoder_hidden_states=state)[0]
            for prompt, state in zip(self.layer_prompts, states, strict=True)
        ]
        weights = self.layer_weights.softmax(-1)[..., None]
        return self.proj((torch.stack(found, dim=2) * weights).sum(2))


class Perception(nn.Module):
    """Whisper, whose decoder writes the transcript, and the connector."""

    def __init__(self, ear: transformers.WhisperConfig, width: int, size: Size):
        super().__init__()
        self.whisper = transformers.WhisperForConditionalGeneration(ear)
        self.connector = Connector(ear, width, size)
        self.targets = size.targets


class Desta(nn.Module, ABC):
    """Audio vectors written into Llama's prompts; the classes below say where Whisper is read."""

    ear: Perception
    language: transformers.LlamaForCausalLM

    @abstractmethod
    def states(self, features: Tensor) -> list[Tensor]:
        """What the connector reads."""

    def hear(self, features: Tensor) -> Tensor:
        """The vectors of every clip."""
        return self.ear.connector(self.states(features))

    def prompts(self, input_ids: Tensor, features: Tensor, starts: Sequence) -> Tensor:
        """Embedded prompts, with the vectors of a clip from each start (row, position) on."""
        embedded = self.language.get_input_embeddings()(input_ids)
        for (row, start), vectors in zip(starts, self.hear(features), strict=True):
            embedded[row, start : start + len(vectors)] = vectors
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensor,
        starts: Sequence,
        **wanted,
    ) -> Any:
        prompts = self.prompts(input_ids, features, starts)
        return self.language(inputs_embeds=prompts, attention_mask=attention_mask, **wanted)


class Desta2(Desta):
    """`DestaModel`."""

    def __init__(
        self,
        ear: transformers.WhisperConfig,
        text: transformers.LlamaConfig,
        size: Size | None = None,
    ):
        super().__init__()
        self.speech_perception = Perception(ear, text.hidden_size, size or Size())
        self.llama = transformers.LlamaForCausalLM(text)

    @property
    def ear(self) -> Perception:
        return self.speech_perception

    @property
    def language(self) -> transformers.LlamaForCausalLM:
        return self.llama

    def states(self, features: Tensor) -> list[Tensor]:
        encoder = self.ear.whisper.model.encoder
        states = encoder(features, output_hidden_states=True).hidden_states
        return [state for i, state in enumerate(states) if i in self.ear.targets]


class Desta25(Desta):
    """`DeSTA25AudioModel` (its LoRA switch is off in what was released)."""

    def __init__(
        self,
        ear: transformers.WhisperConfig,
        text: transformers.LlamaConfig,
        size: Size | None = None,
    ):
        super().__init__()
        self.llm_model = transformers.LlamaForCausalLM(text)
        size = size or Size(targets=(7, 15, 23, 31), n_layers=6)
        self.perception = Perception(ear, text.hidden_size, size)

    @property
    def ear(self) -> Perception:
        return self.perception

    @property
    def language(self) -> transformers.LlamaForCausalLM:
        return self.llm_model

    def states(self, features: Tensor) -> list[Tensor]:
        encoder, found = self.ear.whisper.model.encoder, []
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).transpose(1, 2)
        x = x + encoder.embed_positions.weight
        for i, layer in enumerate(encoder.layers):
            x = layer(x, None)
            found += [x] if i in self.ear.targets else []
        return found


# -------------------------------------------------------------------------------- prompts


def desta2_prompt(
    tokenizer: Any, messages: list[dict], audio_path: str, transcript: str
) -> tuple[list[int], int]:
    """`DestaModel.process_text`: the tokens, and where the audio vectors are put between them.

    The tokenizer begins the tokens with another <|begin_of_text|>, which the position of the audio
    does not count: the vectors come one token too early.
    """
    context = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    left, right = context.split(audio_path)
    tokens = tokenizer(left + transcript + right)["input_ids"]
    return tokens, len(tokenizer.tokenize(left))


def desta25_prompt(
    tokenizer: Any, messages: list[dict], transcripts: Sequence[str], prompt_size: int
) -> tuple[list[int], list[int]]:
    """`DeSTA25AudioModel.generate`: the tokens, with a placeholder for every audio vector, and
    where each clip starts. ``tokenizer`` has the locator as an added token."""
    context = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    context = context.replace(LOCATOR, f"<start_audio>{LOCATOR}<end_audio>")
    remaining, made, starts = iter(transcripts), [], []
    placeholder, locator = tokenizer.convert_tokens_to_ids([PLACEHOLDER, LOCATOR])
    for token in tokenizer.encode(context, add_special_tokens=False):
        if token == locator:
            starts.append(len(made))
            words = tokenizer.encode(next(remaining), add_special_tokens=False)
            made += [placeholder] * prompt_size + words
        else:
            made.append(token)
    return made, starts
