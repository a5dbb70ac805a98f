"""A decoding step as one launch: recorded once for each size, on buffers that stay where they are (CUDA graphs).

    graphs = DecodeGraphs(llama, layout, spare, capture)
    logits = graphs.run(rows, mixes, unrecorded)      None where the caller has to run the step itself

Every number that a step has (tokens, positions, slots, block tables, who is in which mix) lies in one buffer of int64
and one of float32, which are written anew in one copy each; a recording is a function of them. It is made for so many
rows, keys and adapters of a mix, each rounded up to a power of two; padding rows read and write a block that no
sequence has. Adapters are found through a table of their records, one slot each, so another mix, or another adapter, is
other numbers and no other recording.

A recording is believed once it gave the logits of the step it was made from. Where one cannot be made or differs, no
step is recorded or replayed from then on, and `problem` says why. Never run on a card: `capture` is `cuda_graph` there,
and a test on a CPU hands in what calls the function again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from veneer.models.text.probe import near_rows
from veneer.ops.dispatch import dispatch
from veneer.ops.mixed_rows import RECORD, MixTiles, mix_lists
from veneer.ops.sizes import (
    RECORDED_ADAPTERS,
    RECORDED_BLOCKS,
    RECORDED_ROWS,
    RECORDINGS,
    power_of_2,
    tile_tokens,
)
from veneer.ops.transfer import made_up, pinned
from veneer.serve.forward.lowrank import BaseLayout, PackedAdapter
from veneer.serve.forward.paged import BLOCK, PackedRows

if TYPE_CHECKING:
    from veneer.serve.forward.llama import LlamaForward

log = logging.getLogger(__name__)

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A function without arguments -> what runs it again, and the tensor that then holds its result."""

_TILE = 16


