"""Temporal Attribution Patching: from a map to claims that can be attacked."""

from audio_lens.analysis.tap.claims import Claim, Trial
from audio_lens.analysis.tap.protocol import tap
from audio_lens.analysis.tap.report import Report
from audio_lens.analysis.tap.study import study
from audio_lens.analysis.tap.work import LOCATING, STAGES

__all__ = ["LOCATING", "STAGES", "Claim", "Report", "Trial", "study", "tap"]
