"""A part is a model to TransformerLens: its patching functions run unchanged, and are right."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import FactoredMatrix, patching

import tiny
from audio_lens import AudioCache, HookedAudioTransformer, HookNameError, TokenError
from families import FAMILIES as ALL_FAMILIES

PARTS = ("encoder", "decoder")
FRAMES = 8  # encoder positions: few, so that sweeps over all of them stay short


@pytest.fixture
def small(family: str) -> HookedAudioTransformer:
    """Two layers and a clip of less than a fifth of a second."""
    layers = {"encoder_layers": 2}
    layers |= {"decoder_layers": 2} if family == "whisper" else {"num_hidden_layers": 2}
    hf_model = tiny.tiny_hf(family, max_source_positions=FRAMES, **layers)
    return HookedAudioTransformer.from_hf(hf_model)


@pytest.fixture
def pair(family: str) -> tuple[dict, dict]:
    """Clean and corrupted inputs of equal shape: other audio and other words."""
    made = [
        tiny.hf_inputs(family, lengths=[13], words=[3], n_frames=2 * FRAMES, seed=seed)
        for seed in (0, 1)
    ]
    return made[0], made[1]


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 7] - logits[0, -1, 42]


# name of the function -> activation, axes of its result, and the index of a cell in the activation
CELLS = {
    "resid_pre": ("hook_resid_pre", "lp", lambda p: (slice(None), p)),
    "resid_mid": ("hook_resid_mid", "lp", lambda p: (slice(None), p)),
    "attn_out": ("hook_attn_out", "lp", lambda p: (slice(None), p)),
    "mlp_out": ("hook_mlp_out", "lp", lambda p: (slice(None), p)),
    "attn_head_out_by_pos": ("attn.hook_z", "lph", lambda p, h: (slice(None), p, h)),
    "attn_head_q_by_pos": ("attn.hook_q", "lph", lambda p, h: (slice(None), p, h)),
    "attn_head_k_by_pos": ("attn.hook_k", "lpk", lambda p, h: (slice(None), p, h)),
    "attn_head_v_by_pos": ("attn.hook_v", "lpk", lambda p, h: (slice(None), p, h)),
    "attn_head_pattern_by_pos": ("attn.hook_pattern", "lhp", lambda h, p: (slice(None), h, p)),
    "attn_head_out_all_pos": ("attn.hook_z", "lh", lambda h: (slice(None), slice(None), h)),
    "attn_head_k_all_pos": ("attn.hook_k", "lk", lambda h: (slice(None), slice(None), h)),
    "attn_head_v_all_pos": ("attn.hook_v", "lk", lambda h: (slice(None), slice(None), h)),
    "attn_head_pattern_all_pos": ("attn.hook_pattern", "lh", lambda h: (slice(None), h)),
}


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("function", CELLS)
def test_transformer_lens_patching_is_right(small, pair, part, function):
    """Every result has TransformerLens's shape; cells equal a patch by hand on the full name."""
    clean, corrupted = pair
    view = small.part(part)
    activation, axes, index_of = CELLS[function]
    with torch.no_grad():
        _, cache = view.run_with_cache(clean, attention=True)
        sweep = getattr(patching, f"get_act_patch_{function}")
        found = sweep(view, view.inputs(corrupted), cache, metric)
        cfg, n_positions = view.cfg, view.inputs(corrupted).shape[1]
        size = {"l": 2, "p": n_positions, "h": cfg.n_heads, "k": cfg.n_key_value_heads}
        assert found.shape == tuple(size[axis] for axis in axes)
        assert (found - metric(small(corrupted))).abs().max() > 1e-4
        for cell in [(0,) * len(axes), tuple(min(n, 2) - 1 for n in found.shape)]:
            layer, *rest = cell
            name, index = f"{part}.blocks.{layer}.{activation}", index_of(*rest)
            source = cache[f"blocks.{layer}.{activation}"]

            def patch(act, hook, index=index, source=source):
                act = act.clone()
                act[index] = source[index]
                return act

            by_hand = metric(small.run_with_hooks(corrupted, fwd_hooks=[(name, patch)]))
            torch.testing.assert_close(found[cell], by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("part", PARTS)
def test_patching_in_bulk(small, pair, part):
    """The functions that sweep several activations, per example and with a baseline."""
    clean, corrupted = pair
    view = small.part(part)
    n_heads, positions = view.cfg.n_heads, view.inputs(corrupted)
    with torch.no_grad():
        _, cache = view.run_with_cache(clean, attention=True)
        every = patching.get_act_patch_block_every(view, positions, cache, metric)
        heads = patching.get_act_patch_attn_head_all_pos_every(view, positions, cache, metric)
        whole = patching.get_act_patch_resid_pre(
            view,
            positions,
            cache,
            lambda logits: metric(logits)[None],
            reduce="none",
            baseline=True,
        )
        before = metric(small(corrupted))
    assert every.shape == (3, 2, positions.shape[1])
    assert heads.shape == (5, 2, n_heads)
    torch.testing.assert_close(every[0], whole.values[..., 0])
    torch.testing.assert_close(whole.baseline, before[None])


def test_patching_the_whole_stream_gives_the_clean_run(small, pair, family):
    """Of the encoder, or of an audio LLM's decoder, where only the audio differs."""
    clean, corrupted = pair
    clean = {**corrupted, "input_features": clean["input_features"]}
    with torch.no_grad():
        for part in PARTS[:1] if family == "whisper" else PARTS:
            view, name = small.part(part), "blocks.1.hook_resid_pre"
            logits, cache = view.run_with_cache(clean, names_filter=name)
            hooks = [(name, lambda act, hook, source=cache[name]: source)]
            torch.testing.assert_close(view.run_with_hooks(corrupted, fwd_hooks=hooks), logits)


# -------------------------------------------------------------------------------- running


def test_local_names(small, pair, family):
    inputs, _ = pair
    for part in PARTS:
        view = small.part(part)
        assert set(view.hook_dict) == {n.split(".", 1)[1] for n in small.hook_dict if view.owns(n)}
        logits, cache = view.run_with_cache(inputs)
        assert isinstance(cache, AudioCache)
        whole, full = small.run_with_cache(inputs)
        torch.testing.assert_close(logits, whole)
        assert all(not name.startswith(PARTS) for name in cache)
        torch.testing.assert_close(cache["resid_post", 1], full[part, "resid_post", 1])
        for names in (
            "blocks.1.attn.hook_pattern",
            ["blocks.1.attn.hook_pattern"],
            lambda name: name == "blocks.1.attn.hook_pattern",
            f"{part}.blocks.1.attn.hook_pattern",
        ):
            assert list(view.run_with_cache(inputs, names)[1]) == ["blocks.1.attn.hook_pattern"]
        _, shown = view.run_with_cache(inputs, attention=True)
        assert set(shown) == set(view.hook_dict)
        _, bare = view.run_with_cache(inputs, remove_batch_dim=True, pos_slice=0)
        assert bare["resid_pre", 1].shape == (1, view.cfg.d_model)
    _, grads = small.part("decoder").run_with_cache(
        inputs, "blocks.0.hook_mlp_out", incl_bwd=True, return_type="loss"
    )
    assert set(grads) == {"blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out_grad"}


def test_names_of_another_part_are_unknown(small, pair):
    view = small.part("encoder")
    for call in (
        lambda: view.run_with_cache(pair[0], "decoder.hook_embed"),
        lambda: view.run_with_cache(pair[0], lambda name: "decoder" in name),
        lambda: view.add_hook("blocks.7.hook_mlp_out", lambda act, hook: None),
        lambda: view.run_with_hooks(pair[0], fwd_hooks=[("hook_logits", lambda act, hook: None)]),
    ):
        with pytest.raises(HookNameError):
            call()
    with pytest.raises(ValueError, match=r"no part named 'encodr'; nearest names: encoder"):
        small.part("encodr")


def test_hooks_on_a_part(small, pair):
    inputs, _ = pair
    view, seen = small.part("encoder"), []

    def look(act, hook):
        seen.append(hook.name)

    name = "encoder.blocks.1.hook_mlp_out"
    with view.hooks([("blocks.1.hook_mlp_out", look)]) as same:
        assert same is view
        view(inputs)
    view.run_with_hooks(view.inputs(inputs), fwd_hooks=[(lambda n: n == "hook_out", look)])
    view.add_hook("blocks.1.hook_mlp_out", look)
    view.add_perma_hook("blocks.1.hook_mlp_out", look)
    small(inputs)
    view.reset_hooks()
    small(inputs)
    view.reset_hooks(including_permanent=True)
    small(inputs)
    assert seen == [name, "encoder.hook_out", name, name, name]


@pytest.mark.parametrize("part", PARTS)
def test_integers_are_layers_of_the_part(small, pair, part):
    inputs, _ = pair
    view, place = small.part(part), f"{part}.1"
    resid, logits = small(inputs, stop_at_layer=place), small(inputs)
    runs = {
        "call": view(inputs, stop_at_layer=1),
        "hooks": view.run_with_hooks(inputs, stop_at_layer=1),
        "cache": view.run_with_cache(inputs, stop_at_layer=1)[0],
        "negative": view(inputs, stop_at_layer=-1),
        "full name": view(inputs, stop_at_layer=place),
    }
    for name, found in runs.items():
        torch.testing.assert_close(found, resid, msg=name)
    for prompts in (inputs, view.inputs(inputs)):
        assert torch.equal(view(resid, start_at_layer=1, inputs=prompts), logits)
        started, _ = view.run_with_cache(resid, start_at_layer=1, inputs=prompts)
        torch.testing.assert_close(started, logits)
    assert torch.equal(view(inputs=view.inputs(inputs)), logits)


def test_positional_directions_and_plain_caches(small, pair):
    """Further forms that TransformerLens knows."""
    inputs, _ = pair
    view, seen = small.part("decoder"), []

    def look(grad, hook):
        seen.append(hook.name)

    view.add_hook("hook_embed", look, "bwd")
    view.add_perma_hook("blocks.0.hook_mlp_out", look, "bwd")
    small.add_hook("hook_logits", look, "bwd")
    view(inputs, return_type="loss").backward()
    small.reset_hooks(including_permanent=True)
    assert seen == ["hook_logits", "decoder.blocks.0.hook_mlp_out", "decoder.hook_embed"]
    _, plain = view.run_with_cache(inputs, "hook_embed", return_cache_object=False)
    assert type(plain) is dict and list(plain) == ["hook_embed"]
    _, plain = small.run_with_cache(inputs, names_filter="hook_logits", return_cache_object=False)
    assert type(plain) is dict and list(plain) == ["hook_logits"]


def test_inputs_have_the_shape_of_the_part(small, family):
    lengths = [13, 9] if family == "whisper" else [(13, 9), 11]
    inputs = tiny.hf_inputs(family, lengths=lengths, words=[3, 4], n_frames=2 * FRAMES)
    encoder, decoder = (small.part(part).inputs(inputs) for part in PARTS)
    assert encoder.shape == (2 if family == "whisper" else 3, FRAMES)
    assert decoder.shape == small.as_inputs(inputs).tokens.shape and len(decoder) == 2
    assert small.part("encoder").inputs(decoder).shape == encoder.shape


# -------------------------------------------------------------------------------- weights and words


@pytest.mark.parametrize("part", PARTS)
def test_reading_the_shape_of_a_part_leaves_the_models_own(small, part):
    double = small.to(torch.float64)
    before = dict(vars(double.cfg.parts[part]))
    assert double.part(part).cfg.dtype == torch.float64
    double.part(part).cfg.n_layers = 99
    assert vars(double.cfg.parts[part]) == before and double.part(part).cfg.n_layers == 2


@pytest.mark.parametrize("part", PARTS)
def test_weights(small, pair, part):
    view = small.part(part)
    cfg = view.cfg
    heads, kv, width = cfg.n_heads, cfg.n_key_value_heads, (cfg.d_model, cfg.d_head)
    assert view.W_Q.shape == (2, heads, *width) and view.W_O.shape == (2, heads, *width[::-1])
    assert view.W_K.shape == view.W_V.shape == (2, kv, *width)
    assert view.W_in.shape == (2, cfg.d_model, cfg.d_mlp)
    assert view.W_out.shape == (2, cfg.d_mlp, cfg.d_model)
    block = view.blocks[1]
    for weight, module in (("W_Q", "q_proj"), ("W_V", "v_proj"), ("W_O", "o_proj")):
        shown, held = getattr(block.attn, weight), getattr(block.attn, module).weight
        assert shown.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
    assert cfg.device == small.device and cfg.dtype == small.dtype
    with torch.no_grad():
        _, cache = view.run_with_cache(pair[0])
        x = cache["normalized", 1, "ln1"] * block.ln1.weight + getattr(block.ln1, "bias", 0)
        bias = block.attn.q_proj.bias.unflatten(0, (heads, cfg.d_head))
        q = torch.einsum("btd,hde->bthe", x, view.W_Q[1]) + bias
        torch.testing.assert_close(q, cache["q", 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_circuits_are_factored_per_query_head(small, part):
    view = small.part(part)
    cfg = view.cfg
    assert isinstance(view.QK, FactoredMatrix) and isinstance(view.OV, FactoredMatrix)
    assert view.QK.shape == view.OV.shape == (2, cfg.n_heads, cfg.d_model, cfg.d_model)
    group = cfg.n_heads // cfg.n_key_value_heads
    for head in range(cfg.n_heads):
        served_by = head // group
        ov = view.W_V[1, served_by] @ view.W_O[1, head]
        qk = view.W_Q[1, head] @ view.W_K[1, served_by].T
        torch.testing.assert_close(view.OV[1, head].AB, ov)
        torch.testing.assert_close(view.QK[1, head].AB, qk)


@pytest.mark.parametrize("part", PARTS)
def test_accumulated_bias(small, part):
    view = small.part(part)
    blocks = view.blocks

    def of_attention(block):
        return block.attn.b_O + (block.cross_attn.b_O if hasattr(block, "cross_attn") else 0)

    assert not view.accumulated_bias(0).any()
    close = torch.testing.assert_close
    close(view.accumulated_bias(1), of_attention(blocks[0]) + blocks[0].mlp.b_out)
    close(view.accumulated_bias(1, include_mlp_biases=False), of_attention(blocks[0]))
    close(
        view.accumulated_bias(1, mlp_input=True),
        of_attention(blocks[0]) + blocks[0].mlp.b_out + of_attention(blocks[1]),
    )
    everything = sum(of_attention(block) + block.mlp.b_out for block in blocks)
    close(view.accumulated_bias(2), everything)


def test_vocabulary(small, pair):
    view = small.part("decoder")
    d_model, d_vocab = view.cfg.d_model, view.cfg.d_vocab
    assert view.W_E.shape == (d_vocab, d_model) and view.W_U.shape == (d_model, d_vocab)
    assert view.b_U.shape == (d_vocab,) and not view.b_U.any()
    directions = view.tokens_to_residual_directions
    assert torch.equal(directions(7), view.W_U[:, 7])
    assert torch.equal(directions(torch.tensor([[7, 8], [9, 7]]))[1, 1], view.W_U[:, 7])
    assert torch.equal(directions([7, 8])[1], view.W_U[:, 8])
    with pytest.raises(TokenError, match="needs a tokenizer"):
        view.to_single_token(" seven")
    for name in ("W_E", "W_U", "b_U"):
        with pytest.raises(ValueError, match="the encoder has no vocabulary; use the decoder"):
            getattr(small.part("encoder"), name)


def test_single_tokens(embedded):
    view = embedded.part("decoder")
    token = view.to_single_token(" seven")
    assert embedded.tokenizer.decode([token]).strip() == "seven"
    assert view.to_single_token(3) == 3
    assert torch.equal(view.tokens_to_residual_directions(" seven"), view.W_U[:, token])
    with pytest.raises(TokenError, match="2 tokens"):
        view.to_single_token(" seven seven")


@pytest.mark.parametrize("family", ["whisper", "qwen2_audio", "moshi", "granite_speech", "wavlm"])
def test_circuits_hold_one_matrix_per_query_head(family: str) -> None:
    """Also where heads share keys and values, and where codebooks have weights of their own."""
    model = HookedAudioTransformer.from_hf(ALL_FAMILIES[family].build())
    for name in model.cfg.parts:
        part = model.part(name)
        cfg = part.cfg
        group = cfg.n_heads // cfg.n_key_value_heads
        shape = (*part.W_Q.shape[:-2], cfg.d_model, cfg.d_model)
        assert part.OV.AB.shape == part.QK.AB.shape == shape
        for head in range(cfg.n_heads):
            shared = head // group
            ov = part.W_V[..., shared, :, :] @ part.W_O[..., head, :, :]
            qk = part.W_Q[..., head, :, :] @ part.W_K[..., shared, :, :].mT
            assert torch.allclose(part.OV.AB[..., head, :, :], ov, atol=1e-6)
            assert torch.allclose(part.QK.AB[..., head, :, :], qk, atol=1e-6)
        assert part.W_in.shape[-2:] == part.W_out.mT.shape[-2:]
