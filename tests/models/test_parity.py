"""Equal to transformers: outputs, every residual stream and every pattern, every weight random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from audio_lens import AudioInputs, HookedAudioTransformer
from families import FAMILIES
from families.base import Family

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative to the largest value
LOTS, EXAMPLES = range(1, 7), 5  # of drawn shapes beside the first lot, and in each
ATTN_MODES = {"eager": "explicit", "sdpa": "sdpa"}


def cases(table: str) -> Iterator[tuple[Family, str, str]]:
    """Every family with the entries of its ``models`` or ``batches``, and an id."""
    for family in FAMILIES.values():
        for name in getattr(family, table):
            yield family, name, f"{family.name}: {name}"


def in_both_precisions(table: str) -> pytest.MarkDecorator:
    """Once per case in float64 and float32, which is long where float64 says as much.

    A family's first entry runs in both, and what Hugging Face cannot do in float64 in float32.
    """
    params = []
    for family, name, case in cases(table):
        is_first = name == next(iter(getattr(family, table)))
        in_float64 = table == "models" or name not in family.no_float64
        long = [pytest.mark.slow] * (in_float64 and not is_first)
        params.append(pytest.param(family, name, torch.float32, id=f"{case}-float32", marks=long))
        if in_float64:
            params.append(pytest.param(family, name, torch.float64, id=f"{case}-float64"))
    return pytest.mark.parametrize("family, name, dtype", params)


def those(have: Any) -> pytest.MarkDecorator:
    """The test once per family for which ``have`` holds."""
    chosen = [family for family in FAMILIES.values() if have(family)]
    return pytest.mark.parametrize("family", chosen, ids=lambda family: family.name)


# -------------------------------------------------------------------------------- the comparison


def both(
    family: Family, dtype: torch.dtype, attn: str, model_options: dict, batch_options: dict
) -> tuple[HookedAudioTransformer, AudioInputs, dict[str, Tensor]]:
    """Our model with Hugging Face's weights, the inputs, and Hugging Face's activations."""
    hf = family.build(dtype=dtype, attn=attn, **model_options)
    model = family.hooked(hf)
    model.attn_mode = ATTN_MODES[attn]
    batch = family.batch(dtype=dtype, **batch_options)
    return model, model.as_inputs(batch), family.reference(hf, batch)


@torch.no_grad()
def compare(
    family: Family,
    dtype: torch.dtype,
    model_options: dict,
    batch_options: dict,
    attn: str = "eager",
) -> dict[str, float]:
    """The largest difference by hook name, relative to the largest value."""
    model, inputs, theirs = both(family, dtype, attn, model_options, batch_options)
    check_complete(family, model, theirs, with_patterns=attn == "eager")
    _, cache = model.run_with_cache(inputs, names_filter=list(theirs))
    return {
        name: relative_difference(
            family.mask_of(name, tensor, inputs), family.mask_of(name, cache[name], inputs)
        )
        for name, tensor in theirs.items()
    }


def check_complete(
    family: Family, model: HookedAudioTransformer, theirs: dict, with_patterns: bool
) -> None:
    """The reference holds outputs, streams and patterns, but those the family calls absent."""
    wanted = ["hook_resid_pre", *(["hook_pattern"] if with_patterns else [])]
    expected = {
        name
        for name in model.hook_dict
        if name in ("hook_logits", "encoder.hook_out", "connector.hook_out", "decoder.hook_out")
        or name.rsplit(".", 1)[-1] in wanted
    }
    absent = {name for name in expected if any(piece in name for piece in family.absent)}
    assert expected - absent <= theirs.keys()
    assert with_patterns or not any(name.endswith("hook_pattern") for name in theirs)


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    assert theirs.shape == ours.shape
    return ((theirs - ours).abs().max() / theirs.abs().max()).item()


def check(differences: dict[str, float], tolerance: float) -> None:
    too_large = {name: size for name, size in differences.items() if not size <= tolerance}
    assert not too_large


# -------------------------------------------------------------------------------- the tests


@pytest.mark.mostly_slow(2)
@in_both_precisions("models")
def test_shapes_of_model(family: Family, name: str, dtype: torch.dtype) -> None:
    options = family.model_batches.get(name, {})
    check(compare(family, dtype, family.models[name], options), TOLERANCE[dtype])


@pytest.mark.mostly_slow(3)
@in_both_precisions("batches")
def test_inputs(family: Family, name: str, dtype: torch.dtype) -> None:
    check(compare(family, dtype, {}, family.batches[name]), TOLERANCE[dtype])


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize(
    "family, name",
    [pytest.param(family, name, id=case) for family, name, case in cases("batches")],
)
def test_fused_attention(family: Family, name: str) -> None:
    check(compare(family, torch.float32, {}, family.batches[name], attn="sdpa"), 1e-5)


@those(lambda family: True)
def test_bfloat16_is_as_close_as_hugging_face_to_itself(family: Family) -> None:
    for name in family.bfloat16 or list(family.batches)[:1]:
        outputs = {attn: outputs_of(family, attn, family.batches[name]) for attn in ATTN_MODES}
        spread = (outputs["eager"][0] - outputs["sdpa"][0]).abs().max()
        for theirs, ours in outputs.values():
            assert (theirs - ours).abs().max() <= 2 * spread, name


@torch.no_grad()
def outputs_of(family: Family, attn: str, batch_options: dict) -> tuple[Tensor, Tensor]:
    """What Hugging Face's model and ours put out in bfloat16, where it counts."""
    model, inputs, theirs = both(family, torch.bfloat16, attn, {}, batch_options)
    name = "hook_logits" if "hook_logits" in theirs else f"{model.output_part}.hook_out"
    found = (theirs[name], model(inputs))
    return tuple(family.mask_of(name, tensor, inputs).float() for tensor in found)


@those(lambda family: family.float16_biases)
def test_float16_stays_finite_where_the_residual_stream_overflows(family: Family) -> None:
    hf = family.build(dtype=torch.float16)
    with torch.no_grad():
        for bias in family.float16_biases(hf):
            bias += 60_000
    model = family.hooked(hf)
    name = "encoder.blocks.1.hook_resid_post"
    _, cache = model.run_with_cache(family.batch(dtype=torch.float16), names_filter=name)
    assert cache[name].max() == torch.tensor(64504.0).half()


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("lot", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in LOTS)])
@those(lambda family: family.draw)
def test_any_shape(family: Family, lot: int) -> None:
    """A few drawn shapes on every run; the other lots are long tests, as share.py has them."""

    @seed(lot)
    @settings(max_examples=EXAMPLES, database=None)
    @given(data=st.data())
    def is_equal(data: st.DataObject) -> None:
        model_options, batch_options = family.draw(data)
        differences = compare(family, torch.float64, model_options, batch_options)
        check(differences, TOLERANCE[torch.float64])

    is_equal()
