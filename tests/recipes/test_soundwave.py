"""Soundwave beyond parity: which frames are kept, on what that depends, checkpoints, prompts."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer, LoadingError, Span, metrics, patching
from audio_lens.inputs import InputError
from audio_lens.models.compose.assemble import compose
from audio_lens.models.compose.model import CompositionError
from audio_lens.models.loading.weights import renamed
from audio_lens.models.parts.connectors import LinearConnector
from audio_lens.recipes.soundwave import (
    PLACEHOLDER,
    SYSTEM,
    WEIGHT_NAMES,
    HookedShrinking,
    HookedSoundwave,
    ShrinkingConnector,
    soundwave,
    without_fused,
)
from families.base import AUDIO_TOKEN, randomise
from families.soundwave import EAR, FRAMES, N_FRAMES, answer, batch, build, hooked
from published.soundwave import Soundwave

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PROMPT = torch.tensor([7, AUDIO_TOKEN, 8, 9, 10])


@functools.cache
def both(dtype: torch.dtype = torch.float64) -> tuple[Soundwave, HookedSoundwave]:
    published = build(dtype=dtype)
    return published, hooked(published)


def features(seed: int = 0, n_clips: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_clips, EAR["num_mel_bins"], N_FRAMES, generator=generator, dtype=dtype)


def given(
    mel: Tensor, prompt: Tensor = PROMPT, n_mel: int = N_FRAMES, **more: Any
) -> dict[str, Tensor]:
    """A prompt with one placeholder about each clip, as a processor would return it."""
    mask = torch.zeros(len(mel), N_FRAMES, dtype=torch.long)
    mask[:, :n_mel] = 1
    tokens = prompt.repeat(len(mel), 1)
    made = {"input_ids": tokens, "input_features": mel, "feature_attention_mask": mask}
    return {**made, **more}


def kept_in(inputs: AudioInputs, row: int = 0) -> list[int]:
    return [index for index in inputs.extra["kept"][row].tolist() if index >= 0]


# -------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_model_decides_as_the_published_one(dtype: torch.dtype) -> None:
    """Which frames, their labels, and the answer; clip after clip, and all clips together."""
    published, model = both(dtype)
    mel = features(n_clips=3, dtype=dtype)
    inputs = model.as_inputs(given(mel))
    assert len({len(kept_in(inputs, row)) for row in range(3)}) > 1
    with torch.no_grad(), model.attention("explicit"):
        found, logits = model.segmentation(inputs), model(inputs)
        for row in range(3):
            out, heard = published.answer(PROMPT, mel[row : row + 1])
            assert kept_in(inputs, row) == heard.kept.tolist()
            pairs = [(found.logits[row], heard.logits)]
            if len(heard.kept) == inputs.extra["kept"].shape[1]:  # no padding: same softmax rows
                pairs.append((logits[row][inputs.attended[row]], out.logits[0]))
            for ours, theirs in pairs:
                assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()
    assert torch.equal(found.labels, found.logits.argmax(-1))
    assert torch.equal(found.kept, inputs.extra["kept"])


def test_single_prompts_answer_as_the_published_ones() -> None:
    published, model = both()
    for seed in range(3):
        theirs = answer(published, PROMPT, features(seed))["hook_logits"]
        with torch.no_grad(), model.attention("explicit"):
            ours = model(given(features(seed)))
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_runs_of_a_label_keep_their_first_frame() -> None:
    """Whatever the label: here the head knows three, and every run of them is long."""
    published = build(dtype=torch.float64)
    with torch.no_grad():
        published.model.audio_feature_head.weight[3:] *= 1e-3
    model = hooked(published)
    inputs = model.as_inputs(given(features()))
    labels = model.segmentation(inputs).labels[0].tolist()
    starts = [i for i in range(FRAMES) if i == 0 or labels[i] != labels[i - 1]]
    assert kept_in(inputs) == starts and len(starts) < FRAMES


def test_frames_are_chosen_without_hooks_and_stay() -> None:
    _, model = both()
    free = model.as_inputs(given(features()))
    hook = ("encoder.blocks.1.hook_resid_post", lambda x, hook: x.flip(1))
    with model.hooks([hook]):
        chosen = model.as_inputs(given(features()))
        would = model.segmentation(free)
        logits = model(free)
    assert torch.equal(chosen.extra["kept"], free.extra["kept"])
    assert would.kept.tolist() != free.extra["kept"].tolist()
    assert logits.shape[1] == free.shape[1]


def test_what_decides_is_no_hook_point_but_has_gradients() -> None:
    _, model = both()
    deciding = [name for name in model.hook_dict if "head" in name or "logits" in name]
    assert deciding == ["hook_logits"]
    inputs, seen = model.as_inputs(given(features())), []
    with model.hooks([("connector.hook_frames", lambda x, hook: seen.append(x))]):
        logits = model.segmentation(inputs).logits
    (gradient,) = torch.autograd.grad(logits[0, 3, 4], seen)
    assert torch.allclose(gradient[0, 3], model.connector.head.weight[4])
    assert not gradient[0, :3].any() and not gradient[0, 4:].any()


# -------------------------------------------------------------------------------- two traps


def test_frames_of_the_adapter_see_nothing_of_each_other() -> None:
    """In the published code too, for all its attention."""
    published, model = both()
    heard, changed = torch.randn(2, 1, 2 * FRAMES, EAR["d_model"]).double()
    changed[0, :-2] = heard[0, :-2]
    inner, theirs, ours = published.model, [], []
    with torch.no_grad():
        for x in (heard, changed):
            resid = inner.mm_projector1(x.unflatten(1, (-1, 2)).flatten(2))
            theirs.append(inner.out_norm(inner.asr_transformer_encoder(resid)))
            ours.append(model.connector.frames_of(x))
    for before, after in (theirs, ours):
        assert torch.equal(before[0, :-1], after[0, :-1])
        assert not torch.equal(before[0, -1], after[0, -1])
    assert torch.allclose(theirs[0], ours[0], rtol=0, atol=1e-12)


def test_the_adapters_pattern_is_one_and_can_be_written() -> None:
    _, model = both()
    inputs, name = model.as_inputs(given(features())), "connector.blocks.0.attn.hook_pattern"
    free, cache = model.run_with_cache(inputs, names_filter=[name])
    assert torch.equal(cache[name], torch.eye(FRAMES).double().expand(1, 6, -1, -1))
    spread = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x.roll(1, -1))])
    assert not torch.allclose(free, spread)
    own = [n for n in model.hook_dict if n.startswith("connector.blocks.0.attn.")]
    assert not [n for n in own if n.endswith(("hook_q", "hook_k", "hook_attn_scores"))]


def test_dropped_frames_reach_nothing() -> None:
    """The look-back does not see them, in the published code as here."""
    published, model = both()
    frames = torch.randn(1, FRAMES, 48).double()
    kept = torch.arange(0, FRAMES, 3)
    dropped = torch.ones(FRAMES, dtype=torch.bool)
    dropped[kept] = False
    other = frames.clone()
    other[0, dropped] = torch.randn(int(dropped.sum()), 48).double()
    with torch.no_grad():
        theirs = [published.model.lbm(x[0, kept], x[0], dropped) for x in (frames, other)]
        ours = [model.connector.shrink(x, kept[None]) for x in (frames, other)]
    assert torch.allclose(*theirs, rtol=0, atol=1e-15)
    assert torch.allclose(*ours, rtol=0, atol=1e-15)
    assert torch.allclose(theirs[0], ours[0][0], rtol=0, atol=1e-12)


def test_the_look_back_can_be_made_to_look() -> None:
    _, model = both()
    inputs, name = model.as_inputs(given(features())), "connector.cross_attn.hook_pattern"
    free, cache = model.run_with_cache(inputs, names_filter=[name])
    dropped = [i for i in range(FRAMES) if i not in kept_in(inputs)]
    assert dropped and not cache[name][..., dropped].any()
    assert torch.allclose(cache[name].sum(-1), torch.ones(1).double())
    even = model.run_with_hooks(
        inputs, fwd_hooks=[(name, lambda x, hook: torch.full_like(x, 1 / FRAMES))]
    )
    assert not torch.allclose(free, even)


# -------------------------------------------------------------------------------- pairs


def pair(model: HookedSoundwave) -> tuple[AudioInputs, AudioInputs]:
    clean, other = (model.as_inputs(given(features(seed))) for seed in (0, 1))
    assert kept_in(clean) != kept_in(other)
    return clean, model.with_segmentation(other, like=clean)


def test_a_pair_on_one_segmentation_can_be_swept() -> None:
    _, model = both()
    clean, corrupted = pair(model)
    assert corrupted.shape == clean.shape
    result = patching.sweep(
        model,
        clean=clean,
        corrupted=corrupted,
        site="connector.out",
        axes="time",
        windows=[Span(0.0, 5.0)],
        metric=metrics.logit_diff(5, 9),
        progress=False,
    )
    assert result.recovery.item() == pytest.approx(1.0, abs=1e-9)


def test_a_segmentation_of_ones_own_changes_nothing() -> None:
    _, model = both()
    inputs = model.as_inputs(given(features(n_clips=2)))
    same = model.with_segmentation(inputs, like=inputs)
    assert torch.equal(same.tokens, inputs.tokens) and torch.equal(same.attended, inputs.attended)
    assert torch.equal(model(same), model(inputs))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompts_about_several_frames_are_recounted(padding: str) -> None:
    """And their positions counted anew."""
    _, model = both()
    one = model.as_inputs(batch(padding=padding, kept=(15, 9), dtype=torch.float64))
    other = model.as_inputs(batch(padding=padding, kept=(4, 21), dtype=torch.float64))
    made = model.with_segmentation(one, like=other)
    for name in ("tokens", "attended", "position_ids"):
        assert torch.equal(getattr(made, name), getattr(other, name))
    assert torch.equal(model(made), model(other))


def test_pairs_on_other_frames_are_refused_and_told_what_to_do() -> None:
    _, model = both()
    clean, other = (model.as_inputs(given(features(seed))) for seed in (0, 1))
    with pytest.raises(InputError, match=r"keep different frames.*with_segmentation"):
        patching.sweep(
            model,
            clean=clean,
            corrupted=other,
            site="decoder.resid_pre",
            axes="layer",
            metric=metrics.logit_diff(5, 9),
        )
    shorter = model.as_inputs(given(features(1), n_mel=150))
    with pytest.raises(InputError, match="equal length"):
        model.with_segmentation(shorter, like=clean)


# -------------------------------------------------------------------------------- given frames


@pytest.mark.parametrize(
    "kept",
    [[[0, 5, 3]], [[0, 0, 3]], [[0, FRAMES]], [[0, -2]], [[0, -1, 3]], [[0, 1], [0, 1]]],
    ids=["order", "twice", "beyond", "before", "gap", "rows"],
)
def test_frames_that_are_none_are_refused(kept: list[list[int]]) -> None:
    _, model = both()
    with pytest.raises(InputError, match="increasing indices"):
        model.as_inputs(given(features(), kept=torch.tensor(kept)))


def test_at_least_one_frame_is_kept() -> None:
    _, model = both()
    kept = torch.tensor([[0, 4], [-1, -1]])
    with pytest.raises(InputError, match="segment 1"):
        model.as_inputs(given(features(n_clips=2), kept=kept))


# -------------------------------------------------------------------------------- time


def test_kept_frames_lie_at_their_seconds() -> None:
    """0.04 s apart, the middle of two of Whisper's; what lies in padding holds no audio."""
    _, model = both()
    kept = torch.tensor([[0, 3, 4, 30, 49], [2, 18, 19, -1, -1]])
    mel = given(features(n_clips=2), n_mel=75, kept=kept)
    mel["feature_attention_mask"][0] = 1
    inputs = model.as_inputs(mel)
    timeline = model.timeline(inputs)
    expected = [[0.01, 0.13, 0.17, 1.21, 1.97], [0.09, 0.73, 0.77]]
    for row, seconds in enumerate(expected):
        own, places = timeline[row], inputs.tokens[row] == AUDIO_TOKEN
        assert own.seconds("connector")[: len(seconds)].tolist() == pytest.approx(seconds)
        assert own.seconds("decoder")[places].tolist() == pytest.approx(seconds)
        assert own.seconds("decoder")[~places].isnan().all()
    assert timeline[1].seconds("connector")[3:].isnan().all()
    assert timeline[0].valid("connector").all()
    assert timeline[1].valid("connector").tolist() == [True, True, False, False, False]
    assert timeline[0].positions("decoder", 0.1, 0.2) == slice(2, 4)
    found = model.segmentation(inputs).seconds
    assert found[0, 0] == pytest.approx(0.01)


