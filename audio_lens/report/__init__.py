"""Pictures of results that can be looked at and listened to."""

from audio_lens.report.page import map_page

__all__ = ["map_page"]
