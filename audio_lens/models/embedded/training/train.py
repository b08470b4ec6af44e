"""Make the embedded model: ``python -m audio_lens.models.embedded.training.train --workdir W``.

Four stages, each resumable from its last save in the working folder:

1. *teach*: words are collected and the teacher's states of them stored.
2. *listen*: the encoder learns the teacher's states and which digit sounds when.
3. *reason*: the language model learns the questions on stand-ins for audio, one noisy vector per
   40 ms for the digit that sounds, and on transcripts alone. (Independent of 2: both may run at
   once.)
4. *join*: the connector is fitted to the stand-ins, then everything learns to answer from audio.
5. *answer*: encoder and connector stay; the language model learns on.
6. *settle*: everything once more, at a small rate that falls to zero.
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import Qwen2AudioForConditionalGeneration

from audio_lens.models.embedded import CHECKPOINT
from audio_lens.models.embedded.training import checkpoint, material
from audio_lens.models.embedded.training.batches import (
    SILENCE,
    Bank,
    Heard,
    Prompter,
    SampledClip,
    Surroundings,
    draw_clips,
    draw_reading,
    draw_task,
    frame_labels,
)
from audio_lens.models.embedded.training.network import PromptBatch, hear, read, think
from audio_lens.models.embedded.training.teacher import Targets, teach

log = logging.getLogger(__name__)
SEED = 7
CLASSES = SILENCE + 1
QUESTIONS_PER_CLIP = 2
READINGS = 96
SAVE_EVERY = 50
FSDD_FACTORS = (0.85, 0.93, 1.08, 1.17)


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        name: of its save.
        steps: how many.
        size: clips per step.
        rate: peak learning rate, reached after ``warmup`` steps.
        settle: step from which the rate falls by half a cosine.
        zero: step at which it reaches zero (a stage that another one carries on ends before).
    """

    name: str
    steps: int
    size: int
    rate: float
    settle: int
    zero: int
    warmup: int = 100


LISTEN = Stage("listen", steps=800, size=48, rate=1.2e-3, settle=100, zero=1400)
REASON = Stage("reason", steps=850, size=48, rate=1.5e-3, settle=850, zero=1200)
JOIN = Stage("join", steps=750, size=48, rate=1e-3, settle=700, zero=1100)
ANSWER = Stage("answer", steps=600, size=48, rate=1e-3, settle=250, zero=600, warmup=30)
SETTLE = Stage("settle", steps=130, size=48, rate=3e-4, settle=20, zero=130, warmup=20)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, a plateau, and half a cosine down to zero."""
    falling = max(0, step - stage.settle) / (stage.zero - stage.settle)
    return (
        stage.rate * min(1.0, (step + 1) / stage.warmup) * 0.5 * (1 + math.cos(math.pi * falling))
    )


def run(stage: Stage, parts: nn.Module, loss: Callable[[int], Tensor], workdir: Path) -> nn.Module:
    """Train ``parts`` by ``loss(step)`` from the last save on; returns the averaged parts.

    A step's data depends on its number alone, so a run that was killed goes on as if it had not.
    """
    optimiser = torch.optim.AdamW(parts.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    average = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    state = {"parts": parts, "optimiser": optimiser, "average": average}
    path = workdir / f"{stage.name}.pt"
    start, spent = _resume(path, state)
    began = time.monotonic() - spent
    bar = tqdm(range(start, stage.steps), stage.name, stage.steps, initial=start, unit="step")
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, step)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(parts)
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
            _save(path, state, step + 1, time.monotonic() - began)
    return average.module


def _save(path: Path, state: dict, step: int, seconds: float) -> None:
    partial = path.with_suffix(".part")
    saved = {name: module.state_dict() for name, module in state.items()}
    torch.save(saved | {"step": step, "seconds": seconds}, partial)
    os.replace(partial, path)


def _resume(path: Path, state: dict) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path)
    for name, module in state.items():
        module.load_state_dict(saved[name])
    log.info("%s: going on from step %d", path.stem, saved["step"])
    return saved["step"], saved["seconds"]


def record(workdir: Path) -> dict[str, dict]:
    """Steps, clips per step and seconds of every stage, and room for notes on the run."""
    stages = {
        stage.name: {
            "steps": saved["step"],
            "clips per step": stage.size,
            "seconds": round(saved["seconds"]),
        }
        for stage in (LISTEN, REASON, JOIN, ANSWER, SETTLE)
        for saved in [torch.load(workdir / f"{stage.name}.pt", mmap=True)]
    }
    return {"stages": stages, "notes": []}


def training_words(workdir: Path) -> Bank:
    """Real recordings at five speeds; espeak-ng voices at three settings, one band-limited."""
    real = material.fsdd_words(material.SEEN_SPEAKERS, material.TRAIN_TAKES)
    for said in list(real.values()):
        for factor in FSDD_FACTORS:
            faster = [material.resampled(utterance, factor) for utterance in said]
            real[faster[0].speaker] = faster
    voices = material.train_voices()
    voices += tuple(material.other_setting(voice, 1) for voice in voices)
    spoken = material.espeak_words(voices, workdir / "espeak")
    others = [material.other_setting(voice, 2) for voice in material.train_voices()]
    narrow = material.espeak_words(others, workdir / "espeak")
    narrow = {
        f"{name}~8k": [material.band_limited(utterance) for utterance in said]
        for name, said in narrow.items()
    }
    return Bank(real | spoken | narrow, real=list(real))


def targets(bank: Bank, workdir: Path) -> Targets:
    """The teacher's states of every word of the bank, stored on first use."""
    path = workdir / "teacher.npz"
    if not path.exists():
        taught = teach(bank.words)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, states=taught.states, offsets=taught.offsets)
        os.replace(partial, path)
    stored = np.load(path)
    return Targets(stored["states"], stored["offsets"])


