"""The math of adapters, on torch only: pairs, layers, targets, attach, merge.

Read adapter.py, layers.py and attach.py in this order. Names are imported when first used. adapter.py and
forms.py load torch only when they compute, so that code which reads a file's header does not need torch.
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
    """Keeps `attach` the function after the module `core.attach` is imported.

    Importing a submodule sets it as an attribute of the package; the setter ignores this."""

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
