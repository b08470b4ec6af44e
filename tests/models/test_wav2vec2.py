"""Self-supervised encoders: their heads, losses, transcripts and frames, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from audio_lens import AudioInputs, HookedAudioTransformer, InputError, LoadingError, TokenError
from families.wav2vec2 import CLASSES, CTC, N_LABELS, PRE_NORM, TINY, batch, body_of, build

RATE = 16_000
LETTERS = "|ABCDEFGHIJKLMNO"  # with <pad>, <s>, </s> and <unk>: 20 labels


def taken(family: str = "Wav2Vec2", **options: Any) -> tuple[Any, HookedAudioTransformer]:
    """A Hugging Face model and ours with its weights."""
    hf = build(family, **options)
    return hf, HookedAudioTransformer.from_hf(hf)


def noise(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [(0.1 * generator.standard_normal(length)).astype(np.float32) for length in lengths]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> transformers.Wav2Vec2CTCTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.json"
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *LETTERS]
    path.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    return transformers.Wav2Vec2CTCTokenizer(str(path))


@pytest.fixture(scope="module")
def speaking(tokenizer: transformers.Wav2Vec2CTCTokenizer) -> HookedAudioTransformer:
    """A CTC model with a tokenizer."""
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    processor = transformers.Wav2Vec2Processor(extractor, tokenizer)
    return HookedAudioTransformer.from_hf(build("Wav2Vec2", **PRE_NORM, **CTC), processor)


# -------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss(reduction: str, zero_infinity: bool) -> None:
    options = {"ctc_loss_reduction": reduction, "ctc_zero_infinity": zero_infinity}
    hf, model = taken(**PRE_NORM, **CTC, **options)
    labels = torch.tensor([[3, 4, 4, 5, 6], [7, 8, -100, -100, -100]])
    given = {**batch(), "labels": labels}
    with torch.no_grad():
        assert model(given, return_type="loss").item() == pytest.approx(hf(**given).loss.item())
        impossible = {**given, "labels": torch.full((2, 30), 3)}  # more labels than frames
        theirs, ours = hf(**impossible).loss, model(impossible, return_type="loss")
    assert ours.isfinite() == zero_infinity
    assert ours == theirs


def test_blank_in_labels_is_padding() -> None:
    hf, model = taken(**PRE_NORM, **CTC)
    given = {**batch(), "labels": torch.tensor([[3, 4, 0, 0], [7, 8, 9, 0]])}
    with torch.no_grad():
        assert model(given, return_type="loss").item() == pytest.approx(hf(**given).loss.item())


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert", "WavLM"])
def test_loss_of_classes(family: str) -> None:
    hf, model = taken(family, **CLASSES)
    given = {**batch(), "labels": torch.tensor([2, 6])}
    with torch.no_grad():
        theirs, (logits, ours) = hf(**given), model(given, return_type="both")
    assert logits.shape == (2, 7)
    assert ours.item() == pytest.approx(theirs.loss.item())


def test_losses_that_do_not_exist() -> None:
    _, bare = taken()
    with pytest.raises(InputError, match="bare encoder has no loss"):
        bare(batch(), return_type="loss")
    _, ctc = taken(**CTC)
    with pytest.raises(InputError, match=r"prepare\(audio, text="):
        ctc(batch(), return_type="loss")
    with pytest.raises(InputError, match="no token 20"):
        ctc({**batch(), "labels": torch.tensor([[20], [3]])})


# -------------------------------------------------------------------------------- what is written


def test_best_path_leaves_out_repeats_and_blanks() -> None:
    _, model = taken(**PRE_NORM, **CTC)
    path = torch.tensor([[0, 4, 4, 0, 4, 5, 5, 0], [3, 3, 0, 0, 9, 9, 9, 9]])
    logits = torch.nn.functional.one_hot(path, N_LABELS).float()
    attended = torch.arange(8) < torch.tensor([[8], [4]])
    assert model.cfg.ctc.best_path(logits, attended) == [[4, 4, 5], [3]]


def test_transcripts_are_those_of_the_processor(speaking: HookedAudioTransformer) -> None:
    inputs = speaking.prepare(noise(9000, 7000), sampling_rate=RATE)
    written = speaking.generate(inputs)
    assert any(written)
    for row, text in enumerate(written):
        alone = speaking.prepare(inputs.audio[row], sampling_rate=RATE)
        assert text == speaking.tokenizer.decode(speaking(alone).argmax(-1)[0])
    tokens = speaking.generate(inputs, return_type="tokens")
    assert [speaking.tokenizer.decode(row, group_tokens=False) for row in tokens] == written


def test_double_letters_are_kept(speaking: HookedAudioTransformer) -> None:
    inputs = speaking.prepare(noise(4000), sampling_rate=RATE)
    path = torch.tensor([[5, 9, 9, 0, 9, 4, 0, 0, 0, 0, 0, 0]])

    def say(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.nn.functional.one_hot(path[:, : logits.shape[1]], N_LABELS).float()

    with speaking.hooks(fwd_hooks=[("hook_logits", say)]):
        assert speaking.generate(inputs) == ["AEE"]


def test_classes_are_named() -> None:
    names = {i: name for i, name in enumerate("abcdefg")}
    hf, model = taken("Hubert", **CLASSES, id2label=names)
    inputs = model.as_inputs(batch())
    best = hf(**batch()).logits.argmax(-1)
    assert model.generate(inputs) == [names[i] for i in best.tolist()]
    assert torch.equal(model.generate(inputs, return_type="tokens")[:, 0], best)
    assert model.to_single_token("c") == 2
    labelled = model.prepare(noise(5000, 5000), text=["c", "g"], sampling_rate=RATE)
    assert labelled.labels.tolist() == [[2], [6]]
    with pytest.raises(TokenError, match="no class 'z'"):
        model.prepare(noise(5000), text="z", sampling_rate=RATE)


def test_what_cannot_be_written(speaking: HookedAudioTransformer) -> None:
    _, bare = taken()
    with pytest.raises(InputError, match="writes nothing"):
        bare.generate(batch())
    with pytest.raises(InputError, match="takes no text"):
        bare.prepare(noise(4000), text="A", sampling_rate=RATE)
    _, ctc = taken(**PRE_NORM, **CTC)
    with pytest.raises(TokenError, match="tokenizer"):
        ctc.generate(batch())
    with pytest.raises(InputError, match="max_new_tokens"):
        speaking.generate(speaking.as_inputs(batch()), max_new_tokens=3)
    with pytest.raises(InputError, match="no audio"):
        speaking.prepare([], sampling_rate=RATE)


def test_transcripts_become_labels(speaking: HookedAudioTransformer) -> None:
    inputs = speaking.prepare(noise(9000, 7000), text=["AB C", "D"], sampling_rate=RATE)
    assert inputs.labels.tolist() == [[5, 6, 4, 7], [8, -100, -100, -100]]
    assert torch.equal(inputs[1].labels, inputs.labels[1:])
    changed = inputs.with_text(["BA C", "E"])
    assert changed.labels[1, 0] == 9
    with pytest.raises(TokenError, match="cannot write all of 'ab'"):
        speaking.prepare(noise(9000), text="ab", sampling_rate=RATE)
    with pytest.raises(InputError, match="2 clips need as many texts"):
        speaking.prepare(noise(9000, 7000), text=["A"], sampling_rate=RATE)


# -------------------------------------------------------------------------------- batches


def test_layer_norm_stems_take_unequal_clips() -> None:
    _, model = taken(**PRE_NORM, **CTC)
    clips = noise(9001, 7000)
    together = model.prepare(clips, sampling_rate=RATE)
    assert together.feature_mask.sum(-1).tolist() == [9001, 7000]
    for row, clip in enumerate(clips):
        alone = model(model.prepare(clip, sampling_rate=RATE))
        held = model(together)[row, : alone.shape[1]]
        assert torch.allclose(alone[0], held, atol=1e-4)


def test_group_norm_stems_do_not() -> None:
    _, model = taken(**CTC)
    with pytest.raises(InputError, match="batches of one, or cut or pad the clips"):
        model.prepare(noise(9001, 7000), sampling_rate=RATE)
    inputs = model.prepare(noise(7000, 7000), sampling_rate=RATE)
    assert inputs.feature_mask is None
    extractor = transformers.Wav2Vec2FeatureExtractor()
    made = extractor(inputs.audio, sampling_rate=RATE, return_tensors="pt")
    assert torch.allclose(made["input_values"], inputs.features)


def test_a_feature_extractor_is_made_as_the_stem_needs_it() -> None:
    assert taken()[1].feature_extractor.return_attention_mask is False
    assert taken(**PRE_NORM)[1].feature_extractor.return_attention_mask is True


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"input_values": torch.randn(1, 399)}, "at least 400 samples"),
        ({"input_values": torch.randn(4000)}, "waveforms"),
        ({"input_features": torch.randn(1, 4000)}, "unknown input_features"),
        (
            {
                "input_values": torch.randn(1, 800),
                "attention_mask": torch.arange(800)[None] > 100,
            },
            "padding last",
        ),
        (
            {
                "input_values": torch.randn(2, 800),
                "attention_mask": torch.arange(800) < torch.tensor([[800], [300]]),
            },
            "every clip needs at least 400",
        ),
    ],
)
def test_unusable_inputs(mapping: dict[str, Any], message: str) -> None:
    _, model = taken(**PRE_NORM)
    with pytest.raises(InputError, match=message):
        model(mapping)


def test_clips_that_are_too_short() -> None:
    _, model = taken(**PRE_NORM)
    with pytest.raises(InputError, match=r"400 samples \(25 ms\)"):
        model.prepare(noise(4000, 399), sampling_rate=RATE)


# -------------------------------------------------------------------------------- frames


def test_frames_are_counted_as_transformers_counts_them() -> None:
    hf, model = taken(**PRE_NORM)
    lengths = [*range(400, 2100), 15_999, 16_000, 16_001, 39_999, 480_000]
    theirs = hf._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
    assert [model.cfg.stem.n_frames(n) for n in lengths] == theirs
    assert theirs == [(n - 400) // 320 + 1 for n in lengths]
    assert model.cfg.stem.n_frames(399) == 0


def test_frames_lie_where_the_strides_put_them() -> None:
    _, model = taken(**PRE_NORM)
    inputs = model.prepare(noise(9001, 7000), sampling_rate=RATE)
    timeline = model.timeline(inputs)
    seconds = timeline[0].seconds("encoder")
    assert torch.allclose(seconds, 0.02 * torch.arange(27).double() + 0.01246875)
    assert timeline[1].valid("encoder").sum() == (7000 - 400) // 320 + 1
    assert timeline[0].duration_s() == 9001 / RATE
    strides = {"conv_dim": (8, 8), "conv_kernel": (30, 4), "conv_stride": (20, 3)}
    _, other = taken(**PRE_NORM | strides)
    assert (other.cfg.stem.stride, other.cfg.stem.reach) == (60, 90)
    inputs = other.prepare(noise(1000), sampling_rate=RATE)
    assert other.timeline(inputs).seconds("encoder")[1] * RATE == 60 + 89 / 2


def test_hidden_states_are_where_the_table_says() -> None:
    """`hs[l]` is what block l reads; the last is taken before a final norm."""
    for options, last in ((PRE_NORM, "hook_resid_post"), ({}, "hook_normalized_resid_post")):
        hf, model = taken("Hubert", **options)
        states = hf(**batch(), output_hidden_states=True).hidden_states
        _, cache = model.run_with_cache(batch())
        for layer, state in enumerate(states[:-1]):
            ours = cache[f"encoder.blocks.{layer}.hook_resid_pre"]
            assert torch.allclose(ours, state, atol=1e-4)
        assert torch.allclose(cache[f"encoder.blocks.2.{last}"], states[-1], atol=1e-4)


# -------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert", "WavLM", "UniSpeechSat"])
def test_weight_norms_of_older_checkpoints(family: str, tmp_path: Path) -> None:
    hf, model = taken(family, **CTC)
    hf.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    new = "conv.parametrizations.weight.original"
    names = {f"{new}0": "conv.weight_g", f"{new}1": "conv.weight_v"}
    state = {}
    for key, tensor in load_file(path).items():
        for theirs, older in names.items():
            key = key.replace(theirs, older)
        state[key] = tensor
    assert any(key.endswith("conv.weight_g") for key in state)
    save_file(state, path, metadata={"format": "pt"})
    loaded = HookedAudioTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(batch()), model(batch()))
    kernel = loaded.encoder.positions.convs[0].weight
    assert torch.equal(kernel, body_of(hf).encoder.pos_conv_embed.conv.weight)


@pytest.mark.parametrize("family", ["Wav2Vec2", "UniSpeech", "UniSpeechSat"])
def test_pretraining_checkpoints_are_bare_encoders(family: str, tmp_path: Path) -> None:
    hf, _ = taken(family, head="ForPreTraining")
    hf.save_pretrained(tmp_path)
    model = HookedAudioTransformer.from_pretrained(tmp_path)
    assert model.cfg.output_kind is None
    assert "hook_logits" not in model.hook_dict
    with torch.no_grad():
        theirs = body_of(hf)(**batch()).last_hidden_state
        assert torch.allclose(model(batch()), theirs, atol=1e-4)


@pytest.mark.parametrize(
    "family, options, feature",
    [
        ("Wav2Vec2", {"add_adapter": True}, "add_adapter=True"),
        ("Wav2Vec2", CLASSES | {"use_weighted_layer_sum": True}, "use_weighted_layer_sum"),
        ("Wav2Vec2", CTC | {"ctc_loss_reduction": "none"}, "ctc_loss_reduction"),
        ("Wav2Vec2", {"head": "ForXVector"}, "Wav2Vec2ForXVector"),
        ("WavLM", {"head": "ForAudioFrameClassification"}, "WavLMForAudioFrameClassification"),
    ],
)
def test_what_is_not_implemented_is_named(
    family: str, options: dict, feature: str, tmp_path: Path
) -> None:
    hf = build(family, **options)
    with pytest.raises(LoadingError, match=feature):
        HookedAudioTransformer.from_hf(hf)
    hf.save_pretrained(tmp_path)
    with pytest.raises(LoadingError, match=feature):
        HookedAudioTransformer.from_pretrained(tmp_path)


FOREIGN = {  # of other classes of the kind, each with a value that would matter there
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "feat_proj_layer_norm": False,
    "conv_pos_kernel_size": 5,
    "conv_pos_batch_norm": True,
    "num_buckets": 8,
    "max_bucket_distance": 4,
    "adapter_attn_dim": 6,
}
KINDS = ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "Data2VecAudio")


@pytest.mark.parametrize("norms", [{}, PRE_NORM], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("family", KINDS)
def test_switches_of_other_classes_are_read_as_hugging_face_reads_them(
    family: str, norms: dict
) -> None:
    """Most are ignored; adapters are built by all but WavLM and data2vec if blocks are pre-norm."""
    own = vars(getattr(transformers, f"{family}Config")())
    foreign = {name: value for name, value in FOREIGN.items() if name not in own}
    hf, model = taken(family, **{**norms, **foreign})
    assert all(getattr(hf.config, name) == value for name, value in foreign.items())
    with torch.no_grad():
        assert torch.allclose(model(batch()), hf(**batch()).last_hidden_state, atol=1e-4)


def test_switches_of_later_versions_are_named() -> None:
    class Later(transformers.Wav2Vec2Config):
        def __init__(self, rotary: bool = False, **options: Any):
            super().__init__(**options)
            self.rotary = rotary

    family = type(taken()[1])
    assert family.config_from_hf(Later(**TINY)).output_kind is None
    with pytest.raises(LoadingError, match="rotary=True is not implemented"):
        family.config_from_hf(Later(rotary=True, **TINY))


def test_a_bare_encoder_gives_its_hidden_states() -> None:
    hf, model = taken("WavLM")
    given = batch()
    with torch.no_grad():
        assert torch.allclose(model(given), hf(**given).last_hidden_state, atol=1e-4)
    inputs = model.as_inputs(given)
    assert isinstance(inputs, AudioInputs)
    assert inputs.shape == (2, 0)
    assert model.part("encoder").inputs(given).shape == (2, 18)
