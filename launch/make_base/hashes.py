"""Writes or checks moextend_jax/assets/base/SHA256SUMS: the hash of every file of the embedded base.

python launch/make_base/hashes.py          writes it
python launch/make_base/hashes.py --check  exit code 1 and the names if a file differs, is missing or is new
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

BASE = Path(__file__).parents[2] / "moextend_jax" / "assets" / "base"


def sums() -> str:
    """Lines as `sha256sum` prints them, run in BASE; the card may be edited without a new model, so it is left out."""
    files = sorted(p for p in BASE.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", "MODEL_CARD.md"))
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(BASE).as_posix()}\n" for p in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    target = BASE / "SHA256SUMS"
    if not parser.parse_args().check:
        target.write_text(sums())
        return
    differ = set(sums().splitlines()) ^ set(target.read_text().splitlines())
    if differ:
        sys.exit("these files differ: " + ", ".join(sorted({line.split("  ")[1] for line in differ})))


if __name__ == "__main__":
    main()
