"""How MusicGen plays on: greedily, code beside lagging code, with guidance by its text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from audio_lens.hooks import NamesFilter
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.families.musicgen_config import MusicgenConfig
from audio_lens.models.kinds.streams import UNKNOWN, CodecTime, undelayed
from audio_lens.models.layers import KVCache, needed
from audio_lens.models.mixins.settings import (
    NOT_GREEDY,
    GreedyRun,
    Limit,
    Neutral,
    settings_apart,
    stated_limit,
)
from audio_lens.models.parts.codecs import Speaking

USUAL_LIMIT = 256  # new positions, where nothing else is said


class MusicDecoding(Speaking, CodecTime):
    """Playing on greedily with a key-value cache; mixed into `HookedMusicgen`."""

    cfg: MusicgenConfig
    encodes_prompts = False
    refused_settings: ClassVar[Neutral] = {
        **{name: neutral for name, neutral in NOT_GREEDY.items() if name != "guidance_scale"},
        "eos_token_id": (),
        "stop_strings": (),
    }

    @abstractmethod
    def codes_of(self, inputs: AudioInputs) -> Int[Tensor, "b k t"]:
        """The codes of all codebooks as they enter."""

    @torch.no_grad()
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        return_type: Literal["audio", "codes"] = "audio",
        guidance_scale: float | int | None = None,
        *,
        encoder_out: Tensor | None = None,
        return_cache: bool = False,
        names_filter: NamesFilter = None,
        attention: bool = False,
        **options: Any,
    ) -> Any:
        """Play on greedily, with a key-value cache.

        Hooks that are attached run at every step: the first call holds the whole prompt, each later
        one a single new position. With guidance the decoder runs twice per step, with the text and
        then with nothing in its place, and hooks run in both. The checkpoint's generation settings
        are honoured as in other models, codebook by codebook, behind the guidance.

        Args:
            inputs: `AudioInputs`, or the mapping a Hugging Face processor returns (which may also
                be given as keywords).
            max_new_tokens: how many positions to add; None takes what the settings state, else 256.
                The steps that come out whole are fewer, by what the last codebook lags.
            return_type: "audio" at ``cfg.sampling_rate`` Hz, or "codes" (not delayed); of prompt
                and continuation.
            guidance_scale: how much further than the text's logits to go, from those without text:
                1 is no guidance; None takes the checkpoint's own.
            encoder_out: what the encoder gave earlier (``model.encode(inputs)``).
            return_cache: also give an `AudioCache`, as other models do: of everything that enters,
                the last codes too; without guidance only.
            names_filter, attention: what the cache keeps, as in `run_with_cache`.
            options: generation settings in place of the checkpoint's, and keywords of the mapping.

        Returns:
            The audio, ``b c samples``, or the codes, ``b k t``; with ``return_cache`` a tuple of
            that and the cache.

        Raises:
            InputError: prompts that are padded, too few positions, a scale below 1, an
                ``encoder_out`` of another shape, a cache under guidance, or settings that are not
                implemented.
        """
        if return_type not in ("audio", "codes"):
            raise InputError(f"return_type must be audio or codes, got {return_type!r}")
        asked, mapping = settings_apart(options, self.refused_settings)
        inputs = self.as_inputs(inputs, mapping)
        if not inputs.attended.all():
            raise InputError("prompts that are padded cannot be continued: make them equally long")
        settings = self.generation_settings(asked)
        scale = settings.guidance_scale or 1 if guidance_scale is None else guidance_scale
        if scale < 1:
            raise InputError(f"guidance_scale is at least 1 (no guidance), got {scale}")
        limit = self._stated_limit(settings, 0) or self._usual_limit(inputs)
        if max_new_tokens is not None:
            limit = Limit(max_new_tokens, "max_new_tokens")
        held = self._plan(inputs, limit.n_tokens)
        rows = rearrange(self.codes_of(inputs), "b k t -> (b k) t")
        run = GreedyRun(settings, limit, rows, are_encoded=False)
        if return_cache and scale > 1:
            raise InputError(
                "under guidance the decoder runs twice per step: return_cache needs "
                "guidance_scale=1"
            )
        run.encoder_out = self._given_encoded(inputs, encoder_out)
        run.record = self._recording(names_filter, attention) if return_cache else None
        with self.watching([] if run.record is None else run.record.hooks()):
            played = self._played(inputs, held, scale, run)
        codes = undelayed(played, self.cfg.delays)
        made = codes if return_type == "codes" else self.sound(codes)
        return made if run.record is None else (made, self._as_cache(run.record.joined(), True))

    def _stated_limit(self, settings: GenerationConfig, n_prompt: int) -> Limit | None:
        """As Hugging Face reads it here: ``max_length`` counts new positions only."""
        return stated_limit(settings)

    def _usual_limit(self, inputs: AudioInputs) -> Limit:
        return Limit(USUAL_LIMIT, "the usual limit")

    def sound(self, codes: Int[Tensor, "b k t"]) -> Float[Tensor, "b c samples"]:
        """The audio of codes that are not delayed, one waveform per channel.

        Raises:
            InputError: for codes that the codec does not have.
        """
        channels = rearrange(codes, "b (k c) t -> c b k t", c=self.cfg.n_channels)
        return torch.stack([self.codec.decode(own) for own in channels], dim=1)

    def _played(
        self,
        inputs: AudioInputs,
        held: Int[Tensor, "b k positions"],
        scale: float | int,
        run: GreedyRun,
    ) -> Int[Tensor, "b k positions"]:
        """The codes of prompt and continuation, as they enter; ``held`` are those known before."""
        encoded = needed(self._heard_in(inputs, run), "MusicGen plays what a text says")
        passes = [(inputs, encoded, KVCache())]
        if scale > 1:
            nothing = torch.zeros_like(inputs.features, dtype=torch.bool)
            silent = replace(inputs, feature_mask=nothing)
            passes.append((silent, torch.zeros_like(encoded), KVCache()))
        begin = 0
        for position in range(inputs.tokens.shape[1], held.shape[-1]):
            entering = held[..., begin:position]
            logits = [self._next_logits(entering, *one) for one in passes]
            chosen = logits[-1] + scale * (logits[0] - logits[-1])
            each = rearrange(chosen, "b (k v) -> (b k) v", k=held.shape[1])
            new = rearrange(run.choose(each), "(b k) -> b k", k=held.shape[1])
            held[..., position] = new.where(held[..., position] == UNKNOWN, held[..., position])
            begin = position
        if run.record is not None:  # the last codes enter, too
            self._next_logits(held[..., begin:], *passes[0])
        return held

    def _next_logits(
        self,
        entering: Int[Tensor, "b k t"],
        inputs: AudioInputs,
        encoded: Float[Tensor, "b s d"],
        past: KVCache,
    ) -> Float[Tensor, "b v"]:
        step = replace(
            inputs, tokens=entering[:, 0], further_tokens=entering[:, 1:], attention_mask=None
        )
        hidden = self.decode(step, encoded, past=past)
        return self.hook_logits(self.read_out(hidden, step))[:, -1]

    def _plan(self, inputs: AudioInputs, n_new: int) -> Int[Tensor, "b k positions"]:
        """What enters, as far as it is known: the prompt, and initial codes outside the music.

        Codebooks begin one after the other, and end so: all of them have equally many steps.
        """
        prompt = self.codes_of(inputs)
        n_positions = prompt.shape[-1] + n_new
        n_steps = n_positions - 1 - max(self.cfg.delays)
        if n_new < 1 or n_steps < 1:
            raise InputError(
                f"max_new_tokens={n_new} makes no whole step: codebooks lag by up to "
                f"{max(self.cfg.delays)} positions"
            )
        delays = torch.tensor(self.cfg.delays, device=prompt.device)[:, None]
        step = torch.arange(n_positions, device=prompt.device) - 1 - delays
        is_music = (step >= 0) & (step < n_steps)
        held = torch.where(is_music, UNKNOWN, self.initial_code).repeat(len(prompt), 1, 1)
        held[..., : prompt.shape[-1]] = prompt
        ahead = inputs.further_tokens
        known = prompt[:, 1:] if ahead is None else ahead[..., :n_positions]
        others = held[:, 1:, : known.shape[-1]]
        others.copy_(known.where((others == UNKNOWN) & (known != UNKNOWN), others))
        return held
