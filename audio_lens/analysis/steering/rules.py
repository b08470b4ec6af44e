"""Rules of decoding from two runs: with and without the audio, or with and without a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.grounding.share import bare
from audio_lens.arguments import number
from audio_lens.edits.written import writable
from audio_lens.items import Items
from audio_lens.items.controls import no_audio
from audio_lens.models import HookedAudioTransformer

Logits = Float[Tensor, "b v"]


@dataclass(frozen=True)
class Rule(ABC):
    """How the logits of a run and of one beside it become those that are decoded.

    Attributes:
        strength: how much the run beside counts; 0 leaves the logits as they are.
    """

    strength: float | int
    name: ClassVar[str]
    strengths: ClassVar[tuple[float, ...]]  # that `contrast` tries by itself

    def __post_init__(self) -> None:
        number("strength", self.strength, least=0)

    @abstractmethod
    def beside(self, items: Items) -> Items:
        """The items of the run beside."""

    @abstractmethod
    def __call__(
        self, model: HookedAudioTransformer, own: Logits, other: Logits, step: int = 0
    ) -> Logits:
        """The logits that are decoded at a step, counted from the first written token."""


@writable
@dataclass(frozen=True)
class AAD(Rule):
    """Contrast with the audio absent (2506.07233): (1 + s) own - s silent.

    The run beside hears silence as long as the clip.
    """

    strength: float | int = 1.0
    name: ClassVar[str] = "AAD"
    strengths: ClassVar[tuple[float, ...]] = (0.5, 1.0, 2.0)

    def beside(self, items: Items) -> Items:
        return Items(no_audio(item) for item in items)

    def __call__(
        self, model: HookedAudioTransformer, own: Logits, other: Logits, step: int = 0
    ) -> Logits:
        return own + self.strength * (own - other)


@writable
@dataclass(frozen=True)
class TAD(Rule):
    """Doubt of one of two answers that the audio does not back, at the first written token.

    The margin of ``doubted`` over ``other`` is compared with its margin over silence. Where the
    audio adds less than ``tau`` to it, the doubted word loses ``strength`` logits.

    Attributes:
        doubted, over: the two answers, such as "yes" and "no".
        tau: how much the audio has to add, in logits.
    """

    strength: float | int = 2.5
    doubted: str = "yes"
    over: str = "no"
    tau: float = 0.2
    name: ClassVar[str] = "TAD"
    strengths: ClassVar[tuple[float, ...]] = (1.0, 2.5, 5.0)

    def beside(self, items: Items) -> Items:
        return Items(no_audio(item) for item in items)

    def __call__(
        self, model: HookedAudioTransformer, own: Logits, other: Logits, step: int = 0
    ) -> Logits:
        if step:
            return own
        one, two = (model.to_single_token(word) for word in (self.doubted, self.over))
        added = (own[:, one] - own[:, two]) - (other[:, one] - other[:, two])
        changed = own.clone()
        changed[:, one] -= self.strength * (added < self.tau).to(own)
        return changed


@writable
@dataclass(frozen=True)
class GACL(Rule):
    """Joint logits moved towards those of the same audio without the contradicting text.

    own + s gate (bare - own) (2606.05161). The published gate is not public; here it is open for
    prompts in which both runs prefer different tokens and the bare run gives its own a probability
    of ``sure`` or more.

    Attributes:
        sure: see above.
    """

    strength: float | int = 1.0
    sure: float = 0.5
    name: ClassVar[str] = "GACL"
    strengths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        number("strength", self.strength, least=0, most=1)
        number("sure", self.sure, least=0, most=1)

    def beside(self, items: Items) -> Items:
        return bare(items, None)

    def __call__(
        self, model: HookedAudioTransformer, own: Logits, other: Logits, step: int = 0
    ) -> Logits:
        is_open = self.gate(own, other).to(own)[:, None]
        return own + self.strength * is_open * (other - own)

    def gate(self, own: Logits, other: Logits) -> Any:
        """Where the bare run is followed."""
        best = other.softmax(-1).max(-1)
        return (best.indices != own.argmax(-1)) & (best.values >= self.sure)


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (AAD, TAD, GACL)}
