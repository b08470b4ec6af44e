"""Sites: what can be patched, where it lies in its tensor, and which positions it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from audio_lens import arguments
from audio_lens.arguments import suggest
from audio_lens.errors import AudioLensError

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Unit = Literal["head", "neuron"]

_SUBLAYER_OF = {
    **dict.fromkeys(["q", "k", "v", "rot_q", "rot_k", "z", "result"], "attn"),
    **dict.fromkeys(["pattern", "attn_scores"], "attn"),
    **dict.fromkeys(["pre", "gate", "pre_linear", "post"], "mlp"),
}
_PER_HEAD = ("q", "k", "v", "rot_q", "rot_k", "z", "result")
_PER_PAIR = ("pattern", "attn_scores")
_PER_NEURON = ("pre", "gate", "pre_linear", "post")


class SiteError(AudioLensError, ValueError):
    """A site or axis that this model does not have; the message says what there is."""


@dataclass(frozen=True)
class Site:
    """A place in the model that a sweep patches.

    Attributes:
        part: the part it belongs to.
        activation: the name inside a block or part, like ``attn.z`` or ``out``.
        n_layers: blocks that have it; None where it lies outside the blocks.
        positions_of: the part on whose positions (and seconds) it lies: keys and values of
            cross-attention lie on the encoder's.
        position_dim: axis of those positions in its tensor.
        unit: what else it can be split by, "head" or "neuron", on axis ``unit_dim``.
    """

    part: str
    activation: str
    n_layers: int | None
    positions_of: str
    position_dim: int
    unit: Unit | None
    unit_dim: int | None

    def __str__(self) -> str:
        return f"{self.part}.{self.activation}"

    @property
    def sublayer(self) -> str:
        """ "attn", "cross_attn", "mlp" ...; empty for the residual stream and what is added."""
        return self.activation.rpartition(".")[0]

    @property
    def last(self) -> str:
        """The last piece of its name: ``z`` of ``attn.z``."""
        return self.activation.rpartition(".")[2]

    @property
    def local_hook(self) -> str:
        """Name of the hook point inside its block or part."""
        return f"{self.sublayer}.hook_{self.last}" if self.sublayer else f"hook_{self.last}"

    def hook_name(self, layer: int | None) -> str:
        """Name of the hook point, in a block or outside the blocks."""
        pieces = [self.part, *([] if layer is None else ["blocks", str(layer)])]
        return ".".join([*pieces, self.local_hook])

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes a sweep of this site can have."""
        layer = () if self.n_layers is None else ("layer",)
        return (*layer, *((self.unit,) if self.unit else ()), "time", "position")

    @property
    def split(self) -> tuple[Unit, int]:
        """What it can be split by, and the axis of that.

        Raises:
            SiteError: if it has neither heads nor neurons.
        """
        if self.unit is None or self.unit_dim is None:
            raise SiteError(f"{self} has neither heads nor neurons")
        return self.unit, self.unit_dim

    @property
    def reads_attention(self) -> bool:
        """Whether it exists only when attention is written out."""
        return self.last in _PER_PAIR

    @staticmethod
    def parse(text: str, model: HookedAudioTransformer) -> Site:
        """``part.activation`` as a site of this model.

        The part may be left out (the one that makes the output), and so may ``attn.`` and ``mlp.``.

        Raises:
            SiteError: if the model has no such site; the message lists those it has.
        """
        text = arguments.text("a site", text)
        known = {str(site): site for site in sites_of(model)}
        for spelling in _spellings(text, model.output_part):
            if spelling in known:
                return known[spelling]
        raise SiteError(
            f"{text!r} cannot be swept in this model; {suggest(text, known)}. "
            f"All: {', '.join(known)}"
        )


def _spellings(text: str, output_part: str) -> list[str]:
    head, _, tail = text.rpartition(".")
    spelled = [text]
    if tail in _SUBLAYER_OF and not head.endswith(("attn", "mlp")):
        spelled.append(".".join([*([head] if head else []), _SUBLAYER_OF[tail], tail]))
    return [*spelled, *(f"{output_part}.{name}" for name in spelled)]


def check_name(text: str) -> None:
    """Raise for what is no site of any model: known without one.

    Raises:
        SiteError: naming what activations are called.
    """
    last = text.rpartition(".")[2]
    if last in _SUBLAYER_OF or last in ("in", "out") or _is_a_stream(last):
        return
    named = [*_SUBLAYER_OF, "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "out"]
    raise SiteError(
        f"{text!r} is no site of any model: its last piece, {last!r}, is none of the activations "
        f"({suggest(last, named)})"
    )


def in_blocks(layer: int | None) -> int:
    """The block of a site that lies in one.

    Raises:
        SiteError: for None, which stands for what lies outside the blocks.
    """
    if layer is None:
        raise SiteError("this site lies outside the blocks: it has no layer")
    return layer


def parts_from(model: HookedAudioTransformer, part: str) -> list[str]:
    """The part, if it has blocks, and those that run behind it up to the final hidden states."""
    cfg = model.cfg
    order = [*cfg.is_heard_in, "connector", *(["decoder"] if cfg.decoder else [])]
    if part not in order:
        return [part]
    return [name for name in order[order.index(part) :] if name in cfg.parts]


def unit_count(model: HookedAudioTransformer, site: Site) -> int:
    """How many heads or neurons a site has."""
    cfg = model.cfg.parts[site.part]
    if site.unit == "neuron":
        return cfg.d_mlp
    is_key_value = site.last in ("k", "v", "rot_k")
    return cfg.n_key_value_heads if is_key_value else cfg.n_heads


def sites_of(model: HookedAudioTransformer) -> list[Site]:
    """Every site of a model that can be swept."""
    found = []
    for part, cfg in model.cfg.parts.items():
        prefix = f"{part}.blocks.0."
        for name in model.hook_dict:
            if name.startswith(prefix):
                site = _site(part, name.removeprefix(prefix).replace("hook_", ""), cfg.n_layers)
                found += [site] if site else []
    if "connector.hook_out" in model.hook_dict:
        read = getattr(model.connector, "reads_part", "connector")
        found.append(Site("connector", "in", None, read, 1, None, None))
        found.append(Site("connector", "out", None, "connector", 1, None, None))
    return found


def _site(part: str, activation: str, n_layers: int) -> Site | None:
    """The site of a block's hook point; None where cells mean nothing (norms, routers)."""
    path, _, last = activation.rpartition(".")
    on_encoder = path == "cross_attn" and last in ("k", "v")
    positions_of = "encoder" if on_encoder else part
    if path in ("attn", "cross_attn") and last in _PER_HEAD:
        return Site(part, activation, n_layers, positions_of, 1, "head", 2)
    if path in ("attn", "cross_attn") and last in _PER_PAIR:
        return Site(part, activation, n_layers, positions_of, 2, "head", 1)
    if path.startswith("mlp") and last in _PER_NEURON:
        return Site(part, activation, n_layers, positions_of, 1, "neuron", 2)
    if not path and _is_a_stream(last):
        return Site(part, activation, n_layers, positions_of, 1, None, None)
    return None


def _is_a_stream(last: str) -> bool:
    """Whether this is what the residual stream holds, or what is added to it."""
    return "resid" in last or last.endswith("_out")
