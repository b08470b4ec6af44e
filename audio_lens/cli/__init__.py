"""The `audio-lens` command, one file per group of commands.

Heavy imports stay inside the commands, so that ``--help`` and completion are quick.
"""

from audio_lens.cli import maps, explore, analyse, tap, features, study  # noqa: F401, I001  (order of the help)
from audio_lens.cli import views, reproduce, speech, facts  # noqa: F401
from audio_lens.cli.shared import BAD_INPUT, FAILED, INTERRUPTED, app

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "app", "main"]


def main() -> None:
    """Entry point of the `audio-lens` command."""
    app()
