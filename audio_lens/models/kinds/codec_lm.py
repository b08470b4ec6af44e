"""What Moshi and Kyutai's speech to text share: text and codes enter together, and no encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.kinds.streams import UNKNOWN, CodecStack, CodecTime, codes_in
from audio_lens.models.layers import KVCache, PartConfig, Rotary, causal_mask
from audio_lens.models.layers.norms import PreciseRMSNorm
from audio_lens.models.mixins.settings import GreedyRun, Limit, stated_limit
from audio_lens.models.parts.codecs import Speaking
from audio_lens.models.parts.depth import PreciseBlock

_BLOCK = {
    "input_layernorm": "ln1",
    "self_attn.q_proj.linear": "attn.q_proj",
    "self_attn.k_proj.linear": "attn.k_proj",
    "self_attn.v_proj.linear": "attn.v_proj",
    "self_attn.o_proj.linear": "attn.o_proj",
    "post_attention_layernorm": "ln2",
    "mlp.fc1.gate": "mlp.gate",  # `split_gates` takes these two apart
    "mlp.fc1.value": "mlp.fc_in",
    "mlp.fc2": "mlp.fc_out",
}


@dataclass(kw_only=True)
class CodecLMConfig(AudioConfig):
    """Shape of a language model of Moshi's kind.

    Attributes:
        n_codebooks: streams of codes that enter.
        n_codes: codes that can be read in one of them, the initial token among them.
        n_texts: text tokens that can be written.
        window: how many positions, its own among them, a position sees.
    """

    n_codebooks: int
    n_codes: int
    n_texts: int
    window: int


def decoder_config(hf_config: Any, d_vocab: int) -> PartConfig:
    """The shape of the decoder of a Hugging Face config of Moshi's kind.

    Raises:
        LoadingError: for rotary positions that are not implemented.
    """
    rope = hf_config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise LoadingError(f"rotary positions of type {rope['rope_type']!r} are not implemented")
    return PartConfig(
        **shape_of_stack(hf_config),
        n_ctx=hf_config.max_position_embeddings,
        d_vocab=d_vocab,
        rotary_base=float(rope["rope_theta"]),
    )


def shape_of_stack(hf_config: Any) -> dict[str, Any]:
    """What decoder and depth decoder have in common, in `PartConfig`'s names."""
    return {
        "n_layers": hf_config.num_hidden_layers,
        "n_heads": hf_config.num_attention_heads,
        "n_key_value_heads": hf_config.num_key_value_heads,
        "d_model": hf_config.hidden_size,
        "d_head": hf_config.head_dim,
        "d_mlp": hf_config.ffn_dim // 2,
        "act_fn": hf_config.hidden_act,
        "eps": hf_config.rms_norm_eps,
        "normalization_type": "RMS",
        "model_name": hf_config.name_or_path,
        "attn_biases": (),
        "causal": True,
        "gated_mlp": True,
        "mlp_bias": False,
        "softmax_float32": True,
    }


def block_weight_names(theirs: str, ours: str) -> dict[str, str]:
    """The name table of blocks: ``theirs`` and ``ours`` are prefixes."""
    return {f"{theirs}.layers.{{l}}.{a}": f"{ours}.blocks.{{l}}.{b}" for a, b in _BLOCK.items()}


def split_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the two halves of every ``fc1`` as ``fc1.gate`` and ``fc1.value``; no copies."""
    split = {}
    for name, tensor in state.items():
        if name.endswith("mlp.fc1.weight"):
            stem = name.removesuffix("weight")
            split[f"{stem}gate.weight"], split[f"{stem}value.weight"] = tensor.chunk(2, dim=-2)
        else:
            split[name] = tensor
    return split


# -------------------------------------------------------------------------------- the stack


class MoshiStack(CodecStack):
    """Reads the sum of text and codes; rotary positions, RMS norms, gated MLPs."""

    def __init__(self, cfg: PartConfig, n_codebooks: int, n_tokens: int, n_texts: int):
        super().__init__(cfg, PreciseBlock, n_codebooks)
        self.ln_final = PreciseRMSNorm(cfg.d_model, cfg.eps)
        self.token_embed = nn.Embedding(n_tokens, cfg.d_model)
        self.rotary = Rotary(cfg)
        self.hook_token_embed = HookPoint()
        self.unembed = nn.Linear(cfg.d_model, n_texts, bias=False)

    def embed(
        self, tokens: Int[Tensor, "b t"], codes: Int[Tensor, "b k t"]
    ) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0."""
        text = self.hook_token_embed(self.token_embed(tokens))
        return self.hook_embed(text + self.summed_codes(codes))


