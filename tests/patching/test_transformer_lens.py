"""`patching.get_act_patch_*` give what TransformerLens's functions of these names give."""

from __future__ import annotations

import inspect

import pandas as pd
import pytest
import torch
from transformer_lens import patching as theirs

import tiny
from audio_lens import HookedAudioTransformer
from audio_lens import patching as ours

FRAMES = 8  # encoder positions: TransformerLens runs one forward per cell
PARTS = ("encoder", "decoder")
BY_PATH = (
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
)  # in test_direct_paths
PER_PAIR = "get_act_patch_attn_head_pattern_dest_src_pos"  # a cell for every query and key
EVERY = [name for name in vars(theirs) if name.endswith("_every")]
LONG = "get_act_patch_attn_head_by_pos_every"  # five of the others in one
NAMES = [
    name
    for name in vars(theirs)
    if name.startswith("get_act_patch_") and name not in (*BY_PATH, *EVERY)
]


@pytest.fixture(autouse=True)
def float64_results():
    """TransformerLens keeps results in torch's default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def models() -> dict[str, HookedAudioTransformer]:
    """Two layers, 0.16 s of audio, two heads; in Qwen2-Audio's decoder 4 over 2."""
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 2, "max_source_positions": FRAMES}
    decoders = {
        "whisper": {"decoder_layers": 2, "decoder_attention_heads": 2},
        "qwen2_audio": {"num_hidden_layers": 2, "num_attention_heads": 4},
    }
    made = {
        family: HookedAudioTransformer.from_hf(
            tiny.tiny_hf(family, dtype=torch.float64, **encoder, **decoder)
        )
        for family, decoder in decoders.items()
    }
    for model in made.values():
        model.attn_mode = "explicit"  # the same in every layer, whichever of them is hooked
    return made


@pytest.fixture(params=PARTS)
def part(request, family, models):
    return models[family].part(request.param)


def run_of(family: str, seed: int, lengths=(15, 10), words=(3, 2)) -> dict:
    """Two prompts, the second with fewer words and less audio, so that both parts are padded."""
    return tiny.hf_inputs(
        family,
        lengths=lengths,
        words=words,
        padding="left",
        n_frames=2 * FRAMES,
        seed=seed,
        dtype=torch.float64,
    )


def clean_and_corrupted(part, family: str, **shape):
    """The clean run's cache under local names, and the part's inputs of the corrupted run."""
    with torch.no_grad():
        _, cache = part.run_with_cache(run_of(family, 0, **shape), attention=True)
    return cache, part.inputs(run_of(family, 1, **shape))


def metric(logits):
    """A scalar of the whole batch that reads all of it."""
    return (logits * torch.linspace(-1, 1, logits.numel()).cos().view_as(logits)).sum()


def last_token(logits):
    return logits[:, -1, 7] - logits[:, -1, 42]


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def same_results(one: theirs.PatchingResult, other: theirs.PatchingResult) -> None:
    """Equal in everything a result holds."""
    same(one.values, other.values)
    assert (one.baseline is None) == (other.baseline is None)
    if other.baseline is not None:
        same(one.baseline, other.baseline)
    pd.testing.assert_frame_equal(one.index_df, other.index_df)
    for name in ("axis_names", "metric_names", "reduced", "has_metric_axis", "patch_type_names"):
        assert getattr(one, name) == getattr(other, name), name


# -------------------------------------------------------------------------------- tensors


def test_nothing_is_missing():
    assert len(NAMES) == 15 and len(EVERY) == 3
    for name in (*NAMES, *EVERY):
        assert callable(getattr(ours, name)) and name in ours.__all__


@pytest.mark.parametrize("name", [*NAMES, *EVERY])
def test_arguments_come_in_their_order(name):
    """The four that everybody passes by position."""
    given = list(inspect.signature(getattr(ours, name)).parameters)[:4]
    in_every = ["model", "corrupted_tokens", "clean_cache", "metric"]
    in_one = [*in_every[:3], "patching_metric"]
    assert given == (in_every if name in EVERY else in_one)


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == LONG))
        for name in (*NAMES, *EVERY)
        if name != PER_PAIR
    ],
)
@torch.no_grad()
def test_every_function_gives_what_theirs_gives(part, family, name):
    """Also at padding, which TransformerLens patches as any other position."""
    cache, corrupted = clean_and_corrupted(part, family)
    found = getattr(ours, name)(part, corrupted, cache, metric)
    expected = getattr(theirs, name)(part, corrupted, cache, metric)
    assert found.shape == expected.shape
    same(found, expected)
    unpatched = metric(part.model(corrupted.inputs))
    assert (found - unpatched).abs().max() > 1e-3


@pytest.mark.parametrize(
    "part", [pytest.param("encoder", marks=pytest.mark.slow), "decoder"], indirect=True
)
@torch.no_grad()
def test_every_pair_of_positions_gives_what_theirs_gives(part, family):
    """`pattern_dest_src_pos`, whose cells are many: on a short prompt."""
    cache, corrupted = clean_and_corrupted(part, family, lengths=(7,), words=(2,))
    arguments = (part, corrupted, cache, metric)
    found, expected = (getattr(module, PER_PAIR)(*arguments) for module in (ours, theirs))
    assert found.ndim == 4
    same(found, expected)


