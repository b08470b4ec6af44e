"""A session: its answers are those of whole forwards, its code and its file say the same."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import shutil

import numpy as np
import pytest
import torch

from audio_lens import InputError, explorer, intervene
from audio_lens.audio import AudioError
from audio_lens.explorer import Deafened, Head, Session, Stretch, heads, maps, shared, touch_of
from audio_lens.explorer.session import MOST_STEPS, MOST_TOUCHES
from audio_lens.explorer.widget import started
from audio_lens.models.embedded import default_pair
from audio_lens.sites import SiteError
from families import FAMILIES

PAIR = default_pair()
WORD = (1.25, 1.75)  # around the asked word
TOUCHES = {
    "silence in the sound": Stretch(*WORD),
    "noise in the sound": Stretch(*WORD, "noise"),
    "the other sound": Stretch(*WORD, "other"),
    "the other clip in the decoder": Stretch(*WORD, "other", "decoder", 2),
    "silence in the encoder": Stretch(*WORD, "silence", "encoder", 1),
    "a head off": Head("decoder.attn", 2, 4),
    "a head of the encoder doubled": Head("encoder.attn", 1, 2, 2.0),
    "a deaf head": Deafened("decoder.attn", 2, 4),
    "a head deaf to a stretch": Deafened("encoder.attn", 1, 2, *WORD),
    "a head of the encoder deaf": Deafened("encoder.attn", 1, 2),
}


@pytest.fixture
def session(embedded):
    return Session(embedded, PAIR.clean, PAIR.question, PAIR.corrupted)


def whole(session):
    """Probabilities by one whole forward with hooks."""
    held = intervene(session.model, session.edits) if session.edits else contextlib.nullcontext()
    with torch.no_grad(), held:
        return session.model(session.inputs).flatten(0, -2)[-1].softmax(-1)


def now(session):
    return session.logits().softmax(-1)


def odds(session, token):
    share = float(now(session).double()[token])
    return math.log(share / (1 - share))


# -------------------------------------------------------------------------------- answers


@pytest.mark.unchecked
@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_answers_are_those_of_a_whole_forward(session, touch):
    session.touch(touch)
    torch.testing.assert_close(now(session), whole(session), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(session.before, now(session), atol=1e-7)
    assert touch_of(touch.to_dict()) == touch and touch.label


def test_the_other_clip_brings_its_answer(session):
    assert session.said() == "two"
    session.touch(Stretch(*WORD, "other", "decoder", 1))
    assert session.said() == "nine"
    best = max(session.answers(), key=lambda one: one.now)
    assert best.word.strip("␣") == "nine" and best.before < 0.01 < 0.9 < best.now
    session.undo()
    assert session.said() == "two"


def test_the_sound_is_replaced_and_the_clip_is_kept(session):
    before = session.clip.samples.copy()
    session.touch(Stretch(*WORD, "silence"))
    rate = session.clip.rate
    inside = slice(round((WORD[0] + 0.01) * rate), round((WORD[1] - 0.01) * rate))
    assert np.abs(session.heard.samples[inside]).max() == 0 < np.abs(before[inside]).max()
    assert np.array_equal(session.clip.samples, before)
    session.touch(Stretch(*WORD, "other"))
    other = session.samples_of("other")
    np.testing.assert_allclose(session.heard.samples[inside], other[inside], atol=1e-6)


def test_touches_go_on_and_off_the_stack(session):
    off, on = Head("decoder.attn", 2, 4), Head("decoder.attn", 2, 4, 1.0)
    base = now(session)
    session.touch(off)
    changed = now(session)
    session.touch(on, at=0)
    torch.testing.assert_close(now(session), base)
    session.undo()
    assert session.touches == (off,) and torch.equal(now(session), changed)
    session.redo()
    session.touch(Stretch(*WORD))
    session.drop(0)
    assert session.touches == (Stretch(*WORD),) and not session.can_redo
    session.clear()
    assert not session.touches and session.can_undo
    torch.testing.assert_close(now(session), base)
    with pytest.raises(InputError, match="holds 0 touches; there is no 3"):
        session.drop(3)


def test_stack_and_steps_are_bounded(session):
    for g in range(MOST_TOUCHES):
        session._steps[session._at] += (Head("decoder.attn", 2, 4, float(g)),)
    with pytest.raises(InputError, match=f"holds {MOST_TOUCHES} touches"):
        session.touch(Head("decoder.attn", 2, 4))
    session.clear()
    session._steps, session._at = [()] * MOST_STEPS, MOST_STEPS - 1
    session.touch(Head("decoder.attn", 2, 4))
    assert len(session._steps) == MOST_STEPS and session.touches


@pytest.mark.unchecked
def test_another_question_and_another_clip(session):
    session.touch(Head("decoder.attn", 2, 4, 1.0))
    session.ask("Which digit is last?")
    assert session.said() == "five" and len(session.touches) == 1
    session.touch(Stretch(2.0, 2.5))
    session.hear((np.zeros(16_000, dtype=np.float32), 16_000), "short.wav")
    assert session.clip.seconds == 1.0 and session.other.seconds == 1.0
    assert session.touches == (Head("decoder.attn", 2, 4, 1.0),)  # the stretch lay behind its end


# -------------------------------------------------------------------------------- refusals


BAD = {
    "no kind": ({"layer": 1}, "a touch has a kind"),
    "unknown": ({"kind": "head", "site": "decoder.attn", "layer": 1, "head": 0, "x": 1}, "got x"),
    "lacking": ({"kind": "head", "site": "decoder.attn"}, "lacks something"),
    "a text for a layer": (
        {"kind": "head", "site": "decoder.attn", "layer": "1", "head": 0},
        "layer",
    ),
    "infinite": ({"kind": "stretch", "start_s": 0, "end_s": float("inf")}, "end_s"),
    "backwards": ({"kind": "stretch", "start_s": 1, "end_s": 0.5}, "ends behind its start"),
    "of nothing": ({"kind": "stretch", "start_s": 0, "end_s": 1, "by": "x"}, "by is one of"),
    "no layer": ({"kind": "stretch", "start_s": 0, "end_s": 1, "part": "decoder"}, "names part="),
    "too large": ({"kind": "head", "site": "a.attn", "layer": 0, "head": 0, "g": 1e9}, "g"),
    "half a stretch": (
        {"kind": "deafened", "site": "a.attn", "layer": 0, "head": 0, "start_s": 0.1},
        "start_s= and end_s=",
    ),
}


@pytest.mark.parametrize("written, message", BAD.values(), ids=BAD)
def test_what_is_no_touch_is_refused(written, message):
    with pytest.raises(InputError, match=message):
        touch_of(written)


@pytest.mark.parametrize(
    "touch, message",
    [
        (Head("decoder.attn", 6, 0), "layers 0 to 5; got 6"),
        (Head("decoder.attn", 0, 6), "heads 0 to 5; got 6"),
        (Head("decoder.cross_attn", 0, 0), "cannot be swept"),
        (Stretch(0.1, 0.2, "other", "decoder", 9), "layers 0 to 5; got 9"),
        (Stretch(9.0, 9.5), "the stretch lies behind its end"),
    ],
)
def test_what_the_model_lacks_is_refused_and_not_on_the_stack(session, touch, message):
    with pytest.raises((InputError, SiteError), match=message):
        session.touch(touch)
    assert session.touches == ()


def test_clips_and_questions_that_cannot_be_are_refused_and_change_nothing(session):
    with pytest.raises(AudioError, match="4"):
        session.hear((np.zeros(80_000, dtype=np.float32), 16_000))
    with pytest.raises(AudioError, match="cannot be read"):
        session.hear(b"no sound", "clip.wav")
    with pytest.raises(InputError, match="ask it one"):
        session.ask("")
    assert session.clip.name == PAIR.clean.name and session.said() == "two"
    alone = Session(session.model, PAIR.clean, PAIR.question)
    with pytest.raises(InputError, match="no other clip"):
        alone.touch(Stretch(*WORD, "other"))


# -------------------------------------------------------------------------------- code and files


def printed(code, folder, monkeypatch):
    """What code prints, as probabilities by word."""
    monkeypatch.chdir(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "copied.py", "exec"), {})
    lines = (line.rpartition(": ") for line in said.getvalue().splitlines())
    return {word: float(value) for word, _, value in lines}


@pytest.mark.unchecked
def test_code_gives_the_same_numbers(session, tmp_path, monkeypatch):
    for path in (PAIR.clean, PAIR.corrupted):
        shutil.copy(path, tmp_path)
    for touch in TOUCHES.values():
        session.touch(touch)
    found = printed(explorer.python_code(session), tmp_path, monkeypatch)
    expected = {one.word: one.now for one in session.answers()}
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.unchecked
def test_a_file_holds_the_session(session, tmp_path):
    for touch in TOUCHES.values():
        session.touch(touch)
    path = explorer.save(session, tmp_path / "edits.json")
    again = started(session.model, edits=path)
    assert again.touches == session.touches and again.question == session.question
    assert np.array_equal(again.clip.samples, session.clip.samples)
    torch.testing.assert_close(again.logits(), session.logits())


def test_samples_that_no_16_bits_hold_are_kept_too(embedded):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    session = Session(embedded, (samples, 16_000), PAIR.question)
    again = shared.from_dict(embedded, shared.to_dict(session))
    assert np.array_equal(again.clip.samples, samples)


def test_files_that_hold_no_edits_are_refused(session, tmp_path):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "other.json").write_text('{"edits": []}')
    for name in ("nothing.json", "text.json", "other.json"):
        with pytest.raises(InputError, match=r"cannot be read|no file of edits"):
            started(session.model, edits=tmp_path / name)
    written = shared.to_dict(session)
    with pytest.raises(InputError, match="open them with --model"):
        shared.from_dict(session.model, written | {"model": "openai/whisper-tiny"})
    with pytest.raises(InputError, match="lacks 'clip'"):
        shared.from_dict(session.model, {k: v for k, v in written.items() if k != "clip"})
    with pytest.raises(InputError, match="leave the others out"):
        started(session.model, PAIR.clean, edits=tmp_path / "text.json")


# -------------------------------------------------------------------------------- maps and heads


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "with_touch",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["bare", "on top of a touch"],
)
def test_cells_of_the_map_are_what_touching_them_does(session, with_touch):
    if with_touch:
        session.touch(Head("decoder.attn", 2, 4, 0.5))
        session.touch(Stretch(1.2, 1.5, "silence", "decoder", 1))
    token = session.answers()[0].token
    pictures = list(itertools.islice(maps.layer_map(session, "decoder", "other", token), 16))
    first, last = pictures[0], pictures[-1]
    assert any(None in row for row in first.change)
    assert not any(None in row for row in last.change)
    assert len(last.spans) > len(first.spans) and len(last.change) == 6
    base = odds(session, token)
    assert last.now == pytest.approx(base, abs=1e-3)
    strong = max(range(len(last.spans)), key=lambda t: abs(last.change[1][t]))
    narrow = last.spans[strong]
    session.touch(Stretch(*narrow, "other", "decoder", 1))
    assert last.change[1][strong] == pytest.approx(odds(session, token) - base, abs=1e-3)


@pytest.mark.unchecked
def test_the_map_of_heads_is_what_turning_them_off_does(session):
    token = session.answers()[0].token
    change = maps.head_map(session, "decoder.attn", token).change
    base = odds(session, token)
    assert len(change) == 6 and len(change[0]) == 6
    session.touch(Head("decoder.attn", 1, 3))
    assert change[1][3] == pytest.approx(odds(session, token) - base, abs=1e-3)


def test_heads_listen_where_their_pattern_is(session):
    found = heads.listening(session, "decoder.attn")
    pattern = session.model.run_with_cache(session.inputs, attention=True)[1]["pattern", 2]
    audio = session.model.timeline(session.inputs).mask("decoder")[0]
    assert audio.any()
    assert found.share.shape[:2] == (6, 6) and found.edges[0] == 0
    np.testing.assert_allclose(found.share.sum(-1), found.on_audio, atol=1e-5)
    assert found.on_audio[2].max() <= 1 and pattern.shape[1] == 6
    session.touch(Deafened("decoder.attn", 2, 4))
    assert heads.listening(session, "decoder.attn").on_audio[2, 4] == 0
    with pytest.raises(InputError, match=r"no head 9\.9"):
        found.of_head(9, 9)


@pytest.mark.unchecked  # None is no token
def test_maps_of_what_there_is_not_are_refused(session):
    for asked, message in [
        (("ear", "other", 1), "encoder or decoder"),
        (("decoder", "music", 1), "puts in"),
        (("decoder", "other", 10**9), "tokens are 0 to"),
        (("decoder", "other", None), "tokens are 0 to"),
    ]:
        with pytest.raises(InputError, match=message):
            next(maps.layer_map(session, *asked))


# -------------------------------------------------------------------------------- other models


@pytest.mark.unchecked
@pytest.mark.parametrize("name", ["whisper", "audio_spectrogram_transformer"])
def test_other_kinds_of_models_are_explored(name):
    family = FAMILIES[name]
    model = family.hooked(family.build())
    rate = model.cfg.sampling_rate
    n = int(rate * min(0.5, model.cfg.max_audio_s / 2))
    wave = np.random.default_rng(0).normal(0, 0.1, n).astype(np.float32)
    session = Session(model, (wave, rate))
    end = n / rate / 2
    sites = heads.attention_sites(session)
    assert sites and session.parts
    touches = [
        Stretch(0.0, end, "silence", session.parts[0], 1),
        *[kind(site, 1, 1) for site in sites for kind in (Head, Deafened)],
        *[Deafened(site, 1, 1, 0.0, end) for site in sites],
    ]
    for touch in touches:
        session.touch(touch)
        torch.testing.assert_close(now(session), whole(session).float(), atol=1e-5, rtol=1e-4)
        assert not torch.equal(now(session), session.before.to(now(session)))
        session.undo()
    token = session.answers()[0].token
    picture = next(maps.layer_map(session, session.parts[0], "silence", token))
    assert len(picture.change) == model.cfg.parts[session.parts[0]].n_layers
    for site in sites:
        assert heads.listening(session, site).on_audio.max() <= 1.001
        assert maps.head_map(session, site, token).site == site