# -------------------------------------------------------------------------------- the kind


class HookedCodecLM(Speaking, CodecTime):
    """Language models of Moshi's kind: text and codes enter together, no encoder.

    `AudioInputs.tokens` (``b t``) is the text and `AudioInputs.further_tokens` (``b k t``) are the
    codes that enter at each position, behind an initial token of each. They may reach further than
    the text: these codes lie ahead, and enter while text is written. Clips of unequal length are
    filled up with silence.
    """

    cfg: CodecLMConfig
    decoder: MoshiStack

    @classmethod
    def adapt_state(cls, state: Mapping[str, Tensor], cfg: AudioConfig) -> Mapping[str, Tensor]:
        """The tensors without those of the codec, gates and values of MLPs apart."""
        return split_gates(
            {name: x for name, x in state.items() if not name.startswith(f"{cls.codec_name}.")}
        )

    def make_feature_extractor(self) -> Any:
        """The feature extractor that the configuration tells of."""
        return transformers.EncodecFeatureExtractor(sampling_rate=self.cfg.sampling_rate)

    # ---------------------------------------------------------------- what a family defines

    @property
    @abstractmethod
    def initial_text(self) -> int:
        """The token that stands where nothing was written yet."""

    @abstractmethod
    def choose(
        self, hidden: Float[Tensor, "b 1 d"], ahead: Int[Tensor, "b k 1"], run: GreedyRun
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, "b k 1"]]:
        """The text and the codes that enter next, from a hidden state and the codes known ahead.

        The run chooses the text.
        """

    # ---------------------------------------------------------------- forward

    def enter_decoder(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """The sum of the embeddings of text and codes."""
        return self.decoder.embed(inputs.tokens, codes_in(inputs)[..., : inputs.tokens.shape[1]])

    def decoder_mask(
        self, inputs: AudioInputs, past: KVCache | None
    ) -> Bool[Tensor, "b 1 t seen"] | None:
        """Causal, without padding, and within the window."""
        n_new = inputs.tokens.shape[1]
        n_seen = n_new + (past.length if past is not None else 0)
        allowed = super().decoder_mask(inputs, past)
        if n_seen <= self.cfg.window:
            return allowed
        causal = causal_mask(n_new, n_seen, inputs.device)
        near = causal & ~causal.tril(n_seen - n_new - self.cfg.window)
        own = causal & ~causal.tril(n_seen - n_new - 1)  # what a query on padding sees at least
        allowed = near.expand(len(inputs), -1, -1, -1) if allowed is None else allowed & near
        return allowed | (own & ~allowed.any(-1, keepdim=True))

    # ---------------------------------------------------------------- inputs

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise unless every text token can be read.

        Raises:
            InputError: naming the first that cannot.
        """
        n_known = self.decoder.token_embed.num_embeddings
        unknown = tokens[(tokens < 0) | (tokens >= n_known)]
        if len(unknown):
            raise InputError(f"no token {unknown[0].item()}: the vocabulary has {n_known}")

    def check_codes(self, codes: Tensor, n_positions: int) -> None:
        """Raise unless these are the codes of so many positions, and perhaps of some ahead.

        Raises:
            InputError: for another number of codebooks, too few steps, or no such codes.
        """
        if codes.ndim != 3 or codes.shape[1] != self.cfg.n_codebooks:
            raise InputError(
                f"codes are (b, {self.cfg.n_codebooks} codebooks, positions), "
                f"got {tuple(codes.shape)}"
            )
        if codes.shape[2] < n_positions:
            raise InputError(f"{codes.shape[2]} steps of codes for {n_positions} text tokens")
        known = self.is_code(codes)
        known[..., n_positions:] |= codes[..., n_positions:] == UNKNOWN
        if not known.all():
            raise InputError(
                f"no code {codes[~known][0].item()}: a codebook has {self.cfg.n_codes}"
            )

    def is_code(self, codes: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Which codes can be read."""
        return (codes >= 0) & (codes < self.cfg.n_codes)

    def is_text(self, inputs: AudioInputs) -> Bool[Tensor, "b t"]:
        """True at attended tokens that can be written."""
        return inputs.attended & (inputs.tokens < self.cfg.n_texts)

    def assembled(
        self,
        tokens: Int[Tensor, "b t"],
        codes: Int[Tensor, "prompts k ahead"],
        mask: Tensor | None = None,
        **made: Any,
    ) -> AudioInputs:
        """Inputs of text and codes as they enter.

        Raises:
            InputError: for tokens or codes that the model cannot read.
        """
        self.check_tokens(tokens)
        self.check_codes(codes, tokens.shape[1])
        if len(codes) != len(tokens):
            raise InputError(f"codes of {len(codes)} prompts, and text of {len(tokens)}")
        mask = None if mask is None or mask.all() else mask.bool()
        return AudioInputs(
            features=torch.empty(len(tokens), 0, device=tokens.device),
            tokens=tokens,
            further_tokens=codes.to(tokens.device),
            clips_per_row=(1,) * len(tokens),
            attention_mask=mask,
            **made,
        )

    def encoded(self, clips: Sequence[Float[np.ndarray, " _"]]) -> Int[Tensor, "b k t"]:
        """The codes of clips, filled up with silence to the length of the longest."""
        longest = max(map(len, clips))
        audio = [F.pad(torch.from_numpy(clip), (0, longest - len(clip))) for clip in clips]
        return self.codec.encode(torch.stack(audio)).to(self.device)

    def texts_before(self, texts: Any, n_prompts: int) -> Tensor:
        """The initial token of every prompt and the text that is known of it, ``b t``.

        Raises:
            InputError: unless these are as many token ids in every row.
        """
        texts = [[]] * n_prompts if texts is None else texts
        is_ids = not isinstance(texts, str) and not any(isinstance(row, str) for row in texts)
        if not is_ids or len(texts) != n_prompts or len({len(row) for row in texts}) > 1:
            raise InputError(
                f"text is one list of token ids for each of {n_prompts} prompts, one id per step "
                "and as many in every row: when a word is said matters"
            )
        known = torch.tensor([[self.initial_text, *row] for row in texts], dtype=torch.long)
        return known.to(self.device)

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def continued(
        self,
        inputs: AudioInputs | Mapping[str, Any],
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> AudioInputs:
        """The prompts with what the model writes greedily behind them, all streams of it.

        Codes that lie ahead in the prompts' streams enter as they are. Hooks that are attached run
        at every step. Limits and generation settings are those of `generate`, and act on the text.

        Raises:
            InputError: prompts that are padded on the right, or settings that are not implemented.
        """
        inputs, run = self._begun(inputs, max_new_tokens, settings)
        made = self._continued(inputs, run)
        self._tell_cut(inputs, run)
        return made

    def _continued(self, inputs: AudioInputs, run: GreedyRun) -> AudioInputs:
        n_given, n_new = inputs.tokens.shape[1], run.limit.n_tokens
        ahead = F.pad(codes_in(inputs)[..., n_given:], (0, n_new), value=UNKNOWN)
        step = replace(inputs, further_tokens=codes_in(inputs)[..., :n_given])
        past, made = KVCache(), [step]
        for index in range(n_new):
            hidden = self.decode(step, None, past=past)[:, -1:]
            text, codes = self.choose(hidden, ahead[..., index : index + 1], run)
            step = replace(self._next_step(step, text), further_tokens=codes)
            made.append(step)
            if run.is_over:
                break
        if run.record is not None:  # the last token enters, too
            self.decode(step, None, past=past)
        return replace(
            inputs,
            tokens=torch.cat([one.tokens for one in made], dim=1),
            further_tokens=torch.cat([codes_in(one) for one in made], dim=2),
            attention_mask=step.attention_mask,
            position_ids=None,
        )

    @property
    def unrecorded(self) -> tuple[str, ...]:
        """The logits, and what writes codes: these run for the last position alone."""
        return ("hook_logits", *(f"{name}." for name in self.cfg.further_decoders))

    def _continue(self, inputs: AudioInputs, run: GreedyRun) -> Int[Tensor, "b t"]:
        return self._continued(inputs, run).tokens

    def _n_ahead(self, inputs: AudioInputs) -> int:
        """How many steps of codes lie ahead of the text."""
        return codes_in(inputs).shape[2] - inputs.tokens.shape[1]

    def _stated_limit(self, settings: GenerationConfig, n_prompt: int) -> Limit | None:
        """As Hugging Face reads it here: ``max_length`` counts new tokens only."""
        return stated_limit(settings)

    def _usual_limit(self, inputs: AudioInputs) -> Limit:
        """Until the end of what lies ahead."""
        n_ahead = self._n_ahead(inputs)
        return Limit(n_ahead, "the end of the codes") if n_ahead else super()._usual_limit(inputs)

    def _tell_cut(self, inputs: AudioInputs, run: GreedyRun) -> None:
        """Warn of texts that end before the codes they go along with."""
        if run.n_chosen < self._n_ahead(inputs):
            run.tell_cut()
