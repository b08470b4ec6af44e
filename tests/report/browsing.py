"""What tests of pages in a browser share (see the fixture ``browse``)."""

from browsers import until as until

PLACE = """([x, y, xaxis, yaxis]) => {
  const { left, top } = plot.getBoundingClientRect();
  const axes = plot._fullLayout;
  const along = (axis, value) => axis._offset + axis.d2p(value);
  return [left + along(axes[xaxis], x), top + along(axes[yaxis], y)];
}"""


def at(page, x, y, yaxis: str, xaxis: str = "xaxis") -> tuple[float, float]:
    """Where a place of the picture (in units of its axes) lies on the screen."""
    return page.evaluate(PLACE, [x, y, xaxis, yaxis])


def last_sound(page, count: int) -> dict:
    """The last of ``count`` sounds that the page has played: from, length, rate, samples."""
    until(page, f"started.length === {count}")
    return page.evaluate("started.at(-1)")
