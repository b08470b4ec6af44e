"""Hooked layers shared by all families: attention, MLPs, norms, rotary positions, blocks.

Weights stay in Hugging Face layout (`nn.Linear`); TransformerLens's `W_Q`, `W_O` ... are views.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from audio_lens.hooks import AttnMode, HookPoint


@dataclass
class PartConfig:
    """Shape of one part (encoder, decoder), in TransformerLens's names.

    `n_ctx` is the most positions the part takes; `attn_biases` names the projections with a bias;
    `scales_queries` and `softmax_float32` say where attention rounds in half precision.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    n_ctx: int
    act_fn: str
    eps: float
    normalization_type: Literal["LN", "RMS"]
    d_head: int
    n_key_value_heads: int
    attn_biases: tuple[str, ...] = ("q", "v", "o")
    d_vocab: int | None = None
    causal: bool = False
    gated_mlp: bool = False
    softmax_float32: bool = False
    scales_queries: bool = False
    rotary_base: float | None = None
    attn_only: bool = False
    model_name: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


class KVCache:
    """Keys (rotated) and values of earlier positions, by attention layer.

    For decoding step by step, and for runs that differ from another only from some position on.
    """

    def __init__(
        self, entries: dict[str, tuple[Tensor, Tensor]] | None = None, length: int = 0
    ) -> None:
        self.length = length
        self._entries = dict(entries or {})

    @property
    def n_bytes(self) -> int:
        """Memory that is held."""
        return sum(x.nbytes for entry in self._entries.values() for x in entry)

    def get(self, layer: str) -> tuple[Tensor, Tensor] | None:
        return self._entries.get(layer)

    def append(self, layer: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (``b t h e``) of new positions; returns those of all so far."""
        earlier = self._entries.get(layer)
        if earlier is not None:
            k, v = torch.cat([earlier[0], k], dim=1), torch.cat([earlier[1], v], dim=1)
        self._entries[layer] = (k, v)
        return k, v


@dataclass
class Context:
    """What the blocks of a stack need beside the residual stream.

    Attributes:
        allowed: which keys each query may attend to; None for all (or all earlier, if causal).
        rotary: cosines and sines of the positions, ``b t e`` each.
        memory: encoder output that cross-attention reads.
        past: cache of earlier positions, extended by this call.
    """

    allowed: Bool[Tensor, "#b 1 #q k"] | None = None
    rotary: tuple[Float[Tensor, "#b t e"], Float[Tensor, "#b t e"]] | None = None
    memory: Float[Tensor, "b s d"] | None = None
    past: KVCache | None = None

    def read(self, attn: Attention, q: Float[Tensor, "b q h e"]) -> Float[Tensor, "b q h e"]:
        """What cross-attention finds in the memory."""
        return attn.mix(q, *attn.memory_keys_values(self), None)


# -------------------------------------------------------------------------------- norms


class Norm(nn.Module):
    """A norm with TransformerLens's hooks: `hook_scale`, then `hook_normalized` before the gain.

    The fused kernel runs unless one of the two is hooked.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if self.hook_scale.has_hooks() or self.hook_normalized.has_hooks():
            return self.written_out(x)
        return self.fused(x)


class LayerNorm(Norm):
    """Layer norm with gain and bias."""

    def __init__(self, d_model: int, eps: float):
        super().__init__(d_model, eps)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def fused(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def written_out(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = precise - precise.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(centred / scale)
        return (normalized * self.weight + self.bias).to(x.dtype)


class RMSNorm(Norm):
    """Root-mean-square norm, in float32 as Hugging Face's language models compute it."""

    def fused(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(self._mean_square(x32))).to(x.dtype)

    def written_out(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x32 = x.float()
        mean_square = self._mean_square(x32)
        scale = mean_square.sqrt()
        edit = scale / self.hook_scale(scale.clone())  # 1 exactly, unless a hook writes the scale
        normalized = (x32 * torch.rsqrt(mean_square) * edit).to(x.dtype)
        return self.weight * self.hook_normalized(normalized)

    def _mean_square(self, x32: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
        return x32.pow(2).mean(-1, keepdim=True) + self.eps


NORMS = {"LN": LayerNorm, "RMS": RMSNorm}


# -------------------------------------------------------------------------------- rotary positions


class Rotary(nn.Module):
    """Rotary positions, half-split; angles in float32 as in Hugging Face."""

    def __init__(self, d_head: int, base: float):
        super().__init__()
        self.d_head, self.base = d_head, base

    def forward(
        self, positions: Int[Tensor, "#b t"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "#b t e"], Float[Tensor, "#b t e"]]:
        steps = torch.arange(0, self.d_head, 2, device=positions.device, dtype=torch.float)
        frequencies = 1.0 / self.base ** (steps / self.d_head)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "b t h e"],
    rotary: tuple[Float[Tensor, "#b t e"], Float[Tensor, "#b t e"]] | None,
) -> Float[Tensor, "b t h e"]:
    """Turn queries or keys by their positions; without rotary positions they stay as they are."""
    if rotary is None:
        return x
    cos, sin = (angle[:, :, None, :] for angle in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# -------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Multi-head attention with every step hooked; GQA, rotary positions and cross-attention.

    Scores and patterns exist (and can be written) only while somebody hooks them or `attn_mode`
    is "explicit"; otherwise a fused kernel computes `hook_z` directly.
    """

    def __init__(self, cfg: PartConfig, causal: bool, d_memory: int | None = None):
        super().__init__()
        self.n_heads, self.d_head = cfg.n_heads, cfg.d_head
        self.n_key_value_heads = cfg.n_key_value_heads
        self.causal, self.is_cross = causal, d_memory is not None
        self.softmax_float32, self.scales_queries = cfg.softmax_float32, cfg.scales_queries
        self.attn_mode: AttnMode = "auto"
        d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
        d_memory = d_memory or cfg.d_model
        self.q_proj = nn.Linear(cfg.d_model, d_q, bias="q" in cfg.attn_biases)
        self.k_proj = nn.Linear(d_memory, d_kv, bias="k" in cfg.attn_biases)
        self.v_proj = nn.Linear(d_memory, d_kv, bias="v" in cfg.attn_biases)
        self.o_proj = nn.Linear(d_q, cfg.d_model, bias="o" in cfg.attn_biases)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        if cfg.rotary_base is not None and not self.is_cross:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "b q d"], context: Context) -> Float[Tensor, "b q d"]:
        if self.is_cross:
            z = context.read(self, self.queries(x))
        else:
            q, k, v = self.project(x, context.rotary)
            if context.past is not None:
                k, v = context.past.append(self.name, k, v)
            z = self.mix(q, k, v, context.allowed)
        return self.output(self.hook_z(z))

    def _split(self, x: Float[Tensor, "b t he"]) -> Float[Tensor, "b t h e"]:
        return rearrange(x, "b t (h e) -> b t h e", e=self.d_head)

    def queries(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b q h e"]:
        """Queries before any rotation."""
        return self.hook_q(self._split(self.q_proj(x)))

    def keys_values(self, x: Float[Tensor, "b k d"]) -> tuple[Tensor, Tensor]:
        """Keys (before any rotation) and values, ``b k kv e`` each."""
        return self.hook_k(self._split(self.k_proj(x))), self.hook_v(self._split(self.v_proj(x)))

    def project(
        self, x: Float[Tensor, "b t d"], rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention as they meet: rotated."""
        q, (k, v) = self.queries(x), self.keys_values(x)
        if rotary is not None:
            q = self.hook_rot_q(rotate(q, rotary))
            k = self.hook_rot_k(rotate(k, rotary))
        return q, k, v

    def memory_keys_values(self, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values of what cross-attention reads, from the cache if it holds them."""
        earlier = context.past.get(self.name) if context.past is not None else None
        if earlier is not None:
            return earlier
        k, v = self.keys_values(context.memory)
        return context.past.append(self.name, k, v) if context.past is not None else (k, v)

    def mix(
        self,
        q: Float[Tensor, "b q h e"],
        k: Float[Tensor, "#b k kv e"],
        v: Float[Tensor, "#b k kv e"],
        allowed: Bool[Tensor, "#b 1 #q k"] | None,
    ) -> Float[Tensor, "b q h e"]:
        """Values mixed by softmax of the scores; ``allowed`` None leaves it to causality."""
        attend = self._explicit if self._is_explicit() else self._fused
        return attend(q, k, v, allowed)

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
    ) -> Float[Tensor, "b q h e"]:
        q, k, v = self._heads_first(q, k, v)
        scores = (q * self.d_head**-0.5) @ k.transpose(-1, -2)  # scaled first: float16 overflows
        if allowed is None and self._masks_later(q):
            allowed = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        pattern = self.hook_pattern(self.pattern_of(self.hook_attn_scores(scores)))
        return rearrange(pattern @ v, "b h q e -> b q h e")

    def pattern_of(self, scores: Float[Tensor, "*b q k"]) -> Float[Tensor, "*b q k"]:
        """Softmax over keys, in the precision the family uses."""
        dtype = torch.float32 if self.softmax_float32 else scores.dtype
        return scores.softmax(-1, dtype=dtype).to(scores.dtype)

    def weigh(
        self, pattern: Float[Tensor, "b h q k"], v: Float[Tensor, "b k kv e"]
    ) -> Float[Tensor, "b q h e"]:
        """Values mixed by a given pattern."""
        return rearrange(pattern @ self._per_query_head(v), "b h q e -> b q h e")

    def _fused(
        self,
        q: Float[Tensor, "b q h e"],
        k: Float[Tensor, "b k kv e"],
        v: Float[Tensor, "b k kv e"],
        allowed: Bool[Tensor, "#b 1 #q k"] | None,
    ) -> Float[Tensor, "b q h e"]:
        q, k, v = self._heads_first(q, k, v)
        is_causal, scale = allowed is None and self._masks_later(q), self.d_head**-0.5
        if self.scales_queries:
            q, scale = q * scale, 1.0
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=is_causal, scale=scale
        )
        return rearrange(z, "b h q e -> b q h e")

    def _heads_first(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """To ``b h t e``, each key-value head repeated for the query heads it serves."""
        k, v = self._per_query_head(k), self._per_query_head(v)
        return rearrange(q, "b t h e -> b h t e"), k, v

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.n_heads // self.n_key_value_heads

    def _per_query_head(self, x: Float[Tensor, "b t kv e"]) -> Float[Tensor, "b h t e"]:
        return repeat(x, "b t kv e -> b (kv g) t e", g=self.group)

    def _masks_later(self, q: Float[Tensor, "b h q e"]) -> bool:
        """Whether a causal mask hides anything: a single new query may see all earlier keys."""
        return self.causal and q.shape[-2] > 1

    def output(self, z: Float[Tensor, "b q h e"]) -> Float[Tensor, "b q d"]:
        """What the heads write together to the residual stream."""
        if not self.hook_result.has_hooks():
            return self.o_proj(rearrange(z, "b q h e -> b q (h e)"))
        result = self.hook_result(torch.einsum("bqhe,hed->bqhd", z, self.W_O))
        return result.sum(dim=2) + (0 if self.o_proj.bias is None else self.o_proj.bias)

    # TransformerLens views: no copies
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
        return rearrange(self.o_proj.weight, "d (h e) -> h e d", e=self.d_head)

    @property
    def b_O(self) -> Float[Tensor, " d"]:
        bias = self.o_proj.bias
        return bias if bias is not None else self.o_proj.weight.new_zeros(len(self.o_proj.weight))


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "1 1 q k"]:
    """True where a query may look: its own position and earlier ones, queries last among keys."""
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return allowed.tril(n_keys - n_queries)[None, None]


def padding_mask(
    valid: Bool[Tensor, "b k"], n_queries: int, causal: bool
) -> Bool[Tensor, "b 1 q k"]:
    """Keys that hold something (and are not later, if causal).

    A query that could see nothing (left padding) is let see padding, its own and earlier: its
    output is never read, and this keeps NaN out of the batch.
    """
    allowed = valid[:, None, None, :].expand(-1, 1, n_queries, -1)
    if not causal:
        return allowed | ~allowed.any(-1, keepdim=True)
    not_later = causal_mask(n_queries, valid.shape[1], valid.device)
    allowed = allowed & not_later
    return allowed | (~allowed.any(-1, keepdim=True) & not_later)


# -------------------------------------------------------------------------------- MLPs


class MLP(nn.Module):
    """``fc_out(act(fc_in(x)))``."""

    def __init__(self, cfg: PartConfig):
        super().__init__()
        self.act = ACT2FN[cfg.act_fn]
        self.fc_in = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.fc_out = nn.Linear(cfg.d_mlp, cfg.d_model)
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.fc_out(self.hook_post(self.act(self.hook_pre(self.fc_in(x)))))

    @property
    def W_in(self) -> Float[Tensor, "d f"]:
        return self.fc_in.weight.T

    @property
    def W_out(self) -> Float[Tensor, "f d"]:
        return self.fc_out.weight.T

    @property
    def b_out(self) -> Float[Tensor, " d"]:
        bias = self.fc_out.bias
        return bias if bias is not None else self.fc_out.weight.new_zeros(len(self.fc_out.weight))


class GatedMLP(MLP):
    """``fc_out(act(gate(x)) * fc_in(x))``, without biases."""

    def __init__(self, cfg: PartConfig):
        nn.Module.__init__(self)
        self.act = ACT2FN[cfg.act_fn]
        self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.fc_in = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.fc_out = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)
        self.hook_pre, self.hook_pre_linear, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gate = self.act(self.hook_pre(self.gate(x)))
        return self.fc_out(self.hook_post(gate * self.hook_pre_linear(self.fc_in(x))))

    @property
    def W_gate(self) -> Float[Tensor, "d f"]:
        return self.gate.weight.T


# -------------------------------------------------------------------------------- blocks


class PreNormBlock(nn.Module):
    """Self-attention and MLP, each reading a norm of the residual stream and adding to it."""

    def __init__(self, cfg: PartConfig):
        super().__init__()
        norm = NORMS[cfg.normalization_type]
        self.ln1, self.ln2 = norm(cfg.d_model, cfg.eps), norm(cfg.d_model, cfg.eps)
        self.attn = Attention(cfg, causal=cfg.causal)
        self.mlp = GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)
        self.hook_resid_pre = HookPoint(borrowed=True)  # the resid_post of the block before
        self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()

    def forward(self, resid_pre: Float[Tensor, "b t d"], context: Context) -> Tensor:
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(self.ln1(resid_pre), context))
        return self.after_attention(resid_pre + attn_out, context)

    def after_attention(self, resid_mid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        """The rest of the block, from the residual stream with self-attention added."""
        return self.feed_forward(self.hook_resid_mid(resid_mid))

    def feed_forward(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The rest of the block, from the residual stream that the MLP reads."""
        return self.after_mlp(resid, self.hook_mlp_out(self.mlp(self.ln2(resid))))

    def after_mlp(self, resid: Float[Tensor, "b t d"], mlp_out: Float[Tensor, "b t d"]) -> Tensor:
        """The residual stream as it leaves the block."""
        return self.hook_resid_post(self._limited(resid + mlp_out))

    def _limited(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The residual stream as it leaves the block: as it is, here."""
        return resid


class Float16SafeBlock(PreNormBlock):
    """A block of Whisper-style encoders: in float16 its output is kept off the infinities."""

    def _limited(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if resid.dtype != torch.float16:
            return resid
        limit = torch.finfo(torch.float16).max - 1000
        return resid.clamp(-limit, limit)


class CrossAttentionBlock(PreNormBlock):
    """A pre-norm block that also reads the encoder, between self-attention and MLP."""

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg)
        self.ln_cross = NORMS[cfg.normalization_type](cfg.d_model, cfg.eps)
        self.cross_attn = Attention(cfg, causal=False, d_memory=cfg.d_model)
        self.hook_cross_attn_out, self.hook_resid_mid_cross = HookPoint(), HookPoint()

    def after_attention(self, resid_mid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        resid_mid = self.hook_resid_mid(resid_mid)
        cross_attn_out = self.hook_cross_attn_out(
            self.cross_attn(self.ln_cross(resid_mid), context)
        )
        return self.after_cross_attention(resid_mid + cross_attn_out)

    def after_cross_attention(self, resid_mid_cross: Float[Tensor, "b t d"]) -> Tensor:
        """The rest of the block, from the residual stream with cross-attention added."""
        return self.feed_forward(self.hook_resid_mid_cross(resid_mid_cross))


class Stack(nn.Module):
    """Blocks and a final norm: the body of every encoder and decoder."""

    def __init__(self, cfg: PartConfig, block: type[PreNormBlock]):
        super().__init__()
        self.cfg = cfg
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = NORMS[cfg.normalization_type](cfg.d_model, cfg.eps)
        self.hook_out = HookPoint()

    def run_blocks(
        self, resid: Float[Tensor, "b t d"], context: Context, start: int, stop: int
    ) -> Float[Tensor, "b t d"]:
        """Blocks ``start`` to ``stop`` (exclusive) on the residual stream entering ``start``."""
        for block in self.blocks[start:stop]:
            resid = block(resid, context)
        return resid

    def finish(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """From the residual stream after the last block to the part's output."""
        return self.hook_out(self.ln_final(resid))
