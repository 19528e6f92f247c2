"""Data sets of sounds that installed packages make: a name and a split in, sounds (FLAC) and conversations out.

    instruments         44 instruments of General MIDI by PyPI's pretty-midi's sound font; test: keys not trained on
    instruments_fluid   the same by other recordings: Debian's fluidr3mono-gm-soundfont; all of it is a test
    spoken_words        36 words by eSpeak, 16 voices; test: 4 others
    recorded_words      the same words as a person said them: Debian's asterisk-core-sounds-en-wav; all of it is a test
    spoken_questions    easy-VQA's questions by those voices

Everything is drawn from the name of the split, so that a data set is the same whenever and wherever it is made.
"""

from __future__ import annotations

import importlib.util
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from moextend_jax.config import MoextendError
from moextend_jax.data import easy_vqa
from moextend_jax.data.synthesis import EXTRA, Band, Speaker, shared_file
from moextend_jax.media.mel import RATE

INSTRUMENTS = {
    0: "piano", 6: "harpsichord", 8: "celesta", 9: "glockenspiel", 11: "vibraphone", 12: "marimba", 13: "xylophone",
    14: "bell", 19: "organ", 21: "accordion", 22: "harmonica", 24: "guitar", 32: "bass", 40: "violin", 42: "cello",
    46: "harp", 47: "timpani", 52: "choir", 56: "trumpet", 57: "trombone", 58: "tuba", 60: "horn", 65: "saxophone",
    68: "oboe", 70: "bassoon", 71: "clarinet", 72: "piccolo", 73: "flute", 75: "panpipe", 78: "whistle", 79: "ocarina",
    104: "sitar", 105: "banjo", 107: "koto", 108: "kalimba", 109: "bagpipe", 114: "drum", 115: "woodblock",
    122: "seashore", 123: "bird", 124: "telephone", 125: "helicopter", 126: "applause", 127: "gunshot",
}  # fmt: skip
"""By their programs."""
KEYS = range(40, 84)
"""Keys of notes; every fourth is kept for the test."""

_DIGITS = "zero one two three four five six seven eight nine"
_LETTERS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
)
WORDS: Mapping[str, str] = {
    **{word: f"digits/{n}" for n, word in enumerate(_DIGITS.split())},
    **{word: f"phonetic/{word[0]}_p" for word in _LETTERS.split()},
}
"""Digits and the spelling alphabet, with the file in which a person says each."""

VOICES = (
    "en-us", "en-us+f4", "en-us+m1", "en-us+m2", "en-us+m3", "en-us+m4", "en-gb-x-rp", "en-gb-x-rp+f4", "en-gb-x-rp+m3",
    "en-gb-x-gbclan", "en-gb-x-gbclan+f4", "en-gb-x-gbcwmd", "en-us-nyc", "en-us-nyc+f4", "en-029", "en-029+m2",
)  # fmt: skip
TEST_VOICES = ("en-gb-scotland", "en-gb-scotland+f1", "en-us+m7", "en-gb-x-rp+f1")
"""Not +f2, +f3 or +f5: these sound a little different in every process."""
NOTES = {"train": 6000, "test": 1000}
"""Notes of a split."""
TAKES = {
    ("spoken_words", "train"): 10, ("spoken_words", "test"): 7, ("spoken_questions", "train"): 2,
    ("spoken_questions", "test"): 1,
}  # fmt: skip
"""Recordings of every text by every voice."""
CLIP_SECONDS, QUESTION_SECONDS = 1.0, 2.0
"""Length at which sounds are cut."""
SOUND, SPEECH = "<audio:sound>", "<audio:speech>"
"""Marks: a run calls its media so."""


class Talk(NamedTuple):
    """A question and its answer about a sound, and a picture of easy-VQA's: their rows among those of the split."""

    id: str
    human: str
    gpt: str
    sound: int
    picture: int | None = None


class Sound(NamedTuple):
    """label: what it is. encoded: a FLAC file of one channel at 16 kHz, 16 bits."""

    label: str
    encoded: bytes


class Family(NamedTuple):
    """A data set.

    labels: split -> what its sounds are, in order; sounds: split -> the same with the sounds, which takes longer.
    talks: config -> (split, labels) -> talks. has_pictures: some are about easy-VQA's pictures.
    """

    mark: str
    splits: tuple[str, ...]
    labels: Callable[[str], list[str]]
    sounds: Callable[[str], Iterator[Sound]]
    talks: Mapping[str, Callable[[str, list[str]], Iterator[Talk]]]
    has_pictures: bool = False


