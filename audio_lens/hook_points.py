"""Hook points, and what they hold of the functions attached to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint as _HookPoint
from transformer_lens.hook_points import LensHandle

from audio_lens.errors import AudioLensError, InputError

HookFn = Callable[..., Any]


class HookError(AudioLensError, RuntimeError):
    """A hook function that fails, or gives what cannot stand in its place; says at which point."""


class HookPoint(_HookPoint):
    """A transformer_lens `HookPoint` that understands prefixed names and in-place edits.

    Args:
        borrowed: the tensor that arrives also belongs to somebody else (an earlier hook point, the
            caller), so hooks that may edit it in place are given a copy.
    """

    def __init__(self, borrowed: bool = False):
        super().__init__()
        self.borrowed = borrowed

    def forward(self, x: Tensor) -> Tensor:
        return x.clone() if self.borrowed and self._may_edit() else x

    def _may_edit(self) -> bool:
        return any(not getattr(h.user_hook, "only_reads", False) for h in self.fwd_hooks)

    def add_hook(
        self, hook: HookFn, dir: Literal["fwd", "bwd"] = "fwd", *args: Any, **options: Any
    ) -> LensHandle:
        """Attach a function; what it gives must be of the activation's shape, dtype and device."""
        guarded = hook if is_ours(hook) else _Guarded(hook, dir)
        handle = super().add_hook(guarded, dir, *args, **options)
        handle.user_hook = hook
        return handle

    def layer(self) -> int:
        """Index of the block this point sits in.

        Raises:
            ValueError: if the point lies outside the blocks.
        """
        pieces = (self.name or "").split(".")
        if "blocks" not in pieces:
            raise InputError(f"{self.name!r} lies in no block, so it has no layer")
        return int(pieces[pieces.index("blocks") + 1])


class Watched:
    """A hook function that remembers whether it ran."""

    def __init__(self, label: str, fn: HookFn):
        self.label, self.fn, self.ran = label, fn, False

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Any:
        self.ran = True
        return self.fn(tensor, hook=hook)


class _Guarded:
    """A function of the user's, whose failures and unfit results name the hook point."""

    def __init__(self, fn: HookFn, dir: str):
        self.fn, self.kind = fn, "hook" if dir == "fwd" else "backward hook"

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Any:
        expected = tensor.shape, tensor.dtype, tensor.device  # the function may edit in place
        try:
            given = self.fn(tensor, hook=hook)
        except (AudioLensError, MemoryError, torch.OutOfMemoryError) as error:
            error.add_note(f"in a {self.kind} on {hook.name}")
            raise
        except Exception as error:
            failed = f"a {self.kind} on {hook.name} fails: {type(error).__name__}: {error}"
            raise HookError(failed) from error
        if given is not None:
            self._check(given, expected, str(hook.name))
        return given

    def _check(
        self, given: Any, expected: tuple[torch.Size, torch.dtype, torch.device], name: str
    ) -> None:
        """Raise for what cannot stand where the activation stood.

        Raises:
            HookError: naming the point, what was expected and what was given.
        """
        if self.kind != "hook" and isinstance(given, tuple) and len(given) == 1:
            (given,) = given
        if not isinstance(given, Tensor):
            raise HookError(
                f"a {self.kind} on {name} must give a tensor, or None to leave the activation as "
                f"it is; got {type(given).__name__}"
            )
        shape, dtype, device = expected
        differences = []
        if given.shape != shape:
            differences.append(f"shape {tuple(shape)}, got {tuple(given.shape)}")
        if given.dtype != dtype and not torch.is_autocast_enabled(device.type):
            differences.append(f"dtype {dtype}, got {given.dtype}")
        if given.device != device:
            differences.append(f"device {device}, got {given.device}")
        if differences:
            raise HookError(f"a {self.kind} on {name} must give {'; '.join(differences)}")


def plain(fn: HookFn) -> HookFn:
    """The function as it was given."""
    return fn.fn if isinstance(fn, Watched) else fn


def is_ours(fn: HookFn) -> bool:
    """Whether a function is one of this package, which may do more than the user's."""
    return str(getattr(plain(fn), "__module__", None)).startswith(f"{__package__}.")
