"""Fixtures shared by all tests; the helpers behind them are in tiny.py.

The package is imported in fixtures: the process that starts the workers needs none of it.
"""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors; the workers share the cores

import hypothesis
import jaxtyping
import pytest

import type_checks

if TYPE_CHECKING:
    from audio_lens import HookedAudioTransformer

pytest_plugins = ["share", "browsers", "pytester"]

CHECKED = 8  # one in so many long tests runs with the checks of types
CHECKED_CASES = 3  # one in so many quick cases of tests that have several

type_checks.install()

hypothesis.settings.register_profile("audio_lens", deadline=None, derandomize=True)
hypothesis.settings.load_profile("audio_lens")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """What is imported and collected stays, so nobody looks for garbage in it, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Only some tests run with the checks of types, which take time."""
    jaxtyping.config.update("jaxtyping_disable", not is_checked(item))
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def is_checked(item: pytest.Item) -> bool:
    """Whether types are checked: where nothing says `unchecked`, in quick tests of one case, in one
    quick case in 3 of others, and in one long test in 8.

    The others run as users run the library.
    """
    if item.get_closest_marker("unchecked"):
        return False
    is_case = hasattr(item, "callspec")
    share = CHECKED if item.get_closest_marker("slow") else CHECKED_CASES if is_case else 1
    return zlib.crc32(item.nodeid.encode()) % share == 0


@pytest.fixture(params=("whisper", "qwen2_audio"))  # tiny.FAMILIES
def family(request: pytest.FixtureRequest) -> str:
    """Runs the test once per family."""
    return request.param


@pytest.fixture
def model(family: str) -> HookedAudioTransformer:
    """A tiny random model of the family."""
    import tiny
    from audio_lens import HookedAudioTransformer

    return HookedAudioTransformer.from_hf(tiny.tiny_hf(family))


@pytest.fixture
def inputs(family: str) -> dict:
    """A batch for `model`: two prompts of unequal length, as a Hugging Face processor returns."""
    import tiny

    return tiny.hf_inputs(family)


@pytest.fixture(scope="session")
def embedded() -> HookedAudioTransformer:
    """The checkpoint shipped with the package."""
    from audio_lens import HookedAudioTransformer

    return HookedAudioTransformer.from_pretrained("embedded")


@pytest.fixture
def data_dir() -> Path:
    """The folder of real speech and weights; the test is skipped where it is missing."""
    import tiny

    return tiny.data_dir()