def place(taught: Targets, clips: Sequence[SampledClip], positions: int) -> tuple[Tensor, Tensor]:
    """Teacher states where the words are, and a mask of where that is."""
    states = torch.zeros(len(clips), positions, taught.states.shape[1])
    there = torch.zeros(len(clips), positions, dtype=torch.bool)
    for row, clip in enumerate(clips):
        for placed, word in zip(clip.scene.words, clip.words, strict=True):
            state = taught.of(word)
            first = round(placed.start_s * 50)
            states[row, first : first + len(state)] = torch.from_numpy(state)
            there[row, first : first + len(state)] = True
    return states, there


class Ears(nn.Module):
    """The encoder with two heads that are thrown away: teacher states, and the sounding digit."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        width = tower.config.d_model
        self.tower = tower
        self.to_teacher = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 384))
        self.to_digit = nn.Linear(width, CLASSES)

    def listen(
        self, heard: Heard, clips: Sequence[SampledClip], taught: Targets
    ) -> tuple[Tensor, Tensor]:
        """What the encoder makes of clips, and how far that is from teacher and labels.

        Returns:
            Pooled states, 25 per second, and the loss: mean square error of the teacher's states
            inside words plus cross entropy of the digit that sounds in each 40 ms.
        """
        states, audio = hear(self.tower, heard.mel, heard.tokens)
        wanted, there = place(taught, clips, states.shape[1])
        inside = torch.arange(audio.shape[1]) < heard.tokens[:, None]
        labels = frame_labels(clips, audio.shape[1])[inside]
        digit = functional.cross_entropy(self.to_digit(audio[inside]).float(), labels)
        told = self.to_teacher(states[there]).float()
        return audio, functional.mse_loss(told, wanted[there]) + digit


def listen(
    model: Qwen2AudioForConditionalGeneration, bank: Bank, taught: Targets, workdir: Path
) -> Ears:
    """Stage 2: distil the teacher into the encoder."""
    ears, around = Ears(model.model.audio_tower), Surroundings(SEED)

    def loss(step: int) -> Tensor:
        draw = np.random.default_rng([SEED, 2, step])
        clips = draw_clips(bank, LISTEN.size, [SEED, 1, step])
        heard = around.hear(clips, draw)
        return ears.listen(heard, clips, taught)[1]

    return run(LISTEN, ears, loss, workdir)


class Reasoner(nn.Module):
    """The language model, with a vector for each digit (and silence) in place of audio."""

    def __init__(self, model: Qwen2AudioForConditionalGeneration):
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.stand_in = nn.Embedding(CLASSES, model.config.text_config.hidden_size)


def answer_loss(logits: Tensor, prompts: PromptBatch, end: int) -> Tensor:
    """Cross entropy of the answer, and a little of the turn's end after it."""
    ends = torch.full_like(prompts.answer, end)
    return functional.cross_entropy(logits[:, 0].float(), prompts.answer) + 0.1 * (
        functional.cross_entropy(logits[:, 1].float(), ends)
    )


def ask_about(
    clips: Sequence[SampledClip], tokens: Tensor, prompter: Prompter, draw: np.random.Generator
) -> PromptBatch:
    """Some questions about every clip."""
    about = [number for number in range(len(clips)) for _ in range(QUESTIONS_PER_CLIP)]
    tasks = [draw_task(clips[number].scene.digits, draw) for number in about]
    return prompter.prompts(tasks, about, tokens)


