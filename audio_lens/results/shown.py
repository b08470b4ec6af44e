"""What a prompt and a notebook show of a result: one line, and a small table."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

ROWS = 6  # the strongest cells that a notebook shows


def in_a_line(result: Any) -> str:
    """What it is of, its sizes, its baselines, and what stands beside it."""
    return f"{type(result).__name__} of {'; '.join(_pieces(result))}"


def as_table(result: Any) -> str:
    """The same, with the strongest cells of the first metric, for notebooks."""
    told = f"<p>{escape(in_a_line(result))}</p>"
    one = result.select(metric=result.coords["metric"][0]) if "metric" in result.dims else result
    cells = one.top(ROWS)
    columns = [name for name in (*one.quantities, "low", "high") if _has(cells, name)]
    if not columns:
        return told
    head = _row("th", ["", *(one.quantities.get(name, name) for name in columns)])
    rows = (_row("td", [x.place, *(f"{getattr(x, c):+.4g}" for c in columns)]) for x in cells)
    return f"{told}<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _pieces(result: Any) -> Iterator[str]:
    yield result.title or "one number"
    sizes = [f"{len(result.coords[dim])} {dim}" for dim in result.dims]
    yield " x ".join(sizes) or f"{result.values.item():.4g}"
    if "metric" not in result.dims:
        if "metric" in result.meta:
            yield result.meta["metric"]
        if baselines := result.baselines():
            yield ", ".join(f"{name} {value:.4g}" for name, value in baselines.items())
    if result.controls:
        yield f"beside {', '.join(result.controls)}"
    if result.n_kept is not None:
        dropped = f", {result.n_dropped} dropped" if result.n_dropped else ""
        yield f"{result.n_kept} items{dropped}"


def _has(cells: list[Any], name: str) -> bool:
    return bool(cells) and getattr(cells[0], name, None) is not None


def _row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
