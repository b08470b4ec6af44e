"""Hooked attention: self-attention with grouped keys and rotary positions, and cross-attention."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from fancy_einsum import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn

from audio_lens.hooks import AttnMode, HookPoint
from audio_lens.models.layers.config import PartConfig
from audio_lens.models.layers.context import Context, causal_mask
from audio_lens.models.layers.mlp import bias_of, multiplied
from audio_lens.models.layers.norms import RMSNorm
from audio_lens.models.layers.rotary import Angles, rotate


class Attention(nn.Module):
    """Multi-head attention with every step hooked; GQA, rotary positions and cross-attention.

    Scores and patterns exist (and can be written) only while somebody hooks them or `attn_mode`
    is "explicit"; otherwise a fused kernel computes `hook_z` directly. Subclasses whose scores have
    an additive position bias set `is_biased` and give it in `bias`.
    """

    is_biased: ClassVar[bool] = False
    name: str  # of its place in the model; set by `setup`

    def __init__(self, cfg: PartConfig, causal: bool, d_memory: int | None = None):
        super().__init__()
        self.n_heads, self.d_head = cfg.n_heads, cfg.d_head
        self.n_key_value_heads = cfg.n_key_value_heads
        self.causal, self.is_cross = causal, d_memory is not None
        self.softmax_float32, self.scales_queries = cfg.softmax_float32, cfg.scales_queries
        self.scale = cfg.d_head**-0.5 if cfg.attn_scale is None else cfg.attn_scale
        self.multiplier = cfg.residual_multiplier
        self.attn_mode: AttnMode = "auto"
        d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
        d_memory = d_memory or cfg.d_model
        self.q_proj = nn.Linear(cfg.d_model, d_q, bias="q" in cfg.attn_biases)
        self.k_proj = nn.Linear(d_memory, d_kv, bias="k" in cfg.attn_biases)
        self.v_proj = nn.Linear(d_memory, d_kv, bias="v" in cfg.attn_biases)
        self.o_proj = nn.Linear(d_q, cfg.d_model, bias="o" in cfg.attn_biases)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.turns = cfg.rotary_base is not None and not self.is_cross
        if self.turns:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.has_qk_norm = cfg.qk_norm and not self.is_cross
        if self.has_qk_norm:
            self.q_norm = RMSNorm(cfg.d_head, cfg.eps)
            self.k_norm = RMSNorm(cfg.d_head, cfg.eps)
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "b q d"], context: Context) -> Float[Tensor, "b q d"]:
        if self.is_cross:
            z = context.read(self, self.queries(x))
        else:
            q, k, v = self.project(x, context.rotary)
            if context.past is not None:
                k, v = context.past.append(self.name, k, v)
            z = self.mix(q, k, v, context.allowed, self.bias(x, context))
        return self.output(self.hook_z(z))

    def _split(self, x: Float[Tensor, "b t he"]) -> Float[Tensor, "b t h e"]:
        # views by hand here and below: a sweep of small cells feels what einops takes to read
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.d_head, self.d_head)

    def queries(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b q h e"]:
        """Queries before any rotation."""
        return self.hook_q(self._split(self.q_proj(x)))

    def keys_values(self, x: Float[Tensor, "b k d"]) -> tuple[Tensor, Tensor]:
        """Keys (before any rotation) and values, ``b k kv e`` each."""
        return self.hook_k(self._split(self.k_proj(x))), self.hook_v(self._split(self.v_proj(x)))

    def project(
        self, x: Float[Tensor, "b t d"], rotary: Angles | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention as they meet: normed and rotated."""
        q, (k, v) = self.queries(x), self.keys_values(x)
        return self.rotated_queries(q, rotary), self.rotated_keys(k, rotary), v

    def rotated_queries(
        self, q: Float[Tensor, "b q h e"], rotary: Angles | None
    ) -> Float[Tensor, "b q h e"]:
        """Queries as they meet the keys."""
        q = self.q_norm(q) if self.has_qk_norm else q
        return self.hook_rot_q(rotate(q, rotary)) if self.turns else q

    def rotated_keys(
        self, k: Float[Tensor, "b k kv e"], rotary: Angles | None
    ) -> Float[Tensor, "b k kv e"]:
        """Keys as they meet the queries."""
        k = self.k_norm(k) if self.has_qk_norm else k
        return self.hook_rot_k(rotate(k, rotary)) if self.turns else k

    def bias(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b h q k"] | None:
        """What is added to the scores of a block that reads ``x``: nothing, here."""
        return None

    def memory_keys_values(self, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values of what cross-attention reads, from the cache if it holds them."""
        earlier = context.past.get(self.name) if context.past is not None else None
        if earlier is not None:
            return earlier
        k, v = self.keys_values(context.need_memory)
        return context.past.append(self.name, k, v) if context.past is not None else (k, v)

    def mix(
        self,
        q: Float[Tensor, "b q h e"],
        k: Float[Tensor, "#b k kv e"],
        v: Float[Tensor, "#b k kv e"],
        allowed: Bool[Tensor, "#b 1 #q k"] | None,
        bias: Float[Tensor, "#b h q k"] | None = None,
    ) -> Float[Tensor, "b q h e"]:
        """Values mixed by softmax of the scores; ``allowed`` None leaves it to causality."""
        attend = self._explicit if self._is_explicit() else self._fused
        return attend(q, k, v, allowed, bias)

    def _is_explicit(self) -> bool:
        if self.attn_mode == "auto":
            return self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()
        return self.attn_mode == "explicit"

    def _explicit(
        self,
        q: Float[Tensor, "b q h e"],
        k: Float[Tensor, "b k kv e"],
        v: Float[Tensor, "b k kv e"],
        allowed: Bool[Tensor, "#b 1 #q k"] | None,
        bias: Float[Tensor, "#b h q k"] | None,
    ) -> Float[Tensor, "b q h e"]:
        q, k, v = self._heads_first(q, k, v)
        scaled = q * self.scale  # before the product: float16 overflows
        scores = einsum("b h q e, b h k e -> b h q k", scaled, k)
        scores = scores if bias is None else scores + bias
        if allowed is None and self._masks_later(q):
            allowed = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        pattern = self.hook_pattern(self.pattern_of(self.hook_attn_scores(scores)))
        return einsum("b h q k, b h k e -> b q h e", pattern, v)

    def pattern_of(self, scores: Float[Tensor, "*b q k"]) -> Float[Tensor, "*b q k"]:
        """Softmax over keys, in the precision the family uses."""
        dtype = torch.float32 if self.softmax_float32 else scores.dtype
        return scores.softmax(-1, dtype=dtype).to(scores.dtype)

    def weigh(
        self, pattern: Float[Tensor, "b h q k"], v: Float[Tensor, "b k kv e"]
    ) -> Float[Tensor, "b q h e"]:
        """Values mixed by a given pattern."""
        return einsum("b h q k, b h k e -> b q h e", pattern, self._per_query_head(v))

    def _fused(
        self,
        q: Float[Tensor, "b q h e"],
        k: Float[Tensor, "b k kv e"],
        v: Float[Tensor, "b k kv e"],
        allowed: Bool[Tensor, "#b 1 #q k"] | None,
        bias: Float[Tensor, "#b h q k"] | None,
    ) -> Float[Tensor, "b q h e"]:
        q, k, v = self._heads_first(q, k, v)
        is_causal, scale = allowed is None and self._masks_later(q), self.scale
        if self.scales_queries:
            q, scale = q * scale, 1.0
        mask = allowed if bias is None else _biased(bias, allowed)
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale
        )
        return z.transpose(1, 2)

    def _heads_first(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """To ``b h t e``, each key-value head repeated for the query heads it serves."""
        k, v = self._per_query_head(k), self._per_query_head(v)
        return q.transpose(1, 2), k, v

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.n_heads // self.n_key_value_heads

    def _per_query_head(self, x: Float[Tensor, "b t kv e"]) -> Float[Tensor, "b h t e"]:
        if self.group == 1:
            return x.transpose(1, 2)
        return repeat(x, "b t kv e -> b (kv g) t e", g=self.group)

    def _masks_later(self, q: Float[Tensor, "b h q e"]) -> bool:
        """Whether a causal mask hides anything: a single new query may see all earlier keys."""
        return self.causal and q.shape[-2] > 1

    def output(self, z: Float[Tensor, "b q h e"]) -> Float[Tensor, "b q d"]:
        """What the heads write together to the residual stream."""
        if not self.hook_result.has_hooks():
            written = self.o_proj(z.flatten(2))
            return multiplied(written, self.multiplier)
        result = self.hook_result(einsum("b q h e, h e d -> b q h d", z, self.W_O))
        return result.sum(dim=2) + self.b_O

    # TransformerLens views: no copies (but of W_O, where the model scales what blocks write)
    @property
    def W_Q(self) -> Float[Tensor, "h d e"]:
        return rearrange(self.q_proj.weight, "(h e) d -> h d e", e=self.d_head)

    @property
    def W_K(self) -> Float[Tensor, "kv d e"]:
        return rearrange(self.k_proj.weight, "(h e) d -> h d e", e=self.d_head)

    @property
    def W_V(self) -> Float[Tensor, "kv d e"]:
        return rearrange(self.v_proj.weight, "(h e) d -> h d e", e=self.d_head)

    @property
    def W_O(self) -> Float[Tensor, "h e d"]:
        weight = rearrange(self.o_proj.weight, "d (h e) -> h e d", e=self.d_head)
        return multiplied(weight, self.multiplier)

    @property
    def b_O(self) -> Float[Tensor, " d"]:
        return multiplied(bias_of(self.o_proj), self.multiplier)


def _biased(
    bias: Float[Tensor, "#b h q k"], allowed: Bool[Tensor, "#b 1 #q k"] | None
) -> Float[Tensor, "#b h q k"]:
    """The bias as a mask: keys that may not be attended to are infinitely low."""
    return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
