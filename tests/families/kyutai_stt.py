"""Kyutai's speech to text: text and codes of one table, in the decoder of Moshi."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from families.base import (
    EVERYTHING,
    Family,
    decoder_of,
    draw_decoder,
    padded_rows,
    random_words,
    ready,
    run_hf,
)
from families.moshi import TINY_MIMI, TINY_STACK, draw_lengths, random_codebooks

N_TEXTS, N_CODES, N_BOOKS = 100, 16, 4  # text tokens, codes of a codebook, codebooks
PADDING = N_TEXTS + N_BOOKS * (N_CODES + 1)  # the last row of the table


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.KyutaiSpeechToTextForConditionalGeneration:
    options = {
        "vocab_size": N_TEXTS,
        "num_codebooks": N_BOOKS,
        "codebook_vocab_size": N_CODES + 1,
        "audio_bos_token_id": N_CODES,
        "audio_pad_token_id": PADDING,
        "bos_token_id": N_TEXTS - 1,
        **TINY_STACK,
        **overrides,
    }
    hf_config = transformers.KyutaiSpeechToTextConfig(
        codec_config={"model_type": "mimi", **TINY_MIMI}, **options
    )
    model = transformers.KyutaiSpeechToTextForConditionalGeneration(hf_config)
    random_codebooks(model.codec_model, seed)
    return ready(model, seed, dtype, attn)


def batch(
    lengths: Sequence[int] = (9, 6),
    padding: str = "right",
    begun: bool = True,
    missing: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Text and codes as they enter, unless ``begun`` behind initial tokens; some are missing."""
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = padded_rows([random_words(n, generator) for n in lengths], padding)
    shape = (len(lengths), N_BOOKS, tokens.shape[1])
    codes = torch.randint(0, N_CODES, shape, generator=generator)
    if not begun:
        rows, first = torch.arange(len(lengths)), mask.argmax(1)
        tokens[rows, first], codes[rows, :, first] = N_TEXTS - 1, N_CODES
    if missing:
        tokens[:, 1::3], codes[..., 1::2] = PADDING, PADDING
    return {"input_ids": tokens, "audio_codes": codes, "attention_mask": mask}


def as_hf(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch as Hugging Face's forward takes it: ids of text and codes together, ``b t 1+k``."""
    ids = torch.cat([made["input_ids"][:, None], made["audio_codes"]], dim=1)
    return {"input_ids": ids.transpose(1, 2), "attention_mask": made["attention_mask"]}


def reference(hf: nn.Module, made: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that Hugging Face's decoder computes."""
    out, _ = run_hf(hf, as_hf(made), **EVERYTHING)
    return decoder_of(out)


def draw(data: Any) -> tuple[dict, dict]:
    """A shape of decoder, and clips of other lengths."""
    return draw_decoder(data), draw_lengths(data)


KYUTAI_STT = Family(
    name="kyutai_stt",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "wide heads": {"head_dim": 10},
        "another code for padding": {"audio_pad_token_id": N_TEXTS + 3},
    },
    batches={
        "right padding": {},
        "left padding": {"padding": "left"},
        "from its beginning": {"lengths": (8, 8), "begun": False},
        "codes missing": {"lengths": (8, 7), "missing": True},
        "one position": {"lengths": (1,)},
    },
    no_float64=("left padding",),
    draw=draw,
)
