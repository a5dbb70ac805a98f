"""What each engine can do. The page docs/reference/serving-features.md shows this table.

ENGINES: embedded; vllm, a vLLM that veneer runs; fleet, two vLLM servers behind a router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

ENGINES = ("embedded", "vllm", "fleet")
Test = TypeVar("Test", bound=Callable[..., None])


@dataclass(frozen=True)
class Capability:
    """`lacks`: engine -> (status, code) of the documented error of an engine without the capability.

    `tests`: names of the tests that declare the capability."""

    what: str
    lacks: dict[str, tuple[int, str]] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)


_UNUSABLE = {"vllm": (400, "adapter_unusable"), "fleet": (400, "adapter_unusable")}
_INVALID = {"vllm": (400, "invalid_request"), "fleet": (400, "invalid_request")}
CAPABILITIES = {
    each.what: each
    for each in (
        Capability("completions and chat of base and adapters"),
        Capability("names, versions, aliases and digests"),
        Capability("weighted mixes"),
        Capability("streaming and cancellation"),
        Capability("stop strings, seeds, logprobs, logit bias"),
        Capability("JSON schema"),
        Capability("tools"),
        Capability("tokenization"),
        Capability("load and unload"),
        Capability("tenants, limits, ledger, hidden names"),
        Capability("routes and shadows"),
        Capability("metrics"),
        Capability("separate prefix caches of adapters"),
        Capability("DoRA", _UNUSABLE),
        Capability("ranks above 64 (`--max-lora-rank`)", _UNUSABLE),
        Capability("token rows", _UNUSABLE),
        Capability("full copies", _UNUSABLE),
        Capability("biases", _UNUSABLE),
        Capability("classification heads", dict.fromkeys(ENGINES, (400, "adapter_unusable"))),
        Capability("activated LoRA (aLoRA)", dict.fromkeys(ENGINES, (400, "adapter_unusable"))),
        Capability("log-probabilities of prompts", _INVALID),
    )
}


def needs(*names: str) -> Callable[[Test], Test]:
    """Declare the capabilities that a test needs."""

    def declare(test: Test) -> Test:
        for name in names:
            CAPABILITIES[name].tests.append(test.__name__)
        return test

    return declare


def table() -> str:
    """Return the table of the page."""
    rows = ["| | embedded | `--engine vllm` | router |", "| --- | --- | --- | --- |"]
    for name, each in CAPABILITIES.items():
        cells = [f"{' '.join(map(str, each.lacks[e]))}" if e in each.lacks else "✓" for e in ENGINES]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)
