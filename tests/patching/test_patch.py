"""`patch`: one intervention of any number of patches equals one forward with hooks by hand."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
from jaxtyping import TypeCheckError

import tiny
from audio_lens import HookedAudioTransformer, InputError, Span, edits, intervene, metrics
from audio_lens.patching import Band, Patch, Site, SiteError, patch, run, sites_of
from families import FAMILIES
from toys import Cue, copy_toy, prompt

FRAMES = 20  # encoder positions
MODELS = {
    family: HookedAudioTransformer.from_hf(
        tiny.tiny_hf(family, dtype=torch.float64, max_source_positions=FRAMES)
    )
    for family in tiny.FAMILIES
}
EVERY_SITE = [(family, site) for family in tiny.FAMILIES for site in sites_of(MODELS[family])]


def run_of(family: str, seed: int, lengths=(37, 22)) -> dict:
    """Two prompts, the second with a clip of 0.22 s; runs differ in audio and words."""
    return tiny.hf_inputs(
        family,
        lengths=lengths,
        words=(6, 4),
        padding="left",
        n_frames=2 * FRAMES,
        seed=seed,
        dtype=torch.float64,
    )


def all_logits(logits):
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).cos()
    return logits.flatten(1) @ weights


def by_hand(model, inputs, edits: dict[str, Any]) -> torch.Tensor:
    """Logits with the function of every hook name applied."""
    hooks = [(name, lambda x, hook: edits[hook.name](x.clone())) for name in edits]
    with torch.no_grad():
        return model.run_with_hooks(inputs, fwd_hooks=hooks)


def written(index: tuple, value: Any):
    """A function that writes a value at an index."""

    def write(x):
        x[index] = value[index] if isinstance(value, torch.Tensor) else value
        return x

    return write


@pytest.fixture
def model(family: str) -> HookedAudioTransformer:
    return MODELS[family]


@pytest.fixture
def inputs(family: str) -> dict:
    return run_of(family, 100)


@pytest.fixture
def other(family: str) -> dict:
    return run_of(family, 0)


@pytest.fixture
def cache(model, other):
    with torch.no_grad():
        return model.run_with_cache(other, attention=True)[1]


@pytest.fixture
def llm() -> HookedAudioTransformer:
    return MODELS["qwen2_audio"]


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10, equal_nan=True)


# -------------------------------------------------------------------------------- where


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize(("family", "site"), EVERY_SITE, ids=lambda x: str(x))
def test_one_patch_is_a_cell_of_the_loop(family, site, model, inputs, other):
    """Every site: one block, one head or neuron, one window (or token)."""
    has_time = family != "whisper" or site.positions_of != "decoder"
    place = {"time": Span(0.04, 0.14)} if has_time else {"position": 4}
    place |= {"layer": 1} if site.n_layers else {}
    place |= {site.unit: 1} if site.unit else {}
    found = patch(model, inputs, [Patch(str(site), source=other, **place)], metric=all_logits)
    slow = loops.loop(
        model, [place], clean=other, corrupted=inputs, site=str(site), metric=all_logits
    )
    same(found, slow[0, :, 0])
    assert (found - all_logits(model(inputs))).abs().min() > 0


@pytest.mark.parametrize("place", [{}, {"layer": 2}, {"position": 3}], ids=str)
@pytest.mark.parametrize("site", ["encoder.resid_mid", "decoder.attn.z"])
def test_what_is_left_out_is_patched_as_one(model, inputs, other, site, place):
    """No layer: all blocks; no head: all heads; neither time nor position: everywhere."""
    found = patch(model, inputs, [Patch(site, source=other, **place)], metric=all_logits)
    slow = loops.loop(model, [place], clean=other, corrupted=inputs, site=site, metric=all_logits)
    same(found, slow[0, :, 0])


@pytest.mark.parametrize(
    ("given", "index"),
    [
        (3, [3]),
        (-1, [-1]),
        (slice(2, 6), slice(2, 6)),
        (slice(None, None, 3), slice(None, None, 3)),
        ([1, 4], [1, 4]),
        (torch.tensor([0, 2]), [0, 2]),
    ],
)
def test_positions_in_every_form(model, inputs, cache, given, index):
    found = patch(model, inputs, [Patch("resid_pre", layer=1, position=given, source=cache)])
    name = "decoder.blocks.1.hook_resid_pre"
    same(found, by_hand(model, inputs, {name: written((slice(None), index), cache[name])}))


def test_times_in_every_form(model, inputs, cache):
    def patched(time):
        return patch(model, inputs, [Patch("encoder.resid_pre", layer=1, time=time, source=cache)])

    same(patched((0.0, 0.2)), patched(Span(0.0, 0.2, "word")))
    same(patched((0.0, 0.2)), patched([(0.0, 0.12), Span(0.08, 0.2)]))
    same(patched((0.0, 0.2)), patched(Span(-1.0, 0.2)))


def test_layers_and_heads_in_every_form(model, inputs, cache):
    whole = patch(model, inputs, [Patch("attn.z", source=cache)])
    same(whole, patch(model, inputs, [Patch("z", layer=[0, 1, 2], source=cache)]))
    n_heads = model.cfg.decoder.n_heads
    same(whole, patch(model, inputs, [Patch("z", head=range(n_heads), source=cache)]))
    two = patch(model, inputs, [Patch("z", layer=(0, 2), head=[1, 3], source=cache)])
    names = [f"decoder.blocks.{layer}.attn.hook_z" for layer in (0, 2)]
    index = (slice(None), slice(None), [1, 3])
    same(two, by_hand(model, inputs, {name: written(index, cache[name]) for name in names}))


def test_clips_of_one_prompt_are_patched_apart(llm):
    """In the encoder every clip is an entry of its own; the span names which."""
    inputs, other = (run_of("qwen2_audio", s, lengths=((21, 14), 17)) for s in (100, 0))
    for clip in (0, 1):
        place = {"layer": 1, "time": Span(0.0, 0.1, clip=clip)}
        found = patch(
            llm, inputs, [Patch("encoder.resid_pre", source=other, **place)], metric=all_logits
        )
        slow = loops.loop(
            llm, [place], clean=other, corrupted=inputs, site="encoder.resid_pre", metric=all_logits
        )
        same(found, slow[0, :, 0])
        assert found.isnan().tolist() == [False, clip == 1]


# -------------------------------------------------------------------------------- with what


def test_sources_in_every_form(model, inputs, other, cache):
    """Cache, mapping, inputs, a processor's mapping and a tensor say the same."""
    name = "encoder.blocks.1.hook_mlp_out"
    sources = [cache, {name: cache[name]}, model.as_inputs(other), other, cache[name]]
    sources += [cache.cache_dict, {name: cache[name].float()}]
    found = [
        patch(model, inputs, [Patch("encoder.mlp_out", layer=1, time=(0.0, 0.1), source=source)])
        for source in sources
    ]
    for one in found[:-1]:
        same(found[0], one)
    torch.testing.assert_close(found[0], found[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0, 0.0, -1.5])
