"""Metrics of one of several streams, against its own logits."""

from __future__ import annotations

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from audio_lens import HookedAudioTransformer, metrics, patching
from audio_lens.inputs import InputError
from families import FAMILIES

SPEAKING = ("moshi", "musicgen", "kimi_audio")
LAST = {"moshi": "audio.3", "musicgen": "audio.2", "kimi_audio": "audio"}
UNPADDED = {"moshi": {"lengths": (9, 9)}, "musicgen": {}, "kimi_audio": {"padding": "left"}}
SITES = {"moshi": "decoder.attn.z", "musicgen": "decoder.resid_pre"}


def built(name: str) -> HookedAudioTransformer:
    family = FAMILIES[name]
    return family.hooked(family.build())


def given(name: str, seed: int = 0) -> dict[str, Tensor]:
    return FAMILIES[name].batch(seed=seed, **UNPADDED[name])


def streams_of(model: HookedAudioTransformer) -> list[str]:
    return [name for name, _ in model.cfg.streams]


@pytest.fixture(params=SPEAKING)
def speaking(request) -> tuple[str, HookedAudioTransformer]:
    return request.param, built(request.param)


@pytest.fixture
def moshi() -> HookedAudioTransformer:
    """Moshi with a tokenizer of one word per token."""
    model = built("moshi")
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, 100)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>"
    )
    return model


def at_end(logits: Tensor) -> Tensor:
    return logits[:, -1]


BY_HAND = {
    "logit_diff": (metrics.logit_diff(3, 5), lambda own: at_end(own)[:, 3] - at_end(own)[:, 5]),
    "one answer per row": (
        metrics.logit_diff([3, 4], 5),
        lambda own: at_end(own)[[0, 1], [3, 4]] - at_end(own)[:, 5],
    ),
    "log_prob": (metrics.log_prob(3), lambda own: at_end(own).log_softmax(-1)[:, 3]),
    "earlier": (metrics.prob(3, position=-2), lambda own: own[:, -2].softmax(-1)[:, 3]),
    "forced_choice": (
        metrics.forced_choice(3, [1, 3, 7]),
        lambda own: at_end(own)[:, [1, 3, 7]].log_softmax(-1)[:, 1],
    ),
    "read_at": (metrics.read_at(lambda x: x.logsumexp(-1)), lambda own: at_end(own).logsumexp(-1)),
}


@torch.no_grad()
@pytest.mark.parametrize("what", BY_HAND)
def test_metrics_read_the_stream_alone(speaking, what):
    name, model = speaking
    inputs = model.as_inputs(given(name))
    logits = model(inputs)
    metric, by_hand = BY_HAND[what]
    for stream in streams_of(model):
        measured = metrics.of_stream(stream, metric).bind(model, inputs)(logits)
        torch.testing.assert_close(measured, by_hand(model.stream(logits, stream)))


