"""The control tokens that Whisper's decoder starts from, as Hugging Face's `generate` makes them.

They are the start, the language, the task and "no timestamps". What a call does not say, the
checkpoint's generation settings do (``language`` and ``task``, or the older
``forced_decoder_ids``); a language that neither names is detected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from audio_lens.inputs import InputError

DETECTED = -1  # stands for the language that is yet to be detected
ENGLISH = ("en", "english", "<|en|>")


def control_tokens(
    config: Any, forced: Sequence[Any] | None, language: str | None, task: str | None
) -> list[int]:
    """The control tokens of one prompt; `DETECTED` in place of a language nobody names.

    Args:
        config: the generation settings.
        forced: ``forced_decoder_ids`` of the model's own config, for settings without.
        language: as `language_token` takes it.
        task: "transcribe" or "translate".

    Raises:
        InputError: an unknown language or task.
    """
    tokens: list[int | None] = [config.decoder_start_token_id]
    if language is None and task is None:
        own = getattr(config, "forced_decoder_ids", None)
        tokens += _forced_tokens(forced if own is None else own)
    if language is not None:
        tokens.append(language_token(config, language))
    elif getattr(config, "lang_to_id", None) and tokens[1:2] in ([], [None]):
        tokens[1:2] = [DETECTED]
    tasks = getattr(config, "task_to_id", None) or {}
    if task is not None:
        tokens.append(_chosen(tasks, task, "task"))
    return _marked([token for token in tokens if token is not None], config)


def settled_prompt(
    config: Any, language: str | Sequence[str | None] | None, task: str | None, n_clips: int
) -> tuple[list[str | None], str | None]:
    """The language of each clip and the task: as a call says, else as the settings say.

    Raises:
        InputError: another number of languages than clips, or a language or task for an
            English-only checkpoint.
    """
    is_english = getattr(config, "is_multilingual", None) is False
    languages = languages_per_clip(language, n_clips)
    if not is_english:
        if language is None:
            languages = languages_per_clip(getattr(config, "language", None), n_clips)
        task = getattr(config, "task", None) if task is None else task
        if task is None and any(languages) and getattr(config, "task_to_id", None):
            task = "transcribe"  # as where a language is named and no task
        return languages, task
    others = [one for one in languages if one is not None and one.lower() not in ENGLISH]
    if others or task not in (None, "transcribe"):
        raise InputError(
            "this checkpoint knows only English transcription (is_multilingual of its generation "
            f"settings is false); got {others[0] if others else task!r}"
        )
    return [None] * n_clips, None


def _marked(tokens: list[int], config: Any) -> list[int]:
    """The tokens with "no timestamps" behind them, unless timestamps are asked for."""
    mark = getattr(config, "no_timestamps_token_id", None)
    if mark is None:
        return tokens
    bare = tokens[:-1] if tokens[-1] == mark else tokens
    return bare if getattr(config, "return_timestamps", None) else [*bare, mark]


def language_token(config: Any, language: str) -> int:
    """The token of a language: "french", "fr", "FR" and "<|fr|>" are the same.

    Raises:
        InputError: an unknown language, or settings that name no languages.
    """
    known = getattr(config, "lang_to_id", None)
    if not known:
        raise InputError(
            f"the generation settings hold no lang_to_id, so the token of language={language!r} is "
            "not known: copy it from a newer checkpoint's generation_config (as in "
            "model.generation_config.lang_to_id = {'<|fr|>': 50265}), or pass text= as token ids"
        )
    name = language.lower()
    code = TO_LANGUAGE_CODE.get(name, name)
    return _chosen(known, code if code in known else f"<|{code}|>", "language")


def languages_per_clip(
    language: str | Sequence[str | None] | None, n_clips: int
) -> list[str | None]:
    """One language per clip; a single one is that of all.

    Raises:
        InputError: another number of them.
    """
    if language is None or isinstance(language, str):
        return [language] * n_clips
    if len(language) != n_clips:
        raise InputError(f"{n_clips} clips need as many languages, got {len(language)}")
    return list(language)


def _forced_tokens(forced: Sequence[Any] | None) -> list[int | None]:
    """The tokens behind the start that older checkpoints force, by position.

    Raises:
        InputError: positions that do not follow one another.
    """
    pairs = [] if forced is None else list(forced)
    if not pairs or pairs[0][0] != 1:
        return []
    if [position for position, _ in pairs] != list(range(1, len(pairs) + 1)):
        raise InputError(
            f"forced_decoder_ids={pairs} of the generation settings leave out a position"
        )
    return [token for _, token in pairs]


def _chosen(known: Mapping[str, int], key: str, what: str) -> int:
    if key not in known:
        names = ", ".join(sorted(known)) or "none, as the generation settings name none"
        raise InputError(f"unknown {what} {key!r}; known: {names}")
    return known[key]
