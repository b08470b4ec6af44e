"""What ``audio-lens analyse paths`` runs."""

from __future__ import annotations

from audio_lens.analysis.paths.attributing import eap_ig
from audio_lens.analysis.paths.circuits import prune
from audio_lens.analysis.paths.faith import faithfulness
from audio_lens.analysis.paths.graph import Graph
from audio_lens.analysis.paths.patching import path
from audio_lens.corruptions import Silence
from audio_lens.items import Items, Pairs, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

KEPT = 0.2  # of the edges
SIZE = 2  # pairs of which there must be to find a circuit on some and test it on others


@analysis("paths")
def study(
    model: HookedAudioTransformer,
    items: Items | Pairs,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Result]:
    """Which heads and MLPs write the answer directly, and do a fifth of the edges carry it?"""
    pairs = _pairs(items)
    told = {"path": path(model, pairs, "all", "logits", seed=seed, progress=progress)}
    kept = pairs.kept(model)[0]
    if len(kept) < SIZE:
        return told
    half = len(kept) // 2
    found, held_out = kept[list(range(half))], kept[list(range(half, len(kept)))]
    told["eap_ig"] = scores = eap_ig(model, found, seed=seed, progress=progress)
    n_edges = int(Graph.of(model).exists.sum())
    circuit = prune(model, scores, max(1, round(KEPT * n_edges)))
    told["faithfulness"] = faithfulness(model, held_out, circuit, seed=seed, progress=progress)
    return told


def _pairs(items: Items | Pairs) -> Pairs:
    """Items beside their own counterparts in sound, or else beside silence."""
    if isinstance(items, Pairs):
        return items
    if all(item.other_audio is not None for item in items):
        return items.pairs(stream="audio")
    return items.pairs(Silence())
