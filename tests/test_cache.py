"""`AudioCache`: keys, parts, decompositions that add up, and logit attribution that is exact."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

import tiny
from audio_lens import AudioCache, HookedAudioTransformer, HookNameError, NoModelError
from audio_lens.pickles import SavedPart
from families import FAMILIES

PARTS = ("encoder", "decoder")
# Qwen2 computes its norms in float32 even in a float64 model, as Hugging Face does
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def model(family: str) -> HookedAudioTransformer:
    return HookedAudioTransformer.from_hf(tiny.tiny_hf(family, dtype=torch.float64))


@pytest.fixture
def inputs(family: str) -> dict:
    return tiny.hf_inputs(family, dtype=torch.float64)


@pytest.fixture
def run(model, inputs) -> tuple[torch.Tensor, AudioCache]:
    """Logits and the default cache."""
    with torch.no_grad():
        return model.run_with_cache(inputs)


@pytest.fixture
def cache(run) -> AudioCache:
    return run[1]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


def has_cross(model: HookedAudioTransformer, part: str) -> bool:
    return hasattr(model.part(part).blocks[0], "cross_attn")


def stream(local: AudioCache, layer: int, mlp_input: bool = False) -> torch.Tensor:
    """The residual stream a block (or its MLP, or what follows the last block) reads."""
    if mlp_input:
        cross = f"blocks.{layer}.hook_resid_mid_cross"
        return local[cross] if cross in local else local["resid_mid", layer]
    is_last = layer == local.model.cfg.n_layers
    return local["resid_post", layer - 1] if is_last else local["resid_pre", layer]


# -------------------------------------------------------------------------------- keys


def test_keys(cache, family):
    assert isinstance(cache, AudioCache) and isinstance(cache, ActivationCache)
    full = cache["decoder.blocks.1.attn.hook_z"]
    for key in [
        ("z", 1),
        ("z", 1, "attn"),
        ("z", -2),
        "z1",
        "blocks.1.attn.hook_z",
        ("decoder", "z", 1),
        ("decoder", "blocks.1.attn.hook_z"),
    ]:
        assert cache[key] is full, key
    heard = cache["encoder.blocks.1.attn.hook_z"]
    assert cache["encoder", "z", 1] is cache["encoder", "z", -2] is heard
    assert cache.part("encoder")["z", 1] is cache.part("encoder")["encoder", "z", 1] is heard
    assert cache["encoder", "hook_out"] is cache["encoder.hook_out"]
    assert cache["scale"] is cache["decoder.ln_final.hook_scale"]
    assert cache["scale", 1, "ln2"] is cache["decoder.blocks.1.ln2.hook_scale"]
    assert cache["hook_logits"] is cache.cache_dict["hook_logits"]
    if family == "whisper":
        assert cache["z", 1, "cross_attn"] is cache["decoder.blocks.1.cross_attn.hook_z"]
        assert cache["query", -1, "cross_attn"] is cache["decoder.blocks.2.cross_attn.hook_q"]
        assert cache["decoder", "z", 1, "cross_attn"] is cache["z", 1, "cross_attn"]
        assert cache["cross_attn_out", 1] is cache["decoder.blocks.1.hook_cross_attn_out"]
    assert "blocks.1.attn.hook_z" in cache and "blocks.1.attn.hook_pattern" not in cache
    assert "AudioCache" in repr(cache) and len(cache) == len(list(cache))


def test_missing_keys_name_the_nearest(cache, family):
    with pytest.raises(
        HookNameError, match=r"^'blocks.1.attn.hook_pattern'.*attention=True.*hook_"
    ):
        cache["pattern", 1]
    with pytest.raises(KeyError, match="not in this cache"):
        cache["encoder", "z", 9]
    for call in (lambda: cache.part("encodr"), lambda: cache["encodr", "z", 1]):
        with pytest.raises(KeyError, match=r"no part named 'encodr'.*encoder"):
            call()
    with pytest.raises(KeyError, match="no part named 'decoder'"):
        cache.part("encoder")["decoder", "z", 1]
    if family == "qwen2_audio":
        with pytest.raises(KeyError, match=r"cross_attn\.hook_z"):
            cache["z", 1, "cross_attn"]


def test_part_caches_hold_local_names(model, inputs, cache):
    for part in PARTS:
        local = cache.part(part)
        _, direct = model.part(part).run_with_cache(inputs)
        assert set(local) == set(direct)
        assert all(f"{part}.{name}" in cache for name in local)
        assert local.part(part) is local


# -------------------------------------------------------------------------------- decomposition


@pytest.mark.parametrize("part", PARTS)
def test_components_add_up_at_every_layer(model, cache, part):
    local = cache.part(part)
    n_layers = model.cfg.parts[part].n_layers
    for layer in range(n_layers + 1):
        stack, labels = local.decompose_resid(layer, return_labels=True)
        close(stack.sum(0), stream(local, layer))
        assert len(labels) == len(stack) == len(set(labels))
        if layer < n_layers:
            stack = local.decompose_resid(layer, mlp_input=True)
            close(stack.sum(0), stream(local, layer, mlp_input=True))
    assert torch.equal(local.decompose_resid(), local.decompose_resid(-1))


def test_labels_of_components(model, cache, family):
    stack, labels = cache.decompose_resid(1, return_labels=True, mlp_input=True)
    cross = ["cross_attn_out"] if family == "whisper" else []
    embeds = ["embed", "pos_embed"] if family == "whisper" else ["embed"]
    first = [f"0_{name}" for name in ("attn_out", *cross, "mlp_out")]
    assert labels == [*embeds, *first, *[f"1_{name}" for name in ("attn_out", *cross)]]
    assert torch.equal(stack[labels.index("0_mlp_out")], cache["mlp_out", 0])
    _, labels = cache.decompose_resid(2, mode="attn", incl_embeds=False, return_labels=True)
    assert labels == [f"{l}_{name}" for l in range(2) for name in ("attn_out", *cross)]
    _, labels = cache.decompose_resid(2, mode="mlp", incl_embeds=False, return_labels=True)
    assert labels == ["0_mlp_out", "1_mlp_out"]


@pytest.mark.parametrize("part", PARTS)
def test_applied_norms_have_scale_and_gain(model, cache, part):
    """Components under a norm add up to what the block reads, less the norm's bias."""
    local = cache.part(part)
    for mlp_input, name in ((False, "ln1"), (True, "ln2")):
        norm = getattr(model.part(part).blocks[1], name)
        stack = local.decompose_resid(1, mlp_input=mlp_input, apply_ln=True)
        close(stack.sum(0), local["normalized", 1, name] * norm.weight)


