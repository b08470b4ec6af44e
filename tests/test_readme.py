"""Every Python block of the README and of the documentation runs, in order.

Pages of methods that take long are among the long tests; quick tests of the methods are their own.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = ("autoencoders", "defence", "encoder_lens", "fusion", "grounding", "knockout", "tap")


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.stem in LONG))
        for page in PAGES
    ],
)
def test_python_blocks_run(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def test_long_pages_are_there() -> None:
    assert set(LONG) < {page.stem for page in PAGES}
