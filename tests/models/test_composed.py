"""Audio LLMs put together from parts: what they compute, their times, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from einops import rearrange
from torch import Tensor, nn

from audio_lens import HookedAudioTransformer, metrics, patching
from audio_lens.inputs import InputError
from audio_lens.models.compose.assemble import Placeholder
from audio_lens.models.compose.model import CompositionError, HookedComposed
from audio_lens.models.config import LoadingError
from audio_lens.models.embedded import default_pair
from audio_lens.models.parts.connectors import Connector, ConnectorConfig, StackingConnector
from families import FAMILIES
from families.base import TINY_LANGUAGE_MODEL, randomise
from generation import N_NEW, new_tokens, quiet, settings_for, talkative, with_settings

AUDIO_TOKEN = 90
D_EAR, D_LM, N_CTX = 32, 48, 110
RATE = 16_000


def whisper(**options: Any) -> nn.Module:
    return FAMILIES["whisper"].build(max_source_positions=N_CTX, **options)


def language_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.Qwen2Config(**TINY_LANGUAGE_MODEL)
    config._attn_implementation = "eager"
    return randomise(transformers.Qwen2ForCausalLM(config)).to(dtype)


class Stacked(Connector):
    """Four frames side by side through a plain module, as users write it."""

    def __init__(self, d_in: int = D_EAR):
        super().__init__(frames_per_token=4)
        self.mlp = nn.Sequential(nn.Linear(4 * d_in, 24), nn.GELU(), nn.Linear(24, D_LM))

    def carry(self, x: Tensor) -> Tensor:
        whole = x[:, : x.shape[1] // 4 * 4]
        return self.mlp(rearrange(whole, "b (t k) d -> b t (k d)", k=4))


class Tapped(Connector):
    """The sum of two blocks' streams."""

    taps = (0, 1)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D_EAR, D_LM), nn.Linear(D_EAR, D_LM)

    def carry(self, early: Tensor, late: Tensor) -> Tensor:
        return self.first(early) + self.second(late)


class Beside(Connector):
    """What two ears heard, as far as both go."""

    def __init__(self, d_first: int, d_second: int):
        super().__init__()
        self.linear = nn.Linear(d_first + d_second, D_LM)

    def carry(self, first: Tensor, second: Tensor) -> Tensor:
        missing = first.shape[1] - second.shape[1]
        second = nn.functional.pad(second, (0, 0, 0, max(0, missing)))[:, : first.shape[1]]
        return self.linear(torch.cat([first, second], dim=-1))


def composed(connector: Connector | None = None, **options: Any) -> HookedComposed:
    connector = randomise(Stacked() if connector is None else connector)
    options = {"merge": AUDIO_TOKEN, **options}
    return HookedAudioTransformer.compose(whisper(), connector, language_model(), **options)


def mapping(seed: int = 0, **further: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(2, 20, 2 * N_CTX, generator=generator),
        "input_ids": torch.tensor([[5, AUDIO_TOKEN, 7, 8, 9], [6, AUDIO_TOKEN, 9, 8, 7]]),
        **further,
    }


def tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<start>", "<end>", "<unk>", "user", "answer", "what", "is", "said", "?"]
    words += [f"w{i}" for i in range(len(words), 100)]
    ids = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", **options
    )


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).normal(0, 0.1, round(RATE * seconds))
    return samples.astype(np.float32)


# -------------------------------------------------------------------------------- what it computes


@torch.no_grad()
@pytest.mark.parametrize("merge", [AUDIO_TOKEN, -200], ids=["a token", "outside the vocabulary"])
def test_the_output_is_that_of_the_parts(merge: int) -> None:
    ear, connector, decoder = whisper(), randomise(Stacked()), language_model()
    batch = mapping()
    frames = ear.model.encoder(batch["input_features"]).last_hidden_state
    audio = connector.mlp(rearrange(frames[:, :108], "b (t k) d -> b t (k d)", k=4))
    words = decoder.model.embed_tokens(batch["input_ids"])
    expected = decoder(inputs_embeds=torch.cat([words[:, :1], audio, words[:, 2:]], dim=1)).logits
    model = HookedAudioTransformer.compose(ear, connector, decoder, merge)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == AUDIO_TOKEN, merge)
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4)


