"""What attention heads listen to: their patterns over the seconds of a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.prompts import Places, Prompt, chosen_numbers
from audio_lens.arguments import names
from audio_lens.cache import AudioCache
from audio_lens.hooks import HookPoint
from audio_lens.inputs import InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.running import evaluating

MOST_BINS = 250  # stretches that the seconds of a clip are cut into
CROSS = "decoder.cross_attn"

Edges = Float[np.ndarray, " edges"]


@dataclass(frozen=True)
class Query:
    """What attends: a token, or a stretch of the clip."""

    label: str
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class HeadSummary:
    """What a head does on average over the queries shown.

    Attributes:
        on_audio: share of its attention that falls on the clip (the rest is on padding, text and
            other clips).
        entropy: of how it spreads over the positions of the clip, in bits.
        peak_s: the second that gets most.
    """

    layer: int
    head: int
    on_audio: float
    entropy: float
    peak_s: float


@dataclass(frozen=True)
class ClipAttention:
    """What the heads of one site look at in a clip.

    Attributes:
        site: "encoder.attn", "decoder.cross_attn" or "decoder.attn".
        layers, heads: what the first two axes of the arrays stand for.
        share: share of the attention of a query that falls into each stretch of the clip; of
            queries that are stretches themselves, the mean over their positions.
        on_audio: share of the attention of a query that falls on the clip.
        entropy: of the attention of a query within the clip, over its positions, in bits.
        edges: bounds of the stretches in seconds.
        queries: what attends.
        is_read: whether the rows are the words of a text that the stretches of the clip attend to:
            `share` is then the mean share that a word gets of the positions of a stretch,
            `on_audio` that of all, and `entropy` that of how a word's attention spreads over them.
    """

    site: str
    layers: list[int]
    heads: list[int]
    share: Float[np.ndarray, "layers heads queries bins"]
    on_audio: Float[np.ndarray, "layers heads queries"]
    entropy: Float[np.ndarray, "layers heads queries"]
    edges: Edges
    queries: list[Query]
    is_read: bool = False

    @property
    def is_timed(self) -> bool:
        """Whether queries are stretches of the clip, not tokens."""
        return self.queries[0].span is not None

    @property
    def name(self) -> str:
        """The site in words."""
        part, cross = self.site.split(".")[0], " (cross)" if self.site == CROSS else ""
        if self.is_read:
            return f"{part}, steps to text{cross}"
        steps = "steps to steps" if part == "decoder" else "frames to frames"
        return f"{part}, {steps if self.is_timed else 'text to audio'}{cross}"

    @property
    def share_head(self) -> str:
        """What `on_audio` is called in tables."""
        return "per word" if self.is_read else "on audio"

    def summary(self) -> list[HeadSummary]:
        """One line for every head."""
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        peaks = centres[self.share.mean(2).argmax(-1)]
        return [
            HeadSummary(
                layer,
                head,
                float(self.on_audio[l, h].mean()),
                float(self.entropy[l, h].mean()),
                float(peaks[l, h]),
            )
            for l, layer in enumerate(self.layers)
            for h, head in enumerate(self.heads)
        ]

    def of_head(self, layer: int, head: int) -> Float[np.ndarray, "queries bins"]:
        """The pattern of one head.

        Raises:
            ValueError: if it is not here.
        """
        if layer not in self.layers or head not in self.heads:
            raise InputError(
                f"no head {head} of layer {layer} in {self.site}: layers {self.layers}, heads "
                f"{self.heads}"
            )
        return self.share[self.layers.index(layer), self.heads.index(head)]

    def peaks(self) -> Float[np.ndarray, "layers heads"]:
        """The largest share of every head."""
        return self.share.max((-1, -2))


def timed_queries(edges: Edges) -> list[Query]:
    """Stretches of the clip as what attends."""
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return [Query(f"{start:.2f}\N{EN DASH}{end:.2f} s", (start, end)) for start, end in pairs]


# -------------------------------------------------------------------------------- reading


def sites_of(prompt: Prompt, wanted: str | Sequence[str] | None = None) -> list[str]:
    """The sites whose heads look at the clip, or from its moments at a text; all, or those wanted.

    Raises:
        InputError: for one that the model does not have.
    """
    there = [site for site in _with_patterns(prompt.model) if _lies_in_time(prompt, site)]
    chosen = there if wanted is None else names("sites", wanted)
    unknown = [site for site in chosen if site not in there]
    if unknown or not chosen:
        raise InputError(
            f"no attention to audio at {', '.join(unknown) or 'any site'}: in this model there is "
            f"{', '.join(there) or 'none'}{_profile_hint(prompt)}"
        )
    return chosen


def _with_patterns(model: HookedAudioTransformer) -> list[str]:
    """Sites with patterns, of the parts that write first."""
    cfg, hooks = model.cfg, model.hook_dict
    writing = [part for part in cfg.parts if part not in cfg.is_heard_in]
    sites = [CROSS, *(f"{part}.attn" for part in [*writing, *cfg.is_heard_in])]
    return [site for site in sites if pattern_name(site, 0) in hooks]


def _lies_in_time(prompt: Prompt, site: str) -> bool:
    """Whether queries or keys lie in the seconds of the clip, each position at another moment."""
    part = site.split(".")[0]
    if site == CROSS and prompt.reads_text:
        return len(prompt.text_places("encoder")) > 0 and len(prompt.places("decoder")) > 0
    if site == CROSS:
        return len(prompt.places("encoder")) > 0
    is_own = part not in prompt.model.cfg.further_decoders or prompt.lies_as_decoder(part)
    return is_own and len(prompt.places(part)) > 0


def _profile_hint(prompt: Prompt) -> str:
    """What to do where audio enters a language model in no order of time."""
    if not prompt.has_untimed_audio:
        return ""
    return (
        "; its audio tokens have no seconds: when each of them listens, "
        "audio_lens.analysis.time_profile.time_profile says"
    )


def pattern_name(site: str, layer: int) -> str:
    """The hook name of a layer's patterns."""
    part, sublayer = site.split(".")
    return f"{part}.blocks.{layer}.{sublayer}.hook_pattern"


