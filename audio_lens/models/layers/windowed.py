"""Attention within windows of positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.models.layers.attention import Attention


class WindowedAttention(Attention):
    """Attention in which the queries of a window see the keys of the same window and no others.

    While somebody looks at scores or patterns, these cover all positions (``b h q k``): a pattern
    is zero outside the windows. Otherwise only what lies inside them is computed.

    Attributes:
        window: how many queries and how many keys make a window; subclasses set it. A last window
            may be cut short, in queries and keys alike.
    """

    window: tuple[int, int]

    def window_bias(self, q: Float[Tensor, "w q h e"]) -> Float[Tensor, "w h q k"] | None:
        """What is added to the scores of these windows' queries: nothing, here."""
        return None

    def whole_bias(self, q: Float[Tensor, "b q h e"]) -> Float[Tensor, "b h wq wk"] | None:
        """The bias of all positions (those that fill the last window too), zero between windows."""
        bias = self.window_bias(_cut(q, self.window[0]))
        return None if bias is None else _on_diagonal(bias, len(q))

    def mix(
        self,
        q: Float[Tensor, "b q h e"],
        k: Float[Tensor, "#b k kv e"],
        v: Float[Tensor, "#b k kv e"],
        allowed: Bool[Tensor, "#b 1 #q k"] | None,
        bias: Float[Tensor, "#b h q k"] | None = None,
    ) -> Float[Tensor, "b q h e"]:
        """Values mixed by softmax of the scores within windows.

        Raises:
            ValueError: for a mask or bias beside the windows' own.
        """
        if allowed is not None or bias is not None:
            raise InputError("windowed attention takes no mask and no bias beside its own")
        if self._is_explicit() or self._is_watched():
            own = self.whole_bias(q)
            own = None if own is None else own[..., : q.shape[1], : k.shape[1]]
            return super().mix(q, k, v, self._inside(q, k), own)
        queries = _cut(q, self.window[0])
        keys, values = _cut(k, self.window[1]), _cut(v, self.window[1])
        z = self._fused(queries, keys, values, self._filled(k), self.window_bias(queries))
        return rearrange(z, "(b w) q h e -> b (w q) h e", b=len(q))[:, : q.shape[1]]

    def _is_watched(self) -> bool:
        """Whether somebody looks at something else that covers all positions."""
        return False

    def _inside(
        self, q: Float[Tensor, "b q h e"], k: Float[Tensor, "b k kv e"]
    ) -> Bool[Tensor, "1 1 q k"]:
        """Which keys lie in the window of which query."""
        of_query, of_key = (
            torch.arange(x.shape[1], device=x.device) // size
            for x, size in zip((q, k), self.window, strict=True)
        )
        return (of_query[:, None] == of_key)[None, None]

    def _filled(self, k: Float[Tensor, "b k kv e"]) -> Bool[Tensor, "w 1 1 n"] | None:
        """The keys that are there, window by window; None where all windows are full."""
        n_keys, size = k.shape[1], self.window[1]
        if n_keys % size == 0:
            return None
        index = torch.arange(-(-n_keys // size) * size, device=k.device)
        return rearrange(index < n_keys, "(w n) -> w 1 1 n", n=size).repeat(len(k), 1, 1, 1)


def _cut(x: Float[Tensor, "b t h e"], size: int) -> Float[Tensor, "w n h e"]:
    """Windows of so many positions, clip after clip; the last is filled up with zeros."""
    filled = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return rearrange(filled, "b (w n) h e -> (b w) n h e", n=size)


def _on_diagonal(bias: Float[Tensor, "bw h q k"], n_rows: int) -> Float[Tensor, "b h wq wk"]:
    """Windows' biases side by side on the diagonal, zero elsewhere."""
    blocks = rearrange(bias, "(b w) h q k -> w b h q k", b=n_rows)
    n_windows, _, n_heads, n_queries, n_keys = blocks.shape
    whole = blocks.new_zeros(n_rows, n_heads, n_windows, n_queries, n_windows, n_keys)
    index = torch.arange(n_windows, device=bias.device)
    whole[:, :, index, :, index] = blocks
    return rearrange(whole, "b h w q x k -> b h (w q) (x k)")
