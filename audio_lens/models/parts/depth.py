"""Depth decoders: a small stack that writes the codes of one step, codebook after codebook.

Each of the ``K`` positions of a step has weights of its own, and sees only the step's earlier ones.
The positions of all steps stand one after the other, ``b (t k) d``; a pattern (``b h q k``) is zero
between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from fancy_einsum import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.models.layers.attention import Attention
from audio_lens.models.layers.blocks import PreNormBlock, Stack
from audio_lens.models.layers.config import PartConfig
from audio_lens.models.layers.context import Context, causal_mask
from audio_lens.models.layers.mlp import GatedMLP, multiplied
from audio_lens.models.layers.norms import PreciseRMSNorm
from audio_lens.models.layers.windowed import WindowedAttention


@dataclass
class DepthConfig(PartConfig):
    """Shape of a depth decoder.

    Attributes:
        n_codebooks: positions of a step, each with weights of its own.
        n_codes: entries of a codebook; one more can be read (the initial token).
        n_texts: text tokens that can be read.
        d_hidden: width of the hidden state that every step is given.
    """

    n_codebooks: int = 8
    n_codes: int = 2048
    n_texts: int = 32_001
    d_hidden: int = 4096


class PerCodebook(nn.Module):
    """A linear map without bias, with weights of its own for each of ``K`` positions of a step."""

    bias = None

    def __init__(self, n_codebooks: int, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_codebooks, d_out, d_in))

    def forward(self, x: Float[Tensor, "b tk i"]) -> Float[Tensor, "b tk o"]:
        steps = rearrange(x, "b (t k) i -> k (b t) i", k=len(self.weight))
        made = einsum("k bt i, k o i -> k bt o", steps, self.weight)
        return rearrange(made, "k (b t) o -> b (t k) o", b=len(x))


class PreciseBlock(PreNormBlock):
    """A pre-norm block whose norms multiply by their gains in float32."""

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg)
        self.ln1 = PreciseRMSNorm(cfg.d_model, cfg.eps)
        self.ln2 = PreciseRMSNorm(cfg.d_model, cfg.eps)


class DepthAttention(WindowedAttention):
    """Causal attention within a step, with projections of its own for every codebook.

    `W_Q` and `W_O` have one more axis than elsewhere: ``k h d e`` and ``k h e d``.
    """

    def __init__(self, cfg: DepthConfig, causal: bool, d_memory: int | None = None):
        super().__init__(cfg, causal, d_memory)
        self.window = (cfg.n_codebooks, cfg.n_codebooks)
        d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
        self.q_proj = PerCodebook(cfg.n_codebooks, cfg.d_model, d_q)
        self.k_proj = PerCodebook(cfg.n_codebooks, cfg.d_model, d_kv)
        self.v_proj = PerCodebook(cfg.n_codebooks, cfg.d_model, d_kv)
        self.o_proj = PerCodebook(cfg.n_codebooks, d_q, cfg.d_model)

    def _inside(
        self, q: Float[Tensor, "b q h e"], k: Float[Tensor, "b k kv e"]
    ) -> Bool[Tensor, "1 1 q k"]:
        """The earlier keys of the step of each query, and its own."""
        return super()._inside(q, k) & causal_mask(q.shape[1], k.shape[1], q.device)

    def pattern_of(self, scores: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q k"]:
        """Softmax over the keys of each step, or over all if a hook lets a query see others.

        The two are the same, but for how sums in float32 are rounded.
        """
        size = self.window[0]
        blocks = rearrange(scores, "b h (t q) (s k) -> b h t s q k", q=size, k=size)
        own = blocks.diagonal(dim1=2, dim2=3)
        if (scores > -torch.inf).sum() > (own > -torch.inf).sum():
            return super().pattern_of(scores)
        steps = super().pattern_of(rearrange(own, "b h q k t -> b h t q k").contiguous())
        pattern = torch.zeros_like(blocks)
        pattern.diagonal(dim1=2, dim2=3).copy_(rearrange(steps, "b h t q k -> b h q k t"))
        return rearrange(pattern, "b h t s q k -> b h (t q) (s k)")

    def output(self, z: Float[Tensor, "b q h e"]) -> Float[Tensor, "b q d"]:
        """What the heads write together to the residual stream."""
        if not self.hook_result.has_hooks():
            return Attention.output(self, z)
        steps = rearrange(z, "b (t k) h e -> b t k h e", k=len(self.o_proj.weight))
        result = einsum("b t k h e, k h e d -> b t k h d", steps, self.W_O)
        return self.hook_result(rearrange(result, "b t k h d -> b (t k) h d")).sum(dim=2)

    def _per_head(self, projection: PerCodebook) -> Float[Tensor, "k h d e"]:
        return rearrange(projection.weight, "k (h e) d -> k h d e", e=self.d_head)

    @property
    def W_Q(self) -> Float[Tensor, "k h d e"]:
        return self._per_head(self.q_proj)

    @property
    def W_K(self) -> Float[Tensor, "k kv d e"]:
        return self._per_head(self.k_proj)

    @property
    def W_V(self) -> Float[Tensor, "k kv d e"]:
        return self._per_head(self.v_proj)

    @property
    def W_O(self) -> Float[Tensor, "k h e d"]:
        weight = rearrange(self.o_proj.weight, "k d (h e) -> k h e d", e=self.d_head)
        return multiplied(weight, self.multiplier)

    @property
    def b_O(self) -> Float[Tensor, " d"]:
        return self.o_proj.weight.new_zeros(self.o_proj.weight.shape[1])


class DepthMLP(GatedMLP):
    """A gated MLP with weights of its own for every codebook; `W_in` is ``k d f``."""

    def __init__(self, cfg: DepthConfig):
        super().__init__(cfg)
        self.gate = PerCodebook(cfg.n_codebooks, cfg.d_model, cfg.d_mlp)
        self.fc_in = PerCodebook(cfg.n_codebooks, cfg.d_model, cfg.d_mlp)
        self.fc_out = PerCodebook(cfg.n_codebooks, cfg.d_mlp, cfg.d_model)

    @property
    def W_in(self) -> Float[Tensor, "k d f"]:
        return self.fc_in.weight.mT

    @property
    def W_gate(self) -> Float[Tensor, "k d f"]:
        return self.gate.weight.mT

    @property
    def W_out(self) -> Float[Tensor, "k f d"]:
        return multiplied(self.fc_out.weight.mT, self.multiplier)

    @property
    def b_out(self) -> Float[Tensor, " d"]:
        return self.fc_out.weight.new_zeros(self.fc_out.weight.shape[1])


class DepthBlock(PreciseBlock):
    """A pre-norm block of a depth decoder."""

    attention = DepthAttention

    def make_mlp(self, cfg: DepthConfig) -> DepthMLP:
        return DepthMLP(cfg)


class DepthDecoder(Stack):
    """Writes the codes of every step from its hidden state, its text and its earlier codes.

    Position ``k`` of a step reads the hidden state through weights of its own
    (`hook_hidden_embed`) and one token (`hook_token_embed`): the text for the first codebook, the
    code of the codebook before for the others. There are no positions and no final norm.
    """

    cfg: DepthConfig

    def __init__(self, cfg: DepthConfig):
        super().__init__(cfg, DepthBlock)
        n_codebooks = cfg.n_codebooks
        self.text_embed = nn.Embedding(cfg.n_texts, cfg.d_model)
        self.code_embed = nn.ModuleList(
            nn.Embedding(cfg.n_codes + 1, cfg.d_model) for _ in range(n_codebooks - 1)
        )
        self.hidden_embed = PerCodebook(n_codebooks, cfg.d_hidden, cfg.d_model)
        self.code_heads = PerCodebook(n_codebooks, cfg.d_model, cfg.n_codes)
        self.hook_token_embed, self.hook_hidden_embed = HookPoint(), HookPoint()

    def embed(
        self,
        hidden: Float[Tensor, "b t d_hidden"],
        text: Int[Tensor, "b t"],
        codes: Int[Tensor, "b k t"],
    ) -> Float[Tensor, "b tk d"]:
        """The residual stream entering block 0; the codes of the last codebook are not read."""
        tables = zip(self.code_embed, codes[:, : len(self.code_embed)].unbind(1), strict=True)
        read = [self.text_embed(text), *(table(of_book) for table, of_book in tables)]
        tokens = self.hook_token_embed(rearrange(read, "k b t d -> b (t k) d"))
        given = repeat(hidden, "b t d -> b (t k) d", k=self.cfg.n_codebooks)
        return self.hook_embed(tokens + self.hook_hidden_embed(self.hidden_embed(given)))

    def write(
        self,
        hidden: Float[Tensor, "b t d_hidden"],
        text: Int[Tensor, "b t"],
        codes: Int[Tensor, "b k t"],
    ) -> Float[Tensor, "b t kv"]:
        """Logits of the codes of every step, codebook beside codebook."""
        resid = self.embed(hidden, text, codes)
        out = self.finish(self.run_blocks(resid, Context(), 0, self.cfg.n_layers))
        return rearrange(self.code_heads(out), "b (t k) v -> b t (k v)", k=self.cfg.n_codebooks)
