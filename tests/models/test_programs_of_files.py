"""Small programs that files bring, regular expressions and chat templates, end at once."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from audio_lens import HookedAudioTransformer, InputError, LoadingError
from audio_lens.models.loading.adapters import read_adapter
from audio_lens.models.loading.checkpoints import embedded_path
from audio_lens.models.loading.patterns import check_patterns, patterns_of
from audio_lens.models.mixins.templates import chat_prompt
from tiny import hf_inputs, tiny_hf, tiny_whisper_hf

ENDLESS = r"([\w.]+)+!"
MODULE = "model.decoder.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **config}))
    halves = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)}
    names = {f"base_model.model.{MODULE}.lora_{h}.weight": x for h, x in halves.items()}
    save_file(names, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "config",
    [{"alpha_pattern": {ENDLESS: 4}}, {"target_modules": ENDLESS}, {"rank_pattern": {ENDLESS: 4}}],
    ids=str,
)
def test_a_pattern_that_never_ends_is_named(tmp_path: Path, config: dict) -> None:
    folder, started = write_adapter(tmp_path / "adapter", **config), time.monotonic()
    with pytest.raises(LoadingError, match=r"adapter_config\.json holds patterns that take more"):
        read_adapter(folder)
    assert time.monotonic() - started < 20


def test_a_pattern_beside_a_model_never_reaches_peft(tmp_path: Path) -> None:
    tiny_whisper_hf().save_pretrained(tmp_path)
    write_adapter(tmp_path, target_modules=ENDLESS)
    with pytest.raises(LoadingError, match="patterns that take more than 3 s"):
        HookedAudioTransformer.from_pretrained(tmp_path)


def test_what_is_no_pattern_is_named(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", alpha_pattern={"(q_proj": 4})
    with pytest.raises(LoadingError, match=r"holds '\(q_proj', no pattern: missing \)"):
        read_adapter(folder)


def test_patterns_in_use_are_read(tmp_path: Path) -> None:
    pattern = r".*decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q|v)_proj"
    folder = write_adapter(tmp_path / "a", alpha_pattern={pattern: 8}, target_modules=pattern)
    assert read_adapter(folder).low_rank[MODULE].scale == 4
    assert patterns_of({"target_modules": ["q_proj", "self_attn.k_proj"]}) == []
    check_patterns([], [MODULE], "here")


class Speaker:
    """Renders as tokenizers do."""

    def __init__(self, template: str):
        self.template = template

    def apply_chat_template(self, turns: list, **options: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template([turns], chat_template=self.template, **options)[0][0]


def test_a_template_that_runs_on_is_ended() -> None:
    many = "{% for i in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4
    before, started = sys.gettrace(), time.monotonic()
    with pytest.raises(InputError, match="template runs through more than 500,000 lines"):
        chat_prompt(Speaker(many), [{"role": "user", "content": "hi"}])
    assert time.monotonic() - started < 20 and sys.gettrace() is before


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ turn.missing.piece }}",
        "{% for",
        "{{ 1 / 0 }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_is_told(template: str) -> None:
    with pytest.raises(InputError, match="the chat template cannot write this conversation"):
        chat_prompt(Speaker(template), [{"role": "user", "content": "hi"}])


def test_the_template_of_a_checkpoint_is_bounded(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_path(), tmp_path / "copy"))
    many = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    for path in (folder / "tokenizer_config.json", folder / "processor_config.json"):
        held = json.loads(path.read_text())
        path.write_text(json.dumps({k: x for k, x in held.items() if k != "chat_template"}))
    (folder / "chat_template.jinja").write_text(many)
    model = HookedAudioTransformer.from_pretrained(folder)
    with pytest.raises(InputError, match="runs through more than"):
        model.prepare(torch.zeros(16_000), "which ?", sampling_rate=16_000)


@pytest.mark.parametrize("wrong", [-1, 100_000, 2.5, "word"])
@pytest.mark.parametrize("family", ["whisper", "qwen2_audio", "granite_speech", "voxtral"])
def test_token_ids_are_whole_numbers_of_the_vocabulary(family: str, wrong: Any) -> None:
    model = HookedAudioTransformer.from_hf(tiny_hf(family))
    batch = hf_inputs(family)
    key = "decoder_input_ids" if family == "whisper" else "input_ids"
    tokens = batch[key].tolist()
    tokens[0][-1] = wrong
    with pytest.raises(InputError, match=r"no token|whole numbers|cannot be made a tensor"):
        model({**batch, key: tokens if wrong == "word" else torch.tensor(tokens)})


def test_a_tokenizer_larger_than_the_embedding_is_told(tmp_path: Path) -> None:
    model = HookedAudioTransformer.from_pretrained(embedded_path())
    question = (torch.zeros(16_000), "which digit is first ?", 16_000)
    known = model.prepare(*question).tokens.max().item()
    smaller = transformers.Qwen2AudioConfig.from_pretrained(embedded_path())
    assert known < smaller.text_config.vocab_size
    model.cfg.decoder.d_vocab = known
    with pytest.raises(InputError, match=f"no token {known}"):
        model.prepare(*question)
