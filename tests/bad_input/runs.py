"""Inputs, layers and hooks of a run of the model, and what is asked of its caches."""

from __future__ import annotations

import functools
from typing import Any

import torch

from audio_lens import HookedAudioTransformer
from bad_input.world import INF, NAN, Case, inputs, model, named, written

RESID = "decoder.blocks.0.hook_resid_pre"


def _run(**mapping: Any) -> Any:
    """The model on the mapping of a processor, of which some is replaced."""
    given = {"input_ids": inputs().tokens, "input_features": inputs().features}
    return model()(**(given | mapping))


def _ids(value: Any, dtype: Any = None) -> Any:
    """Token ids of which the last is replaced."""
    tokens = inputs().tokens.clone().to(dtype or torch.long)
    tokens[0, -1] = value
    return _run(input_ids=tokens)


def _ignored(tensor: Any, hook: Any) -> None:
    """A hook that does nothing."""


@functools.cache
def _cache() -> Any:
    return model().run_with_cache(inputs())[1]


INPUTS = {
    "a text for inputs": lambda: model()("clip.wav"),
    "no inputs": lambda: model()(),
    "an unknown argument": lambda: model()(inputs(), labels=3),
    "no token ids": lambda: model()(input_features=inputs().features),
    "no features": lambda: model()(input_ids=inputs().tokens),
    "a token id of -1": lambda: _ids(-1),
    "a token id beyond the vocabulary": lambda: _ids(10**6),
    "float token ids": lambda: _ids(3, torch.float32),
    "NaN token ids": lambda: _ids(NAN, torch.float32),
    "truth values for token ids": lambda: _run(input_ids=inputs().tokens > 3),
    "token ids without a batch": lambda: _run(input_ids=inputs().tokens[0]),
    "texts for token ids": lambda: _run(input_ids=[["a", "b"]]),
    "ragged token ids": lambda: _run(input_ids=[[1, 2], [3]]),
    "NaN features": lambda: _run(input_features=inputs().features * NAN),
    "infinite features": lambda: _run(input_features=inputs().features + INF),
    "features of another width": lambda: _run(input_features=inputs().features[:, :40]),
    "features of two axes": lambda: _run(input_features=inputs().features[0]),
    "texts for features": lambda: _run(input_features="clip.wav"),
    "two clips for one placeholder": lambda: _run(
        input_features=inputs().features.expand(2, -1, -1)
    ),
    "a mask of another length": lambda: _run(attention_mask=torch.ones(1, 3)),
    "positions of another length": lambda: _run(position_ids=torch.arange(3)[None]),
    "negative positions": lambda: _run(position_ids=torch.full_like(inputs().tokens, -1)),
    "float positions": lambda: _run(position_ids=inputs().tokens * 0.5),
    "a mask of features of another length": lambda: _run(
        feature_attention_mask=torch.ones(1, 3, dtype=torch.long)
    ),
}

LAYERS = {
    "a layer that does not exist": lambda: model()(inputs(), stop_at_layer=99),
    "a layer of a part that does not exist": lambda: model()(inputs(), stop_at_layer="head.3"),
    "a layer of 1.5": lambda: model()(inputs(), stop_at_layer=1.5),
    "a stop before the start": lambda: model()(
        torch.zeros(1, 3, 192), inputs=inputs(), start_at_layer=3, stop_at_layer=1
    ),
    "a start without its residual stream": lambda: model()(inputs(), start_at_layer=3),
    "a residual stream of another width": lambda: model()(
        torch.zeros(1, 3, 5), inputs=inputs(), start_at_layer=3
    ),
    "an unknown return type": lambda: model()(inputs(), return_type="text"),
    "0 new tokens": lambda: model().generate(inputs(), 0),
    "new tokens by NaN": lambda: model().generate(inputs(), NAN),
    "2.5 new tokens": lambda: model().generate(inputs(), 2.5),
    "a text for new tokens": lambda: model().generate(inputs(), "3"),
    "an unknown kind of answer": lambda: model().generate(inputs(), return_type="sound"),
    "a part that does not exist": lambda: model().part("head"),
    "a word of two tokens": lambda: model().to_single_token("seven two"),
    "an id beyond the vocabulary": lambda: model().to_single_token(10**6),
    "a float for a token": lambda: model().to_single_token(3.5),
    "a truth value for a token": lambda: model().to_single_token(True),
}