class DecodeRow(Protocol):
    """What is asked of a row: one token of a sequence, at position `first`, of `blocks`."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def first(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def wants(self) -> int: ...


_Mix = Sequence[tuple[PackedAdapter, float]]


@dataclass(frozen=True)
class StepSize:
    """What a recording is made for. `blocks`: of the longest sequence. `adapters`: of the longest mix, 0 where no row
    has one; `ranks`: the largest sum of ranks in a group. `gains`: whether some adapter is a DoRA; `head`: whether some
    changes the head."""

    rows: int
    blocks: int
    adapters: int = 0
    ranks: int = 0
    gains: bool = False
    head: bool = False

    @classmethod
    def of(cls, rows: Sequence[DecodeRow], mixes: Sequence[_Mix], head_group: int) -> StepSize:
        """The size that takes them. `head_group`: the number of the head's group."""
        blocks = max(RECORDED_BLOCKS, power_of_2(max(row.first // BLOCK + 1 for row in rows)))
        acting = {id(adapter): adapter for mix in mixes for adapter, _ in mix}.values()
        if not acting:
            return cls(power_of_2(len(rows)), blocks)
        longest, rank = max(map(len, mixes)), max(a.rank for a in acting)
        return cls(
            power_of_2(len(rows)),
            blocks,
            power_of_2(longest),
            max(16, power_of_2(rank)),
            any(a.gains for a in acting),
            any(head_group in a.groups for a in acting),
        )


class _Slots:
    """A table of adapters' records, (groups, slots, RECORD) on the device: an adapter keeps its slot until another
    needs it."""

    def __init__(self, groups: int, device: torch.device) -> None:
        self.records = torch.zeros(groups, RECORDED_ADAPTERS, RECORD, dtype=torch.int64, device=device)
        self._held: dict[int, tuple[int, PackedAdapter]] = {}  # by id, the one used last at the end
        self._free = list(range(RECORDED_ADAPTERS))

    def places(self, adapters: Sequence[PackedAdapter]) -> dict[int, int] | None:
        """id -> slot of each, written where it is new; None where there are more than slots."""
        wanted = {id(a): a for a in adapters}
        if len(wanted) > self.records.shape[1]:
            return None
        for key in wanted:
            if key in self._held:
                self._held[key] = self._held.pop(key)
        for key, adapter in wanted.items():
            if key in self._held:
                continue
            if not self._free:
                self._free.append(self._held.pop(next(k for k in self._held if k not in wanted))[0])
            slot = self._free.pop()
            self.records[:, slot].copy_(pinned(adapter.records), non_blocking=True)
            self._held[key] = slot, adapter
        return {key: self._held[key][0] for key in wanted}

    def let_go(self, key: str) -> None:
        for one in [k for k, (_, adapter) in self._held.items() if adapter.key == key]:
            self._free.append(self._held.pop(one)[0])


@dataclass(frozen=True, eq=False)
class SlotProducts:
    """Low-rank products of a recorded step, as `Segments` has them for one that is not: rows by mixes in `tiles`, whose
    adapters are slots of `records`."""

    layout: BaseLayout
    tiles: MixTiles
    records: Tensor
    ranks: int
    gains: bool

    def add(self, group: int, x: Tensor, y: Tensor, own: Tensor | None = None) -> None:
        run = dispatch("mixed_rows", x, y)
        assert run is not None
        sixteens = not any(size % 16 for size in self.layout.groups[group].sizes)
        run(x, y, y if own is None else own, self.tiles, self.records[group], self.ranks, sixteens)

    def gained(self, group: int) -> bool:
        return self.gains

    def embed(self, ids: Tensor, x: Tensor) -> None:
        """No adapter of a recorded step changes the embedding."""


class _Buffers:
    """The numbers of a step of one size, where a recording reads them."""

    def __init__(self, size: StepSize, layout: BaseLayout, records: Tensor, tile: int) -> None:
        rows, mixed = size.rows, size.rows if size.adapters else 0
        self.lengths = (
            rows,
            rows,
            rows,
            rows + 1,
            rows * size.blocks,
            rows * 4,
            mixed,
            3 * mixed,
            mixed + 2,
            mixed * size.adapters,
        )
        self.numbers = torch.zeros(sum(self.lengths), dtype=torch.int64, device=layout.device)
        self.strengths = torch.zeros(mixed * size.adapters, dtype=torch.float32, device=layout.device)
        ids, positions, slots, starts, tables, tiles, of, mixes, begins, adapters = self.numbers.split(self.lengths)
        self.ids = ids
        self.batch = PackedRows(
            positions,
            slots,
            starts,
            tables.view(rows, size.blocks),
            list(range(rows + 1)),
            [size.blocks * BLOCK] * rows,
            {tile: tiles.view(rows, 4)},
        )
        self.products = None
        if mixed:
            own = MixTiles(of, mixes.view(-1, 3), begins, adapters, self.strengths, size.adapters, _TILE)
            self.products = SlotProducts(layout, own, records, size.ranks, size.gains)

    def write(self, rows: Sequence[DecodeRow], mixes: Sequence[_Mix], places: dict[int, int], spare: int) -> None:
        """The numbers of these rows, and of padding rows up to the size. `spare`: the padding's block."""
        room = len(self.ids)
        empty = room - len(rows)
        positions = [row.first for row in rows] + [0] * empty
        slots = [row.blocks[row.first // BLOCK] * BLOCK + row.first % BLOCK for row in rows] + [spare * BLOCK] * empty
        wide = self.batch.tables.shape[1]
        tables: list[int] = []
        for row in rows:
            used = row.first // BLOCK + 1
            tables += [*row.blocks[:used], *[0] * (wide - used)]
        tables += [spare] * (wide * empty)
        tiles = [n for s, at in enumerate(positions) for n in (s, s, 1, at)]
        flat = [[row.tokens[0] for row in rows] + [0] * empty, positions, slots, list(range(room + 1)), tables, tiles]
        strengths: list[float] = []
        if self.products is not None:
            of, cut, begins, adapters, strengths = mix_lists(_together(mixes, places), _TILE)
            last = len(begins) - 1  # a mix of nothing, which tiles without a row are of
            cut += [last, 0, 0] * (room - len(cut) // 3)
            flat += [of, cut, begins + [begins[-1]] * (self.lengths[8] - len(begins)), adapters]
        filled = [
            n for part, length in zip(flat, self.lengths, strict=False) for n in [*part, *[0] * (length - len(part))]
        ]
        filled += [0] * (len(self.numbers) - len(filled))
        self.numbers.copy_(pinned(torch.tensor(filled, dtype=torch.int64)), non_blocking=True)
        strengths += [0.0] * (len(self.strengths) - len(strengths))
        self.strengths.copy_(pinned(torch.tensor(strengths, dtype=torch.float32)), non_blocking=True)


def _together(mixes: Sequence[_Mix], places: dict[int, int]) -> list[tuple[list[tuple[int, float]], list[int]]]:
    """Each mix, by slots in the order of the adapters' keys, with its rows."""
    found: dict[tuple[tuple[int, float], ...], list[int]] = {}
    for row, mix in enumerate(mixes):
        if mix:
            own = sorted(mix, key=lambda one: one[0].key)
            found.setdefault(tuple((places[id(a)], s) for a, s in own), []).append(row)
    return [(list(mix), rows) for mix, rows in found.items()]


@dataclass(eq=False)
class _Recording:
    buffers: _Buffers
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """`spare`: a block of the pages that no sequence has. `problem`: why no step is recorded; "" where some are."""

    def __init__(self, llama: LlamaForward, layout: BaseLayout, spare: int, capture: Capture) -> None:
        self.problem = ""
        self.llama, self.layout, self.spare, self._capture = llama, layout, spare, capture
        self._head = len(layout.groups) - 1
        self._slots = _Slots(len(layout.groups), layout.device)
        self._recorded: dict[StepSize, _Recording] = {}
        pages = llama.pages
        self._tile = tile_tokens(pages.heads, pages.kv, 1)
        probe = torch.empty(1, pages.heads, pages.d, dtype=layout.dtype, device=layout.device)
        wanted = {"paged_attention": pages.K[0], "turn_and_store": pages.K[0], "mixed_rows": probe}
        missing = [op for op, other in wanted.items() if dispatch(op, probe, other) is None]
        if missing or pages.native is not None or pages.tiles:
            self.problem = f"no kernel for {', '.join(missing) or 'these pages'}"

    @property
    def sizes(self) -> int:
        """How many were recorded."""
        return len(self._recorded)

    def let_go(self, key: str) -> None:
        """An adapter has left the memory."""
        self._slots.let_go(key)

    def run(self, rows: Sequence[DecodeRow], mixes: Sequence[_Mix], unrecorded: Callable[[], Tensor]) -> Tensor | None:
        """The logits of a step, (rows, vocabulary), which the next step overwrites; None for a step that is not
        recorded: prompts, too many rows or adapters, adapters of the embedding, one size too many. `unrecorded`: runs
        the step without a recording."""
        if self.problem or len(rows) > RECORDED_ROWS or any(len(row.tokens) != 1 or row.wants != 1 for row in rows):
            return None
        acting = [adapter for mix in mixes for adapter, _ in mix]
        if any(adapter.embedding is not None for adapter in acting):
            return None
        size = StepSize.of(rows, mixes, self._head)
        known = self._recorded.get(size)
        if known is None and len(self._recorded) >= RECORDINGS:
            return None
        places = self._slots.places(acting)
        if places is None:
            return None
        if known is not None:
            known.buffers.write(rows, mixes, places, self.spare)
            known.replay()
            return known.logits[: len(rows)]
        wanted = unrecorded()
        if not bool(wanted.isfinite().all()):  # by an adapter that overflows: nothing to compare with
            return wanted
        try:
            buffers = _Buffers(size, self.layout, self._slots.records, self._tile)
            buffers.write(rows, mixes, places, self.spare)
            replay, logits = self._capture(lambda: self._step(buffers, size.head))
            logits.fill_(float("nan"))  # or one that does nothing would be believed
            replay()
            if not near_rows(logits[: len(rows)], wanted, torch.finfo(wanted.dtype).eps):
                raise RuntimeError("a recorded step gave other logits than the step itself")
            self._recorded[size] = _Recording(buffers, replay, logits)
        except Exception as error:  # of CUDA's, of torch's, of triton's: decoding goes on without
            self.problem = f"{type(error).__name__}: {error}".splitlines()[0]
            self._recorded.clear()
            log.warning("decoding goes on without CUDA graphs: %s", self.problem)
        return wanted

    def _step(self, buffers: _Buffers, head: bool) -> Tensor:
        hidden = self.llama.hidden(buffers.ids, buffers.batch, buffers.products)
        return self.llama.logits(hidden, buffers.products if head else None)


def records_here(device: torch.device, probe: Tensor) -> bool:
    """Whether steps can be recorded on a device: CUDA, and not one that is made up."""
    return device.type == "cuda" and not made_up(probe)


_pool: list[Any] = []
"""Memory that all recordings take their tensors from: one runs at a time, so that it is as large as the largest of them
needs, and what outlives a step, its logits, is kept by each (plan/serving.py counts both)."""


def cuda_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """`step` recorded as a CUDA graph of its device. Other threads may use that meanwhile: they read adapters."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # what is made at a first call is made here
                step()
        torch.cuda.current_stream().wait_stream(side)
        if not _pool:
            _pool.append(torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool[0], capture_error_mode="thread_local"):
            out = step()
    return graph.replay, out


def graph_problem() -> str:
    """Why no step can be recorded on the current GPU; "" where a small one was, and gave what it should."""
    try:
        x = torch.ones(8, device="cuda")
        replay, y = cuda_graph(lambda: x * 2, x.device)
        x.fill_(3.0)
        replay()
        right = bool((y == 6).all())
    except Exception as error:  # of torch's, of the driver
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if right else "a small recording gave wrong numbers"
