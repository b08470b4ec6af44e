"""Does the map find the word? ``python -m benchmarks.localisation``

Real clips of three digits by speakers the embedded model was not trained on, corrupted by swapping
the digit that is asked for, for another digit of the same speaker. Patching the clean clip into the
corrupted one, in windows of a tenth of a second, should bring the answer back inside the swapped
digit's time and nowhere else. Counts over clips that the model answers correctly on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from audio_lens import AudioInputs, HookedAudioTransformer, Span, metrics, patching
from audio_lens.models.embedded import CHECKPOINT
from audio_lens.models.embedded.training import material, questions, scenes

WINDOW_S = 0.1
NEAR_ZERO = 0.1  # of the whole gap between corrupted and clean answer
ASKED = {"first": 0, "second": 1, "last": 2}
CARD = CHECKPOINT.parent / "README.md"
MARKS = "<!-- patching -->", "<!-- /patching -->"


@dataclass(frozen=True)
class Case:
    """A clean and a corrupted clip, and where they differ."""

    clean: scenes.Scene
    corrupted: scenes.Scene
    question: questions.Question
    against: str
    slot: Span


def draw_cases(seed: int) -> Iterator[Case]:
    """Endless random cases of the unseen speakers."""
    by_speaker = material.fsdd_words(material.UNSEEN_SPEAKERS, range(50))
    draw = np.random.default_rng(seed)
    while True:
        words = by_speaker[str(draw.choice(sorted(by_speaker)))]
        chosen = [words[i] for i in draw.choice(len(words), size=4, replace=False)]
        kind = str(draw.choice(list(ASKED)))
        index, other = ASKED[kind], chosen[3]
        if len({utterance.word for utterance in chosen}) < 4:
            continue
        longest = [max(map(scenes.seconds, (chosen[i], other))) for i in range(3)]
        gaps = scenes.draw_gaps(longest, draw)
        clean, corrupted = scenes.minimal_pair(chosen[:3], index, other, gaps)
        question = questions.ask(kind, clean.digits)
        placed = clean.words[index], corrupted.words[index]
        slot = Span(placed[0].start_s, max(word.end_s for word in placed), other.word)
        yield Case(clean, corrupted, question, other.word, slot)


def prepare(model: HookedAudioTransformer, case: Case) -> tuple[AudioInputs, AudioInputs]:
    """Inputs of both sides."""
    clean, corrupted = (
        model.prepare(scene.wave, case.question.text, sampling_rate=material.RATE)
        for scene in (case.clean, case.corrupted)
    )
    return clean, corrupted


def is_answered(model: HookedAudioTransformer, case: Case, pair: tuple) -> bool:
    """Whether the model says the right digit on both sides."""
    said = [model.generate(inputs, max_new_tokens=2)[0] for inputs in pair]
    return said == [case.question.answer, case.against]


def maps(model: HookedAudioTransformer, case: Case, pair: tuple) -> tuple[list[Span], torch.Tensor]:
    """Recovery at the connector and at every decoder layer, ``[1 + layers, windows]``."""
    options = {
        "clean": pair[0],
        "corrupted": pair[1],
        "metric": metrics.logit_diff(case.question.answer, case.against),
        "windows": WINDOW_S,
        "progress": False,
    }
    connector = patching.sweep(model, site="connector.out", axes="time", **options)
    decoder = patching.sweep(model, site="decoder.resid_pre", axes=("layer", "time"), **options)
    recovery = torch.cat([connector.recovery[None], decoder.recovery])
    return connector.coords["time"], recovery


@dataclass(frozen=True)
class Finding:
    """What one map shows: per row (connector, then decoder layers)."""

    peaks_inside: np.ndarray  # strongest window overlaps the swapped digit
    zero_outside: np.ndarray  # no window elsewhere reaches a tenth
    inside: np.ndarray  # summed recovery inside
    outside: np.ndarray  # largest |recovery| elsewhere


def judge(windows: list[Span], recovery: torch.Tensor, slot: Span) -> Finding:
    """Whether each row's map points at the swapped digit."""
    touches = np.array([w.start_s < slot.end_s and slot.start_s < w.end_s for w in windows])
    strength = recovery.abs().numpy()
    outside = strength[:, ~touches].max(axis=1)
    return Finding(
        peaks_inside=touches[strength.argmax(axis=1)],
        zero_outside=outside < NEAR_ZERO,
        inside=recovery.numpy()[:, touches].sum(axis=1),
        outside=outside,
    )


