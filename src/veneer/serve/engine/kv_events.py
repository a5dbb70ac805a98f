"""Publishes changes of the block cache to routers, over ZeroMQ in vLLM's format.

    events = KvEvents("tcp://*:5557", "smollm2-135m", port=8000)
    Cache(…, listen=events.put)

    message      topic kv@POD@MODEL, 8-byte big-endian sequence number, msgpack [time, [event, …], 0]
    event        {"type": "BlockStored" | "BlockRemoved" | "AllBlocksCleared", …}, with vLLM's keys
    replay       [b"", first number] -> [b"", topic, number, message] …, then [b"", b"", -1, b""]

Facts from vllm/distributed/kv_events.py (0.32) and llm-d-router pkg/kvevents (engineadapter/vllm_adapter.go,
zmq_subscriber.go). A router computes keys from tokens and the value of `model` only, so blocks of mixes and of
requests with a salt are not announced. A block that several names share is announced under the first name.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any

from veneer.errors import ConfigError, MissingExtraError
from veneer.serve.engine.cache import CacheEvent

log = logging.getLogger(__name__)

_BATCH = 1000
"""Maximum events in a message."""
_KEPT = 10_000
"""Number of messages kept for replay, as in vLLM."""
_POLL_SECONDS = 0.1
_END = (-1).to_bytes(8, "big", signed=True)


class KvEvents:
    """Listens on `endpoint`, and publishes the events it is given, in a thread.

    `model`: the name under which the base is served. `replay`: address for replays, or "". The pod's name is
    POD_IP, or the host's name, with this server's `port`. Raises MissingExtraError, and ConfigError for an
    address that cannot be used.
    """

    def __init__(self, endpoint: str, model: str, *, port: int, replay: str = "", queue: int = 100_000) -> None:
        try:
            import msgpack  # type: ignore[import-untyped]
            import zmq
        except ImportError as error:
            raise MissingExtraError("kv_events needs pyzmq and msgpack", extra="fleet") from error
        self.model, self._pack = model, msgpack.packb
        self.topic = f"kv@{os.environ.get('POD_IP') or socket.gethostname()}:{port}@{model}".encode()
        self._queue, self._lost = Queue[CacheEvent | None](queue), False
        self._kept = deque[tuple[bytes, bytes]](maxlen=_KEPT)
        self._sockets: list[Any] = [zmq.Context.instance().socket(kind) for kind in (zmq.PUB, zmq.ROUTER)]
        try:
            for each, address in zip(self._sockets, filter(None, (endpoint, replay)), strict=False):
                each.bind(address)
        except zmq.ZMQError as error:
            self._close()
            message = f"cannot listen on {address}: {error}"
            raise ConfigError(message, where="kv_events", fix="a free address, such as tcp://*:5557") from error
        self._thread = threading.Thread(target=self._work, name="kv-events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish the queued events, and stop."""
        self._queue.put(None)
        self._thread.join()
        self._close()

    def _close(self) -> None:
        for each in self._sockets:
            each.close(linger=1000)

    def put(self, event: CacheEvent) -> None:
        """Publish an event soon. Never blocks.

        If the queue is full, the event is dropped, and routers are told that the cache is empty. They then
        expect too few cached blocks, never too many.
        """
        try:
            self._queue.put_nowait(event)
        except Full:
            self._lost = True

    def _work(self) -> None:
        sent, going = 0, True
        while going:
            while self._sockets[1].poll(0):
                self._replay()
            batch: list[CacheEvent | None] = []
            with suppress(Empty):
                batch.append(self._queue.get(timeout=_POLL_SECONDS))
                while len(batch) < _BATCH:
                    batch.append(self._queue.get_nowait())
            going = None not in batch
            if self._lost and self._queue.empty():
                self._lost = False
                log.warning("too many cache events to publish: routers are told that the cache is empty")
                batch.append(CacheEvent("cleared"))
            if events := [self._encoded(event) for event in batch if event is not None]:
                number, message = sent.to_bytes(8, "big"), self._pack([time.time(), events, 0])
                self._sockets[0].send_multipart([self.topic, number, message])
                self._kept.append((number, message))
                sent += 1

    def _encoded(self, event: CacheEvent) -> dict[str, Any]:
        if event.kind == "cleared":
            return {"type": "AllBlocksCleared"}
        kind = "BlockStored" if event.kind == "stored" else "BlockRemoved"
        body: dict[str, Any] = {"type": kind, "block_hashes": [_hash(key) for key in event.keys], "medium": "GPU"}
        if event.kind == "removed":
            return body
        parent, name = event.parent and _hash(event.parent), None if event.name == self.model else event.name
        body |= {"parent_block_hash": parent, "lora_id": None, "lora_name": name}
        return body | {"token_ids": list(event.tokens), "block_size": len(event.tokens) // len(event.keys)}

    def _replay(self) -> None:
        """Answer a replay request with the kept messages, from the requested number."""
        frames, replay = self._sockets[1].recv_multipart(), self._sockets[1].send_multipart
        if len(frames) == 3:
            for number, message in list(self._kept):
                if number >= frames[2]:
                    replay([frames[0], b"", self.topic, number, message])
            replay([frames[0], b"", b"", _END, b""])


def _hash(key: bytes) -> int:
    """Return a key's last 64 bits, as vLLM publishes its hashes by default."""
    return int.from_bytes(key[-8:], "big")
