"""The live explorer: touch a model and hear it answer, as a page or a notebook's widget."""

from audio_lens.explorer.code import python_code
from audio_lens.explorer.maps import HeadMap, LayerMap, head_map, layer_map
from audio_lens.explorer.session import Option, Session
from audio_lens.explorer.shared import read, save
from audio_lens.explorer.touches import Deafened, Head, Stretch, Touch, touch_of
from audio_lens.explorer.widget import explore

__all__ = [
    "Deafened",
    "Head",
    "HeadMap",
    "LayerMap",
    "Option",
    "Session",
    "Stretch",
    "Touch",
    "explore",
    "head_map",
    "layer_map",
    "python_code",
    "read",
    "save",
    "touch_of",
]