@pytest.mark.parametrize("wanted", [1, -1, (1, 3), [0, 2], Slice(1)])
def test_slices_of_positions(model, cache, wanted):
    """An int drops the axis, as in TransformerLens."""
    rows = Slice.unwrap(wanted) if isinstance(wanted, Slice) else Slice(wanted)
    for kwargs in ({}, {"apply_ln": True}):
        for method in (cache.decompose_resid, cache.accumulated_resid, cache.stack_head_results):
            close(method(pos_slice=wanted, **kwargs), rows.apply(method(**kwargs), dim=2))
    whole = cache.get_full_resid_decomposition(1, apply_ln=True)
    cut = cache.get_full_resid_decomposition(1, apply_ln=True, pos_slice=wanted)
    close(cut, rows.apply(whole, dim=2))


@pytest.mark.parametrize("part", PARTS)
def test_accumulated_streams(model, cache, part):
    local = cache.part(part)
    n_layers = model.cfg.parts[part].n_layers
    stack, labels = local.accumulated_resid(incl_mid=True, return_labels=True)
    mids = ["mid", "mid_cross"] if has_cross(model, part) else ["mid"]
    expected = [f"{l}_{name}" for l in range(n_layers) for name in ("pre", *mids)]
    assert labels == [*expected, "final_post"]
    assert torch.equal(stack[labels.index("1_mid")], local["resid_mid", 1])
    assert torch.equal(stack[-1], local["resid_post", -1])
    stack, labels = local.accumulated_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "1_pre", *[f"1_{mid}" for mid in mids]]
    assert torch.equal(stack[-1], stream(local, 1, mlp_input=True))


