"""Names are strict, edits stay where they are made, and hooks leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformer_lens.utilities import Slice, get_act_name

import tiny
from audio_lens import DeadHookError, HookedAudioTransformer, HookNameError, HookPoint, InputError
from audio_lens.hooks import is_flat, is_large, local_name, position_dim
from audio_lens.models.layers import Attention

POSITION = 2  # a place that holds audio or a word in every part of `inputs`, in row 0


@pytest.fixture
def two_clips(family: str) -> dict:
    """Inputs of one prompt (Qwen2-Audio: with two clips)."""
    lengths = [201] if family == "whisper" else [(101, 75)]
    return tiny.hf_inputs(family, lengths=lengths, words=[6])


@pytest.fixture
def single(family: str) -> dict:
    """A batch of one."""
    return tiny.hf_inputs(family, lengths=[201], words=[6])


def place(name: str) -> tuple:
    """Index of one position of row 0 in the activation of this name."""
    last = local_name(name)
    if is_flat(name):
        return (POSITION,)
    if last in ("hook_mel", "hook_conv1"):
        return (0, slice(None), POSITION)
    if last == "hook_token_embed":
        return (0, 0)  # a word: audio is written over the placeholders
    return (0, slice(None), POSITION) if position_dim(name) == 2 else (0, POSITION)


def perturbed(act: Tensor, hook: HookPoint) -> Tensor:
    """The activation with one position of row 0 changed, not uniformly."""
    noise = torch.randn(act[place(hook.name)].shape, generator=torch.Generator().manual_seed(0))
    changed = act.clone()
    changed[place(hook.name)] = changed[place(hook.name)] * (1 + 0.3 * noise) + 0.2 * noise.abs()
    return changed


def identity(act: Tensor, hook: HookPoint) -> Tensor:
    return act


def count_hooks(model: HookedAudioTransformer) -> int:
    return sum(map(len, model.list_hooks().values()))


# -------------------------------------------------------------------------------- points


def test_every_documented_point_exists(model, family):
    """The names of DESIGN's contract, in both parts."""
    stack = ["hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "hook_out"]
    attention = ["q", "k", "v", "z", "attn_scores", "pattern", "result"]
    block = [f"hook_{x}" for x in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    block += [f"attn.hook_{x}" for x in attention] + ["mlp.hook_pre", "mlp.hook_post"]
    block += [f"{ln}.hook_{x}" for ln in ("ln1", "ln2") for x in ("scale", "normalized")]
    for part, cfg in model.cfg.parts.items():
        for layer in range(cfg.n_layers):
            stack += [f"blocks.{layer}.{name}" for name in block]
        assert {f"{part}.{name}" for name in stack} <= model.hook_dict.keys()
    extra = {
        "whisper": ["cross_attn.hook_pattern", "hook_cross_attn_out", "hook_resid_mid_cross"],
        "qwen2_audio": [
            "attn.hook_rot_q",
            "attn.hook_rot_k",
            "mlp.hook_gate",
            "mlp.hook_pre_linear",
        ],
    }[family]
    assert {f"decoder.blocks.1.{name}" for name in extra} <= model.hook_dict.keys()
    outside = {
        "whisper": {"hook_logits", "encoder.hook_pos_embed", "decoder.hook_pos_embed"},
        "qwen2_audio": {
            *("hook_logits", "encoder.hook_pos_embed", "encoder.hook_pooled"),
            *("connector.hook_in", "connector.hook_out"),
            *("decoder.hook_token_embed", "decoder.hook_audio_embed"),
        },
    }[family]
    assert outside <= model.hook_dict.keys()


def in_place(act: Tensor, hook: HookPoint) -> Tensor:
    act[place(hook.name)] = perturbed(act, hook)[place(hook.name)]
    return act


@pytest.mark.slow
def test_in_place_edits_stay_where_they_are_made(model, inputs):
    """They equal edits of a copy, and change neither weights, nor inputs, nor earlier points."""
    order: list[str] = []
    with model.hooks([(lambda name: True, lambda act, hook: order.append(hook.name))]):
        model(inputs)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    _, before = model.run_with_cache(inputs)
    wrong = []
    for name in order:
        copied = model.run_with_hooks(inputs, fwd_hooks=[(name, perturbed)])
        with model.hooks([(name, in_place)]):
            edited, cache = model.run_with_cache(inputs)
        earlier = [n for n in order[: order.index(name)] if n in before]
        if not torch.allclose(edited, copied, atol=1e-5):
            wrong.append(f"{name}: not the edit of a copy")
        wrong += [f"{name}: {n}" for n in earlier if not torch.equal(cache[n], before[n])]
    assert not wrong
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(given[name], tensor) for name, tensor in inputs.items())


def test_in_place_edits_leave_the_given_residual(model, inputs):
    resid = model(inputs, stop_at_layer=1).detach()
    given = resid.clone()
    hooks = [("blocks.1.hook_resid_pre", in_place)]
    with model.hooks(hooks):
        model(resid, start_at_layer=1, inputs=inputs)
    assert torch.equal(resid, given)


# -------------------------------------------------------------------------------- attention mode


def test_fused_and_explicit_attention_agree(model, inputs):
    with torch.no_grad():
        logits = {}
        for mode in ("sdpa", "explicit", "auto"):
            with model.attention(mode):
                logits[mode] = model(inputs)
    assert model.attn_mode == "auto"
    assert torch.equal(logits["auto"], logits["sdpa"])
    assert not torch.equal(logits["explicit"], logits["sdpa"])
    torch.testing.assert_close(logits["explicit"], logits["sdpa"], rtol=1e-5, atol=1e-4)


def test_auto_writes_out_only_the_hooked_layer(model, inputs, monkeypatch):
    written: list[str] = []
    explicit = Attention._explicit

    def spy(self, *args):
        written.append(self.name)
        return explicit(self, *args)

    monkeypatch.setattr(Attention, "_explicit", spy)
    model(inputs)
    assert written == []
    for name in ("encoder.blocks.2.attn.hook_pattern", "decoder.blocks.1.attn.hook_attn_scores"):
        model.run_with_hooks(inputs, fwd_hooks=[(name, identity)])
        assert written == [name.rpartition(".")[0]]
        written.clear()
    model.run_with_cache(inputs)
    assert written == []


def test_unknown_attention_mode_raises(model):
    with pytest.raises(ValueError, match="'auto', 'explicit' or 'sdpa'"):
        model.attn_mode = "flash"


# -------------------------------------------------------------------------------- names


def test_unprefixed_names_mean_the_decoder(model, inputs):
    seen = []
    hooks = [
        ("blocks.1.attn.hook_pattern", lambda act, hook: seen.append((hook.name, hook.layer()))),
        (get_act_name("pattern", 2), lambda act, hook: seen.append((hook.name, hook.layer()))),
        ("encoder.blocks.0.hook_mlp_out", lambda act, hook: seen.append((hook.name, hook.layer()))),
        ("hook_logits", lambda act, hook: seen.append((hook.name, None))),
    ]
    model.run_with_hooks(inputs, fwd_hooks=hooks)
    assert sorted(seen, key=str) == [
        ("decoder.blocks.1.attn.hook_pattern", 1),
        ("decoder.blocks.2.attn.hook_pattern", 2),
        ("encoder.blocks.0.hook_mlp_out", 0),
        ("hook_logits", None),
    ]
    _, cache = model.run_with_cache(inputs, names_filter=[get_act_name("z", 1), "hook_embed"])
    assert list(cache) == ["decoder.hook_embed", "decoder.blocks.1.attn.hook_z"]


def test_points_outside_blocks_have_no_layer(model):
    with pytest.raises(ValueError, match="lies in no block"):
        model.hook_dict["encoder.hook_embed"].layer()


@pytest.mark.parametrize("wrong", ["blocks.1.hook_resid_per", "blocks.9.hook_resid_pre", "resid"])
def test_unknown_names_raise_with_the_nearest(model, inputs, wrong):
    calls = [
        lambda: model.add_hook(wrong, identity),
        lambda: model.add_perma_hook(wrong, identity),
        lambda: model.run_with_hooks(inputs, fwd_hooks=[(wrong, identity)]),
        lambda: model.hooks(bwd_hooks=[(wrong, identity)]).__enter__(),
        lambda: model.run_with_cache(inputs, names_filter=wrong),
        lambda: model.run_with_cache(inputs, names_filter=["hook_logits", wrong]),
        lambda: model.add_caching_hooks(wrong),
    ]
    for call in calls:
        with pytest.raises(HookNameError, match=r"resid_"):
            call()
    assert count_hooks(model) == 0


def test_names_like_no_other_still_get_examples(model):
    with pytest.raises(HookNameError, match=r"no hook point named '#'; nearest names: .*hook_"):
        model.resolve("#")


def test_filters_that_match_nothing_raise(model, inputs):
    calls = [
        lambda: model.add_hook(lambda name: False, identity),
        lambda: model.add_perma_hook(lambda name: "hook_foo" in name, identity),
        lambda: model.run_with_hooks(inputs, fwd_hooks=[(lambda name: False, identity)]),
        lambda: model.run_with_cache(inputs, names_filter=lambda name: "hook_foo" in name),
        lambda: model.run_with_cache(inputs, names_filter=[]),
        lambda: model.run_with_cache(inputs, part="decodr"),
    ]
    for call in calls:
        with pytest.raises(HookNameError, match=r"selects none of the \d+ hook names"):
            call()
    assert count_hooks(model) == 0


def test_hooks_that_cannot_fire_raise(model, inputs):
    resid = model(inputs, stop_at_layer=1)
    behind, pattern = "decoder.blocks.2.hook_resid_pre", "decoder.blocks.1.attn.hook_pattern"
    with pytest.raises(DeadHookError, match=r"blocks\.2\.hook_resid_pre"):
        model.run_with_hooks(inputs, fwd_hooks=[(behind, identity)], stop_at_layer=2)
    with pytest.raises(DeadHookError, match=r"blocks\.2\.hook_resid_pre"):
        model.run_with_cache(inputs, names_filter=[behind, "hook_embed"], stop_at_layer=2)
    with pytest.raises(DeadHookError):
        model.run_with_cache(
            inputs, names_filter=lambda n: "decoder" in n, stop_at_layer="encoder.1"
        )
    with model.attention("sdpa"), pytest.raises(DeadHookError, match="hook_pattern"):
        model.run_with_hooks(inputs, fwd_hooks=[(pattern, identity)])
    with pytest.raises(DeadHookError, match=r"decoder\.blocks\.0"):
        hooks = [("decoder.blocks.0.hook_mlp_out", identity)]
        model.run_with_hooks(resid, fwd_hooks=hooks, start_at_layer=1, inputs=inputs)
    assert count_hooks(model) == 0


def test_fused_attention_has_no_scores_to_hook(model, inputs):
    pattern = "decoder.blocks.1.attn.hook_pattern"
    adding = [
        lambda: model.add_hook(pattern, identity),
        lambda: model.add_perma_hook(lambda name: "hook_attn_scores" in name, identity),
        lambda: model.part("encoder").add_hook("blocks.0.attn.hook_pattern", identity),
        lambda: model.run_with_cache(inputs, attention=True),
        lambda: model.run_with_cache(inputs, names_filter="hook_embed", attention=True),
    ]
    with model.attention("sdpa"):
        for call in adding:
            with pytest.raises(DeadHookError, match='do not exist in attn_mode "sdpa"'):
                call()
        model.add_hook(lambda name: True, identity)  # of which some run
        model.reset_hooks()
    model.add_hook(pattern, identity)
    with pytest.raises(DeadHookError, match=rf"attached to {pattern}, but .*sdpa"):
        model.attn_mode = "sdpa"
    assert model.attn_mode == "auto"
    model.reset_hooks()
    model.attn_mode = "sdpa"


def test_backward_hooks_need_their_backward(model, inputs):
    name, seen = "decoder.blocks.1.hook_resid_pre", []

    def look(grad, hook):
        seen.append(hook.name)

    for view in (model, model.part("decoder")):
        with pytest.raises(DeadHookError, match=r"with model\.hooks\(bwd_hooks="):
            view.run_with_hooks(inputs, bwd_hooks=[(name, look)], return_type="loss")
    hooks = {"bwd_hooks": [(name, look)], "reset_hooks_end": False}
    model.run_with_hooks(inputs, **hooks, return_type="loss").backward()
    assert seen == [name]
    model.reset_hooks()
    assert count_hooks(model) == 0


def test_gradients_are_of_the_loss(model, inputs):
    for options in ({}, {"return_type": "both"}, {"return_type": "loss", "stop_at_layer": 0}):
        with pytest.raises(ValueError, match="use return_type='loss'"):
            model.run_with_cache(inputs, incl_bwd=True, **options)


def test_encoder_hooks_are_dead_when_the_encoder_is_skipped(model, inputs):
    encoded = model.encode(model.as_inputs(inputs))
    hooks = [("encoder.blocks.0.hook_mlp_out", identity)]
    with pytest.raises(DeadHookError, match="hook_mlp_out"):
        model.run_with_hooks(inputs, fwd_hooks=hooks, encoder_out=encoded)


def test_default_cache_of_a_stopped_run_holds_what_ran(model, inputs):
    _, cache = model.run_with_cache(inputs, stop_at_layer=1)
    assert "blocks.0.hook_resid_post" in cache and "blocks.1.hook_resid_pre" not in cache
    _, local = model.part("decoder").run_with_cache(inputs, stop_at_layer=1)
    assert "blocks.0.hook_resid_post" in local and "blocks.1.hook_resid_pre" not in local


def test_hooks_can_be_left_out_for_a_while(model, inputs):
    name = "decoder.blocks.0.hook_mlp_out"
    before = model(inputs)
    model.add_hook(name, lambda act, hook: act * 0)
    model.add_perma_hook("encoder.hook_embed", lambda act, hook: act + 1)
    held = model(inputs)
    with pytest.raises(KeyError), model.without_hooks():
        assert torch.equal(model(inputs), before)
        raise KeyError
    assert torch.equal(model(inputs), held) and not torch.equal(held, before)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(inputs), before)


