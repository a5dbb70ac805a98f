"""Which blocks of the key-value cache belong to whom: pages of `block` tokens, shared where prompts begin alike.

    key of a full block = sha256(key of the block before it, its tokens);  key before the first = `request.cache_root`

Two sequences share a block exactly where everything that its keys and values were computed from is the same: all tokens
up to its end, and the mix; and where the salts are the same, which is how tenants are kept apart: whether a prompt was
there tells what others asked. The digest of a mix is of weights and strengths, so a renamed, reloaded or replaced
adapter can never find what another left.

A block is free (nothing in it), in use (one holder or more), or evictable: nobody holds it, its key is still known.
Evictable blocks are taken again, the longest unused first, when free ones run out. Numbers only: no tensors.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block, given the key of the one before it."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence, in order. `keys`: of its full blocks that are known to the cache."""

    root: bytes
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)


class Cache:
    """A key-value cache of `blocks` blocks of `block` tokens each, as numbers alone."""

    def __init__(self, blocks: int, block: int) -> None:
        self.size, self.block = blocks, block
        self._free = list(range(blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * blocks
        self._key: list[bytes | None] = [None] * blocks
        self._known: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._evictable)

    @property
    def in_use(self) -> int:
        return self.size - self.available

    def open(self, root: bytes, tokens: Sequence[int]) -> BlockTable:
        """A table that begins with the known blocks of `tokens`, held; the last token is never among them, since its
        logits have to be computed."""
        table = BlockTable(root)
        key = root
        for start in range(0, len(tokens) - self.block, self.block):
            key = chain(key, tokens[start : start + self.block])
            found = self._known.get(key)
            if found is None:
                break
            self._hold(found)
            table.blocks.append(found)
            table.keys.append(key)
        return table

    def grow(self, table: BlockTable, tokens: int) -> bool:
        """Make the table long enough for `tokens` tokens. Returns False, and changes nothing, without room."""
        more = -(-tokens // self.block) - len(table.blocks)
        if more > self.available:
            return False
        for _ in range(more):
            table.blocks.append(self._take())
        return True

    def computed(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """The keys and values of all these tokens are in the table's blocks: full blocks can be found from now on.

        Where another sequence has computed the same block meanwhile, that one stays the known one."""
        for i in range(len(table.keys), len(tokens) // self.block):
            before = table.keys[-1] if table.keys else table.root
            key = chain(before, tokens[i * self.block : (i + 1) * self.block])
            table.keys.append(key)
            if key not in self._known:
                block = table.blocks[i]
                self._known[key], self._key[block] = block, key

    def close(self, table: BlockTable) -> None:
        """Give the blocks back. Those with a key can be found until they are evicted, the end of a prompt first."""
        for block in reversed(table.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None
        table.blocks, table.keys = [], []

    def forget(self) -> None:
        """No block can be found any more; what is in use stays so. For whoever measures."""
        self._known.clear()
        self._key = [None] * self.size
        self._free += self._evictable
        self._evictable.clear()

    def _hold(self, block: int) -> None:
        if not self._holders[block]:
            del self._evictable[block]
        self._holders[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            key, self._key[block] = self._key[block], None
            assert key is not None
            del self._known[key]
        self._holders[block] = 1
        return block