def test_the_last_accumulated_stream_gives_the_logits(model, run, inputs):
    logits, cache = run
    normed = cache.accumulated_resid(apply_ln=True)
    close(model.part("decoder").unembed(normed[-1]), logits)
    one = cache.accumulated_resid(apply_ln=True, pos_slice=-1)
    close(model.part("decoder").unembed(one[-1]), logits[:, -1])
    with torch.no_grad():
        earlier = model(cache["resid_pre", 1], start_at_layer=3, inputs=inputs)
    close(model.part("decoder").unembed(normed[1]), earlier)


@pytest.mark.parametrize("part", PARTS)
def test_heads_add_up(model, inputs, cache, part):
    local, view = cache.part(part), model.part(part)
    n_heads, sublayers = view.cfg.n_heads, ["attn"] + ["cross_attn"] * has_cross(model, part)
    stack, labels = local.stack_head_results(2, return_labels=True, incl_remainder=True)
    marks = {"attn": "", "cross_attn": "_cross"}
    heads = [f"L{l}H{h}{marks[s]}" for l in range(2) for s in sublayers for h in range(n_heads)]
    assert labels == [*heads, "remainder"]
    close(stack.sum(0), stream(local, 2))
    first = stack[: n_heads * len(sublayers)].unflatten(0, (len(sublayers), n_heads))
    for sublayer, results in zip(sublayers, first, strict=True):
        bias = getattr(view.blocks[0], sublayer).b_O
        close(results.sum(0) + bias, local[f"{sublayer}_out", 0])
        name = f"blocks.0.{sublayer}.hook_result"
        with torch.no_grad():
            _, shown = view.run_with_cache(inputs, names_filter=name)
        close(results.movedim(0, -2), shown[name])
    _, only_z = view.run_with_cache(inputs, names_filter=lambda name: name[:8] == "blocks.0")
    close(only_z.stack_head_results(1), local.stack_head_results(1))
    empty = local.stack_head_results(0)
    assert empty.shape == (0, *local["resid_pre", 0].shape)
    assert torch.equal(local.stack_head_results(0, incl_remainder=True)[0], local["resid_pre", 0])


def test_head_results_are_computed_once(cache, family):
    cache.compute_head_results()
    sublayers = ["attn", "cross_attn"] if family == "whisper" else ["attn"]
    for sublayer in sublayers:
        assert f"decoder.blocks.2.{sublayer}.hook_result" in cache.cache_dict
    held = cache["result", 1]
    cache.stack_head_results()
    assert cache["result", 1] is held


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mlp_input", [False, True])
@pytest.mark.parametrize("expand_neurons", [False, True])
def test_full_decomposition_adds_up(model, cache, part, mlp_input, expand_neurons):
    local = cache.part(part)
    options = {"mlp_input": mlp_input, "expand_neurons": expand_neurons}
    stack, labels = local.get_full_resid_decomposition(2, return_labels=True, **options)
    assert len(labels) == len(stack)
    close(stack.sum(0), stream(local, 2, mlp_input))
    normed = local.get_full_resid_decomposition(2, apply_ln=True, **options)
    norm = "ln2" if mlp_input else "ln1"
    gain = getattr(model.part(part).blocks[2], norm).weight
    close(normed.sum(0), local["normalized", 2, norm] * gain)
    for onto in (gain * 0.5, torch.stack([gain, gain.roll(1)], dim=1)):
        projected = local.get_full_resid_decomposition(
            2, apply_ln=True, project_output_onto=onto, **options
        )
        close(projected, normed @ onto)
        plain = local.get_full_resid_decomposition(2, project_output_onto=onto, **options)
        close(plain, stack @ onto)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mlp_input", [False, True])
