"""Block allocation for the key-value cache.

A block holds `block` tokens. Prompts with a common prefix share blocks.

    key of a full block  = sha256(key of the previous block, its tokens)
    key before the first = `request.cache_root`

Two sequences share a block only if everything that affects its keys and values is equal: all tokens up to the
block's end, the mix, and the salt. Salts separate tenants, because a cache hit reveals that somebody sent the
same prompt. A mix is identified by its adapters' digests and strengths, so a renamed, reloaded or replaced
adapter never finds another adapter's blocks.

With `copy`, a prompt also reuses the first tokens of another sequence's incomplete block, by copying the block.
A group of completions then computes its prompt once, except for the last token.

A block is free (empty), in use (one or more holders), or evictable (no holder, but a known key). When no
block is free, evictable blocks are reused, least recently used first. Works on plain numbers, without
tensors.

With `listen`, the cache announces which blocks new requests can reuse. Blocks of tables without a name are not
announced.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal


def chain(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of a full block, given the key of the previous block."""
    return hashlib.sha256(previous + array("q", tokens).tobytes()).digest()


@dataclass(frozen=True)
class CacheEvent:
    """A change of the cached blocks that new requests can reuse.

    `stored`: blocks were added; `keys` belong to consecutive blocks of `tokens`, `parent` is the key of the block
    before them (None at a prompt's start), and `name` is the table's. `removed`: an announced block was evicted.
    `cleared`: all blocks were dropped.
    """

    kind: Literal["stored", "removed", "cleared"]
    keys: Sequence[bytes] = ()
    parent: bytes | None = None
    tokens: Sequence[int] = ()
    name: str = ""


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence, in order. `keys`: cache keys of the sequence's computed full blocks.

    `cached`: number of tokens found in the cache when the table was opened. `name`: the name under which the blocks are
    announced, or None. `announced`: number of keys that need no further announcement."""

    root: bytes
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    cached: int = 0
    name: str | None = None
    announced: int = 0


class Cache:
    """Bookkeeping of a key-value cache with `blocks` blocks of `block` tokens each.

    `copy(source, target)`: copies a block's keys and values; None if incomplete blocks are not shared.
    `listen`: called with each event; must not block.
    """

    def __init__(
        self,
        blocks: int,
        block: int,
        copy: Callable[[int, int], None] | None = None,
        listen: Callable[[CacheEvent], None] | None = None,
    ) -> None:
        self.size, self.block, self.copy, self.listen = blocks, block, copy, listen
        self._announced = set[bytes]()
        self._free = list(range(blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * blocks
        self._key: list[bytes | None] = [None] * blocks
        self._known: dict[bytes, int] = {}
        self._tails: dict[bytes, tuple[int, Sequence[int]]] = {}  # key -> (the next block, its first tokens)
        self._tail_keys: list[bytes] = [b""] * blocks

    @property
    def available(self) -> int:
        """Number of blocks that can be allocated now."""
        return len(self._free) + len(self._evictable)

    @property
    def in_use(self) -> int:
        return self.size - self.available

    def open(self, root: bytes, tokens: Sequence[int], name: str | None = None) -> BlockTable:
        """Return a table that holds the cached blocks at the start of `tokens`.

        The last token is never included, because its logits have to be computed. `name`: see BlockTable.
        """
        table = BlockTable(root, name=name)
        key = root
        for start in range(0, len(tokens) - self.block, self.block):
            key = chain(key, tokens[start : start + self.block])
            block = self._known.get(key)
            if block is None:
                break
            if not self._holders[block]:
                del self._evictable[block]
            self._holders[block] += 1
            table.blocks.append(block)
            table.keys.append(key)
        table.cached = len(table.blocks) * self.block
        self._copy_tail(table, tokens)
        return table

    def _copy_tail(self, table: BlockTable, tokens: Sequence[int]) -> None:
        source, known = self._tails.get(table.keys[-1] if table.keys else table.root, (0, ()))
        pairs = zip(known, tokens[table.cached : -1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common and self.copy is not None and self.available:
            block = self._allocate()
            if block != source:
                self.copy(source, block)
            table.blocks.append(block)
            table.cached += common

    def grow(self, table: BlockTable, tokens: int) -> bool:
        """Extend the table to `tokens` tokens. Without enough blocks, change nothing and return False."""
        more = -(-tokens // self.block) - len(table.blocks)
        if more > self.available:
            return False
        for _ in range(more):
            table.blocks.append(self._allocate())
        return True

    def shrink(self, table: BlockTable, tokens: int) -> None:
        """Free the blocks after the table's first `tokens` tokens. No other sequence holds these blocks."""
        while len(table.blocks) > max(len(table.keys), -(-tokens // self.block)):
            block = table.blocks.pop()
            self._holders[block] = 0
            self._free.append(block)

    def mark_computed(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Record that the table holds the keys and values of all these tokens.

        From now on, other sequences can find the table's full blocks. If another sequence has already
        computed an equal block, the cache keeps the earlier block.
        """
        for i in range(len(table.keys), len(tokens) // self.block):
            previous = table.keys[-1] if table.keys else table.root
            key = chain(previous, tokens[i * self.block : (i + 1) * self.block])
            table.keys.append(key)
            if key not in self._known:
                block = table.blocks[i]
                self._known[key], self._key[block] = block, key
        if self.listen is not None and table.name is not None:
            self._announce(table, table.name, tokens)
        if tail := tokens[len(table.keys) * self.block :]:
            key, block = table.keys[-1] if table.keys else table.root, table.blocks[len(table.keys)]
            self._tails[key], self._tail_keys[block] = (block, tail), key

    def _announce(self, table: BlockTable, name: str, tokens: Sequence[int]) -> None:
        """Announce the table's blocks that are not announced yet, in runs of consecutive blocks."""
        keys, start, table.announced = table.keys, table.announced, len(table.keys)
        for new, run in itertools.groupby(range(start, len(keys)), key=lambda i: keys[i] not in self._announced):
            first, *more = run
            end = first + len(more) + 1
            if new and self.listen is not None:
                self._announced.update(keys[first:end])
                parent = keys[first - 1] if first else None
                covered = tokens[first * self.block : end * self.block]
                self.listen(CacheEvent("stored", keys[first:end], parent, covered, name))

    def close(self, table: BlockTable) -> None:
        """Release the table's blocks.

        Blocks with a key can be reused until they are evicted; a prompt's last blocks are evicted first."""
        for block in reversed(table.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None
        table.blocks, table.keys = [], []

    def forget(self) -> None:
        """Forget all keys, so that no block can be found. Blocks in use stay in use. For benchmarks."""
        self._known.clear()
        self._tails.clear()
        self._key = [None] * self.size
        self._free += self._evictable
        self._evictable.clear()
        self._announced.clear()
        if self.listen is not None:
            self.listen(CacheEvent("cleared"))

    def _allocate(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            key, self._key[block] = self._key[block], None
            assert key is not None
            del self._known[key]
            if key in self._announced and self.listen is not None:
                self._announced.discard(key)
                self.listen(CacheEvent("removed", (key,)))
        self._holders[block] = 1
        if self._tails.get(self._tail_keys[block], (None,))[0] == block:
            del self._tails[self._tail_keys[block]]
        return block
