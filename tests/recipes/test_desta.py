"""DeSTA2 and DeSTA2.5-Audio beyond parity: checkpoints, prompts, blocks that are read, no time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from audio_lens import AudioInputs, LoadingError, patching
from audio_lens.inputs import InputError
from audio_lens.models.loading.weights import renamed
from audio_lens.recipes.desta import (
    LOCATOR,
    PLACEHOLDER,
    TAPS_2,
    TAPS_25,
    WEIGHT_NAMES,
    HookedDesta,
    HookedDesta2,
    HookedDesta25,
    desta2,
    desta25,
    desta_connector,
)
from families.desta import N_FRAMES, QUERIES, TARGETS, batch, build, hooked, starts
from published.desta import Connector, Desta, Desta2, Desta25, Size, desta2_prompt, desta25_prompt

PREFIX = "perception.connector."
BOTH = {"desta2": Desta2, "desta25": Desta25}
each = pytest.mark.parametrize("published", BOTH.values(), ids=BOTH)


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).astype(np.float32)


@torch.no_grad()
def published_logits(model: Desta, given: dict[str, Tensor]) -> Tensor:
    """Of attended positions."""
    tokens, mask = given["input_ids"], given["attention_mask"]
    return model(tokens, mask, given["input_features"], starts(tokens)).logits[mask.bool()]


@torch.no_grad()
def check_equal(model: HookedDesta, given: dict[str, Tensor], theirs: Tensor) -> None:
    """With attention as transformers' eager one rounds it."""
    with model.attention("explicit"):
        ours = model(given)[given["attention_mask"].bool()]
    tolerance = 1e-12 if ours.dtype == torch.float64 else 1e-5
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


# -------------------------------------------------------------------------------- tokenizer


TEMPLATE = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>"
    "\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set text = bos_token"
    " + text %}{% endif %}{{ text }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    PLACEHOLDER,
]
WORDS = "Hi.<end_audio> What is said here? She said: this is it.<start_audio> Yes.< \n\nHi"
D_VOCAB = 320
PIECES = (  # as Llama 3 splits text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As Llama 3's: bytes merged within words, and a token that begins whatever is encoded."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=D_VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    begin = SPECIAL[0]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        chat_template=TEMPLATE,
    )


def speaking(published: type[Desta], **options: Any) -> tuple[Desta, HookedDesta]:
    """A model that reads text."""
    theirs = build(published, vocab_size=D_VOCAB, **options)
    model = hooked(theirs)
    model.tokenizer = model.processor = tokenizer()
    model.audio_token_id = tokenizer().convert_tokens_to_ids(PLACEHOLDER)
    model.feature_extractor = transformers.WhisperFeatureExtractor(
        feature_size=model.cfg.n_mels, chunk_length=N_FRAMES // 100
    )
    return theirs, model


# -------------------------------------------------------------------------------- checkpoints


class Files(NamedTuple):
    """A synthetic checkpoint: the connector's file, and directories of Whisper and Llama."""

    connector: Path
    whisper: Path
    llama: Path


def saved(model: Desta, path: Path) -> Files:
    """As published."""
    model.ear.whisper.save_pretrained(path / "whisper")
    model.language.save_pretrained(path / "llama")
    tokenizer().save_pretrained(path / "llama")
    state = model.ear.connector.state_dict()
    (path / "desta").mkdir()
    if isinstance(model, Desta2):
        file = path / "desta" / "qformer_connector.pth"
        torch.save(state, file)
    else:
        file = path / "desta" / "model.safetensors"
        save_file({PREFIX + name: tensor for name, tensor in state.items()}, file)
    return Files(file, path / "whisper", path / "llama")


ENTRIES: dict[type[Desta], Callable[..., HookedDesta]] = {Desta2: desta2, Desta25: desta25}


