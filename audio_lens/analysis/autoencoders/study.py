"""What ``audio-lens analyse autoencoders`` runs: what latents keep, and what turning them does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from audio_lens.analysis.autoencoders.evaluating import encoded, evaluate
from audio_lens.analysis.autoencoders.ranking import rank
from audio_lens.analysis.autoencoders.splicing import splice
from audio_lens.analysis.autoencoders.steered import steer
from audio_lens.analysis.autoencoders.training import train
from audio_lens.analysis.encoder_lens.streams import site_of_streams
from audio_lens.errors import InputError
from audio_lens.items import ItemError, Items, analysis, collect
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

WIDTH, K, STEPS = 512, 16, 400
TURNED, GAIN = 20, 4.0  # latents, and times the mean that they have where the answer is right
SHARE = 0.5  # of the groups that is not trained on


@analysis("autoencoders")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """What do a few sparse latents keep of what is heard, and do those of an answer bring it?

    512 latents, 16 at a time, are trained on the last block of the encoder over half of the groups
    (of the items, where there is one group) and read on the other half: how much of the
    activations they lose ("lost"), what is answered over reconstructions ("kept"), and how often
    the commonest answer is given to items of other answers when the 20 latents that go with it are
    turned up, beside 20 others ("steered").
    """
    site = site_of_streams(model)
    if model.cfg.encoder is None or not site.startswith("encoder"):
        raise InputError(f"{model.cfg.model_name} has no encoder of blocks to train on")
    layer = model.cfg.encoder.n_layers - 1
    site = "encoder.resid_post"
    groups = {item.group for item in items}
    by = "group" if len(groups) > 1 and None not in groups else "id"
    fitted, tested = items.split(by, SHARE, seed)
    placed: dict[str, Any] = {"layers": [layer], "progress": progress}
    acts = collect(model, fitted, site, **placed)
    made = train(acts, min(WIDTH, 4 * len(acts)), K, steps=STEPS, seed=seed, progress=progress)
    results = {"lost": evaluate(made, collect(model, tested, site, **placed), seed=seed)}
    if any(item.answer is None for item in items):
        return results
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    results["kept"] = splice(model, tested, made, **options)
    answers = Counter(str(item.answer) for item in fitted)
    target, _ = answers.most_common(1)[0]
    others = [item for item in tested if item.answer != target]
    if len(answers) < 2 or not others:
        results["kept"].report.append("all items have one answer: none could be turned to another")
        return results
    ranking = rank(made, acts, "answer", target)
    top = ranking.top(TURNED)
    active = torch.zeros(made.width, dtype=torch.bool)
    for block in encoded(made, acts):
        active |= (block.latents > 0).any(0)
    among = active.nonzero()[:, 0].tolist()
    if len(top) > len(among) - len(top):
        raise ItemError("too few latents are active to compare those of an answer with others")
    values = GAIN * ranking.means[top]
    results["steered"] = steer(
        model, Items.of(others), made, top, target, value=values, among=among, **options
    )
    return results