def test_neurons_and_remainder_add_up(model, cache, part, mlp_input):
    """The remainder reaches what the MLP reads, cross-attention included."""
    local = cache.part(part)
    options = {"mlp_input": mlp_input, "incl_remainder": True}
    stack, labels = local.stack_neuron_results(1, return_labels=True, **options)
    assert labels[0] == "L0N0" and labels[-1] == "remainder"
    assert len(labels) == len(stack) == model.cfg.parts[part].d_mlp + 1
    close(stack.sum(0), stream(local, 1, mlp_input))
    bias = model.part(part).blocks[0].mlp.b_out
    close(stack[:-1].sum(0) + bias, local["mlp_out", 0])
    normed = local.stack_neuron_results(1, apply_ln=True, **options)
    onto = torch.randn(model.cfg.parts[part].d_model, dtype=torch.float64)
    projected = local.stack_neuron_results(1, apply_ln=True, project_output_onto=onto, **options)
    close(projected, normed @ onto)
    few = local.stack_neuron_results(1, neuron_slice=[3, 5])
    close(few, stack[[3, 5]])


def test_missing_embeddings_are_an_error_not_a_gap(model, inputs):
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: "attn_out" in name)
    with pytest.raises(KeyError, match="hook_embed"):
        cache.decompose_resid(mode="attn")
    assert len(cache.decompose_resid(mode="attn", incl_embeds=False)) >= 3


@pytest.mark.parametrize("part", PARTS)
def test_transformer_lens_itself_agrees_where_it_is_right(cache, part):
    """On parts without cross-attention its own class gives the same; with it, it drops a part."""
    local = cache.part(part)
    theirs = ActivationCache(dict(local.cache_dict), local.model)
    if "blocks.0.hook_resid_mid_cross" in local:
        dropped = local.decompose_resid(2).sum(0) - theirs.decompose_resid(2).sum(0)
        close(dropped, local["cross_attn_out", 0] + local["cross_attn_out", 1])
        return
    for call in (
        lambda c: c.decompose_resid(2),
        lambda c: c.accumulated_resid(2, incl_mid=True),
        lambda c: c.stack_head_results(2, incl_remainder=True),
        lambda c: c.stack_activation("z", 2),
        lambda c: c.stack_neuron_results(2, incl_remainder=True),
        lambda c: c.get_full_resid_decomposition(2),
    ):
        close(call(local), call(theirs))


# -------------------------------------------------------------------------------- logits


def final_bias(model: HookedAudioTransformer) -> torch.Tensor:
    """What the final norm's bias adds to every logit, whatever the residual stream holds."""
    bias = getattr(model.decoder.ln_final, "bias", None)
    no_logits = torch.zeros(model.cfg.decoder.d_vocab, dtype=torch.float64)
    return no_logits if bias is None else model.decoder.unembed(bias)


@pytest.mark.parametrize("expand_neurons", [False, True])
def test_attributions_add_up_to_the_logit(model, run, expand_neurons):
    logits, cache = run
    stack = cache.get_full_resid_decomposition(expand_neurons=expand_neurons)
    for token in (7, 42):
        share = final_bias(model)[token]
        close(cache.logit_attrs(stack, token).sum(0), logits[..., token] - share)
    difference = cache.logit_attrs(stack, 7, incorrect_tokens=42).sum(0)
    bias = final_bias(model)[7] - final_bias(model)[42]
    close(difference, logits[..., 7] - logits[..., 42] - bias)


