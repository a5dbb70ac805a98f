"""Low-rank adapter math on torch: pairs, layers, targets, attaching, merging.

Start with adapter.py, layers.py and attach.py. Names are imported lazily. adapter.py and forms.py import
torch only inside functions that compute, so code that only reads a file's header does not need torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter, Card, LoraSpec, NamedMix, Pair, TokenRows, scale_of
    from veneer.core.attach import Attachment, attach
    from veneer.core.init import create
    from veneer.core.merge import delta, merged_state
    from veneer.core.targets import Target, resolve_targets

__all__ = [
    "Adapter", "Attachment", "Card", "LoraSpec", "NamedMix", "Pair", "Target", "TokenRows", "attach", "create", "delta",
    "merged_state", "resolve_targets", "scale_of",
]  # fmt: skip


class _Core(ModuleType):
    """Module class in which `core.attach` is the function, not the submodule.

    Importing the submodule `core.attach` makes Python assign it to this attribute; the setter ignores that
    assignment."""

    @property
    def attach(self) -> Any:
        return importlib.import_module("veneer.core.attach").attach

    @attach.setter
    def attach(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Core
_HOMES = {
    "Attachment": "attach", "Target": "targets", "create": "init", "delta": "merge", "merged_state": "merge",
    "resolve_targets": "targets",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'veneer.core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"veneer.core.{_HOMES.get(name, 'adapter')}"), name)
    globals()[name] = value
    return value