def test_a_number_is_written_as_it_is(model, inputs, value):
    found = patch(model, inputs, [Patch("decoder.attn.z", layer=1, head=2, source=value)])
    name = "decoder.blocks.1.attn.hook_z"
    same(found, by_hand(model, inputs, {name: written((slice(None), slice(None), 2), value)}))


def test_several_patches_are_one_intervention(model, inputs, other, cache):
    """Other places from other sources, two of them in the same activation."""
    third = run_of(model.cfg.family, 7)
    z, mlp = "decoder.blocks.1.attn.hook_z", "encoder.blocks.2.hook_mlp_out"
    with torch.no_grad():
        from_third = model.run_with_cache(third, names_filter=[z])[1][z]
    found = patch(
        model,
        inputs,
        [
            Patch("decoder.attn.z", layer=1, head=0, source=cache),
            Patch("decoder.attn.z", layer=1, head=1, position=slice(3, None), source=third),
            Patch("encoder.mlp_out", layer=2, position=[0, 5], source=other),
            Patch("decoder.mlp_out", layer=0, position=-1, source=0.0),
        ],
    )

    def both_heads(x):
        x[:, :, 0] = cache[z][:, :, 0]
        x[:, 3:, 1] = from_third[:, 3:, 1]
        return x

    edits = {
        z: both_heads,
        mlp: written((slice(None), [0, 5]), cache[mlp]),
        "decoder.blocks.0.hook_mlp_out": written((slice(None), -1), 0.0),
    }
    same(found, by_hand(model, inputs, edits))


