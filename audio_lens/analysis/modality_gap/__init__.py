"""How far apart the same words are, heard and read; and states of one condition in another."""

from audio_lens.analysis.modality_gap.aligning import Path, align, path_score
from audio_lens.analysis.modality_gap.conditions import cross_patch, interpolate
from audio_lens.analysis.modality_gap.gap import gap, study
from audio_lens.analysis.modality_gap.projecting import project
from audio_lens.analysis.modality_gap.tars import reward, tars_drift, tars_reward

__all__ = [
    "Path",
    "align",
    "cross_patch",
    "gap",
    "interpolate",
    "path_score",
    "project",
    "reward",
    "study",
    "tars_drift",
    "tars_reward",
]
