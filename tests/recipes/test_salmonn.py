"""SALMONN beyond parity: its files, prompts, both ears, windows in time, and the adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from audio_lens import AudioError, HookPoint, LoadingError, metrics, patching
from audio_lens.analysis.time_profile import time_profile
from audio_lens.inputs import InputError
from audio_lens.models.compose.model import CompositionError
from audio_lens.models.loading.weights import renamed
from audio_lens.recipes.salmonn import (
    WEIGHT_NAMES,
    WINDOW,
    HookedSalmonn,
    salmonn,
    salmonn_connector,
)
from families.base import AUDIO_TOKEN
from families.salmonn import WINDOWS, batch, build, hooked, parts_of
from published.salmonn import Salmonn, published_shapes

RATE = 16_000
PROMPT = "USER: <Speech><SpeechHere></Speech> {}\nASSISTANT:"
QUESTION = "What is said?"
AS_RELEASED = {"ear_max_source_positions": 1500, "ear_encoder_layers": 1}


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(RATE * seconds)).astype(np.float32)


@functools.cache
def model_of(**options: Any) -> HookedSalmonn:
    model = hooked(build(dtype=torch.float64, **options))
    model.tokenizer = tokenizer()
    return model


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token per character; like Llama's, with a blank before whatever it is given."""
    characters = sorted(set(PROMPT + QUESTION + "\N{LOWER ONE EIGHTH BLOCK}"))
    ids = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *characters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


# -------------------------------------------------------------------------------- files


@pytest.mark.parametrize("size", [(4096, 32), (5120, 40)], ids=["7B", "13B"])
def test_every_weight_of_a_released_checkpoint_has_a_place(size: tuple[int, int]) -> None:
    shapes = published_shapes(*size)
    with torch.device("meta"):
        tensors = renamed({n: torch.empty(s) for n, s in shapes.items()}, WEIGHT_NAMES)
    prefix = "connector."
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    connector = salmonn_connector(own)
    assert (connector.cfg.d_model, connector.cfg.d_memory, connector.cfg.n_layers) == (768, 2048, 2)
    adapted = {name.rsplit(".lora", 1)[0] for name in tensors if ".lora_" in name}
    assert len(adapted) == 2 * size[1] and len(tensors) == len(own) + 2 * len(adapted)