def test_a_path_from_one_head_to_a_later_one(model, inputs, cache):
    """Path patching: what lies between sender and receiver stays as the run's own."""
    with torch.no_grad():
        own = model.run_with_cache(inputs)[1]
    frozen = [
        Patch(f"decoder.{site}", layer=1, source=own)
        for site in ("attn_out", "mlp_out")
        + (("cross_attn_out",) if model.decoder_needs_encoder else ())
    ]
    sender = Patch("decoder.attn.z", layer=0, head=2, source=cache)
    found = patch(model, inputs, [sender, *frozen])
    z = "decoder.blocks.0.attn.hook_z"
    edits = {z: written((slice(None), slice(None), 2), cache[z])}
    for one in frozen:
        name = Site.parse(one.site, model).hook_name(1)
        edits[name] = lambda x, name=name: own[name]
    same(found, by_hand(model, inputs, edits))


def test_every_source_of_inputs_runs_once(model, inputs, other):
    seen = []
    third = model.as_inputs(run_of(model.cfg.family, 7))
    patches = [Patch("encoder.mlp_out", layer=layer, source=other) for layer in (0, 1)]
    patches += [Patch("decoder.mlp_out", layer=layer, source=third) for layer in (1, 2)]
    with model.hooks([("hook_logits", lambda x, hook: seen.append(1))]):
        patch(model, inputs, patches)
    assert len(seen) == 3


def test_no_gradients_are_kept(model, inputs, cache):
    assert not patch(model, inputs, [Patch("mlp_out", layer=0, source=cache)]).requires_grad


# -------------------------------------------------------------------------------- metrics


def test_what_comes_back(model, inputs, other):
    """Logits without a metric; otherwise the metric's own value, by name for a mapping."""
    patches = [Patch("encoder.resid_pre", layer=1, source=other)]
    logits = patch(model, inputs, patches)
    assert logits.shape == model(inputs).shape
    difference = metrics.logit_diff([5, 6], [7, 8])
    expected = difference.bind(model, inputs)(logits)
    same(patch(model, inputs, patches, metric=difference), expected)
    several = patch(model, inputs, patches, metric={"a": difference, "b": lambda x: x.mean()})
    assert list(several) == ["a", "b"] and several["b"].shape == ()
    same(several["a"], expected)


def test_kl_is_bound_to_the_run_it_compares_with(model, inputs, other):
    with torch.no_grad():
        clean = model(other)
    kl = metrics.kl().bind(model, inputs, clean)
    patches = [Patch("encoder.resid_pre", layer=1, source=other)]
    same(patch(model, inputs, patches, metric=kl), kl(patch(model, inputs, patches)))
    with pytest.raises(InputError, match="reference"):
        patch(model, inputs, patches, metric=metrics.kl())


def test_prompts_without_the_window_are_nan(llm):
    """The second clip is over at 0.22 s; another patch may reach its prompt all the same."""
    inputs, other = run_of("qwen2_audio", 100), run_of("qwen2_audio", 0)
    late = Patch("connector.out", time=(0.25, 0.4), source=other)
    found = patch(llm, inputs, [late], metric=all_logits)
    assert found.isnan().tolist() == [False, True]
    both = patch(llm, inputs, [late, Patch("z", layer=0, source=0.0)], metric=all_logits)
    assert both.isfinite().all()


def test_half_precision_is_measured_in_float32(family):
    half = HookedAudioTransformer.from_hf(tiny.tiny_hf(family, dtype=torch.bfloat16))
    patches = [Patch("mlp_out", layer=1, source=0.0)]
    value = patch(half, tiny.hf_inputs(family), patches, metric=metrics.log_prob(7))
    assert value.dtype == torch.float32


# -------------------------------------------------------------------------------- hooks, attention


def test_user_hooks_stay_in_force(model, inputs, other):
    """In the patched run and in the source's; at the patched point they come first."""
    name = "encoder.blocks.1.hook_resid_pre"
    place = {"layer": 1, "time": (0.0, 0.1)}
    with model.hooks([(name, lambda x, hook: 0.5 * x)]):
        found = patch(model, inputs, [Patch("encoder.resid_pre", source=other, **place)])
        with torch.no_grad():
            source = model.run_with_cache(other, names_filter=[name])[1][name]

    def write(x):
        x = 0.5 * x
        for row, length in enumerate((5, 5)):
            x[row, :length] = source[row, :length]
        return x

    same(found, by_hand(model, inputs, {name: write}))