def reading_loss(
    model: Qwen2AudioForConditionalGeneration, prompter: Prompter, draw: np.random.Generator
) -> Tensor:
    """Some questions about transcripts without audio, which are short and therefore cheap."""
    prompts = prompter.prompts([draw_reading(draw) for _ in range(READINGS)])
    return answer_loss(read(model, prompts), prompts, model.config.text_config.eos_token_id)


def smudge(labels: Tensor, draw: np.random.Generator) -> Tensor:
    """Frame labels with a few of them replaced, as a fallible ear would hear."""
    wrong = torch.from_numpy(draw.random(labels.shape) < 0.06)
    random = torch.from_numpy(draw.integers(CLASSES, size=labels.shape))
    return torch.where(wrong, random, labels)


def reason(
    model: Qwen2AudioForConditionalGeneration, bank: Bank, prompter: Prompter, workdir: Path
) -> Reasoner:
    """Stage 3: teach the language model the questions without any audio."""
    reasoner, end = Reasoner(model), model.config.text_config.eos_token_id

    def loss(step: int) -> Tensor:
        draw = np.random.default_rng([SEED, 4, step])
        clips = draw_clips(bank, REASON.size, [SEED, 3, step])
        tokens = torch.tensor([clip.tokens for clip in clips])
        labels = smudge(frame_labels(clips, int(tokens.max())), draw)
        audio = reasoner.stand_in(labels)
        noise = torch.from_numpy(draw.standard_normal(audio.shape, np.float32))
        audio = audio + 0.5 * audio.detach().square().mean().sqrt() * noise
        prompts = ask_about(clips, tokens, prompter, draw)
        answered = answer_loss(think(model, audio, tokens, prompts), prompts, end)
        return answered + 0.5 * reading_loss(model, prompter, draw)

    return run(REASON, reasoner, loss, workdir)


@torch.no_grad()
def fit_connector(
    model: Qwen2AudioForConditionalGeneration, stand_in: Tensor, bank: Bank, around: Surroundings
) -> None:
    """Set the connector to the least-squares map from what is heard to the stand-ins."""
    inputs, outputs = [], []
    for step in range(24):
        clips = draw_clips(bank, 32, [SEED, 5, step])
        heard = around.hear(clips, np.random.default_rng([SEED, 6, step]))
        with torch.autocast("cpu", torch.bfloat16):
            audio = hear(model.model.audio_tower, heard.mel, heard.tokens)[1].float()
        inside = torch.arange(audio.shape[1]) < heard.tokens[:, None]
        inputs.append(functional.pad(audio[inside], (0, 1), value=1.0))
        outputs.append(stand_in[frame_labels(clips, audio.shape[1])[inside]])
    solution = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution
    linear = model.model.multi_modal_projector.linear
    linear.weight.copy_(solution[:-1].T)
    linear.bias.copy_(solution[-1])


def join(
    stage: Stage,
    whole: nn.ModuleDict,
    bank: Bank,
    taught: Targets,
    prompter: Prompter,
    workdir: Path,
    skip: int = 0,
) -> nn.ModuleDict:
    """Stages 4 and 6: answer from audio, everything learning, while the teacher listens in.

    Args:
        stage: :data:`JOIN` or :data:`SETTLE`.
        whole: ``model``, and ``ears`` that share its encoder.
        bank: words.
        taught: the teacher's states of them.
        prompter: of the model's tokenizer.
        workdir: for saves.
        skip: steps whose data was used before.

    Returns:
        ``model`` and ``ears``, averaged.
    """
    model, ears, around = whole["model"], whole["ears"], Surroundings(SEED)
    end = model.config.text_config.eos_token_id

    def loss(step: int) -> Tensor:
        draw = np.random.default_rng([SEED, 8, skip + step])
        clips = draw_clips(bank, stage.size, [SEED, 7, skip + step])
        heard = around.hear(clips, draw)
        audio, ear_loss = ears.listen(heard, clips, taught)
        prompts = ask_about(clips, heard.tokens, prompter, draw)
        connected = model.model.multi_modal_projector(audio)
        answered = answer_loss(think(model, connected, heard.tokens, prompts), prompts, end)
        return answered + 0.5 * (ear_loss + reading_loss(model, prompter, draw))

    return run(stage, whole, loss, workdir)


