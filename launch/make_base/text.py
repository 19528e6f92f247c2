"""Plain-text passages of WordNet and the King James Bible, split into train and held-out, for pretraining the base.

In: the Debian packages wordnet-base, bible-kjv-text and bible-kjv (the program that decodes the latter), fetched and
unpacked under BUILD without root, or taken from `--extracted DIR` where they are unpacked already.
Out: BUILD/{wordnet,kjv}.{train,heldout}.txt, one passage per line, and the small held-out slices that the package
carries, moextend_jax/assets/text/{wordnet,kjv}.txt, with WordNet's licence beside them.

    python launch/make_base/text.py --build build
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("wordnet-base", "bible-kjv-text", "bible-kjv")
ASSETS = Path(__file__).parents[2] / "moextend_jax" / "assets" / "text"
PASSAGE_CHARACTERS = 500
"""A passage ends with the first gloss or verse that reaches this: about 130 tokens."""
HELD_OUT_SHARE = 50
"""One passage in so many is held out."""
SLICE_BYTES = 80_000


def fetch(build: Path) -> Path:
    """Downloads and unpacks the packages; the folder that holds their `usr`."""
    debs, extracted = build / "debs", build / "extracted"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=debs, check=True)
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(extracted)], check=True)
    return extracted


def wordnet_licence(extracted: Path) -> str:
    """The notice at the head of each WordNet file, which every copy has to carry, without its line numbers."""
    lines = (extracted / "usr/share/wordnet/data.noun").read_text("utf-8").splitlines()
    notice = [re.sub(r"^  +\d+ ?", "", line).rstrip() for line in lines if line.startswith("  ")]
    return "\n".join(notice) + "\n"


def glosses(extracted: Path) -> Iterator[tuple[str, str]]:
    """(part of speech, "word, word: gloss.") of every synset, in the file's order, where neighbours are related."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (extracted / "usr/share/wordnet" / f"data.{part}").read_text("utf-8").splitlines():
            if line.startswith("  "):  # the licence at the head of each file
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split(" ")
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            # "asleep(p)": the mark says where an adjective may stand, it is no part of the word.
            names = ", ".join(re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words)
            gloss = " ".join(gloss.replace("``", '"').replace("''", '"').split()).rstrip(";. ")
            yield part, f"{names}: {gloss}."


def verses(extracted: Path) -> Iterator[tuple[str, str]]:
    """(book and chapter, verse) of the whole Bible, without the numbers."""
    command = [str(extracted / "usr/bin/bible"), "-l", "-f", "-p", str(extracted / "usr/lib"), "gen1:1-rev22:21"]
    lines = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    for line in lines.splitlines():
        reference, verse = line.split(" ", 1)
        yield reference.split(":")[0], " ".join(verse.split())


def passages(pieces: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Neighbouring pieces of one group joined until they are long enough."""
    group, text = "", ""
    for next_group, piece in pieces:
        if text and (next_group != group or len(text) >= PASSAGE_CHARACTERS):
            yield text
            text = ""
        group, text = next_group, f"{text} {piece}".strip()
    yield text


def key(passage: str) -> int:
    return int.from_bytes(hashlib.sha256(passage.encode()).digest()[:8])


def write(name: str, pieces: Iterable[tuple[str, str]], *, build: Path) -> None:
    every = list(passages(pieces))
    train = [passage for passage in every if key(passage) % HELD_OUT_SHARE]
    # Ordered by hash, so that the slice in the package is a fair sample of the held-out part.
    held_out = sorted((passage for passage in every if key(passage) % HELD_OUT_SHARE == 0), key=key)
    sizes = [0]
    for passage in held_out:
        sizes.append(sizes[-1] + len(passage.encode()) + 1)
    sliced = [passage for passage, size in zip(held_out, sizes[1:], strict=True) if size <= SLICE_BYTES]
    ASSETS.mkdir(parents=True, exist_ok=True)
    targets = {
        build / f"{name}.train.txt": train,
        build / f"{name}.heldout.txt": held_out,
        ASSETS / f"{name}.txt": sliced,
    }
    for path, lines in targets.items():
        # Written beside and renamed, so that a reader never sees half a file.
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in lines), "utf-8")
        partial.rename(path)
        print(f"{path}: {len(lines)} passages, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build"), help="where downloads and passages go")
    parser.add_argument("--extracted", type=Path, help="folder with the packages' usr/, instead of downloading")
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    extracted = (options.extracted or fetch(options.build)).resolve()
    write("wordnet", glosses(extracted), build=options.build)
    (ASSETS / "wordnet.LICENSE").write_text(wordnet_licence(extracted), "utf-8")
    write("kjv", verses(extracted), build=options.build)


if __name__ == "__main__":
    main()