# -------------------------------------------------------------------------------- checkpoints


def saved(folder: Path, state: dict[str, Tensor], published: Soundwave, **config: Any) -> Path:
    """A synthetic checkpoint in the published layout."""
    folder.mkdir()
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors")
    text = published.config.to_dict()
    own = {"model_type": "Soundwave", "adapter_size": EAR["d_model"], "audio_patch_token": 90}
    (folder / "config.json").write_text(json.dumps({**text, **own, **config}))
    return folder


def saved_whisper(folder: Path, published: Soundwave) -> Path:
    """Whisper alone, with the encoder that the published model hears with."""
    ear = published.model.audio_tower
    whisper = transformers.WhisperForConditionalGeneration(ear.config)
    whisper.model.encoder.load_state_dict(ear.state_dict())
    whisper.to(ear.dtype).save_pretrained(folder)
    return folder


def is_of_ear(name: str) -> bool:
    return name.startswith("model.audio_tower.")


@pytest.mark.parametrize("layout", ["with its ear", "with Whisper apart"])
def test_published_checkpoints(tmp_path: Path, layout: str) -> None:
    """The later code keeps Whisper's encoder in the checkpoint, the earlier reads it elsewhere."""
    published, _ = both(torch.float32)
    whisper = saved_whisper(tmp_path / "whisper", published)
    state = {
        name: x
        for name, x in published.state_dict().items()
        if layout == "with its ear" or not is_of_ear(name)
    }
    folder = saved(tmp_path / "soundwave", state, published, audio_tower=str(whisper))
    theirs = answer(published, PROMPT, features(dtype=torch.float32))["hook_logits"]
    for named in (None, whisper):
        model = soundwave(folder, whisper=named)
        ours = model(given(features(dtype=torch.float32)))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert model.cfg.model_name == str(folder) and model.cfg.family == "soundwave"
    small = soundwave(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_every_published_weight_has_its_place() -> None:
    """And the table names none that are not published."""
    published, model = both()
    state = without_fused(published.state_dict())
    ours = renamed(state, WEIGHT_NAMES)
    assert ours.keys() == model.state_dict().keys()
    unread = [name for name in state if ".self_attn." in name and "asr_transformer" in name]
    assert len(state) - len(ours) == len([n for n in unread if "q_proj" in n or "k_proj" in n]) == 4
    for theirs in WEIGHT_NAMES:
        layers = [theirs.replace("{l}", str(layer)) for layer in range(3)]
        is_optional = "_norm" in theirs and "self_attn" in theirs  # of Qwen 3
        assert is_optional or any(name.startswith(x) for x in layers for name in state), theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.out_norm.bias"), "missing weights: connector.ln_adapted"),
        (lambda state: state.update({"model.lbm.extra": torch.zeros(1)}), "without a place"),
        (
            lambda state: state.update({"model.mm_projector1.bias": torch.zeros(7)}),
            "of another shape: connector.adapter.bias",
        ),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    published, _ = both(torch.float32)
    state = dict(published.state_dict())
    change(state)
    whisper = saved_whisper(tmp_path / "whisper", published)
    with pytest.raises(LoadingError, match=message):
        soundwave(saved(tmp_path / "soundwave", state, published), whisper)


def test_what_is_no_soundwave_is_refused(tmp_path: Path) -> None:
    published, _ = both(torch.float32)
    with pytest.raises(LoadingError, match=r"no config\.json"):
        soundwave(tmp_path)
    folder = saved(tmp_path / "soundwave", dict(published.state_dict()), published)
    with pytest.raises(LoadingError, match="pass whisper="):
        soundwave(folder)
    with pytest.raises(LoadingError, match="no shape of Whisper"):
        soundwave(folder, tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    del config["adapter_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadingError, match="adapter_size"):
        soundwave(folder, "openai/whisper-large-v3")


# -------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of characters; as Llama 3's, it begins whatever is encoded with a token of its own."""
    begin = "<|begin_of_text|>"
    special = [begin, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", PLACEHOLDER, "?"]
    characters = sorted(set(SYSTEM + "systemuserassistant\n What is said"))
    words = {word: index for index, word in enumerate([*special, *characters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="?"))
    backend.add_special_tokens(special[:-1])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        f"{begin} $A", special_tokens=[(begin, 0)]
    )
    backend.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token="<|eot_id|>", unk_token="?"
    )


@pytest.fixture(scope="module")
def speaking(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> HookedSoundwave:
    """A model read from files, with a tokenizer beside them."""
    published, _ = both(torch.float32)
    folder = tmp_path_factory.mktemp("files")
    whisper = saved_whisper(folder / "whisper", published)
    files = saved(folder / "soundwave", dict(published.state_dict()), published)
    tokenizer.save_pretrained(files)
    model = soundwave(files, whisper)
    model.feature_extractor = transformers.WhisperFeatureExtractor(
        feature_size=EAR["num_mel_bins"], chunk_length=N_FRAMES // 100
    )
    return model


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)


def published_prompt(tokenizer: Any, question: str) -> list[int]:
    """As the published inference code puts it together, piece by piece."""
    ids = tokenizer.convert_tokens_to_ids

    def turn(role: str) -> list[int]:
        begin, end = ids("<|start_header_id|>"), ids("<|end_header_id|>")
        return [begin, *tokenizer(role).input_ids, end]

    line, stop = tokenizer("\n").input_ids, ids("<|eot_id|>")
    asked = tokenizer("\n" + PLACEHOLDER).input_ids + tokenizer(question).input_ids
    return [
        ids("<|begin_of_text|>"),
        *turn("system"),
        *line,
        *tokenizer(SYSTEM).input_ids,
        stop,
        *turn("user"),
        *asked,
        stop,
        *turn("assistant"),
        *line,
    ]


@pytest.mark.parametrize("question", ["What is said?", "What\nis said?\n"])
def test_prompts_are_encoded_as_published(
    speaking: HookedSoundwave, tokenizer: Any, question: str
) -> None:
    inputs = speaking.prepare(noise(1.5), question, sampling_rate=16_000)
    tokens = inputs.tokens[0].tolist()
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    at, count = tokens.index(placeholder), tokens.count(placeholder)
    assert count == len(kept_in(inputs))
    assert tokens[:at] + tokens[at + count - 1 :] == published_prompt(tokenizer, question)


def test_answers_are_those_of_the_published_model(speaking: HookedSoundwave) -> None:
    published, _ = both(torch.float32)
    inputs = speaking.prepare(noise(1.5), "What is said?", sampling_rate=16_000)
    is_audio = inputs.tokens[0] == speaking.audio_token_id
    words = published.model.embed_tokens(inputs.tokens[0])
    with torch.no_grad():
        heard = published.hear(inputs.features)
        prompt = words.masked_scatter(is_audio[:, None], heard.tokens)
        theirs = published.generate(
            inputs_embeds=prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=3
        )
    ours = speaking.generate(inputs, max_new_tokens=8, return_type="tokens")[0, len(words) :]
    assert ours.tolist() == theirs[0, : len(ours)].tolist()


def test_prepared_pairs(speaking: HookedSoundwave) -> None:
    """Changes of clip and text after `with_segmentation` stay on its frames."""
    model = speaking
    clean, other = (
        model.prepare(noise(1.5, seed), "What is said?", sampling_rate=16_000) for seed in (0, 1)
    )
    corrupted = model.with_segmentation(other, like=clean)
    assert corrupted.shape == clean.shape and kept_in(corrupted) == kept_in(clean)
    assert corrupted.text == other.text
    third = corrupted.with_audio(noise(1.5, 2), sampling_rate=16_000)
    assert kept_in(third) == kept_in(clean)
    assert not torch.equal(third.features, corrupted.features)
    asked = corrupted.with_text("What it said?")
    assert kept_in(asked) == kept_in(clean) and asked.text != corrupted.text
    if kept_in(clean) != kept_in(other):
        with pytest.raises(InputError, match="with_segmentation"):
            clean.with_audio(noise(1.5, 1), sampling_rate=16_000)


# -------------------------------------------------------------------------------- one's own


class Runs(ShrinkingConnector):
    """A connector of one's own: a linear map, a CTC head, and runs of blank dropped."""

    blank = 1

    def __init__(self, d_in: int, d_out: int):
        super().__init__(frames_per_token=1)
        self.linear, self.head = nn.Linear(d_in, d_out), nn.Linear(d_out, 3)

    def adapt(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def label_logits(self, frames: Tensor) -> Tensor:
        return self.head(frames)


@pytest.mark.parametrize("keeps_padding", [True, False])
def test_a_connector_of_ones_own_shrinks_by_its_own_labels(keeps_padding: bool) -> None:
    published = build()
    ear = transformers.WhisperForConditionalGeneration(published.model.audio_tower.config)
    model = compose(
        randomise(ear),
        randomise(Runs(EAR["d_model"], 48)),
        transformers.LlamaForCausalLM(published.config),
        AUDIO_TOKEN,
        keeps_padding=keeps_padding,
        family=HookedShrinking,
    )
    assert isinstance(model, HookedShrinking)
    inputs = model.as_inputs(given(features(dtype=torch.float32), n_mel=101))
    labels = model.segmentation(inputs).labels[0].tolist()
    last = N_FRAMES // 2 if keeps_padding else 51
    starts = [i for i in range(last) if labels[i] != 1 and (i == 0 or labels[i] != labels[i - 1])]
    assert kept_in(inputs) == starts and 1 in labels[:last]
    _, cache = model.run_with_cache(inputs)
    assert torch.equal(cache["connector.hook_out"][0], cache["connector.hook_frames"][0, starts])
    seconds = model.timeline(inputs).seconds("connector")
    assert seconds.tolist() == pytest.approx([0.02 * i for i in starts])


def test_other_connectors_are_no_shrinking_ones() -> None:
    published = build()
    ear = transformers.WhisperForConditionalGeneration(published.model.audio_tower.config)
    with pytest.raises(CompositionError, match="ShrinkingConnector"):
        compose(
            HookedAudioTransformer.from_hf(ear),
            LinearConnector(EAR["d_model"], 48),
            transformers.LlamaForCausalLM(published.config),
            AUDIO_TOKEN,
            family=HookedShrinking,
        )
