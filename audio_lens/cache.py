"""`ActivationCache` that knows cross-attention, parts and norm gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.serialization import add_safe_globals
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name
from transformer_lens.utilities.slice import Slice

from audio_lens.arguments import whole
from audio_lens.errors import InputError, RangeError
from audio_lens.hooks import (
    HookNameError,
    PosSlice,
    as_slice,
    is_flat,
    is_large,
    kept_axis,
    slice_input,
    suggest,
)
from audio_lens.pickles import NoModel, SavedPart, all_alone

Stack = Float[Tensor, "components *batch_pos d_model"]
_STAGES_WITHIN = (
    *("resid_mid1", "resid_mid", "normalized_resid_mid"),
    *("resid_mid_cross", "normalized_resid_mid_cross", "resid_conv", "resid_mlp"),
)


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


@runtime_checkable
class ModelOfParts(Protocol):
    """What a saved cache asks of a model; `HookedAudioTransformer` is one."""

    def part(self, name: str) -> CachedPart: ...


class AudioCache(ActivationCache):
    """Activations of a run.

    Keys are full names, TransformerLens shorthands (``cache["z", 3]``, ``cache["z", 3,
    "cross_attn"]``) or shorthands of a part (``cache["encoder", "z", 3]``). Unprefixed names and
    the decomposing methods (`decompose_resid`, `stack_head_results` ...) mean the part that makes
    the output; `part("encoder")` gives the same for another.

    Pickles (``torch.save(cache, path)``) hold the activations and no model. Names work on what
    ``torch.load`` gives; methods that need weights raise `NoModelError` until `with_model`.
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
        has_model = not isinstance(self._module, NoModel)
        self.has_embed = has_model and hasattr(self._module, "hook_embed")
        self.has_pos_embed = has_model and hasattr(self._module, "hook_pos_embed")

    def __repr__(self) -> str:
        return f"AudioCache of {len(self)} activations of {', '.join(self.parts)}"

    def __copy__(self) -> AudioCache:
        return self._of_same_run(dict(self.cache_dict))

    def __deepcopy__(self, memo: dict) -> AudioCache:
        """Other activations of the same model: that is not copied."""
        copied = {name: tensor.detach().clone() for name, tensor in self.items()}
        return self._of_same_run(copied)

    def _of_same_run(self, cache_dict: dict[str, Tensor]) -> AudioCache:
        return AudioCache(cache_dict, self.parts, self.main_part, self.has_batch_dim, self.prefixed)

    def __getstate__(self) -> dict[str, Any]:
        """What pickles hold: activations, and of the parts their names and numbers of layers."""
        return {
            "cache_dict": all_alone({name: x.detach() for name, x in self.items()}),
            "n_layers": {name: part.cfg.n_layers for name, part in self.parts.items()},
            "main_part": self.main_part,
            "has_batch_dim": self.has_batch_dim,
            "prefixed": self.prefixed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = dict(state)
        n_layers = held.pop("n_layers")
        parts = {name: SavedPart(name, count) for name, count in n_layers.items()}
        AudioCache.__init__(self, parts=parts, **held)

    def with_model(self, model: ModelOfParts) -> AudioCache:
        """The same activations, beside the model that they were saved without.

        Raises:
            ValueError: if the model lacks one of the parts, or has other numbers of layers.
        """
        parts = {name: model.part(name) for name in self.parts}
        for name, part in parts.items():
            held, found = self.parts[name].cfg.n_layers, part.cfg.n_layers
            if held != found:
                raise InputError(
                    f"the cache is of another model: its {name} has {held} layers, this one {found}"
                )
        return AudioCache(self.cache_dict, parts, self.main_part, self.has_batch_dim, self.prefixed)

    @property
    def _module(self) -> Any:
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

    def remove_batch_dim(self, batch_size: int | None = None) -> AudioCache:
        """The same without its batch axis of one prompt, in place; flat entries stay as they are.

        Raises:
            ValueError: if there are several prompts.
        """
        if not self.has_batch_dim:
            return self
        size = self._batch_size() if batch_size is None else batch_size
        if size != 1:
            raise InputError(f"the batch axis holds {size} prompts: choose one of them first")
        kept = {name: x if is_flat(name) else x[0] for name, x in self.items()}
        self.cache_dict, self.has_batch_dim = kept, False
        return self

    def _batch_size(self) -> int:
        sizes = {len(tensor) for name, tensor in self.items() if not is_flat(name)}
        if len(sizes) > 1:
            raise InputError(
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
            raise InputError("this cache has no batch axis")
        self._batch_size()
        try:
            chosen = {n: rows.apply(tensor, dim=0) for n, tensor in self.items() if not is_flat(n)}
        except IndexError as error:
            raise RangeError(f"the cache has no such rows: {error}") from error
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

    def _stages_within(self, layer: int, up_to_mlp: bool) -> list[str]:
        """The stages of a block between what it reads and what it leaves."""
        block = self.model.blocks[layer]
        stages = [name for name in _STAGES_WITHIN if hasattr(block, f"hook_{name}")]
        return stages[: stages.index(block.mlp_stage) + 1] if up_to_mlp else stages

    def _mlps(self, layer: int) -> list[str]:
        """The sublayers of a block that have neurons, the MLP first."""
        names = [name.removesuffix("_out") for name in self.model.blocks[layer].writes]
        further = [name for name in names if name.startswith(("mlp", "adapter")) and name != "mlp"]
        return ["mlp", *further]

    def _check_adds_up(self) -> None:
        if not all(block.adds_up for block in self.model.blocks):
            raise InputError(
                f"the residual stream of the {self.main_part} is no sum of what its layers write: "
                "every block norms it. Use accumulated_resid, or patching"
            )

    def _layer(self, layer: int | None, mlp_input: bool = False) -> int:
        n_layers = self.model.cfg.n_layers
        layer = n_layers if layer is None or layer == -1 else layer
        whole("layer", layer, least=0, most=n_layers)
        if mlp_input and layer >= n_layers:
            raise InputError(f"no MLP reads layer {layer}: mlp_input needs one below {n_layers}")
        return layer

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
        layer, positions = self._layer(layer, mlp_input), as_slice(pos_slice)
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

        ``incl_mid`` adds the streams between sublayers (after cross-attention and norms too), and
        ``mlp_input`` those of ``layer`` itself up to what its MLP reads.
        """
        layer, positions = self._layer(layer, mlp_input), as_slice(pos_slice)
        n_layers = self.model.cfg.n_layers
        found = []
        for l in range(min(layer, n_layers - 1) + 1):
            found.append((f"{l}_pre", self["resid_pre", l]))
            if (incl_mid and l < layer) or (mlp_input and l == layer):
                mids = self._stages_within(l, up_to_mlp=l == layer)
                found += [(f"{l}_{name.replace('resid_', '')}", self[name, l]) for name in mids]
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
            if weights.ndim == 4:
                weights = _of_positions(weights, z.shape[-3])
                result = einsum("... p h e, p h e d -> ... p h d", z, weights)
            else:
                result = einsum("... h e, h e d -> ... h d", z, weights)
            self.cache_dict[key] = result
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
        order in which they write. Where blocks norm the stream, they are given as they wrote.

        Raises:
            ValueError: of a remainder or norm where the stream is no sum of what is written.
        """
        layer, positions = self._layer(layer), as_slice(pos_slice)
        if incl_remainder:
            self._check_adds_up()
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

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """The stream by heads, neurons (or MLPs), embeddings and biases; see TransformerLens.

        Raises:
            ValueError: where the stream is no such sum (post-norm blocks, conformers), or where
                neurons are asked for and what writes has none (experts).
        """
        self._check_adds_up()
        return super().get_full_resid_decomposition(
            self._layer(layer, mlp_input),
            mlp_input,
            expand_neurons,
            apply_ln,
            as_slice(pos_slice),
            return_labels,
            project_output_onto,
        )

    def _neurons(
        self, layer: int, sublayer: str, positions: Slice, neurons: Slice
    ) -> tuple[Float[Tensor, "*batch_pos f"], Float[Tensor, "*pos f d"]]:
        """What neurons are, and what each writes where it is 1."""
        mlp = getattr(self.model.blocks[layer], sublayer)
        if not hasattr(mlp, "W_out"):
            raise InputError(
                f"the {sublayer} of the {self.main_part}'s block {layer} is a mixture of experts, "
                "whose neurons are not kept one by one: use decompose_resid, or expand_neurons="
                "False"
            )
        acts, weights = self[f"blocks.{layer}.{sublayer}.hook_post"], mlp.W_out
        if weights.ndim == 3:
            weights = positions.apply(_of_positions(weights, acts.shape[-2]), dim=0)
        acts = positions.apply(acts, dim=-2)
        return neurons.apply(acts, dim=-1), neurons.apply(weights, dim=-2)

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: PosSlice = None,
        pos_slice: PosSlice = None,
        project_output_onto: Tensor | None = None,
    ) -> Tensor:
        """What each neuron of a block's MLP wrote, ``*batch_pos neurons d``; see TransformerLens.

        Raises:
            ValueError: where the MLP is a mixture of experts.
        """
        acts, weights = self._neurons(layer, "mlp", as_slice(pos_slice), as_slice(neuron_slice))
        if project_output_onto is not None:
            weights = weights @ project_output_onto
        is_vector = project_output_onto is not None and project_output_onto.ndim == 1
        return acts * weights if is_vector else acts[..., None] * weights

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

        Neurons of adapters stand behind those of the MLP, as ``L0N3_adapter``, unless
        ``neuron_slice`` chooses among the MLP's. The remainder is of what ``layer`` (or its MLP,
        with ``mlp_input``) reads. Where blocks norm the stream, neurons are given as they wrote.

        Raises:
            ValueError: of a remainder or norm where the stream is no sum of what is written, and
                where an MLP is a mixture of experts.
        """
        layer, positions = self._layer(layer, mlp_input), as_slice(pos_slice)
        if incl_remainder:
            self._check_adds_up()
        neurons, onto = kept_axis(neuron_slice), project_output_onto
        onto = onto[:, None] if onto is not None and onto.ndim == 1 else onto
        found, labels = [], []
        for l in range(layer):
            for sublayer in self._mlps(l) if neurons.mode == "identity" else ["mlp"]:
                acts, weights = self._neurons(l, sublayer, positions, neurons)
                indices = torch.arange(getattr(self.model.blocks[l], sublayer).W_out.shape[-2])
                mark = "" if sublayer == "mlp" else f"_{sublayer}"
                labels += [f"L{l}N{n}{mark}" for n in neurons.apply(indices, dim=0).tolist()]
                if apply_ln:
                    acts, weights = self._under_norm(acts, weights, layer, mlp_input, positions)
                weights = weights if onto is None else weights @ onto
                found.append(acts[..., None] * weights)
        whole = positions.apply(self._stream_into(layer, mlp_input), dim=-2)[None]
        if apply_ln:
            whole = self.apply_ln_to_stack(whole, layer, mlp_input, positions)
        whole = whole if onto is None else whole @ onto
        stack = rearrange(torch.cat(found, dim=-2), "... n d -> n ... d") if found else whole[:0]
        if incl_remainder:
            stack = torch.cat([stack, whole - stack.sum(0)])
            labels.append("remainder")
        if project_output_onto is not None and project_output_onto.ndim == 1:
            stack = stack.squeeze(-1)
        return (stack, labels) if return_labels else stack

    def _under_norm(
        self,
        acts: Float[Tensor, "*batch_pos f"],
        weights: Float[Tensor, "*pos f d"],
        layer: int,
        mlp_input: bool,
        positions: Slice,
    ) -> tuple[Float[Tensor, "*batch_pos f"], Float[Tensor, "*pos f d"]]:
        """Neurons and what they write as the norm that reads ``layer`` leaves them."""
        self._check_norm(layer)
        if self._uses_ln_centering(layer):
            weights = weights - weights.mean(-1, keepdim=True)
        scale = self._get_cached_ln_scale(layer, mlp_input, positions)
        return acts / scale, weights * self._gain(layer, mlp_input)

    # ---------------------------------------------------------------- norm gains

    def _gain(self, layer: int | None, mlp_input: bool) -> Float[Tensor, " d"]:
        """Gain of the norm that reads the residual stream entering ``layer``."""
        layer = self._layer(layer)
        if layer == self.model.cfg.n_layers:
            return self.model.ln_final.weight
        block = self.model.blocks[layer]
        return (block.ln2 if mlp_input else block.ln1).weight

    def _check_norm(self, layer: int | None) -> None:
        """Raise unless what reads ``layer`` is a norm of the stream's positions."""
        self._check_adds_up()
        if self._layer(layer) != self.model.cfg.n_layers:
            return
        instead = "use apply_ln=False, or a layer before the last"
        if hasattr(self._module, "pool"):
            raise InputError(
                f"the {self.main_part} pools pairs of frames before its final norm, so frames "
                f"cannot be normed by it: {instead}"
            )
        if not hasattr(self._module, "ln_final"):
            raise InputError(f"the {self.main_part} has no final norm: {instead}")

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
            ValueError: where there is no final norm, the model pools positions before it, or
                blocks norm the stream itself.
        """
        self._check_norm(layer)
        is_final = self._layer(layer, mlp_input) == self.model.cfg.n_layers
        rows, positions = slice_input(batch_slice), slice_input(pos_slice)
        normed = super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, positions, rows, has_batch_dim, recompute_ln
        )
        is_whole_norm = recompute_ln and is_final
        return normed if is_whole_norm else normed * self._gain(layer, mlp_input)


def _of_positions(
    weights: Float[Tensor, "k *own d"], n_positions: int
) -> Float[Tensor, "t *own d"]:
    """Weights at every position, where each of the ``k`` positions of a step has its own.

    Raises:
        ValueError: if the positions are no whole steps.
    """
    n_steps, rest = divmod(n_positions, len(weights))
    if rest:
        raise InputError(
            f"{n_positions} positions are no whole steps of {len(weights)}, which have weights of "
            "their own each: cache all positions"
        )
    return weights.repeat(n_steps, *[1] * (weights.ndim - 1))


add_safe_globals([AudioCache])  # inert: torch.load takes it without weights_only=False