def test_attributions_per_row_and_position(model, run):
    logits, cache = run
    right, wrong = torch.tensor([7, 8]), torch.tensor([42, 9])
    share = final_bias(model)
    stack = cache.decompose_resid()
    attrs = cache.logit_attrs(stack, right, wrong).sum(0)
    for row in range(2):
        expected = logits[row, :, right[row]] - logits[row, :, wrong[row]]
        close(attrs[row], expected - share[right[row]] + share[wrong[row]])
    last = cache.decompose_resid(pos_slice=-1)
    close(cache.logit_attrs(last, right, wrong, pos_slice=-1).sum(0), attrs[:, -1])
    one = cache.logit_attrs(stack, 7, batch_slice=0, pos_slice=None)
    close(one, cache.logit_attrs(stack, 7)[:, 0])


def test_attributions_of_the_encoder_are_refused(cache):
    local = cache.part("encoder")
    with pytest.raises(ValueError, match="the encoder has no vocabulary; use the decoder"):
        local.logit_attrs(local.decompose_resid(), 7)


def test_pooled_encoders_refuse_their_final_norm(cache, family):
    local = cache.part("encoder")
    for call in (local.decompose_resid, local.accumulated_resid, local.stack_head_results):
        if family == "qwen2_audio":
            with pytest.raises(ValueError, match="pools pairs of frames before its final norm"):
                call(apply_ln=True)
        else:
            assert torch.isfinite(call(apply_ln=True)).all()
        assert torch.isfinite(call(2, apply_ln=True)).all()


def test_logit_lens(model, run):
    logits, cache = run
    lens = cache.logit_lens(positions=None)
    assert lens.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    close(lens.values[-1], logits)
    best = cache.logit_lens(top_k=3)
    assert torch.equal(best.readout.top_ids[-1, :, 0], logits[:, -1].argmax(-1))
    ranks = cache.logit_lens(targets=logits[:, -1].argmax(-1)).rank_trajectory()
    assert ranks[-1].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"encoder (has no vocabulary|pools)"):
        cache.part("encoder").logit_lens()


# -------------------------------------------------------------------------------- batch and device


def test_rows_of_a_cache_still_decompose(model, run):
    logits, cache = run
    for rows, kept in ((slice(1, 2), [1]), ([1, 0], [1, 0]), (1, 1)):
        some = cache.apply_slice_to_batch_dim(rows)
        assert isinstance(some, AudioCache)
        assert some.has_batch_dim == (not isinstance(rows, int))
        assert "decoder.hook_audio_embed" not in some
        assert torch.equal(some["z", 1], cache["z", 1][kept])
        assert torch.equal(some["encoder", "z", 1], cache["encoder", "z", 1][kept])
        close(some.decompose_resid().sum(0), some["resid_post", -1])
        heard = some.part("encoder").stack_head_results(2, incl_remainder=True)
        close(heard.sum(0), some["encoder", "resid_pre", 2])
        normed = some.accumulated_resid(apply_ln=True)
        close(model.part("decoder").unembed(normed[-1]), logits[kept])
        full = some.get_full_resid_decomposition(expand_neurons=False)
        attrs = some.logit_attrs(full, 7, has_batch_dim=some.has_batch_dim).sum(0)
        close(attrs, logits[kept][..., 7] - final_bias(model)[7])
    with pytest.raises(ValueError, match="no batch axis"):
        some.apply_slice_to_batch_dim(0)


def test_removed_batch_dim(model, family):
    single = tiny.hf_inputs(family, lengths=[201], words=[6], dtype=torch.float64)
    with torch.no_grad():
        logits, whole = model.run_with_cache(single)
    flat = whole["decoder.hook_audio_embed"].shape if family == "qwen2_audio" else None
    bare = whole.remove_batch_dim()
    assert isinstance(bare, AudioCache) and not bare.has_batch_dim
    assert bare["resid_pre", 1].ndim == 2
    if family == "qwen2_audio":
        assert bare["decoder.hook_audio_embed"].shape == flat
    close(bare.decompose_resid().sum(0), bare["resid_post", -1])
    normed = bare.accumulated_resid(apply_ln=True)
    close(model.part("decoder").unembed(normed[-1]), logits[0])
    local = bare.part("encoder")
    assert not local.has_batch_dim
    close(local.decompose_resid(2).sum(0), local["resid_pre", 2])


