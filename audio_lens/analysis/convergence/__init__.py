"""Do several measures of a model change at the same depth, more nearly than by chance?"""

from audio_lens.analysis.convergence.measure import Measure
from audio_lens.analysis.convergence.study import MEASURES, converge, measures, study
from audio_lens.analysis.convergence.testing import agreement, change_points

__all__ = ["MEASURES", "Measure", "agreement", "change_points", "converge", "measures", "study"]
