"""The cells of a table by tensors are those that a loop over the axes finds."""

import itertools

import pytest

from audio_lens.patching.interventions import PLACE_AXES, Intervention, Interventions
from audio_lens.sites import Site

SITE = Site("decoder", "attn.z", 4, "decoder", 1, "head", 2)
COORDS = {
    "layer": [2, 0, 1],
    "head": [0, 1, 2],
    "time": ["early", "late"],
    "frequency": ["low", "high", "all"],
}


def one_by_one(axes, layers, layer_window):
    """Every cell, written as a loop."""
    for place in itertools.product(*(range(len(COORDS[axis])) for axis in axes)):
        at, positions = dict(zip(axes, place, strict=True)), 0
        for axis in axes:
            if axis in PLACE_AXES:
                positions = positions * len(COORDS[axis]) + at[axis]
        first = COORDS["layer"][at["layer"]] if "layer" in at else None
        patched = sorted(layers) if first is None else range(first, first + layer_window)
        yield Intervention(tuple(patched), at.get("head"), positions)


@pytest.mark.parametrize("layer_window", [1, 2])
@pytest.mark.parametrize(
    "axes",
    [("layer",), ("head", "layer"), ("time", "layer", "frequency"), ("frequency",), tuple(COORDS)],
)
def test_cells_by_tensors_are_those_of_a_loop(axes, layer_window):
    coords = {axis: COORDS[axis] for axis in axes}
    layers = (2, 0, 1)
    cells = Interventions.of(SITE, axes, coords, layers, layer_window)
    expected = list(one_by_one(axes, layers, layer_window))
    assert list(cells) == expected and cells[-1] == expected[-1] and cells[1:3] == expected[1:3]
    assert cells.first_layers.tolist() == [cell.layers[0] for cell in expected]
    assert set(cells.layers) == {layer for cell in expected for layer in cell.layers}
    assert cells.are_of_one_layer == all(len(cell.layers) == 1 for cell in expected)


def test_cells_outside_the_blocks_have_no_layer():
    site = Site("connector", "out", None, "connector", 1, None, None)
    cells = Interventions.of(site, ("time",), {"time": ["a", "b"]}, (None,), 1)
    assert [cell.layers for cell in cells] == [(None,)] * 2
    assert cells.first_layers.tolist() == [-1, -1] and cells.unit is None
