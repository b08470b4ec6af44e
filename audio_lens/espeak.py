"""espeak-ng's library, spoken to by ctypes: one utterance, written as a wav file.

`audio_lens.synthesis` runs this file as a script, in a process of its own for every utterance: only
the first of a process can be repeated bit by bit. It takes one JSON object on standard input and
prints one. Nothing but the standard library is imported, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import json
import sys
import wave

SYNCHRONOUS, DONT_EXIT = 2, 0x8000
PHONEME_EVENTS, IPA = 0x1, 0x2
RATE, PITCH = 1, 3
CHARACTERS, UTF_8, PHONEMES, END_PAUSE = 1, 0x1, 0x100, 0x1000
END_OF_LIST, WORD, PHONEME = 0, 1, 7


class Name(ctypes.Union):
    """Number of a word, or name of a phoneme."""

    _fields_ = (("number", ctypes.c_int), ("string", ctypes.c_char * 8))


class Event(ctypes.Structure):
    """Something that begins at a sample: its place in the text counts characters, from 1."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", Name),
    )


class EspeakVoice(ctypes.Structure):
    """A voice wanted by its languages."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("unused", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
)


def library() -> ctypes.CDLL:
    """The shared library.

    Raises:
        SystemExit: if there is none.
    """
    for name in ("libespeak-ng.so.1", ctypes.util.find_library("espeak-ng")):
        try:
            return ctypes.CDLL(name or "libespeak-ng")
        except OSError:
            continue
    raise SystemExit("espeak-ng is not installed (its library libespeak-ng was not found)")


def choose_voice(speech: ctypes.CDLL, voice: str) -> None:
    """A voice by its name or language, with the variant it may name.

    Raises:
        SystemExit: if there is no such voice, or variant (which espeak-ng itself would ignore).
    """
    by_language = ctypes.byref(EspeakVoice(languages=voice.encode()))
    is_missing = speech.espeak_SetVoiceByName(voice.encode())
    if is_missing and speech.espeak_SetVoiceByProperties(by_language):
        raise SystemExit(f"espeak-ng has no voice {voice!r}: `espeak-ng --voices` lists them")
    _, plus, variant = voice.partition("+")
    if plus and variant not in variants(speech):
        raise SystemExit(
            f"espeak-ng has no variant {variant!r}: `espeak-ng --voices=variant` lists them"
        )


def variants(speech: ctypes.CDLL) -> set[str]:
    """The variants that a voice can have, such as f2."""
    speech.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(EspeakVoice))
    found = speech.espeak_ListVoices(ctypes.byref(EspeakVoice(languages=b"variant")))
    listed = itertools.takewhile(bool, (found[index] for index in itertools.count()))
    return {voice.contents.identifier.decode().rpartition("/")[2] for voice in listed}


def synthesise(
    path: str, text: str, voice: str, speed: int, pitch: int, ipa: bool
) -> dict[str, list]:
    """Write the wav file; words as ``[character, sample]`` and phones as ``[name, sample]``.

    Raises:
        SystemExit: if espeak-ng cannot do it; the message says what.
    """
    speech = library()
    rate = speech.espeak_Initialize(
        SYNCHRONOUS, 0, None, DONT_EXIT | PHONEME_EVENTS | (IPA if ipa else 0)
    )
    if rate <= 0:
        raise SystemExit("espeak-ng cannot start: its data (espeak-ng-data) was not found")
    choose_voice(speech, voice)
    speech.espeak_SetParameter(RATE, speed, 0)
    speech.espeak_SetParameter(PITCH, pitch, 0)
    samples, words, phones = bytearray(), [], []

    @Callback
    def receive(chunk, count, events) -> int:
        if chunk and count:
            samples.extend(ctypes.string_at(chunk, 2 * count))
        listed = (events[index] for index in itertools.count())
        for event in itertools.takewhile(lambda event: event.type != END_OF_LIST, listed):
            if event.type == WORD and event.length:
                words.append([event.text_position - 1, event.sample])
            elif event.type == PHONEME:
                phones.append([event.id.string.decode(errors="ignore"), event.sample])
        return 0

    speech.espeak_SetSynthCallback(receive)
    said = text.encode()
    flags = UTF_8 | PHONEMES | END_PAUSE
    if speech.espeak_Synth(said, len(said) + 1, 0, CHARACTERS, 0, flags, None, None):
        raise SystemExit(f"espeak-ng could not say {text!r}")
    speech.espeak_Synchronize()
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(bytes(samples))
    return {"words": words, "phones": phones}


if __name__ == "__main__":
    print(json.dumps(synthesise(**json.load(sys.stdin))))