def summarise(findings: list[Finding], asked: int) -> dict:
    """Shares and means over clips, by row."""
    rows = ["connector", *(f"decoder layer {i}" for i in range(len(findings[0].inside) - 1))]

    def mean(name: str) -> np.ndarray:
        return np.mean([getattr(finding, name) for finding in findings], axis=0)

    both = np.mean([f.peaks_inside & f.zero_outside for f in findings], axis=0)
    columns = zip(
        rows,
        mean("peaks_inside"),
        mean("zero_outside"),
        both,
        mean("inside"),
        mean("outside"),
        strict=True,
    )
    names = ("peak inside", "near zero elsewhere", "both", "recovery inside", "largest elsewhere")
    table = {row: dict(zip(names, map(float, values), strict=True)) for row, *values in columns}
    return {"clips": len(findings), "asked": asked, "window_s": WINDOW_S, "rows": table}


def measure(clips: int, seed: int) -> dict:
    """The figures over the given number of correctly answered clips."""
    model, findings, asked = HookedAudioTransformer.from_pretrained("embedded"), [], 0
    with tqdm(total=clips, unit="clip") as bar:
        for case in draw_cases(seed):
            asked += 1
            pair = prepare(model, case)
            if not is_answered(model, case, pair):
                continue
            findings.append(judge(*maps(model, case, pair), case.slot))
            bar.update()
            if len(findings) == clips:
                return summarise(findings, asked)


def as_markdown(figures: dict) -> str:
    """The table for the model card."""
    names = list(figures["rows"]["connector"])
    lines = [
        f"Over {figures['clips']} clips of unseen real speakers that the model answers correctly "
        f"on both sides (of {figures['asked']} drawn): the clean clip patched into the corrupted "
        f"one in windows of {figures['window_s']} s. *Peak inside*: share of clips whose strongest "
        "window overlaps the swapped digit. *Near zero elsewhere*: share in which no other window "
        f"recovers more than {NEAR_ZERO:.0%} of the answer. Then the mean recovery summed over "
        "the windows of the digit, and of the strongest window elsewhere. Printed by "
        "`python -m benchmarks.localisation`.",
        "",
        "| patched at | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row, values in figures["rows"].items():
        shares = [f"{values[name]:.0%}" for name in names[:3]]
        lines.append(
            f"| {row} | " + " | ".join([*shares, *(f"{values[n]:.2f}" for n in names[3:])]) + " |"
        )
    return "\n".join(lines)


def write_card(figures: dict) -> None:
    """Put the table into its place in the model card."""
    before, _, rest = CARD.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    CARD.write_text(f"{before}{MARKS[0]}\n{as_markdown(figures)}\n{MARKS[1]}{after}")


def main(
    clips: Annotated[int, typer.Option(help="Correctly answered clips to count.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the random clips.")] = 0,
    card: Annotated[bool, typer.Option(help="Also write the table into the model card.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count how often the map finds the swapped digit."""
    figures = measure(clips, seed)
    if card:
        write_card(figures)
    console = Console()
    if as_json:
        console.print_json(json.dumps(figures))
        return
    table = Table("patched at", *figures["rows"]["connector"])
    for row, values in figures["rows"].items():
        table.add_row(row, *(f"{value:.2f}" for value in values.values()))
    console.print(table)
    console.print(f"{figures['clips']} clips answered correctly, of {figures['asked']} drawn")


if __name__ == "__main__":
    typer.run(main)
