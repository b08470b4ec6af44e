"""Which blocks carry an adapter: groups of equal size, and arms to compare them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import nn

from audio_lens.analysis.adapters.wearing import check_bare
from audio_lens.arguments import listed, numbers, suggest
from audio_lens.errors import InputError
from audio_lens.models import HookedAudioTransformer

GROUPS = ("early", "middle", "late")
SHARE = 0.2  # of all blocks that are in each
RANDOM, ALL_EQUAL, ALL, CONNECTOR, NONE = "random", "all_equal", "all", "connector", "none"
REFERENCES = (RANDOM, ALL_EQUAL, ALL, CONNECTOR, NONE)
MODULES = ("q_proj", "v_proj")
_TRIES = 1000  # of drawing a group that is no other


def layer_groups(n_layers: int) -> dict[str, tuple[int, ...]]:
    """The first, the middle and the last fifth of all blocks, rounded to one size.

    Of 20 blocks 0 to 3, 8 to 11 and 16 to 19.

    Raises:
        InputError: fewer than 3 blocks.
    """
    if n_layers < len(GROUPS):
        raise InputError(
            f"{n_layers} blocks make no {len(GROUPS)} groups: name the blocks, groups={{...}}"
        )
    size = max(1, round(SHARE * n_layers))
    starts = (0, round((n_layers - size) / 2), n_layers - size)
    return {
        name: tuple(range(start, start + size)) for name, start in zip(GROUPS, starts, strict=True)
    }


def checked_groups(
    groups: Mapping[str, Sequence[int]] | None, n_layers: int
) -> dict[str, tuple[int, ...]]:
    """Groups that were given, or the usual three.

    Raises:
        InputError: blocks that are not there or stand twice, groups of unequal size or none, or the
            name of another arm.
    """
    if groups is None:
        return layer_groups(n_layers)
    found: dict[str, tuple[int, ...]] = {}
    for name, given in groups.items():
        layers = tuple(numbers(f"groups[{name!r}]", given, least=0, most=n_layers - 1))
        if not layers or len(set(layers)) < len(layers):
            raise InputError(f"the group {name!r} names blocks, each once, got {list(layers)}")
        if name in REFERENCES:
            raise InputError(f"{name!r} is another arm already: call the group something else")
        found[name] = tuple(sorted(layers))
    sizes = {name: len(layers) for name, layers in found.items()}
    if len(set(sizes.values())) != 1:
        raise InputError(
            "groups are of one size, so that equally many parameters are trained; got "
            f"{', '.join(f'{name} {size}' for name, size in sizes.items()) or 'none'}"
        )
    return found


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        ranks: of the adapters in each block; empty where there are none.
        is_connector: whether the connector's own weights are trained in their place.
    """

    name: str
    ranks: Mapping[int, int]
    is_connector: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing is."""
        return not self.ranks and not self.is_connector


@dataclass(frozen=True)
class Arms:
    """The arms of a sweep.

    Attributes:
        groups: blocks by name, equally many each.
        rank: of the adapters of a group.
    """

    groups: Mapping[str, tuple[int, ...]]
    n_layers: int
    rank: int

    @property
    def size(self) -> int:
        """Blocks of a group."""
        return len(next(iter(self.groups.values())))

    def check(self, names: Sequence[str]) -> None:
        """Raise where one of these arms cannot be made.

        Raises:
            InputError: no such arm, a rank that cannot be divided among all blocks, or no group
                that could be drawn.
        """
        known = [*self.groups, *REFERENCES]
        for name in names:
            if name not in known:
                raise InputError(f"no arm {name!r}; {suggest(name, known)}")
            self.of(name, 0)

    def of(self, name: str, seed: int) -> Arm:
        """An arm; the random group depends on the seed."""
        if name in (NONE, CONNECTOR):
            return Arm(name, {}, name == CONNECTOR)
        if name == ALL_EQUAL:
            return Arm(name, self._divided())
        if name == ALL:
            layers: Sequence[int] = range(self.n_layers)
        else:
            layers = self._drawn(seed) if name == RANDOM else self.groups[name]
        return Arm(name, dict.fromkeys(layers, self.rank))

    def has_random(self) -> bool:
        """Whether there is another group to draw."""
        return self.size < self.n_layers and any(self._draws(0))

    def _divided(self) -> dict[int, int]:
        """The rank of each block that together has as many parameters as a group."""
        total = self.rank * self.size
        if total < self.n_layers:
            raise InputError(
                f"rank {self.rank} in {self.size} blocks is less than 1 in each of all "
                f"{self.n_layers}: take a rank of {-(-self.n_layers // self.size)} or more, or "
                f"leave out the arm {ALL_EQUAL!r}"
            )
        ends = [total * (layer + 1) // self.n_layers for layer in range(self.n_layers)]
        return dict(enumerate(b - a for a, b in pairwise([0, *ends])))

    def _drawn(self, seed: int) -> tuple[int, ...]:
        for layers in self._draws(seed):
            if layers:
                return layers
        raise InputError(
            f"of {self.n_layers} blocks no {self.size} can be drawn that are no group: leave out "
            f"the arm {RANDOM!r}"
        )

    def _draws(self, seed: int) -> list[tuple[int, ...]]:
        """Groups in random order that are none of the others, nor neighbours all; () for such."""
        draw = np.random.default_rng(seed)
        found = []
        for _ in range(_TRIES):
            chosen = draw.choice(self.n_layers, self.size, replace=False).tolist()
            layers = tuple(sorted(chosen))
            in_a_row = self.size > 1 and layers[-1] - layers[0] == self.size - 1
            found.append(() if in_a_row or layers in self.groups.values() else layers)
            if found[-1]:
                break
        return found


def linears_of(
    model: HookedAudioTransformer, part: str, modules: Sequence[str]
) -> dict[int, list[str]]:
    """Names of the linear maps of every block of a part that end so, by block.

    Raises:
        InputError: a part without blocks, a model that carries an adapter already, or modules that
            no block has.
    """
    check_bare(model)
    n_layers = n_blocks(model, part)
    asked = listed("modules", modules, str, "names of linear maps, such as ['q_proj', 'v_proj']")
    found: dict[int, list[str]] = {}
    for layer in range(n_layers):
        prefix = f"{part}.blocks.{layer}"
        block = model.get_submodule(prefix)
        there = [name for name, one in block.named_modules() if isinstance(one, nn.Linear)]
        for one in asked:
            if not any(f".{name}".endswith(f".{one}") for name in there):
                raise InputError(
                    f"block {layer} of the {part} has no linear map {one!r}; {suggest(one, there)}"
                )
        found[layer] = [
            f"{prefix}.{name}"
            for name in there
            if any(f".{name}".endswith(f".{one}") for one in asked)
        ]
    if not asked:
        raise InputError("modules= names one linear map or more, such as ['q_proj', 'v_proj']")
    return found


def n_blocks(model: HookedAudioTransformer, part: str) -> int:
    """How many blocks a part has.

    Raises:
        InputError: another part, or one without blocks.
    """
    with_blocks = [name for name in ("encoder", "decoder") if name in model.cfg.parts]
    if part not in with_blocks or model.cfg.parts[part].n_layers < 1:
        raise InputError(f"part is one with blocks ({', '.join(with_blocks)}), got {part!r}")
    return model.cfg.parts[part].n_layers
