"""Greedy decoding with a key-value cache, with hooks in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.arguments import whole
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.layers import KVCache
from audio_lens.models.mixins.hearing import Hearing
from audio_lens.models.mixins.vocabulary import Vocabulary
from audio_lens.models.mixins.writing import Writing


class GreedyDecoding(Hearing, Writing, Vocabulary):
    """How a `HookedAudioTransformer` writes; mixed into it."""

    @overload
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        max_new_tokens: int = 64,
        return_type: Literal["text"] = "text",
        **mapping: Any,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        max_new_tokens: int = 64,
        *,
        return_type: Literal["tokens"],
        **mapping: Any,
    ) -> Int[Tensor, "b t"]: ...

    @torch.no_grad()
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        max_new_tokens: int = 64,
        return_type: Literal["text", "tokens"] = "text",
        **mapping: Any,
    ) -> list[str] | Int[Tensor, "b t"]:
        """Continue the prompts greedily, with a key-value cache.

        Hooks that are attached run at every step: the first call holds the whole prompt, each
        later one a single new position.

        Args:
            inputs: `AudioInputs`, or the mapping a Hugging Face processor returns (which may also
                be given as keywords).
            max_new_tokens: how many tokens to add at most.
            return_type: "text" gives the new text of each row; "tokens" prompt and continuation
                ids, padded after the end.

        Raises:
            InputError: prompts that are padded on the right, or no room for so many tokens.
        """
        if return_type not in ("text", "tokens"):
            raise InputError(f"return_type must be text or tokens, got {return_type!r}")
        if return_type == "text":
            self.need_tokenizer("text")
        inputs = self._continuable(self.as_inputs(inputs, mapping), max_new_tokens)
        tokens = self._continue(inputs, max_new_tokens)
        if return_type == "tokens":
            return tokens
        new = tokens[:, inputs.tokens.shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _continuable(self, inputs: AudioInputs, max_new_tokens: int) -> AudioInputs:
        """The inputs, with positions that count attended tokens only; checked."""
        whole("max_new_tokens", max_new_tokens, least=1)
        cfg, last = self.cfg.need_decoder, inputs.tokens.shape[1] + max_new_tokens - 1
        if cfg.rotary_base is None and last > cfg.need_n_ctx:
            raise InputError(
                f"{inputs.tokens.shape[1]} prompt tokens and {max_new_tokens} new ones are more "
                f"than the {cfg.n_ctx} positions of the decoder"
            )
        if inputs.attention_mask is None or inputs.position_ids is not None:
            return inputs
        if not inputs.attention_mask[:, -1].all():
            raise InputError(
                "prompts padded on the right cannot be continued: pad them on the left "
                '(processor.tokenizer.padding_side = "left")'
            )
        return replace(inputs, position_ids=inputs.counted_positions())

    def _continue(self, inputs: AudioInputs, max_new_tokens: int) -> Int[Tensor, "b t"]:
        past, encoded = KVCache(), self.encode(inputs)
        ends = torch.tensor(self._end_tokens(), dtype=torch.long, device=inputs.device)
        done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        tokens = inputs.tokens
        step = inputs
        for index in range(max_new_tokens):
            hidden = self.decode(step, encoded, past=past)
            logits = self.hook_logits(self.read_out(hidden, step))[:, -1]
            new = self._allowed(logits, is_first=index == 0).argmax(-1)
            new = torch.where(done, self._pad_token(), new)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            done = done | torch.isin(new, ends)
            if done.all():
                break
            step = self._next_step(step, new)
        return tokens

    def _next_step(self, step: AudioInputs, new: Int[Tensor, " b"]) -> AudioInputs:
        """Inputs of the next decoding step: one new token per row, masks grown by one."""
        mask, positions = step.attention_mask, step.position_ids
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return replace(
            step,
            tokens=new[:, None],
            attention_mask=mask,
            audio_mask=None if step.audio_mask is None else torch.zeros_like(new[:, None] > 0),
            position_ids=None if positions is None else positions[:, -1:] + 1,
        )

    def _end_tokens(self) -> list[int]:
        ends = getattr(self.generation_config, "eos_token_id", None)
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _pad_token(self) -> int:
        pad = getattr(self.generation_config, "pad_token_id", None)
        return pad if pad is not None else (self._end_tokens() or [0])[0]

    def _allowed(self, logits: Float[Tensor, "b v"], is_first: bool) -> Float[Tensor, "b v"]:
        """Logits with the tokens the family forbids at this step set to -inf: none here."""
        return logits
