"""LLaMA-Omni (Fang et al. 2024, arXiv 2409.06666) and LLaMA-Omni2 (2025, arXiv 2505.02625).

Whisper large-v3 hears 30 s at a time, five of its frames side by side become one token of 0.1 s,
and Llama-3.1 (Qwen2.5 in the second) answers. Nothing is masked: a clip always becomes 300 tokens,
those of its padding too.

LLaMA-Omni also speaks: a unit decoder of two Llama layers reads the hidden states that predicted
an answer, each 25 times over, and labels every position with a unit of speech or none (CTC). It is
the model's `speaker`; see `HookedLlamaOmni.units`. (In the published training it reads the states
one position later, those of the answer's own tokens; here it is as in the published inference.)
What speaks in LLaMA-Omni2, a language model that writes units one by one, is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.compose.assemble import Placeholder, compose
from audio_lens.models.compose.model import HookedComposed
from audio_lens.models.config import LoadingError
from audio_lens.models.kinds.encoder_only import CTCConfig
from audio_lens.models.layers import Context, PartConfig, PreNormBlock, Rotary, Stack
from audio_lens.models.loading.checkpoints import processor_of
from audio_lens.models.loading.generation import stored_settings
from audio_lens.models.loading.stored import check_numbers, read_config, reads_checkpoint
from audio_lens.models.loading.weights import fill, read_weights, renamed
from audio_lens.models.parts.connectors import ConnectorConfig, StackingConnector
from audio_lens.models.parts.language_model import (
    LanguageModel,
    language_model_config,
    weight_names,
)
from audio_lens.recipes.openai_whisper import encoder_weight_names, openai_ear, openai_whisper

PLACEHOLDER = Placeholder("<speech>", -200)
QUESTION = "Please directly answer the questions in the user's speech."
TEMPLATE = (
    "<|begin_of_text|><|begin_of_text|>"  # the published code begins twice
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "You are a helpful language and speech assistant. You are able to understand the speech content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "{audio}\n{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
_EAR = "model.speech_encoder"
_TEXT_PATH: dict[str, str | None] = {
    **encoder_weight_names(_EAR),
    "model.speech_projector.linear1": "connector.linear_1",
    "model.speech_projector.linear2": "connector.linear_2",
    **weight_names("model", head="lm_head"),
}
WEIGHT_NAMES: dict[str, str | None] = {
    **_TEXT_PATH,
    "speech_generator.input_proj": "speaker.input_proj",
    **{
        theirs: ours.replace("decoder.", "speaker.")
        for theirs, ours in weight_names("speech_generator", head="").items()
        if ".layers." in theirs
    },
    "speech_generator.output_proj": "speaker.unembed",
}
_SPEAKING = ("input_proj.0", "input_proj.2", "gate.0")
WEIGHT_NAMES_2: dict[str, str | None] = {
    **_TEXT_PATH,
    **{f"speech_generator.{name}": None for name in _SPEAKING},
    **dict.fromkeys(weight_names("speech_generator.model.model", "speech_generator.model.lm_head")),
}


@dataclass(frozen=True)
class Release:
    """What differs between LLaMA-Omni and its successor.

    Attributes:
        text: class of the language model's config.
        weight_names: the published names to ours.
        template: of prompts; None is the tokenizer's chat template.
    """

    name: str
    text: type[transformers.LlamaConfig] | type[transformers.Qwen2Config]
    weight_names: Mapping[str, str | None]
    template: str | None


FIRST = Release("llama_omni", transformers.LlamaConfig, WEIGHT_NAMES, TEMPLATE)
SECOND = Release("llama_omni2", transformers.Qwen2Config, WEIGHT_NAMES_2, None)


class UnitSpeaker(Stack):
    """The unit decoder: from hidden states of an answer to units of speech, all at once.

    Args:
        cfg: of its layers, whose ``d_vocab`` counts the units and the label that stands for none.
        d_in: width of the hidden states.
        upsample: positions made of one hidden state.
    """

    def __init__(self, cfg: PartConfig, d_in: int, upsample: int):
        super().__init__(cfg, PreNormBlock)
        self.upsample = upsample
        self.hook_in = HookPoint(borrowed=True)  # the decoder's hook_out
        self.input_proj = nn.Linear(d_in, cfg.d_model)
        self.rotary = Rotary(cfg)
        self.unembed = nn.Linear(cfg.d_model, cfg.need_d_vocab)
        self.hook_logits = HookPoint()

    def forward(self, states: Float[Tensor, "b n d_in"]) -> Float[Tensor, "b t units"]:
        """Logits of the units, the last of which stands for none; ``t`` is ``upsample * n``."""
        many = self.hook_in(states).repeat_interleave(self.upsample, dim=1)
        resid = self.hook_embed(self.input_proj(many))
        positions = torch.arange(resid.shape[1], device=resid.device)[None]
        context = Context(rotary=self.rotary(positions, resid.dtype))
        resid = self.run_blocks(resid, context, 0, self.cfg.n_layers)
        return self.hook_logits(self.unembed(self.finish(resid)))


class HookedLlamaOmni(HookedComposed):
    """LLaMA-Omni with every activation hooked.

    Attributes:
        speaker: makes units of speech; None in checkpoints without one. Its hook points begin with
            ``speaker.`` and run in `units` alone, not in the forward that makes text.
    """

    speaker: UnitSpeaker | None

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.register_module("speaker", None)

    def add_speaker(self, speaker: UnitSpeaker) -> None:
        """Give the model what makes units of its answers."""
        self.speaker = speaker
        self.setup()

    def units(
        self, inputs: AudioInputs | Mapping[str, Any], answer: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b t units"]:
        """Logits of the units in which an answer is spoken; the last unit stands for none.

        Args:
            inputs: prompts without padding behind them.
            answer: what follows them, as ``generate(..., return_type="tokens")`` gives it behind
                the prompts, the end token included.

        Raises:
            InputError: a model without a speaker, no answer, or prompts padded on the right.
        """
        if self.speaker is None:
            raise InputError("this checkpoint has no speaker, so it makes no units")
        inputs, n = self.as_inputs(inputs), answer.shape[1]
        if n == 0 or len(answer) != len(inputs):
            raise InputError(
                f"{len(inputs)} prompts need an answer each, got {tuple(answer.shape)}"
            )
        if not inputs.attended[:, -1].all():
            raise InputError("prompts padded on the right cannot be answered: pad them on the left")
        whole = _followed(inputs, answer[:, :-1].to(inputs.device))
        hidden = self.decode(whole, self.encode(whole))
        return self.speaker(hidden[:, -n:])

    def spoken(self, units: Float[Tensor, "b t units"]) -> list[list[int]]:
        """The units of the likeliest path of each row, repeats and the label for none left out."""
        none = units.shape[-1] - 1
        return CTCConfig(none).best_path(units, torch.ones_like(units[..., 0], dtype=torch.bool))


def _followed(inputs: AudioInputs, more: Int[Tensor, "b n"]) -> AudioInputs:
    """The prompts with more tokens behind them."""
    mask, positions = inputs.attention_mask, inputs.position_ids
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(more, dtype=mask.dtype)], dim=1)
    if positions is not None:
        steps = torch.arange(1, more.shape[1] + 1, device=more.device)
        positions = torch.cat([positions, positions[:, -1:] + steps], dim=1)
    tokens = torch.cat([inputs.tokens, more], dim=1)
    return replace(inputs, tokens=tokens, attention_mask=mask, position_ids=positions)


# -------------------------------------------------------------------------------- loading


@reads_checkpoint
def llama_omni(
    checkpoint: str | Path, whisper: Any = None, dtype: torch.dtype | None = None
) -> HookedLlamaOmni:
    """LLaMA-Omni, from a directory with the published files.

    Args:
        checkpoint: such as that of ``ICTNLP/Llama-3.1-8B-Omni``.
        whisper: openai's ``large-v3.pt``, or what else `compose` takes the encoder of; None uses
            the encoder that the checkpoint itself holds.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        LoadingError: a file that is missing or corrupt, a config of another model, weights that are
            missing or without a place, or no encoder.
    """
    return _read(checkpoint, FIRST, whisper, dtype)


@reads_checkpoint
def llama_omni2(
    checkpoint: str | Path, whisper: Any = None, dtype: torch.dtype | None = None
) -> HookedLlamaOmni:
    """LLaMA-Omni2 without what speaks, from a directory with the published files.

    Args:
        checkpoint: such as that of ``ICTNLP/LLaMA-Omni2-0.5B``.
        whisper: as for `llama_omni`.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        LoadingError: as for `llama_omni`.
    """
    return _read(checkpoint, SECOND, whisper, dtype)


def _read(
    checkpoint: str | Path, release: Release, whisper: Any, dtype: torch.dtype | None
) -> HookedLlamaOmni:
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise LoadingError(f"{folder} holds no config.json, so it is no directory of LLaMA-Omni")
    config = read_config(folder / "config.json")
    processor, problem = processor_of(str(folder))
    tokenizer = getattr(processor, "tokenizer", processor)
    model = llama_omni_of(config, read_weights(folder), release, whisper, tokenizer, dtype)
    model.generation_config = stored_settings(folder, model.generation_config)
    model.tokenizer_problem = problem
    model.cfg.model_name = str(checkpoint)
    return model


def llama_omni_of(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    release: Release,
    whisper: Any = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> HookedLlamaOmni:
    """The model of published weights and the ``config.json`` beside them.

    Args:
        release: `FIRST` for LLaMA-Omni, `SECOND` for LLaMA-Omni2.

    Raises:
        LoadingError: a config of another model, weights that are missing or without a place, or no
            encoder.
    """
    if "speech_encoder_ds_rate" not in config:
        raise LoadingError("this config tells of no speech encoder, so it is no LLaMA-Omni")
    text = release.text.from_dict({key: x for key, x in config.items() if key != "model_type"})
    own_ear = {name: x for name, x in state.items() if name.startswith(f"{_EAR}.")}
    others = {name: x for name, x in state.items() if name not in own_ear}
    found = renamed(others, release.weight_names)
    found = {name: x.to(dtype or x.dtype) for name, x in found.items()}
    embedding = _needed(found, "decoder.token_embed.weight")
    if text.tie_word_embeddings:
        found.setdefault("decoder.unembed.weight", embedding)
    cfg = language_model_config(text, release.name)
    with torch.device("meta"):
        decoder = LanguageModel(cfg)
        connector = _connector(config, found, text.hidden_size)
    fill(decoder, _of("decoder", found))
    fill(connector, _of("connector", found))
    model = compose(
        _ear(whisper, own_ear, embedding.dtype),
        connector,
        decoder,
        PLACEHOLDER,
        tokenizer=tokenizer,
        template=release.template,
        keeps_padding=True,
        name=release.name,
        dtype=embedding.dtype,
        family=HookedLlamaOmni,
    )
    spoken = _of("speaker", found)
    if spoken:
        model.add_speaker(_speaker(config, text, spoken))
    model.generation_config = transformers.GenerationConfig(eos_token_id=config.get("eos_token_id"))
    return model


def _needed(found: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in found:
        raise LoadingError(f"missing weights: {name}")
    return found[name]


def _of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part, by the names they have in it."""
    prefix = f"{part}."
    return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}


