"""What `import audio_lens` gives: names of one list, on first use, and exceptions of one base."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

import audio_lens
from audio_lens import AudioLensError


def test_every_public_name_is_there() -> None:
    assert set(dir(audio_lens)) == set(audio_lens.__all__)
    for name in audio_lens.__all__:
        assert getattr(audio_lens, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        audio_lens.no_such_name  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    assert audio_lens.__version__ == version("audio_lens")


def test_importing_it_imports_no_torch() -> None:
    found = "import audio_lens, sys; print({'torch', 'jax', 'transformers'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def raised_by(module: ModuleType) -> set[type[Exception]]:
    """The exception classes of the library that a module knows."""
    classes = (one for _, one in inspect.getmembers(module, inspect.isclass))
    return {
        c for c in classes if issubclass(c, Exception) and c.__module__.startswith("audio_lens")
    }


def test_all_exceptions_share_a_base() -> None:
    names = [one.name for one in pkgutil.walk_packages(audio_lens.__path__, "audio_lens.")]
    modules = [importlib.import_module(name) for name in names if ".training" not in name]
    raised = set[type[Exception]]().union(*map(raised_by, modules)) - {AudioLensError}
    assert len(raised) > 15
    assert [one for one in raised if not issubclass(one, AudioLensError)] == []
    assert [one for one in raised if len(one.__bases__) < 2] == []  # a built-in exception, too