def test_clips_are_not_taken_for_prompts():
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf("qwen2_audio"))
    three = tiny.hf_inputs("qwen2_audio", lengths=[(101, 75), 60], words=[6, 4])
    _, cache = model.run_with_cache(three)
    with pytest.raises(ValueError, match=r"clips in the encoder: slice one part, cache\.part"):
        cache.apply_slice_to_batch_dim(0)
    second_prompt = cache.part("decoder").apply_slice_to_batch_dim(1)
    third_clip = cache.part("encoder").apply_slice_to_batch_dim(2)
    assert torch.equal(second_prompt["z", 0], cache["z", 0][1])
    assert torch.equal(third_clip["z", 0], cache["encoder", "z", 0][2])


def test_moved_cache_still_works(cache):
    moved = cache.to("cpu")
    assert isinstance(moved, AudioCache)
    close(moved.decompose_resid().sum(0), moved["resid_post", -1])
    assert cache.part("encoder").to("meta")["z", 0].device.type == "meta"


def test_stack_activation(cache, family):
    assert torch.equal(cache.stack_activation("mlp_out")[2], cache["mlp_out", 2])
    assert torch.equal(cache.stack_activation("z", 2)[1], cache["z", 1])
    assert len(cache.part("encoder").stack_activation("scale", 3, "ln2")) == 3
    if family == "whisper":
        crossed = cache.stack_activation("z", sublayer_type="cross_attn")
        assert torch.equal(crossed[1], cache["z", 1, "cross_attn"])


def test_streams_that_blocks_norm_are_not_decomposed() -> None:
    family = FAMILIES["wav2vec2"]
    model = HookedAudioTransformer.from_hf(family.build())
    _, cache = model.run_with_cache(family.batch())
    layers = cache.accumulated_resid()
    close(layers[-1], cache["encoder.hook_out"])
    for decompose in (cache.decompose_resid, lambda: cache.apply_ln_to_stack(layers)):
        with pytest.raises(ValueError, match="every block norms it"):
            decompose()


def test_what_adapters_write_is_a_component() -> None:
    family = FAMILIES["mms"]
    model = HookedAudioTransformer.from_hf(family.build())
    _, cache = model.run_with_cache(family.batch())
    stack, labels = cache.decompose_resid(return_labels=True)
    assert "0_adapter_out" in labels
    close(stack.sum(0), cache["resid_post", -1])


# -------------------------------------------------------------------------------- pickles


def saved_and_loaded(cache: AudioCache) -> tuple[AudioCache, int]:
    """What `torch.load` gives by its own defaults, and the size of the file in bytes."""
    file = io.BytesIO()
    torch.save(cache, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file), size


def n_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("reload", [lambda c: saved_and_loaded(c)[0], lambda c: through_pickle(c)])
def test_a_saved_cache_is_indexed_by_the_same_names(cache, family, reload) -> None:
    loaded = reload(cache)
    assert list(loaded) == list(cache) and len(loaded) == len(cache)
    keys = [("resid_post", -1), ("z", 1), ("encoder", "z", 1), ("encoder", "resid_post", -1)]
    keys += [("z", 1, "cross_attn")] if family == "whisper" else []
    for key in keys:
        assert torch.equal(loaded[key], cache[key])
    local = loaded.part("encoder")
    assert torch.equal(local["blocks.1.attn.hook_z"], cache["encoder", "z", 1])
    assert "blocks.1.attn.hook_z" in local and repr(loaded) == repr(cache)
    assert torch.equal(loaded.stack_activation("mlp_out"), cache.stack_activation("mlp_out"))
    with pytest.raises(HookNameError, match="no part named"):
        loaded.part("encodr")


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def test_a_saved_cache_is_as_large_as_what_it_holds(model, inputs) -> None:
    _, cache = model.run_with_cache(inputs, names_filter="decoder.blocks.1.hook_resid_post")
    weights, held = n_bytes(model.parameters()), n_bytes(cache.values())
    assert saved_and_loaded(cache)[1] < held + 4000 < weights


