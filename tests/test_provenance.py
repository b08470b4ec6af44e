"""What results remember, and making them again from it."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio_lens
from audio_lens import Band, HookedAudioTransformer, Span, metrics, patching
from audio_lens.provenance import is_own, recalled, recorded, revision_of, weights_hash
from tiny import hf_inputs, tiny_hf

RATE = 16_000
METRIC = metrics.logit_diff(5, 6)


@pytest.fixture(scope="module")
def model():
    return HookedAudioTransformer.from_hf(tiny_hf("qwen2_audio"))


@pytest.fixture(scope="module")
def pair(model):
    clean = model.as_inputs(hf_inputs("qwen2_audio"))
    noise = torch.randn(clean.features.shape, generator=torch.Generator().manual_seed(0))
    return {"clean": clean, "corrupted": replace(clean, features=clean.features + noise)}


def asked(**options):
    usual = {"site": "decoder.resid_pre", "axes": ("layer", "time"), "metric": METRIC}
    return usual | options


@pytest.mark.parametrize(
    "value",
    [
        None, 0.1, "position", (0.2, 0.1), ["decoder.attn_out", "decoder.mlp_out"],
        [Span(0.1, 0.2, "seven"), Span(0.2, 0.4)], [Band(100, 200)], METRIC,
        {"a": metrics.kl(), "b": metrics.log_prob(["x", "y"], position=-2)},
        metrics.forced_choice("a", ["a", "b"]), metrics.sequence_log_prob("two"),
        metrics.ctc_diff("a", [3]), metrics.of_stream("audio.1", metrics.prob(3)),
    ],
)  # fmt: skip
def test_arguments_survive_json(value):
    held = json.loads(json.dumps(recorded({"it": value})))["it"]
    assert not is_own(held)
    assert json.dumps(recorded({"it": recalled(held)})["it"]) == json.dumps(held)
    assert type(recalled(held)) is type(value)


class LogitDiff(metrics.Metric):
    """Somebody's own, called as one of the package."""

    name = "own"

    def _bind(self, model, inputs, reference):
        return metrics.Reading(torch.zeros(1, 1), None, torch.sum)


@pytest.mark.parametrize(
    "value", [lambda x: x, metrics.read_at(torch.sum), torch.ones(2), LogitDiff()]
)
def test_what_no_file_holds_is_marked(value):
    for one in (value, {"name": value}):
        assert is_own(json.loads(json.dumps(recorded({"it": one})))["it"])


def test_a_result_says_where_it_comes_from(model, pair):
    result = patching.sweep(model, **pair, **asked())
    for name in ("torch", "transformers", "audio_lens", "python", "clean_hash", "seed"):
        assert result.meta[name]
    assert result.meta["weights_hash"] == weights_hash(model)
    assert result.recipe["arguments"]["axes"] == {"tuple": ["layer", "time"]}


def test_weights_are_told_apart(model):
    before = weights_hash(model)
    weight = model.decoder.blocks[0].mlp.fc_in.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.01)
    assert weights_hash(model) != before
    with torch.no_grad():
        weight.copy_(kept)
    assert weights_hash(model) == before != weights_hash(model.double())
    model.float()


def test_the_revision_of_a_cached_checkpoint(tmp_path, monkeypatch):
    found = tmp_path / "models--a--b" / "snapshots" / "c0ffee" / "config.json"
    module = "audio_lens.provenance.try_to_load_from_cache"
    monkeypatch.setattr(module, lambda name, file: str(found))
    assert revision_of("a/b") == "c0ffee"
    assert revision_of("embedded") is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axes": ("layer", "head"), "site": "decoder.attn.z", "direction": "noise", "layers": [0]},
        {"windows": [Span(0.0, 0.2), Span(0.2, 0.5)], "metric": {"a": METRIC, "b": metrics.kl()}},
        {"windows": 0.25, "refine": 0.01},
        {"site": "decoder.attn.pattern", "axes": ("layer", "head")},
    ],
)  # fmt: skip
def test_a_saved_map_is_made_again(model, pair, options, tmp_path):
    result = patching.sweep(model, **pair, **asked(**options))
    again = patching.rerun(patching.load(result.save(tmp_path / "map.nc")), model, **pair)
    assert again.agrees and again.difference <= again.tolerance and again.changed == {}
    assert again.result.values.shape == result.values.shape
    json.dumps(again.to_dict())


