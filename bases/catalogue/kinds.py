"""All kinds of products, by the words that captions call them: every `kinds_*.py` beside this file."""

from __future__ import annotations

import importlib
from pathlib import Path

from shapes import KINDS as KINDS
from shapes import SUBJECTS as SUBJECTS

for _module in sorted(Path(__file__).parent.glob("kinds_*.py")):
    importlib.import_module(_module.stem)
