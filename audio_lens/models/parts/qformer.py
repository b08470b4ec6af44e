"""Q-Formers (Li et al. 2023, BLIP-2): learned queries that read audio window by window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.models.layers.blocks import PostNormBlock, Stack
from audio_lens.models.layers.config import PartConfig
from audio_lens.models.layers.context import Context
from audio_lens.models.layers.lone import LoneAttention
from audio_lens.models.layers.norms import NORMS
from audio_lens.models.layers.windowed import WindowedAttention


@dataclass
class QFormerConfig(PartConfig):
    """Shape of a Q-Former.

    Attributes:
        n_queries, n_window: queries, and positions they read, of one window.
        d_memory: width of what is read.
        cross_every: every so many blocks, from the first, one reads.
    """

    n_queries: int = 3
    n_window: int = 15
    d_memory: int = 1024
    cross_every: int = 1


class QueryAttention(WindowedAttention):
    """Attention of the queries of a window to each other, or to the positions they read."""

    def __init__(self, cfg: QFormerConfig, causal: bool, d_memory: int | None = None):
        super().__init__(cfg, causal, d_memory)
        self.window = (cfg.n_queries, cfg.n_queries if d_memory is None else cfg.n_window)


class QueryBlock(PostNormBlock):
    """A post-norm block of queries that see only each other."""

    attention = QueryAttention


class ReadingBlock(QueryBlock):
    """A block of queries that also read their window, between self-attention and MLP.

    `hook_resid_mid_cross` is the sum, `hook_normalized_resid_mid_cross` what flows on.
    """

    mlp_stage = "normalized_resid_mid_cross"

    def __init__(self, cfg: QFormerConfig):
        super().__init__(cfg)
        self.ln_cross = NORMS[cfg.normalization_type](cfg.d_model, cfg.eps)
        self.cross_attn = self.attention(cfg, causal=False, d_memory=cfg.d_memory)
        self.hook_cross_attn_out, self.hook_resid_mid_cross = HookPoint(), HookPoint()
        self.hook_normalized_resid_mid_cross = HookPoint()

    def onwards(self, stage: str, resid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        if stage == "normalized_resid_mid":
            return self.read(resid, context)
        if stage == "resid_mid_cross":
            return self.after_cross_attention(resid)
        if stage == "normalized_resid_mid_cross":
            return self.feed_forward(self.hook_normalized_resid_mid_cross(resid))
        return super().onwards(stage, resid, context)

    def after_attention(self, resid_mid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        return self.read(self.ln1(self.hook_resid_mid(resid_mid)), context)

    def read(self, resid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        """The rest of the block, from the normed stream that cross-attention adds to."""
        resid = self.hook_normalized_resid_mid(resid)
        return self.after_cross_attention(
            resid + self.hook_cross_attn_out(self.cross_attn(resid, context))
        )

    def after_cross_attention(self, resid_mid_cross: Float[Tensor, "b t d"]) -> Tensor:
        """The rest of the block, from the stream with cross-attention added."""
        normalized = self.ln_cross(self.hook_resid_mid_cross(resid_mid_cross))
        return self.feed_forward(self.hook_normalized_resid_mid_cross(normalized))


class QFormer(Stack):
    """Learned queries, the same for every window, and blocks in which they read it.

    Its positions are the queries of all windows, window after window. The keys of
    `cross_attn` are the positions read, so that a row of `cross_attn.hook_pattern` (``b h q k``,
    zero outside the window) tells which of them a query listens to.
    """

    cfg: QFormerConfig

    def __init__(self, cfg: QFormerConfig):
        super().__init__(cfg, QueryBlock)
        for layer in range(0, cfg.n_layers, cfg.cross_every):
            self.blocks[layer] = ReadingBlock(cfg)
        if cfg.n_queries == 1:  # which sees nothing but itself
            for block in self.blocks:
                block.attn = LoneAttention(cfg, causal=False)
        self.query = nn.Parameter(torch.empty(1, cfg.n_queries, cfg.d_model))
        self.ln_embed = NORMS[cfg.normalization_type](cfg.d_model, cfg.eps)

    def embed(self, memory: Float[Tensor, "b s d_memory"]) -> Float[Tensor, "b t d"]:
        """The queries of every window of what is read, which must fill whole windows."""
        n_windows = memory.shape[1] // self.cfg.n_window
        queries = repeat(self.query[0], "q d -> b (w q) d", b=len(memory), w=n_windows)
        return self.hook_embed(self.ln_embed(queries))

    def listen(self, memory: Float[Tensor, "b s d_memory"]) -> Float[Tensor, "b t d"]:
        """What the queries are after reading their windows."""
        return self.run_blocks(self.embed(memory), Context(memory=memory), 0, self.cfg.n_layers)


def qformer_weight_names(theirs: str, ours: str) -> dict[str, str]:
    """The name table of a BLIP-2 Q-Former's blocks: ``theirs`` and ``ours`` are its prefixes."""
    attention = {
        "attention.query": "q_proj",
        "attention.key": "k_proj",
        "attention.value": "v_proj",
        "output.dense": "o_proj",
    }
    block = {
        **{f"attention.{a}": f"attn.{b}" for a, b in attention.items()},
        "attention.output.LayerNorm": "ln1",
        **{f"crossattention.{a}": f"cross_attn.{b}" for a, b in attention.items()},
        "crossattention.output.LayerNorm": "ln_cross",
        "intermediate_query.dense": "mlp.fc_in",
        "output_query.dense": "mlp.fc_out",
        "output_query.LayerNorm": "ln2",
    }
    return {f"{theirs}.layer.{{l}}.{a}": f"{ours}.blocks.{{l}}.{b}" for a, b in block.items()}
