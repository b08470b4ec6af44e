"""Which cases of a test are long, and a seeded share of them.

``@pytest.mark.mostly_slow(6)`` leaves one case in 6 of a test (at least one, and a share of each
family) to the quick runs and marks the others slow. Cases that are marked slow in another way stay
so and are not counted.

``pytest -m slow --share 6`` runs a sixth of the long tests. Which sixth is a matter of the seed,
drawn from the clock unless ``--share-seed`` gives it. The run says both options as they are pasted
to run the same share again; seeds 0 to 5 together, 6 to 11 and so on, run every test. Of the cases
of a test each family has its share. Tests with fewer cases than shares are taken together, file by
file and in their order, as neighbours often share what took long to compute: a sixth of them runs,
of a file with fewer than six perhaps none. Tests not marked slow are not touched.

What is chosen of a file's tests depends on them alone, not on other files, ``-k`` or ``-m``, and
all workers of pytest-xdist choose the same.
"""

from __future__ import annotations

import random
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import pytest

MARK = "slow"
THINNED = "mostly_slow"
SEED_S = 3600  # seconds until another seed is drawn
COUNTS = pytest.StashKey[tuple[int, int]]()  # long tests that run, and all there are


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("share", "a share of the long tests")
    group.addoption(
        "--share", type=positive, metavar="N", help=f"run one in N of the tests marked {MARK}"
    )
    group.addoption(
        "--share-seed", type=int, metavar="SEED", help="which share it is (drawn from the clock)"
    )


def positive(text: str) -> int:
    """A whole number of 1 or more.

    Raises:
        ValueError: it is none.
    """
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed, before workers get the options of the process that starts them."""
    if config.option.share and config.option.share_seed is None:
        config.option.share_seed = int(time.time() // SEED_S)


# -------------------------------------------------------------------------------- the choice


def chosen(cases: Sequence[tuple[str, str]], share: int, seed: int) -> set[str]:
    """Names of one in ``share`` of a test's cases, given as family and name; at least one.

    The cases of each family are shuffled and every ``share``-th is taken, running on from family to
    family. ``share`` seeds in a row, from a multiple of ``share``, take each case at least once.
    """
    turn, first = divmod(seed, share)
    order = sorted(cases, key=lambda case: (case[0], random.Random(f"{turn} {case[1]}").random()))
    taken = order[first::share] or [order[first % len(order)]]
    return {name for _, name in taken}


def in_turn(count: int, share: int, seed: int, name: str) -> list[int]:
    """Which of ``count`` things in a row are of this share, perhaps none: each is of one share.

    The name says which share the row begins with, lest those of short rows be the same.
    """
    begins = zlib.crc32(name.encode()) % share
    return [at for at in range(count) if (at * share // count + begins - seed) % share == 0]


def family_of(item: pytest.Item) -> str:
    """The family a case is of, as its parameter ``family`` says; else nothing."""
    call = getattr(item, "callspec", None)
    family = call.params.get("family", "") if call else ""
    return getattr(family, "name", str(family))


def test_of(item: pytest.Item) -> str:
    """The id of a case without its parameters."""
    return f"{item.parent.nodeid}::{getattr(item, 'originalname', item.name)}"


def left_out_of(cases: Sequence[pytest.Item], share: int, seed: int) -> set[pytest.Item]:
    """The cases of one test that are not among those `chosen`."""
    named = {item.name: item for item in cases}  # which pytest-xdist does not change
    kept = chosen([(family_of(item), name) for name, item in named.items()], share, seed)
    return {item for name, item in named.items() if name not in kept}


def by_test(items: Iterable[pytest.Item]) -> Iterator[list[pytest.Item]]:
    """The cases of each test."""
    for _, cases in groupby(sorted(items, key=test_of), test_of):
        yield list(cases)


def left_out_of_all(long: Sequence[pytest.Item], share: int, seed: int) -> set[pytest.Item]:
    """The long tests that are not of the share."""
    left_out: set[pytest.Item] = set()
    few: dict[str, list[pytest.Item]] = {}  # by file, of tests with fewer cases than shares
    counts = Counter(map(test_of, long))
    for cases in by_test(item for item in long if counts[test_of(item)] >= share):
        left_out |= left_out_of(cases, share, seed)
    for item in long:
        if counts[test_of(item)] < share:
            few.setdefault(item.location[0], []).append(item)
    for file, row in few.items():
        left_out |= {*row} - {row[at] for at in in_turn(len(row), share, seed, file)}
    return left_out


def thin(items: Iterable[pytest.Item]) -> None:
    """Mark what `THINNED` says is long."""
    marked = (item for item in items if item.get_closest_marker(THINNED))
    for cases in by_test(item for item in marked if not item.get_closest_marker(MARK)):
        (share,) = cases[0].get_closest_marker(THINNED).args
        for item in left_out_of(cases, share, seed=0):
            item.add_marker(MARK)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thin(items)
    share = config.option.share
    if not share:
        return
    long = [item for item in items if item.get_closest_marker(MARK)]
    left_out = left_out_of_all(long, share, config.option.share_seed)
    config.stash[COUNTS] = (len(long) - len(left_out), len(long))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


# -------------------------------------------------------------------------------- what is told


def told(config: pytest.Config) -> str:
    """The share in words, with the options that choose it again."""
    options = f"--share {config.option.share} --share-seed {config.option.share_seed}"
    counts = config.stash.get(COUNTS, None)
    which = f"{counts[0]} of {counts[1]}" if counts else f"one in {config.option.share}"
    return f"share: {which} long tests, again with {options}"


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Said at once, for runs that do not come to their end."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and session.config.option.share:
        reporter.write_line(told(session.config))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.option.share:
        terminalreporter.write_line(told(config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that started it."""
    counts = session.config.stash.get(COUNTS, None)
    if counts and hasattr(session.config, "workeroutput"):
        session.config.workeroutput["share"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    counts = getattr(node, "workeroutput", {}).get("share")
    if counts:
        node.config.stash[COUNTS] = counts