def test_only_the_cells_that_were_computed_are_made_again(model, pair):
    result = patching.plan(model, **pair, **asked()).run(only=[1, 2])
    again = patching.rerun(result, model, **pair)
    assert again.agrees and again.n_cells == 2
    assert again.result.values.isnan().sum() == result.values.isnan().sum()


@pytest.mark.parametrize("method, steps", [("atp", None), ("ig", 2)])
def test_an_attribution_is_made_again(model, pair, method, steps, tmp_path):
    estimate = patching.attribute(model, **pair, **asked(), method=method, steps=steps)
    saved = patching.load(estimate.save(tmp_path / "map.nc"))
    assert patching.rerun(saved, model, **pair).agrees


def test_other_values_do_not_agree(model, pair):
    result = patching.sweep(model, **pair, **asked())
    result.values[0, 0, 0] += 0.1
    result.meta["torch"] = "1.0"
    again = patching.rerun(result, model, **pair)
    assert not again.agrees and again.difference == pytest.approx(0.1, rel=1e-3)
    assert again.changed == {"torch": ("1.0", torch.__version__)}


def test_what_cannot_be_made_again_says_why(model, pair):
    result = patching.sweep(model, **pair, **asked())

    def fails(match, saved=result, model=model, **given):
        with pytest.raises(patching.RerunError, match=match):
            patching.rerun(saved, model, **(pair | given))

    fails("inputs in memory", clean=None)
    fails("clean inputs are not those", clean=pair["corrupted"])
    fails("part or a mean", result.select(layer=0))
    fails(
        "takes no source", source=pair["clean"], saved=patching.attribute(model, **pair, **asked())
    )
    fails("other weights", model=HookedAudioTransformer.from_hf(tiny_hf("whisper")))
    model.add_hook("decoder.blocks.0.hook_resid_pre", lambda x, hook: x)
    fails("hooks were attached to nothing")
    model.reset_hooks()
    own = patching.sweep(model, **pair, **asked(metric=lambda logits: logits[:, -1, 5]))
    fails("metric of this map was your own", own)
    assert patching.rerun(own, model, **pair, metric=lambda logits: logits[:, -1, 5]).agrees
    result.recipe = {}
    fails("recorded no arguments")


def refused(match, saved, model, pair, **given):
    with pytest.raises(patching.RerunError, match=match):
        patching.rerun(saved, model, **pair, **given)


