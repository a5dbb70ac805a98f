"""Which mix of adapters a body means.

A body names adapters in one way: `model`, `mix`, LoRAX's `adapter_id`, SGLang's `lora_path` or llama.cpp's `lora`. Two
ways at once that mean different things are refused, and a name that is not there is 404: never the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veneer.serve.access import ModelCard, Served
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, check_strengths, invalid

if TYPE_CHECKING:
    from veneer.serve.names.catalog import Catalog


@dataclass(frozen=True)
class ChosenMix:
    """What a body's names meant. `label`: the adapter for metrics, or "mix"."""

    served: Served
    label: str


class AdapterNumbers:
    """llama.cpp's numbers for adapters, and its global scales, which act on its own routes alone. A number is given
    once and never to another name."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self.scales: dict[str, float] = {}

    def of(self, name: str) -> int:
        return self._of.setdefault(name, len(self._of))

    def name(self, number: int, visible: Iterable[ModelCard]) -> str:
        for card in visible:
            if self.of(card.id) == number:
                return card.id
        raise Refused(f"invalid adapter id {str(number)[:20]}", status=404, code="model_not_found", param="lora")


class MixChooser:
    """`default`: adapter -> strength for requests that name none, on every surface; the operator's, at the start."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.numbers = AdapterNumbers()
        self.default: dict[str, float] = {}

    def adapters(self, caller: Principal) -> list[ModelCard]:
        return [card for card in self.catalog.models(caller) if card.parent is not None]

    def set_default(self, name: str, strength: float) -> None:
        """What requests that name no adapter get of one."""
        self.default[name] = self.numbers.scales[name] = strength

    def forget(self, name: str) -> None:
        """An adapter is no longer there: nobody gets it unasked."""
        for scales in (self.default, self.numbers.scales):
            scales.pop(name, None)

    def choose(
        self,
        caller: Principal,
        *,
        model: str | None = None,
        mix: Sequence[tuple[str, float]] | None = None,
        lora: Sequence[tuple[int, float]] | None = None,
        lora_path: str | None = None,
        default: Mapping[str, float] | None = None,
    ) -> ChosenMix:
        """The one mix that a body asks for. One that names nothing gets `default` (the server's own where it is None),
        as far as the caller may see it; an empty `mix` or `lora` is the base.

        `lora_path` yields to a `model` that names an adapter itself, as SGLang has it."""
        named = model if model and model != self.catalog.base else None
        several = [key for key, value in {"mix": mix, "lora": lora}.items() if value is not None]
        if len(several) > 1 or (several and (named or lora_path)):
            ways = [*(["model"] if named else []), *several, *(["lora_path"] if lora_path else [])]
            raise invalid(f"adapters are named in {len(ways)} ways: {', '.join(ways)}", several[0], "keep one")
        if lora is not None:
            cards = self.adapters(caller)
            mix = [(self.numbers.name(number, cards), scale) for number, scale in lora]
        if mix is not None:
            return self._several(mix, caller)
        named = named or lora_path
        default = self.default if default is None else default
        if named is None and default:
            visible = {card.id for card in self.adapters(caller)}
            return self._several([part for part in default.items() if part[0] in visible], caller)
        served = self.catalog.resolve(named or model or "", caller)
        return ChosenMix(served, served.target if served.mix else self.catalog.base)

    def _several(self, parts: Sequence[tuple[str, float]], caller: Principal) -> ChosenMix:
        if not parts:
            return ChosenMix(self.catalog.resolve("", caller), self.catalog.base)
        check_strengths(parts)
        served = self.catalog.resolve_mix(parts, caller)
        return ChosenMix(served, "mix" if len(served.mix) > 1 else parts[0][0] if served.mix else self.catalog.base)
