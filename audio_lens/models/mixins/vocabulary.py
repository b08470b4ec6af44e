"""Words, names of classes and token ids of a model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from audio_lens.arguments import suggest
from audio_lens.errors import AudioLensError
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.mixins.host import Host


class TokenError(AudioLensError, ValueError):
    """Text that does not give the tokens that are needed."""


class Vocabulary(Host):
    """What a `HookedAudioTransformer` knows of tokens; mixed into it."""

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise unless every token id is a whole number in the vocabulary.

        Raises:
            InputError: naming the first that is not.
        """
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise InputError(f"token ids are whole numbers, got {tokens.dtype}")
        n = self.cfg.output.need_d_vocab
        unknown = tokens[(tokens < 0) | (tokens >= n)]
        if len(unknown):
            raise InputError(f"no token {unknown[0].item()}: the vocabulary has {n} tokens")

    def need_tokenizer(self, purpose: str) -> Any:
        if self.tokenizer is None:
            raise TokenError(
                f"{purpose} needs a tokenizer, and this model was loaded without one: use a "
                "directory with tokenizer files, or from_hf(hf_model, processor=...)"
                + (f" ({self.tokenizer_problem})" if self.tokenizer_problem else "")
            )
        return self.tokenizer

    def to_single_token(self, text: str | SupportsIndex) -> int:
        """The id of a word that is one token, or of a class by its name.

        Raises:
            TokenError: if the word is none or several tokens, or unknown to the tokenizer, or an
                id is not in the vocabulary.
        """
        if not isinstance(text, str):
            if isinstance(text, bool) or not isinstance(text, SupportsIndex):
                raise TokenError(f"a token is a word or an id, got {text!r}")
            return self._checked_token(operator.index(text))
        if self.cfg.labels:
            return self._label(text)
        tokenizer = self.need_tokenizer(f"the token of {text!r}")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise TokenError(
                f"{text!r} is {len(ids)} tokens ({pieces}), not one: use a word that is one token "
                "(mind the leading space), a token id, or metrics.sequence_log_prob"
            )
        if ids[0] == tokenizer.unk_token_id:
            raise TokenError(f"{text!r} is unknown to the tokenizer")
        return self._checked_token(ids[0])

    def to_str_tokens(
        self, text: str | Tensor | Sequence[int] | AudioInputs
    ) -> list[str] | list[list[str]]:
        """What each token says by itself, as `transformer_lens` writes it.

        Args:
            text: words to be cut into tokens; token ids ``t`` or ``b t``; or inputs, whose prompts
                are shown with their placeholders of audio and their padding.

        Returns:
            One string per token; of several prompts, a list for each.

        Raises:
            TokenError: a model without a tokenizer.
            InputError: ids that are not in the vocabulary.
        """
        tokenizer = self.need_tokenizer("the words of tokens")
        if isinstance(text, str):
            ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
        else:
            ids = text.tokens if isinstance(text, AudioInputs) else torch.as_tensor(text)
        if ids.ndim not in (1, 2):
            raise InputError(f"token ids have one or two axes, got shape {list(ids.shape)}")
        self.check_tokens(ids)
        rows = [
            [tokenizer.decode([token]) for token in row]
            for row in ids.view(-1, ids.shape[-1]).tolist()
        ]
        return rows[0] if ids.ndim == 1 else rows

    def _label(self, name: str) -> int:
        labels = self.cfg.labels
        if name not in labels:
            raise TokenError(f"no class {name!r}; {suggest(name, labels)}")
        return labels.index(name)

    def _checked_token(self, token: int) -> int:
        n = self.cfg.output.need_d_vocab
        if not 0 <= token < n:
            raise TokenError(f"no token {token}: the vocabulary (d_vocab) has {n} tokens")
        return token
