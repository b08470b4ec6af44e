"""`run`: what edits do to the answer, with nothing run again that they cannot change."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.edits.edit import Edit, Laid, in_force
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.layers import KVCache, needed
from audio_lens.patching.engine.ears import (
    ear_context,
    ear_run,
    entering,
    given_by,
    sent_onwards,
)
from audio_lens.patching.engine.hooked import from_position, output_of
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.trace import Trace, blocks_of, crosses_of, heard, is_known, stack_of
from audio_lens.places import Ground
from audio_lens.running import evaluating

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

_HELD = "_unedited"  # where inputs keep their unedited run


@torch.no_grad()
def run(
    model: HookedAudioTransformer,
    inputs: AudioInputs | Mapping[str, Any],
    edits: Edit | Sequence[Edit],
    metric: Any = None,
) -> Float[Tensor, "..."] | dict[str, Float[Tensor, "..."]]:
    """The metric of a run with edits in force.

    The unedited run of these inputs is made once and kept with them until others are run: call
    after call starts from it at the first block that is edited, in the decoder also at the first
    position. Edits behind the encoder never run it again. Hooks of yours stay in force; then, and
    for parts that the engine cannot take apart, each call is a whole forward. The model runs in
    evaluation mode.

    Args:
        inputs: best `AudioInputs` of ``model.prepare``; of a processor's mapping the unedited run
            is made in every call.
        edits: as in `intervene`; none give the metric of the unedited run.
        metric: as in `sweep`, or a mapping of several; those that compare with a clean run are
            given the unedited one. None gives the logits.

    Returns:
        One value per prompt (or a scalar, if the metric gives that); a dict of these for a mapping
        of metrics; or logits, ``b t d_vocab``.

    Raises:
        SiteError, InputError, DeadHookError: as `intervene`.
        MetricError: a metric that fails, or gives something else than numbers.
    """
    with evaluating(model):
        return _run(model, model.as_inputs(inputs), edits, metric)


def _run(
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    edits: Edit | Sequence[Edit],
    metric: Any,
) -> Float[Tensor, "..."] | dict[str, Float[Tensor, "..."]]:
    listed = [edits] if isinstance(edits, Edit) else list(edits)
    laid = [Laid.of(model, edit) for edit in listed]
    if any(one.edit.when == "decode" for one in laid):
        raise InputError('run is one forward, in which when="decode" has nothing to edit')
    base = _unedited(model, inputs)
    if metric is None:
        return base.logits if not laid else base.edited(laid).logits
    measures = {
        name: metrics.bound(
            one, model, inputs, base.logits if getattr(one, "needs_reference", False) else None
        )
        for name, one in metrics.named(metric).items()
    }
    readout = Readout(model, measures, inputs)
    rows = base.read(readout) if not laid else base.edited(laid).read(readout)
    values = dict(zip(measures, readout.measure(rows, "the edited run"), strict=True))
    return values if isinstance(metric, Mapping) else next(iter(values.values()))


@dataclass(eq=False)
class Unedited:
    """The run of some inputs that edits start from.

    Attributes:
        state: of the model and the inputs, when it was made.
        has_hooks: whether hooks of the user were in force.
        beside: the residual streams of ears beside the encoder, like those of `encoder`.
    """

    model: HookedAudioTransformer
    inputs: AudioInputs
    state: tuple
    has_hooks: bool
    beside: dict[str, list[Float[Tensor, "b t d"]]] = field(default_factory=dict, repr=False)

    @cached_property
    def encoder(self) -> list[Float[Tensor, "b t d"]]:
        """The residual stream entering every block of the encoder, and that leaving the last."""
        model, inputs = self.model, self.inputs
        context = model.encoder_context(inputs)
        return Trace.of(model, "encoder", model.enter_encoder(inputs), context).residuals

    @cached_property
    def encoder_end(self) -> Float[Tensor, "b t sd"]:
        """What the encoder sends on: the stream leaving its last block, and others before it."""
        n_layers = self.model.cfg.need_encoder.n_layers
        if "encoder" in vars(self) or len(self.model.sent_from) > 1:
            return entering(self.model, "encoder", self.encoder, n_layers)
        end = self.model.encode(self.inputs, stop=n_layers)
        return needed(end, "an edit in front of the decoder needs an encoder")

    @cached_property
    def encoded(self) -> Tensor | None:
        """What the decoder receives of the audio."""
        return self.model.encode(self.inputs)

    @cached_property
    def decoder(self) -> Trace:
        """The run of the decoder, with all keys and values."""
        return Trace.of_decoder(self.model, self.inputs, self.encoded)

    @cached_property
    def hidden(self) -> Float[Tensor, "b t d"]:
        """The final hidden states."""
        if self.model.cfg.decoder is None:
            return heard(self.encoded)
        if self.has_hooks or not _comes_apart(self.model):
            return self.model.decode(self.inputs, self.encoded)
        return self.decoder.stack.finish(self.decoder.residuals[-1])

    @cached_property
    def logits(self) -> Float[Tensor, "b *t v"]:
        return output_of(self.model, self.hidden, self.inputs)

    def read(self, readout: Readout) -> Float[Tensor, "b r c"]:
        """What metrics read of it."""
        return readout.of_run(self.hidden)

    def edited(self, laid: Sequence[Laid]) -> Edited:
        """The run with edits in force."""
        if self._is_whole(laid):
            return self._whole(laid)
        if all(one.site.part == "decoder" for one in laid):
            return self._from_decoder(laid)
        return self._from_ears(laid) if self.model.cfg.ears else self._from_encoder(laid)

    def _whole(self, laid: Sequence[Laid]) -> Edited:
        encoded = self._heard_once(laid)
        with in_force(self.model, laid):
            return Edited(self, self.model(self.inputs, encoder_out=encoded), 0)

    def _heard_once(self, laid: Sequence[Laid]) -> Tensor | None:
        """What the encoder gave, where neither edits nor hooks reach it."""
        cfg = self.model.cfg
        is_behind = all(one.site.part in ("decoder", *cfg.further_decoders) for one in laid)
        return self.encoded if is_behind and cfg.encoder and not self.has_hooks else None

    def _is_whole(self, laid: Sequence[Laid]) -> bool:
        """Whether a whole forward is needed."""
        model = self.model
        parts = {one.site.part for one in laid}
        return bool(
            self.has_hooks
            or not parts <= {*model.cfg.is_heard_in, "connector", "decoder"}
            or any(model.whole_because(f"{part}.resid_pre", None) for part in parts)
            or (parts == {"decoder"} and not _comes_apart(model))
        )

    def _from_encoder(self, laid: Sequence[Laid]) -> Edited:
        model, inputs, n_layers = self.model, self.inputs, self.model.cfg.need_encoder.n_layers
        first = min(_layers(laid, "encoder"), default=n_layers)
        is_end = first == n_layers
        resid = self.encoder_end if is_end else entering(model, "encoder", self.encoder, first)
        with in_force(model, laid):
            encoded = model.encode(inputs, resid, first)
            hidden = model.decode(inputs, encoded) if model.cfg.decoder else heard(encoded)
            return Edited(self, output_of(model, hidden, inputs), 0)

    def _from_ears(self, laid: Sequence[Laid]) -> Edited:
        """From the first edited block of each of several ears."""
        model, inputs = self.model, self.inputs
        with in_force(model, laid):
            with model.running(inputs):
                given = {part: self._given(part, laid) for part in model.cfg.is_heard_in}
                encoded = model.send_heard(given, inputs)
            hidden = model.decode(inputs, encoded) if model.cfg.decoder else heard(encoded)
            return Edited(self, output_of(model, hidden, inputs), 0)

    def _given(self, part: str, laid: Sequence[Laid]) -> Float[Tensor, "b t sd"]:
        """What an ear gives with edits in force."""
        model, n_layers = self.model, self.model.cfg.parts[part].n_layers
        first = min(_layers(laid, part), default=n_layers)
        begun = entering(model, part, self._streams(part), first)
        context = ear_context(model, part, self.inputs)
        sent = begun if first == n_layers else sent_onwards(model, part, begun, context, first)
        return given_by(model, part, sent)

    def _streams(self, part: str) -> list[Float[Tensor, "b t d"]]:
        """The residual stream entering every block of an ear, and that leaving the last."""
        if part == "encoder":
            return self.encoder
        if part not in self.beside:
            self.beside[part] = ear_run(self.model, part, self.inputs).residuals
        return self.beside[part]

    def _from_decoder(self, laid: Sequence[Laid]) -> Edited:
        first = min(_layers(laid, "decoder"))
        start = min(self._first_position(one) for one in laid)
        past = self._earlier(first, start, any(one.site.positions_of != "decoder" for one in laid))
        inputs, resid = from_position(self.inputs, start), self.decoder.residuals[first][:, start:]
        with in_force(self.model, laid):
            hidden = self.model.decode(inputs, self.encoded, resid, first, past=past)
        return Edited(self, None, start, hidden)

    def _first_position(self, laid: Laid) -> int:
        """The first position of any prompt that an edit of the decoder changes."""
        if laid.is_everywhere or laid.site.positions_of != "decoder":
            return 0
        where = Ground.of(self.model, self.inputs, "decoder").held(laid.edit.where)
        return int(where.any(0).nonzero()[0])

    def _earlier(self, first: int, start: int, edits_memory: bool) -> KVCache:
        """Keys and values that stay: of earlier positions, and of what cross-attention reads."""
        entries = {}
        for block in blocks_of(self.decoder.stack)[first:]:
            k, v = self.decoder.keys_values(block.attn)
            entries[block.attn.name] = (k[:, :start], v[:, :start])
            for cross in () if edits_memory else crosses_of(block):
                entries[cross.name] = self.decoder.keys_values(cross)
        past = KVCache(entries, length=start)
        past.prompts = self.inputs
        return past


@dataclass(eq=False)
class Edited:
    """A run with edits in force.

    Attributes:
        whole: all logits, or None where only `hidden` states from position `start` on ran.
    """

    base: Unedited
    whole: Float[Tensor, "b *t v"] | None
    start: int
    hidden: Float[Tensor, "b t d"] | None = None

    @property
    def logits(self) -> Float[Tensor, "b *t v"]:
        if self.hidden is None:
            return self._all
        later = output_of(self.base.model, self.hidden, from_position(self.base.inputs, self.start))
        return torch.cat([self.base.logits[:, : self.start], later], dim=1)

    @property
    def _all(self) -> Float[Tensor, "b *t v"]:
        return needed(self.whole, "neither logits nor hidden states of an edited run")

    def read(self, readout: Readout) -> Float[Tensor, "b r c"]:
        """What metrics read of it."""
        if self.hidden is None:
            return readout.of_logits(self._all)
        rows = self.base.read(readout).clone()
        index, position = readout.demanded.nonzero(as_tuple=True)
        seen = position >= self.start
        index, position = index[seen], position[seen]
        found = readout.logits(self.hidden[index, position - self.start], index, position)
        rows[index, readout.slots[index, position]] = found.to(rows.dtype)
        return rows


def _layers(laid: Sequence[Laid], part: str) -> list[int]:
    """The blocks that edits of a part are at."""
    names = [name for one in laid if one.site.part == part for name in one.names]
    return [int(name.split(".")[2]) for name in names if ".blocks." in name]


def _comes_apart(model: HookedAudioTransformer) -> bool:
    """Whether the decoder can start anywhere."""
    if model.cfg.decoder is None or model.whole_because("decoder.resid_pre", None):
        return False
    return is_known(stack_of(model, "decoder"))


# -------------------------------------------------------------------------------- kept with inputs

_last: weakref.ref[AudioInputs] | None = None  # the inputs that hold theirs: one run at a time


def _unedited(model: HookedAudioTransformer, inputs: AudioInputs) -> Unedited:
    """The unedited run of some inputs: kept, unless model, inputs or hooks changed since."""
    global _last
    state = _state(model, inputs)
    held = vars(inputs).get(_HELD)
    if held is not None and held.model is model and held.state == state:
        return held
    before = None if _last is None else _last()
    if before is not None:
        vars(before).pop(_HELD, None)
    hooked = any(point.fwd_hooks for point in model.hook_dict.values())
    vars(inputs)[_HELD] = Unedited(model, inputs, state, hooked)
    _last = weakref.ref(inputs)
    return vars(inputs)[_HELD]


def _state(model: HookedAudioTransformer, inputs: AudioInputs) -> tuple:
    """What a run depends on, as far as identities and counts of changes tell."""
    own = [x for x in vars(inputs).values() if isinstance(x, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *own, *inputs.extra.values()]
    hooks = [id(hook.user_hook) for p in model.hook_dict.values() for hook in p.fwd_hooks]
    switches = [getattr(module, "enabled", None) for module in model.modules()]
    return (
        *((x.data_ptr(), x._version) for x in tensors),
        (tuple(hooks), tuple(switches), model.attn_mode, model.training),
    )
