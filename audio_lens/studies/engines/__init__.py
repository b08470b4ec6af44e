"""Where a study runs: in this process, on Ray, on Slurm. All run the same workers."""

from audio_lens.studies.engines.engine import Engine
from audio_lens.studies.engines.here import Here
from audio_lens.studies.engines.ray import Ray
from audio_lens.studies.engines.slurm import Slurm

__all__ = ["Engine", "Here", "Ray", "Slurm"]
