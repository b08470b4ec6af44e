"""Published sets of questions about audio, as `Items`; their audio is fetched by the user.

Tables of one's own are read by `Items.from_table`.
"""

from audio_lens.items.read.air_bench import air_bench
from audio_lens.items.read.alme import alme
from audio_lens.items.read.crema_d import crema_d
from audio_lens.items.read.iemocap import iemocap
from audio_lens.items.read.manifests import lhotse, nemo
from audio_lens.items.read.mmar import mmar
from audio_lens.items.read.mmau import mmau
from audio_lens.items.read.musdb18 import musdb18
from audio_lens.items.read.sakura import sakura
from audio_lens.items.read.temporal_lalm import temporal_lalm
from audio_lens.items.read.voicebench import voicebench

__all__ = [
    "air_bench",
    "alme",
    "crema_d",
    "iemocap",
    "lhotse",
    "mmar",
    "mmau",
    "musdb18",
    "nemo",
    "sakura",
    "temporal_lalm",
    "voicebench",
]