@pytest.mark.parametrize("mode", ["auto", "explicit", "sdpa"])
def test_patterns_are_patched_in_written_out_attention(model, inputs, other, mode):
    patches = [Patch("encoder.attn.pattern", layer=1, head=2, source=other)]
    with model.attention(mode):
        found = patch(model, inputs, patches)
        assert model.attn_mode == mode
    name = "encoder.blocks.1.attn.hook_pattern"
    with torch.no_grad(), model.attention("explicit"):
        source = model.run_with_cache(other, names_filter=name)[1][name]
        same(found, by_hand(model, inputs, {name: written((slice(None), 2), source)}))


# -------------------------------------------------------------------------------- planted truth


def test_the_planted_head_carries_the_answer():
    """Toy A: the cue's window before the copying layer, or the copying head, bring it back."""
    toy, metric = copy_toy(n_layers=5, layer=2, head=1), metrics.logit_diff(1, 3)
    clean, corrupted = prompt(Cue(1)), prompt(Cue(3))
    _, cache = toy.run_with_cache(clean)
    answer, wrong = (metric.bind(toy, x)(toy(x)).item() for x in (clean, corrupted))

    def patched(**place):
        return patch(toy, corrupted, [Patch(source=cache, **place)], metric=metric).item()

    window = (0.04 * 6, 0.04 * 7)
    assert patched(site="resid_pre", layer=2, time=window) == pytest.approx(answer)
    assert patched(site="resid_pre", layer=3, time=window) == pytest.approx(wrong)
    assert patched(site="z", layer=2, head=1) == pytest.approx(answer)
    assert patched(site="z", layer=2, head=0) == pytest.approx(wrong)


# -------------------------------------------------------------------------------- refusals

NAMED_BY_MISTAKE = {"decoder.blocks.0.hook_resid_pre": "clean"}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"site": "decoder.resid_pree"}, SiteError, "decoder.resid_pre"),
        ({"site": "connector.out", "layer": 0}, SiteError, "outside the blocks"),
        ({"site": "resid_pre", "head": 0}, SiteError, "no heads"),
        ({"site": "attn.z", "neuron": 0}, SiteError, "no neurons"),
        ({"site": "attn.z", "head": 6}, SiteError, "0 to 5"),
        ({"site": "attn.k", "head": 2}, SiteError, "0 to 1"),
        ({"site": "attn.z", "head": -1}, SiteError, "0 to 5"),
        ({"site": "attn.z", "head": []}, SiteError, "0 to 5"),
        ({"site": "attn.z", "layer": 3}, ValueError, "0 to 2"),
        ({"site": "attn.z", "layer": []}, ValueError, "0 to 2"),
        ({"site": "resid_pre", "time": (5.0, 6.0)}, ValueError, "no position"),
        ({"site": "resid_pre", "time": (0.3, 0.2)}, ValueError, "end after it starts"),
        ({"site": "resid_pre", "time": []}, ValueError, "empty"),
        ({"site": "resid_pre", "time": (0.0, 0.1), "position": 1}, ValueError, "not both"),
        ({"site": "resid_pre", "position": 99}, ValueError, "99 does not fit"),
        ({"site": "resid_pre", "position": slice(5, 5)}, ValueError, "selects none"),
        ({"site": "encoder.resid_pre", "position": 19}, ValueError, "padding"),
        ({"site": "resid_pre", "source": {}}, SiteError, "does not hold"),
        ({"site": "resid_pre", "source": torch.zeros(1, 2, 3)}, ValueError, "shape"),
        ({"site": "attn.z", "source": torch.zeros(2, 17, 6)}, ValueError, "shape"),
        ({"site": "resid_pre", "source": "clean"}, (TypeError, TypeCheckError), "source"),
        ({"site": "resid_pre", "layer": 0, "source": NAMED_BY_MISTAKE}, TypeError, "tensor or a"),
    ],
)
def test_what_cannot_work_raises_before_the_forward(llm, options, error, says):
    inputs, ran = run_of("qwen2_audio", 100), []
    llm.add_hook("encoder.hook_embed", lambda x, hook: ran.append(1))
    try:
        with pytest.raises(error, match=says):
            patch(llm, inputs, [Patch(**{"source": 0.0, **options})])
    finally:
        llm.reset_hooks()
    assert not ran


def test_a_source_of_another_width_is_refused(llm):
    inputs = llm.as_inputs(run_of("qwen2_audio", 100))
    wrong = torch.zeros(*inputs.shape, 7, dtype=torch.float64)
    with pytest.raises(InputError, match="equal shapes"):
        patch(llm, inputs, [Patch("resid_pre", layer=1, source=wrong)])


