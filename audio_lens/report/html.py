"""Pages that need nothing but themselves: plotly.js, data and sound packed into one HTML file."""

from __future__ import annotations

import base64
import functools
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.basedatatypes import BaseTraceType
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from audio_lens.drawing.clips import flac
from audio_lens.drawing.rows import Rows
from audio_lens.files import write


def write_page(
    path: str | Path, template: str, rows: Rows, data: dict[str, Any], *, height: int, **shown: Any
) -> Path:
    """Write a page of clips with panels below them.

    Args:
        path: the file to write.
        template: a template of this folder that extends ``base.html``.
        rows: the clips; their sound and their traces are what scripts find as ``data.clips``.
        data: what else scripts find in ``data``, as plain JSON.
        height: of the picture in pixels, which the page keeps free until it is drawn.
        shown: what the template shows; strings are escaped.
    """
    clips = [
        {
            "name": clip.name,
            "bounds": clip.bounds,
            "traces": traces_json(rows.traces(index)),
            "flac": flac(clip) if index < 2 else None,  # the difference is taken in the page
        }
        for index, clip in enumerate(rows.clips)
    ]
    heard = {"clips": clips, "rate": rows.clips[0].sampling_rate}
    names = [clip.name for clip in rows.clips]
    return write_drawn(path, template, heard | data, clips=names, height=height, **shown)


def write_drawn(path: str | Path, template: str, data: dict[str, Any], **shown: Any) -> Path:
    """Write a page without clips; its template extends ``frame.html``."""
    drawn = {"data_gz": _packed(str(to_json_plotly(data))), "plotly_gz": _plotly_gz()}
    page = _environment().get_template(template).render(**drawn, **shown)
    return write(path, page.encode())


def traces_json(traces: Sequence[BaseTraceType]) -> list[dict[str, Any]]:
    """Traces as plotly.js takes them, with arrays of numbers as base64."""
    return go.Figure(list(traces)).to_dict()["data"]


@functools.cache
def _plotly_gz() -> str:
    """plotly.js: 2 MB in place of 4.8."""
    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("audio_lens.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