def test_parts_are_read_from_disk(tmp_path: Path) -> None:
    whisper().save_pretrained(tmp_path / "ear")
    language_model().save_pretrained(tmp_path / "writer")
    tokenizer().save_pretrained(tmp_path / "writer")
    connector = randomise(Stacked())
    expected = composed(connector)(mapping())
    model = HookedAudioTransformer.compose(
        tmp_path / "ear", connector, str(tmp_path / "writer"), AUDIO_TOKEN, name="mine"
    )
    torch.testing.assert_close(model(mapping()), expected)
    assert model.tokenizer.decode([6]) == "what"
    assert model.cfg.family == "mine"
    assert not hasattr(model.ear, "decoder")


@torch.no_grad()
def test_a_connector_may_read_several_blocks() -> None:
    ear, connector = whisper(), randomise(Tapped())
    states = ear.model.encoder(mapping()["input_features"], output_hidden_states=True).hidden_states
    model = HookedAudioTransformer.compose(ear, connector, language_model(), AUDIO_TOKEN)
    _, cache = model.run_with_cache(mapping())
    expected = connector.first(states[1]) + connector.second(states[2])
    torch.testing.assert_close(cache["connector.hook_out"], expected, rtol=1e-4, atol=1e-5)
    assert model.cfg.encoder.n_layers == 2
    with pytest.raises(InputError, match="start at encoder layer 0 or before"):
        model(torch.zeros(2, N_CTX, D_EAR), inputs=mapping(), start_at_layer="encoder.1")


def two_ears() -> HookedComposed:
    second = FAMILIES["wav2vec2"].build()
    connector = randomise(Beside(D_EAR, second.config.hidden_size))
    ears = {"encoder": whisper(), "second": second}
    return HookedAudioTransformer.compose(ears, connector, language_model(), AUDIO_TOKEN)


def heard_twice(seed: int = 0) -> dict[str, Tensor]:
    waves = torch.randn(2, 8000, generator=torch.Generator().manual_seed(seed))
    return mapping(seed, second=waves)


@torch.no_grad()
def test_two_ears_hear_beside_each_other() -> None:
    model = two_ears()
    alone = FAMILIES["wav2vec2"].build()(heard_twice()["second"]).last_hidden_state
    _, cache = model.run_with_cache(heard_twice())
    torch.testing.assert_close(cache["second.hook_out"], alone, rtol=1e-4, atol=1e-4)
    assert list(model.cfg.parts) == ["encoder", "second", "decoder"]
    assert model.part("second").inputs(heard_twice()).shape == alone.shape[:2]
    seconds = model.timeline(heard_twice()).seconds("second")
    torch.testing.assert_close(seconds.diff(), torch.full_like(seconds[1:], 0.02))


@torch.no_grad()
def test_what_the_second_ear_hears_counts() -> None:
    model, batch = two_ears(), heard_twice()
    before = model(batch)
    again = model(batch, encoder_out=model.encode(model.as_inputs(batch)))
    torch.testing.assert_close(again, before)
    silent = model.run_with_hooks(
        batch, fwd_hooks=[("second.blocks.1.attn.hook_z", lambda z, hook: 0 * z)]
    )
    assert (silent - before).abs().max() > 1e-3
    with pytest.raises(InputError, match="no features for second"):
        model(mapping())


@torch.no_grad()
def test_a_connector_with_taps_hears_further_ears_too() -> None:
    second = FAMILIES["wav2vec2"].build()

    class Both(Tapped):
        def __init__(self):
            super().__init__()
            self.third = nn.Linear(second.config.hidden_size, D_LM)

        def carry(self, early: Tensor, late: Tensor, other: Tensor) -> Tensor:
            return super().carry(early, late) + self.third(other).mean(1, keepdim=True)

    connector = randomise(Both())
    ears = {"encoder": whisper(), "second": second}
    model = HookedAudioTransformer.compose(ears, connector, language_model(), AUDIO_TOKEN)
    silence = {**heard_twice(), "second": torch.zeros(2, 8000)}
    assert (model(heard_twice()) - model(silence)).abs().max() > 1e-3


@torch.no_grad()
def test_the_embedded_model_put_together_from_its_own_parts(
    embedded: HookedAudioTransformer,
) -> None:
    pair = default_pair()
    template = embedded.templated([{"role": "user", "content": "{audio}\n{question}"}])
    model = HookedAudioTransformer.compose(
        encoder=embedded,
        connector=embedded.connector,
        decoder=embedded.decoder,
        merge=embedded.placeholder,
        tokenizer=embedded.tokenizer,
        template=template.replace("{audio}", "Audio 1: <|audio_bos|>{audio}<|audio_eos|>"),
    )
    ours, theirs = (m.prepare(pair.clean, pair.question) for m in (model, embedded))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(model(ours), embedded(theirs))
    assert model.timeline(ours).corresponds_to(embedded.timeline(theirs))
    assert model.generate(ours) == embedded.generate(theirs)