# -------------------------------------------------------------------------------- life of a hook


def test_temporary_hooks_go_and_permanent_ones_stay(model, inputs):
    name, other = "decoder.blocks.0.hook_mlp_out", "encoder.blocks.0.hook_mlp_out"
    with torch.no_grad():
        before = model(inputs)
        model.add_perma_hook(name, lambda act, hook: act * 0)
        held = model(inputs)
        assert not torch.allclose(before, held)
        model.run_with_hooks(inputs, fwd_hooks=[(other, lambda act, hook: act * 0)])
        model.add_hook(other, lambda act, hook: act * 0)
        model.reset_hooks()
        assert torch.equal(model(inputs), held)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(inputs), before)


def test_nested_contexts_unwind_one_by_one(model, inputs):
    name = "decoder.blocks.0.hook_mlp_out"

    def add(act, hook):
        return act + 1

    with torch.no_grad():
        plain = model(inputs)
        with model.hooks([(name, add)]):
            once = model(inputs)
            with model.hooks([(name, add)]):
                twice = model(inputs)
            assert torch.equal(model(inputs), once)
            _, cache = model.run_with_cache(inputs, names_filter=name)
            assert torch.equal(model(inputs), once)
        _, bare = model.run_with_cache(inputs, names_filter=name)
        assert torch.equal(model(inputs), plain)
    assert not torch.allclose(once, twice)
    torch.testing.assert_close(cache[name], bare[name] + 1)


