import dataclasses
import functools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moextend_jax import machine
from moextend_jax.checkpoints.loading import open_tower
from moextend_jax.config import ImageTags, Medium, MoextendError, Named, VisionConfig
from moextend_jax.configs import continual
from moextend_jax.data import builders, easy_vqa, made_sounds
from moextend_jax.data.datasets import check_packages, family_of, make_ahead, open_dataset
from moextend_jax.data.forms import parts_of
from moextend_jax.data.made_sounds import FAMILIES, KEYS, TEST_VOICES, VOICES, WORDS, Sound, flac, without_silence
from moextend_jax.data.synthesis import shared_file
from moextend_jax.media import audio, mark_of
from moextend_jax.settings import from_config_dict

SPEECH = Medium(kind="audio", mark=made_sounds.SPEECH, tags=ImageTags(pad=7), seconds=2.0)
SOUND = dataclasses.replace(SPEECH, mark=made_sounds.SOUND, tags=ImageTags(pad=8), seconds=1.0)
MEDIA = Named({"image": Medium(), "sound": SOUND, "speech": SPEECH})
PACKAGES = {
    "instruments": ("tinysoundfont", "pretty_midi"),
    "spoken_words": ("espeakng_loader",),
    "spoken_questions": ("espeakng_loader", "easy_vqa"),
}


def few(monkeypatch):
    monkeypatch.setattr(made_sounds, "NOTES", {"train": 6, "test": 3})


def test_nothing_of_a_test_set_is_trained_on():
    notes = {split: made_sounds._notes("instruments", split) for split in ("train", "test")}
    keys = {split: {key for _, key in notes[split]} for split in notes}
    assert not keys["train"] & keys["test"] and keys["train"] | keys["test"] == set(KEYS)
    assert {program for program, _ in notes["test"]} == set(made_sounds.INSTRUMENTS)
    assert not set(VOICES) & set(TEST_VOICES) and len(set(VOICES)) == 16
    texts = {split: set(FAMILIES["spoken_words"].labels(split)) for split in ("train", "test")}
    assert texts["train"] == texts["test"] == set(WORDS) and len(set(WORDS.values())) == len(WORDS) == 36


@pytest.mark.parametrize("family", ["instruments", "spoken_words"])
def test_questions_have_the_right_answers(family):
    labels = FAMILIES[family].labels("train")
    what, whether = [], []
    for talk in FAMILIES[family].talks["questions"]("train", labels):
        (whether if talk.gpt in ("yes", "no") else what).append(talk)
    assert [talk.gpt for talk in what] == [label.split()[-1] for label in labels]
    for talk in whether:
        asked = talk.human.rstrip("?").split()[-1]
        assert (talk.gpt == "yes") == (asked == labels[talk.sound].split()[-1])
    yes = np.mean([talk.gpt == "yes" for talk in whether])
    assert 0.45 < yes < 0.56
    assert all(talk.gpt not in ("yes", "no") for talk in FAMILIES[family].talks["questions"]("test", labels[:9]))


def test_spoken_questions_are_easy_vqas():
    pytest.importorskip("easy_vqa")
    family = FAMILIES["spoken_questions"]
    labels = family.labels("test")
    turns = easy_vqa.asked("test", of="a test")
    wanted = sorted((picture, *turn) for picture, of in turns.items() for turn in of)
    talks = list(family.talks["pictures"]("test", labels))
    assert sorted((talk.picture, labels[talk.sound], talk.gpt) for talk in talks) == wanted
    assert talks[0].human == "<image>\n<audio:speech>"
    for talk in family.talks["descriptions"]("test", labels):
        words, negated = labels[talk.sound].rstrip("?").split(), {"not", "no"} & set(labels[talk.sound].split())
        drawn = set(talk.human.split()[1:3])
        asked = set(words) & (easy_vqa.SHAPES | easy_vqa.COLOURS)
        if talk.gpt in ("yes", "no"):
            assert (talk.gpt == "yes") == ((asked <= drawn) != bool(negated))
        else:
            assert talk.gpt in drawn and asked <= drawn


@pytest.mark.parametrize("family", PACKAGES)
def test_sounds_are_the_same_whenever_they_are_made(family, monkeypatch):
    for package in PACKAGES[family]:
        pytest.importorskip(package)
    few(monkeypatch)
    sounds = FAMILIES[family].sounds("test")
    first = [next(sounds) for _ in range(3)]
    next(FAMILIES[family].sounds("train"))
    again = FAMILIES[family].sounds("test")
    assert [next(again) for _ in range(3)] == first
    assert [sound.label for sound in first] == FAMILIES[family].labels("test")[:3]
    for sound in first:
        wave_a = audio.decode(sound.encoded, medium=SOUND if family == "instruments" else SPEECH)
        assert np.abs(wave_a).max() > 0.01 and len(wave_a) > 3000


def test_silence_around_a_sound_is_cut_off():
    quiet_a = np.full(500, 1e-4, np.float32)
    loud_a = np.sin(np.arange(1000, dtype=np.float32))
    spoken_a = without_silence(np.concatenate([quiet_a, loud_a, quiet_a]))
    assert 990 < len(spoken_a) <= 1000
    medium = dataclasses.replace(SOUND, seconds=1.0)
    np.testing.assert_allclose(audio.decode(flac(spoken_a), medium=medium), spoken_a, atol=2**-15)


