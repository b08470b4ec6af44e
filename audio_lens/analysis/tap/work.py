"""The stages of Temporal Attribution Patching over some pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from audio_lens import patching
from audio_lens.analysis.fusion.recovery import metrics_of_part
from audio_lens.analysis.tap import agreement, choose, confirm, pairing, place, search
from audio_lens.analysis.tap.claims import claims_of
from audio_lens.analysis.tap.grids import grid
from audio_lens.analysis.tap.nodes import (
    HEAD,
    WINDOW,
    Kind,
    Node,
)
from audio_lens.analysis.tap.pairing import OWN
from audio_lens.analysis.tap.readable import compared, probed
from audio_lens.analysis.tap.report import MAP, Report
from audio_lens.analysis.tap.stages import Part, Stages
from audio_lens.errors import AudioLensError, InputError
from audio_lens.identity import NoIdentityError, identity_of
from audio_lens.items import Items, Pairs
from audio_lens.models import HookedAudioTransformer
from audio_lens.patching.engine.checkpoint import CheckpointError
from audio_lens.progress import track
from audio_lens.provenance import versions, weights_hash
from audio_lens.results import Result

GRADIENT = "logit_diff"  # the metric of estimates, where there is such: linear in the logits
MAPS = {WINDOW: MAP, HEAD: "map_heads"}  # connector windows enter the first block as they are
LOCATING = ("pairs", "search", "choice", "map", "confirm", "claims")
FOLLOWING = ("hand_over", "subspace", "scrubbing", "readable")
STAGES = (*LOCATING, *FOLLOWING)


@dataclass(eq=False)
class Study:
    """The stages over some pairs.

    Attributes:
        families: the pairs under every corruption, their own counterparts first.
        metrics: of all pairs.
    """

    model: HookedAudioTransformer
    families: dict[str, Pairs[Items]]
    metrics: dict[str, Any]
    kinds: list[Kind]
    k: int | None = None
    rank: int = 16
    size: int = 64
    seed: int = 0
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def gradient(self) -> str:
        """The metric of estimates."""
        return GRADIENT if GRADIENT in self.metrics else next(iter(self.metrics))

    def identity(self, asked: Mapping[str, str], metrics: Any) -> dict[str, str]:
        """What makes this study no other.

        Raises:
            CheckpointError: a metric that nobody can know again.
        """
        try:
            measured = "items'" if metrics is None else identity_of(self.metrics)
        except NoIdentityError as error:
            raise CheckpointError(f"checkpoint=: {error}") from error
        clips = {name: digest(one) for name, one in self.families.items()}
        return {
            "weights": weights_hash(self.model),
            "items": "; ".join(f"{name}: {digest}" for name, digest in clips.items()),
            "metric": measured,
            "audio_lens": versions()["audio_lens"],
            **asked,
        }

    def run(
        self, kept: Stages, stages: Sequence[str], progress: bool | None = False
    ) -> dict[str, Part]:
        """All stages, as far as there is something to look at."""
        made: dict[str, Callable[[], Part]] = {name: getattr(self, f"_{name}") for name in stages}
        with track("tap", len(stages), "stages", show=progress) as advance:
            for number, name in enumerate(stages, start=1):
                self.parts[name] = kept.done(name, made[name])
                advance(1, number)
                if not self.parts["pairs"].facts["hold"]:
                    break
        return dict(self.parts)

    # ---------------------------------------------------------------- which pairs

    def _pairs(self) -> Part:
        roles = pairing.roles_of(self.model, self.families[OWN], self.size)
        facts: dict[str, Any] = {
            "hold": roles.hold,
            "notes": [f"Of {len(self.families[OWN])} pairs {roles}."],
        }
        facts |= {"n_kept": 0 if roles.kept is None else len(roles.kept)}
        facts |= {"dropped": roles.dropped.counts}
        if roles.kept is None or not roles.hold:
            return Part(facts=facts | {"hold": False})
        searched, confirmed = pairing.parts_of(roles.kept, self.seed)
        kept = {OWN: _names(confirmed)}
        for name, pairs in self.families.items():
            if name == OWN:
                continue
            family, left = pairing.kept_or_none(self.model, _of(pairs, kept[OWN]), self.size)
            kept[name] = [] if family is None else _names(family)
            facts["notes"].append(
                f"Corrupted by {name}, {len(kept[name])} of the {len(confirmed)} pairs that are "
                f"confirmed on are left ({left})."
            )
        facts["notes"].append(
            f"{len(searched)} pairs are searched, {len(confirmed)} others are confirmed on."
        )
        return Part(facts=facts | {"searched": _names(searched), "confirmed": kept})

    @cached_property
    def searched(self) -> Pairs[Items]:
        """The pairs that are looked at first."""
        return _of(self.families[OWN], self.parts["pairs"].facts["searched"])

    @cached_property
    def confirmed(self) -> dict[str, Pairs[Items]]:
        """The others, by corruption; without corruptions that leave none."""
        held = self.parts["pairs"].facts["confirmed"]
        return {name: _of(self.families[name], names) for name, names in held.items() if names}

    def _measured(self, part: Pairs[Items], only: str | None = None) -> dict[str, Any]:
        """The metrics of some pairs."""
        every = metrics_of_part(self.metrics, self.families[OWN], part)
        return every if only is None else {only: every[only]}

    @property
    def _how(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "progress": False}

    # ---------------------------------------------------------------- where

    def _search(self) -> Part:
        pairs = self.searched
        metric = self._measured(pairs, self.gradient)
        results = {
            f"estimate_{kind.name}": search.as_result(
                kind,
                grid(patching.attribute, self.model, pairs, kind, metric, self.size),
                _names(pairs),
                self.gradient,
            )
            for kind in self.kinds
        }
        return Part(results)

    def _ranking(self) -> dict[str, list[Node]]:
        most = choose.MOST if self.k is None else self.k
        return {kind.name: search.ranked(kind, self._estimated(kind), most) for kind in self.kinds}

    def _estimated(self, kind: Kind) -> Any:
        return self.parts["search"].results[f"estimate_{kind.name}"].mean().values

    def _choice(self) -> Part:
        ranking = self._ranking()
        if not any(ranking.values()):
            raise InputError(
                "no layer has two nodes of one kind, of which one could be compared with the other:"
                " take narrower windows or more kinds"
            )
        curves = choose.choice(
            self.model,
            self.searched,
            self.kinds,
            ranking,
            self._measured(self.searched, self.gradient),
            **self._how,
        )
        chosen = {
            name: choose.chosen_k(curve) if self.k is None else len(ranking[name])
            for name, curve in curves.items()
        }
        told = ", ".join(f"{count} of kind {name}" for name, count in chosen.items())
        how = "chosen on the pairs that are searched" if self.k is None else "as asked"
        results = {f"choice_{name}": curve for name, curve in curves.items()}
        return Part(results, {"k": chosen, "notes": [f"Tested are {told}: {how}."]})

    @cached_property
    def nodes(self) -> list[Node]:
        """The nodes that are tested."""
        chosen, ranking = self.parts["choice"].facts["k"], self._ranking()
        return [node for name, count in chosen.items() for node in ranking[name][:count]]

    def _map(self) -> Part:
        pairs = self.confirmed[OWN]
        metric = self._measured(pairs)
        results = {
            MAPS[kind.name]: confirm.exact_map(
                pairs,
                kind,
                grid(patching.sweep, self.model, pairs, kind, metric, self.size),
                list(metric),
            )
            for kind in self.kinds
            if kind.name in MAPS
        }
        return Part(results)

    def _confirm(self) -> Part:
        others = [
            node
            for kind in self.kinds
            for node in choose.matched(
                kind, [x for x in self.nodes if x.kind == kind.name], self.seed
            )
        ]
        results = {
            f"confirmed_{name}": confirm.tested(
                self.model, pairs, self.nodes, others, self._measured(pairs), **self._how
            )
            for name, pairs in self.confirmed.items()
        }
        return Part(results)

    def _claims(self) -> Part:
        held = self.parts["confirm"].results
        found = {name: held[f"confirmed_{name}"] for name in self.confirmed}
        estimated = {
            node: score
            for kind in self.kinds
            for node, score in search.score_of(kind, self._estimated(kind)).items()
        }
        claims = claims_of(self.nodes, estimated, found, self.seed)
        lost = [name for name in self.families if name not in found]
        if lost:
            why = f"no pair is left to test on when corrupted by {', '.join(lost)}"
            claims = [one.refused(why) for one in claims]
        at = place.Place.of(claims)
        n = sum(one.is_confirmed for one in claims)
        notes = [f"{n} of {len(claims)} nodes are confirmed."]
        notes += [] if at is None else [f"Followed is {at}."]
        facts = {"claims": [one.to_dict() for one in claims], "agreement": self._agreement(claims)}
        return Part(facts=facts | {"place": None if at is None else str(at), "notes": notes})

    def _agreement(self, claims: Sequence[Any]) -> dict[str, Any]:
        told = {}
        for kind in self.kinds:
            own = [one for one in claims if one.kind == kind.name]
            if kind.name not in MAPS:
                told[kind.name] = agreement.of_claims(own)
                continue
            told[kind.name] = agreement.of_grid(
                self.parts["search"].results[f"estimate_{kind.name}"],
                self.parts["map"].results[MAPS[kind.name]],
                self.gradient,
                len(own),
            )
        return told

    # ---------------------------------------------------------------- what is confirmed, followed

    @cached_property
    def place(self) -> place.Place | None:
        """The confirmed windows that are followed."""
        return place.Place.of(Report(self.parts).claims)

    def _hand_over(self) -> Part:
        pairs = self.confirmed[OWN]
        metric = self._measured(pairs, self.gradient)[self.gradient]

        def made() -> Part:
            results = place.handed_over(self.model, pairs, metric, seed=self.seed, progress=False)
            return Part(results, {"notes": results["hand_over"].report[:1]})

        return self._as_far("hand-over", made)

    def _subspace(self) -> Part:
        def made(at: place.Place) -> Part:
            results, few = place.in_subspace(
                self.model,
                (self.searched, self.confirmed[OWN]),
                at,
                tuple(map(self._measured, (self.searched, self.confirmed[OWN]))),
                self.rank,
                **self._how,
            )
            notes = place.transferred(results, few.rank, self.searched, self.confirmed[OWN])
            results["directions"] = place.written(few)
            return Part(results, {"rank": few.rank, "notes": notes})

        return self._at_place("subspace", made)

    def _scrubbing(self) -> Part:
        def made(at: place.Place) -> Part:
            held = self.parts["subspace"].results.get("directions")
            basis = None if held is None else held.values.float()
            results = place.scrubbed(self.model, self.confirmed[OWN], at, basis, **self._how)
            return Part(results, {"notes": [one.report[0] for one in results.values()]})

        return self._at_place("scrubbing", made)

    def _readable(self) -> Part:
        names = [*_names(self.searched), *_names(self.confirmed[OWN])]
        items = _of(self.families[OWN], names).clean
        parts = [
            self._at_place(name, lambda at, how=how, name=name: self._read(how, name, items, at))
            for name, how in {"probes": probed, "similarity": compared}.items()
        ]
        results = {name: one for part in parts for name, one in part.results.items()}
        return Part(results, {"notes": [x for part in parts for x in part.facts["notes"]]})

    def _read(self, how: Callable[..., Result], name: str, items: Items, at: place.Place) -> Part:
        result = how(self.model, items, at, **self._how)
        return Part({name: result}, {"notes": result.report[:1]})

    def _at_place(self, what: str, make: Callable[[place.Place], Part]) -> Part:
        at = self.place
        if at is None:
            return Part(facts={"notes": [f"{what} is left out: no window is confirmed."]})
        return self._as_far(what, lambda: make(at))

    def _as_far(self, what: str, make: Callable[[], Part]) -> Part:
        """A stage that some pairs or models do not allow; what it lacks is said."""
        try:
            return make()
        except AudioLensError as error:
            return Part(facts={"notes": [f"{what} is left out: {place.told_why(error)}"]})


def digest(pairs: Pairs[Items]) -> str:
    """A hash of both sides."""
    return f"{pairs.clean.digest()} {pairs.corrupted.digest()}"


def _names(pairs: Pairs[Items]) -> list[str]:
    return [item.id for item in pairs.clean]


def _of(pairs: Pairs[Items], names: Sequence[str]) -> Pairs[Items]:
    """The pairs of these names, in the order of the pairs."""
    wanted = set(names)
    return pairs[np.array([item.id in wanted for item in pairs.clean])]