@each
def test_loads_the_published_files(published: type[Desta], tmp_path: Path) -> None:
    model = build(published, vocab_size=D_VOCAB, ear_encoder_layers=12, targets=(2, 5, 8, 11))
    files = saved(model, tmp_path)
    audio = tokenizer().convert_tokens_to_ids(PLACEHOLDER)
    given = batch()
    theirs = published_logits(model, given)
    given["input_ids"] = given["input_ids"].masked_fill(given["input_ids"] == 90, audio)
    for checkpoint in (files.connector, files.connector.parent):
        ours = ENTRIES[published](checkpoint, files.whisper, files.llama)
        assert ours.tokenizer.convert_tokens_to_ids(PLACEHOLDER) == ours.audio_token_id == audio
        assert ours.cfg.family == published.__name__.lower()
        check_equal(ours, given, theirs)
    half = ENTRIES[published](files.connector, files.whisper, files.llama, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@each
def test_files_that_are_not_there(published: type[Desta], tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match=r"no (qformer_connector.pth|model.safetensors) in"):
        ENTRIES[published](tmp_path)


RELEASED = {
    "desta2": (Size(), dict(d_model=768, encoder_attention_heads=12, encoder_layers=12), 89),
    "desta25": (
        Size(targets=(7, 15, 23, 31), n_layers=6),
        dict(d_model=1280, encoder_attention_heads=20, encoder_layers=32),
        526,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_weights_of_released_sizes_map_one_to_one(name: str) -> None:
    """The file of DeSTA2 has 89 MB, the one of DeSTA2.5-Audio 0.1 billion numbers."""
    size, ear, megabytes = RELEASED[name]
    with torch.device("meta"):
        theirs = Connector(transformers.WhisperConfig(**ear), 4096, size)
    state = theirs.state_dict()
    assert sum(x.nbytes for x in state.values()) // 10**6 == megabytes
    whisper = hooked(build(BOTH[name])).cfg.encoder
    n_heads, d_model = ear["encoder_attention_heads"], ear["d_model"]
    shape = replace(whisper, n_heads=n_heads, d_model=d_model, d_head=64, n_ctx=1500)
    taps = (TAPS_2 if name == "desta2" else TAPS_25)[ear["encoder_layers"]]
    table = {k: v.removeprefix("connector.") for k, v in WEIGHT_NAMES.items()}
    ours = desta_connector(renamed(state, table), shape, taps)
    assert {tuple(x.shape) for x in ours.parameters()} == {tuple(x.shape) for x in state.values()}
    assert len(list(ours.parameters())) == len(state)
    assert ours.token_count(1500) == 64


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("proj.1.bias"), "no linear.bias"),
        (lambda s: s.pop("layer_prompts.1"), "missing weights: queries.1"),
        (lambda s: s.update({"llm_model.q_proj.lora_A": torch.ones(2)}), "without a place.*lora_A"),
        (lambda s: s.update({"proj.0.weight": torch.ones(3)}), "norm.weight is"),
        (lambda s: s.update({"layer_weights": torch.ones(QUERIES, 4)}), "4 blocks of Whisper"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Callable, message: str) -> None:
    model = build(Desta2)
    state = dict(model.ear.connector.state_dict())
    change(state)
    with pytest.raises(LoadingError, match=message):
        HookedDesta2.of(state, model.ear.whisper, model.language, (0, 1, 3))


@pytest.mark.parametrize(
    "taps, message", [(None, "a Whisper of 5 blocks"), ((3, 1, 0), "rising order")]
)
def test_blocks_that_cannot_be_read(taps: Sequence[int] | None, message: str) -> None:
    model = build(Desta2)
    with pytest.raises(LoadingError, match=message):
        HookedDesta2.of(model.ear.connector.state_dict(), model.ear.whisper, model.language, taps)


# -------------------------------------------------------------------------------- what is read


PUBLISHED = {
    Desta2: {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (3, 7, 11, 15, 19, 23, 27, 31)},
    Desta25: {4: (0, 1, 2, 3), 12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31)},
}


@pytest.mark.parametrize(
    "published, n_layers", [(p, n) for p, sizes in PUBLISHED.items() for n in sizes]
)
def test_blocks_of_every_size(published: type[Desta], n_layers: int) -> None:
    """Read as each of the two reads its own numbers."""
    targets = PUBLISHED[published][n_layers]
    model = build(published, ear_encoder_layers=n_layers, targets=targets, dtype=torch.float64)
    known = (HookedDesta2 if published is Desta2 else HookedDesta25).published_taps
    assert hooked(model).connector.taps == known[n_layers]
    given = batch(dtype=torch.float64)
    check_equal(hooked(model), given, published_logits(model, given))


def test_one_number_means_two_blocks() -> None:
    """The same weights and numbers give two models; DeSTA2 can be read as it was trained."""
    options = {"ear_encoder_layers": 12, "targets": (2, 5, 8, 11), "dtype": torch.float64}
    first, second = build(Desta2, **options), build(Desta25, **options)
    second.ear.load_state_dict(first.ear.state_dict())
    second.language.load_state_dict(first.language.state_dict())
    given = batch(lengths=[173], words=[5], dtype=torch.float64)
    theirs = [published_logits(model, given) for model in (first, second)]
    assert (theirs[0] - theirs[1]).abs().max() > 0.01
    state, parts = first.ear.connector.state_dict(), (first.ear.whisper, first.language)
    for taps, expected in zip((None, TAPS_25[12]), theirs, strict=True):
        ours = HookedDesta2.of(state, *parts, taps)
        ours.audio_token_id = 90
        check_equal(ours, given, expected)


@each
def test_queries_see_each_other_on_both_sides(published: type[Desta]) -> None:
    model, given = hooked(build(published)), batch()
    name = "connector.blocks.0.attn.hook_pattern"
    pattern = model.run_with_cache(given, names_filter=name)[1][name]
    same_block = torch.block_diag(*[torch.ones(QUERIES, QUERIES)] * len(TARGETS)).bool()
    assert torch.equal(pattern > 0, same_block.expand_as(pattern))


def test_what_lies_behind_the_last_block_is_not_there() -> None:
    model = hooked(build(Desta2))
    assert model.cfg.encoder.n_layers == len(model.encoder.blocks) == 4
    assert not any("ln_final" in name for name in model.hook_dict if name.startswith("encoder"))
    assert "encoder.blocks.4.hook_resid_pre" not in model.hook_dict


def test_blocks_count_by_their_share() -> None:
    """A block whose share is nothing does not reach the tokens."""
    model, given = hooked(build(Desta25, dtype=torch.float64)), batch(dtype=torch.float64)

    def second_only(shares: Tensor, hook: Any) -> Tensor:
        assert shares.shape == (2, QUERIES, 3)
        assert torch.allclose(shares.sum(-1), torch.ones(2, QUERIES).double())
        return torch.tensor([0.0, 1.0, 0.0]).double().expand_as(shares)

    def disturbed(tap: int) -> Callable:
        def change(act: Tensor, hook: Any) -> Tensor:
            act.unflatten(-1, (3, -1))[..., tap, :] += 1
            return act

        return change

    with torch.no_grad(), model.hooks([("connector.hook_tap_weights", second_only)]):
        usual = model(given)
        for tap in range(3):
            moved = model.run_with_hooks(given, fwd_hooks=[("connector.hook_in", disturbed(tap))])
            assert torch.equal(moved, usual) == (tap != 1)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_streams_are_total_up_to_the_first_block_that_is_read(direction: str) -> None:
    """Further on the connector also reads what the other run gave earlier."""
    model = hooked(build(Desta25, dtype=torch.float64))
    options = {"lengths": [173], "words": [5], "dtype": torch.float64}
    clean, other = (model.as_inputs(batch(seed=seed, **options)) for seed in (0, 1))
    result = patching.sweep(
        model,
        clean=clean,
        corrupted=replace(clean, features=other.features),
        site="encoder.resid_post",
        axes="layer",
        metric=lambda logits: logits[:, 3].sum(-1),
        direction=direction,
        progress=False,
    )
    first, later = result.effect[: TARGETS[0] + 1], result.effect[TARGETS[0] + 1 :]
    assert torch.allclose(first, torch.ones_like(first))
    assert ((later - 1).abs() > 1e-3).all()
    assert "whole forward" not in " ".join(result.report)


# -------------------------------------------------------------------------------- prompts


SYSTEM = {"desta2": HookedDesta2.system, "desta25": HookedDesta25.system}
SAYINGS = ["", " ", " Hi. She said it.", "Yes.", " this is\nit"]


@pytest.mark.parametrize("transcript", SAYINGS)
def test_prompts_of_desta2_are_those_of_its_chat(transcript: str) -> None:
    _, model = speaking(Desta2)
    question = "What is said here?"
    messages = [
        {"role": "system", "content": SYSTEM["desta2"]},
        {"role": "audio", "content": "some/clip.wav"},
        {"role": "user", "content": question},
    ]
    tokens, place = desta2_prompt(tokenizer(), messages, "some/clip.wav", transcript)
    inputs = model.prepare(noise(9_000), model.prompt(question, transcript), 16_000)
    audio = [model.audio_token_id] * QUERIES
    assert inputs.tokens[0].tolist() == [*tokens[:place], *audio, *tokens[place:]]
    assert tokens[:2] == [tokenizer().bos_token_id] * 2
    following = tokenizer().decode(tokens[place:])
    assert following.startswith(f"\n\n{transcript}<|eot_id|>")


@pytest.mark.parametrize("transcript", SAYINGS)
def test_prompts_of_desta25_are_those_of_its_generate(transcript: str) -> None:
    _, model = speaking(Desta25)
    conversation = [
        {"role": "system", "content": SYSTEM["desta25"]},
        {"role": "user", "content": f"{LOCATOR}\nWhat is said here? {LOCATOR}"},
    ]
    knowing = copy.deepcopy(tokenizer())
    knowing.add_tokens([LOCATOR])
    said = (transcript, "Yes.")
    tokens, begins = desta25_prompt(knowing, conversation, said, QUERIES)
    prompt = model.prompt(conversation, *said)
    inputs = model.prepare([[noise(9_000), noise(20_000)]], prompt, 16_000)
    assert inputs.tokens[0].tolist() == tokens
    assert inputs.clips_per_row == (2,)
    found = (inputs.tokens[0] == model.audio_token_id).nonzero().flatten()[::QUERIES]
    assert found.tolist() == begins


def test_transcripts_are_tokens_of_their_own_in_desta25() -> None:
    """The end of what is said would merge with the mark behind it."""
    together = tokenizer().encode("Hi.<end_audio>", add_special_tokens=False)
    apart = [
        token
        for text in ("Hi.", "<end_audio>")
        for token in tokenizer().encode(text, add_special_tokens=False)
    ]
    assert together != apart
    _, model = speaking(Desta25)
    inputs = model.prepare(noise(9_000), model.prompt("What?", "Hi."), 16_000)
    behind = int((inputs.tokens[0] == model.audio_token_id).nonzero()[-1]) + 1
    assert inputs.tokens[0, behind : behind + len(apart)].tolist() == apart


@each
def test_prepared_prompts_give_the_published_logits(published: type[Desta]) -> None:
    theirs, model = speaking(published, dtype=torch.float64)
    prompts = [model.prompt("What is said here?", " Hi."), model.prompt("What?", " She said it.")]
    inputs = model.prepare([noise(9_000), noise(20_000, 1)], prompts, 16_000)
    inputs = replace(inputs, features=inputs.features.double())
    with torch.no_grad(), model.attention("explicit"):
        ours = model(inputs)
    for row in range(2):
        one = inputs[row]
        kept = one.attended[0]
        tokens, place = one.tokens[:, kept], (one.tokens[0, kept] == model.audio_token_id).nonzero()
        with torch.no_grad():
            expected = theirs(
                tokens, torch.ones_like(tokens), one.features, [(0, int(place[0]))]
            ).logits
        assert torch.allclose(ours[row, kept], expected[0], atol=1e-5)  # padding shifts positions


@each
def test_writes_what_llama_writes(published: type[Desta]) -> None:
    theirs, model = speaking(published)
    inputs = model.prepare(noise(9_000), model.prompt("What is said here?", " Hi."), 16_000)
    place = int((inputs.tokens[0] == model.audio_token_id).nonzero()[0])
    with torch.no_grad():
        prompt = theirs.prompts(inputs.tokens, inputs.features, [(0, place)])
    expected = theirs.language.generate(
        inputs_embeds=prompt,
        attention_mask=torch.ones_like(inputs.tokens),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=tokenizer().pad_token_id,
    )
    ours = model.generate(inputs, max_new_tokens=12, return_type="tokens")
    assert ours[0, -expected.shape[1] :].tolist() == expected[0].tolist()


def test_other_audio_for_the_same_prompt() -> None:
    _, model = speaking(Desta25)
    inputs = model.prepare(noise(9_000), model.prompt("What?", "W."), 16_000)
    other = inputs.with_audio(noise(9_000, 1), 16_000)
    assert torch.equal(other.tokens, inputs.tokens) and other.text == inputs.text
    assert not torch.equal(other.features, inputs.features)
    again = inputs.with_text(model.prompt("What?", "Z."))
    assert (again.tokens != inputs.tokens).sum() == 1


def test_questions_need_transcripts() -> None:
    _, model = speaking(Desta2)
    with pytest.raises(InputError, match=r"model.prompt\(question, transcript\)"):
        model.prepare(noise(9_000), "What is said here?", 16_000)
    with pytest.raises(InputError, match=r"1 clip\(s\), with 0 transcript\(s\)"):
        model.prompt("What is said here?")
    both = model.prompt([{"role": "audio", "content": LOCATOR}] * 2, "one", "two")
    with pytest.raises(InputError, match="one clip per prompt, this one has 2"):
        model.prepare([[noise(9_000), noise(9_000)]], both, 16_000)


# -------------------------------------------------------------------------------- time


def timed(published: type[Desta]) -> tuple[HookedDesta, AudioInputs]:
    model = hooked(build(published))
    return model, model.as_inputs(batch(lengths=[173], words=[5]))


@each
def test_tokens_have_no_time(published: type[Desta]) -> None:
    model, inputs = timed(published)
    timeline = model.timeline(inputs)
    assert timeline.seconds("encoder")[:3].tolist() == pytest.approx([0.0, 0.02, 0.04])
    assert timeline.valid("encoder").sum() == 87
    assert timeline.seconds("connector").isnan().all() and timeline.valid("connector").all()
    assert timeline.seconds("decoder").isnan().all()
    assert timeline.audio_span == slice(1, 1 + QUERIES)
    assert timeline.text_span.tolist() == [0, *range(1 + QUERIES, inputs.tokens.shape[1])]


@each
@pytest.mark.parametrize("site", ["connector.out", "decoder.resid_pre"])
def test_asking_for_their_time_names_the_profile(published: type[Desta], site: str) -> None:
    model, inputs = timed(published)
    options = {"clean": inputs, "corrupted": inputs, "site": site, "windows": 0.5}
    with pytest.raises(ValueError, match=r"audio_lens\.analysis\.time_profile"):
        patching.sweep(model, axes="time", metric=lambda logits: logits[:, -1, 3], **options)
