"""Train, store, mix and serve low-rank adapters (LoRA).

    base = veneer.load_base("smollm2-135m")
    config = {"base": base.name, "data": {"train": "rows.jsonl"}, "output": "runs/first"}
    run = veneer.train_text(config, base=base)
    print(veneer.generate(base, ["The door of the lab will not open."], adapters=[run.adapter]))

Each name is imported on first use: `import veneer` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.api import (
        evaluate,
        generate,
        image,
        load_adapter,
        load_base,
        load_image_base,
        merge,
        mix,
        open_jobs,
        open_library,
        save_adapter,
        submit,
        train_image,
        train_text,
        train_together,
    )
    from veneer.core.adapter import Adapter, Card, LoraSpec, Pair
    from veneer.core.attach import attach
    from veneer.core.init import create
    from veneer.errors import VeneerError

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Card",
    "LoraSpec",
    "Pair",
    "VeneerError",
    "attach",
    "create",
    "evaluate",
    "generate",
    "image",
    "load_adapter",
    "load_base",
    "load_image_base",
    "merge",
    "mix",
    "open_jobs",
    "open_library",
    "save_adapter",
    "submit",
    "train_image",
    "train_text",
    "train_together",
]

_HOMES = {
    "Adapter": "core.adapter",
    "Card": "core.adapter",
    "LoraSpec": "core.adapter",
    "Pair": "core.adapter",
    "VeneerError": "errors",
    "attach": "core.attach",
    "create": "core.init",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"veneer.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
