"""Tokenizers that are published as a ``.tiktoken`` file: a token and its rank a line."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Ranked(TikTokenConverter):
    """Reads the file without the package that wrote it."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = (line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in lines}


def tiktoken_tokenizer(
    path: str | Path, special_tokens: Sequence[str], pattern: str = QWEN_PATTERN, **options: Any
) -> PreTrainedTokenizerFast:
    """The tokenizer of such a file.

    Args:
        special_tokens: those whose ids follow the ones in the file, in order.
        pattern: what text is cut by before its pieces are merged.
        options: of `PreTrainedTokenizerFast`.
    """
    words = _Ranked(vocab_file=str(path), pattern=pattern).converted()
    words.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, clean_up_tokenization_spaces=False, **options
    )
