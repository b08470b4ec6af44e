"""The model card, written from measured numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from audio_lens.models.embedded.training.questions import KINDS

SOURCES = ("seen real", "unseen real", "seen synthetic", "unseen synthetic")
SOUNDS = ("clean", "noisy")
PLACES = tuple(f"{source} | {sound}" for source in SOURCES for sound in SOUNDS)
ADDED_S = (0.3, 0.6, 0.9, 1.2, 1.5)
ADDED = {
    "none": (0.0, 0.0),
    **{f"{seconds} s before": (seconds, 0.0) for seconds in ADDED_S},
    **{f"{seconds} s behind": (0.0, seconds) for seconds in ADDED_S},
}
"""Silence that clips are lengthened by, before and behind, by its name."""
PATCHING = "<!-- patching -->", "<!-- /patching -->"

Rates = Mapping[str, Mapping[str, float]]

INTRODUCTION = """\
# The embedded model

A real audio language model in miniature, shipped with audio_lens: a genuine Qwen2-Audio
(`checkpoint/` loads in `AutoProcessor` and `Qwen2AudioForConditionalGeneration` of transformers
too). It hears clips of up to four seconds with one to three spoken digits and answers questions
about them in one word. It exists so that patching, tracing and the question whether a model
listens or reads can be studied offline, on a laptop, in seconds. It is no speech recogniser.

## What it can be asked

{questions}

