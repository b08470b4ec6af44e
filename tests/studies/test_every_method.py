"""Every method over items: it runs as a study, or is refused before it computes anything."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_tools import embedded_shapes

import audio_lens.analysis
from audio_lens import HookedAudioTransformer, Items, studies
from audio_lens.analysis.autoencoders import Autoencoder
from audio_lens.analysis.neurons import Selection
from audio_lens.analysis.scrubbing import Hypothesis, Node
from audio_lens.analysis.steering import Direction
from audio_lens.items import demo_items
from audio_lens.items.methods import METHODS
from audio_lens.studies import StudyError
from audio_lens.studies.jobs import Methods

pytest.importorskip("zarr")
for _package in pkgutil.iter_modules(audio_lens.analysis.__path__):
    importlib.import_module(f"audio_lens.analysis.{_package.name}")

SITE = "decoder.resid_pre"
FEW = {"layers": [2]}
ROWS = [4, 6]  # of the shipped items: answered rightly, and not alike


def _autoencoder() -> Autoencoder:
    width = embedded_shapes()[0]
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    zeros = torch.zeros(2 * width), torch.zeros(width)
    return Autoencoder(both, zeros[0], both, zeros[1], kind="relu", site=SITE, layer=2)


def _selection(items: Items) -> Selection:
    answers = sorted({str(item.answer) for item in items})
    chosen = torch.zeros(len(answers), 1, embedded_shapes()[1], dtype=torch.bool)
    chosen[torch.arange(len(answers)), 0, torch.arange(len(answers))] = True
    return Selection(chosen, answers, "decoder.mlp.post", [2])


def _direction() -> Direction:
    return Direction(torch.eye(embedded_shapes()[0])[0], SITE, 2)


def arguments(name: str, items: Items) -> dict[str, Any]:
    """What a method needs, and what keeps it small."""
    word = Node(SITE, 2, "audio", feature="answer")
    given: dict[str, dict[str, Any]] = {
        "autoencoders.splice": {"autoencoder": _autoencoder()},
        "autoencoders.modality_of": {"autoencoder": _autoencoder(), "latents": [0, 1]},
        "autoencoders.steer": {
            "autoencoder": _autoencoder(),
            **{"latents": [0], "target": "two", "value": 1.0},
        },
        "encoder_lens.mix": {"layers": [1], "alphas": [0.5]},
        "fusion.trace": FEW | {"controls": ["identity", "destroyed"]},
        "fusion.fcct": FEW | {"controls": ["identity", "destroyed"]},
        "grounding.residence": FEW,
        "grounding.and_or": FEW,
        "interchange.iia": {"site": SITE, "layer": 2},
        "knockout.knock_out": FEW,
        "knockout.value_zeroing": FEW,
        "logit_lens.enrichment": {"source": 1, "target": 3},
        "logit_lens.grid": {"sources": [1], "targets": [3]},
        "modality_gap.project": FEW,
        "neurons.deactivation": {"selection": _selection(items)},
        "neurons.dose": {"selection": _selection(items)},
        "neurons.inject": {"selection": _selection(items)},
        "neurons.compare": {"activations": object()},
        "paths.eap_ig": {"steps": 2},
        "paths.path": {"senders": ["L2H0"], "receivers": "logits"},
        "paths.faithfulness": {"circuit": object()},
        "paths.minimality": {"circuit": object()},
        "scrubbing.scrub": {"hypothesis": Hypothesis([word]), "draws": 1},
        "steering.sweep": {"directions": [_direction()], "alphas": [1.0]},
        "steering.monitor": {"direction": _direction(), "max_new_tokens": 2},
        "subspaces.curve": {"site": SITE, "where": "audio", "basis": object(), "ks": [1]},
        "subspaces.effects": {"site": SITE, "where": "audio", "basis": object()},
    }
    return given.get(name, {})


UNFIT = {  # what the shipped clips or the shipped model lack, as the method itself says
    "adapters.classifier_lens": "writes tokens, not classes",
    "encoder_lens.loops": "there is no loop",
    "modality_gap.tars_reward": "fewer than 3 tokens",
}
BY_NAME = [
    pytest.param(name, marks=() if name == "grounding.answers" else pytest.mark.slow)
    for name in sorted(name for name in METHODS if not name.startswith("test_"))
]


@pytest.mark.unchecked
@pytest.mark.parametrize("name", BY_NAME)
def test_a_method_runs_in_units_or_is_refused_before(
    name: str, embedded: HookedAudioTransformer, tmp_path: Path
) -> None:
    items = demo_items()[ROWS]
    if name == "scrubbing.scrub":  # where every item has another one that may lend to it
        items = Items([*items, *(item.replaced(id=f"{item.id} again") for item in items)])
    given = arguments(name, items)
    pairs = {"stream": "audio"} if _takes_pairs(name) else {}
    table = items.to_table(tmp_path / "items.jsonl")
    lost = [key for key, value in given.items() if type(value) is object]
    if METHODS[name].whole or lost:
        with pytest.raises(StudyError, match=rf"no study of {name}" if not lost else lost[0]):
            studies.Study(table, out=tmp_path / "out", method=name, **pairs, **given)
        assert not (tmp_path / "out").exists()
        return
    study = studies.Study(table, out=tmp_path / "out", method=name, **pairs, **given)
    job = Methods(study.spec)
    if name in UNFIT:
        with pytest.raises(ValueError, match=UNFIT[name]):
            job.run(embedded, study.store.items)
        return
    (found,) = job.run(embedded, study.store.items)
    assert found.layout.columns.keys() == found.values.keys()
    for column, values in zip(found.layout.columns.values(), found.values.values(), strict=True):
        assert values.shape == (len(found.rows), *column.shape)
    assert np.isfinite(found.values["value"]).any()


def _takes_pairs(name: str) -> bool:
    return list(inspect.signature(METHODS[name].function).parameters)[1].startswith("pair")