class Echoes:
    """Connector outputs of many clips, heard once and for all.

    Args:
        model: its encoder and connector listen.
        bank: words of the clips.
        count: of the clips.
    """

    @torch.no_grad()
    def __init__(self, model: Qwen2AudioForConditionalGeneration, bank: Bank, count: int):
        around = Surroundings(SEED)
        self.clips, self.audio = [], []
        for step in tqdm(range(count // 32), "echoes", unit="batch"):
            clips = draw_clips(bank, 32, [SEED, 9, step])
            heard = around.hear(clips, np.random.default_rng([SEED, 10, step]))
            with torch.autocast("cpu", torch.bfloat16):
                audio = hear(model.model.audio_tower, heard.mel, heard.tokens)[1]
                audio = model.model.multi_modal_projector(audio).float()
            self.clips += clips
            self.audio += [row[:length] for row, length in zip(audio, heard.tokens, strict=True)]

    def draw(self, size: int, draw: np.random.Generator) -> tuple[list[SampledClip], Tensor]:
        """Some clips of similar length, and their padded connector outputs."""
        order = sorted(draw.permutation(len(self.clips))[: 4 * size], key=self._length)
        first = size * int(draw.integers(4))
        chosen = order[first : first + size]
        audio = nn.utils.rnn.pad_sequence([self.audio[n] for n in chosen], batch_first=True)
        return [self.clips[n] for n in chosen], audio

    def _length(self, number: int) -> int:
        return self.clips[number].tokens


def answer(
    model: Qwen2AudioForConditionalGeneration, bank: Bank, prompter: Prompter, workdir: Path
) -> nn.ModuleDict:
    """Stage 5: the ears stay as they are, the language model learns on at a third of the cost."""
    echoes = cache(lambda: Echoes(model, bank, 4096))
    end = model.config.text_config.eos_token_id
    parts = {"language_model": model.model.language_model, "lm_head": model.lm_head}

    def loss(step: int) -> Tensor:
        draw = np.random.default_rng([SEED, 11, step])
        clips, audio = echoes().draw(ANSWER.size, draw)
        tokens = torch.tensor([clip.tokens for clip in clips])
        prompts = ask_about(clips, tokens, prompter, draw)
        answered = answer_loss(think(model, audio, tokens, prompts), prompts, end)
        return answered + 0.5 * reading_loss(model, prompter, draw)

    return run(ANSWER, nn.ModuleDict(parts), loss, workdir)


def train(workdir: Path, into: Path, only: str | None = None) -> None:
    """Run all stages (those that are done already cost nothing), or one of the first three.

    Args:
        workdir: caches and saves.
        into: folder for the finished checkpoint, with a record of the training beside it.
        only: the one stage to run; then no checkpoint is written.
    """
    processor = checkpoint.build_processor()
    model = checkpoint.build_model(checkpoint.build_config(processor.tokenizer), SEED)
    model.set_attn_implementation({"text_config": "eager"})  # twice as fast backwards on a CPU
    prompter, bank = Prompter(processor), training_words(workdir)
    log.info("%d words of %d speakers and settings", len(bank.words), len(bank.groups))
    taught = targets(bank, workdir)
    if only in (None, "listen"):
        ears = listen(model, bank, taught, workdir)
    if only in (None, "reason"):
        reasoner = reason(model, bank, prompter, workdir)
    if only is None:
        model.model.audio_tower.load_state_dict(ears.tower.state_dict())
        model.model.language_model.load_state_dict(reasoner.language_model.state_dict())
        model.lm_head.load_state_dict(reasoner.lm_head.state_dict())
        fit_connector(model, reasoner.stand_in.weight.detach(), bank, Surroundings(SEED))
        ears.tower = model.model.audio_tower
        whole = nn.ModuleDict({"model": model, "ears": ears})
        whole = join(JOIN, whole, bank, taught, prompter, workdir)
        model = whole["model"]
        answering = answer(model, bank, prompter, workdir)
        model.model.language_model.load_state_dict(answering["language_model"].state_dict())
        model.lm_head.load_state_dict(answering["lm_head"].state_dict())
        whole = join(SETTLE, whole, bank, taught, prompter, workdir, skip=JOIN.steps)
        checkpoint.save(whole["model"], processor, into)
        (into.parent / "training.json").write_text(json.dumps(record(workdir), indent=1) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--workdir", type=Path, required=True, help="caches and saves")
    parser.add_argument("--into", type=Path, default=CHECKPOINT, help="the checkpoint")
    parser.add_argument("--stage", choices=["teach", "listen", "reason"], help="only this one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    train(arguments.workdir, arguments.into, arguments.stage)


if __name__ == "__main__":
    main()