def test_sources_that_do_not_correspond_are_refused(model, inputs):
    shorter = run_of(model.cfg.family, 0)
    key = next(name for name in ("input_ids", "decoder_input_ids") if name in shorter)
    if model.cfg.family == "whisper":
        shorter[key] = shorter[key][:, 1:]
        shorter["decoder_attention_mask"] = shorter["decoder_attention_mask"][:, 1:]
    else:
        shorter = run_of(model.cfg.family, 0, lengths=(37, 30))
    with pytest.raises(InputError, match="the source"):
        patch(model, inputs, [Patch("resid_pre", layer=1, source=shorter)])


def test_audio_at_other_positions_is_refused(llm):
    inputs = tiny.hf_inputs(
        "qwen2_audio", lengths=(37,), words=(6,), n_frames=40, dtype=torch.float64
    )
    shifted = {**inputs, "input_ids": inputs["input_ids"].roll(2, dims=1)}
    with pytest.raises(InputError, match="different positions"):
        patch(llm, inputs, [Patch("resid_pre", layer=1, source=shifted)])


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"site": "attn.z", "layer": 1}, {"site": "attn.z", "layer": 1, "head": 3}),
        ({"site": "attn.z"}, {"site": "attn.z", "layer": 2, "position": 4}),
        ({"site": "resid_post", "layer": 0}, {"site": "resid_pre", "layer": 1, "position": 2}),
        ({"site": "encoder.mlp_out", "time": (0, 0.1)}, {"site": "encoder.mlp_out", "layer": 0}),
    ],
)
def test_patches_that_overlap_are_refused(model, inputs, one, two):
    """Also where a block's output is the next one's input: the same tensor."""
    with pytest.raises(ValueError, match="same elements"):
        patch(model, inputs, [Patch(source=0.0, **one), Patch(source=1.0, **two)])


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"site": "attn.z", "layer": 1, "head": 2}, {"site": "attn.z", "layer": 1, "head": 3}),
        ({"site": "resid_pre", "layer": 1}, {"site": "resid_pre", "layer": 2}),
        ({"site": "resid_post", "layer": 1}, {"site": "resid_pre", "layer": 1}),
        ({"site": "mlp_out", "position": 1}, {"site": "mlp_out", "position": [2, 3]}),
    ],
)
def test_patches_beside_each_other_are_not(model, inputs, one, two):
    patches = [Patch(source=0.0, **one), Patch(source=1.0, **two)]
    assert patch(model, inputs, patches).isfinite().all()


def test_no_patches_and_metrics_of_another_shape_are_refused(model, inputs):
    with pytest.raises(ValueError, match="at least one"):
        patch(model, inputs, [])
    with pytest.raises(ValueError, match="scalar or one value per row"):
        patch(model, inputs, [Patch("mlp_out", source=0.0)], metric=lambda logits: logits[0])


def test_a_patch_is_an_edit(model, inputs, cache):
    """In `intervene`, in `patching.run` and in files it does what `patch` does."""
    one = Patch("decoder.resid_pre", layer=1, position=slice(1, None), source=cache)
    other = Patch("decoder.attn.z", layer=0, head=1, source=0.0)
    held = model.as_inputs(inputs).attended  # of padding, `patch` alone takes positions
    expected = patch(model, inputs, [one, other])[held]
    with intervene(model, one, other), torch.no_grad():
        same(model(inputs)[held], expected)
    same(run(model, inputs, [one, other])[held], expected)
    written, tensors = edits.to_dict(one)
    with intervene(model, edits.from_dict(written, tensors), other), torch.no_grad():
        same(model(inputs)[held], expected)


def test_windows_and_bands_of_a_patch_are_places():
    one = Patch("encoder.resid_pre", time=[(0.0, 0.1), (0.3, 0.4)], source=0)
    assert (one.where.one, one.where.other) == (Span(0.0, 0.1), Span(0.3, 0.4))
    assert Patch("encoder.resid_pre", frequency=(0, 99), source=0).where == Band(0, 99)
    model = FAMILIES["audio_spectrogram_transformer"].hooked(
        FAMILIES["audio_spectrogram_transformer"].build()
    )
    inputs = model.as_inputs(FAMILIES["audio_spectrogram_transformer"].batch())
    tall = Patch("encoder.resid_post", layer=0, time=(0, 9), frequency=(0, 2000), source=0)
    expected = patch(model, inputs, [tall])
    with intervene(model, tall), torch.no_grad():
        assert torch.equal(model(inputs), expected)
    assert not torch.equal(expected, model(inputs))
