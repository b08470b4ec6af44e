"""What can be wrong with a study."""

from __future__ import annotations

from audio_lens.errors import AudioLensError


class StudyError(AudioLensError, ValueError):
    """A study that cannot be made, or a store that belongs to another one."""
