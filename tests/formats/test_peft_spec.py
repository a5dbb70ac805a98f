"""Every MUST of docs/formats/peft.md is numbered once, in order, and held by tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "formats" / "peft.md").read_text(encoding="utf-8")


def test_every_must_is_held_by_tests_that_exist():
    files = [f for room in ("files", "formats") for f in (ROOT / "tests" / room).glob("test_*.py")]
    written = {n for f in files for n in re.findall(r"def (test_\w+)", f.read_text())}
    musts = re.findall(r"^- \*\*M(\d+)\*\* (.*)$", PAGE, re.M)
    assert [int(n) for n, _ in musts] == list(range(1, len(musts) + 1))
    assert len(re.findall(r"\*\*M\d+\*\*", PAGE)) == len(musts)
    for number, text in musts:
        named = set(re.findall(r"`(test_\w+)`", text))
        assert named, f"M{number} names no test"
        assert named <= written, f"M{number}: {named - written}"


def test_every_key_of_the_config_that_peft_writes_is_known():
    from peft import LoraConfig

    from veneer.formats.peft_config import FIELDS, IGNORED, REFUSED

    known = {*FIELDS, *IGNORED, *REFUSED, "peft_type", "init_lora_weights"}
    assert set(LoraConfig().to_dict()) <= known
