"""How little noise changes a right answer, and which neurons put back keep it (SPIRIT)."""

from audio_lens.analysis.defence.attacking import Attack, attack
from audio_lens.analysis.defence.defending import defend
from audio_lens.analysis.defence.neurons import Ranking, rank
from audio_lens.analysis.defence.study import robustness, study

__all__ = ["Attack", "Ranking", "attack", "defend", "rank", "robustness", "study"]
