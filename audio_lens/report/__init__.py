"""Pictures of results that can be looked at and listened to."""

from audio_lens.report.attention_page import attention_figure, attention_page
from audio_lens.report.cache_page import cache_figure, cache_page
from audio_lens.report.feature_page import feature_page
from audio_lens.report.page import map_page
from audio_lens.report.result_page import result_page
from audio_lens.report.tap_page import tap_page

__all__ = [
    "attention_figure",
    "attention_page",
    "cache_figure",
    "cache_page",
    "feature_page",
    "map_page",
    "result_page",
    "tap_page",
]
