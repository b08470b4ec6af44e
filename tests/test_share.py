"""The seeded share of the long tests: what it holds, that it comes again, that runs say it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from share import chosen, in_turn

FAMILIES = {"small": 2, "whisper": 6, "moshi": 13, "beats": 40}
CASES = [(name, f"test[{name}-{i}]") for name, count in FAMILIES.items() for i in range(count)]
SUITE = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("family", ["a", "b", "c", "d"])
def test_long(family, way): pass

@pytest.mark.slow
def test_one(): pass

@pytest.mark.parametrize("lot", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_both(lot): pass

def test_quick(): pass
"""
THINNED = """
import pytest

@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("way", [*range(3), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["a", "b", "c", "d"])
def test_thinned(family, way): pass

@pytest.mark.mostly_slow(4)
def test_alone(): pass
"""


# -------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("seed", [0, 5, 77, 491_237])
def test_a_share_is_a_share_of_every_family(seed: int) -> None:
    taken = chosen(CASES, 6, seed)
    assert len(taken) in (len(CASES) // 6, len(CASES) // 6 + 1)
    for family, count in FAMILIES.items():
        of_family = sum(name.startswith(f"test[{family}-") for name in taken)
        assert count // 6 <= of_family <= -(-count // 6)


@pytest.mark.parametrize("count", [1, 3, 6, 61])
def test_the_seeds_of_a_turn_choose_every_case(count: int) -> None:
    cases = CASES[:count]
    shares = [chosen(cases, 6, seed) for seed in range(12, 18)]
    assert all(shares) and set.union(*shares) == {name for _, name in cases}
    assert count < 6 or sum(map(len, shares)) == count


def test_the_seed_alone_decides() -> None:
    assert chosen(CASES, 6, 8) == chosen(CASES[::-1], 6, 8)
    assert len({frozenset(chosen(CASES, 6, seed)) for seed in range(60)}) == 60
    assert chosen(CASES, 1, 8) == {name for _, name in CASES}


@pytest.mark.parametrize("count", [1, 4, 6, 15])
def test_the_seeds_of_a_turn_choose_each_of_a_row_once(count: int) -> None:
    shares = [in_turn(count, 6, seed, "tests/test_row.py") for seed in range(12, 18)]
    assert sorted(at for share in shares for at in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share == list(range(share[0], share[-1] + 1)) for share in shares if share)


def test_short_rows_are_not_all_of_one_share() -> None:
    of_one = [len(in_turn(1, 6, 0, f"tests/test_{name}.py")) for name in range(120)]
    assert 10 <= sum(of_one) <= 30


# -------------------------------------------------------------------------------- runs


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A small suite under the plugin."""
    pytester.makepyfile(SUITE)
    pytester.makeconftest('pytest_plugins = ["share"]')
    pytester.makeini(
        f"[pytest]\npythonpath = {Path(__file__).parent}\nmarkers =\n    slow: long\n"
        "    mostly_slow(n): most are\n"
        "addopts = -q --strict-markers -p no:cacheprovider\n"
    )
    return pytester


def run(suite: pytest.Pytester, *options: str) -> tuple[set[str], tuple[str, str] | str]:
    """Names of the tests that passed, none having failed; the count and options that were said."""
    result = suite.runpytest_inprocess("-rp", *options)
    assert result.ret == 0
    text = result.stdout.str()
    (told,) = set(re.findall(r"^share: (\d+ of \d+) .* (--share .*)$", text, re.MULTILINE)) or [""]
    return set(re.findall(r"^PASSED \S*::([^@\s]+)", text, re.MULTILINE)), told


def test_workers_run_the_share_that_one_process_does(suite: pytest.Pytester) -> None:
    alone, (counts, options) = run(suite, "-m", "slow", "--share", "3")
    assert re.fullmatch(r"--share 3 --share-seed \d+", options)
    assert counts == f"{len(alone)} of 14" and len(alone) in (4, 5)
    assert {name[10] for name in alone if "long" in name} == set("abcd")
    workers = ("-n", "2", "--dist", "loadfile")
    assert run(suite, "-m", "slow", *workers, *options.split()) == (alone, (counts, options))


def test_only_long_tests_are_left_out(suite: pytest.Pytester) -> None:
    names, _ = run(suite, "--share", "12", "--share-seed", "0")
    assert {"test_quick", "test_both[0]"} <= names
    assert sum("long" in name for name in names) == 1
    everything, told = run(suite)
    assert len(everything) == 16 and not told


def test_the_shares_of_a_turn_are_all_long_tests_once(suite: pytest.Pytester) -> None:
    shares = [
        run(suite, "-m", "slow", "--share", "3", "--share-seed", f"{i}")[0] for i in (3, 4, 5)
    ]
    everything, _ = run(suite, "-m", "slow")
    assert set.union(*shares) == everything and sum(map(len, shares)) == len(everything) == 14


def test_the_share_does_not_depend_on_what_else_is_asked(suite: pytest.Pytester) -> None:
    options = ("--share", "4", "--share-seed", "6")
    names, _ = run(suite, "-m", "slow", *options)
    some, _ = run(suite, "-k", "long", *options)
    assert some == {name for name in names if "long" in name}


@pytest.mark.parametrize("share", ["0", "-1", "half"])
def test_no_share_at_all_is_refused(suite: pytest.Pytester, share: str) -> None:
    result = suite.runpytest_inprocess("--share", share)
    assert result.ret == pytest.ExitCode.USAGE_ERROR


# -------------------------------------------------------------------------------- thinned


def test_most_cases_of_a_thinned_test_are_long(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_thinned=THINNED)
    quick, _ = run(suite, "test_thinned.py", "-m", "not slow")
    long, _ = run(suite, "test_thinned.py", "-m", "slow")
    assert len(quick) == 3 + 1 and "test_alone" in quick and len(long) == 4 + 9
    assert len({name[13] for name in quick if name != "test_alone"}) == 3  # families
    assert not quick & long and not any(name.endswith("-3]") for name in quick)


@pytest.mark.slow
def test_workers_leave_the_same_cases_to_quick_runs(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_thinned=THINNED)
    quick = ("test_thinned.py", "-m", "not slow")
    assert run(suite, *quick, "-n", "2", "--dist", "loadfile") == run(suite, *quick)