HOOKS = {
    "a hook name that does not exist": lambda: model().add_hook("hook_q", _ignored),
    "a number for a hook name": lambda: model().add_hook(3, _ignored),
    "a filter that selects nothing": lambda: model().run_with_cache(
        inputs(), names_filter=lambda name: False
    ),
    "an empty list of names": lambda: model().run_with_cache(inputs(), names_filter=[]),
    "a hook that is no function": lambda: model().run_with_hooks(inputs(), fwd_hooks=[(RESID, 3)]),
    "hooks that are no pairs": lambda: model().run_with_hooks(inputs(), fwd_hooks=[RESID]),
    "a number for hooks": lambda: model().run_with_hooks(inputs(), fwd_hooks=3),
    "an unknown direction": lambda: model().add_hook(RESID, _ignored, dir="up"),
    "backward hooks of a run forward": lambda: model().run_with_hooks(
        inputs(), bwd_hooks=[(RESID, _ignored)]
    ),
    "an unknown mode of attention": lambda: setattr(model(), "attn_mode", "fast"),
    "positions of 2.5": lambda: model().run_with_cache(inputs(), names_filter=RESID, pos_slice=2.5),
    "positions of a part that has others": lambda: model().run_with_cache(
        inputs(), names_filter="encoder.blocks.0.hook_resid_pre", pos_slice=3
    ),
    "gradients without a loss": lambda: model().run_with_cache(inputs(), incl_bwd=True),
    "a device that does not exist": lambda: model().run_with_cache(
        inputs(), names_filter=RESID, device="nowhere"
    ),
}

CACHES = {
    "a position that does not exist": lambda: model().run_with_cache(
        inputs(), names_filter=RESID, pos_slice=9999
    ),
    "a name that a cache does not hold": lambda: _cache()["blocks.99.hook_z"],
    "a part that a cache does not hold": lambda: _cache().part("head"),
    "a layer that does not exist": lambda: _cache().decompose_resid(99),
    "a layer of 1.5": lambda: _cache().accumulated_resid(1.5),
    "heads up to a layer of NaN": lambda: _cache().stack_head_results(NAN),
    "a row that does not exist": lambda: _cache().apply_slice_to_batch_dim(9),
}

CHECKPOINTS = {
    "a folder that does not exist": lambda: HookedAudioTransformer.from_pretrained("./nowhere"),
    "a number for a checkpoint": lambda: HookedAudioTransformer.from_pretrained(3.5),
    "None for a checkpoint": lambda: HookedAudioTransformer.from_pretrained(None),
    "a text for a dtype": lambda: HookedAudioTransformer.from_pretrained(
        "embedded", dtype="float33"
    ),
    "a dtype of whole numbers": lambda: HookedAudioTransformer.from_pretrained(
        "embedded", dtype=torch.int8
    ),
    "an unknown device": lambda: HookedAudioTransformer.from_pretrained(
        "embedded", device="nowhere"
    ),
    "a number for a model in memory": lambda: HookedAudioTransformer.from_hf(3),
    "a file for a checkpoint": lambda: HookedAudioTransformer.from_pretrained(
        written("model.txt", "weights")
    ),
}

CASES: list[Case] = [
    *named("Inputs of a run", INPUTS),
    *named("Layers, tokens and answers", LAYERS),
    *named("Hooks", HOOKS),
    *named("Caches", CACHES),
    *named("Checkpoints", CHECKPOINTS),
]
COMPUTES = {"Caches"}  # these are asked of a run
