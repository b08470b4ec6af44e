"""Running many changed copies of a bidirectional stack.

Every position sees every other, so a changed window changes all rows of the block it enters; but
there the other rows' queries, keys and values are still the base run's. What each query finds
outside a window is computed once for all windows (`Complement`), and a copy adds what it finds in
its own window.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.models.layers import Attention, Context
from audio_lens.patching.engine.changes import BlockEntry, Projected
from audio_lens.patching.engine.ears import sent_from
from audio_lens.patching.engine.trace import Trace

Window = tuple[int, int]
_WIDEST = 0.4  # of all positions: a wider window is not worth the complement
_FEWEST = 4  # windows for which the complement is worth its price


class Complement:
    """What attention finds outside of windows, unnormalised, for every query of one clip.

    Softmax numerators and denominators are summed segment by segment against each query's largest
    score, and a window's complement is the sum before it plus the sum behind it: nothing is ever
    subtracted.
    """

    def __init__(
        self,
        attn: Attention,
        q: Float[Tensor, "t h e"],
        k: Float[Tensor, "t kv e"],
        v: Float[Tensor, "t kv e"],
        allowed: Bool[Tensor, "#t t"] | None,
        bias: Float[Tensor, "h t t"] | None,
        windows: Sequence[Window],
    ):
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q = q.transpose(0, 1).to(self.dtype) * attn.scale
        self.allowed, self.group = allowed, attn.group
        self.bias = None if bias is None else bias.to(self.dtype)
        self.index = {window: i for i, window in enumerate(windows)}
        n_heads, n_queries, e = self.q.shape
        self.peak = self.q.new_empty(n_heads, n_queries, 1)
        self.sums = self.q.new_empty(len(windows), n_heads, n_queries, e + 1)
        with self._precisely():
            for head in range(n_heads):
                own = head // self.group
                self._sum_up(head, k[:, own].to(self.dtype), _with_ones(v[:, own].to(self.dtype)))

    @staticmethod
    def n_bytes_of_window(base: Trace) -> int:
        """Memory that the sums of one window take."""
        cfg = base.stack.cfg
        return base.n_positions * cfg.n_heads * (cfg.d_head + 1) * 4

    def _precisely(self) -> torch.autocast:
        """Sums of exponentials stay in full precision."""
        return torch.autocast(self.q.device.type, enabled=False)

    def _sum_up(self, head: int, k: Float[Tensor, "t e"], v: Float[Tensor, "t e1"]) -> None:
        scores = self.q[head] @ k.T
        if self.bias is not None:
            scores += self.bias[head]
        if self.allowed is not None:
            scores.masked_fill_(~self.allowed, -torch.inf)
        # one peak for all segments: sums against different peaks could not be added
        torch.amax(scores, -1, keepdim=True, out=self.peak[head])
        weights = scores.sub_(self.peak[head]).exp_()
        edges = sorted({0, len(k), *(edge for window in self.index for edge in window)})
        bounds = list(itertools.pairwise(edges))
        parts = [weights[:, start:end] @ v[start:end] for start, end in bounds]
        before, after = {0: torch.zeros_like(parts[0])}, {edges[-1]: torch.zeros_like(parts[0])}
        for (start, end), part in zip(bounds, parts, strict=True):
            before[end] = before[start] + part
        for (start, end), part in zip(reversed(bounds), reversed(parts), strict=True):
            after[start] = after[end] + part
        for (start, end), i in self.index.items():
            torch.add(before[start], after[end], out=self.sums[i, head])

    def attend(
        self, window: Window, k: Float[Tensor, "w kv e"], v: Float[Tensor, "w kv e"]
    ) -> tuple[Float[Tensor, "t h e"], Bool[Tensor, " t"]]:
        """``z`` of every query with other keys and values in a window.

        Also which queries found too little to be exact, where all that is left has underflowed.
        """
        k, v = (
            x.transpose(0, 1).to(self.dtype).repeat_interleave(self.group, dim=0) for x in (k, v)
        )
        v = _with_ones(v)
        with self._precisely():
            return self._merged(window, k, v)

    def _merged(
        self, window: Window, k: Float[Tensor, "h w e"], v: Float[Tensor, "h w e1"]
    ) -> tuple[Float[Tensor, "t h e"], Bool[Tensor, " t"]]:
        """The complement's sums and the window's own."""
        scores = self.q @ k.transpose(-1, -2)
        if self.bias is not None:
            scores += self.bias[..., window[0] : window[1]]
        if self.allowed is not None:
            scores.masked_fill_(~self.allowed[:, window[0] : window[1]], -torch.inf)
        # the window may hold a new largest score: what was summed against the old one is rescaled
        peak = torch.maximum(self.peak, scores.amax(-1, keepdim=True))
        total = self.sums[self.index[window]] * (self.peak - peak).exp()
        total.baddbmm_(scores.sub_(peak).exp_(), v)
        weight = total[..., -1:]
        # the old peak may have stood in the window and be gone: beside it, all else rounded to 0
        lost = (weight < torch.finfo(self.dtype).tiny * 1e8)[..., 0].any(0)
        return (total[..., :-1] / weight).transpose(0, 1), lost


def _with_ones(v: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e1"]:
    """Values with a column of ones, whose weighted sum is the denominator."""
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)


class BidirectionalWalk:
    """Runs lanes through a bidirectional stack from where they differ from a base run.

    Args:
        base: the base run.
        windows: the windows that lanes change, clip by clip: their complements are shared.
        n_held: how many windows' complements are held at once; 0 never builds one.
        leaves: whether what lanes change left the block before, not only enters the next.
    """

    def __init__(
        self, base: Trace, windows: Sequence[Sequence[Window]], n_held: int, leaves: bool = True
    ):
        self.base, self.leaves = base, leaves
        self.sent_early = sent_from(base.model, base.part)[:-1]
        n_positions = base.residuals[0].shape[1]
        self.batches = [_batches(of_clip, n_positions, n_held) for of_clip in windows]
        self._held: tuple[int, Projected] | None = None
        self._complement: tuple[tuple[int, int, int], Complement] | None = None

    def run(
        self, entries: Sequence[BlockEntry], clips: Int[Tensor, " n"]
    ) -> tuple[Int[Tensor, " a"], Float[Tensor, "a t sd"]]:
        """The lanes that change anything, and the streams that are sent on, side by side."""
        # lanes join where their patch enters and then stay: those under way run a block together,
        # and only then do the new ones come, whose first block `_enter` has run
        lanes, resid = clips.new_empty(0), self.base.residuals[0][:0]
        early = [resid for _ in self.sent_early]
        first = min((e.layer for e in entries), default=self.base.n_layers)
        for layer in range(first, self.base.n_layers + 1):
            if len(lanes) and layer < self.base.n_layers:
                resid = self.base.block(layer)(resid, self._context(clips[lanes]))
            for entry in entries:
                if entry.layer == layer and len(entry.lane):
                    joined, entered, stream = self._enter(entry, clips)
                    lanes = torch.cat([lanes, joined])
                    resid = torch.cat([resid, stream]) if len(resid) else stream
                    early = [
                        torch.cat([sent, self._left(block, layer, clips[joined], entered)])
                        for block, sent in zip(self.sent_early, early, strict=True)
                    ]
            early = [
                resid if block == layer else sent
                for block, sent in zip(self.sent_early, early, strict=True)
            ]
        return lanes, torch.cat([*early, resid], dim=-1) if early else resid

    def _left(
        self, block: int, layer: int, clips: Int[Tensor, " n"], entered: Float[Tensor, "n t d"]
    ) -> Float[Tensor, "n t d"]:
        """The stream that left a block in lanes that enter another one."""
        if block >= layer:  # not yet: what stands here is written over when it has
            return entered
        is_changed = block == layer - 1 and self.leaves
        return entered if is_changed else self.base.residuals[block + 1][clips]

    def _context(self, clips: Int[Tensor, " n"]) -> Context:
        allowed = self.base.context.allowed
        own = allowed if allowed is None or len(allowed) == 1 else allowed[clips]
        rotary = self.base.context.rotary
        if rotary is not None and len(rotary[0]) > 1:
            rotary = rotary[0][clips], rotary[1][clips]
        return replace(self.base.context, past=None, allowed=own, rotary=rotary)

    # ---------------------------------------------------------------- the block that lanes enter

    def _enter(self, entry: BlockEntry, clips: Int[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
        """The entry's lanes, and the residual stream before and behind the block they enter."""
        lanes, place = entry.lane.unique(return_inverse=True)
        clips = clips[lanes]
        resid = self.base.residuals[entry.layer][clips]
        resid[place, entry.position] = entry.values.to(resid.dtype)
        if entry.layer == self.base.n_layers:
            return lanes, resid, resid
        block = self.base.block(entry.layer)
        z = self._mixed(block.attn, resid, entry, place, clips)
        left = block.after_attention(resid + block.attn.output(z), self._context(clips))
        return lanes, resid, left

    def _mixed(
        self,
        attn: Attention,
        resid: Float[Tensor, "n t d"],
        entry: BlockEntry,
        place: Int[Tensor, " m"],
        clips: Int[Tensor, " n"],
    ) -> Float[Tensor, "n t h e"]:
        """``z`` of all rows: by complements where these are worth their price, else in full."""
        # in this block alone all rows outside the window are still the base run's
        base = self._base_projected(entry.layer)
        new = entry.projected or self.base.projected_rows(
            entry.layer, entry.values, clips[place], entry.position
        )
        z = torch.empty_like(base[0][clips])
        in_full = []
        for lane, clip in enumerate(clips.tolist()):
            own = place == lane
            changed = entry.position[own]
            found = self._shared(attn, entry.layer, clip, changed)
            if found is None:
                in_full.append(lane)
            else:
                own_base, own_new = ([x[at] for x in xs] for xs, at in ((base, clip), (new, own)))
                bias = functools.partial(self._bias, entry.layer, resid[[lane]], clips[[lane]])
                z[lane] = self._beside(attn, clip, found, changed, own_base, own_new, bias)
        if in_full:
            chosen = torch.tensor(in_full, device=place.device)
            bias = self._bias(entry.layer, resid[chosen], clips[chosen])
            in_full = self._in_full(attn, chosen, entry, place, clips, base, new, bias)
            z[chosen] = in_full.to(z.dtype)
        return z

    def _in_full(
        self,
        attn: Attention,
        chosen: Int[Tensor, " c"],
        entry: BlockEntry,
        place: Int[Tensor, " m"],
        clips: Int[Tensor, " n"],
        base: Projected,
        new: Projected,
        bias: Float[Tensor, "c h t t"] | None,
    ) -> Float[Tensor, "c t h e"]:
        """Attention of all rows to all rows."""
        rank = torch.full_like(clips, -1)
        rank[chosen] = torch.arange(len(chosen), device=chosen.device)
        here = rank[place] >= 0
        q, k, v = (held[clips[chosen]] for held in base)
        for held, rows in zip((q, k, v), new, strict=True):
            held[rank[place[here]], entry.position[here]] = rows[here].to(held.dtype)
        return attn.mix(q, k, v, self._context(clips[chosen]).allowed, bias)

    def _beside(
        self,
        attn: Attention,
        clip: int,
        found: tuple[Complement, Window],
        changed: Int[Tensor, " w"],
        base: Sequence[Float[Tensor, "t _ e"]],
        new: Sequence[Float[Tensor, "w _ e"]],
        bias: Callable[[Tensor], Tensor | None],
    ) -> Float[Tensor, "t h e"]:
        """``z`` of all rows from the complement of the lane's window.

        Changed rows have new queries, which ask everywhere, and so do those that found nothing.
        """
        complement, (start, end) = found
        q, k, v = base[0], base[1].clone(), base[2].clone()
        k[changed], v[changed] = new[1].to(k.dtype), new[2].to(v.dtype)
        z, lost = complement.attend((start, end), k[start:end], v[start:end])
        lost[changed] = False
        again = lost.nonzero()[:, 0]
        asking = torch.cat([changed, again])
        allowed = self._context(torch.tensor([clip], device=q.device)).allowed
        if allowed is not None and allowed.shape[2] > 1:
            allowed = allowed[:, :, asking]
        z, q = z.to(q.dtype), torch.cat([new[0].to(q.dtype), q[again]])
        z[asking] = attn.mix(q[None], k[None], v[None], allowed, bias(asking))[0].to(z.dtype)
        return z

    def _bias(
        self,
        layer: int,
        resid: Float[Tensor, "n t d"],
        clips: Int[Tensor, " n"],
        queries: Int[Tensor, " q"] | None = None,
    ) -> Float[Tensor, "n h q t"] | None:
        """What a block that reads these streams adds to its scores, of some queries or of all."""
        block, context = self.base.block(layer), self._context(clips)
        if not block.attn.is_biased:
            return None
        if queries is not None:
            own = context.need_position_bias[:, queries]
            resid, context = resid[:, queries], replace(context, allowed=None, position_bias=own)
        return block.attn.bias(block.reads(resid), context)

    # ---------------------------------------------------------------- what lanes share

    def _base_projected(self, layer: int) -> Projected:
        if self._held is None or self._held[0] != layer:
            self._held = layer, self.base.projected(layer, self.base.residuals[layer])
        return self._held[1]

    def _shared(
        self, attn: Attention, layer: int, clip: int, changed: Int[Tensor, " w"]
    ) -> tuple[Complement, Window] | None:
        """The complement that serves these changed rows, and the window of it.

        None where the softmax is rounded, which the complement's is not.
        """
        if attn.softmax_float32 and attn.attn_mode == "explicit":
            return None
        bounds = int(changed.min()), int(changed.max()) + 1
        for number, batch in enumerate(self.batches[clip]):
            holding = [w for w in batch if w[0] <= bounds[0] and bounds[1] <= w[1]]
            if holding:
                window = min(holding, key=lambda w: w[1] - w[0])
                return self._complement_of(attn, (layer, clip, number)), window
        return None

    def _complement_of(self, attn: Attention, key: tuple[int, int, int]) -> Complement:
        if self._complement is None or self._complement[0] != key:
            self._complement = None  # never two at once
            layer, clip, number = key
            q, k, v = (x[clip] for x in self._base_projected(layer))
            allowed = self.base.context.allowed
            own = None if allowed is None else allowed[clip % len(allowed), 0]
            at = torch.tensor([clip], device=q.device)
            bias = self._bias(layer, self.base.residuals[layer][at], at)
            bias = None if bias is None else bias[0]
            made = Complement(attn, q, k, v, own, bias, self.batches[clip][number])
            self._complement = key, made
        return self._complement[1]


def _batches(windows: Sequence[Window], n_positions: int, n_held: int) -> list[list[Window]]:
    """The windows worth a complement, so many at a time."""
    worth = sorted({w for w in windows if w[1] - w[0] <= _WIDEST * n_positions})
    if n_held < _FEWEST or len(worth) < _FEWEST:
        return []
    return [worth[start : start + n_held] for start in range(0, len(worth), n_held)]
