"""What writes to the residual stream of a decoder, and what reads it, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audio_lens.errors import InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.layers import Block, PreNormBlock
from audio_lens.patching.engine.trace import blocks_of, crosses_of, is_known, stack_of
from audio_lens.places import Words, described
from audio_lens.timeline import Span

EMBED, AUDIO, TEXT = "embed", "audio", "text"
HEAD, CROSS, MLP, LOGITS = "head", "cross", "mlp", "logits"
ENTERING = (EMBED, AUDIO, TEXT)
_SUBLAYERS = {HEAD: 1, CROSS: 2, MLP: 3}  # the order in which a block's parts run
_LETTERS = {"H": HEAD, "C": CROSS}
_NODE = re.compile(r"L(\d+)\.?(?:(mlp)|([HCG])(\d+)(?:\.([qkv]))?)", re.IGNORECASE)
_SENT = "L3H2 or (3, 2) (a head), L3C2 (of cross-attention), L3.mlp, audio, text, embed"
_READ = "L3H2.q, L3G0.k, L3G0.v (of a key-value head), L3C2.q, L3.mlp, logits"


def _stage(kind: str, layer: int) -> int:
    """When in the run: what is sent at a stage is read at all later ones."""
    return 0 if kind in ENTERING else 3 * layer + _SUBLAYERS[kind]


@dataclass(frozen=True)
class Sender:
    """What adds to the residual stream.

    Attributes:
        kind: "head", "cross" (a head of cross-attention), "mlp", or what enters block 0: "embed",
            of which "audio" (what the connector gives) and "text" are parts.
        layer, head: where it stands; -1 without.
        where: of what enters, the place that is meant; None for all of it.
        label: what it is called, if not by all this.
    """

    kind: str
    layer: int = -1
    head: int = -1
    where: Any = None
    label: str = ""

    @property
    def stage(self) -> int:
        return _stage(self.kind, self.layer)

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        if self.kind in ENTERING:
            return self.kind if self.where is None else f"{self.kind} {described(self.where)}"
        if self.kind == MLP:
            return f"L{self.layer}.mlp"
        return f"L{self.layer}{'H' if self.kind == HEAD else 'C'}{self.head}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Receiver:
    """What reads the residual stream.

    Attributes:
        kind: "head", "cross", "mlp" or "logits".
        layer: its block; of the logits, the number of blocks.
        head: of queries the head, of keys and values the key-value head; -1 without.
        side: "q", "k" or "v"; empty without.
    """

    kind: str
    layer: int
    head: int = -1
    side: str = ""

    @property
    def stage(self) -> int:
        return _stage(HEAD, self.layer) if self.kind == LOGITS else _stage(self.kind, self.layer)

    @property
    def name(self) -> str:
        if self.kind == LOGITS:
            return LOGITS
        if self.kind == MLP:
            return f"L{self.layer}.mlp"
        letter = "C" if self.kind == CROSS else "H" if self.side == "q" else "G"
        return f"L{self.layer}{letter}{self.head}.{self.side}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Nodes:
    """The senders and receivers of a model's decoder.

    Raises:
        InputError: a model without a decoder whose stream is the plain sum of what its blocks
            write.
    """

    model: HookedAudioTransformer

    def __post_init__(self) -> None:
        model = self.model
        if model.cfg.decoder is None or model.output_part != "decoder":
            raise InputError(f"paths run through a decoder, and {model.cfg.family} has none")
        reason = model.whole_because("decoder.resid_pre", None)
        if reason or not is_known(stack_of(model, "decoder")):
            raise InputError(
                f"paths need a decoder that runs block after block, and in {model.cfg.family} "
                f"{reason or 'blocks do more than attention and MLP say'}"
            )
        odd = [type(b).__name__ for b in self.blocks if not isinstance(b, PreNormBlock)]
        if odd:
            raise InputError(
                f"paths need a residual stream that is the plain sum of what blocks write, and "
                f"the blocks of {model.cfg.family} are {odd[0]}s"
            )

    @property
    def blocks(self) -> list[Block]:
        return blocks_of(stack_of(self.model, "decoder"))

    @property
    def is_crossed(self) -> bool:
        """Whether audio arrives by cross-attention."""
        return any(crosses_of(block) for block in self.blocks)

    def heads(self) -> list[Sender]:
        """Every head, in the order in which they run."""
        return [
            Sender(kind, layer, head)
            for layer, block in enumerate(self.blocks)
            for kind, attns in ((HEAD, [block.attn]), (CROSS, crosses_of(block)))
            for attn in attns
            for head in range(attn.n_heads)
        ]

    def mlps(self) -> list[Sender]:
        return [Sender(MLP, layer) for layer in range(len(self.blocks))]

    def entering(self) -> list[Sender]:
        """What enters block 0, in parts that do not overlap."""
        return [Sender(EMBED)] if self.is_crossed else [Sender(AUDIO), Sender(TEXT)]

    def all(self) -> list[Sender]:
        """Everything that writes, in the order of the run."""
        every = [*self.entering(), *self.heads(), *self.mlps()]
        return sorted(every, key=lambda sender: sender.stage)

    def receivers(self) -> list[Receiver]:
        """Everything that reads, in the order of the run."""
        found = []
        for layer, block in enumerate(self.blocks):
            attn = block.attn
            sides = {"q": attn.n_heads, "k": attn.n_key_value_heads, "v": attn.n_key_value_heads}
            found += [
                Receiver(HEAD, layer, n, s) for s, count in sides.items() for n in range(count)
            ]
            for cross in crosses_of(block):
                found += [Receiver(CROSS, layer, n, "q") for n in range(cross.n_heads)]
            found.append(Receiver(MLP, layer))
        return [*found, self.logits]

    @property
    def logits(self) -> Receiver:
        return Receiver(LOGITS, len(self.blocks))

    # ---------------------------------------------------------------- by name

    def senders_of(self, given: Any) -> dict[str, list[Sender]]:
        """Senders by name: one each, or several that send together.

        Raises:
            InputError: what is no sender of this model, or nothing.
        """
        many = {"heads": self.heads, "mlps": self.mlps, "all": self.all}
        if isinstance(given, str) and given in many:
            return {sender.name: [sender] for sender in many[given]()}
        return _by_name(given, self.sender, "senders")

    def receivers_of(self, given: Any) -> dict[str, list[Receiver]]:
        """Receivers by name: one each, or several whose inputs are replaced together.

        Raises:
            InputError: what is no receiver of this model, or nothing.
        """
        return _by_name(given, self.receiver, "receivers")

    def sender(self, given: Any) -> Sender:
        """One sender, by what it is called.

        Raises:
            InputError: naming what there is.
        """
        if isinstance(given, Sender):
            return self._checked_sender(given)
        if isinstance(given, (Span, Words)):
            return self._checked_sender(Sender(EMBED if self.is_crossed else AUDIO, where=given))
        if _is_numbers(given, 2):
            return self._checked_sender(Sender(HEAD, *given))
        if given in ENTERING or given == "connector":
            return self._checked_sender(Sender(AUDIO if given == "connector" else given))
        named = _NODE.fullmatch(given) if isinstance(given, str) else None
        if named is None or named[5] or (named[3] or "").upper() == "G":
            raise InputError(f"{given!r} is no sender: there are {_SENT}")
        if named[2]:
            return self._checked_sender(Sender(MLP, int(named[1])))
        kind = _LETTERS[named[3].upper()]
        return self._checked_sender(Sender(kind, int(named[1]), int(named[4])))

    def _checked_sender(self, sender: Sender) -> Sender:
        if sender.kind in ENTERING:
            if self.is_crossed and sender.kind != EMBED:
                raise InputError(
                    f"{self.model.cfg.family} hears by cross-attention: its heads bring the audio "
                    f"(L0C0), and what enters is 'embed', not {sender.kind!r}"
                )
            return sender
        self._check_place(sender, sender.layer, 0 if sender.kind == MLP else sender.head)
        return sender

    def receiver(self, given: Any) -> Receiver:
        """One receiver, by what it is called.

        Raises:
            InputError: naming what there is; keys or values of a single head, where several heads
                share them.
        """
        if isinstance(given, Receiver):
            return self._checked_receiver(given.kind, given.layer, given.head, given.side)
        if given == LOGITS:
            return self.logits
        if isinstance(given, tuple) and len(given) == 3 and given[2] in ("q", "k", "v"):
            given = "L{}H{}.{}".format(*given)
        named = _NODE.fullmatch(given) if isinstance(given, str) else None
        if named is None or not (named[2] or named[5]):
            raise InputError(f"{given!r} is no receiver: there are {_READ}")
        layer, side = int(named[1]), (named[5] or "").lower()
        if named[2]:
            return self._checked_receiver(MLP, layer, -1, "")
        letter, head = named[3].upper(), int(named[4])
        if letter == "C":
            return self._checked_receiver(CROSS, layer, head, side)
        if (letter == "G") == (side == "q"):
            self._check_shared(layer, head, side)
        return self._checked_receiver(HEAD, layer, head, side)

    def _check_shared(self, layer: int, head: int, side: str) -> None:
        """Raise unless a head has keys and values of its own."""
        self._check_place(Sender(HEAD, layer, head), layer, head)
        attn = self.blocks[layer].attn
        if attn.group > 1:
            right = f"L{layer}H{head}.q" if side == "q" else f"L{layer}G{head // attn.group}.{side}"
            raise InputError(
                f"{attn.n_heads} heads of block {layer} share {attn.n_key_value_heads} key-value "
                f"heads: queries are of a head (H), keys and values of a group (G), as in {right}"
            )

    def _checked_receiver(self, kind: str, layer: int, head: int, side: str) -> Receiver:
        if kind == LOGITS:
            return self.logits
        self._check_place(Sender(kind, layer, 0), layer, 0)
        if kind == CROSS and side != "q":
            raise InputError(
                f"keys and values of cross-attention read the encoder, not the stream: "
                f"L{layer}C{head}.q is there"
            )
        attn = self.blocks[layer].attn
        count = attn.n_heads if side == "q" else attn.n_key_value_heads
        if kind != MLP and not 0 <= head < count:
            raise InputError(f"block {layer} has {count} heads with a {side}, not head {head}")
        return Receiver(kind, layer, head, side)

    def _check_place(self, sender: Sender, layer: int, head: int) -> None:
        if not 0 <= layer < len(self.blocks):
            raise InputError(f"{sender}: the decoder has {len(self.blocks)} blocks")
        attns = {HEAD: [self.blocks[layer].attn], CROSS: crosses_of(self.blocks[layer]), MLP: []}
        if sender.kind == CROSS and not attns[CROSS]:
            raise InputError(f"{sender}: {self.model.cfg.family} has no cross-attention")
        if sender.kind != MLP and not 0 <= head < attns[sender.kind][0].n_heads:
            raise InputError(f"{sender}: there are {attns[sender.kind][0].n_heads} heads")


def _is_numbers(given: Any, count: int) -> bool:
    is_tuple = isinstance(given, tuple) and len(given) == count
    return is_tuple and all(type(number) is int for number in given)


def _by_name(given: Any, one: Any, what: str) -> dict[str, list]:
    """What is given, one by one or several together, by names."""
    if isinstance(given, Mapping):
        found = {str(name): list(_each(some, one)) for name, some in given.items()}
    else:
        is_one = isinstance(given, tuple) and _is_place(given)
        listed = [given] if is_one or not isinstance(given, Sequence) else given
        listed = [given] if isinstance(given, str) else listed
        named = [list(_each(some, one)) for some in listed]
        found = {" + ".join(node.name for node in some): some for some in named}
    if not found or not all(found.values()):
        raise InputError(f"{what} names at least one")
    return found


def _is_place(given: tuple) -> bool:
    """Whether a tuple is one node: (layer, head), or (layer, head, side)."""
    return len(given) in (2, 3) and all(type(number) is int for number in given[:2])


def _each(some: Any, one: Any) -> Iterator[Any]:
    is_many = isinstance(some, (list, tuple)) and not (isinstance(some, tuple) and _is_place(some))
    for node in some if is_many else [some]:
        yield one(node)
