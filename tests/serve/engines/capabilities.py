"""What each engine can do. The page docs/reference/serving-features.md shows this table.

ENGINES: embedded; vllm, a vLLM that veneer runs; fleet, two vLLM servers behind a router.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ENGINES = ("embedded", "vllm", "fleet")


@dataclass(frozen=True)
class Capability:
    """`lacks`: engine -> (status, code) of the documented error of an engine without the capability."""

    what: str
    lacks: dict[str, tuple[int, str]] = field(default_factory=dict)


_UNUSABLE = {"vllm": (422, "adapter_unusable"), "fleet": (422, "adapter_unusable")}
_INVALID = {"vllm": (400, "invalid_request"), "fleet": (400, "invalid_request")}
CAPABILITIES = {
    each.what: each
    for each in (
        Capability("completions and chat of base and adapters"),
        Capability("names, versions and digests"),
        Capability("weighted mixes"),
        Capability("streaming and cancellation"),
        Capability("stop texts, seeds, logprobs, logit bias"),
        Capability("JSON schema"),
        Capability("tools"),
        Capability("tokenization"),
        Capability("load and unload"),
        Capability("tenants, limits, ledger, hidden names"),
        Capability("routes"),
        Capability("metrics"),
        Capability("separate prefix caches of adapters"),
        Capability("DoRA", _UNUSABLE),
        Capability("token rows", _UNUSABLE),
        Capability("log-probabilities of prompts", _INVALID),
    )
}


def table() -> str:
    """Return the table of the page."""
    rows = ["| | embedded | `--engine vllm` | router |", "| --- | --- | --- | --- |"]
    for name, each in CAPABILITIES.items():
        cells = [f"{' '.join(map(str, each.lacks[e]))}" if e in each.lacks else "✓" for e in ENGINES]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)
