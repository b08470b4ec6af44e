"""One self-contained HTML page: see a clip and its map on one seconds axis, and listen to it."""

from __future__ import annotations

import base64
import functools
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from audio_lens import audio as audio_io
from audio_lens.audio import AudioSource
from audio_lens.patching.result import SweepResult
from audio_lens.report.figures import Clip, draw_map, page_figure
from audio_lens.timeline import Span

ROUNDING_S = 0.05  # windows end on frames, a little after the audio
SENTENCES = {
    "denoise": (
        "Activations of the clean run were put into the corrupted run. Effect 0: still answers as "
        "for the corrupted clip; effect 1: answers as for the clean one."
    ),
    "noise": (
        "Activations of the corrupted run were put into the clean run. Effect 0: still answers as "
        "for the clean clip; effect 1: answers as for the corrupted one."
    ),
}


def map_page(
    result: SweepResult,
    audio: AudioSource,
    path: str | Path,
    *,
    words: Sequence[Span] = (),
    corrupted_audio: AudioSource | None = None,
    corrupted_words: Sequence[Span] = (),
    title: str = "Where the model listens",
    sampling_rate: int = 16_000,
    quantity: str = "effect",
    metric: str | None = None,
) -> Path:
    """Write the map of a sweep under its clip's waveform and spectrogram, with sound.

    The file needs no network: plotly.js (compressed), sound and data are inside. Clicking a cell
    plays its stretch of audio. Several stimuli are averaged; select one to see it alone.

    Args:
        result: a sweep of one or two axes.
        audio: the clean clip: a path, or samples at ``sampling_rate`` Hz.
        path: the HTML file to write.
        words: labelled stretches of the clean clip, in seconds.
        corrupted_audio: the other clip of the pair; the page switches between both.
        corrupted_words: labelled stretches of the other clip.
        title: headline of the page.
        sampling_rate: rate in Hz of the samples and of the sound in the page.
        quantity: what the colours show: "effect", "recovery" or "value".
        metric: which metric, where the sweep had several.

    Returns:
        The path written.

    Raises:
        ValueError: for three axes or several metrics (select one), unreadable audio, or windows
            that lie beyond its end.
    """
    sources = [("clean", audio, words), ("corrupted", corrupted_audio, corrupted_words)]
    clips = [
        Clip(name, _samples(source, sampling_rate), sampling_rate, spoken)
        for name, source, spoken in sources
        if source is not None
    ]
    one = result if metric is None else result.select(metric=metric)
    drawn = draw_map(one, quantity)
    _check_windows(drawn.windows, clips[0])
    windows = [span and [span.start_s, span.end_s] for span in drawn.windows]
    page = (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            sentence=SENTENCES[result.direction],
            facts=_facts(result, one),
            notes=result.report,
            cells=one.top(10),
            clips=[(clip.name, wav_uri(clip)) for clip in clips],
            figure=page_figure(drawn, quantity, clips).to_json(),
            windows=windows,
            plotly_gz=_plotly_gz(),
        )
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _samples(source: AudioSource, sampling_rate: int) -> Float[np.ndarray, " samples"]:
    """Mono samples at the rate; arrays have it already, files know their own."""
    is_file = isinstance(source, (str, Path))
    return audio_io.load(source, sampling_rate, None if is_file else sampling_rate)


def _check_windows(windows: Sequence[Span | None], clip: Clip) -> None:
    """Raise if windows lie beyond the end of the clip: it is another one, or has another rate."""
    last = max((span.end_s for span in windows if span and span.clip == 0), default=0.0)
    if last > clip.seconds + ROUNDING_S:
        raise ValueError(
            f"the windows of the map reach to {last:.2f} s, but the audio is {clip.seconds:.2f} s "
            f"long at {clip.sampling_rate} Hz: pass the clip of the sweep, and sampling_rate= of "
            "its samples"
        )


def wav_uri(clip: Clip) -> str:
    """The clip as a 16-bit wav in a data URI."""
    wav = io.BytesIO()
    soundfile.write(wav, clip.samples, clip.sampling_rate, format="WAV", subtype="PCM_16")
    return "data:audio/wav;base64," + base64.b64encode(wav.getvalue()).decode()


def _facts(result: SweepResult, one: SweepResult) -> dict[str, str]:
    """What the page says about the sweep, in the order shown."""
    baselines = one.mean()
    facts = {
        "site": result.site,
        "direction": result.direction,
        "axes": " by ".join(result.axes),
        "metric, clean run": f"{baselines.clean.item():.4g}",
        "metric, corrupted run": f"{baselines.corrupted.item():.4g}",
    }
    if "stimulus" in one.dims:
        facts["mean of"] = f"{len(one.coords['stimulus'])} stimuli"
    return facts | result.meta


@functools.cache
def _plotly_gz() -> str:
    """plotly.js, compressed and in base64: 2 MB in place of 4.8."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("audio_lens.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
