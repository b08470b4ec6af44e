"""Blocks, and stacks of them.

Inside a block the residual stream has stages: what the block reads (`resid_pre`), with attention
added (`resid_mid`), and so on. Each stage has a hook point of that name, and `Block.onwards` runs
the rest of the block from any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.models.layers.attention import Attention
from audio_lens.models.layers.config import PartConfig
from audio_lens.models.layers.context import Context
from audio_lens.models.layers.mlp import MLP, GatedMLP
from audio_lens.models.layers.norms import NORMS, Norm
from audio_lens.models.layers.rotary import Rotary


class Block(nn.Module, ABC):
    """Self-attention and MLP, each adding to the residual stream; where the norms stand differs.

    Attributes:
        mlp_stage: the stage that the MLP adds to.
        last_stage: the stage that the next block reads.
        writes: what the block adds to the residual stream, in order.
        adds_up: whether the stream is the plain sum of what blocks write.
    """

    attention: ClassVar[type[Attention]] = Attention
    mlp_stage: ClassVar[str]
    last_stage: ClassVar[str]
    writes: ClassVar[tuple[str, ...]] = ("attn_out", "mlp_out")
    adds_up: ClassVar[bool] = True

    def __init__(self, cfg: PartConfig):
        super().__init__()
        norm = NORMS[cfg.normalization_type]
        self.ln1: Norm = norm(cfg.d_model, cfg.eps)
        self.ln2: Norm = norm(cfg.d_model, cfg.eps)
        self.attn = self.attention(cfg, causal=cfg.causal)
        self.mlp = self.make_mlp(cfg)
        self.hook_resid_pre = HookPoint(borrowed=True)  # what the block before gave
        self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()

    def make_mlp(self, cfg: PartConfig) -> nn.Module:
        """The block's MLP."""
        return GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)

    def forward(self, resid_pre: Float[Tensor, "b t d"], context: Context) -> Tensor:
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(self.reads(resid_pre), context))
        return self.after_attention(resid_pre + attn_out, context)

    @abstractmethod
    def reads(self, resid_pre: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What attention reads of the residual stream."""

    def onwards(self, stage: str, resid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        """What the next block reads, from the residual stream at a stage of this one.

        Raises:
            KeyError: for a stage that the block does not have.
        """
        if stage == "resid_mid":
            return self.after_attention(resid, context)
        return {"resid_post": self.leave}[stage](resid)

    def after_attention(self, resid_mid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        """The rest of the block, from the residual stream with self-attention added."""
        return self.feed_forward(self.hook_resid_mid(resid_mid))

    @abstractmethod
    def feed_forward(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The rest of the block, from the residual stream that the MLP adds to."""

    def after_mlp(self, resid: Float[Tensor, "b t d"], mlp_out: Float[Tensor, "b t d"]) -> Tensor:
        """The rest of the block, from the residual stream and what the MLP adds."""
        return self.leave(resid + mlp_out)

    def leave(self, resid_post: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What the next block reads, from the residual stream with everything added."""
        return self.hook_resid_post(resid_post)


class PreNormBlock(Block):
    """Attention and MLP read a norm of the residual stream, which itself is a plain sum."""

    mlp_stage = "resid_mid"
    last_stage = "resid_post"

    def reads(self, resid_pre: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.ln1(resid_pre)

    def feed_forward(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.after_mlp(resid, self.hook_mlp_out(self.mlp(self.ln2(resid))))


class PostNormBlock(Block):
    """The residual stream itself is normed, after each addition.

    `hook_resid_mid` and `hook_resid_post` are the sums, `hook_normalized_resid_mid` and
    `hook_normalized_resid_post` what flows on.
    """

    mlp_stage = "normalized_resid_mid"
    last_stage = "normalized_resid_post"
    adds_up = False

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg)
        self.hook_normalized_resid_mid, self.hook_normalized_resid_post = HookPoint(), HookPoint()

    def reads(self, resid_pre: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return resid_pre

    def onwards(self, stage: str, resid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        if stage == "normalized_resid_mid":
            return self.feed_forward(self.hook_normalized_resid_mid(resid))
        if stage == "normalized_resid_post":
            return self.hook_normalized_resid_post(resid)
        return super().onwards(stage, resid, context)

    def after_attention(self, resid_mid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        normalized = self.ln1(self.hook_resid_mid(resid_mid))
        return self.feed_forward(self.hook_normalized_resid_mid(normalized))

    def feed_forward(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.after_mlp(resid, self.hook_mlp_out(self.mlp(resid)))

    def leave(self, resid_post: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.hook_normalized_resid_post(self.ln2(self.hook_resid_post(resid_post)))


class Float16SafeBlock(PreNormBlock):
    """A block of Whisper-style encoders: in float16 its output is kept off the infinities."""

    def leave(self, resid_post: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if resid_post.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max - 1000
            resid_post = resid_post.clamp(-limit, limit)
        return super().leave(resid_post)


class CrossAttentionBlock(PreNormBlock):
    """A pre-norm block that also reads the encoder, between self-attention and MLP."""

    mlp_stage = "resid_mid_cross"
    writes = ("attn_out", "cross_attn_out", "mlp_out")

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg)
        self.ln_cross = NORMS[cfg.normalization_type](cfg.d_model, cfg.eps)
        self.cross_attn = Attention(cfg, causal=False, d_memory=cfg.d_model)
        self.hook_cross_attn_out, self.hook_resid_mid_cross = HookPoint(), HookPoint()

    def onwards(self, stage: str, resid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        if stage == "resid_mid_cross":
            return self.after_cross_attention(resid)
        return super().onwards(stage, resid, context)

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
    """Blocks and, in most, a final norm: the body of every encoder and decoder.

    Attributes:
        frames_pooled: how many positions `finish` makes one of.
        token_embed, rotary, unembed: of the stacks that read tokens, turn queries and keys by
            their positions, and write; others lack them.
    """

    frames_pooled: ClassVar[int] = 1
    token_embed: nn.Embedding
    rotary: Rotary
    unembed: nn.Linear

    def __init__(self, cfg: PartConfig, block: type[Block]):
        super().__init__()
        self.cfg = cfg
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layers))
        if cfg.final_norm:
            self.ln_final: Norm = NORMS[cfg.normalization_type](cfg.d_model, cfg.eps)
        self.hook_out = HookPoint(borrowed=not cfg.final_norm)

    def embed(self, *heard: Tensor | None) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0, from what the stack hears or reads.

        Raises:
            NotImplementedError: in stacks that something else must enter.
        """
        raise NotImplementedError(f"{type(self).__name__} has no embedding of its own")

    def run_blocks(
        self, resid: Float[Tensor, "b t d"], context: Context, start: int, stop: int
    ) -> Float[Tensor, "b t d"]:
        """Blocks ``start`` to ``stop`` (exclusive) on the residual stream entering ``start``."""
        for block in self.blocks[start:stop]:
            resid = block(resid, context)
        return resid

    def finish(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """From the residual stream after the last block to the part's output."""
        return self.hook_out(self.ln_final(resid) if self.cfg.final_norm else resid)
