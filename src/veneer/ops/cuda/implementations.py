"""IMPLEMENTATIONS is what veneer.ops.dispatch chooses from on a GPU: op -> Implementation. An op without one runs its
reference in torch."""

from __future__ import annotations

from veneer.ops.dispatch import Implementation

IMPLEMENTATIONS: dict[str, Implementation] = {}
