"""A traced step beside the plan of the same step, and how a person reads the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import gigabytes
from veneer.plan.memory import Memory
from veneer.plan.trace import Trace

_PARTS = {
    "forward": "made going forward", "backward": "made going back", "constants": "quantisation constants",
    "optimizer": "optimizer",
}  # fmt: skip
_SHOWN = 6


def _function(place: str) -> str:
    """ "file function" of "operation file:line function"."""
    at, _, name = place.rpartition(" ")
    return f"{at.rpartition(' ')[2].rpartition(':')[0]} {name}"


@dataclass(frozen=True)
class TracedStep:
    """`trace`: of one step. `counted`: the plan's memory for the same, None where nothing is counted. `ways`: what
    runs, in a line. `ends`: "file function" where a step, at its end, reads what it was for -> how often: these waits
    are not counted as faults. `what`: the first words of its text."""

    trace: Trace
    counted: Memory | None
    ways: str
    ends: Mapping[str, int] = field(default_factory=dict)
    what: str = "traced"

    @property
    def counted_peak(self) -> int:
        """What the plan counts of what a trace can see: all but CUDA's own memory, what its allocator cannot place, and
        recordings of steps."""
        own = self.counted
        return 0 if own is None else own.peak - own.context - own.rounding - own.recordings

    @property
    def off(self) -> float:
        """counted / traced − 1"""
        return self.counted_peak / self.trace.peak - 1

    @property
    def waits(self) -> dict[str, int]:
        """Where the host waits for the device inside the step -> how often."""
        by_end: Counter[str] = Counter()
        for place, n in self.trace.waits.items():
            by_end[_function(place)] += n
        return {
            place: n
            for place, n in self.trace.waits.items()
            if by_end[_function(place)] > self.ends.get(_function(place), 0)
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, in bytes."""
        return {
            "peak_bytes": self.trace.peak,
            "parts": self.trace.at_peak,
            "counted_bytes": self.counted_peak,
            "recordings_bytes": 0 if self.counted is None else self.counted.recordings,
            "waits": self.waits,
            "float32": self.trace.wide,
            "casts": dict(self.trace.casts),
            "operations": self.trace.operations,
            "ways": self.ways,
            "kernels": self.trace.kernels,
            "weights_read_bytes": self.trace.weights,
        }

    def text(self) -> str:
        """As `veneer plan --trace` prints it."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        trace = self.trace
        beside = f", {gigabytes(self.counted_peak)} counted ({self.off:+.1%})" if self.counted is not None else ""
        yield f"{self.what}: {gigabytes(trace.peak)} at the peak of {trace.operations:,} operations{beside}"
        for part, size in trace.at_peak.items():
            yield f"  {_PARTS.get(part, part):<26}{gigabytes(size):>12}"
            if part in ("forward", "backward"):
                yield from self._most(trace.makers(part))
        if self.counted is not None and self.counted.recordings:
            yield f"  {'recorded steps, counted':<26}{gigabytes(self.counted.recordings):>12}"
        yield f"{trace.kernels:,} kernels, which read {gigabytes(trace.weights)} of weights"
        yield f"the host waits inside the step: {'never' if not self.waits else ''}".rstrip()
        yield from (f"    {n:>9,} ×  {place}" for place, n in self.waits.items())
        yield f"float32 of {trace.wide_from:,} elements and more: {'none' if not trace.wide else ''}".rstrip()
        yield from self._most(dict(sorted(trace.wide.items(), key=lambda item: -item[1])))
        yield f"ways      {self.ways}"

    def _most(self, sizes: Mapping[str, int]) -> Iterator[str]:
        shown = list(sizes.items())[:_SHOWN]
        yield from (f"    {gigabytes(size):>10}  {place}" for place, size in shown)
        if len(sizes) > _SHOWN:
            rest = sum(sizes.values()) - sum(size for _, size in shown)
            yield f"    {gigabytes(rest):>10}  of {len(sizes) - _SHOWN} more"
