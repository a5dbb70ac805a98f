"""Paged keys and values, and attention over them.

`Pages` stores the tensors; `engine.cache` assigns blocks to sequences.

    out[t] = softmax(scale · q[t]·Kᵀ) · V     over positions ≤ t of t's sequence; only the last `window`, if set

On a CPU with vectors (ops/cpu/vec.h), the pages have the layout of ops/cpu/serving.c. Elsewhere, torch computes the
attention, and the layout is (block, position, head, d). With the kernel, and with torch's `tiles`, a token's
result is bit-identical in any batch. Otherwise results are equal within rounding, because the order of
summation depends on the shape. A block has 16 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.ops.cpu import compiled
from veneer.ops.device_transfer import put_numbers

BLOCK = 16


@dataclass(eq=False)
class PackedRows:
    """The positions and cache slots of a batch's tokens, one sequence after another.

    `positions`, `slots`: (tokens,). `starts`: (sequences + 1). `tables`: (sequences, longest) block numbers.
    All int64.
    """

    positions: Tensor
    slots: Tensor
    starts: Tensor
    tables: Tensor
    bounds: list[int]
    lengths: list[int]

    @classmethod
    def build(cls, rows: Sequence[tuple[int, int, Sequence[int]]], device: torch.device) -> PackedRows:
        """Build from (first position, end, blocks) of each sequence's tokens in this step."""
        positions: list[int] = []
        slots: list[int] = []
        bounds = [0]
        tables: list[int] = []
        widest = max(-(-end // BLOCK) for _, end, _ in rows)
        for first, end, blocks in rows:
            positions.extend(range(first, end))
            slots.extend(blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(first, end))
            used = -(-end // BLOCK)
            tables += [*blocks[:used], *[0] * (widest - used)]
            bounds.append(bounds[-1] + end - first)
        tensors = put_numbers(device, positions, slots, bounds, tables)
        return cls(
            tensors[0], tensors[1], tensors[2], tensors[3].view(len(rows), widest), bounds, [end for _, end, _ in rows]
        )

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Groups of sequences whose attention is computed together.

        The sequences of a group have the same number of tokens in this step, and similar lengths. For each
        group: rows (sequences · tokens,), positions (sequences, tokens) and key slots (sequences, longest).
        Cached, because all layers of a step use the same groups.
        """
        device = self.positions.device
        alike: dict[tuple[int, int], list[int]] = {}
        for s, length in enumerate(self.lengths):
            queries = self.bounds[s + 1] - self.bounds[s]
            alike.setdefault((queries, length.bit_length() if queries == 1 else s), []).append(s)
        out = []
        for (queries, _), members in alike.items():
            longest = max(self.lengths[s] for s in members)
            first = torch.tensor([self.bounds[s] for s in members], device=device)
            rows = (first[:, None] + torch.arange(queries, device=device)).flatten()
            positions = self.positions[rows].view(len(members), queries)
            blocks = self.tables[members, : -(-longest // BLOCK)]
            slots = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)[:, :longest]
            # Padding slots can contain NaN, and 0 · NaN is NaN, so replace them with the sequence's first slot.
            valid = torch.arange(longest, device=device) <= positions[:, -1:]
            out.append((rows, positions, torch.where(valid, slots, slots[:, :1])))
        return out


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding on halves: (a, b) -> (a cos - b sin, b cos + a sin).

    `cos`, `sin`: float32 (positions, d/2). `q_norm`, `k_norm`: weights (d,) of the preceding RMS norms, if
    the family has them.
    """

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


class Pages:
    """The keys and values of every layer. `heads`: query heads; `kv`: key and value heads; `d`: head size."""

    def __init__(
        self, layers: int, blocks: int, heads: int, kv: int, d: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.heads, self.kv, self.d = heads, kv, d
        self.tiles = False
        """Whether torch attention processes queries in tiles of BLOCK, with one shape for any batch.

        A token's attention is then bit-identical however its prompt is divided into chunks. The compiled
        kernels always work this way.
        """
        probe = torch.empty(0, d, dtype=dtype, device=device)
        self.native = compiled.usable(compiled.PAGED, probe) if d % 16 == 0 else None
        shape = (layers, blocks, kv, BLOCK * d) if self.native is not None else (layers, blocks * BLOCK, kv, d)
        self.K, self.V = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def rope_and_cache(self, layer: int, qkv: Tensor, rotary: Rotary, batch: PackedRows) -> None:
        """Normalize and rotate queries and keys in place, and store keys and values.

        qkv: (tokens, (heads + 2 kv) d)
        """
        if self.native is not None:
            weights = [0 if w is None else w.data_ptr() for w in (rotary.q_norm, rotary.k_norm)]
            self.native.rope_and_cache(
                qkv.data_ptr(),
                self.heads,
                self.kv,
                self.d,
                rotary.cos.data_ptr(),
                rotary.sin.data_ptr(),
                *weights,
                rotary.eps,
                batch.positions.data_ptr(),
                batch.slots.data_ptr(),
                batch.starts.data_ptr(),
                len(batch.lengths),
                self.K[layer].data_ptr(),
                self.V[layer].data_ptr(),
                torch.get_num_threads(),
            )
            return
        by_head = qkv.view(len(qkv), -1, self.d)
        q, k, v = by_head.split([self.heads, self.kv, self.kv], dim=1)
        cos, sin = rotary.cos[batch.positions][:, None], rotary.sin[batch.positions][:, None]
        for part, weight in ((q, rotary.q_norm), (k, rotary.k_norm)):
            x = part.float() if weight is None else F.rms_norm(part.float(), (self.d,), weight.float(), rotary.eps)
            a, b = x.chunk(2, dim=-1)
            part.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
        self.store(layer, k, v, batch)

    def store(self, layer: int, k: Tensor, v: Tensor, batch: PackedRows) -> None:
        """Store keys and values; k, v: (tokens, kv, d)."""
        if self.native is None:
            self.K[layer][batch.slots] = k
            self.V[layer][batch.slots] = v
            return
        k, v = k.contiguous(), v.contiguous()
        self.native.store_rows(
            k.data_ptr(),
            self.kv * self.d,
            v.data_ptr(),
            self.kv * self.d,
            batch.slots.data_ptr(),
            batch.starts.data_ptr(),
            len(batch.lengths),
            self.kv,
            self.d,
            self.K[layer].data_ptr(),
            self.V[layer].data_ptr(),
            torch.get_num_threads(),
        )

    def attend(
        self, layer: int, q: Tensor, batch: PackedRows, scale: float, cap: float = 0.0, window: int = 0
    ) -> Tensor:
        """Return the attention output of a batch: q (tokens, ≥ heads·d) -> (tokens, heads·d).

        `cap` c > 0: scores become c·tanh(s/c).
        """
        if self.native is None and self.tiles:
            return self._attend_tiles(layer, q[:, : self.heads * self.d], batch, scale, cap, window)
        if self.native is None:
            return self._attend_reference(layer, q[:, : self.heads * self.d], batch, scale, cap, window)
        out = q.new_empty(len(q), self.heads * self.d)
        self.native.paged_attend(
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            self.heads,
            self.kv,
            self.d,
            batch.positions.data_ptr(),
            batch.starts.data_ptr(),
            len(batch.lengths),
            batch.tables.data_ptr(),
            batch.tables.shape[1],
            self.K[layer].data_ptr(),
            self.V[layer].data_ptr(),
            scale,
            cap,
            window,
            max(batch.lengths),
            torch.get_num_threads(),
        )
        return out

    def _attend_tiles(self, layer: int, q: Tensor, batch: PackedRows, scale: float, cap: float, window: int) -> Tensor:
        """Compute the result of `_attend_reference` tile by tile, with fixed shapes.

        A tile has queries 16 i … 16 i + 15 of a sequence (zeros for queries not in this step) and keys 0 …
        16 i + 15 (zeros for keys not computed yet).
        """
        out = torch.empty_like(q)
        for s in range(len(batch.lengths)):
            first, end = batch.bounds[s], batch.bounds[s + 1]
            start = batch.lengths[s] - (end - first)  # the position of the first query
            for tile in range(start // BLOCK, -(-batch.lengths[s] // BLOCK)):
                low, high = max(start, tile * BLOCK), min(batch.lengths[s], (tile + 1) * BLOCK)
                at, wide = slice(first + low - start, first + high - start), (tile + 1) * BLOCK
                tile_q = q.new_zeros(BLOCK, self.heads, self.d)
                tile_q[low - tile * BLOCK : high - tile * BLOCK] = q[at].view(-1, self.heads, self.d)
                blocks = batch.tables[s, : tile + 1]
                slots = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).flatten()
                k, v = (t[layer][slots] for t in (self.K, self.V))
                if high < wide:  # stale slots can contain NaN
                    k[high:], v[high:] = 0, 0
                k, v = (t.transpose(0, 1).repeat_interleave(self.heads // self.kv, dim=0) for t in (k, v))
                distance = torch.arange(tile * BLOCK, wide, device=q.device)[:, None] - torch.arange(
                    wide, device=q.device
                )
                visible = (distance >= 0) & (distance < window) if window else distance >= 0
                scores = (tile_q.transpose(0, 1) @ k.mT).float() * scale
                scores = cap * torch.tanh(scores / cap) if cap else scores
                attended = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v
                out[at] = attended.transpose(0, 1).flatten(1)[low - tile * BLOCK : high - tile * BLOCK]
        return out

    def _attend_reference(
        self, layer: int, q: Tensor, batch: PackedRows, scale: float, cap: float, window: int
    ) -> Tensor:
        out = torch.empty_like(q)
        for rows, positions, slots in batch.groups:
            count, longest = slots.shape
            at = positions[..., None]
            keys = torch.arange(longest, device=q.device)
            visible = (keys <= at) & (keys > at - window) if window else keys <= at
            k, v = (t[layer][slots].transpose(1, 2) for t in (self.K, self.V))  # (sequences, kv, longest, d)
            queries = positions.shape[1]
            grouped_q = q[rows].view(count, queries, self.kv, -1, self.d).permute(0, 2, 3, 1, 4).flatten(2, 3)
            visible = visible[:, None, None].expand(-1, 1, self.heads // self.kv, -1, -1).flatten(2, 3)
            if cap:
                scores = cap * torch.tanh((grouped_q @ k.mT).float() * scale / cap)
                attended = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v
            else:
                attended = F.scaled_dot_product_attention(grouped_q, k, v, visible, scale=scale)
            attended = attended.unflatten(2, (-1, queries)).permute(
                0, 3, 1, 2, 4
            )  # (sequences, queries, kv, heads per kv head, d)
            out[rows] = attended.flatten(2).flatten(0, 1)
        return out
