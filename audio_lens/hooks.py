"""What audio_lens adds to transformer_lens's `HookedRootModule`.

Names resolve (unprefixed TransformerLens names mean the part that makes the output), names and
filters that match nothing raise with the nearest names, hooks that never ran raise, `pos_slice`
knows which axis is the position, and caches leave out what is as large as the model itself unless
somebody asks.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint as _HookPoint
from transformer_lens.utilities import Slice, SliceInput

logger = logging.getLogger(__name__)

AttnMode = Literal["auto", "explicit", "sdpa"]
HookFn = Callable[..., Any]
Hooks = Sequence[tuple["str | Callable[[str], bool]", HookFn]]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

_PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k", "hook_result")
_PER_PAIR = ("hook_attn_scores", "hook_pattern")
_LARGE = (*_PER_PAIR, "hook_result")


class HookNameError(KeyError):
    """A hook name or filter that matches no hook point."""

    def __str__(self) -> str:
        return str(self.args[0])


class DeadHookError(RuntimeError):
    """A hook that could have no effect: its point did not run in the call."""


class HookPoint(_HookPoint):
    """A transformer_lens `HookPoint` whose `layer` understands prefixed names."""

    def layer(self) -> int:
        """Index of the block this point sits in.

        Raises:
            ValueError: if the point lies outside the blocks.
        """
        pieces = (self.name or "").split(".")
        if "blocks" not in pieces:
            raise ValueError(f"{self.name!r} lies in no block, so it has no layer")
        return int(pieces[pieces.index("blocks") + 1])


def local_name(name: str) -> str:
    """The last piece of a hook name: ``decoder.blocks.3.attn.hook_q`` -> ``hook_q``."""
    return name.rsplit(".", 1)[-1]


def position_dim(name: str) -> int | None:
    """Axis of the part's own positions in the activation of this name, None where it has none.

    Keys and values of cross-attention lie on the encoder's positions and `hook_audio_embed` is
    flat, so neither has one; patterns and scores are addressed by their queries.
    """
    last = local_name(name)
    if ".cross_attn." in name and last in ("hook_k", "hook_v"):
        return None
    if last in ("hook_audio_embed", "hook_mel", "hook_conv1"):
        return None
    return 2 if last in _PER_PAIR else 1


def is_large(name: str) -> bool:
    """Whether the activation is left out of a cache unless asked for: scores, patterns, results."""
    return local_name(name) in _LARGE


def suggest(name: str, known: Iterable[str], count: int = 5) -> str:
    """The known names nearest to a mistaken one, as the end of an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    tail = [k for k in known if k.endswith(name)][:count]
    return "nearest names: " + ", ".join(dict.fromkeys([*tail, *near]) or known[:count])


class _Watched:
    """A hook function that remembers whether it ran."""

    def __init__(self, label: str, fn: HookFn):
        self.label, self.fn, self.ran = label, fn, False

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Any:
        self.ran = True
        return self.fn(tensor, hook=hook)


