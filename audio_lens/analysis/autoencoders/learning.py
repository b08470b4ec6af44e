"""One step of training a sparse autoencoder, and the revival of latents that are never active."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.analysis.autoencoders import activating
from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.errors import InputError

CALM = 0.7  # of the steps, after which the rate falls to 0 and no latent is revived
STRENGTH = 0.5  # of what a revived latent reads, against what it writes
SHARPNESS = 2  # power of what is lost of a row, by which it is drawn
LIKENESS = 4  # power of the cosine by which rows that lose the same are averaged
DECAY = 0.99  # of the running mean of the smallest value that was kept
PUSH = 0.01  # by which the price of activity changes in a step, at most
START_PRICE, JUMP_PRICE = 1e-3, 0.5  # of activity, in shares of the variance
NEAR = 0.1  # of k: a distance from it, up to which it costs its square, and beyond in proportion
START_THRESHOLD = 0.1  # of a latent of "jumprelu" that is revived, where vectors are √d long
TINY = 1e-12
PARAMETERS = ("reads", "offsets", "directions", "centre")


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        width: how many latents.
        k: how many of them are active, each time or on average.
        rows: of a step.
        resample: steps from one revival to the next; 0 for none.
        dead_after: rows without activity that make a latent dead.
    """

    width: int
    k: int
    kind: str
    steps: int
    rows: int
    rate: float
    seed: int
    resample: int
    dead_after: int


