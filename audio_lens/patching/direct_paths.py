"""TransformerLens's direct paths, with its names and results: one head's write, read by one head.

``get_act_patch_direct_path(part, corrupted, clean_cache, corrupted_cache, metric, 1, 0)`` takes
``model.part("decoder")`` or ``model.part("encoder")`` for its model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from audio_lens import metrics
from audio_lens.cache import AudioCache
from audio_lens.edits import Edit, Put
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.models.layers import PreNormBlock
from audio_lens.models.part import Part, PartInputs
from audio_lens.patching.engine.trace import blocks_of, is_known, stack_of
from audio_lens.patching.run import run
from audio_lens.progress import track
from audio_lens.running import evaluating

COMPONENTS = ("q", "k", "v")
Inputs = PartInputs | AudioInputs | Mapping[str, Any]
Cache = ActivationCache | Mapping[str, Tensor]


def by_full_name(part: Part, cache: Cache) -> AudioCache:
    """The cache, which finds local and full names of the part by the full ones."""
    if isinstance(cache, AudioCache):
        return cache
    return AudioCache(dict(cache.items()), {part.name: part}, part.name)


@torch.no_grad()
def get_act_patch_direct_path(
    model: Part,
    corrupted_tokens: Inputs,
    clean_cache: Cache,
    corrupted_cache: Cache,
    patching_metric: metrics.Metric | Callable[[Tensor], Any],
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Float[Tensor, "n_layers n_heads"]:
    """Patch what one head writes into what each later head alone reads for its q, k or v.

    Args:
        model: ``model.part("decoder")`` or ``model.part("encoder")``.
        corrupted_tokens: inputs of the run that is patched: ``part.inputs(corrupted)``, or what
            `sweep` takes.
        clean_cache, corrupted_cache: of both runs, with the ``attn.hook_z`` of the source's block.
        patching_metric: from logits to a scalar, or one of `audio_lens.metrics` (its mean).
        src_layer, src_head: the head that writes.
        component: what is read: "q", "k" or "v".
        verbose: whether progress is shown.

    Returns:
        The metric of every patched run; 0 where the head does not come after the source.

    Raises:
        InputError: keys or values where heads share them, blocks that do not add to one plain
            stream, or a source that is not there.
        MetricError: a metric that fails, or gives no number.
    """
    _check(model, component, src_layer, src_head)
    blocks, inputs = blocks_of(stack_of(model.model, model.name)), model.inputs(corrupted_tokens)
    name = f"{model.name}.blocks.{src_layer}.attn.hook_z"
    clean, corrupted = (
        by_full_name(model, cache)[name][:, :, src_head] for cache in (clean_cache, corrupted_cache)
    )
    delta = (clean - corrupted) @ blocks[src_layer].attn.W_O[src_head].to(clean)
    found = torch.zeros(len(blocks), blocks[0].attn.n_heads, device=model.model.device)
    later = [f"{model.name}.blocks.{n}.hook_resid_pre" for n in range(src_layer + 1, len(blocks))]
    if not later:
        return found
    with evaluating(model.model):
        _, streams = model.model.run_with_cache(
            inputs.inputs, names_filter=later, return_cache_object=False
        )
        with track("direct paths", len(later), "blocks", show=verbose) as advance:
            for done, resid in enumerate(streams[name] for name in later):
                layer = src_layer + 1 + done
                block, site = blocks[layer], f"{model.name}.attn.{component}"
                read = block.ln1(resid + delta)
                given = {"q": block.attn.queries(read)}
                given["k"], given["v"] = block.attn.keys_values(read)
                for head in range(block.attn.n_heads):
                    edit = Edit(site, Put(given[component]), layer=layer, head=head)
                    value = run(model.model, inputs.inputs, edit, patching_metric)
                    found[layer, head] = torch.as_tensor(value).mean()
                advance(1, done + 1)
    return found


def get_act_patch_direct_path_all_sources(
    model: Part,
    corrupted_tokens: Inputs,
    clean_cache: Cache,
    corrupted_cache: Cache,
    patching_metric: metrics.Metric | Callable[[Tensor], Any],
    component: str = "q",
    verbose: bool = True,
) -> Float[Tensor, "n_layers n_heads n_layers n_heads"]:
    """`get_act_patch_direct_path` from every head: ``[src_layer, src_head, layer, head]``."""
    _check(model, component, 0, 0)
    cfg = model.cfg
    given = (clean_cache, corrupted_cache, patching_metric)
    rows = [
        get_act_patch_direct_path(
            model, corrupted_tokens, *given, layer, head, component, verbose=verbose
        )
        for layer in range(cfg.n_layers)
        for head in range(cfg.n_heads)
    ]
    return torch.stack(rows).unflatten(0, (cfg.n_layers, cfg.n_heads))


def _check(part: Part, component: str, layer: int, head: int) -> None:
    """Raise where a direct path between heads means nothing."""
    if component not in COMPONENTS:
        raise InputError(f"component is 'q', 'k' or 'v', got {component!r}")
    stack, cfg = stack_of(part.model, part.name), part.cfg
    odd = [type(one).__name__ for one in stack.blocks if not isinstance(one, PreNormBlock)]
    if odd or not is_known(stack):
        raise InputError(
            f"direct paths need blocks that add to one plain residual stream; those of the "
            f"{part.name} of {part.model.cfg.family} are {(odd or ['of a kind of their own'])[0]}"
        )
    if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
        raise InputError(f"no head {head} of block {layer} in the {part.name}")
    if component != "q" and cfg.n_key_value_heads != cfg.n_heads:
        raise InputError(
            f"component={component!r}: {cfg.n_heads} heads share {cfg.n_key_value_heads} key-value "
            "heads (GQA), so that no head has a key or value of its own; component='q' is there, "
            "and audio_lens.analysis.paths.path takes groups (L3G0.k)"
        )