def check_heads(
    model: HookedAudioTransformer,
    sites: Sequence[str],
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
) -> None:
    """Raise for layers or heads that a site does not have.

    Raises:
        InputError: naming those that there are.
    """
    for part in (site.split(".")[0] for site in sites):
        cfg = model.cfg.parts[part]
        chosen_numbers("layers", layers, cfg.n_layers, part)
        chosen_numbers("heads", heads, cfg.n_heads, part)


@torch.no_grad()
def read_attention(
    prompt: Prompt,
    sites: Sequence[str],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    cache: AudioCache | None = None,
) -> list[ClipAttention]:
    """Patterns of some sites, from a cache or else by running the model on the prompt.

    Raises:
        InputError: layers or heads that a site does not have, or a cache of another batch.
        HookNameError: a cache without these patterns.
    """
    kinds = [WordReader if site == CROSS and prompt.reads_text else Reader for site in sites]
    readers = [kind(prompt, site, layers, heads) for kind, site in zip(kinds, sites, strict=True)]
    if cache is None:
        hooks = [(name, reader) for reader in readers for name in reader.names]
        with evaluating(prompt.model):
            prompt.model.run_with_hooks(prompt.inputs, fwd_hooks=hooks, return_type=None)
    else:
        for reader in readers:
            for layer, name in zip(reader.layers, reader.names, strict=True):
                pattern = cache[name]
                reader.take(layer, pattern if cache.has_batch_dim else pattern[None])
    return [reader.attention() for reader in readers]


