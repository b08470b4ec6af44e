"""Sweeps find planted circuits (METHODS section 15, toys A, B and E)."""

import itertools

import pytest
import torch

from audio_lens import Span, metrics, patching
from toys import AUDIO_TOKENS, Cue, copy_toy, gate_toy, prompt, two_stream_toy

CUE_TOKEN, LAYER, HEAD, N_LAYERS = 6, 2, 1, 5
LAST = AUDIO_TOKENS + 1


def recovery(toy, clean: Cue, corrupted: Cue, **options):
    result = patching.sweep(
        toy,
        clean=prompt(clean),
        corrupted=prompt(corrupted),
        metric=metrics.logit_diff(1, 3),
        progress=False,
        **options,
    )
    return result, result.recovery


@pytest.fixture(scope="module")
def toy():
    return copy_toy(N_LAYERS, LAYER, HEAD)


HEARD = Cue(heard=1), Cue(heard=3)


def test_copy_toy_answers_what_it_hears(toy):
    for heard in range(4):
        assert toy(prompt(Cue(heard)))[0, -1].argmax() == heard


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_resid_map_is_a_step_at_the_cue(toy, direction):
    """The cue's window carries the answer up to the copying layer, and nothing else does."""
    result, _ = recovery(
        toy,
        *HEARD,
        site="decoder.resid_pre",
        axes=("layer", "time"),
        windows=0.08,
        direction=direction,
    )
    cue = 0.04 * CUE_TOKEN + 0.01
    for i, window in enumerate(result.coords["time"]):
        holds_cue = window.start_s <= cue < window.end_s
        expected = torch.tensor([float(holds_cue and l <= LAYER) for l in range(N_LAYERS)])
        assert torch.allclose(result.effect[:, i], expected.double(), atol=1e-12), window


def test_last_position_has_the_answer_after_the_copying_layer(toy):
    _, rr = recovery(toy, *HEARD, site="resid_pre", axes=("layer", "position"))
    assert rr[:, LAST].tolist() == pytest.approx([0, 0, 0, 1, 1])
    assert rr[:, CUE_TOKEN].tolist() == pytest.approx([1, 1, 1, 0, 0])


def test_only_the_copying_head_matters(toy):
    _, rr = recovery(toy, *HEARD, site="attn.z", axes=("layer", "head"))
    expected = torch.zeros(N_LAYERS, 2, dtype=torch.float64)
    expected[LAYER, HEAD] = 1.0
    assert torch.allclose(rr, expected, atol=1e-12)


@pytest.mark.parametrize("site", ["connector.out", "connector.in"])
def test_connector_map_peaks_at_the_cue_alone(toy, site):
    words = [Span(0.0, 0.2, "silence"), Span(0.2, 0.3, "cue"), Span(0.3, 0.4, "silence")]
    result, rr = recovery(toy, *HEARD, site=site, axes="time", windows=words)
    assert rr.tolist() == pytest.approx([0, 1, 0])
    assert result.top(1)[0].span.label == "cue"


def test_values_patch_alone_moves_the_answer_queries_do_not(toy):
    """The class sits in the values; queries and keys are the same in both runs."""
    for activation, expected in (("v", 1.0), ("q", 0.0), ("k", 0.0)):
        _, rr = recovery(toy, *HEARD, site=f"attn.{activation}", axes=("layer", "head"))
        assert rr[LAYER, HEAD].item() == pytest.approx(expected), activation


@pytest.mark.parametrize(("w_audio", "w_text"), [(1.0, 1.0), (3.0, 1.0), (0.5, 2.0)])
def test_two_streams_share_the_effect_by_their_weights(w_audio, w_text):
    """Swapping both streams at once, each head recovers its share of the answer."""
    toy = two_stream_toy(w_audio, w_text, layer=1)
    pair = Cue(heard=1, read=1), Cue(heard=3, read=3)
    _, rr = recovery(toy, *pair, site="attn.z", axes=("layer", "head"))
    share = w_audio / (w_audio + w_text)
    assert rr[1].tolist() == pytest.approx([share, 1 - share])
    assert rr[0].abs().max() == rr[2].abs().max() == 0
    _, audio_rr = recovery(toy, *pair, site="connector.out", axes="time", windows=0.4)
    assert audio_rr.item() == pytest.approx(share)


@pytest.mark.parametrize("gate", ["and", "or"])
def test_gates_compute_their_truth_table(gate):
    for heard, read in itertools.product((0, 1), repeat=2):
        joined = heard and read if gate == "and" else heard or read
        assert gate_toy(gate)(prompt(Cue(heard, read)))[0, -1, 0] == pytest.approx(joined)


@pytest.mark.parametrize(
    ("gate", "direction", "expected"),
    [
        ("and", "denoise", 0.0),  # one input alone does not open it ...
        ("and", "noise", 1.0),  # ... and each is needed
        ("or", "denoise", 1.0),  # one input is enough ...
        ("or", "noise", 0.0),  # ... and either can be missed
    ],
)
def test_directions_tell_gates_apart(gate, direction, expected):
    """Of each input on its own; behind the gate both directions see everything."""
    options = {
        "clean": prompt(Cue(1, read=1)),
        "corrupted": prompt(Cue(0, read=0)),
        "metric": lambda logits: logits[:, -1, 0],
        "direction": direction,
        "progress": False,
    }
    toy = gate_toy(gate, layer=1)
    inputs = patching.sweep(toy, site="attn.z", axes=("layer", "head"), **options).effect
    assert inputs[1].tolist() == pytest.approx([expected] * 2)
    merged = patching.sweep(toy, site="mlp_out", axes=("layer", "position"), **options).effect
    assert merged[1, LAST].item() == pytest.approx(1.0)
