"""The maths of adapters on torch alone: pairs, layers, targets, initialisation, attach and detach, merge.

Read adapter.py, layers.py and attach.py in that order."""

from veneer.core.adapter import Adapter, Card, LoraSpec, Mix, Pair, TokenRows, scale_of
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.core.merge import delta, merged_state
from veneer.core.targets import Target, resolve

__all__ = [
    "Adapter",
    "Attachment",
    "Card",
    "LoraSpec",
    "Mix",
    "Pair",
    "Target",
    "TokenRows",
    "attach",
    "create",
    "delta",
]
__all__ += ["merged_state", "resolve", "scale_of"]
