"""The illusion of subspaces: one that does more than the whole site it lies in (2311.17030)."""

from __future__ import annotations

import math

from audio_lens.results import Result

DORMANT = 0.1  # of recovery or accuracy beyond that of the whole site, from which on it is warned


def dormant(done: Result, whole: Result, what: str) -> list[str]:
    """A warning where a subspace does more than all that is at its site.

    A direction that joins what varies and is not read with what is read and does not vary lets a
    patch act through the latter: in no run of the model does the site do that.

    Args:
        done: recoveries or accuracies of subspaces.
        whole: of the whole site, in all the cells of ``done`` or in one.
        what: the warning begins with it.
    """
    inside, all_there_is = done.mean().values, whole.mean().values
    more = (inside - all_there_is).nan_to_num(nan=-math.inf).flatten()
    if not bool((more > DORMANT).any()):
        return []
    at = int(more.argmax())
    own, beside = (x.expand_as(inside).flatten()[at] for x in (inside, all_there_is))
    return [
        f"{what}: the subspace does more ({own:.3g}) than the whole site does ({beside:.3g}): it "
        "may work through a pathway that the model itself does not use"
    ]
