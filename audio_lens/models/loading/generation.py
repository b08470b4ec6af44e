"""Generation settings that lie beside published weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from audio_lens.errors import InputError
from audio_lens.models.config import LoadingError

GENERATION_FILE = "generation_config.json"


def stored_settings(
    folder: str | Path, otherwise: GenerationConfig | None = None
) -> GenerationConfig | None:
    """What the ``generation_config.json`` of a folder says.

    Args:
        otherwise: the settings where there is no such file; of a file that says not how texts end,
            these say it.

    Raises:
        LoadingError: if it is no JSON, or holds settings that contradict one another.
    """
    path = Path(folder) / GENERATION_FILE
    if not path.is_file():
        return otherwise
    try:
        settings = GenerationConfig.from_dict(_held(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise LoadingError(f"{path} cannot be used: {error}") from error
    if otherwise is not None and settings.eos_token_id is None:
        settings.eos_token_id = otherwise.eos_token_id
        settings.pad_token_id = otherwise.pad_token_id
    return settings


def _held(path: Path) -> dict[str, Any]:
    held = json.loads(path.read_text())
    if not isinstance(held, dict):
        raise InputError(f"it holds a {type(held).__name__}, no settings by their names")
    return held