@torch.no_grad()
def test_kl_is_of_the_streams_own_distribution(speaking):
    name, model = speaking
    inputs = model.as_inputs(given(name))
    clean, logits = model(given(name, 1)), model(inputs)
    for stream in streams_of(model):
        p, q = (at_end(model.stream(x, stream)).softmax(-1) for x in (clean, logits))
        metric = metrics.of_stream(stream, metrics.kl())
        assert metric.needs_reference
        measured = metric.bind(model, inputs, reference=clean)(logits)
        torch.testing.assert_close(measured, (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_last_attended_position_is_read_in_padded_rows():
    model = built("moshi")
    inputs = model.as_inputs(FAMILIES["moshi"].batch(lengths=(9, 6)))
    logits = model(inputs)
    measured = metrics.of_stream("audio.1", metrics.log_prob(2)).bind(model, inputs)(logits)
    own = model.stream(logits, "audio.1").log_softmax(-1)
    torch.testing.assert_close(measured, own[[0, 1], [8, 5], 2])


@torch.no_grad()
def test_words_of_the_text_go_through_the_tokenizer(moshi):
    inputs = moshi.as_inputs(given("moshi"))
    logits = moshi(inputs)
    measured = metrics.of_stream("text", metrics.log_prob("w7")).bind(moshi, inputs)(logits)
    own = moshi.stream(logits, "text")[:, -1].log_softmax(-1)
    torch.testing.assert_close(measured, own[:, 7])
    choice = metrics.forced_choice(["w7", "w8"], ["w7", "w8", "w9"])
    measured = metrics.of_stream("text", choice).bind(moshi, inputs)(logits)
    torch.testing.assert_close(measured, own[:, 7:10].log_softmax(-1)[[0, 1], [0, 1]])


def test_words_of_other_streams_raise(moshi):
    inputs = moshi.as_inputs(given("moshi"))
    with pytest.raises(InputError, match=r"'w7' is a word, and audio\.0 writes none.* 0 to 15"):
        metrics.of_stream("audio.0", metrics.log_prob("w7")).bind(moshi, inputs)


def test_bare_metrics_say_what_to_write(speaking):
    name, model = speaking
    first = streams_of(model)[0]
    with pytest.raises(InputError, match=rf"several streams .*of_stream\('{first}', metric\)"):
        metrics.log_prob(3).bind(model, given(name))


def test_streams_and_tokens_that_are_not_there_raise(speaking):
    name, model = speaking
    inputs = model.as_inputs(given(name))
    with pytest.raises(InputError, match=r"writes no stream 'audi.0'; .*audio"):
        metrics.of_stream("audi.0", metrics.log_prob(3)).bind(model, inputs)
    for stream, width in model.cfg.streams:
        for token in (-1, width, model.cfg.output.d_vocab + 5):
            with pytest.raises(InputError, match=f"{stream} has {width} tokens, so none is"):
                metrics.of_stream(stream, metrics.log_prob(token)).bind(model, inputs)


def test_transcripts_and_sequences_raise(speaking):
    name, model = speaking
    stream = streams_of(model)[-1]
    with pytest.raises(InputError, match="score one token at a time"):
        metrics.of_stream(stream, metrics.sequence_log_prob([3, 4])).bind(model, given(name))
    with pytest.raises(InputError, match="transcripts are scored by CTC models"):
        metrics.of_stream(stream, metrics.ctc_log_prob([3])).bind(model, given(name))


def test_a_model_of_one_stream_has_none_to_name():
    model = built("whisper")
    batch = FAMILIES["whisper"].batch()
    with pytest.raises(InputError, match="no stream 'text'; it writes a single one"):
        metrics.of_stream("text", metrics.log_prob(3)).bind(model, batch)


@pytest.mark.parametrize("metric", [len, metrics.of_stream("text", metrics.kl())])
def test_what_is_no_metric_of_one_stream_raises(metric):
    with pytest.raises(TypeError, match="of_stream"):
        metrics.of_stream("text", metric)


@torch.no_grad()
@pytest.mark.parametrize("name", SITES)
def test_a_sweep_measures_several_streams(name):
    model = built(name)
    clean, corrupted = given(name), given(name, 1)
    if name == "musicgen":  # the same text and padding
        corrupted = clean | {"decoder_input_ids": corrupted["decoder_input_ids"]}
    asked = {s: metrics.of_stream(s, metrics.logit_diff(3, 5)) for s in streams_of(model)}
    asked["distance"] = metrics.of_stream(LAST[name], metrics.kl())
    result = patching.sweep(
        model,
        clean=clean,
        corrupted=corrupted,
        site=SITES[name],
        axes=("layer",),
        metric=asked,
        verify=2,
    )
    assert list(result.coords["metric"]) == list(asked)
    logits = model(clean)
    for stream in streams_of(model):
        own = at_end(model.stream(logits, stream))
        wanted = own[:, 3] - own[:, 5]
        found = result.select(metric=stream).clean
        torch.testing.assert_close(torch.as_tensor(found).float(), wanted)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["decoder.attn.z", "depth.attn.z", "attribute"])
def test_both_baselines_are_read_with_their_own_next_tokens(site, direction):
    """Each run by the text and codes that follow in its own inputs, which here all differ."""
    model = built("moshi")
    runs = {"clean": given("moshi"), "corrupted": given("moshi", 1)}
    streams = [s for s in streams_of(model) if s != "text" or not site.startswith("depth")]
    asked = {s: metrics.of_stream(s, metrics.logit_diff(3, 5, position=-3)) for s in streams}
    asked["distance"] = metrics.of_stream("audio.2", metrics.kl(position=-3))
    options = {"metric": asked, "axes": "layer", "direction": direction, **runs}
    if site == "attribute":
        method = "ig" if direction == "noise" else "atp"  # KL is flat at the clean run
        result = patching.attribute(model, site="decoder.attn.z", method=method, **options)
    else:
        result = patching.sweep(model, site=site, **options)
    logits = {run: model(inputs) for run, inputs in runs.items()}
    for run, found in (("clean", result.clean), ("corrupted", result.corrupted)):
        for stream, measured in zip(streams, found, strict=False):
            own = model.stream(logits[run], stream)[:, -3]
            torch.testing.assert_close(measured, own[:, 3] - own[:, 5], rtol=1e-4, atol=1e-6)
    p, q = (model.stream(logits[run], "audio.2")[:, -3].softmax(-1) for run in runs)
    assert result.clean[-1].abs().max() < 1e-6
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(result.corrupted[-1], expected, rtol=1e-3, atol=1e-6)