def _ear(whisper: Any, own: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """What hears: what was given, or the checkpoint's own encoder."""
    if isinstance(whisper, (str, Path)) and Path(whisper).suffix == ".pt":
        return openai_whisper(whisper, dtype)
    if whisper is not None:
        return whisper
    if not own:
        raise LoadingError("this checkpoint holds no encoder: pass whisper= (openai's large-v3.pt)")
    return openai_ear({name: x.to(dtype) for name, x in own.items()}, _EAR)


def _connector(
    config: Mapping[str, Any], found: Mapping[str, Tensor], d_out: int
) -> StackingConnector:
    d_mid = len(_needed(found, "connector.linear_1.weight"))
    stacked = config["speech_encoder_ds_rate"]
    shape = ConnectorConfig(d_mid=d_mid, act_fn="relu", n_stacked=stacked)
    return StackingConnector(shape, config["speech_encoder_hidden_size"], d_out)


def _speaker(
    config: Mapping[str, Any],
    text: transformers.LlamaConfig | transformers.Qwen2Config,
    tensors: Mapping[str, Tensor],
) -> UnitSpeaker:
    """Llama's layers in the sizes that ``ctc_decoder_config`` says: layers, width, heads, MLP."""
    n_layers, width, n_heads, d_mlp = ast.literal_eval(config["ctc_decoder_config"])
    sizes = {
        "num_hidden_layers": n_layers,
        "hidden_size": width,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
        "head_dim": width // n_heads,
        "intermediate_size": d_mlp,
        "vocab_size": config["unit_vocab_size"] + 1,
    }
    check_numbers(sizes, "ctc_decoder_config")
    own = type(text).from_dict({**text.to_dict(), **sizes})
    cfg = replace(language_model_config(own, "llama_omni"), final_norm=False)
    with torch.device("meta"):
        speaker = UnitSpeaker(cfg, text.hidden_size, config["ctc_upsample_factor"])
    fill(speaker, tensors)
    return speaker.eval()
