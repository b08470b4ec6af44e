"""Attention in few bytes: letters for shares, coarser stretches, fewer layers."""

from __future__ import annotations

import gzip
import string
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from audio_lens.analysis.attention import ClipAttention, timed_queries
from audio_lens.errors import InputError

LEAST_BINS = 50  # stretches that the seconds of a clip are still cut into
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
TOP_LEVEL = len(LETTERS) - 1


def letters_of(attention: ClipAttention) -> list[list[str]]:
    """Every head's pattern as text: the square root of the share in 64 steps up to its peak."""
    peaks = np.maximum(attention.peaks(), np.finfo(np.float32).tiny)[..., None, None]
    levels = np.sqrt(attention.share / peaks) * TOP_LEVEL
    alphabet = np.frombuffer(LETTERS.encode(), dtype=np.uint8)
    written = alphabet[levels.round().astype(np.uint8)]
    return [[head.tobytes().decode() for head in layer] for layer in written]


def fitted(found: Sequence[ClipAttention], room: int, keeps_layers: bool) -> list[ClipAttention]:
    """The attention of several sites in at most so many compressed bytes.

    The largest is made coarser first; then every second layer is left out.

    Raises:
        ValueError: if that is not enough, or would leave out layers that were asked for.
    """
    fitting = list(found)
    sizes = [_packed_size(one) for one in fitting]
    while sum(sizes) > room:
        largest = sizes.index(max(sizes))
        fitting[largest] = _smaller(fitting[largest], keeps_layers)
        sizes[largest] = _packed_size(fitting[largest])
    return fitting


def _packed_size(attention: ClipAttention) -> int:
    return len(gzip.compress("".join("".join(l) for l in letters_of(attention)).encode()))


def _smaller(attention: ClipAttention, keeps_layers: bool) -> ClipAttention:
    if len(attention.edges) - 1 >= 2 * LEAST_BINS:
        return coarser(attention)
    if keeps_layers or len(attention.layers) == 1:
        raise InputError(
            f"{len(attention.layers)} layers of {len(attention.heads)} heads of {attention.site} "
            "are too much for one page: choose fewer with layers=, heads= or sites="
        )
    return _fewer_layers(attention)


def coarser(attention: ClipAttention) -> ClipAttention:
    """With stretches joined by twos: attention to them adds up, that of them is averaged."""
    edges, n = attention.edges, len(attention.edges) - 1
    edges = np.append(edges[:-1:2], edges[-1])
    sizes = np.add.reduceat(np.ones(n, dtype=np.float32), np.arange(0, n, 2))
    share = _joined(attention.share, -1)
    if not attention.is_timed:
        return replace(attention, share=share / sizes if attention.is_read else share, edges=edges)
    return replace(
        attention,
        share=_joined(share, -2) / sizes[:, None],
        on_audio=_joined(attention.on_audio, -1) / sizes,
        entropy=_joined(attention.entropy, -1) / sizes,
        edges=edges,
        queries=timed_queries(edges),
    )


def _joined(values: np.ndarray, axis: int) -> np.ndarray:
    return np.add.reduceat(values, np.arange(0, values.shape[axis], 2), axis=axis)


def _fewer_layers(attention: ClipAttention) -> ClipAttention:
    """With every second layer, the last one among them."""
    n = len(attention.layers)
    kept = list(range((n - 1) % 2, n, 2))
    return replace(
        attention,
        layers=[attention.layers[l] for l in kept],
        share=attention.share[kept],
        on_audio=attention.on_audio[kept],
        entropy=attention.entropy[kept],
    )