@pytest.mark.parametrize("where", ["hook", "forward"])
def test_exceptions_leave_no_hooks_behind(model, inputs, where):
    def fail(act, hook):
        raise RuntimeError("inside the hook")

    fn = fail if where == "hook" else identity
    layer = None if where == "hook" else 99
    hooks = [("hook_embed", fn), ("blocks.0.hook_mlp_out", fn)]
    with pytest.raises((RuntimeError, InputError)):
        model.run_with_hooks(inputs, fwd_hooks=hooks, stop_at_layer=layer)
    with pytest.raises((RuntimeError, InputError)), model.hooks(hooks):
        model.run_with_cache(inputs, stop_at_layer=layer)
    assert count_hooks(model) == 0
    assert model.context_level == 0


def test_contexts_are_cleared(model, inputs):
    name = "decoder.blocks.0.hook_mlp_out"

    def remember(act, hook):
        hook.ctx["seen"] = True

    model.run_with_hooks(inputs, fwd_hooks=[(name, remember)])
    assert model.hook_dict[name].ctx == {"seen": True}
    model.run_with_hooks(inputs, fwd_hooks=[(name, remember)], clear_contexts=True)
    assert model.hook_dict[name].ctx == {}


def test_hooks_may_stay_attached(model, inputs):
    with model.hooks([("hook_embed", identity)], reset_hooks_end=False):
        pass
    assert count_hooks(model) == 1
    cache = model.add_caching_hooks(["hook_embed", "encoder.hook_out"])
    model(inputs)
    assert set(cache) == {"decoder.hook_embed", "encoder.hook_out"}
    model.reset_hooks()
    assert count_hooks(model) == 0


