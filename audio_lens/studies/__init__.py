"""Studies: one method over many items, on one machine or many, with nothing lost on the way."""

from audio_lens.studies.engines import Engine, Here, Ray, Slurm
from audio_lens.studies.errors import StudyError
from audio_lens.studies.harvest import harvest
from audio_lens.studies.jobs import Case
from audio_lens.studies.loaded import StudyResult, load
from audio_lens.studies.planning import StudyPlan
from audio_lens.studies.status import Status
from audio_lens.studies.study import Study
from audio_lens.studies.worker import UnitReport, Worker

__all__ = [
    "Case",
    "Engine",
    "Here",
    "Ray",
    "Slurm",
    "Status",
    "Study",
    "StudyError",
    "StudyPlan",
    "StudyResult",
    "UnitReport",
    "Worker",
    "harvest",
    "load",
]
