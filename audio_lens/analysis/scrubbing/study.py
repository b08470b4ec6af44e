"""What ``audio-lens analyse scrubbing`` runs: which positions hold the answer, block by block."""

from __future__ import annotations

from collections import Counter

from audio_lens.analysis.scrubbing.hypothesis import OWN, Hypothesis, Node
from audio_lens.analysis.scrubbing.running import Layout
from audio_lens.analysis.scrubbing.scrub import scrub
from audio_lens.items import Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

SIZE = 16  # of the batches
TOO_FEW = (
    "Too few of these items share their answer and their text with another one of equal layout: "
    "each kept its own activations, which says where the answer is, and not that the answer is all "
    "that matters there."
)


@analysis("scrubbing")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """Where is the answer, layer by layer, if all that is not said to matter is another item's?

    Two hypotheses, in each block: what the audio's positions hold matters by the answer alone, and
    what the last position holds does. They lend to each other that share answer and text; where
    most items have nobody who does, each keeps its own (feature "id"), and the report says so.
    """
    has_text = all(item.text is not None for item in items)
    shares = _mostly_shared(model, items, has_text)
    feature, within = ("answer", "text" if has_text else None) if shares else (OWN, None)
    found = {}
    for name, (site, where) in _places(model).items():
        hypothesis = Hypothesis([Node(site, 0, where, feature=feature)])
        found[name] = scrub(
            *(model, items, hypothesis),
            layers=range(model.cfg.parts[site.partition(".")[0]].n_layers),
            within=within,
            skip_bad=True,
            size=SIZE,
            seed=seed,
            progress=progress,
        )
        found[name].report += [] if shares else [TOO_FEW]
    return found


def _places(model: HookedAudioTransformer) -> dict[str, tuple[str, str]]:
    """Site and place of both hypotheses; of what does not read audio at its positions, one part."""
    reads_audio = model.cfg.decoder is not None and not model.decoder_needs_encoder
    audio = ("decoder.resid_pre", "audio") if reads_audio else ("encoder.resid_pre", "all")
    return {"audio": audio} | ({"last": ("decoder.resid_pre", "last")} if model.cfg.decoder else {})


def _mostly_shared(model: HookedAudioTransformer, items: Items, has_text: bool) -> bool:
    """Whether most items share answer, text and layout with another one."""
    classes = Layout.of(model, items, [], SIZE).classes
    texts = items.values("text") if has_text else [None] * len(items)
    keys = [*zip(classes, texts, (item.answer for item in items), strict=True)]
    counts = Counter(keys)
    return sum(counts[key] > 1 for key in keys) > len(items) / 2