def test_hooks_run_at_every_step_of_generation(model, family):
    inputs, shapes = tiny.hf_inputs(family, padding="left"), []
    hooks = [("blocks.1.attn.hook_pattern", lambda act, hook: shapes.append(tuple(act.shape)))]
    with model.hooks(hooks):
        tokens = model.generate(inputs, max_new_tokens=3, return_type="tokens")
    heads, n_prompt = model.cfg.decoder.n_heads, model.as_inputs(inputs).tokens.shape[1]
    steps = range(1, tokens.shape[1] - n_prompt)
    later = [(2, heads, 1, n_prompt + step) for step in steps]
    assert shapes == [(2, heads, n_prompt, n_prompt), *later]


# -------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "name",
    [
        "encoder.blocks.1.hook_resid_post",
        "encoder.blocks.2.attn.hook_attn_scores",
        "decoder.blocks.0.attn.hook_pattern",
        "decoder.blocks.1.mlp.hook_post",
        "decoder.blocks.2.attn.hook_z",
    ],
)
def test_gradients_equal_finite_differences(family, name):
    """In float64, but for what Qwen2 computes in float32 (norms, softmax), as Hugging Face does."""
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf(family, dtype=torch.float64))
    inputs = tiny.hf_inputs(family, dtype=torch.float64)
    loss, cache = model.run_with_cache(inputs, names_filter=name, incl_bwd=True, return_type="loss")
    grad = cache[name + "_grad"]
    noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = noise / noise.norm() + grad / grad.norm()
    step, tolerance = {"whisper": (1e-5, 1e-6), "qwen2_audio": (1e-2, 2e-2)}[family]

    def shifted(size):
        hooks = [(name, lambda act, hook: act + size * direction)]
        with torch.no_grad():
            return model.run_with_hooks(inputs, fwd_hooks=hooks, return_type="loss")

    slope = (shifted(step) - shifted(-step)) / (2 * step)
    assert grad.shape == cache[name].shape and loss.ndim == 0
    torch.testing.assert_close(slope, (grad * direction).sum(), rtol=tolerance, atol=1e-9)


