"""`ActivationCache` that knows cross-attention, parts and norm gains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, SliceInput, get_act_name

from audio_lens.hooks import suggest

if TYPE_CHECKING:
    from audio_lens.models.part import Part

Stack = Float[Tensor, "components *batch_pos d_model"]
Slicing = Slice | SliceInput


class AudioCache(ActivationCache):
    """Activations of a run.

    Keys are full names, TransformerLens shorthands (``cache["z", 3]``, ``cache["z", 3,
    "cross_attn"]``) or shorthands of a part (``cache["encoder", "z", 3]``). Unprefixed names and the
    decomposing methods (`decompose_resid`, `stack_head_results` ...) mean the part that makes the
    output; `part("encoder")` gives the same for another.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        parts: dict[str, Part],
        main_part: str,
        has_batch_dim: bool = True,
        prefixed: bool = True,
    ):
        super().__init__(cache_dict, parts[main_part], has_batch_dim)
        self.parts, self.main_part, self.prefixed = parts, main_part, prefixed
        self.has_embed = self._find("hook_embed") is not None
        self.has_pos_embed = self._find("hook_pos_embed") is not None

    def __repr__(self) -> str:
        return f"AudioCache of {len(self)} activations of {', '.join(self.parts)}"

    def part(self, name: str) -> AudioCache:
        """The activations of one part under its local names.

        Raises:
            KeyError: if there is no such part.
        """
        if name not in self.parts:
            raise KeyError(f"no part named {name!r}; {suggest(name, self.parts)}")
        if not self.prefixed:
            return self
        part = self.parts[name]
        local = {part.local(key): value for key, value in self.items() if part.owns(key)}
        return AudioCache(local, {name: part}, name, self.has_batch_dim, prefixed=False)

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
            KeyError: if it was not cached; the message lists the nearest names that were.
        """
        if isinstance(key, tuple) and key[0] in self.parts:
            return self.part(key[0])[key[1:] if len(key) > 2 else key[1]]
        name = self._spelled_out(key)
        found = self._find(name)
        if found is None:
            raise KeyError(f"{name!r} is not in this cache; {suggest(name, self.cache_dict)}")
        return self.cache_dict[found]

    def _spelled_out(self, key: str | tuple) -> str:
        if isinstance(key, str):
            return key if self._find(key) else get_act_name(key)
        name, layer, sublayer = (*key, None, None)[:3]
        if layer is not None and layer < 0:
            layer += self.model.cfg.n_layers
        if sublayer == "cross_attn":
            return f"blocks.{layer}.cross_attn.hook_{name}"
        return get_act_name(name, layer, sublayer)

    # ---------------------------------------------------------------- decomposition

    def _components_of(self, layer: int, mode: str = "all") -> list[str]:
        """What a block adds to the residual stream, in order."""
        cross = ["cross_attn_out"] if self._has_cross(layer) else []
        attention = ["attn_out", *cross] if mode != "mlp" else []
        return attention + (["mlp_out"] if mode != "attn" else [])

    def _has_cross(self, layer: int) -> bool:
        return hasattr(self.model.blocks[layer], "cross_attn")

    def _layer(self, layer: int | None) -> int:
        return self.model.cfg.n_layers if layer is None or layer == -1 else layer

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Slicing = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """What each sublayer added to the residual stream entering ``layer``, cross-attention too.

        As TransformerLens's method; with ``mode="all"`` and embeddings the stack sums to the
        residual stream.
        """
        layer, positions = self._layer(layer), Slice.unwrap(pos_slice)
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
        pos_slice: Slicing = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """The residual stream entering each layer up to ``layer``; see TransformerLens.

        ``incl_mid`` adds the streams between sublayers (after cross-attention too), and
        ``mlp_input`` those of ``layer`` itself.
        """
        layer, positions = self._layer(layer), Slice.unwrap(pos_slice)
        n_layers = self.model.cfg.n_layers
        found = []
        for l in range(min(layer, n_layers - 1) + 1):
            found.append((f"{l}_pre", self["resid_pre", l]))
            if (incl_mid and l < layer) or (mlp_input and l == layer):
                cross = ["resid_mid_cross"] if self._has_cross(l) else []
                mids = ["resid_mid", *cross]
                found += [(f"{l}_{name.removeprefix('resid_')}", self[name, l]) for name in mids]
        if layer == n_layers:
            found.append(("final_post", self["resid_post", n_layers - 1]))
        stack = torch.stack([positions.apply(tensor, dim=-2) for _, tensor in found])
        if apply_ln:
            recompute = layer == n_layers
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input, positions, None, self.has_batch_dim, recompute
            )
        labels = [label for label, _ in found]
        return (stack, labels) if return_labels else stack

    def _ensure_head_results(self) -> bool:
        """Compute per-head results that were not cached; True if nothing was missing."""
        complete = True
        for l, block in enumerate(self.model.blocks):
            for sublayer in ["attn", "cross_attn"] if self._has_cross(l) else ["attn"]:
                name = f"blocks.{l}.{sublayer}.hook_result"
                if self._find(name):
                    continue
                complete = False
                weights = getattr(block, sublayer).W_O
                key = f"{self.main_part}.{name}" if self.prefixed else name
                z = self["z", l, sublayer]
                self.cache_dict[key] = torch.einsum("...he,hed->...hd", z, weights)
        return complete

    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slicing = None,
        apply_ln: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """What each head added to the residual stream entering ``layer``.

        Self-attention heads are labelled ``L0H3``, cross-attention heads ``L0H3_cross``, in the
        order in which they write.
        """
        layer, positions = self._layer(layer), Slice.unwrap(pos_slice)
        self._ensure_head_results()
        results, labels = [], []
        for l in range(layer):
            for sublayer in ["attn", "cross_attn"] if self._has_cross(l) else ["attn"]:
                results.append(positions.apply(self["result", l, sublayer], dim=-3))
                mark = "_cross" if sublayer == "cross_attn" else ""
                labels += [f"L{l}H{h}{mark}" for h in range(self.model.cfg.n_heads)]
        like = positions.apply(self["resid_pre", 0], dim=-2)
        stack = like.new_zeros(0, *like.shape)
        if results:
            stack = rearrange(torch.cat(results, dim=-2), "... heads d -> heads ... d")
        if incl_remainder:
            whole = self["resid_post", layer - 1] if layer else self["resid_pre", 0]
            stack = torch.cat([stack, (positions.apply(whole, dim=-2) - stack.sum(0))[None]])
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=positions)
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
        pos_slice: Slicing = None,
        batch_slice: Slicing = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        """The norm that reads ``layer`` (default: the final one) applied with the run's scale.

        The gain is applied, since these models keep it apart from `W_U`; the norm's bias is the
        same whatever the residual stream holds and belongs to no component, so it is left out
        (``recompute_ln`` applies the whole norm, bias included).

        Raises:
            ValueError: where the model pools positions between the blocks and that norm.
        """
        normed = super().apply_ln_to_stack(
            self._pooled_as_the_norm(residual_stack, layer),
            layer,
            mlp_input,
            pos_slice,
            batch_slice,
            has_batch_dim,
            recompute_ln,
        )
        is_whole_norm = recompute_ln and self._layer(layer) == self.model.cfg.n_layers
        return normed if is_whole_norm else normed * self._gain(layer, mlp_input)

    def _pooled_as_the_norm(self, residual_stack: Stack, layer: int | None) -> Stack:
        pools = hasattr(self.model.module, "pool")
        if pools and self._layer(layer) == self.model.cfg.n_layers:
            raise ValueError(
                f"the {self.main_part} pools pairs of frames before its final norm, so frames "
                "cannot be normed by it: use apply_ln=False, or a layer before the last"
            )
        return residual_stack

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
