"""One part of a model (encoder or decoder), as TransformerLens sees a model.

`transformer_lens.patching.get_act_patch_*` and the methods of `ActivationCache` run on it
unchanged: names are local (`blocks.3.attn.hook_z`), `cfg` is the part's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, SupportsIndex, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from audio_lens.arguments import suggest
from audio_lens.cache import AudioCache
from audio_lens.errors import InputError
from audio_lens.hooks import HookFn, HookNameError, HookPoint, Hooks, NamesFilter
from audio_lens.inputs import AudioInputs
from audio_lens.models.config import AudioConfig
from audio_lens.models.layers import PartConfig, Stack, bias_of


@runtime_checkable
class Whole(Protocol):
    """What a part asks of its model; `HookedAudioTransformer` is one."""

    cfg: AudioConfig
    training: bool

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def hook_dict(self) -> dict[str, HookPoint]: ...

    def device_of(self, part: str) -> torch.device: ...

    def as_inputs(self, inputs: Any) -> AudioInputs: ...

    def encoder_length(self, inputs: AudioInputs) -> int: ...

    def timeline(self, inputs: AudioInputs) -> Any: ...

    def to_single_token(self, text: str | SupportsIndex) -> int: ...

    def run_with_hooks(self, *args: Any, **options: Any) -> Any: ...

    def run_with_cache(self, *args: Any, **options: Any) -> tuple[Any, Any]: ...

    def hooks(self, *args: Any, **options: Any) -> AbstractContextManager[Any]: ...

    def add_hook(self, name: Any, hook: HookFn, *args: Any, **options: Any) -> None: ...

    def reset_hooks(self, **options: Any) -> None: ...

    def __call__(self, *args: Any, **options: Any) -> Any: ...


Model = TypeVar("Model", bound=Whole)


@dataclass(frozen=True)
class PartInputs:
    """Inputs of the whole model, with the shape ``(batch, positions)`` they have in one part."""

    inputs: AudioInputs
    shape: torch.Size

    def __len__(self) -> int:
        return self.shape[0]


class Part(Generic[Model]):
    """A view of one part of a model; it holds nothing of its own."""

    def __init__(self, model: Model, name: str):
        self.model, self.name = model, name

    def __repr__(self) -> str:
        cfg = self.model.cfg.parts[self.name]
        return (
            f"{self.name} of {self.model.cfg.model_name}: {cfg.n_layers} layers of {cfg.n_heads} "
            f"heads, d_model {cfg.d_model}, {len(self.hook_dict)} hook points"
        )

    # ---------------------------------------------------------------- what TransformerLens reads

    @property
    def module(self) -> Stack:
        return getattr(self.model, self.name)

    @property
    def cfg(self) -> PartConfig:
        """The part's shape, with the device and dtype it has now."""
        cfg = copy.copy(self.model.cfg.parts[self.name])
        cfg.device, cfg.dtype = self.model.device_of(self.name), self.model.dtype
        return cfg

    @property
    def training(self) -> bool:
        return self.model.training

    @property
    def blocks(self) -> nn.ModuleList:
        return self.module.blocks

    @property
    def ln_final(self) -> nn.Module:
        """The norm behind the last block.

        Raises:
            ValueError: if there is none (post-norm encoders).
        """
        if not self.cfg.final_norm:
            raise InputError(
                f"no norm follows the last block of the {self.name}: its blocks end with one"
            )
        return self.module.ln_final

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """The part's hook points under local names."""
        return {
            self.local(name): point
            for name, point in self.model.hook_dict.items()
            if self.owns(name)
        }

    def inputs(self, inputs: Any) -> PartInputs:
        """The model's inputs as this part's: ``.shape`` is ``(batch, positions)`` of the part.

        Raises:
            InputError: prompts without audio, for a part that carries it.
        """
        inputs = self.model.as_inputs(_unwrapped(inputs))
        if self.name == "decoder":
            return PartInputs(inputs, inputs.tokens.shape)
        if self.name == "encoder" and len(inputs.features):
            length = self.model.encoder_length(inputs)
            return PartInputs(inputs, torch.Size([len(inputs.features), length]))
        tracks = [t for row in self.model.timeline(inputs).rows for t in row.segments(self.name)]
        if not tracks:
            raise InputError(f"these inputs hold no audio, so nothing enters the {self.name}")
        return PartInputs(inputs, torch.Size([len(tracks), len(tracks[0].seconds)]))

    # ---------------------------------------------------------------- names

    def owns(self, name: str) -> bool:
        return name.startswith(f"{self.name}.")

    def local(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.")

    def resolve(self, name: str) -> str:
        """The full name of a local (or full) hook name.

        Raises:
            HookNameError: if this part has no such point.
        """
        full = name if self.owns(name) else f"{self.name}.{name}"
        if full not in self.model.hook_dict:
            raise HookNameError(f"the {self.name} has no {name!r}; {suggest(name, self.hook_dict)}")
        return full

    def _full(self, name: str | Callable[[str], bool]) -> str | Callable[[str], bool]:
        if isinstance(name, str):
            return self.resolve(name)
        return lambda full: self.owns(full) and name(self.local(full))

    def _full_filter(self, names: NamesFilter) -> NamesFilter:
        if names is None or isinstance(names, str) or callable(names):
            return None if names is None else self._full(names)
        return [self.resolve(name) for name in names]

    def _full_hooks(self, hooks: Hooks) -> list:
        return [(self._full(name), fn) for name, fn in hooks]

    # ---------------------------------------------------------------- running

    def __call__(self, x: Any = None, /, **options: Any) -> Any:
        """The model's output; an int as ``start_at_layer`` or ``stop_at_layer`` is of this part."""
        return self.model(_unwrapped(x), **self._full_options(options))

    forward = __call__

    def _full_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a run as the model takes them: ints as layers of this part, plain inputs."""
        full = dict(options)
        for name in ("start_at_layer", "stop_at_layer"):
            layer = options.get(name)
            if layer is not None and not isinstance(layer, str):
                full[name] = f"{self.name}.{layer}"
        if "inputs" in options:
            full["inputs"] = _unwrapped(options["inputs"])
        return full

    def run_with_hooks(
        self, x: Any = None, /, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **options: Any
    ) -> Any:
        """The model's output with hooks on local names; see `HookedRoot.hooks` for errors."""
        return self.model.run_with_hooks(
            _unwrapped(x),
            fwd_hooks=self._full_hooks(fwd_hooks),
            bwd_hooks=self._full_hooks(bwd_hooks),
            **self._full_options(options),
        )

    def run_with_cache(
        self,
        x: Any = None,
        /,
        names_filter: NamesFilter = None,
        return_cache_object: bool = True,
        **options: Any,
    ) -> tuple[Any, AudioCache | dict[str, Tensor]]:
        """The model's output and the part's activations under local names.

        ``names_filter`` holds local names, and ``pos_slice`` selects positions of this part; the
        rest is as `HookedRoot.run_with_cache`.
        """
        options = self._full_options(options)
        output, cache = self.model.run_with_cache(
            _unwrapped(x), names_filter=self._full_filter(names_filter), part=self.name, **options
        )
        local = cache.part(self.name)
        return output, local if return_cache_object else local.cache_dict

    @contextmanager
    def hooks(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **options: Any
    ) -> Iterator[Part[Model]]:
        """Attach hooks on local names inside a ``with`` block."""
        with self.model.hooks(self._full_hooks(fwd_hooks), self._full_hooks(bwd_hooks), **options):
            yield self

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFn,
        dir: Literal["fwd", "bwd"] = "fwd",
        **options: Any,
    ) -> None:
        self.model.add_hook(self._full(name), hook, dir, **options)

    def add_perma_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFn,
        dir: Literal["fwd", "bwd"] = "fwd",
    ) -> None:
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(self, **options: Any) -> None:
        """Remove the hooks of the whole model, as `HookedRootModule.reset_hooks`."""
        self.model.reset_hooks(**options)

    # ---------------------------------------------------------------- weights and tokens

    def _stacked(self, weight: str, sublayer: str) -> Tensor:
        of_blocks = (getattr(getattr(block, sublayer), weight) for block in self.blocks)
        return torch.stack([one.to(self.cfg.device) for one in of_blocks])

    @property
    def W_Q(self) -> Float[Tensor, "l *k h d e"]:
        """Query weights of all layers; in depth decoders with an axis of codebooks behind it."""
        return self._stacked("W_Q", "attn")

    @property
    def W_K(self) -> Float[Tensor, "l *k kv d e"]:
        return self._stacked("W_K", "attn")

    @property
    def W_V(self) -> Float[Tensor, "l *k kv d e"]:
        return self._stacked("W_V", "attn")

    @property
    def W_O(self) -> Float[Tensor, "l *k h e d"]:
        return self._stacked("W_O", "attn")

    @property
    def QK(self) -> FactoredMatrix:
        """Query-key circuits, ``l h d d``: one per query head, also under grouped keys.

        Depth decoders have one per codebook, ``l k h d d``.
        """
        return FactoredMatrix(self.W_Q, self._per_query_head(self.W_K).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """Value-output circuits, ``l h d d``: one per query head, also under grouped values.

        Depth decoders have one per codebook, ``l k h d d``.
        """
        return FactoredMatrix(self._per_query_head(self.W_V), self.W_O)

    def _per_query_head(self, weight: Float[Tensor, "l *k kv d e"]) -> Float[Tensor, "l *k h d e"]:
        return weight.repeat_interleave(self.cfg.n_heads // self.cfg.n_key_value_heads, dim=-3)

    @property
    def W_in(self) -> Float[Tensor, "l *k d f"]:
        return self._stacked("W_in", "mlp")

    @property
    def W_out(self) -> Float[Tensor, "l *k f d"]:
        return self._stacked("W_out", "mlp")

    @property
    def W_E(self) -> Float[Tensor, "v d"]:
        module = self._with_vocabulary()
        if not hasattr(module, "token_embed"):
            raise InputError(f"the {self.name} reads audio: it has no token embedding")
        return module.token_embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d v"]:
        return self._with_vocabulary().unembed.weight.T

    @property
    def b_U(self) -> Float[Tensor, " v"]:
        return bias_of(self._with_vocabulary().unembed)

    def unembed(self, resid: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch v"]:
        return self._with_vocabulary().unembed(resid)

    def _with_vocabulary(self) -> Stack:
        if not hasattr(self.module, "unembed"):
            elsewhere = "; use the decoder" if "decoder" in self.model.cfg.parts else ""
            raise InputError(f"the {self.name} has no vocabulary{elsewhere}")
        return self.module

    def to_single_token(self, text: str | SupportsIndex) -> int:
        """The id of a word that is one token; see `HookedAudioTransformer.to_single_token`."""
        return self.model.to_single_token(text)

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*batch"] | Sequence[int]
    ) -> Float[Tensor, "*batch d"]:
        """The direction of the normed residual stream that writes each token: columns of `W_U`.

        Norm gains are not folded into weights here; `AudioCache.apply_ln_to_stack` applies them.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        index = torch.as_tensor(tokens, device=self.W_U.device)
        return self.W_U.T[index]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d"]:
        """Sum of the output biases written to the residual stream before ``layer``.

        With ``mlp_input``, also those of the attention of that layer.
        """
        bias = torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=self.cfg.dtype)
        for index, block in enumerate(self.blocks[: layer + 1]):
            written: tuple[str, ...] = getattr(block, "writes", ())
            for name in written:
                is_attention = "attn" in name
                is_before = mlp_input if index == layer else True
                if is_before and (is_attention or (index < layer and include_mlp_biases)):
                    sublayer = getattr(block, name.removesuffix("_out"))
                    bias = bias + (sublayer.b_O if is_attention else sublayer.b_out)
        return bias


def _unwrapped(inputs: Any) -> Any:
    return inputs.inputs if isinstance(inputs, PartInputs) else inputs