def test_backward_hooks_see_and_change_gradients(model, inputs):
    name, seen = "decoder.blocks.1.hook_resid_pre", []

    def stop(grad, hook):
        seen.append(grad.shape)
        return (torch.zeros_like(grad),)

    weight = model.decoder.blocks[0].mlp.fc_out.weight
    with model.hooks(bwd_hooks=[(name, stop)]):
        model(inputs, return_type="loss").backward()
    assert seen == [model.run_with_cache(inputs, names_filter=name)[1][name].shape]
    assert weight.grad is not None and not weight.grad.any()
    assert model.decoder.blocks[1].mlp.fc_out.weight.grad.any()
    assert count_hooks(model) == 0


# -------------------------------------------------------------------------------- caches


def test_cached_tensors_are_what_flowed(model, inputs):
    seen = {}

    def look(act, hook):
        seen[hook.name] = act.detach().clone()

    with torch.no_grad(), model.hooks([(lambda name: True, look)]):
        logits, cache = model.run_with_cache(inputs, attention=True)
    assert seen.keys() == cache.keys() == model.hook_dict.keys()
    assert all(torch.equal(seen[name], cache[name]) for name in seen)
    assert torch.equal(cache["hook_logits"], logits)
    assert not any(tensor.requires_grad for tensor in cache.values())