class Reader:
    """Takes in the patterns of a site, and keeps of them what falls on the clip."""

    def __init__(
        self,
        prompt: Prompt,
        site: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ):
        self.prompt, self.site = prompt, site
        self.part = site.split(".")[0]
        cfg = prompt.model.cfg.parts[self.part]
        self.layers = chosen_numbers("layers", layers, cfg.n_layers, self.part)
        self.heads = chosen_numbers("heads", heads, cfg.n_heads, self.part)
        self.timed = self._timed()
        self.edges, self.bins = self.timed.bins(prompt.seconds, MOST_BINS)
        self.is_timed = prompt.is_codec_lm or self.part in prompt.model.cfg.is_heard_in
        self.rows = self._rows()
        if not len(self.rows):
            raise InputError(
                f"no token of this prompt attends to the clip at {site}: answer= lets the model "
                "write some"
            )
        self._found: dict[int, tuple[Tensor, ...]] = {}

    @property
    def names(self) -> list[str]:
        """The hook names of the patterns, layer by layer."""
        return [pattern_name(self.site, layer) for layer in self.layers]

    def __call__(self, pattern: Float[Tensor, "b h q k"], hook: HookPoint) -> None:
        self.take(hook.layer(), pattern)

    def take(self, layer: int, pattern: Float[Tensor, "b h q k"]) -> None:
        """Keep the pattern of a layer."""
        own = self.prompt.own(self.part, pattern)[:, self.heads]
        self._found[layer] = tuple(x.cpu() for x in self._on_clip(own))

    def attention(self) -> ClipAttention:
        """What was taken in."""
        found = [self._found[layer] for layer in self.layers]
        share, on_audio, entropy = (torch.stack(x).numpy() for x in zip(*found, strict=True))
        queries = self._queries()
        return ClipAttention(
            self.site, self.layers, self.heads, share, on_audio, entropy, self.edges, queries
        )

    def _timed(self) -> Places:
        """The positions with seconds: what is attended to."""
        return self.prompt.places("encoder" if self.site == CROSS else self.part)

    def _rows(self) -> Places:
        """What attends: the same, or the text that can: in a language model, behind its start."""
        if self.is_timed:
            return self.timed
        text = self.prompt.text_places(self.part)
        if self.site == CROSS:
            return text
        behind = text.index > self.timed.index[0]
        return Places(text.row[behind], text.index[behind], text.seconds[behind])

    def _queries(self) -> list[Query]:
        if self.is_timed:
            return timed_queries(self.edges)
        return [Query(label) for label in self.prompt.labels(self.part, self.rows)]

    def _on_clip(self, own: Float[Tensor, "rows h q k"]) -> list[Tensor]:
        """Shares per stretch, their sum and their entropy, for what attends: ``h n ...``."""
        rows = [self._of_row(pattern, row) for row, pattern in enumerate(own)]
        found = [torch.cat(of_rows, dim=1) for of_rows in zip(*rows, strict=True)]
        if not self.is_timed:
            return found
        return [_means(values, self.bins, len(self.edges) - 1) for values in found]

    def _of_row(
        self, pattern: Float[Tensor, "h q k"], row: int
    ) -> tuple[Float[Tensor, "h n bins"], Float[Tensor, "h n"], Float[Tensor, "h n"]]:
        device = pattern.device
        queries, keys = self.rows.of_row(row).to(device), self.timed.of_row(row).to(device)
        bins = self.bins[self.timed.row == row].to(device)
        here = pattern[:, queries][..., keys].float()
        share = here.new_zeros(*here.shape[:2], len(self.edges) - 1).index_add_(-1, bins, here)
        return share, here.sum(-1), _entropy(here)


class WordReader(Reader):
    """Takes in how steps of the clip attend to the words of a text; see `ClipAttention.is_read`."""

    def _timed(self) -> Places:
        """The positions with seconds: what attends."""
        return self.prompt.places(self.part)

    def _rows(self) -> Places:
        """The words."""
        return self.prompt.text_places("encoder")

    def _queries(self) -> list[Query]:
        return [Query(label) for label in self.prompt.labels("encoder", self.rows)]

    def attention(self) -> ClipAttention:
        """What was taken in."""
        return replace(super().attention(), is_read=True)

    def _on_clip(self, own: Float[Tensor, "1 h q k"]) -> list[Tensor]:
        device = own.device
        steps, words = self.timed.index.to(device), self.rows.index.to(device)
        here = own[0][:, steps][..., words].float()
        share = _means(here, self.bins, len(self.edges) - 1).transpose(1, 2)
        return [share, here.mean(1), _entropy(here.transpose(1, 2))]


def _entropy(given: Float[Tensor, "h n m"]) -> Float[Tensor, "h n"]:
    """How attention spreads over the last axis, in bits."""
    whole = given.sum(-1, keepdim=True).clamp_min(torch.finfo(given.dtype).tiny)
    return torch.special.entr(given / whole).sum(-1) / math.log(2)


def _means(
    values: Float[Tensor, "h n *rest"], bins: Int[Tensor, " n"], n_bins: int
) -> Float[Tensor, "h bins *rest"]:
    """Means over the positions of every stretch."""
    bins = bins.to(values.device)
    sums = values.new_zeros(len(values), n_bins, *values.shape[2:]).index_add_(1, bins, values)
    counts = torch.bincount(bins, minlength=n_bins)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 2))
