"""Edits in force: while a model writes, in sweeps, with gradients, from files, and when refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from subjects import batch, tiny_model

from audio_lens import (
    DeadHookError,
    Edit,
    InputError,
    Span,
    Words,
    edits,
    intervene,
    metrics,
    patching,
    places,
)
from audio_lens.models.layers import KVCache
from audio_lens.sites import SiteError

RATE = 16_000
ERASE = edits.Erase(torch.ones(3, 1), torch.ones(3, 1), torch.zeros(3))
LAST_TO_AUDIO = Edit("decoder.attn.attn_scores", edits.Block("audio"), layer=[1], where="last")


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0)).numpy() * 0.1


@pytest.fixture(scope="module")
def model(embedded):
    return embedded


@pytest.fixture(scope="module")
def inputs(model, noise):
    """Two prompts of unequal audio and unequal text."""
    texts = ["Which digit is first?", "Ignore the sound. Which digit is second?"]
    return model.prepare([noise[:RATE], noise], texts, RATE)


def logits(model, inputs, *given, **options):
    with torch.no_grad(), intervene(model, *given):
        return model(inputs, **options)


# -------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "edit",
    [
        LAST_TO_AUDIO,
        Edit("decoder.resid_pre", edits.Scale(0.5), layer=2, where="audio"),
        Edit("decoder.resid_pre", edits.Scale(0.5), layer=2, where=Words("digit") | "last"),
        Edit("encoder.attn.z", edits.Put(0.0), layer=1, head=2, where=(0.2, 0.6)),
        Edit("decoder.attn.pattern", edits.Weights(2.0, ~places.AUDIO), layer=3, where="text"),
        Edit("connector.out", edits.Add(1.0), where="audio"),
    ],
    ids=str,
)
def test_a_batch_of_unequal_rows_equals_the_rows_one_by_one(model, noise, inputs, edit) -> None:
    both = logits(model, inputs, edit)
    texts = ["Which digit is first?", "Ignore the sound. Which digit is second?"]
    for row, clip in enumerate((noise[:RATE], noise)):
        alone = logits(model, model.prepare(clip, texts[row], RATE), edit)
        torch.testing.assert_close(both[row, -1], alone[0, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[:, -1], model(inputs)[:, -1], atol=1e-3)


def test_places_may_differ_by_row(model, inputs) -> None:
    edit = Edit("decoder.resid_pre", edits.Scale(0.0), layer=3, where=["last", Words("second")])
    both = logits(model, inputs, edit)
    alone = logits(model, inputs, Edit(edit.site, edit.do, layer=3, where="last"))
    assert torch.equal(both[0], alone[0])
    assert not torch.allclose(both[1], alone[1])


# -------------------------------------------------------------------------------- composing


def test_edits_compose_in_order(model, inputs) -> None:
    add, scale = (
        Edit("decoder.resid_pre", do, layer=2, where="audio")
        for do in (edits.Add(1.0), edits.Scale(3.0))
    )
    by_hand = {}
    with torch.no_grad():
        for name, order in (("one", (add, scale)), ("other", (scale, add))):
            with intervene(model, *order):
                _, by_hand[name] = model.run_with_cache(
                    inputs, names_filter="decoder.blocks.2.hook_resid_pre"
                )
        _, cache = model.run_with_cache(inputs, names_filter="decoder.blocks.2.hook_resid_pre")
    where = places.locate(model, inputs, "decoder.resid_pre", "audio")
    before = cache["decoder.blocks.2.hook_resid_pre"][where]
    name = "decoder.blocks.2.hook_resid_pre"
    torch.testing.assert_close(by_hand["one"][name][where], 3 * (before + 1))
    torch.testing.assert_close(by_hand["other"][name][where], 3 * before + 1)


def test_blocks_nest_and_leave_nothing_behind(model, inputs) -> None:
    with torch.no_grad():
        before = model(inputs)
        with intervene(model, LAST_TO_AUDIO), intervene(model, Edit("mlp_out", edits.Scale(0.0))):
            both = model(inputs)
        assert torch.equal(model(inputs), before)
    assert torch.equal(
        both, logits(model, inputs, LAST_TO_AUDIO, Edit("mlp_out", edits.Scale(0.0)))
    )


def test_inputs_as_a_source_run_without_the_edits(model, inputs, noise) -> None:
    other = inputs.with_audio([noise[RATE:], noise[::-1].copy()], RATE)
    site = "decoder.blocks.2.hook_resid_pre"
    with torch.no_grad():
        _, cache = model.run_with_cache(other, names_filter=site)
    edit = Edit("decoder.resid_pre", edits.Put(other), layer=2, where="audio")
    held = Edit("decoder.resid_pre", edits.Put(cache), layer=2, where="audio")
    assert torch.equal(logits(model, inputs, edit), logits(model, inputs, held))
    patched = patching.patch(model, inputs, [patching.Patch("resid_pre", 2, source=other)])
    whole = logits(model, inputs, Edit("resid_pre", edits.Put(other), layer=2))
    assert torch.equal(whole, patched)


def test_the_mean_is_over_rows_and_positions_that_hold_something(model, inputs) -> None:
    name = "decoder.blocks.1.attn.hook_z"
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=name)
    mean = cache[name][inputs.attended].mean(0)
    found = logits(model, inputs, Edit("attn.z", edits.Put("mean"), layer=1, head=3))
    assert torch.equal(found, logits(model, inputs, Edit("attn.z", edits.Put(mean), 1, 3)))


def test_a_raised_score_is_a_shared_out_weight(model, inputs) -> None:
    log_beta = torch.tensor(2.0).log()
    bias, weights = (
        Edit(f"decoder.attn.{site}", do, where="last")
        for site, do in (
            ("attn_scores", edits.Bias(float(log_beta), "audio")),
            ("pattern", edits.Weights(2.0, "audio")),
        )
    )
    torch.testing.assert_close(
        logits(model, inputs, bias), logits(model, inputs, weights), rtol=1e-4, atol=1e-4
    )


# -------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
@pytest.mark.parametrize("name", ["whisper", "qwen2_audio", "voxtral", "granite_speech"])
def test_edits_act_while_the_model_writes(name: str, when: str) -> None:
    """As hooks by hand do, of which each knows whether it is at the prompt or behind it."""
    model = tiny_model(name)
    prompts = model.as_inputs(
        batch(name, 0, "left" if name in ("whisper", "qwen2_audio") else None)
    )
    n_prompt, steps = prompts.tokens.shape[1], []

    def by_hand(x, hook):
        is_prompt = x.shape[1] == n_prompt
        if when != "both" and is_prompt != (when == "prefill"):
            return None
        x = x.clone()
        steps.append(x.shape[1])
        x[:, -1, 1] *= -3
        return x

    edit = Edit("decoder.attn.z", edits.Scale(-3.0), layer=1, head=1, where="last", when=when)
    with torch.no_grad():
        with intervene(model, edit):
            found = model.generate(prompts, max_new_tokens=4, return_type="tokens")
        model.add_hook("decoder.blocks.1.attn.hook_z", by_hand)
        try:
            expected = model.generate(prompts, max_new_tokens=4, return_type="tokens")
        finally:
            model.reset_hooks()
    assert torch.equal(found, expected)
    assert len(steps) >= 1


def test_keys_stay_named_behind_the_prompt(model, inputs) -> None:
    """Step by step with a cache as in one forward over all that was written."""
    edit = Edit("decoder.attn.attn_scores", edits.Block("audio"), layer=[2, 3], where="text")
    new = torch.tensor([[50, 60], [70, 80]])
    with torch.no_grad(), intervene(model, edit):
        past = KVCache()
        model(inputs, past=past)
        mask = torch.cat([inputs.attended, torch.ones(2, 2, dtype=torch.bool)], 1)
        later = model(
            type(inputs)(
                inputs.features[:0],
                new,
                (0, 0),
                attention_mask=mask,
            ),
            past=past,
        )
        longer = type(inputs)(
            inputs.features,
            torch.cat([inputs.tokens, new], 1),
            inputs.clips_per_row,
            attention_mask=mask,
            feature_mask=inputs.feature_mask,
        )
        whole = model(longer)
    torch.testing.assert_close(later, whole[:, -2:], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- elsewhere


def test_sweeps_run_under_edits(model, inputs, noise) -> None:
    other = inputs.with_audio([noise[RATE:], noise[::-1].copy()], RATE)
    arguments = {
        "clean": inputs,
        "corrupted": other,
        "site": "decoder.resid_pre",
        "axes": ("layer",),
        "metric": metrics.logit_diff("two", "seven"),
    }
    edit = Edit("decoder.attn.attn_scores", edits.Block("audio"), layer=2, where="last")
    with intervene(model, edit):
        swept = patching.sweep(model, verify=3, **arguments)
        cells = [
            patching.patch(
                model,
                other,
                [patching.Patch("decoder.resid_pre", layer, source=inputs)],
                metric=arguments["metric"],
            )
            for layer in range(model.cfg.decoder.n_layers)
        ]
    found, expected = torch.as_tensor(swept.values), torch.stack(cells, dim=-1)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-3)
    plain = torch.as_tensor(patching.sweep(model, **arguments).values)
    assert not torch.allclose(plain.double(), found.double(), atol=1e-2)


@pytest.mark.parametrize("layer", [2, 5])
def test_attribution_runs_under_edits(model, inputs, noise, layer: int) -> None:
    other = inputs.with_audio([noise[RATE:], noise[::-1].copy()], RATE)
    arguments = {
        "clean": inputs,
        "corrupted": other,
        "site": "decoder.attn.z",
        "axes": ("layer", "head"),
        "layers": [1, 2],
        "metric": metrics.logit_diff("two", "seven"),
    }
    where = places.locate(model, inputs, "decoder.mlp_out", "last")[..., None]
    with intervene(model, Edit("decoder.mlp_out", edits.Scale(3.0), layer=layer, where="last")):
        found = patching.attribute(model, **arguments)
    name = f"decoder.blocks.{layer}.hook_mlp_out"
    plain = patching.attribute(model, **arguments)
    with model.hooks([(name, lambda x, hook: torch.where(where, 3.0 * x, x))]):
        expected = patching.attribute(model, **arguments)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        torch.as_tensor(found.values), torch.as_tensor(plain.values), atol=1e-2
    )


# -------------------------------------------------------------------------------- gradients


def test_gradients_reach_tensors_of_edits_and_the_inputs() -> None:
    """Against finite differences, in float64."""
    model = tiny_model("qwen2_audio")
    prompts = model.as_inputs(batch("qwen2_audio", 0, "left"))
    d = model.cfg.decoder.d_model
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(d, generator=generator, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(d, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    features = prompts.features.clone().requires_grad_(True)

    def value(vector, basis, beta, features):
        given = [
            Edit("decoder.resid_pre", edits.Add(vector), layer=1, where="audio"),
            Edit("decoder.resid_pre", edits.Project(basis), layer=2, where="last"),
            Edit("decoder.attn.pattern", edits.Weights(beta, "audio"), layer=2, where="last"),
            Edit("decoder.attn.attn_scores", edits.Sharpen(beta, "audio"), layer=1, where="text"),
            Edit("decoder.attn.attn_scores", edits.Bias(beta, "audio"), layer=0, where="text"),
        ]
        with intervene(model, *given):
            return model(replace(prompts, features=features))[:, -1].cos().sum()

    slopes = torch.autograd.grad(
        value(vector, basis, beta, features), (vector, basis, beta, features)
    )
    tensors = (vector, basis, beta, features)
    for number, (tensor, slope) in enumerate(zip(tensors, slopes, strict=True)):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        step, moved = 1e-5, []
        for sign in (1, -1):
            changed = list(t.detach() for t in tensors)
            changed[number] = changed[number] + sign * step * direction
            with torch.no_grad():
                moved.append(value(*changed))
        numeric = (moved[0] - moved[1]) / (2 * step)
        analytic = (slope * direction).sum()
        assert abs(numeric - analytic) <= 1e-4 * max(1.0, abs(float(analytic))), number


# -------------------------------------------------------------------------------- files


def test_edits_come_back_from_files(model, inputs, tmp_path) -> None:
    d = model.cfg.decoder.d_model
    name = "decoder.blocks.2.hook_resid_pre"
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=name)
    mask = places.locate(model, inputs, "decoder.resid_pre", "audio")
    given = [
        LAST_TO_AUDIO,
        Edit("decoder.resid_pre", edits.Put(cache), layer=2, where=Words("digit") | "last"),
        Edit("decoder.resid_pre", edits.Add(torch.ones(d), 0.5), layer=1, where=mask),
        Edit("decoder.resid_pre", edits.Mix(inputs, 0.5), layer=3, where=~Span(0.1, 0.5)),
        Edit("decoder.attn.z", edits.Scale(2.0), head=[1, 2], where=["last", slice(-3, None)]),
        Edit("decoder.attn.attn_scores", edits.Multiply(0.1, places.AUDIO - (0.0, 0.3)), layer=4),
    ]
    edits.save(given, tmp_path / "edits.json")
    again = edits.load(tmp_path / "edits.json")
    assert [str(one) for one in again] == [str(one) for one in given]
    assert torch.equal(logits(model, inputs, *given), logits(model, inputs, *again))


def test_functions_are_not_written(tmp_path) -> None:
    edit = Edit("decoder.resid_pre", edits.Latents(Identity(), torch.relu), layer=1)
    with pytest.raises(InputError, match="Identity, which no file can"):
        edits.save(edit, tmp_path / "edits.json")
    assert not (tmp_path / "edits.json").exists()


class Identity:
    def encode(self, x):
        return x

    def decode(self, latents):
        return latents


@pytest.mark.parametrize(
    "text", ["", "{}", '{"edits": [{"kind": "Edit"}]}', '{"edits": [{"kind": "Nothing"}]}', "[1]"]
)
def test_files_without_edits_are_named(tmp_path, text) -> None:
    path = tmp_path / "edits.json"
    path.write_text(text)
    if text == "{}":
        text = ""
    with pytest.raises(InputError):
        edits.load(path)
    with pytest.raises(InputError, match=r"other\.json holds no edits"):
        edits.load(tmp_path / "other.json")


# -------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (lambda: Edit("decoder.resid_pre", 0.0), InputError, r"edits\.Put\(value\)"),
        (lambda: Edit("decoder.resid_pre", edits.Scale(1), when="later"), InputError, "'prefill'"),
        (lambda: Edit("decoder.nothing", edits.Scale(1)), SiteError, "cannot be swept"),
        (lambda: Edit("decoder.resid_pre", edits.Scale(1), layer=6), SiteError, "0 to 5"),
        (lambda: Edit("decoder.resid_pre", edits.Scale(1), head=1), SiteError, "has no heads"),
        (lambda: Edit("decoder.attn.z", edits.Scale(1), head=99), SiteError, "heads of"),
        (lambda: Edit("decoder.attn.z", edits.Scale(1), neuron=1), SiteError, "has no neurons"),
        (lambda: Edit("connector.out", edits.Scale(1), layer=0), SiteError, "outside the blocks"),
        (lambda: Edit("resid_pre", edits.Block("audio")), SiteError, "Block edits"),
        (lambda: Edit("attn.pattern", edits.Bias(1.0, "audio")), SiteError, "attn_scores, not"),
        (lambda: Edit("attn.pattern", edits.Multiply(1.0, "audio")), SiteError, "attn_scores, not"),
        (lambda: Edit("attn_scores", edits.Weights(2, "audio", False)), SiteError, "attn.pattern"),
        (lambda: Edit("attn.pattern", edits.Weights(-1, "audio")), InputError, "negative"),
        (lambda: Edit("attn.pattern", edits.Project(torch.eye(3))), SiteError, "edits vectors"),
        (
            lambda: Edit("mlp.post", edits.Project(torch.eye(3)), neuron=1),
            SiteError,
            "leave out neuron",
        ),
        (lambda: Edit("resid_pre", edits.Project(torch.ones(3))), InputError, "d by k"),
        (lambda: Edit("resid_pre", edits.Project(torch.ones(3, 2))), InputError, "depend"),
        (lambda: Edit("resid_pre", edits.Project(torch.eye(3))), InputError, "192 entries"),
        (lambda: Edit("resid_pre", ERASE), InputError, "have 192 entries, the directions 3"),
        (
            lambda: Edit("resid_pre", replace(ERASE, write=torch.ones(3, 2))),
            InputError,
            "got 3 by 1 and 3 by 2",
        ),
        (
            lambda: Edit("resid_pre", replace(ERASE, centre=torch.tensor(1.0))),
            InputError,
            "as long as these, got a number",
        ),
        (lambda: Edit("resid_pre", edits.Put("median")), InputError, "not from str 'median'"),
        (lambda: Edit("resid_pre", edits.Put(None)), InputError, "values come from"),
        (lambda: Edit("resid_pre", edits.Put(torch.ones(7))), InputError, r"has shape \(7,\)"),
        (lambda: Edit("resid_pre", edits.Put({"x": torch.ones(7)})), SiteError, "does not hold"),
        (lambda: Edit("resid_pre", edits.Scale(1), where="sound"), InputError, "no place"),
        (lambda: Edit("resid_pre", edits.Scale(1), where=(3, 4)), InputError, "prompt 0"),
        (
            lambda: Edit("attn_scores", edits.Block((3, 4)), where="last"),
            InputError,
            "selects no position",
        ),
        (lambda: Edit("attn_scores", edits.Block("all"), where="last"), InputError, "no key left"),
        (
            lambda: Edit("attn.pattern", edits.Weights(0, "all"), where="last"),
            InputError,
            "no key left",
        ),
        (lambda: Edit("resid_pre", edits.Scale(1), when="decode"), InputError, "plain forward"),
        (lambda: Edit("encoder.resid_pre", edits.Scale(1), when="decode"), InputError, "writes"),
        (lambda: [], InputError, "no edits"),
    ],
)
def test_edits_that_make_no_sense_are_refused(model, inputs, given, kind, message) -> None:
    with pytest.raises((kind, TypeCheckError)) as caught:
        logits(model, inputs, given())
    assert re.search(message, str(caught.value)) or isinstance(caught.value, TypeCheckError)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_edits_that_never_act_are_named(model, inputs) -> None:
    edit = Edit("decoder.resid_pre", edits.Scale(2.0), layer=1, where="last", when="decode")
    named = r"took no effect: Scale of decoder\.resid_pre, layer 1"
    with pytest.raises(DeadHookError, match=named), intervene(model, edit):
        model.generate(inputs, max_new_tokens=1)
    encoder = Edit("encoder.resid_pre", edits.Scale(2.0), layer=1)
    with torch.no_grad():
        heard = model.encode(inputs)
        with pytest.raises(DeadHookError), intervene(model, encoder):
            model(inputs, encoder_out=heard)


def test_fused_attention_has_no_scores_to_edit(model, inputs) -> None:
    with model.attention("sdpa"), pytest.raises(DeadHookError, match="sdpa"):
        logits(model, inputs, LAST_TO_AUDIO)


def test_a_source_of_the_prompt_holds_nothing_behind_it(model, inputs) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="decoder.blocks.1.hook_resid_pre")
    edit = Edit("decoder.resid_pre", edits.Put(cache), layer=1, where="last")
    with pytest.raises(InputError, match='when="prefill"'), intervene(model, edit):
        model.generate(inputs, max_new_tokens=3)