class HookedRoot(HookedRootModule):
    """A root module with strict hook names. Subclasses set `output_part`."""

    output_part: str

    def __init__(self) -> None:
        super().__init__()
        self._attn_mode: AttnMode = "auto"

    # ---------------------------------------------------------------- names

    def resolve(self, name: str) -> str:
        """The full name of a hook point; unprefixed names mean the part that makes the output.

        Raises:
            HookNameError: if there is no such point; the message lists the nearest names.
        """
        for candidate in (name, f"{self.output_part}.{name}"):
            if candidate in self.hook_dict:
                return candidate
        raise HookNameError(f"no hook point named {name!r}; {suggest(name, self.hook_dict)}")

    def matching(self, names: NamesFilter) -> list[str]:
        """The hook names a filter selects.

        Raises:
            HookNameError: if a name is unknown or a predicate matches nothing.
        """
        if names is None:
            return [name for name in self.hook_dict if not is_large(name)]
        if isinstance(names, str):
            return [self.resolve(names)]
        if not callable(names):
            if len(names) == 0:
                raise HookNameError("names_filter is an empty list: nothing would be cached")
            return list(dict.fromkeys(self.resolve(name) for name in names))
        chosen = [name for name in self.hook_dict if names(name)]
        if not chosen:
            raise HookNameError(
                "names_filter matches none of the "
                f"{len(self.hook_dict)} hook names; they look like "
                + ", ".join(list(self.hook_dict)[:: max(1, len(self.hook_dict) // 6)])
            )
        return chosen

    # ---------------------------------------------------------------- attention mode

    @property
    def attn_mode(self) -> AttnMode:
        """How attention is computed: "auto" (SDPA unless somebody hooks scores or patterns of that
        layer in this call), "explicit" (always the written-out softmax) or "sdpa" (always fused)."""
        return self._attn_mode

    @attn_mode.setter
    def attn_mode(self, mode: AttnMode) -> None:
        if mode not in ("auto", "explicit", "sdpa"):
            raise ValueError(f"attn_mode must be 'auto', 'explicit' or 'sdpa', got {mode!r}")
        self._attn_mode = mode
        for module in self.modules():
            if hasattr(module, "attn_mode") and module is not self:
                module.attn_mode = mode

    @contextmanager
    def attention(self, mode: AttnMode) -> Iterator[HookedRoot]:
        """Use an attention mode inside a ``with`` block."""
        before = self.attn_mode
        self.attn_mode = mode
        try:
            yield self
        finally:
            self.attn_mode = before

    # ---------------------------------------------------------------- hooks

    def add_hook(self, name: str | Callable[[str], bool], hook: HookFn, **options: Any) -> None:
        """Attach a hook until `reset_hooks`; ``name`` is a hook name or a predicate over names.

        Raises:
            HookNameError: if the name or predicate matches nothing.
        """
        for full_name in self.matching(name):
            super().add_hook(full_name, hook, **options)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedRoot]:
        """Attach hooks inside a ``with`` block, in TransformerLens form: ``[(name, fn), ...]``.

        Raises:
            HookNameError: if a name or predicate matches nothing.
            DeadHookError: on leaving, if a forward hook never ran.
        """
        watched = [(name, _Watched(_label(name), fn)) for name, fn in fwd_hooks]
        forward = [(full, fn) for name, fn in watched for full in self.matching(name)]
        backward = [(full, fn) for name, fn in bwd_hooks for full in self.matching(name)]
        with super().hooks(forward, backward, reset_hooks_end, clear_contexts):
            yield self
        dead = [fn.label for _, fn in watched if not fn.ran]
        if dead:
            raise DeadHookError(
                f"hooks that never ran and could have no effect: {', '.join(dead)} "
                "(their points lie outside what this call computed)"
            )

    # ---------------------------------------------------------------- cache

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        attention: bool = False,
        remove_batch_dim: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations.

        Args:
            names_filter: a hook name, a list of names or a predicate; None keeps everything but
                attention scores, patterns and per-head results.
            attention: keep those three as well (they are the memory of the model).
            remove_batch_dim: drop the batch axis (batches of one only).
            options: ``device``, ``pos_slice``, ``incl_bwd``, ``reset_hooks_end`` and
                ``clear_contexts`` as in `cache_run`; the rest goes to the model.

        Returns:
            The model's output and an `AudioCache`.

        Raises:
            HookNameError: if a name is unknown or the filter matches nothing.
            DeadHookError: if a named point did not run.
        """
        everything = names_filter is None and attention
        output, cache = self.cache_run(
            *model_args,
            names_filter=(lambda _: True) if everything else names_filter,
            part=self.output_part,
            remove_batch_dim=remove_batch_dim,
            **options,
        )
        return output, self._as_cache(cache, has_batch_dim=not remove_batch_dim)

    def cache_run(
        self,
        *model_args: Any,
        names_filter: NamesFilter,
        part: str,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Slice | SliceInput | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the model and keep activations under full names, in a plain dict.

        Args:
            part: the part whose positions ``pos_slice`` selects. Activations without them are
                left out, and raise where they were named.
            device: where to keep the activations.
            incl_bwd: also run ``backward`` on the output (use ``return_type="loss"``) and keep
                gradients under ``name + "_grad"``.
        """
        positions, names = Slice.unwrap(pos_slice), self.matching(names_filter)
        is_sliced = pos_slice is not None
        if is_sliced:
            names = self._on_positions_of(part, names, named=names_filter is not None)
        cache: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint, suffix: str = "") -> None:
            kept = tensor.detach().to(device)
            if is_sliced:
                kept = positions.apply(kept, dim=position_dim(hook.name))
            cache[hook.name + suffix] = _without_batch(kept) if remove_batch_dim else kept

        def keep_gradient(tensor: Tensor, hook: HookPoint) -> None:
            keep(tensor, hook, "_grad")

        wanted = set(names).__contains__
        gradients = [(wanted, keep_gradient)] if incl_bwd else []
        with self.hooks([(wanted, keep)], gradients, reset_hooks_end, clear_contexts):
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                output.backward()
        missing = [name for name in names if name not in cache]
        if missing and names_filter is not None and not callable(names_filter):
            raise DeadHookError(f"these points did not run in this call: {', '.join(missing)}")
        return output, cache

    def _as_cache(self, cache: dict[str, Tensor], has_batch_dim: bool) -> Any:
        """The cache object `run_with_cache` returns."""
        return cache

    def _on_positions_of(self, part: str, names: list[str], named: bool) -> list[str]:
        """The names that lie on the part's own positions."""
        own = [
            name
            for name in names
            if (name.startswith(f"{part}.") or (part == self.output_part and "." not in name))
            and position_dim(name) is not None
        ]
        if named and len(own) < len(names):
            others = [name for name in names if name not in own]
            raise ValueError(
                f"pos_slice selects positions of the {part}; {', '.join(others[:5])} do not lie on "
                "them (slice these yourself, or cache them without pos_slice)"
            )
        return own


def _label(name: str | Callable[[str], bool]) -> str:
    return name if isinstance(name, str) else f"the filter {name!r}"


def _without_batch(tensor: Tensor) -> Tensor:
    if tensor.shape[0] != 1:
        raise ValueError(f"remove_batch_dim needs a batch of one, got {tensor.shape[0]}")
    return tensor[0]