@pytest.mark.parametrize("name", ["get_act_patch_resid_pre", "get_act_patch_attn_head_v_all_pos"])
@torch.no_grad()
def test_a_metric_of_the_last_token(part, family, name):
    """One that a sweep could read less for, were it told."""
    cache, corrupted = clean_and_corrupted(part, family, lengths=(15, 15), words=(2, 2))
    arguments = (part, corrupted, cache, lambda logits: last_token(logits).mean())
    same(getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments))


@torch.no_grad()
def test_inputs_in_every_form(part, family):
    """The part's inputs, the model's, and what a processor returns."""
    cache, corrupted = clean_and_corrupted(part, family)
    first, *others = (
        ours.get_act_patch_mlp_out(part, inputs, cache, metric)
        for inputs in (corrupted, corrupted.inputs, run_of(family, 1))
    )
    for other in others:
        same(first, other)


@torch.no_grad()
def test_the_models_own_cache_serves_every_part(part, family):
    """Full names, as `model.run_with_cache` gives them."""
    cache, corrupted = clean_and_corrupted(part, family)
    _, whole = part.model.run_with_cache(run_of(family, 0))
    same(
        ours.get_act_patch_resid_mid(part, corrupted, whole, metric),
        ours.get_act_patch_resid_mid(part, corrupted, cache, metric),
    )


@torch.no_grad()
def test_user_hooks_stay_in_force(part, family):
    cache, corrupted = clean_and_corrupted(part, family)
    free = ours.get_act_patch_resid_pre(part, corrupted, cache, metric)
    with part.hooks([("blocks.1.hook_mlp_out", lambda x, hook: 0.5 * x)]):
        found, expected = (
            module.get_act_patch_resid_pre(part, corrupted, cache, metric)
            for module in (ours, theirs)
        )
    same(found, expected)
    assert (found - free).abs().max() > 1e-3


# -------------------------------------------------------------------------------- index tables


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("name", [name for name in NAMES if name != PER_PAIR])
@torch.no_grad()
def test_the_table_of_indices(models, name):
    part = models["whisper"].part("decoder")
    cache, corrupted = clean_and_corrupted(part, "whisper")
    (found, table), (expected, their_table) = (
        getattr(module, name)(part, corrupted, cache, metric, return_index_df=True)
        for module in (ours, theirs)
    )
    same(found, expected)
    pd.testing.assert_frame_equal(table, their_table)


# -------------------------------------------------------------------------------- per example


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (last_token, {"reduce": "none"}),
        (last_token, {"reduce": "none", "baseline": True}),
        (last_token, {"reduce": "mean", "baseline": True}),
        (metric, {"baseline": True}),
        ({"all": metric, "last": lambda logits: last_token(logits).sum()}, {}),
        ({"last": last_token, "first": lambda logits: logits[:, 0, 5]}, {"reduce": "none"}),
    ],
)
@torch.no_grad()
def test_results_per_example(part, family, measure, options):
    cache, corrupted = clean_and_corrupted(part, family)
    found, expected = (
        module.get_act_patch_attn_head_k_all_pos(part, corrupted, cache, measure, **options)
        for module in (ours, theirs)
    )
    same_results(found, expected)


@torch.no_grad()
def test_the_mean_over_examples(part, family):
    cache, corrupted = clean_and_corrupted(part, family)
    found, expected = (
        module.get_act_patch_resid_pre(part, corrupted, cache, last_token, reduce="mean")
        for module in (ours, theirs)
    )
    same(found, expected)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_several_activations_per_example(models, name):
    part = models["qwen2_audio"].part("decoder")
    cache, corrupted = clean_and_corrupted(part, "qwen2_audio")
    found, expected = (
        getattr(module, name)(part, corrupted, cache, last_token, reduce="none", baseline=True)
        for module in (ours, theirs)
    )
    same_results(found, expected)


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("measure", "options", "says"),
    [
        (last_token, {}, "scalar"),
        (metric, {"reduce": "none"}, "batch"),
        (metric, {"reduce": "median"}, "reduce"),
        ({}, {}, "at least one"),
        (metric, {"baseline": True, "return_index_df": True}, "return_index_df"),
    ],
)
@torch.no_grad()
def test_what_they_refuse_is_refused(part, family, measure, options, says):
    cache, corrupted = clean_and_corrupted(part, family)
    for module in (theirs, ours):
        with pytest.raises(ValueError, match=says):
            module.get_act_patch_resid_pre(part, corrupted, cache, measure, **options)


@torch.no_grad()
def test_a_cache_of_other_inputs_is_refused(part, family):
    """Activations of another number of prompts cannot be patched in."""
    cache, _ = clean_and_corrupted(part, family)
    one = part.model.as_inputs(run_of(family, 1))[0]
    with pytest.raises(ValueError, match="shape"):
        ours.get_act_patch_resid_pre(part, part.inputs(one), cache, metric)


@torch.no_grad()
def test_a_cache_without_the_activation_is_refused(part, family):
    """Patterns are kept only when asked for."""
    _, cache = part.run_with_cache(run_of(family, 0))
    corrupted = part.inputs(run_of(family, 1))
    with pytest.raises((KeyError, ValueError), match="pattern"):
        ours.get_act_patch_attn_head_pattern_all_pos(part, corrupted, cache, metric)
