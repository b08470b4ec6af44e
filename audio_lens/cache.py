"""`ActivationCache` that knows cross-attention, parts and norm gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from einops import rearrange
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name
from transformer_lens.utilities.slice import Slice

from audio_lens.hooks import (
    HookNameError,
    PosSlice,
    as_slice,
    is_flat,
    is_large,
    slice_input,
    suggest,
)

Stack = Float[Tensor, "components *batch_pos d_model"]


@runtime_checkable
class CachedPart(Protocol):
    """What a cache asks of the part its activations belong to; `Part` is one."""

    @property
    def cfg(self) -> Any: ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    def owns(self, name: str) -> bool: ...

    def local(self, name: str) -> str: ...


class AudioCache(ActivationCache):
    """Activations of a run.

    Keys are full names, TransformerLens shorthands (``cache["z", 3]``, ``cache["z", 3,
    "cross_attn"]``) or shorthands of a part (``cache["encoder", "z", 3]``). Unprefixed names and
    the decomposing methods (`decompose_resid`, `stack_head_results` ...) mean the part that makes
    the output; `part("encoder")` gives the same for another.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        parts: Mapping[str, CachedPart],
        main_part: str,
        has_batch_dim: bool = True,
        prefixed: bool = True,
    ):
        super().__init__(cache_dict, parts[main_part], has_batch_dim)
        self.parts, self.main_part, self.prefixed = parts, main_part, prefixed
        self.has_embed = hasattr(self._module, "hook_embed")
        self.has_pos_embed = hasattr(self._module, "hook_pos_embed")

    def __repr__(self) -> str:
        return f"AudioCache of {len(self)} activations of {', '.join(self.parts)}"

    @property
    def _module(self) -> nn.Module:
        """The main part as it stands in the model."""
        return self.parts[self.main_part].module

    def part(self, name: str) -> AudioCache:
        """The activations of one part under its local names.

        Raises:
            HookNameError: if there is no such part.
        """
        if name not in self.parts:
            raise HookNameError(f"no part named {name!r}; {suggest(name, self.parts)}")
        if not self.prefixed:
            return self
        part = self.parts[name]
        local = {part.local(key): value for key, value in self.items() if part.owns(key)}
        return AudioCache(local, {name: part}, name, self.has_batch_dim, prefixed=False)

    # ---------------------------------------------------------------- batch axis

    def _batch_size(self) -> int:
        sizes = {len(tensor) for name, tensor in self.items() if not is_flat(name)}
        if len(sizes) > 1:
            raise ValueError(
                "some prompts hold several clips, so the first axis counts prompts in the decoder "
                "and clips in the encoder: slice one part, cache.part(...)"
            )
        return sizes.pop() if sizes else 1

    def apply_slice_to_batch_dim(self, batch_slice: PosSlice) -> AudioCache:
        """The activations of some prompts; flat ones (`hook_audio_embed`) are left out.

        Raises:
            ValueError: if there is no batch axis, or it counts prompts here and clips there.
        """
        rows = as_slice(batch_slice)
        if not self.has_batch_dim:
            raise ValueError("this cache has no batch axis")
        self._batch_size()
        chosen = {n: rows.apply(tensor, dim=0) for n, tensor in self.items() if not is_flat(n)}
        return AudioCache(chosen, self.parts, self.main_part, rows.mode != "int", self.prefixed)

    # ---------------------------------------------------------------- keys

    def _find(self, name: str) -> str | None:
        """The key under which a full or main-part name is held."""
        candidates = (name, f"{self.main_part}.{name}", name.removeprefix(f"{self.main_part}."))
        return next((key for key in candidates if key in self.cache_dict), None)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __getitem__(self, key: str | tuple) -> Tensor:
        """The activation of a name or shorthand.

        Raises:
            HookNameError: if it was not cached; the message lists the nearest names that were.
        """
        if isinstance(key, tuple) and len(key) > 1 and isinstance(key[1], str):
            return self.part(key[0])[key[1:] if len(key) > 2 else key[1]]
        name = self._spelled_out(key)
        found = self._find(name)
        if found is None:
            hint = " (kept only with attention=True, or by name)" if is_large(name) else ""
            raise HookNameError(
                f"{name!r} is not in this cache{hint}; {suggest(name, self.cache_dict)}"
            )
        return self.cache_dict[found]

    def _spelled_out(self, key: str | tuple) -> str:
        if isinstance(key, str):
            return key if self._find(key) else get_act_name(key)
        name, layer, sublayer = key[0], *(*key[1:], None, None)[:2]
        if layer is not None and layer < 0:
            layer += self.model.cfg.n_layers
        found = get_act_name(name, layer, sublayer)
        is_cross = sublayer == "cross_attn"  # which TransformerLens takes for self-attention
        return found.replace(".attn.", ".cross_attn.") if is_cross else found

    # ---------------------------------------------------------------- decomposition

    def _components_of(self, layer: int, mode: str = "all") -> list[str]:
        """What a block adds to the residual stream, in order."""
        writes = self.model.blocks[layer].writes
        return [name for name in writes if mode == "all" or ("attn" in name) == (mode == "attn")]

    def _attentions(self, layer: int) -> list[str]:
        """The attention sublayers of a block, in the order in which they write."""
        return ["attn", "cross_attn"] if self._has_cross(layer) else ["attn"]

    def _has_cross(self, layer: int) -> bool:
        return hasattr(self.model.blocks[layer], "cross_attn")

    def _check_adds_up(self) -> None:
        if not all(block.adds_up for block in self.model.blocks):
            raise ValueError(
                f"the residual stream of the {self.main_part} is no sum of what its layers write: "
                "every block norms it. Use accumulated_resid, or patching"
            )

    def _layer(self, layer: int | None) -> int:
        return self.model.cfg.n_layers if layer is None or layer == -1 else layer

    def _stream_into(self, layer: int, mlp_input: bool = False) -> Float[Tensor, "*batch_pos d"]:
        """The residual stream that the first norm of a block reads, or its MLP's, or the last."""
        if mlp_input:
            return self[self.model.blocks[layer].mlp_stage, layer]
        if layer == self.model.cfg.n_layers:
            return self[self.model.blocks[-1].last_stage, layer - 1]
        return self["resid_pre", layer]

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """What each sublayer added to the residual stream entering ``layer``, cross-attention too.

        As TransformerLens's method; with ``mode="all"`` and embeddings the stack sums to the
        residual stream.

        Raises:
            ValueError: where the stream is no such sum (post-norm blocks).
        """
        self._check_adds_up()
        layer, positions = self._layer(layer), as_slice(pos_slice)
        found = []
        if incl_embeds:
            found += [("embed", self["hook_embed"])] if self.has_embed else []
            found += [("pos_embed", self["hook_pos_embed"])] if self.has_pos_embed else []
        for l in range(layer):
            found += [(f"{l}_{name}", self[name, l]) for name in self._components_of(l, mode)]
        if mlp_input and mode != "mlp":
            found += [(f"{layer}_{n}", self[n, layer]) for n in self._components_of(layer, "attn")]
        stack = torch.stack([positions.apply(tensor, dim=-2) for _, tensor in found])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, positions)
        labels = [label for label, _ in found]
        return (stack, labels) if return_labels else stack

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """The residual stream entering each layer up to ``layer``; see TransformerLens.

        ``incl_mid`` adds the streams between sublayers (after cross-attention too), and
        ``mlp_input`` those of ``layer`` itself.
        """
        layer, positions = self._layer(layer), as_slice(pos_slice)
        n_layers = self.model.cfg.n_layers
        found = []
        for l in range(min(layer, n_layers - 1) + 1):
            found.append((f"{l}_pre", self["resid_pre", l]))
            if (incl_mid and l < layer) or (mlp_input and l == layer):
                cross = ["resid_mid_cross"] if self._has_cross(l) else []
                mids = ["resid_mid", *cross]
                found += [(f"{l}_{name.removeprefix('resid_')}", self[name, l]) for name in mids]
        if layer == n_layers:
            found.append(("final_post", self._stream_into(n_layers)))
        stack = torch.stack([positions.apply(tensor, dim=-2) for _, tensor in found])
        if apply_ln:
            recompute = layer == n_layers
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input, positions, None, self.has_batch_dim, recompute
            )
        labels = [label for label, _ in found]
        return (stack, labels) if return_labels else stack

    def _head_results(self, layer: int, sublayer: str) -> Float[Tensor, "*batch_pos h d"]:
        """What each head writes; where it was not cached, it is computed once and kept."""
        name = f"blocks.{layer}.{sublayer}.hook_result"
        if self._find(name) is None:
            key = f"{self.main_part}.{name}" if self.prefixed else name
            weights = getattr(self.model.blocks[layer], sublayer).W_O
            z = self["z", layer, sublayer]
            self.cache_dict[key] = einsum("... h e, h e d -> ... h d", z, weights)
        return self[name]

    def _ensure_head_results(self) -> bool:
        """Compute all per-head results; True if nothing was missing."""
        n_before = len(self)
        for layer in range(self.model.cfg.n_layers):
            for sublayer in self._attentions(layer):
                self._head_results(layer, sublayer)
        return len(self) == n_before

    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """What each head added to the residual stream entering ``layer``.

        Self-attention heads are labelled ``L0H3``, cross-attention heads ``L0H3_cross``, in the
        order in which they write.
        """
        layer, positions = self._layer(layer), as_slice(pos_slice)
        results, labels = [], []
        for l in range(layer):
            for sublayer in self._attentions(l):
                results.append(positions.apply(self._head_results(l, sublayer), dim=-3))
                mark = "_cross" if sublayer == "cross_attn" else ""
                labels += [f"L{l}H{h}{mark}" for h in range(self.model.cfg.n_heads)]
        if results:
            stack = rearrange(torch.cat(results, dim=-2), "... heads d -> heads ... d")
        else:
            stream = positions.apply(self._stream_into(0), dim=-2)
            stack = stream.new_zeros(0, *stream.shape)
        if incl_remainder:
            whole = positions.apply(self._stream_into(layer), dim=-2)
            stack = torch.cat([stack, (whole - stack.sum(0))[None]])
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=positions)
        return (stack, labels) if return_labels else stack

    def stack_neuron_results(
        self,
        layer: int,
        pos_slice: PosSlice = None,
        neuron_slice: PosSlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """What each neuron added to the residual stream entering ``layer``; see TransformerLens.

        The remainder is of what ``layer`` (or its MLP, with ``mlp_input``) reads.
        """
        layer, positions = self._layer(layer), as_slice(pos_slice)
        options = {"apply_ln": apply_ln, "mlp_input": mlp_input, "return_labels": True}
        neurons = slice_input(neuron_slice)
        found = super().stack_neuron_results(
            layer, positions, neurons, project_output_onto=project_output_onto, **options
        )
        stack, labels = cast("tuple[Tensor, list[str]]", found)  # by return_labels
        if incl_remainder:
            whole = positions.apply(self._stream_into(layer, mlp_input), dim=-2)[None]
            if apply_ln:
                whole = self.apply_ln_to_stack(whole, layer, mlp_input, positions)
            if project_output_onto is not None:
                whole = whole @ project_output_onto
            stack = torch.cat([stack, whole - stack.sum(0)])
            labels.append("remainder")
        return (stack, labels) if return_labels else stack

    # ---------------------------------------------------------------- norm gains

    def _gain(self, layer: int | None, mlp_input: bool) -> Float[Tensor, " d"]:
        """Gain of the norm that reads the residual stream entering ``layer``."""
        layer = self._layer(layer)
        if layer == self.model.cfg.n_layers:
            return self.model.ln_final.weight
        block = self.model.blocks[layer]
        return (block.ln2 if mlp_input else block.ln1).weight

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: PosSlice = None,
        batch_slice: PosSlice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "components *batch_pos_out d_model"]:
        """The norm that reads ``layer`` (default: the final one) applied with the run's scale.

        The gain is applied, since these models keep it apart from `W_U`; the norm's bias is the
        same whatever the residual stream holds and belongs to no component, so it is left out
        (``recompute_ln`` applies the whole norm, bias included).

        Raises:
            ValueError: where the model pools positions between the blocks and that norm, or where
                blocks norm the stream itself.
        """
        self._check_adds_up()
        is_final = self._layer(layer) == self.model.cfg.n_layers
        if is_final and hasattr(self._module, "pool"):
            raise ValueError(
                f"the {self.main_part} pools pairs of frames before its final norm, so frames "
                "cannot be normed by it: use apply_ln=False, or a layer before the last"
            )
        rows, positions = slice_input(batch_slice), slice_input(pos_slice)
        normed = super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, positions, rows, has_batch_dim, recompute_ln
        )
        is_whole_norm = recompute_ln and is_final
        return normed if is_whole_norm else normed * self._gain(layer, mlp_input)

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Slice,
        neuron_slice: Slice,
        project_2d: Float[Tensor, "d outs"],
        mlp_input: bool = False,
    ) -> Any:
        gain = self._gain(layer, mlp_input)
        return super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, gain[:, None] * project_2d, mlp_input
        )
