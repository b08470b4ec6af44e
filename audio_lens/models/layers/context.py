"""What the blocks of a stack need beside the residual stream: masks, positions, caches, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.inputs import InputError


@runtime_checkable
class MemoryReader(Protocol):
    """What reads a memory: cross-attention."""

    def memory_keys_values(self, context: Context) -> tuple[Tensor, Tensor]: ...

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None = None
    ) -> Tensor: ...


class KVCache:
    """Keys (rotated) and values of earlier positions, by attention layer.

    For decoding step by step, and for runs that differ from another only from some position on.

    Attributes:
        length: how many positions it holds.
        prompts: the inputs that filled it first; None where it was filled by hand.
    """

    def __init__(
        self, entries: dict[str, tuple[Tensor, Tensor]] | None = None, length: int = 0
    ) -> None:
        self.length = length
        self.prompts: Any = None
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
        memory_allowed: which of its positions may be read; None for all.
        past: cache of earlier positions, extended by this call.
        position_bias: added to attention scores, alike for all rows (WavLM).
    """

    allowed: Bool[Tensor, "#b 1 #q k"] | None = None
    rotary: tuple[Float[Tensor, "#b t e"], Float[Tensor, "#b t e"]] | None = None
    memory: Float[Tensor, "b s d"] | None = None
    memory_allowed: Bool[Tensor, "b 1 1 s"] | None = None
    past: KVCache | None = None
    position_bias: Float[Tensor, "h q k"] | None = None

    @property
    def need_memory(self) -> Float[Tensor, "b s d"]:
        """What cross-attention reads.

        Raises:
            InputError: if nothing was encoded.
        """
        if self.memory is None:
            raise InputError("cross-attention reads the encoder, and it did not run: pass inputs=")
        return self.memory

    @property
    def need_position_bias(self) -> Float[Tensor, "h q k"]:
        """What is added to the scores of all rows.

        Raises:
            InputError: if the stack that runs gave none.
        """
        if self.position_bias is None:
            raise InputError("these blocks need the position bias of their stack in the context")
        return self.position_bias

    def read(self, attn: MemoryReader, q: Float[Tensor, "b q h e"]) -> Float[Tensor, "b q h e"]:
        """What cross-attention finds in the memory."""
        return attn.mix(q, *attn.memory_keys_values(self), self.memory_allowed)


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