# --- sounds -----------------------------------------------------------------------------------------------------------


def _rng(*names: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32("/".join(names).encode()))


def _sound(label: str, wave_a: np.ndarray, *, rng: np.random.Generator, seconds: float, loudest_noise: float) -> Sound:
    """A little later, quieter and noisier than it was made, and at most `seconds` long."""
    late_a = np.concatenate([np.zeros(int(rng.uniform(0, 0.1) * RATE), np.float32), wave_a * rng.uniform(0.5, 1)])
    noise = 10 ** rng.uniform(-5, loudest_noise)
    return Sound(label, flac((late_a + rng.normal(0, noise, len(late_a)))[: int(seconds * RATE)]))


def flac(wave_a: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.clip(wave_a, -1, 1), RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _notes(family: str, split: str) -> list[tuple[int, int]]:
    """Programs and keys."""
    rng, train = _rng(family, split), split == "train"
    keys = [key for key in KEYS if family != "instruments" or bool(key % 4) == train]
    programs = rng.choice(list(INSTRUMENTS), NOTES[split])
    return [(int(program), int(key)) for program, key in zip(programs, rng.choice(keys, len(programs)), strict=True)]


def _note_labels(family: str, split: str) -> list[str]:
    """As "low trumpet"."""
    height = {key: "low" if key < 55 else "high" if key > 70 else "middle" for key in KEYS}
    return [f"{height[key]} {INSTRUMENTS[program]}" for program, key in _notes(family, split)]


def _note_sounds(family: str, split: str) -> Iterator[Sound]:
    band, rng = Band(_font(family), of=family), _rng(family, split, "sounds")
    for label, (program, key) in zip(_note_labels(family, split), _notes(family, split), strict=True):
        velocity, seconds = int(rng.integers(50, 120)), rng.uniform(0.4, 0.75)
        wave_a = band.note(program, key=key, velocity=velocity, seconds=seconds)
        yield _sound(label, wave_a, rng=rng, seconds=CLIP_SECONDS, loudest_noise=-3.3)


def _font(family: str) -> Path:
    if family == "instruments_fluid":
        name = "sounds/sf3/FluidR3Mono_GM.sf3"
        return shared_file(name, of=family, package="fluidr3mono-gm-soundfont").resolve()
    spec = importlib.util.find_spec("pretty_midi")
    if spec is None or spec.origin is None:
        raise MoextendError(f"data set {family} needs a file of the package pretty-midi; {EXTRA}")
    return Path(spec.origin).with_name("TimGM6mb.sf2")


def _spoken(family: str, split: str) -> list[tuple[str, str]]:
    """Texts and voices, each word or question by each of the voices about equally often."""
    voices, texts = VOICES if split == "train" else TEST_VOICES, list(WORDS)
    if family == "spoken_questions":  # test pictures are asked no others than those of training
        of_pictures = easy_vqa.asked("train", of=family).values()
        texts = sorted({question for turns in of_pictures for question, _ in turns})
    pairs = [(text, voice) for text in texts for voice in voices for _ in range(TAKES[family, split])]
    return [pairs[n] for n in _rng(family, split).permutation(len(pairs))]


def _texts(family: str, split: str) -> list[str]:
    return [text for text, _ in _spoken(family, split)]


def _spoken_sounds(family: str, split: str) -> Iterator[Sound]:
    speaker, rng = Speaker(of=family), _rng(family, split, "sounds")
    speed, seconds = ((130, 190), CLIP_SECONDS) if family == "spoken_words" else ((185, 235), QUESTION_SECONDS)
    for text, voice in _spoken(family, split):
        pitch = int(rng.integers(20, 80))
        wave_a = speaker.say(text, voice=voice, words_per_minute=int(rng.integers(*speed)), pitch=pitch)
        yield _sound(text, without_silence(wave_a), rng=rng, seconds=seconds, loudest_noise=-2.7)


def _recorded(_: str) -> Iterator[Sound]:
    package = "asterisk-core-sounds-en-wav"
    folder = shared_file("asterisk/sounds/en_US_f_Allison", of="recorded_words", package=package)
    for word, name in WORDS.items():
        wave_a, rate = soundfile.read(folder / f"{name}.wav", dtype="float32")
        spoken_a = without_silence(soxr.resample(wave_a, rate, RATE))
        yield Sound(word, flac(spoken_a[: int(CLIP_SECONDS * RATE)]))


def without_silence(wave_a: np.ndarray) -> np.ndarray:
    """Without what comes before and after the parts that are at least a hundredth as loud as the loudest."""
    loud = np.flatnonzero(np.abs(wave_a) > 0.01 * np.abs(wave_a).max())
    return wave_a[loud[0] : loud[-1] + 1]


# --- conversations ----------------------------------------------------------------------------------------------------


def _captions(mark: str, answer: str, *, ask: str = "Describe the sound.") -> Callable[..., Iterator[Talk]]:
    def talks(split: str, labels: list[str]) -> Iterator[Talk]:
        for row, label in enumerate(labels):
            yield Talk(f"{split}/{row}", f"{mark}\n{ask}", answer.format(label), row)

    return talks


def _questions(mark: str, *, what: str, whether: str) -> Callable[[str, list[str]], Iterator[Talk]]:
    """What each sound is; in training also whether it is a given thing: for about half it is."""

    def talks(split: str, labels: list[str]) -> Iterator[Talk]:
        names, rng = [label.split()[-1] for label in labels], _rng(mark, split)
        for row, name in enumerate(names):
            yield Talk(f"{split}/{row}/0", f"{mark}\n{what}", name, row)
            if split == "train":
                other = name if rng.random() < 0.5 else names[rng.integers(len(names))]
                answer = "yes" if name == other else "no"
                yield Talk(f"{split}/{row}/1", f"{mark}\n{whether.format(other)}", answer, row)

    return talks


def _asked(split: str, labels: list[str]) -> Iterator[tuple[int, str, int]]:
    """Of each of easy-VQA's questions the picture, the answer, and the row of a sound that asks it."""
    takes: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        takes.setdefault(label, []).append(row)
    rng = _rng("spoken_questions", split, "asked")
    for picture, turns in sorted(easy_vqa.asked(split, of="spoken_questions").items()):
        for question, answer in turns:
            yield picture, answer, takes[question][rng.integers(len(takes[question]))]


def _pictures(split: str, labels: list[str]) -> Iterator[Talk]:
    for number, (picture, answer, row) in enumerate(_asked(split, labels)):
        yield Talk(f"{split}/{number}", f"<image>\n{SPEECH}", answer, row, picture)


def _descriptions(split: str, labels: list[str]) -> Iterator[Talk]:
    """The question is asked about a picture that is described in words, where easy-VQA's answers say both its colour
    and its shape."""
    of_pictures = easy_vqa.asked(split, of="spoken_questions")
    captions = {picture: easy_vqa.caption(turns) or "" for picture, turns in of_pictures.items()}
    for number, (picture, answer, row) in enumerate(_asked(split, labels)):
        words = captions[picture].split()
        if len(words) == 3 and words[2] in easy_vqa.SHAPES:
            yield Talk(f"{split}/{number}", f"{captions[picture]}\n{SPEECH}", answer, row)


# --- the table --------------------------------------------------------------------------------------------------------


def _of_instruments(family: str, splits: tuple[str, ...]) -> Family:
    return Family(
        mark=SOUND,
        splits=splits,
        labels=partial(_note_labels, family),
        sounds=partial(_note_sounds, family),
        talks={
            "questions": _questions(SOUND, what="what is this sound?", whether="is this a {}?"),
            "captions": _captions(SOUND, "a {}"),
        },
    )


def _of_words(
    splits: tuple[str, ...], labels: Callable[[str], list[str]], sounds: Callable[[str], Iterator[Sound]]
) -> Family:
    return Family(
        mark=SPEECH,
        splits=splits,
        labels=labels,
        sounds=sounds,
        talks={
            "questions": _questions(SPEECH, what="what word is this?", whether="is this the word {}?"),
            "captions": _captions(SPEECH, "the word {}"),
        },
    )


FAMILIES: Mapping[str, Family] = {
    "instruments": _of_instruments("instruments", ("train", "test")),
    "instruments_fluid": _of_instruments("instruments_fluid", ("test",)),
    "spoken_words": _of_words(
        ("train", "test"), partial(_texts, "spoken_words"), partial(_spoken_sounds, "spoken_words")
    ),
    "recorded_words": _of_words(("test",), lambda _: list(WORDS), _recorded),
    "spoken_questions": Family(
        mark=SPEECH,
        splits=("train", "test"),
        labels=partial(_texts, "spoken_questions"),
        sounds=partial(_spoken_sounds, "spoken_questions"),
        talks={
            "pictures": _pictures,
            "descriptions": _descriptions,
            "transcripts": _captions(SPEECH, "{}", ask="Repeat it."),
        },
        has_pictures=True,
    ),
}
"""By their names."""
