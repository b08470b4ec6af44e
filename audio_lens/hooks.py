"""What audio_lens adds to transformer_lens's `HookedRootModule`.

Names resolve (unprefixed TransformerLens names mean the part that makes the output), names and
filters that match nothing raise with the nearest names, hooks that never ran raise, `pos_slice`
knows which axis is the position, and caches leave out what is as large as the model itself unless
somebody asks.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.utilities.slice import Slice, SliceInput

from audio_lens import arguments
from audio_lens.arguments import suggest
from audio_lens.errors import AudioLensError, InputError, RangeError
from audio_lens.hook_points import HookError as HookError
from audio_lens.hook_points import HookFn, HookPoint, Watched, is_ours, plain
from audio_lens.running import alone, exclusive

AttnMode = Literal["auto", "explicit", "sdpa"]
Hooks = Sequence[tuple["str | Callable[[str], bool]", HookFn]]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
PosSlice = Slice | SliceInput | slice
_Listed = list[tuple["str | Callable[..., Any]", HookFn]]  # hooks as transformer_lens takes them

_RUNS = {"encode", "decode", "read_out", "generate", "continued", "speak"}  # beside the call
_PER_PAIR = ("hook_attn_scores", "hook_pattern")
_LARGE = (*_PER_PAIR, "hook_result")
_FUSED = (
    'attention scores and patterns do not exist in attn_mode "sdpa": use "auto" (written out '
    'where somebody looks) or "explicit"'
)


class HookNameError(AudioLensError, KeyError):
    """A hook name or filter that matches no hook point."""

    def __str__(self) -> str:
        return str(self.args[0])


class DeadHookError(AudioLensError, RuntimeError):
    """A hook that could have no effect: its point did not run in the call."""


def local_name(name: str) -> str:
    """The last piece of a hook name: ``decoder.blocks.3.attn.hook_q`` -> ``hook_q``."""
    return name.rsplit(".", 1)[-1]


def position_dim(name: str) -> int | None:
    """Axis of the part's own positions in the activation of this name, None where it has none.

    Keys and values of cross-attention lie on the encoder's positions (as does what LoRA adds to
    them), `hook_audio_embed` is flat and `hook_audio` lies on samples, so none of these has one;
    patterns and scores are addressed by their queries.
    """
    last = local_name(name)
    if re.search(r"\.cross_attn\.(hook_[kv]$|[kv]_proj\.)", name):
        return None
    if last in ("hook_mel", "hook_conv1", "hook_audio") or is_flat(name):
        return None
    return 2 if last in (*_PER_PAIR, "hook_codes") else 1


def is_flat(name: str) -> bool:
    """Whether the activation has no batch axis: the audio embeddings of all prompts in one row."""
    return local_name(name).removesuffix("_grad") == "hook_audio_embed"


def is_large(name: str) -> bool:
    """Whether the activation is left out of a cache unless asked for: scores, patterns, results."""
    return local_name(name) in _LARGE


def slice_input(wanted: PosSlice) -> Slice | SliceInput:
    """What TransformerLens's functions take: by their types no slices of Python's own."""
    return as_slice(wanted) if isinstance(wanted, slice) else wanted


def as_slice(wanted: PosSlice) -> Slice:
    """As TransformerLens reads slices: an int drops the axis."""
    try:
        return wanted if isinstance(wanted, Slice) else Slice(cast("SliceInput", wanted))
    except (ValueError, TypeError) as error:
        raise InputError(f"{wanted!r} names no positions: {error}") from error


def kept_axis(wanted: PosSlice) -> Slice:
    """A slice that never drops its axis."""
    chosen = as_slice(wanted)
    return Slice([cast("int", chosen.slice)]) if chosen.mode == "int" else chosen


@runtime_checkable
class _Attends(Protocol):
    """What knows how attention is computed: attention layers."""

    attn_mode: AttnMode


class HookedRoot(HookedRootModule):
    """A root module with strict hook names. Subclasses set `output_part`."""

    output_part: str

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in _RUNS & vars(cls).keys():
            setattr(cls, name, exclusive(vars(cls)[name]))

    def __init__(self) -> None:
        super().__init__()
        self._attn_mode: AttnMode = "auto"

    # ---------------------------------------------------------------- names

    def resolve(self, name: str, part: str | None = None) -> str:
        """The full name of a hook point; unprefixed names mean ``part`` (default: the output's).

        Raises:
            HookNameError: if there is no such point; the message lists the nearest names.
        """
        for candidate in (name, f"{part or self.output_part}.{name}"):
            if candidate in self.hook_dict:
                return candidate
        raise HookNameError(f"no hook point named {name!r}; {suggest(name, self.hook_dict)}")

    def matching(
        self, names: NamesFilter, attention: bool = False, part: str | None = None
    ) -> list[str]:
        """The hook names a filter selects.

        Args:
            names: a hook name, a list of names or a predicate; None means everything but attention
                scores, patterns and per-head results.
            attention: take those three as well.
            part: stay within this part.

        Raises:
            HookNameError: if a name is unknown or a predicate matches nothing.
            DeadHookError: if ``attention`` asks for what `attn_mode` "sdpa" does not compute.
        """
        known = [n for n in self.hook_dict if part is None or n.startswith(f"{part}.")]
        if names is None:
            chosen = [name for name in known if not is_large(name)]
        elif callable(names):
            chosen = [name for name in known if names(name)]
        else:
            listed = arguments.names("hook names", names)
            chosen = [self.resolve(name, part) for name in listed]
        if not chosen:
            examples = ", ".join(known[:: max(1, len(known) // 6)])
            raise HookNameError(
                f"the filter selects none of the {len(known)} hook names; they look like {examples}"
            )
        if attention and self.attn_mode == "sdpa":
            raise DeadHookError(f"attention=True: {_FUSED}")
        large = [name for name in known if is_large(name)] if attention else []
        return list(dict.fromkeys([*chosen, *large]))

    # ---------------------------------------------------------------- threads

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self.alone():
            return super().__call__(*args, **options)

    def alone(self) -> AbstractContextManager[None]:
        """Inside a ``with`` block this thread alone runs the model; others wait.

        Every run takes this lock itself: with hooks, a cache or a sweep, until it is over, and so
        does a block of `hooks`. Take it for several calls that belong together.
        """
        return alone(self)

    # ---------------------------------------------------------------- attention mode

    @property
    def attn_mode(self) -> AttnMode:
        """How attention is computed: "auto" (fused, unless somebody hooks scores or patterns of
        that layer in this call), "explicit" (always written out) or "sdpa" (always fused).

        Raises:
            DeadHookError: "sdpa" while hooks on scores or patterns are attached.
        """
        return self._attn_mode

    @attn_mode.setter
    def attn_mode(self, mode: str) -> None:
        if mode not in ("auto", "explicit", "sdpa"):
            raise InputError(f"attn_mode must be 'auto', 'explicit' or 'sdpa', got {mode!r}")
        if mode == self._attn_mode:
            return
        with self.alone():
            self._set_attn_mode(mode)

    def _set_attn_mode(self, mode: AttnMode) -> None:
        attached = [name for name, point in self.hook_dict.items() if point.has_hooks()]
        hooked = [name for name in attached if local_name(name) in _PER_PAIR]
        if mode == "sdpa" and hooked:
            raise DeadHookError(f"hooks are attached to {', '.join(hooked[:5])}, but {_FUSED}")
        self._attn_mode = mode
        for module in self.modules():
            if isinstance(module, _Attends) and module is not self:
                module.attn_mode = mode

    @contextmanager
    def attention(self, mode: str) -> Iterator[HookedRoot]:
        """Use an attention mode inside a ``with`` block."""
        with self.alone():
            before = self.attn_mode
            self.attn_mode = mode
            try:
                yield self
            finally:
                self.attn_mode = before

    @contextmanager
    def written_out(self, parts: Sequence[str]) -> Iterator[None]:
        """Write the attention of some parts out inside a ``with`` block, whatever `attn_mode`."""
        inside = tuple(f"{part}." for part in parts)
        found: list[tuple[_Attends, AttnMode]] = [
            (module, module.attn_mode)
            for name, module in self.named_modules()
            if isinstance(module, _Attends) and name.startswith(inside)
        ]
        with self.alone():
            try:
                for module, _ in found:
                    module.attn_mode = "explicit"
                yield
            finally:
                for module, before in found:
                    module.attn_mode = before

    # ---------------------------------------------------------------- hooks

    @contextmanager
    def watching(self, hooks: Sequence[tuple[str, HookFn]]) -> Iterator[None]:
        """Attach hooks inside a ``with`` block, of which some may find nothing that runs."""
        with self.alone(), super().hooks(list(hooks)):
            yield

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFn,
        dir: Literal["fwd", "bwd"] = "fwd",
        **options: Any,
    ) -> None:
        """Attach a hook until `reset_hooks`; ``name`` is a hook name or a predicate over names.

        Raises:
            HookNameError: if the name or predicate matches nothing.
            DeadHookError: if it matches only what `attn_mode` "sdpa" does not compute.
        """
        _check_hook(name, hook)
        if dir not in ("fwd", "bwd"):
            raise InputError(f"dir must be 'fwd' or 'bwd', got {dir!r}")
        names = self.matching(name)
        if self.attn_mode == "sdpa" and all(local_name(n) in _PER_PAIR for n in names):
            raise DeadHookError(f"a hook on {_label(name)}: {_FUSED}")
        with self.alone():
            for full_name in names:
                super().add_hook(full_name, hook, dir, **options)

    def reset_hooks(self, *args: Any, **options: Any) -> None:
        """Remove hooks, as TransformerLens does; not while another thread runs the model."""
        with self.alone():
            super().reset_hooks(*args, **options)

    def hook_functions(self) -> dict[str, list[HookFn]]:
        """The functions attached in the forward pass, in order, by the name of the point."""
        listed = self.list_hooks(dir="fwd")
        return {
            name: [plain(one.user_hook) for one in handles if one.user_hook is not None]
            for name, handles in listed.items()
        }

    def torch_hooks(self) -> dict[str, list[Callable[..., Any]]]:
        """What torch's own ``register_forward_hook`` attached to modules, by their names."""
        found = {}
        for name, module in self.named_modules():
            if not isinstance(module, HookPoint):
                attached = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
                attached = [fn for fn in attached if not is_ours(fn)]
                found |= {name: attached} if attached else {}
        return found

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
            DeadHookError: on leaving, if a forward hook never ran (and does not stay attached).
        """
        _check_hooks(fwd_hooks, bwd_hooks)
        watched = [(name, Watched(_label(name), fn)) for name, fn in fwd_hooks]
        forward: _Listed = [(full, fn) for name, fn in watched for full in self.matching(name)]
        backward: _Listed = [(full, fn) for name, fn in bwd_hooks for full in self.matching(name)]
        with self.alone(), super().hooks(forward, backward, reset_hooks_end, clear_contexts):
            yield self
        dead = [fn.label for _, fn in watched if not fn.ran]
        if dead and reset_hooks_end:
            raise DeadHookError(
                f"hooks that never ran and could have no effect: {', '.join(dead)} "
                "(their points lie outside what this call computed)"
            )

    @contextmanager
    def without_hooks(self) -> Iterator[HookedRoot]:
        """Run inside a ``with`` block as if nobody had attached a forward hook."""
        with self.alone():
            hooked = [point for point in self.hook_dict.values() if point.fwd_hooks]
            held = [(point._forward_hooks, point.fwd_hooks) for point in hooked]
            try:
                for point in hooked:
                    point._forward_hooks, point.fwd_hooks = OrderedDict(), []
                yield self
            finally:
                for point, (torch_hooks, hooks) in zip(hooked, held, strict=True):
                    point._forward_hooks, point.fwd_hooks = torch_hooks, hooks

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        **options: Any,
    ) -> Any:
        """The model's output with hooks in TransformerLens form: ``[(name, fn), ...]``.

        Raises:
            HookNameError: if a name or predicate matches nothing.
            DeadHookError: if a forward hook never ran, or backward hooks would be removed before a
                backward pass can reach them.
        """
        _check_hooks(fwd_hooks, bwd_hooks)
        if bwd_hooks and reset_hooks_end:
            raise DeadHookError(
                "run_with_hooks only runs forward and then removes bwd_hooks, so they never run: "
                "call backward inside `with model.hooks(bwd_hooks=...)`, keep gradients with "
                "run_with_cache(..., incl_bwd=True), or pass reset_hooks_end=False"
            )
        return super().run_with_hooks(
            *model_args,
            fwd_hooks=list(fwd_hooks),
            bwd_hooks=list(bwd_hooks),
            reset_hooks_end=reset_hooks_end,
            **options,
        )

    # ---------------------------------------------------------------- cache

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        attention: bool = False,
        part: str | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: PosSlice = None,
        return_cache_object: bool = True,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations.

        Args:
            names_filter: a hook name, a list of names or a predicate; None keeps everything but
                attention scores, patterns and per-head results.
            attention: keep those three as well (they are the memory of the model).
            part: keep only activations of this part.
            device: where to keep the activations; None leaves them where they are.
            remove_batch_dim: drop the batch axis (batches of one only).
            incl_bwd: also run ``backward`` on the loss (needs ``return_type="loss"``) and keep
                gradients under ``name + "_grad"``.
            pos_slice: positions to keep, of ``part`` (default: the part that makes the output).
                Activations that do not lie on them are left out.
            return_cache_object: False gives a plain dict in place of the `AudioCache`.

        Returns:
            The model's output and an `AudioCache`.

        Raises:
            HookNameError: if a name is unknown or the filter matches nothing.
            DeadHookError: if a named point, or every point the filter matches, did not run.
            ValueError: if ``pos_slice`` cannot apply to a named point, or there is no loss for
                ``incl_bwd``.
        """
        is_whole = model_kwargs.get("stop_at_layer") is None
        if incl_bwd and not (is_whole and model_kwargs.get("return_type") == "loss"):
            raise InputError("incl_bwd runs backward on the loss: use return_type='loss'")
        cache, forward, backward = self.get_caching_hooks(
            names_filter,
            incl_bwd,
            device,
            remove_batch_dim,
            pos_slice=pos_slice,
            attention=attention,
            part=part,
        )
        with self.alone(), super().hooks(forward, backward, reset_hooks_end, clear_contexts):
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                output.backward()
        missing = [name for name, _ in forward if name not in cache]
        if missing and (_is_named(names_filter) or not cache):
            raise DeadHookError(f"these points did not run in this call: {', '.join(missing[:5])}")
        if not return_cache_object:
            return output, cache
        return output, self._as_cache(cache, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
        attention: bool = False,
        part: str | None = None,
    ) -> tuple[dict[str, Tensor], list, list]:
        """A dict, and the forward and backward hooks that fill it; see `run_with_cache`."""
        names = self.matching(names_filter, attention, part)
        if pos_slice is not None:
            names = self._sliceable(names, part or self.output_part, _is_named(names_filter))
        positions = kept_axis(pos_slice)
        target = _device_of(device)
        sliced = {} if pos_slice is None else {name: position_dim(name) for name in names}
        cache = {} if cache is None else cache

        def keeper(name: str, suffix: str = "") -> HookFn:
            def keep(tensor: Tensor, hook: HookPoint) -> None:
                kept = tensor.detach()
                dim = sliced.get(name)
                if dim is not None:  # as a copy: a view would hold on to all positions
                    kept = _at(positions, kept, dim, name).clone()
                if remove_batch_dim and not is_flat(name):
                    kept = _without_batch(kept, name)
                cache[name + suffix] = kept.to(target)

            keep.only_reads = True
            return keep

        forward = [(name, keeper(name)) for name in names]
        return cache, forward, [(name, keeper(name, "_grad")) for name in names] if incl_bwd else []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Attach hooks that keep activations until `reset_hooks`; returns the dict they fill."""
        cache, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache
        )
        for name, fn in forward:
            self.add_hook(name, fn)
        for name, fn in backward:
            self.add_hook(name, fn, dir="bwd")
        return cache

    def _as_cache(self, cache: dict[str, Tensor], has_batch_dim: bool) -> Any:
        """The cache object `run_with_cache` returns."""
        return cache

    def _sliceable(self, names: list[str], part: str, is_named: bool) -> list[str]:
        """The names whose activations lie on the part's own positions."""
        own = [name for name in names if self._lies_on(part, name)]
        if (is_named and len(own) < len(names)) or not own:
            others = [name for name in names if name not in own]
            raise InputError(
                f"pos_slice selects positions of the {part}; {', '.join(others[:5])} do not lie on "
                "them (slice these yourself, or cache them without pos_slice)"
            )
        return own

    def _lies_on(self, part: str, name: str) -> bool:
        is_own = name.startswith(f"{part}.") or (part == self.output_part and "." not in name)
        after_pooling = tuple(f"{part}.{x}" for x in ("hook_pooled", "ln_final", "hook_out"))
        is_pooled = f"{part}.hook_pooled" in self.hook_dict and name.startswith(after_pooling)
        return is_own and not is_pooled and position_dim(name) is not None


def _at(positions: Slice, kept: Tensor, dim: int, name: str) -> Tensor:
    try:
        return positions.apply(kept, dim=dim)
    except IndexError as error:
        raise RangeError(f"{name} has {kept.shape[dim]} positions: {error}") from error


def _device_of(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{device!r} is no device: {str(error).splitlines()[0]}") from error


def _check_hooks(*several: Hooks) -> None:
    """Raise unless each is a list of pairs of a name or filter and a function."""
    for hooks in several:
        for pair in arguments.listed("hooks", hooks, (tuple, list), "pairs (name, function)"):
            if len(pair) != 2:
                raise InputError(f"a hook is a pair (name, function), got {pair!r}")
            _check_hook(*pair)


def _check_hook(name: Any, hook: Any) -> None:
    if not (isinstance(name, str) or callable(name)):
        raise InputError(f"a hook's place is a name or a filter of names, got {name!r}")
    if not callable(hook):
        place = name if isinstance(name, str) else f"the filter {name!r}"
        raise InputError(f"a hook on {place} is a function, got {hook!r}")


def _is_named(names: NamesFilter) -> bool:
    """Whether the filter names points one by one, so that each must be there."""
    return names is not None and not callable(names)


def _label(name: str | Callable[[str], bool]) -> str:
    return name if isinstance(name, str) else f"the filter {name!r}"


def _without_batch(tensor: Tensor, name: str) -> Tensor:
    if tensor.shape[0] != 1:
        raise InputError(f"remove_batch_dim needs a batch of one, {name} has {tensor.shape[0]}")
    return tensor[0]
