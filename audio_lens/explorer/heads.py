"""What the heads of a session listen to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from audio_lens.analysis.attention import ClipAttention, read_attention, sites_of
from audio_lens.analysis.prompts import Prompt
from audio_lens.errors import InputError

if TYPE_CHECKING:
    from audio_lens.explorer.session import Session


@dataclass(frozen=True)
class Listening:
    """How the heads of a site spread their attention over the clip.

    Attributes:
        edges: bounds of the stretches in seconds.
        share: of a head's attention that falls into each stretch. Of text, attention of the token
            that decides what comes next; of frames, the mean over all of them.
        on_audio: how much of it falls on the clip.
        asker: what attends, in words.
    """

    site: str
    layers: list[int]
    heads: list[int]
    edges: list[float]
    share: Float[np.ndarray, "layers heads bins"]
    on_audio: Float[np.ndarray, "layers heads"]
    asker: str

    def of_head(self, layer: int, head: int) -> dict[str, Any]:
        """One head's attention, as JSON holds it.

        Raises:
            InputError: a head that is not here.
        """
        if layer not in self.layers or head not in self.heads:
            raise InputError(f"{self.site} has no head {layer}.{head}")
        at = self.layers.index(layer), self.heads.index(head)
        return {
            "share": self.share[at].round(6).tolist(),
            "on_audio": float(self.on_audio[at]),
        }

    def summary(self) -> dict[str, Any]:
        """All heads in short, as JSON holds it."""
        centres = (np.array(self.edges[1:]) + np.array(self.edges[:-1])) / 2
        return {
            "site": self.site,
            "layers": self.layers,
            "heads": self.heads,
            "edges": [round(edge, 5) for edge in self.edges],
            "on_audio": self.on_audio.round(5).tolist(),
            "peak_s": centres[self.share.argmax(-1)].round(3).tolist(),
            "asker": self.asker,
        }


def attention_sites(session: Session) -> list[str]:
    """Sites whose heads look at the clip; none where the model has none."""
    try:
        return sites_of(Prompt.of(session.model, session.inputs))
    except InputError:
        return []


def listening(session: Session, site: str) -> Listening:
    """Read what the heads of a site listen to, with the touches in force.

    Raises:
        InputError: a site without heads that look at the clip.
    """
    prompt = Prompt.of(session.model, session.inputs)
    sites = sites_of(prompt, site)
    with session.in_force():
        (found,) = read_attention(prompt, sites)
    return _reduced(found)


def _reduced(found: ClipAttention) -> Listening:
    if found.is_timed:
        share, on_audio = found.share.mean(2), found.on_audio.mean(2)
        asker = "all frames of the clip, on average"
    else:
        share, on_audio = found.share[:, :, -1], found.on_audio[:, :, -1]
        asker = f"the last token, {found.queries[-1].label}, which decides what is said next"
    edges = [float(edge) for edge in found.edges]
    return Listening(found.site, found.layers, found.heads, edges, share, on_audio, asker)
