"""What setup.cfg asks for, in lines that pip reads.

    python .ci/versions.py lowest    every lower bound as the exact version
    python .ci/versions.py newest    every name without any bound

The extra `peers` (other libraries, for benchmarks) is left out; from the lower bounds also `docs`,
whose tools pin each other closely.
"""

import configparser
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

SETUP = Path(__file__).parents[1] / "setup.cfg"
LEFT_OUT = {"lowest": ("peers", "docs"), "newest": ("peers",)}


def requirements(left_out: Collection[str]) -> Iterator[str]:
    """The lines of `install_requires` and of all other extras."""
    config = configparser.ConfigParser()
    config.read(SETUP)
    extras = config["options.extras_require"]
    asked = [config["options"]["install_requires"]]
    asked += [lines for name, lines in extras.items() if name not in left_out]
    for lines in asked:
        yield from filter(None, lines.splitlines())


def lowest(requirement: str) -> str:
    """``name==version`` of a requirement's lower bound.

    Raises:
        ValueError: it has none.
    """
    found = re.match(r"([\w.-]+)(?:\[.*?\])?>=([\w.]+)", requirement)
    if found is None:
        raise ValueError(f"{requirement} has no lower bound")
    return f"{found[1]}=={found[2]}"


def name(requirement: str) -> str:
    """A requirement's name, with its extras."""
    return re.match(r"[\w.-]+(?:\[.*?\])?", requirement)[0]


if __name__ == "__main__":
    forms = {"lowest": lowest, "newest": name}
    if len(sys.argv) != 2 or sys.argv[1] not in forms:
        sys.exit(__doc__)
    lines = {forms[sys.argv[1]](one) for one in requirements(LEFT_OUT[sys.argv[1]])}
    print("\n".join(sorted(lines)))
