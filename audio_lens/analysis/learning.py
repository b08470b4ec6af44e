"""Linear learners by scikit-learn, and the folds by which they are tested on other groups."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from audio_lens.errors import ExtraError, InputError
from audio_lens.items import ItemError

Tests = Sequence[Int[np.ndarray, " _"]]
Strength = float | int | Sequence[float | int]
CLASSIFIERS, REGRESSIONS = ("logistic", "mass_mean"), ("ridge",)


def sklearn(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        ExtraError: where it is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ExtraError("probes need scikit-learn: pip install 'audio_lens[probe]'") from error


def learner(kind: str, strength: Strength, groups: int) -> Any:
    """A learner that standardises what it is fitted on.

    Args:
        kind: "logistic", a multinomial logistic regression; "mass_mean", means of the classes with
            their common covariance (shrunk after Ledoit and Wolf); "ridge", for numbers.
        strength: of the penalty on weights; of several, that which does best on groups left out of
            those that are fitted on. Mass-mean probes have none.
        groups: how many there are to leave out.
    """
    linear = sklearn("linear_model")
    if kind == "mass_mean":
        within = sklearn("discriminant_analysis").LinearDiscriminantAnalysis
        return _standardised(within(solver="lsqr", shrinkage="auto"))
    strengths = [strength] if isinstance(strength, (int, float)) else list(strength)
    made, name, values = (
        (linear.LogisticRegression(max_iter=1000), "C", [1 / one for one in strengths])
        if kind == "logistic"
        else (linear.Ridge(), "alpha", strengths)
    )
    if len(values) == 1:
        return _standardised(made.set_params(**{name: values[0]}))
    selection = sklearn("model_selection")
    splitter = selection.GroupKFold(min(3, groups))
    return selection.GridSearchCV(
        _standardised(made),
        {f"{type(made).__name__.lower()}__{name}": values},
        cv=splitter,
        scoring="balanced_accuracy" if kind == "logistic" else "r2",
    )


def _standardised(made: Any) -> Any:
    return sklearn("pipeline").make_pipeline(sklearn("preprocessing").StandardScaler(), made)


def folds(
    y: Sequence[Any], groups: Sequence[Hashable], count: int, seed: int, stratified: bool
) -> list[Int[np.ndarray, " _"]]:
    """The rows that each fold tests: of no group is one tested and another fitted on.

    Raises:
        ItemError: one group alone.
    """
    numbers = numbered(groups)
    n_groups = len(set(numbers.tolist()))
    if n_groups < 2:
        raise ItemError(f"all items are of group {groups[0]!r}: a probe is tested on others")
    selection = sklearn("model_selection")
    kind = selection.StratifiedGroupKFold if stratified else selection.GroupKFold
    splitter = kind(min(count, n_groups), shuffle=True, random_state=seed)
    own = numbered(y) if stratified else None
    parts = splitter.split(np.zeros(len(y)), own, numbers)
    return [test for _, test in parts if len(test)]


def numbered(values: Sequence[Hashable]) -> Int[np.ndarray, " n"]:
    """Values as numbers, equal where they are."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(one, len(known)) for one in values])


def predicted(
    x: Float[np.ndarray, "n d"],
    y: Shaped[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    tests: Tests,
    kind: str,
    strength: Strength,
) -> Shaped[np.ndarray, " n"]:
    """What is said of every row by a learner that saw none of its group."""
    said = np.empty_like(y)
    for test in tests:
        fitted_on = np.setdiff1d(np.arange(len(y)), test)
        own = y[fitted_on]
        if kind not in REGRESSIONS and len(set(own.tolist())) < 2:
            said[test] = own[0]
            continue
        made = learner(kind, strength, len(set(groups[fitted_on].tolist())))
        grouped = {"groups": groups[fitted_on]} if hasattr(made, "cv") else {}
        said[test] = made.fit(x[fitted_on], own, **grouped).predict(x[test])
    return said


def check_kind(kind: str | None, numbers: bool) -> str:
    """The kind of learner; None takes what fits the labels.

    Raises:
        InputError: another kind.
    """
    known = (*CLASSIFIERS, *REGRESSIONS)
    if kind is None:
        return "ridge" if numbers else "logistic"
    if kind not in known:
        raise InputError(f"kind is one of {', '.join(known)}, or None, got {kind!r}")
    return kind