@dataclass
class Learner:
    """An autoencoder on its way. Its vectors are scaled so that they are √d long on average.

    Attributes:
        own: tensors that are learned.
        scale: by which activations are multiplied.
        silent: of each latent, how many rows came since it was active.
        kept: the running mean of the smallest kept value ("batchtopk"); below 0 before the first.
        price: of activity ("relu").
        step: how many were made.
    """

    setting: Setting
    own: dict[str, Tensor]
    scale: float
    silent: Int[Tensor, " m"]
    optimizer: torch.optim.Adam = field(repr=False)
    kept: float = -1.0
    price: float = START_PRICE
    step: int = 0
    history: dict[str, list] = field(default_factory=dict)

    @staticmethod
    def of(setting: Setting, rows: Float[Tensor, "n d"], start: Autoencoder | None) -> Learner:
        """At the beginning: random directions of unit length, read as they are written.

        Args:
            rows: some of those that are learned from, for their mean and length.
            start: what to go on from, in place of random directions.

        Raises:
            InputError: rows of length 0, or an autoencoder of another shape or kind.
        """
        d = rows.shape[1]
        length = rows.norm(dim=1).mean().item()
        if not length > 0:
            raise InputError("all activations are 0")
        scale = math.sqrt(d) / length
        if start is None:
            own = _random(setting, rows * scale)
        else:
            own = _continued(setting, start.to(rows.device), scale, d)
        return Learner._with(setting, own, scale)

    @staticmethod
    def _with(setting: Setting, own: Mapping[str, Tensor], scale: float) -> Learner:
        kept, learned = -1.0, dict(own)
        if setting.kind == "batchtopk" and "threshold" in learned:
            kept = float(learned.pop("threshold"))
        params = {name: x.clone().contiguous().requires_grad_() for name, x in learned.items()}
        adam = torch.optim.Adam(list(params.values()), setting.rate, betas=(0.9, 0.999), fused=True)
        silent = torch.zeros(setting.width, dtype=torch.long, device=own["reads"].device)
        return Learner(setting, params, scale, silent, adam, kept)

    # ---------------------------------------------------------------- a step

    def learn(self, rows: Float[Tensor, "n d"]) -> tuple[float, float]:
        """Make a step; returns FVU and mean L0 of these rows as they were before it."""
        x = rows * self.scale
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.rate * self._calm
        latents, cost = self._active(self._values(x))
        error = x - torch.addmm(self.own["centre"], latents, self.own["directions"])
        lost = error.square().sum() / (x - x.mean(0)).square().sum().clamp(min=TINY)
        self.optimizer.zero_grad()
        (lost + cost).backward()
        self.optimizer.step()
        with torch.no_grad():
            self._tidy()
            l0 = latents.count_nonzero().item() / len(rows)
            self.silent = torch.where(latents.amax(0) > 0, 0, self.silent + len(rows))
            self.price *= math.exp(PUSH * min(max(l0 / self.setting.k - 1, -1), 1))
            self.step += 1
            if self._revives:
                self._revive(error.detach())
        return lost.item(), l0

    @property
    def _calm(self) -> float:
        """What is left of the rate."""
        steps = self.setting.steps
        return min(1.0, (steps - self.step) / (steps * (1 - CALM)))

    def _values(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        """What the latents read. The centre is taken off behind the product: one product less."""
        reads, offsets, centre = (self.own[n] for n in ("reads", "offsets", "centre"))
        return torch.addmm(offsets - reads @ centre, x, reads.mT)

    def _active(self, values: Float[Tensor, "n m"]) -> tuple[Float[Tensor, "n m"], Tensor]:
        """The latents that are kept, and the price of their activity."""
        kind, k = self.setting.kind, self.setting.k
        free = values.new_zeros(())
        if kind == "topk":
            return activating.largest(values, k), free
        if kind == "batchtopk":
            latents, least = activating.largest_of_all(values, k)
            self._note_least(least)
            return latents, free
        if kind == "relu":
            latents = values.relu()
            return latents, self.price * latents.sum() / len(latents)
        latents, counts = activating.jump(values, self.own["threshold"])
        over = counts.mean() / k - 1
        return latents, JUMP_PRICE * F.smooth_l1_loss(over, torch.zeros_like(over), beta=NEAR)

    def _note_least(self, least: float) -> None:
        if math.isfinite(least):
            self.kept = least if self.kept < 0 else DECAY * self.kept + (1 - DECAY) * least

    def _tidy(self) -> None:
        """Directions of unit length, thresholds not below 0."""
        directions = self.own["directions"]
        directions.copy_(F.normalize(directions, dim=1))
        if "threshold" in self.own:
            self.own["threshold"].clamp_(min=0)

    # ---------------------------------------------------------------- dead latents

    @property
    def dead(self) -> Bool[Tensor, " m"]:
        """Latents that were not active in so many rows."""
        return self.silent >= self.setting.dead_after

    @property
    def _revives(self) -> bool:
        every = self.setting.resample
        return bool(every) and self.step % every == 0 and self.step < CALM * self.setting.steps

    def _revive(self, error: Float[Tensor, "n d"]) -> None:
        """Turn dead latents to what is lost of rows, the sooner the more that is."""
        dead = self.dead.nonzero()[:, 0]
        lost = error.square().sum(1)
        if not len(dead) or not bool(lost.sum() > 0):
            return
        draw = torch.Generator().manual_seed(1_000_003 * self.setting.seed + self.step)
        weights = (lost / lost.max()).cpu() ** SHARPNESS
        chosen = torch.multinomial(weights, len(dead), replacement=True, generator=draw)
        unit = F.normalize(error, dim=1)
        alike = (unit[chosen.to(error.device)] @ unit.mT).clamp(min=0) ** LIKENESS
        towards = F.normalize(alike @ error, dim=1)
        self.own["directions"][dead] = towards
        self.own["reads"][dead] = STRENGTH * towards
        self.own["offsets"][dead] = 0
        if "threshold" in self.own:
            self.own["threshold"][dead] = START_THRESHOLD
        self.silent[dead] = 0
        for name, x in self.own.items():
            if name != "centre":
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[x][moment][dead] = 0

    # ---------------------------------------------------------------- what came of it

    def note(self, fvu: float, l0: float, known: Float[Tensor, "n d"] | None) -> str:
        """Write down how far it is, and say so."""
        said = {"step": self.step, "fvu": fvu, "l0": l0, "dead": self.dead.float().mean().item()}
        if known is not None:
            directions = self.own["directions"].detach()[~self.dead]
            said["found"] = found_share(known.to(directions), directions)
        for name, value in said.items():
            self.history.setdefault(name, []).append(value)
        texts = {"fvu": "FVU", "l0": "L0", "dead": "dead", "found": "found"}
        return ", ".join(f"{texts[n]} {x:.3g}" for n, x in said.items() if n in texts)

    def finished(self) -> dict[str, Tensor]:
        """The tensors of the autoencoder, for activations as they are."""
        own = {name: x.detach().clone() for name, x in self.own.items()}
        if self.setting.kind == "batchtopk":
            own["threshold"] = own["centre"].new_tensor(max(self.kept, 0.0))
        return {
            name: x / self.scale if name in ("offsets", "centre", "threshold") else x
            for name, x in own.items()
        }

    # ---------------------------------------------------------------- to go on later

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and numbers that it goes on from, bit for bit."""
        held = {name: x.detach() for name, x in self.own.items()} | {"silent": self.silent}
        for name, x in self.own.items():
            for what, moment in self.optimizer.state.get(x, {}).items():
                held[f"{name}.{what}"] = moment
        return held, {name: getattr(self, name) for name in ("scale", "kept", "price", "step")}

    @staticmethod
    def again(
        setting: Setting, held: Mapping[str, Tensor], numbers: Mapping[str, float]
    ) -> Learner:
        """What `state` gave, on its way again."""
        names = [name for name in (*PARAMETERS, "threshold") if name in held]
        learner = Learner._with(setting, {name: held[name] for name in names}, numbers["scale"])
        learner.silent = held["silent"].clone()
        learner.kept, learner.price = numbers["kept"], numbers["price"]
        learner.step = int(numbers["step"])
        for name, x in learner.own.items():
            moments = {what: f"{name}.{what}" for what in ("step", "exp_avg", "exp_avg_sq")}
            if all(key in held for key in moments.values()):
                learner.optimizer.state[x] = {n: held[key].clone() for n, key in moments.items()}
        return learner


def found_share(
    known: Float[Tensor, "n d"], directions: Float[Tensor, "m d"], above: float = 0.9
) -> float:
    """The share of known directions to which one of others has such a cosine or a larger one."""
    if not len(directions):
        return 0.0
    cosines = F.normalize(known, dim=1) @ F.normalize(directions, dim=1).mT
    return (cosines.max(1).values > above).float().mean().item()


def _random(setting: Setting, rows: Float[Tensor, "n d"]) -> dict[str, Tensor]:
    centre = rows.mean(0)
    draw = torch.Generator().manual_seed(setting.seed)
    drawn = torch.randn(setting.width, len(centre), generator=draw)
    directions = F.normalize(drawn, dim=1).to(centre)
    own = {
        "reads": directions.clone(),
        "offsets": directions.new_zeros(setting.width),
        "directions": directions,
        "centre": centre,
    }
    if setting.kind == "jumprelu":
        values = (rows[: setting.rows] - centre) @ directions.mT
        _, least = activating.largest_of_all(values, setting.k)  # so many stay from the start
        own["threshold"] = torch.full_like(own["offsets"], least)
    return own


def _continued(setting: Setting, start: Autoencoder, scale: float, d: int) -> dict[str, Tensor]:
    """Of an autoencoder, its tensors for scaled activations, with directions of unit length."""
    if (start.width, start.d, start.kind) != (setting.width, d, setting.kind):
        raise InputError(
            f"start is {start.width} latents of {start.d}, of kind {start.kind!r}; asked for are "
            f"{setting.width} of {d}, of kind {setting.kind!r}"
        )
    lengths = start.directions.norm(dim=1).clamp(min=TINY)
    own = {
        "reads": start.reads * lengths[:, None],
        "offsets": start.offsets * lengths * scale,
        "directions": start.directions / lengths[:, None],
        "centre": start.centre * scale,
    }
    if start.threshold is not None:
        own["threshold"] = start.threshold * scale
        if setting.kind == "jumprelu":
            own["threshold"] = own["threshold"] * lengths
    return {name: x.float() for name, x in own.items()}
