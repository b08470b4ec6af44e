"""Conformer blocks (Gulati et al. 2020): a convolution and attention between two half MLPs.

As in Granite-Speech: attention in windows with Shaw's relative positions, batch norm behind the
depthwise convolution, and CTC predictions in the middle of the stack that are fed back into it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.models.layers.blocks import Block, Stack
from audio_lens.models.layers.config import PartConfig
from audio_lens.models.layers.context import Context
from audio_lens.models.layers.mlp import MLP
from audio_lens.models.layers.norms import NORMS
from audio_lens.models.layers.windowed import WindowedAttention


@dataclass
class ConformerConfig(PartConfig):
    """Shape of a stack of Conformer blocks.

    Attributes:
        n_window: positions that attend to each other.
        max_distance: the farthest relative position that has an embedding.
        d_conv, conv_kernel: channels and width of the depthwise convolution.
        d_ctc: symbols that the middle of the stack predicts.
    """

    n_window: int = 200
    max_distance: int = 512
    d_conv: int = 2048
    conv_kernel: int = 15
    d_ctc: int = 42


class ShawAttention(WindowedAttention):
    """Windowed attention whose queries also meet an embedding of how far away the key is.

    Relative positions as in Shaw et al. (2018, arXiv 1803.02155), of keys only. `hook_pos_bias`
    (``b h q k``) is what they add to the scores, and exists while somebody looks.
    """

    is_biased = True

    def __init__(self, cfg: ConformerConfig, causal: bool):
        super().__init__(cfg, causal)
        self.window = (cfg.n_window, cfg.n_window)
        self.max_distance = cfg.max_distance
        self.distance_embed = nn.Embedding(2 * cfg.max_distance + 1, cfg.d_head)
        self.hook_pos_bias = HookPoint()

    def window_bias(self, q: Float[Tensor, "w q h e"]) -> Float[Tensor, "w h q k"]:
        index = torch.arange(q.shape[1], device=q.device)
        distances = self.distance_embed(index[:, None] - index + self.max_distance)
        return einsum("w q h e, q k e -> w h q k", q, distances) * self.scale

    def whole_bias(self, q: Float[Tensor, "b q h e"]) -> Float[Tensor, "b h q k"] | None:
        n, bias = q.shape[1], super().whole_bias(q)
        return None if bias is None else self.hook_pos_bias(bias[..., :n, :n])

    def _is_watched(self) -> bool:
        return self.hook_pos_bias.has_hooks()


class FrozenBatchNorm(nn.Module):
    """Batch norm over ``b t f`` with the statistics of training, whatever mode the model is in."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))

    def forward(self, x: Float[Tensor, "b t f"]) -> Float[Tensor, "b t f"]:
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        normed = F.batch_norm(rearrange(x, "b t f -> b f t"), *statistics, eps=self.eps)
        return rearrange(normed, "b f t -> b t f")


class ConvModule(nn.Module):
    """Gated channels, a depthwise convolution over time, batch norm, and a map back."""

    def __init__(self, cfg: ConformerConfig):
        super().__init__()
        self.expand = nn.Conv1d(cfg.d_model, 2 * cfg.d_conv, kernel_size=1)
        self.depthwise = nn.Conv1d(
            cfg.d_conv, cfg.d_conv, cfg.conv_kernel, groups=cfg.d_conv, bias=False
        )
        self.norm = FrozenBatchNorm(cfg.d_conv, eps=1e-5)
        self.project = nn.Conv1d(cfg.d_conv, cfg.d_model, kernel_size=1)
        left = cfg.conv_kernel // 2
        self.padding = (left, cfg.conv_kernel - 1 - left)
        self.hook_glu, self.hook_dw, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gated = self.hook_glu(F.glu(_over_time(self.expand, x), dim=-1))
        mixed = self.hook_dw(_over_time(self.depthwise, gated, self.padding))
        return _over_time(self.project, self.hook_post(F.silu(self.norm(mixed))))


def _over_time(
    conv: nn.Conv1d, x: Float[Tensor, "b t c"], padding: tuple[int, int] = (0, 0)
) -> Float[Tensor, "b t f"]:
    """A convolution of channels-last activations, with zeros before and behind."""
    padded = F.pad(rearrange(x, "b t c -> b c t"), padding)
    return rearrange(conv(padded), "b f t -> b t f")