The question stands before or after the audio. In front of it may stand a transcript ("The
transcript says: seven two five."), true or false, and "Trust the audio." or "Trust the text.".
**A false transcript without an instruction was left out of training on purpose**: which of the
two the model believes then is measured below and was not taught. A transcript can also be asked
about without any audio.

`clips/` holds four minimal pairs said by held-out synthetic voices: two clips of one layout that
differ in a single digit, chosen so that the model answers both sides right; `clips.json` has the
exact times of the words, the questions and the answers.
"""

MAKING = """\
## Architecture

{parameters:,} parameters in float32. Encoder: 80 log-mel bins, two convolutions, 4 layers of
width 256 (4 heads), 50 positions per second; mean pool of two, layer norm, linear connector: 25
audio tokens per second. Language model: Qwen2 of 6 layers of width 192, 6 query heads on 2
key/value heads of 32, feed-forward 384, rotary base 10,000, untied embeddings; byte-level BPE in
which every word of the questions is one token.

## Sources and licences

{sources}

## Training

1. *listen*: the encoder regresses Whisper's states of each single word, pasted where the word is
   in the clip, and tells which digit sounds in every 40 ms; words at several speeds and pitches,
   warped vocal tracts, rooms, noise, coloured and band-limited channels.
2. *reason*: the language model learns the questions on noisy stand-ins for audio, one vector per
   digit, and on transcripts without any audio.
3. *join*: the connector is fitted to the stand-ins by least squares, then everything is trained
   on answers from audio, with the losses of *listen* and the transcripts without audio beside.
4. *answer*: encoder and connector stay as they are, and the language model learns on from 4,096
   clips that were heard once; the learning rate falls to zero.
5. *settle*: everything once more as in *join*, at a small rate that falls to zero.
6. *room*: as *answer*, from 4,096 other clips, of which two in three have silence of any length
   around their words, up to the four seconds in all and more often behind than before. Half of
   these are padded with zeros from somewhere before the first word and behind the last; in the
   others room and noise go on through it.
7. *late*: as *settle*, on such clips, since the encoder had hardly heard words so late in a clip.
8. *again*: as *late*, at a smaller rate and with one such clip in three, since *late* had cost
   answers in noise.

Weights are averaged in each stage (decay 0.99; 0.98 in *room*, 0.95 in *late*, 0.97 in *again*),
all heads are thrown away. The last three stages can be run alone, from the checkpoint that is
there; the encoder's two heads are then trained anew before (*heads*).

{stages}

{notes}
Choices were made by the test takes of the seen speakers and by the held-out synthetic voices, which
are therefore unseen in training but not in choosing. The accuracy on nicolas and theo was looked at
on the way, but no choice was made by it. To reproduce the model:

    python -m audio_lens.models.embedded.training.train --workdir W
    python -m audio_lens.models.embedded.training.clips --workdir W
    python -m audio_lens.models.embedded.training.evaluate --workdir W

and for *room*, *late* and *again* alone, from a checkpoint that has none of them:

    python -m audio_lens.models.embedded.training.train --workdir W --from-shipped
"""

MATERIAL = (
    (
        "Free Spoken Digit Dataset: george, jackson, yweweler, takes 5 to 49 "
        "(nicolas and theo for the tests below only)",
        "training audio; none of it is shipped",
        "CC BY-SA 4.0",
    ),
    (
        "espeak-ng 1.51: 138 English and foreign-accented voices at three settings",
        "training audio; the shipped clips (held-out voices)",
        "output of the program, ours",
    ),
    (
        "OpenAI Whisper tiny.en, encoder",
        "teacher of the encoder; none of its weights are shipped",
        "MIT",
    ),
    (
        "speechbrain room responses 1 to 3 and noise 2 (4 and 3 for the tests)",
        "augmentation; not shipped",
        "Apache-2.0",
    ),
)

LIMITS = """\
## Limits

- Digits only, in English, one speaker at a time, words apart from each other, four seconds.
- The real speakers, trained and tested, are five men; women's voices are synthetic.
- It knows the phrasings above and answers other texts with something.
- Two real unseen speakers are few: read the accuracy on them by speaker.
- More than 0.9 s of silence before the words costs answers about the late ones; behind them it
  does not.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(rates: Rates, key: str) -> str:
    """Per cent and count, or a dash where nothing was asked."""
    if key not in rates:
        return "-"
    return f"{100 * rates[key]['share']:.1f} ({rates[key]['count']})"


def crossed(rates: Rates, rows: Sequence[str], columns: Sequence[str], corner: str) -> str:
    """A table of ``row | column`` keys."""
    body = [[row, *(cell(rates, f"{row} | {column}") for column in columns)] for row in rows]
    return table([corner, *(column.replace(" | ", ", ") for column in columns)], body)


def accuracy(metrics: Mapping[str, Rates]) -> str:
    """The sections with numbers."""
    conditions = list(dict.fromkeys(key.split(" | ")[0] for key in metrics["trust"]))
    speakers = list(dict.fromkeys(k.split(" | ")[0] for k in metrics["which digit by speaker"]))
    opened = [
        [
            f"follows the {side}",
            *(cell(metrics[f"open conflict, follows {side}"], s) for s in SOURCES),
        ]
        for side in ("audio", "text")
    ]
    obeys = [["obeys", *(cell(metrics["obeys audio where heard right"], s) for s in SOURCES)]]
    return "\n\n".join(
        [
            "## Accuracy",
            "Per cent right (count) of the most probable next token among the whole vocabulary. "
            "Seen real: takes 0 to 4 of the training speakers; unseen real: nicolas and theo; seen "
            "synthetic: training voices at another rate and pitch; unseen synthetic: voices held "
            "out. Noisy: an unseen room and unseen noise 15 dB below the words.",
            "### Which digit (first, second, third, last), no transcript",
            crossed(metrics["which digit"], SOURCES, SOUNDS, ""),
            crossed(metrics["which digit by speaker"], speakers, SOUNDS, "speaker"),
            "### By type of question, no transcript",
            crossed(metrics["by kind"], list(KINDS), PLACES, "question"),
            "### By number of digits (which digit, no transcript)",
            crossed(metrics["by number of digits"], ("1", "2", "3"), PLACES, "digits"),
            "### Question before or after the audio (all types, no transcript)",
            crossed(metrics["by order"], ("before", "after"), PLACES, "question"),
            "### With silence added before or behind (which digit, clean, no transcript)",
            "Zeros added to clips of at most 2.5 s, as `minimal_pair` puts them behind the shorter "
            "of two clips; the same clips and questions in every row.",
            crossed(metrics["by silence added"], list(ADDED), SOURCES, "silence"),
            "### Transcripts and trust (which digit, clean)",
            "Right answer by what the instruction says; the transcript is wrong about the asked "
            "digit under conflict.",
            crossed(metrics["trust"], conditions, SOURCES, "condition"),
            '"Trust the audio" under conflict, where the same question without a transcript was '
            "answered right:",
            table(["", *SOURCES], obeys),
            "Conflict without an instruction (never trained):",
            table(["", *SOURCES], opened),
        ]
    )


def questions_asked() -> str:
    """The phrasings of all kinds of question."""
    about = "seven"
    rows = [[kind, " / ".join(form.phrasings).format(about=about)] for kind, form in KINDS.items()]
    return table(["type", "text"], rows)


def training(stages: Mapping[str, Mapping[str, float]]) -> str:
    """Steps and time of each stage."""
    rows = [
        [name, str(s["steps"]), str(s["clips per step"]), f"{s['seconds'] / 60:.0f} min"]
        for name, s in stages.items()
    ]
    return table(["stage", "steps", "clips per step", "time on one core, shared"], rows)


def write_card(metrics: Mapping[str, Rates], record: Mapping, parameters: int, path: Path) -> None:
    """Write the card; what stands between the patching marks is kept.

    Args:
        metrics: shares and counts, as the evaluation gives them.
        record: ``stages`` and ``notes`` of the training, as ``training.json`` has them.
        parameters: of the model.
        path: of the card.
    """
    begin, end = PATCHING
    old = path.read_text() if path.exists() else ""
    kept = old.partition(begin)[2].partition(end)[0] or "\n"
    sections = [
        INTRODUCTION.format(questions=questions_asked()),
        MAKING.format(
            parameters=parameters,
            sources=table(["what", "used for", "licence"], MATERIAL),
            stages=training(record["stages"]),
            notes="".join(f"{note}\n" for note in record["notes"]),
        ),
        accuracy(metrics) + "\n",
        LIMITS,
        f"{begin}{kept}{end}\n",
    ]
    path.write_text("\n".join(sections))
