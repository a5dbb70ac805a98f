"""Which mix of adapters a body means.

A body names adapters in one way: `model`, `mix`, LoRAX's `adapter_id` or SGLang's `lora_path`. Two ways at once
that mean different things are refused, and a name that is not there is 404: never the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veneer.serve.access import ModelCard, Served
from veneer.serve.principal import Principal
from veneer.serve.request import check_strengths, invalid

if TYPE_CHECKING:
    from veneer.serve.names.catalog import Catalog


@dataclass(frozen=True)
class ChosenMix:
    """What a body's names meant. `label`: the adapter for metrics, or "mix"."""

    served: Served
    label: str


class MixChooser:
    """`default`: adapter -> strength for requests that name none, on every surface; the operator's, at the start."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.default: dict[str, float] = {}

    def adapters(self, caller: Principal) -> list[ModelCard]:
        return [card for card in self.catalog.models(caller) if card.parent is not None]

    def set_default(self, name: str, strength: float) -> None:
        """What requests that name no adapter get of one."""
        self.default[name] = strength

    def forget(self, name: str) -> None:
        """An adapter is no longer there: nobody gets it unasked."""
        self.default.pop(name, None)

    def choose(
        self,
        caller: Principal,
        *,
        model: str | None = None,
        mix: Sequence[tuple[str, float]] | None = None,
        lora_path: str | None = None,
    ) -> ChosenMix:
        """The one mix that a body asks for. One that names nothing gets `default`, as far as the
        caller can see it; an empty `mix` is the base.

        `lora_path` yields to a `model` that names an adapter itself, as SGLang has it."""
        named = model if model and model != self.catalog.base else None
        if mix is not None and (named or lora_path):
            ways = [*(["model"] if named else []), "mix", *(["lora_path"] if lora_path else [])]
            raise invalid(f"adapters are named in {len(ways)} ways: {', '.join(ways)}", "mix", "keep one")
        if mix is not None:
            return self._several(mix, caller)
        named = named or lora_path
        if named is None and self.default:
            visible = {card.id for card in self.adapters(caller)}
            return self._several([part for part in self.default.items() if part[0] in visible], caller)
        served = self.catalog.resolve(named or model or "", caller)
        return ChosenMix(served, served.target if served.mix else self.catalog.base)

    def _several(self, parts: Sequence[tuple[str, float]], caller: Principal) -> ChosenMix:
        if not parts:
            return ChosenMix(self.catalog.resolve("", caller), self.catalog.base)
        check_strengths(parts)
        served = self.catalog.resolve_mix(parts, caller)
        return ChosenMix(served, "mix" if len(served.mix) > 1 else parts[0][0] if served.mix else self.catalog.base)
