"""Adapters of one image base in memory, by digest: read once, held while in use, attached where they draw.

Knows digests and an attachment; what a digest means is told to it by `read`.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from veneer.errors import AdapterError, BaseError, MismatchError, ResourceError, VeneerError
from veneer.serve.request import Refused

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.attach import Attachment

__all__ = ["Adapters", "refused"]


class Adapters:
    """Adapters in memory by digest: read when first asked for, kept while somebody holds them, and after that until
    they are the longest unused and all together take up more than `limit` bytes.

    `hold`, `release` and `forget` from any thread; `attach` and `tidy` from the one that draws."""

    def __init__(self, read: Callable[[str], Adapter], attachment: Attachment, limit: int) -> None:
        self._read, self._attachment, self._limit = read, attachment, limit
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._bytes: dict[str, int] = {}
        self._holders: Counter[str] = Counter()
        self._forgotten: set[str] = set()
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def hold(self, digests: Sequence[str]) -> None:
        """Raises Refused for one that cannot be read; then none of them is held."""
        with self._lock:
            self._holders.update(digests)  # before they are read: nobody drops what is about to be used
        try:
            for digest in digests:
                self._have(digest)
        except BaseException as error:
            self.release(digests)
            raise (refused(error) if isinstance(error, VeneerError) else error) from error

    def _have(self, digest: str) -> None:
        with self._reading:
            with self._lock:
                if digest in self._adapters:
                    self._adapters.move_to_end(digest)
                    return
            adapter = self._read(digest)
            with self._lock:
                self._adapters[digest], self._bytes[digest] = adapter, adapter.size_bytes()
                self._forgotten.discard(digest)

    def release(self, digests: Sequence[str]) -> None:
        with self._lock:
            self._holders.subtract(digests)
            self._holders = +self._holders

    def forget(self, digest: str) -> None:
        with self._lock:
            if digest in self._adapters:
                self._forgotten.add(digest)

    def size(self) -> tuple[int, int]:
        with self._lock:
            return len(self._adapters), sum(self._bytes.values())

    def attach(self, digests: Iterable[str]) -> None:
        for digest in digests:
            if digest not in self._attachment.adapters:
                self._attachment.add(digest, self._adapters[digest])

    def tidy(self) -> None:
        with self._lock:
            unused = [digest for digest in self._adapters if digest not in self._holders]
            total = sum(self._bytes.values())
            for digest in sorted(unused, key=lambda digest: digest not in self._forgotten):
                if total > self._limit or digest in self._forgotten:
                    total -= self._bytes.pop(digest)
                    del self._adapters[digest]
                    self._forgotten.discard(digest)
            gone = [digest for digest in self._attachment.adapters if digest not in self._adapters]
        for digest in gone:
            self._attachment.remove(digest)


def refused(error: BaseException) -> Refused:
    """As an answer to the client. A picture that is not finite comes from what was asked for: not worth a retry."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ResourceError | MemoryError | torch.OutOfMemoryError):
        return Refused("there is no memory left for this picture", status=503, code="overloaded")
    if isinstance(error, AdapterError | MismatchError):
        return Refused(error.what, status=400, code="adapter_unusable", fix=error.fix)
    if isinstance(error, VeneerError):
        where = None if isinstance(error, BaseError) else error.where
        return Refused(error.what, status=400, code="invalid_request", where=where, fix=error.fix)
    return Refused("something went wrong here", status=500, code="internal")