def test_scores_patterns_and_results_only_if_asked(model, inputs):
    _, cache = model.run_with_cache(inputs)
    assert set(cache) == {name for name in model.hook_dict if not is_large(name)}
    patterns = {name for name in model.hook_dict if name.endswith("hook_pattern")}
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: "pattern" in name)
    assert set(cache) == patterns
    _, cache = model.run_with_cache(inputs, names_filter=["hook_embed"], attention=True)
    assert set(cache) == {"decoder.hook_embed", *filter(is_large, model.hook_dict)}
    _, cache = model.run_with_cache(inputs, part="encoder", attention=True)
    assert set(cache) == {name for name in model.hook_dict if name.startswith("encoder.")}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("wanted", [1, -1, (1, 4), slice(1, 4), [0, 3, 2], torch.tensor([2, 1])])
def test_pos_slice_keeps_positions_of_every_shape(model, inputs, part, wanted):
    with torch.no_grad():
        _, whole = model.run_with_cache(inputs, attention=True)
        _, cut = model.run_with_cache(inputs, attention=True, part=part, pos_slice=wanted)
    on_encoder = (".cross_attn.hook_k", ".cross_attn.hook_v")
    in_blocks = [name for name in model.hook_dict if name.startswith(f"{part}.blocks")]
    assert {name for name in in_blocks if not name.endswith(on_encoder)} <= set(cut)
    positions = Slice.unwrap(wanted)
    for name in cut:
        expected = positions.apply(whole[name], dim=position_dim(name))
        torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=1e-4)
        assert cut[name].untyped_storage().nbytes() == cut[name].nbytes  # holds nothing else


def test_pos_slice_default_is_the_output_part(model, inputs):
    _, cache = model.run_with_cache(inputs, pos_slice=-1)
    assert all(name.startswith("decoder.") or name == "hook_logits" for name in cache)
    assert cache["hook_logits"].shape[1] == cache["resid_post", 2].shape[1] == 1
    _, local = model.part("decoder").run_with_cache(inputs, pos_slice=-1)
    assert set(local) == {name.removeprefix("decoder.") for name in cache if "." in name}


def test_pos_slice_of_other_axes_raises(model, inputs, family):
    named = {
        "whisper": ["decoder.blocks.0.cross_attn.hook_k", "encoder.hook_mel"],
        "qwen2_audio": ["decoder.hook_audio_embed", "connector.hook_out", "encoder.hook_out"],
    }[family]
    for name in [*named, "encoder.blocks.0.hook_resid_pre"]:
        with pytest.raises(ValueError, match=f"positions of the decoder.*{name}"):
            model.run_with_cache(inputs, names_filter=name, pos_slice=-1)
    if family == "qwen2_audio":  # these lie on pooled positions
        for name in ("hook_pooled", "ln_final.hook_scale", "hook_out"):
            with pytest.raises(ValueError, match="positions of the encoder"):
                model.part("encoder").run_with_cache(inputs, names_filter=name, pos_slice=0)


def test_remove_batch_dim(model, inputs, single, two_clips, family):
    _, whole = model.run_with_cache(single)
    _, bare = model.run_with_cache(single, remove_batch_dim=True)
    for name in bare:
        assert torch.equal(bare[name], whole[name] if is_flat(name) else whole[name][0]), name
    assert not bare.has_batch_dim
    with pytest.raises(ValueError, match="batch of one"):
        model.run_with_cache(inputs, remove_batch_dim=True)
    if family == "qwen2_audio":
        with pytest.raises(ValueError, match=r"encoder.hook_mel has 2"):
            model.run_with_cache(two_clips, remove_batch_dim=True)
    assert count_hooks(model) == 0


def test_cache_on_another_device(model, inputs):
    _, cache = model.run_with_cache(inputs, names_filter="hook_embed", device="meta")
    assert cache["hook_embed"].device.type == "meta"