def test_a_data_set_of_sounds_is_built_and_opened(monkeypatch, tmp_path):
    family = FAMILIES["instruments"]
    few(monkeypatch)
    waves = {split: np.sin(np.outer(np.arange(1, 7) / 9, np.arange(4000))) for split in family.splits}

    def sounds(split):
        return (Sound(label, flac(wave_a)) for label, wave_a in zip(family.labels(split), waves[split], strict=False))

    monkeypatch.setitem(FAMILIES, "instruments", family._replace(sounds=sounds))
    source = open_dataset("instruments/captions", split="train", data_dir=tmp_path, media=MEDIA)
    labels = family.labels("train")
    assert len(source) == len(source.items["sound"]) == 6 and not len(source.items["speech"])
    for number, example in enumerate(source):
        (ref,) = example.items
        assert example.conversations[0]["value"] == "<audio:sound>\nDescribe the sound."
        assert example.conversations[1]["value"] == f"a {labels[number]}"
        wave_a = source.items["sound"].decoded(ref.row, SOUND).item
        np.testing.assert_allclose(wave_a, waves["train"][number], atol=2**-14)
    assert len(open_dataset("instruments", split="test", data_dir=tmp_path, media=MEDIA)) == 3
    with pytest.raises(MoextendError, match="has no rows 'items-audio-sound'; there are questions, captions"):
        open_dataset("instruments/items-audio-sound", data_dir=tmp_path, media=MEDIA)
    with pytest.raises(MoextendError, match="<audio:sound>.*has no such medium"):
        open_dataset("instruments", split="test", data_dir=tmp_path)


def test_data_sets_with_sounds_are_built_side_by_side(monkeypatch, tmp_path):
    few(monkeypatch)
    wave_a = np.sin(np.arange(4000, dtype=np.float32))
    for name in ("instruments", "instruments_fluid"):
        family = FAMILIES[name]
        sounds = functools.partial(
            lambda split, of: (Sound(label, flac(wave_a)) for label in of.labels(split)), of=family
        )
        monkeypatch.setitem(FAMILIES, name, family._replace(sounds=sounds))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    # A process would not know what is few here.
    monkeypatch.setattr(builders, "ProcessPoolExecutor", lambda _, mp_context: ThreadPoolExecutor(1))
    names = ["instruments/captions:2,instruments_fluid/questions:1", str(tmp_path / "a_file.json")]
    make_ahead(["instruments/captions"], data_dir=tmp_path, media=MEDIA)
    assert not list(tmp_path.iterdir())  # one set of sounds is left to whoever opens it
    make_ahead(names, data_dir=tmp_path, media=MEDIA)
    built = {path.parent.parent.name for path in tmp_path.rglob("dataset_info.json")}
    assert built == {"captions", "questions", "items-audio-sound"}
    monkeypatch.setattr(builders, "build", None)  # nothing is left to do
    make_ahead(names, data_dir=tmp_path, media=MEDIA)
    monkeypatch.undo()
    source = open_dataset("instruments/captions", data_dir=tmp_path, media=MEDIA)
    assert len(source) == len(source.items["sound"]) == 6


@pytest.mark.parametrize(
    "family, module, message",
    [
        ("spoken_words", "espeakng_loader", r"spoken_words needs .*; pip install .moextend-jax\[sounds\]"),
        ("instruments", "tinysoundfont", "instruments needs .*; pip install --no-deps tinysoundfont"),
    ],
)  # fmt: skip
def test_what_is_not_installed_is_one_line(family, module, message, monkeypatch, tmp_path):
    if family == "instruments":
        monkeypatch.setattr(made_sounds, "_font", lambda _: tmp_path / "font.sf2")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MoextendError, match=message):
        open_dataset(family, data_dir=tmp_path, media=MEDIA)
    assert not list(tmp_path.rglob("*.array_record*"))


def test_files_of_debian_packages_are_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_DIRS", f"{tmp_path}/a:{tmp_path}/b")
    with pytest.raises(
        MoextendError, match=f"apt-get install p, or without root: .* copy X/usr/share/. to {tmp_path}/home"
    ):
        shared_file("x/y.sf3", of="d", package="p")
    (tmp_path / "b" / "x").mkdir(parents=True)
    (tmp_path / "b" / "x" / "y.sf3").touch()
    assert shared_file("x/y.sf3", of="d", package="p") == tmp_path / "b" / "x" / "y.sf3"


def test_the_tower_for_sounds_comes_with_the_package():
    config, leaves = open_tower("embedded", kind="audio", medium="sound", seconds=1, feature_layer=-2)
    assert isinstance(config, VisionConfig) and (config.width, config.patches, config.image_size) == (128, 16, 64)
    pictures = open_tower("embedded", kind="image", medium="sound", seconds=1, feature_layer=-2)
    assert config == pictures[0] and leaves.keys() == pictures[1].keys()
    assert all(path.startswith("media/sound/tower/") for path in leaves)


def test_the_continual_configuration_names_data_that_there_are():
    settings = from_config_dict(continual.get_config())
    assert [link.medium for link in settings.links] == ["image", "sound", "speech"]
    groups = [settings, *settings.extensions.values()]
    names = [stage.data for of in groups for stage in (of.align, of.extend, of.finetune, of.full, of.evaluate)]
    names += [data for of in groups for data in of.evaluate.sets.values()]
    for name in names:
        for part in parts_of(name):
            family, _ = family_of(part.name)
            marks = [FAMILIES[family].mark] if family in FAMILIES else []
            assert set(marks) <= {mark_of(name, medium.kind) for name, medium in settings.media.items()}


def test_packages_that_are_not_there_are_named_before_anything_is_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    with pytest.raises(MoextendError, match="needs Debian's package asterisk-core-sounds-en-wav"):
        check_packages("recorded_words/questions:1,a.json:2", data_dir=tmp_path / "built")
    assert not (tmp_path / "built").exists()
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(MoextendError, match="easy_vqa needs the package easy-vqa"):
        check_packages("easy_vqa/questions", data_dir=tmp_path / "built")
    check_packages("own.jsonl", data_dir=tmp_path / "built")