@pytest.mark.parametrize("part", ["decoder.blocks.0.attn.o_proj", "encoder.blocks.0.mlp.fc_in"])
def test_a_model_of_which_some_numbers_changed_is_refused(pair, part):
    model = HookedAudioTransformer.from_hf(tiny_hf("qwen2_audio"))
    result = patching.sweep(model, **pair, **asked())
    weight = model.get_submodule(part).weight
    weight.data[:, weight.shape[1] // 2 :] = 0
    refused("other weights", result, model, pair)


def test_a_model_with_its_adapter_off_is_another():
    import peft

    tuned = peft.get_peft_model(
        tiny_hf("whisper"),
        peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
    )
    model = HookedAudioTransformer.from_hf(tuned)
    before = weights_hash(model)
    with model.lora_disabled():
        assert weights_hash(model) != before
    assert weights_hash(model) == before


def over(margin):
    return lambda logits: (logits[:, -1, 5] > margin).float() + logits[:, -1, 5]


def test_a_metric_of_another_code_is_refused(model, pair, tmp_path):
    result = patching.sweep(model, **pair, **asked(metric=over(0.0)))
    saved = patching.load(result.save(tmp_path / "map.nc"))
    refused("given as metric is not what this map", saved, model, pair, metric=over(1.0))
    assert patching.rerun(saved, model, **pair, metric=over(0.0)).agrees


def test_a_metric_without_identity_is_refused(model, pair):
    numbers = (i for i in range(10_000))

    def counting(logits):
        next(numbers)
        return logits[:, -1, 5]

    unknown = patching.sweep(model, **pair, **asked(metric=counting))
    refused("metric of this map cannot be known", unknown, model, pair, metric=counting)
    refused("metric of this map cannot be known", unknown, model, pair, metric=over(0.0))
    known = metrics.versioned(counting, "1")
    result = patching.sweep(model, **pair, **asked(metric=known))
    assert patching.rerun(result, model, **pair, metric=known).agrees
    newer = metrics.versioned(counting, "2")
    refused("given as metric is not", result, model, pair, metric=newer)


def test_hooks_and_sources_of_another_kind_are_refused(pair):
    model, name = HookedAudioTransformer.from_hf(tiny_hf("qwen2_audio")), "hook_resid_pre"
    model.add_hook(f"decoder.blocks.0.{name}", lambda x, hook: x * 1.1)
    result = patching.sweep(model, **pair, **asked())
    model.reset_hooks()
    model.add_hook(f"decoder.blocks.0.{name}", lambda x, hook: x * 1.2)
    refused("given as hooks is not", result, model, pair)
    model.reset_hooks()
    model.add_hook(f"decoder.blocks.0.{name}", lambda x, hook: x * 1.1)
    assert patching.rerun(result, model, **pair).agrees
    model.reset_hooks()
    _, cache = model.run_with_cache(pair["clean"], names_filter=lambda x: x.endswith(name))
    result = patching.sweep(model, **pair, **asked(source=cache))
    assert patching.rerun(result, model, **pair, source=cache).agrees
    other = {key: x * 1.01 for key, x in cache.items()}
    refused("given as source is not", result, model, pair, source=other)


def test_a_map_without_values_agrees_with_nothing(model, pair):
    result = patching.sweep(model, **pair, **asked())
    result.values[:] = torch.nan
    refused("holds no value, only NaN", result, model, pair)
    two = patching.sweep(model, **pair, **asked(metric={"a": METRIC, "b": metrics.prob(5)}))
    two.values[1] = torch.nan
    refused("no value of metric 'b'", two, model, pair)


def test_infinite_values_agree_with_themselves(model, pair):
    calls = []

    def steep(logits):
        calls.append(1)
        is_baseline = len(calls) <= 2
        return logits[:, -1, 5] if is_baseline else logits[:, -1, 5] * torch.inf

    metric = metrics.versioned(steep, 1)
    result = patching.sweep(model, **pair, **asked(metric=metric))
    assert result.values.isinf().any()
    calls.clear()
    assert patching.rerun(result, model, **pair, metric=metric).agrees


def test_files_are_recognised_by_what_they_hold(tmp_path):
    clips = {name: tmp_path / f"{name}.wav" for name in ("clean", "corrupted")}
    for i, path in enumerate(clips.values()):
        soundfile.write(path, np.full(RATE // 10, 0.1 * i + 0.1), RATE)
    record = json.loads(json.dumps(patching.ClipPair(**clips, question="which?").record()))
    assert patching.ClipPair.from_record(record).question == "which?"
    moved = clips["clean"].rename(tmp_path / "moved.wav")
    with pytest.raises(patching.ChangedFileError, match=r"not at .* any more"):
        patching.ClipPair.from_record(record)
    assert patching.ClipPair.from_record(record, clean=moved).clean == moved
    soundfile.write(moved, np.zeros(RATE // 10), RATE)
    with pytest.raises(patching.ChangedFileError, match="hash of the file differs"):
        patching.ClipPair.from_record(record, clean=moved)


def test_the_package_prints_nothing():
    """Only the command line prints, and the process that speaks for espeak answers on stdout."""
    root = Path(audio_lens.__file__).parent
    printing = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    }
    assert printing <= {"espeak.py"}
