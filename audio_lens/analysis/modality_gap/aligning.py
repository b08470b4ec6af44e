"""The path along which what is read goes through what is heard (2510.12116)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.errors import InputError

_LEAST = 1e-30  # a vector shorter than that has no direction


@dataclass(frozen=True)
class Path:
    """A monotone way through all tokens and all frames.

    Attributes:
        token, frame: of every step of the way, both never falling.
        n_tokens, n_frames: how many there are.
    """

    token: Int[Tensor, " steps"] = field(repr=False)
    frame: Int[Tensor, " steps"] = field(repr=False)
    n_tokens: int
    n_frames: int

    @property
    def slope(self) -> float:
        """Tokens for each frame, by a line through the path; NaN of a single frame."""
        x, y = self.frame.double(), self.token.double()
        x = x - x.mean()
        return float((x * y).sum() / x.square().sum())

    def mean(self, of: Float[Tensor, "tokens frames"]) -> float:
        """The mean along the path of what every token and frame have."""
        return float(of[self.token, self.frame].mean())

    def by_token(self, of: Float[Tensor, "tokens frames"]) -> Float[Tensor, " tokens"]:
        """The mean over every token's steps."""
        sums = torch.zeros(self.n_tokens, dtype=torch.float64)
        sums = sums.index_add(0, self.token, of[self.token, self.frame].double())
        return sums / torch.bincount(self.token, minlength=self.n_tokens)

    def of_frames(self, of: Float[Tensor, "tokens frames"]) -> Int[Tensor, " frames"]:
        """The token of every frame: of several, the one that ``of`` is highest for."""
        masked = torch.full((self.n_tokens, self.n_frames), -torch.inf, dtype=torch.float64)
        masked[self.token, self.frame] = of[self.token, self.frame].double()
        return masked.argmax(0)


def cosines(
    text: Float[Tensor, "*l tokens d"], speech: Float[Tensor, "*l frames d"]
) -> Float[Tensor, "*l tokens frames"]:
    """The cosine of every token with every frame."""
    one, other = (
        x.double() / x.double().norm(dim=-1, keepdim=True).clamp(min=_LEAST) for x in (text, speech)
    )
    return (one @ other.mT).clamp(-1, 1)


def distances(
    text: Float[Tensor, "*l tokens d"], speech: Float[Tensor, "*l frames d"]
) -> Float[Tensor, "*l tokens frames"]:
    """The Euclidean distance of every token from every frame."""
    return torch.cdist(text.double(), speech.double())


def align(
    text: Float[Tensor, "tokens d"], speech: Float[Tensor, "frames e"]
) -> tuple[Path, Float[Tensor, "tokens frames"]]:
    """The path of the text's vectors through those of speech, and the cosines that it follows.

    Dynamic time warping: from the first token and frame to the last of both, each step one token,
    one frame, or both further, so that the sum of 1 minus the cosine is least.

    Raises:
        InputError: no vectors, or of unequal lengths.
    """
    if not len(text) or not len(speech) or text.shape[-1] != speech.shape[-1]:
        raise InputError(
            f"a path needs vectors of one length on both sides, got {list(text.shape)} and "
            f"{list(speech.shape)}"
        )
    similar = cosines(text, speech)
    return paths(similar[None])[0], similar


def path_score(text: Float[Tensor, "tokens d"], speech: Float[Tensor, "frames e"]) -> float:
    """The alignment path score: the mean cosine along the path; 1 for copies and stretched copies.

    Raises:
        InputError: as `align`.
    """
    path, similar = align(text, speech)
    return path.mean(similar)


def paths(similar: Float[Tensor, "layers tokens frames"]) -> list[Path]:
    """The path of every layer through its cosines."""
    layers, n_tokens, n_frames = similar.shape
    costs = torch.full((layers, n_tokens + 1, n_frames + 1), torch.inf, dtype=torch.float64)
    costs[:, 0, 0] = 0
    for total in range(n_tokens + n_frames - 1):  # cells of one antidiagonal do not need each other
        i = torch.arange(max(0, total - n_frames + 1), min(total, n_tokens - 1) + 1)
        j = total - i
        before = torch.stack([costs[:, i, j], costs[:, i, j + 1], costs[:, i + 1, j]]).amin(0)
        costs[:, i + 1, j + 1] = before + 1 - similar[:, i, j]
    return [_back(one, n_tokens, n_frames) for one in costs]


def _back(costs: Float[Tensor, "more_tokens more_frames"], n_tokens: int, n_frames: int) -> Path:
    """From the end to the start, by the cheapest way; both further where it costs the same."""
    held = costs.tolist()
    i, j = n_tokens - 1, n_frames - 1
    steps = [(i, j)]
    while i or j:
        ways = ((held[i][j], i - 1, j - 1), (held[i][j + 1], i - 1, j), (held[i + 1][j], i, j - 1))
        _, i, j = min(ways, key=lambda way: way[0])
        steps.append((i, j))
    token, frame = torch.tensor(steps[::-1]).unbind(1)
    return Path(token, frame, n_tokens, n_frames)