def test_a_saved_cache_is_apart_from_the_graph(cache) -> None:
    grown = {"decoder.hook_out": 2 * cache["decoder.hook_out"].requires_grad_()}
    live = AudioCache(grown, cache.parts, cache.main_part)
    assert not through_pickle(live)["hook_out"].requires_grad
    assert not copy.deepcopy(live)["hook_out"].requires_grad and live["hook_out"].requires_grad


def test_a_saved_slice_holds_no_more_than_the_slice(cache) -> None:
    first = AudioCache(
        {name: tensor[:1, :1] for name, tensor in cache.items()}, cache.parts, cache.main_part
    )
    loaded, _ = saved_and_loaded(first)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in loaded.values()}
    assert sum(s.nbytes() for s in storages.values()) <= n_bytes(first.values())
    assert all(torch.equal(loaded[name], first[name]) for name in first)


WITHOUT_A_MODEL = {
    "decompose_resid": lambda c: c.decompose_resid(),
    "accumulated_resid": lambda c: c.accumulated_resid(),
    "logit_attrs": lambda c: c.logit_attrs(c["resid_post", -1], 3),
    "logit_lens": lambda c: c.logit_lens(),
    "stack_head_results": lambda c: c.stack_head_results(),
    "compute_head_results": lambda c: c.compute_head_results(),
    "stack_neuron_results": lambda c: c.stack_neuron_results(1),
    "get_neuron_results": lambda c: c.get_neuron_results(0),
    "get_full_resid_decomposition": lambda c: c.get_full_resid_decomposition(),
    "apply_ln_to_stack": lambda c: c.apply_ln_to_stack(c["resid_post", -1][None]),
    "of a part": lambda c: c.part("encoder").decompose_resid(),
    "weights": lambda c: c.model.W_U,
}


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_what_needs_weights_says_that_a_saved_cache_has_none(cache, name) -> None:
    with pytest.raises(NoModelError, match=r"holds no model.*cache\.with_model\(model\)"):
        WITHOUT_A_MODEL[name](through_pickle(cache))


def test_a_saved_cache_takes_its_model_back(cache, model) -> None:
    again = through_pickle(cache).with_model(model)
    close(again.decompose_resid(), cache.decompose_resid())
    close(again.part("encoder").accumulated_resid(), cache.part("encoder").accumulated_resid())
    local = through_pickle(cache.part("encoder")).with_model(model)
    close(local.stack_head_results(), cache.part("encoder").stack_head_results())


def test_a_saved_cache_takes_no_other_model(cache) -> None:
    other = HookedAudioTransformer.from_hf(FAMILIES["wav2vec2"].build())
    with pytest.raises(ValueError, match=r"decoder|layers"):
        through_pickle(cache).with_model(other)
    with pytest.raises(ValueError, match=r"of another model: its encoder has \d layers"):
        through_pickle(cache.part("encoder")).with_model(
            SimpleNamespace(part=lambda name: SavedPart(name, 9))
        )


def test_copies_of_a_cache_keep_their_model(cache) -> None:
    for copied in (copy.copy(cache), copy.deepcopy(cache)):
        assert copied.model is cache.model and copied.parts is cache.parts
        assert copied.cache_dict is not cache.cache_dict
        close(copied.decompose_resid(), cache.decompose_resid())
    name = next(iter(cache))
    assert copied[name] is not cache[name] and torch.equal(copied[name], cache[name])