class ConformerBlock(Block):
    """Half an MLP, attention, a convolution, half an MLP, and a norm of the stream itself.

    The stream's stages: `resid_pre`, `resid_mid1` (with the first MLP), `resid_mid` (with
    attention), `resid_conv` (with the convolution), `resid_post` (with the second MLP),
    `normalized_resid_post`. `hook_mlp1_out` and `hook_mlp_out` are what is added: the halves.
    """

    attention = ShawAttention
    mlp_stage = "resid_conv"
    last_stage = "normalized_resid_post"
    writes = ("mlp1_out", "attn_out", "conv_out", "mlp_out")
    adds_up = False

    def __init__(self, cfg: ConformerConfig):
        super().__init__(cfg)
        norm = NORMS[cfg.normalization_type]
        self.ln_mlp1, self.ln_conv = norm(cfg.d_model, cfg.eps), norm(cfg.d_model, cfg.eps)
        self.ln_post = norm(cfg.d_model, cfg.eps)
        self.mlp1, self.conv = self.make_mlp(cfg), ConvModule(cfg)
        self.hook_mlp1_out, self.hook_resid_mid1 = HookPoint(), HookPoint()
        self.hook_conv_out, self.hook_resid_conv = HookPoint(), HookPoint()
        self.hook_normalized_resid_post = HookPoint()

    def make_mlp(self, cfg: ConformerConfig) -> MLP:
        return MLP(replace(cfg, residual_multiplier=0.5))

    def forward(self, resid_pre: Float[Tensor, "b t d"], context: Context) -> Tensor:
        return self.after_mlp1(self._with_mlp1(self.hook_resid_pre(resid_pre)), context)

    def _with_mlp1(self, resid_pre: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return resid_pre + self.hook_mlp1_out(self.mlp1(self.ln_mlp1(resid_pre)))

    def reads(self, resid_pre: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.ln1(self.hook_resid_mid1(self._with_mlp1(resid_pre)))

    def onwards(self, stage: str, resid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        if stage == "resid_mid1":
            return self.after_mlp1(resid, context)
        if stage == "resid_conv":
            return self.after_conv(resid)
        if stage == "normalized_resid_post":
            return self.hook_normalized_resid_post(resid)
        return super().onwards(stage, resid, context)

    def after_mlp1(self, resid_mid1: Float[Tensor, "b t d"], context: Context) -> Tensor:
        """The rest of the block, from the stream with the first MLP added."""
        resid_mid1 = self.hook_resid_mid1(resid_mid1)
        attn_out = self.hook_attn_out(self.attn(self.ln1(resid_mid1), context))
        return self.after_attention(resid_mid1 + attn_out, context)

    def after_attention(self, resid_mid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        resid_mid = self.hook_resid_mid(resid_mid)
        return self.after_conv(resid_mid + self.hook_conv_out(self.conv(self.ln_conv(resid_mid))))

    def after_conv(self, resid_conv: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The rest of the block, from the stream with the convolution added."""
        return self.feed_forward(self.hook_resid_conv(resid_conv))

    def feed_forward(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.after_mlp(resid, self.hook_mlp_out(self.mlp(self.ln2(resid))))

    def leave(self, resid_post: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.hook_normalized_resid_post(self.ln_post(self.hook_resid_post(resid_post)))


class SelfConditioning(nn.Module):
    """CTC predictions of the stream so far, mapped back and added to it.

    Self-conditioned CTC: Nozaki and Komatsu (2021, arXiv 2104.02724). `hook_logits` and
    `hook_probs` are ``b t symbols``, `hook_out` is what is added.
    """

    def __init__(self, cfg: ConformerConfig):
        super().__init__()
        self.unembed = nn.Linear(cfg.d_model, cfg.d_ctc)
        self.embed = nn.Linear(cfg.d_ctc, cfg.d_model)
        self.hook_logits, self.hook_probs, self.hook_out = HookPoint(), HookPoint(), HookPoint()

    def forward(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        probs = self.hook_probs(self.hook_logits(self.unembed(resid)).softmax(-1))
        return resid + self.hook_out(self.embed(probs))


class Conformer(Stack):
    """Conformer blocks with `ctc` between the two halves of the stack.

    The block before the middle gives `hook_normalized_resid_post`; the next one's
    `hook_resid_pre` is that with `ctc.hook_out` added.
    """

    def __init__(self, cfg: ConformerConfig):
        super().__init__(cfg, ConformerBlock)
        self.ctc = SelfConditioning(cfg)

    def run_blocks(
        self, resid: Float[Tensor, "b t d"], context: Context, start: int, stop: int
    ) -> Float[Tensor, "b t d"]:
        middle = self.cfg.n_layers // 2
        for layer in range(start, stop):
            resid = self.blocks[layer](resid, context)
            resid = self.ctc(resid) if layer + 1 == middle else resid
        return resid


def conformer_weight_names(theirs: str, ours: str) -> dict[str, str]:
    """The name table of Granite-Speech's blocks: ``theirs`` and ``ours`` are the prefixes.

    The map to keys and values is one tensor there; it is to be cut into `to_k` and `to_v`.
    """
    block = {
        "ff1.pre_norm": "ln_mlp1",
        "ff1.up_proj": "mlp1.fc_in",
        "ff1.down_proj": "mlp1.fc_out",
        "attn.pre_norm": "ln1",
        "attn.to_q": "attn.q_proj",
        "attn.to_k": "attn.k_proj",
        "attn.to_v": "attn.v_proj",
        "attn.to_out": "attn.o_proj",
        "attn.rel_pos_emb": "attn.distance_embed",
        "conv.norm": "ln_conv",
        "conv.up_conv": "conv.expand",
        "conv.depth_conv.conv": "conv.depthwise",
        "conv.batch_norm": "conv.norm",
        "conv.down_conv": "conv.project",
        "ff2.pre_norm": "ln2",
        "ff2.up_proj": "mlp.fc_in",
        "ff2.down_proj": "mlp.fc_out",
        "post_norm": "ln_post",
    }
    return {
        **{f"{theirs}.layers.{{l}}.{a}": f"{ours}.blocks.{{l}}.{b}" for a, b in block.items()},
        f"{theirs}.out": f"{ours}.ctc.unembed",
        f"{theirs}.out_mid": f"{ours}.ctc.embed",
    }