def test_names_of_the_adapter_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    published = build()
    config = peft.LoraConfig(r=8, lora_alpha=32, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(parts_of(published)["llm"], config).state_dict()
    names = {f"llama_model.{name}" for name in theirs if ".lora_" in name}
    assert names == {name for name in published.checkpoint()["model"] if ".lora_" in name}


def files(published: Salmonn, folder: Path) -> dict[str, Any]:
    """The pieces on disk, as `salmonn` takes them."""
    parts = parts_of(published)
    for name in ("whisper", "llm"):
        parts[name].save_pretrained(folder / name)
    tokenizer().save_pretrained(folder / "llm")
    torch.save(published.checkpoint(), folder / "salmonn.pth")
    weights = {"cfg": published.beats.cfg, "model": published.beats.state_dict()}
    torch.save(weights, folder / "beats.pt")
    return {
        "checkpoint": folder / "salmonn.pth",
        "beats": folder / "beats.pt",
        "llm": folder / "llm",
        "whisper": folder / "whisper",
    }


@torch.no_grad()
def published_logits(published: Salmonn, spectrograms: Tensor, waves: list[np.ndarray]) -> Tensor:
    """From waveforms and a question as the published code puts them together, right-padded."""
    longest = max(map(len, waves))
    raw = torch.stack([torch.from_numpy(np.pad(w, (0, longest - len(w)))) for w in waves])
    is_padding = torch.arange(longest) >= torch.tensor([len(w) for w in waves])[:, None]
    audio = published.encode_speech(spectrograms, raw, is_padding)
    before, after = (
        tokenizer()(text, add_special_tokens=False)["input_ids"]
        for text in PROMPT.format(QUESTION).split("<SpeechHere>")
    )
    row = [1, *before, *[AUDIO_TOKEN] * audio.shape[1], *after]
    return published(torch.tensor([row] * len(waves)), None, audio).logits


@torch.no_grad()
def test_from_files_and_waveforms_to_what_was_published(tmp_path: Path) -> None:
    published = build(beats_finetuned_model=True)
    model = salmonn(**files(published, tmp_path), dtype=torch.float32)
    waves = [noise(1.7), noise(1.2, seed=1)]
    inputs = model.prepare(waves, QUESTION, sampling_rate=RATE)
    expected = published_logits(published, inputs.features, waves)
    ours = model(inputs)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert inputs.tokens[0, 0] == 1 and not (inputs.tokens[:, 1:] == 1).any()
    written = model.generate(inputs, max_new_tokens=3, return_type="tokens")[:, ours.shape[1] :]
    assert torch.equal(written[:, 0], ours[:, -1].argmax(-1))


def test_what_is_known_and_unused_is_left_out() -> None:
    """BERT's branch for text, and tables that older versions of transformers stored."""
    published = build()
    state = published.checkpoint()["model"]
    bert, llama = "speech_Qformer.bert", "llama_model.base_model.model.model.layers.0.self_attn"
    unused = (
        f"{bert}.embeddings.word_embeddings.weight",
        f"{bert}.encoder.layer.1.intermediate.dense.bias",
        f"{bert}.encoder.layer.1.output.LayerNorm.weight",
        "speech_Qformer.cls.predictions.bias",
        f"{llama}.rotary_emb.inv_freq",
    )
    more = {**state, **{name: torch.zeros(3) for name in unused}}
    model = HookedSalmonn.of(more, **parts_of(published))
    model.audio_token_id = AUDIO_TOKEN
    torch.testing.assert_close(model(batch()), hooked(published)(batch()), rtol=0, atol=0)


def without(name: str) -> Callable[[dict], dict]:
    return lambda state: {key: x for key, x in state.items() if name not in key}


@pytest.mark.parametrize(
    "change, problem",
    [
        (without("layers.2.self_attn.v_proj.lora_B"), "missing decoder.blocks.2.attn.v_proj"),
        (without("layer.1.crossattention.self.key"), "missing weights: blocks.1.cross_attn.k_proj"),
        (without("speech_query_tokens"), "no query"),
        (lambda state: {**state, "ln_video.weight": torch.zeros(3)}, "without a place"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Callable[[dict], dict], problem: str) -> None:
    published = build()
    with pytest.raises(LoadingError, match=problem):
        HookedSalmonn.of(change(published.checkpoint()["model"]), **parts_of(published))


def test_other_language_models_and_dtypes_are_refused(tmp_path: Path) -> None:
    published, deeper, wider = build(), build(num_hidden_layers=4), build(hidden_size=60)
    parts, state = parts_of(published), published.checkpoint()["model"]
    with pytest.raises(LoadingError, match="4 blocks"):
        HookedSalmonn.of(state, **{**parts, "llm": parts_of(deeper)["llm"]})
    with pytest.raises(CompositionError, match="language model"):
        HookedSalmonn.of(state, **{**parts, "llm": parts_of(wider)["llm"]})
    with pytest.raises(CompositionError, match="several dtypes"):
        HookedSalmonn.of(state, **{**parts, "llm": parts["llm"].double()})
    torch.save({"weights": state}, tmp_path / "salmonn.pth")
    with pytest.raises(LoadingError, match="holds no 'model'"):
        salmonn(tmp_path / "salmonn.pth", **parts)


# -------------------------------------------------------------------------------- adapter


@torch.no_grad()
def test_the_adapter_is_live_or_merged() -> None:
    published = build(dtype=torch.float64)
    live, merged = hooked(published), hooked(published, merge=True)
    given = batch(dtype=torch.float64)
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(merged(given)[kept], live(given)[kept], rtol=1e-9, atol=1e-9)
    assert not any("lora" in name for name in merged.hook_dict)
    with live.lora_disabled():
        plain = live(given)[kept]
    for alpha, expected in ((0, plain), (32, live(given)[kept])):
        other = hooked(published, lora_alpha=alpha)
        torch.testing.assert_close(other(given)[kept], expected, rtol=1e-9, atol=1e-9)
    assert (plain - live(given)[kept]).abs().max() > 1e-3


def test_merging_leaves_the_given_model_as_it_was() -> None:
    published = build()
    parts = parts_of(published)
    before = {name: x.clone() for name, x in parts["llm"].state_dict().items()}
    HookedSalmonn.of(published.checkpoint()["model"], **parts, merge=True)
    assert all(torch.equal(x, before[name]) for name, x in parts["llm"].state_dict().items())


# -------------------------------------------------------------------------------- prompts, clips


def test_prompts_are_the_published_ones() -> None:
    model = model_of()
    inputs = model.prepare(noise(1.0), QUESTION, sampling_rate=RATE)
    before, after = (
        model.tokenizer.encode(text, add_special_tokens=False)
        for text in PROMPT.format(QUESTION).split("<SpeechHere>")
    )
    audio = [model.audio_token_id] * WINDOWS
    assert inputs.tokens[0].tolist() == [1, *before, *audio, *after]
    whole = model.prepare(noise(1.0), PROMPT.format(QUESTION), sampling_rate=RATE)
    assert torch.equal(whole.tokens, inputs.tokens)


def test_a_single_query_has_no_queries_and_keys_of_its_own() -> None:
    names = [n for n in model_of().hook_dict if n.startswith("connector.blocks.0.attn.")]
    assert {name.rpartition(".")[2] for name in names} == {
        *("hook_v", "hook_pattern", "hook_z", "hook_result"),
    }
    assert "connector.blocks.0.attn.hook_q" in model_of(queries=2).hook_dict


def test_short_clips_are_heard_with_silence_behind_them() -> None:
    """By BEATs; Whisper hears all clips so."""
    model, clip = model_of(), noise(0.3)
    inputs = model.prepare(clip, QUESTION, sampling_rate=RATE)
    second = np.pad(clip, (0, RATE - len(clip)))
    assert inputs.extra["beats"].shape == (1, 128, 98) and inputs.extra["beats.mask"].all()
    assert torch.equal(inputs.extra["beats"], model.heard_beside([second])["beats"])
    assert model.timeline(inputs).duration_s() == pytest.approx(0.3)


def test_what_it_cannot_hear_is_refused() -> None:
    model = model_of()
    with pytest.raises(AudioError, match="cut it"):
        model.prepare(noise(2.5), QUESTION, sampling_rate=RATE)
    given = {name: x for name, x in batch().items() if name != "beats"}
    with pytest.raises(InputError, match="no features for beats"):
        model(given)


# -------------------------------------------------------------------------------- time


def test_88_tokens_of_30_s() -> None:
    model = model_of(**AS_RELEASED)
    inputs = model.prepare(noise(10.0), QUESTION, sampling_rate=RATE)
    timeline = model.timeline(inputs)
    seconds = timeline.seconds("connector")
    assert seconds.tolist() == pytest.approx([0.34 * j + 0.16 for j in range(88)])
    assert timeline.valid("connector").sum() == 29  # centres up to 9.68 s
    assert torch.equal(timeline.seconds("decoder")[timeline.audio_span], seconds[:29])
    patches, hertz = timeline.seconds("beats"), timeline.hertz("beats")
    assert len(patches) == 496 and patches[8].item() == pytest.approx(0.2475)
    assert hertz[0] < hertz[7] and timeline.valid("beats").all()


@torch.no_grad()
def test_both_ears_are_read_in_the_same_windows() -> None:
    """A position of either ear reaches the token of its window alone; the last four reach none."""
    model = model_of(**AS_RELEASED, beats_encoder_layers=1)
    inputs = model.prepare(noise(30.0), QUESTION, sampling_rate=RATE)
    before = model.encode(inputs)

    def reached(name: str, position: int) -> list[int]:
        def nudge(x: Tensor, hook: HookPoint) -> Tensor:
            x[:, position] += torch.randn(x.shape[-1], generator=generator).to(x)
            return x

        generator = torch.Generator().manual_seed(position)
        with model.hooks([(name, nudge)]):
            changes = (model.encode(inputs) - before).abs().amax((0, 2))
        return (changes > 1e-9).nonzero()[:, 0].tolist()

    for name in ("encoder.hook_out", "beats.hook_out"):
        for position in (0, WINDOW - 1, WINDOW, 700, 1495):
            assert reached(name, position) == [position // WINDOW], (name, position)
    for position in (1496, 1499):
        assert reached("encoder.hook_out", position) == []
    assert model.timeline(inputs).seconds("beats").shape == (1496,)


@torch.no_grad()
def test_time_profiles_lie_within_windows() -> None:
    model = model_of()
    profile = time_profile(model, batch(dtype=torch.float64))
    assert profile.dims == ("clip", "token", "time")
    np.testing.assert_allclose(profile.sum("time"), 1)
    moments = (profile * profile.time).sum("time").values
    starts = 0.02 * WINDOW * np.arange(WINDOWS)
    assert (moments >= starts).all() and (moments < starts + 0.02 * WINDOW).all()


# -------------------------------------------------------------------------------- the second ear


def pair() -> dict[str, dict]:
    """Two runs that differ in what BEATs hears, and in nothing else."""
    options = {"words": (4, 4), "lengths": (19_000, 19_000)}
    clean, other = (batch(seed=seed, dtype=torch.float64, **options) for seed in (0, 1))
    return {"clean": clean, "corrupted": {**clean, "beats": other["beats"]}}


def total(logits: Tensor) -> Tensor:
    """A metric of all logits of the last position."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype).cos()
    return logits[:, -1] @ weights


@torch.no_grad()
def test_sweeps_of_the_second_ear_are_exact() -> None:
    """Against a full forward with a hook, and total where nothing else differs."""
    model, runs = model_of(), pair()
    result = patching.sweep(
        model,
        site="beats.resid_pre",
        axes=("layer", "time"),
        windows=[(0.0, 0.3), (0.3, 0.7), (0.0, 2.0)],
        metric=total,
        progress=False,
        **runs,
    )
    assert torch.allclose(result.recovery[:, :, 2], torch.ones(2, 3, dtype=torch.float64))
    inside = model.timeline(runs["clean"])[0].positions("beats", 0.3, 0.7)
    name = "beats.blocks.1.hook_resid_pre"
    _, cache = model.run_with_cache(runs["clean"], names_filter=name)

    def patch(x: Tensor, hook: HookPoint) -> Tensor:
        x[:, inside] = cache[name][:, inside]
        return x

    expected = total(model.run_with_hooks(runs["corrupted"], fwd_hooks=[(name, patch)]))
    torch.testing.assert_close(result.values[:, 1, 1], expected, rtol=1e-10, atol=0)
    assert (result.values[:, 1, 1] - result.corrupted).abs().min() > 1e-6


@torch.no_grad()
def test_patches_of_the_second_ear_have_frequencies() -> None:
    """Low and high rows of patches apart, and together all of them."""
    result = patching.sweep(
        model_of(),
        site="beats.resid_pre",
        axes="frequency",
        layers=[0],
        metric=metrics.kl(),
        progress=False,
        **pair(),
    )
    assert result.values.shape[-1] == 8
