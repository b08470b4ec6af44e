"""Greedy decoding with a key-value cache, with hooks in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, overload

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from audio_lens.cache import AudioCache
from audio_lens.hooks import NamesFilter
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.layers import KVCache
from audio_lens.models.mixins.hearing import Hearing
from audio_lens.models.mixins.recording import Recording
from audio_lens.models.mixins.settings import (
    NOT_GREEDY,
    GreedyRun,
    Limit,
    Neutral,
    checked_count,
    end_tokens,
    pad_token,
    settings_apart,
    settled,
    stated_limit,
)
from audio_lens.models.mixins.vocabulary import Vocabulary
from audio_lens.models.mixins.writing import Writing

USUAL_LIMIT = 64  # new tokens, where nothing else is said


class GreedyDecoding(Hearing, Writing, Vocabulary):
    """How a `HookedAudioTransformer` writes; mixed into it."""

    reads_prompts: ClassVar[bool] = True  # whether repetitions count in prompts too
    encodes_prompts: ClassVar[bool] = True  # whether an encoder's settings act on them
    refused_settings: ClassVar[Neutral] = NOT_GREEDY  # of the checkpoint, with what is neutral

    @overload
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        return_type: Literal["text"] = "text",
        **options: Any,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        *,
        return_type: Literal["tokens"],
        **options: Any,
    ) -> Int[Tensor, "b t"]: ...

    @overload
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        *,
        return_type: Literal["text", "tokens"] = "text",
        return_cache: Literal[True],
        **options: Any,
    ) -> tuple[Any, AudioCache]: ...

    @torch.no_grad()
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        return_type: Literal["text", "tokens"] = "text",
        *,
        encoder_out: Tensor | None = None,
        return_cache: bool = False,
        names_filter: NamesFilter = None,
        attention: bool = False,
        **options: Any,
    ) -> list[str] | Int[Tensor, "b t"] | tuple[list[str] | Int[Tensor, "b t"], AudioCache]:
        """Continue the prompts greedily, with a key-value cache.

        Hooks that are attached run at every step: the first call holds the whole prompt, each
        later one a single new position.

        The checkpoint's settings (``model.generation_config``) are honoured as Hugging Face does in
        greedy decoding: penalties, forbidden and forced tokens, lengths, ends. Those of sampling
        change nothing.

        Args:
            inputs: `AudioInputs`, or the mapping a Hugging Face processor returns (which may also
                be given as keywords).
            max_new_tokens: how many tokens to add at most; None takes the limit that the settings
                state, else that of `token_limit`. Texts that a limit cuts are warned of.
            return_type: "text" gives the new text of each row; "tokens" prompt and continuation
                ids, padded after the end.
            encoder_out: what the encoder gave earlier (``model.encode(inputs)``), as a forward
                takes it: it does not run again.
            return_cache: also give an `AudioCache` of what ran, edits and hooks in force: of the
                prompt and of every written token, the last one too, which enters once more for it.
                ``cache[name]`` has the shape that `run_with_cache` on prompt and continuation
                would give: positions are those of ``return_type="tokens"``. Behind the end of a
                row stand activations of the padding written there. Left out is what does not run
                while the model writes: the encoder beside an ``encoder_out``, and of codec
                language models the logits and depth decoders.
            names_filter, attention: what the cache keeps, as in `run_with_cache`.
            options: generation settings in place of the checkpoint's, such as
                ``repetition_penalty=1.2``; and keywords of the mapping.

        Raises:
            InputError: prompts that are padded on the right, no room for so many tokens, an
                ``encoder_out`` of another shape, points that do not run at every position, or
                settings that are not implemented (beams, sampling that is asked for).
            HookNameError, DeadHookError: names to keep that are unknown or did not run.
        """
        if return_type not in ("text", "tokens"):
            raise InputError(f"return_type must be text or tokens, got {return_type!r}")
        if return_type == "text":
            self.need_tokenizer("text")
        batch, run = self._begun(inputs, max_new_tokens, options)
        run.encoder_out = self._given_encoded(batch, encoder_out)
        run.record = self._recording(names_filter, attention) if return_cache else None
        self._check_recorded(batch, run)
        with self.watching([] if run.record is None else run.record.hooks()):
            tokens = self._continue(batch, run)
        self._tell_cut(batch, run)
        made: Any = tokens
        if return_type == "text":
            texts = self.tokenizer.batch_decode(
                tokens[:, batch.tokens.shape[1] :], skip_special_tokens=True
            )
            made = [text.strip() for text in texts]
        return made if run.record is None else (made, self._as_cache(run.record.joined(), True))

    def token_limit(self, inputs: AudioInputs | Mapping[str, Any]) -> int:
        """How many tokens `generate` adds to these prompts at most, where it is not told.

        Raises:
            InputError: if there is no room behind the prompts.
        """
        return self._limit(self.generation_settings({}), self.as_inputs(inputs)).n_tokens

    def generation_settings(self, asked: Mapping[str, Any]) -> GenerationConfig:
        """The checkpoint's generation settings with what a call asks for in their place.

        Raises:
            InputError: naming a setting that is not implemented.
        """
        return settled(self.generation_config, asked, self.refused_settings)

    # ---------------------------------------------------------------- one run

    def _begun(
        self,
        inputs: object,
        max_new_tokens: int | None,
        options: Mapping[str, Any],
        **own: Any,
    ) -> tuple[AudioInputs, GreedyRun]:
        """Inputs that can be continued and the run that does; ``own`` settings are the family's."""
        asked, mapping = settings_apart(options, self.refused_settings)
        batch = self._continuable(self.as_inputs(inputs, mapping))
        settings = self.generation_settings({**asked, **own})
        tokens = self._repeatable(batch)
        run = GreedyRun(
            settings,
            self._limit(settings, batch, max_new_tokens),
            tokens if self.reads_prompts else tokens[:, :0],
            mask=batch.attention_mask if self.reads_prompts else None,
            n_unread=0 if self.reads_prompts else batch.tokens.shape[1],
            are_encoded=self.reads_prompts and self.encodes_prompts,
            tokenizer=self.tokenizer,
        )
        return batch, run

    def _limit(
        self, settings: GenerationConfig, inputs: AudioInputs, asked: int | None = None
    ) -> Limit:
        """How many tokens may be added: as asked, else as the settings state, else usually."""
        n_prompt, room = inputs.tokens.shape[1], self._room(inputs)
        if asked is not None:
            if room is not None and checked_count(asked) > room + 1:
                raise InputError(
                    f"{n_prompt} prompt tokens and {asked} new ones are more "
                    f"than the {self.cfg.need_decoder.n_ctx} positions of the decoder"
                )
            return Limit(checked_count(asked), "max_new_tokens")
        found = self._stated_limit(settings, n_prompt) or self._usual_limit(inputs)
        if room is not None and room < 1:
            raise InputError(f"a prompt of {n_prompt} tokens fills the decoder: there is no room")
        if room is None or found.n_tokens <= room:
            return found
        return Limit(room, f"the {self.cfg.need_decoder.n_ctx} positions of the decoder")

    def _stated_limit(self, settings: GenerationConfig, n_prompt: int) -> Limit | None:
        return stated_limit(settings, n_prompt)

    def _usual_limit(self, inputs: AudioInputs) -> Limit:
        """The limit where neither the caller nor the checkpoint names one."""
        return Limit(USUAL_LIMIT, "the usual limit (the generation settings state none)")

    def _room(self, inputs: AudioInputs) -> int | None:
        """How many positions of the decoder are left; None where their number is not limited."""
        cfg = self.cfg.need_decoder
        is_bounded = cfg.rotary_base is None and cfg.n_ctx is not None
        return cfg.need_n_ctx - inputs.tokens.shape[1] if is_bounded else None

    def _repeatable(self, inputs: AudioInputs) -> Int[Tensor, "b t"]:
        """The tokens of the prompts in which repetitions count."""
        return inputs.tokens

    def _continuable(self, inputs: AudioInputs) -> AudioInputs:
        """The inputs, with positions that count attended tokens only; checked."""
        if inputs.attention_mask is None or inputs.position_ids is not None:
            return inputs
        if not inputs.attention_mask[:, -1].all():
            raise InputError(
                "prompts padded on the right cannot be continued: pad them on the left "
                '(processor.tokenizer.padding_side = "left")'
            )
        return replace(inputs, position_ids=inputs.counted_positions())

    # ---------------------------------------------------------------- what is heard and kept

    def _given_encoded(self, inputs: AudioInputs, encoded: Tensor | None) -> Tensor | None:
        """What the encoder gave earlier, checked to be of these inputs."""
        if encoded is not None:
            self.check_encoded(inputs, encoded)
        return encoded

    @property
    def unrecorded(self) -> tuple[str, ...]:
        """Beginnings of the names of points that do not run at every position while it writes."""
        return ()

    def _recording(self, names_filter: NamesFilter, attention: bool) -> Recording:
        is_named = names_filter is not None and not callable(names_filter)
        names = self.matching(names_filter, attention, None)
        unfit = [name for name in names if name.startswith(self.unrecorded)]
        if unfit and (is_named or len(unfit) == len(names)):
            raise InputError(
                f"{', '.join(unfit[:5])} do not run at every position while {self.cfg.family} "
                "writes: run_with_cache on what it wrote gives them"
            )
        return Recording([name for name in names if name not in unfit], is_named)

    def _check_recorded(self, inputs: AudioInputs, run: GreedyRun) -> None:
        room = self._room(inputs)
        if run.record is not None and room is not None and run.limit.n_tokens > room:
            raise InputError(
                f"return_cache has every written token enter the decoder, which has room for "
                f"{room}: max_new_tokens={room}"
            )

    def _heard_in(self, inputs: AudioInputs, run: GreedyRun) -> Tensor | None:
        """What the decoder receives of the audio."""
        return self.encode(inputs) if run.encoder_out is None else run.encoder_out

    def _continue(self, inputs: AudioInputs, run: GreedyRun) -> Int[Tensor, "b t"]:
        past, encoded = KVCache(), self._heard_in(inputs, run)
        tokens, step = [inputs.tokens], inputs
        for _ in range(run.limit.n_tokens):
            hidden = self.decode(step, encoded, past=past)
            new = run.choose(self.hook_logits(self.read_out(hidden, step))[:, -1])
            tokens.append(new[:, None])
            step = self._next_step(step, new)
            if run.is_over:
                break
        if run.record is not None:  # the last token enters, too
            self.hook_logits(self.read_out(self.decode(step, encoded, past=past), step))
        return torch.cat(tokens, dim=1)

    def _tell_cut(self, inputs: AudioInputs, run: GreedyRun) -> None:
        """Warn of texts that a limit has cut."""
        run.tell_cut()

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
        return end_tokens(self.generation_config)

    def _pad_token(self) -> int:
        return pad_token(self.generation_config)