# -------------------------------------------------------------------------------- sweeps

SITES = {
    "one ear": (composed, mapping, ["encoder.attn.z", "connector.in", "connector.out"]),
    "taps": (lambda: composed(Tapped()), mapping, ["encoder.mlp_out", "connector.in"]),
    "two ears": (two_ears, heard_twice, ["encoder.resid_pre", "second.attn.z", "connector.out"]),
}


@pytest.mark.parametrize("kind", SITES)
def test_sweeps_equal_whole_forwards(kind: str) -> None:
    make, batch, sites = SITES[kind]
    model = make()
    for site in [*sites, "decoder.attn.z"]:
        axes = ("time",) if site.startswith("connector") else ("layer", "time")
        result = patching.sweep(
            model,
            clean=batch(0),
            corrupted={**batch(1), "input_ids": batch(0)["input_ids"]},
            site=site,
            axes=axes,
            windows=0.3,
            metric=metrics.logit_diff(5, 6),
            verify=2,
        )
        assert (result.values - result.corrupted.reshape(-1, *[1] * len(axes))).abs().max() > 1e-4


def test_attribution_goes_through_both_ears() -> None:
    """For a small difference in what the second ear hears, it equals the sweep."""
    model, clean = two_ears().double(), heard_twice()
    clean = {k: x.double() if x.is_floating_point() else x for k, x in clean.items()}
    louder = {**clean, "second": clean["second"] + 1e-2 * heard_twice(1)["second"].double()}
    options = {
        "clean": louder,
        "corrupted": clean,
        "site": "second.resid_pre",
        "axes": ("layer", "time"),
        "windows": 0.1,
        "metric": metrics.logit_diff(5, 6),
    }
    swept, estimate = patching.sweep(model, **options), patching.attribute(model, **options)
    exact, linear = (x.values - x.corrupted[:, None, None] for x in (swept, estimate))
    assert exact.abs().max() > 1e-3
    assert (linear - exact).abs().max() < 0.05 * exact.abs().max()


# -------------------------------------------------------------------------------- prompts and time


