"""Make the embedded model: ``python -m audio_lens.models.embedded.training.train --workdir W``.

Nine stages, each resumable from its last save in the working folder:

1. *teach*: words are collected and the teacher's states of them stored.
2. *listen*: the encoder learns the teacher's states and which digit sounds when.
3. *reason*: the language model learns the questions on stand-ins for audio, one noisy vector per
   40 ms for the digit that sounds, and on transcripts alone. (Independent of 2: both may run at
   once.)
4. *join*: the connector is fitted to the stand-ins, then everything learns to answer from audio.
5. *answer*: encoder and connector stay; the language model learns on.
6. *settle*: everything once more, at a small rate that falls to zero.
7. *room*: as 5, on clips with silence of every length before, between and behind the words.
8. *late*: as 6, on such clips, since the encoder heard few words so late in a clip before.
9. *again*: as 8, at a smaller rate and with fewer such clips, for what was lost meanwhile in noise.

With ``--from-shipped`` only the last three are run, from the checkpoint that is there.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from audio_lens.models.embedded import CHECKPOINT
from audio_lens.models.embedded.training import checkpoint, material
from audio_lens.models.embedded.training.batches import (
    Bank,
    Prompter,
    SampledClip,
    Surroundings,
    draw_clips,
    draw_reading,
    draw_task,
    frame_labels,
)
from audio_lens.models.embedded.training.ears import CLASSES, Ears
from audio_lens.models.embedded.training.network import PromptBatch, hear, read, think
from audio_lens.models.embedded.training.stages import Stage, record, run
from audio_lens.models.embedded.training.teacher import Targets, teach

log = logging.getLogger(__name__)
SEED = 7
QUESTIONS_PER_CLIP = 2
READINGS = 96
FSDD_FACTORS = (0.85, 0.93, 1.08, 1.17)


LISTEN = Stage("listen", steps=800, size=48, rate=1.2e-3, settle=100, zero=1400)
REASON = Stage("reason", steps=850, size=48, rate=1.5e-3, settle=850, zero=1200)
JOIN = Stage("join", steps=750, size=48, rate=1e-3, settle=700, zero=1100)
ANSWER = Stage("answer", steps=600, size=48, rate=1e-3, settle=250, zero=600, warmup=30)
SETTLE = Stage("settle", steps=130, size=48, rate=3e-4, settle=20, zero=130, warmup=20)
ROOM = Stage(*("room", 480, 48, 7e-4), settle=150, zero=480, warmup=30, decay=0.98, roomy=0.65)
HEADS = Stage("heads", steps=50, size=48, rate=3e-3, settle=10, zero=50, warmup=5, decay=0.9)
LATE = Stage(*("late", 80, 48, 4e-4), settle=20, zero=80, warmup=10, decay=0.95, roomy=0.65)
AGAIN = Stage(*("again", 140, 48, 3e-4), settle=20, zero=140, warmup=10, decay=0.97, roomy=0.35)
ECHOES, ECHOES_AT_ONCE = 4096, 32


def write_record(told: dict, into: Path) -> None:
    """Write ``stages``, as :func:`record` has them, and notes on the run beside a checkpoint."""
    (into.parent / "training.json").write_text(json.dumps(told, indent=1) + "\n")


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


def fit_heads(ears: Ears, bank: Bank, taught: Targets, workdir: Path) -> Ears:
    """Teach new heads what the encoder tells them, and leave the encoder as it is."""
    heads, around = nn.ModuleList([ears.to_teacher, ears.to_digit]), Surroundings(SEED)

    def loss(step: int) -> Tensor:
        draw = np.random.default_rng([SEED, 13, step])
        clips = draw_clips(bank, HEADS.size, [SEED, 12, step])
        heard = around.hear(clips, draw)
        with torch.no_grad():
            states, audio = hear(ears.tower, heard.mel, heard.tokens)
        return ears.judge(states, audio, clips, taught)

    ears.to_teacher, ears.to_digit = run(HEADS, heads, loss, workdir)
    return ears


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
    """Stages 4, 6, 8 and 9: answer from audio, all learning, while the teacher listens in.

    Args:
        stage: :data:`JOIN`, :data:`SETTLE`, :data:`LATE` or :data:`AGAIN`.
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
        clips = draw_clips(bank, stage.size, [SEED, 7, skip + step], stage.roomy)
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
        roomy: share of clips with silence of any length.
        skip: batches of clips that were drawn before.
    """

    @torch.no_grad()
    def __init__(
        self, model: Qwen2AudioForConditionalGeneration, bank: Bank, roomy: float, skip: int
    ):
        around = Surroundings(SEED)
        self.clips, self.audio = [], []
        for step in tqdm(range(skip, skip + ECHOES // ECHOES_AT_ONCE), "echoes", unit="batch"):
            clips = draw_clips(bank, ECHOES_AT_ONCE, [SEED, 9, step], roomy)
            heard = around.hear(clips, np.random.default_rng([SEED, 10, step]))
            with torch.autocast("cpu", torch.bfloat16):
                audio = hear(model.model.audio_tower, heard.mel, heard.tokens)[1]
                audio = model.model.multi_modal_projector(audio).float()
            self.clips += clips
            self.audio += [row[:length] for row, length in zip(audio, heard.tokens, strict=True)]

    def draw(self, size: int, draw: np.random.Generator) -> tuple[list[SampledClip], Tensor]:
        """Some clips of similar length, and their padded connector outputs."""
        some = draw.permutation(len(self.clips))[: 4 * size].tolist()
        order = sorted(some, key=self._length)
        first = size * int(draw.integers(4))
        chosen = order[first : first + size]
        audio = nn.utils.rnn.pad_sequence([self.audio[n] for n in chosen], batch_first=True)
        return [self.clips[n] for n in chosen], audio

    def _length(self, number: int) -> int:
        return self.clips[number].tokens


def answer(
    stage: Stage,
    model: Qwen2AudioForConditionalGeneration,
    bank: Bank,
    prompter: Prompter,
    workdir: Path,
    before: Sequence[Stage] = (),
) -> None:
    """Stages 5 and 7: the ears stay, the language model learns on at a third of the cost.

    Args:
        stage: :data:`ANSWER` or :data:`ROOM`.
        model: its language model is replaced by what it has learned.
        bank: words.
        prompter: of the model's tokenizer.
        workdir: for saves.
        before: stages of this kind whose clips were used before.
    """
    heard_before = len(before) * ECHOES // ECHOES_AT_ONCE
    echoes = cache(lambda: Echoes(model, bank, stage.roomy, heard_before))
    skip = sum(earlier.steps for earlier in before)
    end = model.config.text_config.eos_token_id
    parts = {"language_model": model.model.language_model, "lm_head": model.lm_head}

    def loss(step: int) -> Tensor:
        draw = np.random.default_rng([SEED, 11, skip + step])
        clips, audio = echoes().draw(stage.size, draw)
        tokens = torch.tensor([clip.tokens for clip in clips])
        prompts = ask_about(clips, tokens, prompter, draw)
        answered = answer_loss(think(model, audio, tokens, prompts), prompts, end)
        return answered + 0.5 * reading_loss(model, prompter, draw)

    learned = run(stage, nn.ModuleDict(parts), loss, workdir)
    for name, part in parts.items():
        part.load_state_dict(learned[name].state_dict())


def start() -> tuple[Qwen2AudioProcessor, Qwen2AudioForConditionalGeneration]:
    """A processor, and a model with fresh weights."""
    processor = checkpoint.build_processor()
    model = checkpoint.build_model(checkpoint.build_config(processor.tokenizer), SEED)
    model.set_attn_implementation({"text_config": "eager"})  # twice as fast backwards on a CPU
    return processor, model


def train(workdir: Path, into: Path, only: str | None = None) -> None:
    """Run all stages (those that are done already cost nothing), or one of the first three.

    Args:
        workdir: caches and saves.
        into: folder for the finished checkpoint, with a record of the training beside it.
        only: the one stage to run; then no checkpoint is written.
    """
    processor, model = start()
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
        answer(ANSWER, model, bank, prompter, workdir)
        whole = join(SETTLE, whole, bank, taught, prompter, workdir, skip=JOIN.steps)
        whole = make_room(whole, bank, taught, prompter, workdir)
        checkpoint.save(whole["model"], processor, into)
        made = (LISTEN, REASON, JOIN, ANSWER, SETTLE, ROOM, LATE, AGAIN)
        write_record({"stages": record(made, workdir), "notes": []}, into)


def make_room(
    whole: nn.ModuleDict, bank: Bank, taught: Targets, prompter: Prompter, workdir: Path
) -> nn.ModuleDict:
    """Stages 7 to 9, on clips that were not drawn before."""
    answer(ROOM, whole["model"], bank, prompter, workdir, before=[ANSWER])
    skip = JOIN.steps + SETTLE.steps
    for stage in (LATE, AGAIN):
        whole = join(stage, whole, bank, taught, prompter, workdir, skip=skip)
        skip += stage.steps
    return whole


def train_on(workdir: Path, into: Path) -> None:
    """Run the last three stages from the shipped checkpoint, with new heads for its encoder.

    Args:
        workdir: caches and saves.
        into: folder for the finished checkpoint; the record beside the shipped one, with these
            stages in it, is written beside it.
    """
    told = json.loads((CHECKPOINT.parent / "training.json").read_text())
    processor, model = start()
    shipped = Qwen2AudioForConditionalGeneration.from_pretrained(CHECKPOINT)
    model.load_state_dict(shipped.state_dict())
    bank = training_words(workdir)
    taught = targets(bank, workdir)
    ears = fit_heads(Ears(model.model.audio_tower), bank, taught, workdir)
    whole = nn.ModuleDict({"model": model, "ears": ears})
    whole = make_room(whole, bank, taught, Prompter(processor), workdir)
    checkpoint.save(whole["model"], processor, into)
    stages = told["stages"] | record([HEADS, ROOM, LATE, AGAIN], workdir)
    write_record({"stages": stages, "notes": told["notes"]}, into)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--workdir", type=Path, required=True, help="caches and saves")
    parser.add_argument("--into", type=Path, default=CHECKPOINT, help="the checkpoint")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stage", choices=["teach", "listen", "reason"], help="only this one")
    which.add_argument(
        "--from-shipped", action="store_true", help="only the last three, from the checkpoint"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    if arguments.from_shipped:
        train_on(arguments.workdir, arguments.into)
    else:
        train(arguments.workdir, arguments.into, arguments.stage)


if __name__ == "__main__":
    main()
