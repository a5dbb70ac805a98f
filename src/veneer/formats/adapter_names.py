"""The names of adapters inside a file's keys: `lora_A.NAME.weight`, as PEFT's layers have them before it saves.

PEFT saves one adapter a folder, without its name; a state dict taken from a model has the names in it, and may hold
several adapters. Knows keys; nothing of what they mean.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from veneer.errors import AdapterError, nearest

__all__ = ["named_adapters", "one_adapter"]

T = TypeVar("T")

_NAMED = re.compile(
    r"(?P<before>.+\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save))"
    r"(?:\.(?!weight$|bias$)(?P<name>[^.]+))?(?P<after>(?:\.[^.]+)*)"
)


def named_adapters(keys: Iterable[str]) -> Counter[str]:
    """Adapter's name -> how many keys have it; "" for keys of pairs that have none. Empty where no key has a name."""
    found = Counter(match["name"] or "" for key in keys if (match := _NAMED.fullmatch(key)))
    return found if set(found) - {""} else Counter()


def one_adapter(tensors: Mapping[str, T], wanted: str = "", *, where: str = "") -> dict[str, T]:
    """The tensors of the adapter `wanted`, its name taken out of the keys; what has no place for a name stays.

    Without `wanted` the file must hold one adapter, and keys stay as they are. Raises AdapterError that names all that
    are there, for several without `wanted` and for one that is not there."""
    found = named_adapters(tensors)
    listed = ", ".join(f"{n or '(no name)'} ({count} tensors)" for n, count in sorted(found.items()))
    if not wanted:
        if len(found) > 1:
            raise AdapterError(
                f"the file holds {len(found)} adapters: {listed}",
                where=where,
                fix=f"--adapter-name {sorted(set(found) - {''})[0]} (adapter_name=) picks one",
            )
        return dict(tensors)
    if wanted not in found:
        near = nearest(wanted, found, 1)
        raise AdapterError(
            f"no adapter in the file is called {wanted!r}; there {'is' if len(found) == 1 else 'are'} "
            + (listed or "no names in its keys"),
            where=where,
            fix=f"--adapter-name {near[0]}" if near else "leave --adapter-name out" if not found else None,
        )
    out: dict[str, T] = {}
    for key, tensor in tensors.items():
        match = _NAMED.fullmatch(key)
        if match is None:
            out[key] = tensor
        elif match["name"] == wanted:
            before = match["before"].removesuffix(".modules_to_save")
            out[before + match["after"]] = tensor
    return out