def test_time_follows_from_the_ear_and_the_connector() -> None:
    model = composed(tokenizer=tokenizer(), template="user {audio} {question} answer")
    inputs = model.prepare(noise(1.23), "what is said ?", sampling_rate=RATE)
    timeline = model.timeline(inputs)
    n_frames = (123 - 1) // 2 + 1
    expected = 0.08 * torch.arange(n_frames // 4, dtype=torch.float64) + 0.03
    torch.testing.assert_close(timeline.seconds("decoder")[timeline.audio_span], expected)
    torch.testing.assert_close(timeline.seconds("connector")[: len(expected)], expected)
    text = model.tokenizer.decode(inputs.tokens[0][timeline.text_span])
    assert text == "user what is said ? answer"


def test_padding_becomes_tokens_where_it_is_kept() -> None:
    options = {"tokenizer": tokenizer(), "template": "{audio} {question}"}
    model = composed(keeps_padding=True, **options)
    inputs = model.prepare(noise(1.0), "what ?", sampling_rate=RATE)
    timeline = model.timeline(inputs)
    assert (inputs.tokens == AUDIO_TOKEN).sum() == N_CTX // 4
    assert timeline.valid("connector").sum() == 12  # the thirteenth is centred behind 1 s


def test_clips_may_take_several_windows() -> None:
    options = {"tokenizer": tokenizer(), "template": "{audio} {question}"}
    model = composed(max_segments=3, **options)
    inputs = model.prepare(noise(5.0), "what ?", sampling_rate=RATE)
    seconds = model.timeline(inputs).seconds("decoder")
    heard = seconds[seconds.isfinite()]
    assert inputs.segments_per_clip == (3,)
    assert (heard.diff() > 0).all()
    assert heard[27].item() == pytest.approx(2.2 + 0.03)


def test_chat_templates_begin_the_text_themselves() -> None:
    template = "{{ bos_token }} user {% for m in messages %}{{ m['content'] }} {% endfor %}answer"
    words = tokenizer(bos_token="<start>", chat_template=template)
    model = composed(tokenizer=words)
    inputs = model.prepare([[noise(0.5), noise(0.4)]], "what ?", sampling_rate=RATE)
    kept = inputs.tokens[0][model.timeline(inputs).text_span].tolist()
    assert kept == [1, 4, 6, 9, 5]
    assert inputs.clips_per_row == (2,)


def test_a_placeholder_outside_the_vocabulary_is_found_in_the_text() -> None:
    merge = Placeholder("<speech>", -200)
    model = composed(merge=merge, tokenizer=tokenizer(), template="user {audio} {question}")
    inputs = model.prepare(noise(0.5), "user <speech> what", sampling_rate=RATE)
    assert (inputs.tokens == -200).sum() == 6
    tokens = model.generate(inputs, max_new_tokens=3, return_type="tokens")
    assert tokens.shape[1] == inputs.tokens.shape[1] + 3


@torch.no_grad()
def test_generation_equals_repeated_forwards() -> None:
    model = composed()
    tokens = model.generate(mapping(), max_new_tokens=4, return_type="tokens")
    inputs = model.as_inputs(mapping())
    for step in range(4):
        n_prompt = inputs.tokens.shape[1]
        longer = {**mapping(), "input_ids": tokens[:, : n_prompt + step]}
        expected = model(longer)[:, -1].argmax(-1)
        assert torch.equal(tokens[:, n_prompt + step], expected)


# -------------------------------------------------------------------------------- what does not fit


def test_parts_that_do_not_fit_raise() -> None:
    ear, decoder = whisper(), language_model()
    put = HookedAudioTransformer.compose
    with pytest.raises(CompositionError, match=r"subclass .*Connector and define carry"):
        put(ear, nn.Linear(D_EAR, D_LM), decoder)
    with pytest.raises(CompositionError, match=r"cannot take \(1, 110, 32\)"):
        put(ear, Stacked(d_in=16), decoder)
    narrow = StackingConnector(ConnectorConfig(8, "relu", n_stacked=5), D_EAR, 40)
    with pytest.raises(CompositionError, match=r"makes \(1, 22, 40\), .* say \(1, 22, 48\)"):
        put(ear, narrow, decoder)
    with pytest.raises(CompositionError, match=r"several dtypes .*decoder torch.float64"):
        put(ear, Stacked(), language_model(torch.float64))
    with pytest.raises(CompositionError, match=r"must hold \{audio\} and \{question\}"):
        put(ear, Stacked(), decoder, template="{audio} what?")
    with pytest.raises(CompositionError, match="the encoder of qwen3_asr cannot be taken out"):
        put(FAMILIES["qwen3_asr"].build(), Stacked(), decoder)
    with pytest.raises(CompositionError, match="windows for several ears: max_segments=1"):
        put({"encoder": ear, "other": whisper()}, Stacked(), decoder, max_segments=2)
    with pytest.raises(CompositionError, match="cannot be named decoder"):
        put({"encoder": ear, "decoder": whisper()}, Stacked(), decoder)
    back = Tapped()
    back.taps = (1, 0)
    with pytest.raises(CompositionError, match=r"in rising order: \(1, 0\)"):
        put(ear, back, decoder)
    far = Tapped()
    far.taps = (1, 7)
    with pytest.raises(CompositionError, match="reads blocks 1, 7 of an encoder with 3 blocks"):
        put(ear, far, decoder)


def test_what_is_no_language_model_raises() -> None:
    with pytest.raises(LoadingError, match="not a Linear"):
        HookedAudioTransformer.compose(whisper(), Stacked(), nn.Linear(2, 2))
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=48))
    with pytest.raises(LoadingError, match="the language model is a 'gpt2'; implemented: llama"):
        HookedAudioTransformer.compose(whisper(), Stacked(), gpt)


def test_a_question_without_any_template_raises() -> None:
    model = composed(tokenizer=tokenizer())
    with pytest.raises(InputError, match="no chat template: pass template= to compose"):
        model.prepare(noise(0.5), "what ?", sampling_rate=RATE)


# -------------------------------------------------------------------------------- settings


@torch.no_grad()
def test_settings_act_as_on_prompts_that_are_embedded() -> None:
    """As where research models call `generate(inputs_embeds=...)`: they see new tokens alone."""
    model, language = composed(), talkative(language_model())
    model.decoder.token_embed.weight = language.get_input_embeddings().weight
    prompts = model.run_with_cache(mapping(), names_filter="decoder.hook_embed")[1]
    given = {"inputs_embeds": prompts["decoder.hook_embed"], "do_sample": False}
    plain = quiet(language.generate, **given, max_new_tokens=N_NEW)
    for name, settings in settings_for(plain).items():
        model.generation_config = with_settings(language, **settings).generation_config
        ours = new_tokens(model, mapping(), max_new_tokens=N_NEW)
        expected = quiet(language.generate, **given, max_new_tokens=N_NEW)
        assert torch.equal(ours, expected), name
