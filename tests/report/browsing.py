"""What tests of pages in a browser share (see the fixture ``browse``)."""

import time

PATIENCE_S = 20
PLACE = """([x, y, xaxis, yaxis]) => {
  const { left, top } = plot.getBoundingClientRect();
  const axes = plot._fullLayout;
  const along = (axis, value) => axis._offset + axis.d2p(value);
  return [left + along(axes[xaxis], x), top + along(axes[yaxis], y)];
}"""


def until(page, expression: str) -> None:
    """Wait until an expression is true in the page (whose policy forbids wait_for_function)."""
    deadline = time.monotonic() + PATIENCE_S
    while not page.evaluate(expression):
        if time.monotonic() > deadline:
            raise AssertionError(f"never came true: {expression}")
        page.wait_for_timeout(30)


def at(page, x, y, yaxis: str, xaxis: str = "xaxis") -> tuple[float, float]:
    """Where a place of the picture (in units of its axes) lies on the screen."""
    return page.evaluate(PLACE, [x, y, xaxis, yaxis])


def last_sound(page, count: int) -> dict:
    """The last of ``count`` sounds that the page has played: from, length, rate, samples."""
    until(page, f"started.length === {count}")
    return page.evaluate("started.at(-1)")
