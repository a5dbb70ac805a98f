"""Limits that several servers count together in Redis, exactly.

    counters = RedisLimits("redis://:password@host/0")
    taken = counters.take(scopes)       reserve one request in all scopes or in none, in one script (limits.lua)
    counters.end(taken)                 release its concurrency; `change` corrects its tokens

A window has the slots of `limits.Window`, by Redis's clock. Redis keeps a server's running requests for
LEASE seconds after the server's last sign of life, so a dead server's requests are released by then.

`limits` 5.8 cannot do this: each of its scripts takes from one counter; its exact window stores a list entry
per unit, which suits requests but not thousands of tokens; and nothing can be given back or leased. So this
module uses `redis` itself. One thread sends all commands of a server in order; a request waits for Redis at
most once.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from veneer.errors import ConfigError, MissingExtraError

_log = logging.getLogger("veneer.serve.tenancy")

LEASE = 15.0
_SECONDS = 0.5
"""Seconds that Redis has for an answer, before the servers count without Redis."""
_QUEUED = 2.0
"""Seconds that a request can wait for other commands before its own, which is as if Redis did not answer."""
_OWED = 10_000
"""Maximum corrections that wait for Redis to come back."""


Scope = Mapping[str, Any]
"""The limits of a scope: name, windows (seconds, unit, maximum, amount of this request), and maybe concurrency."""


@dataclass(frozen=True)
class RedisRefusal:
    """The limit that is used up: its scope's index, and its window's index or None for concurrency."""

    scope: int
    window: int | None
    used: int
    retry_after: float


@dataclass(frozen=True)
class RedisTaken:
    """A reservation. `running`: the scopes with a limit on concurrency; `slots`: (key, slot)."""

    running: Sequence[str]
    slots: Sequence[tuple[str, str]]


class RedisLimits:
    """The counters of all servers with one Redis. Thread-safe; only the returned futures wait for Redis.

    While Redis does not answer, `covered` is 0, and `take` returns None.
    """

    def __init__(self, url: str) -> None:
        """Connect at the first command. Raises ConfigError, MissingExtraError."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtraError("VENEER_REDIS_URL needs redis", extra="fleet") from error
        how: dict[str, Any] = {"socket_timeout": _SECONDS, "socket_connect_timeout": _SECONDS}
        try:
            self._redis: Any = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **how)
        except ValueError:
            fix = "use redis://:PASSWORD@HOST:PORT/DATABASE"
            raise ConfigError("this is not an address of Redis", where="VENEER_REDIS_URL", fix=fix) from None
        self._script = self._redis.register_script((files("veneer.serve.tenancy") / "limits.lua").read_text("utf-8"))
        self.server, self.away = secrets.token_hex(8), False
        self._covers_since = float("inf")  # by time.monotonic
        self._stale = False  # whether commands have failed since the last `_renew`, so Redis's counts can be wrong
        self._running: Counter[str] = Counter()
        self._owed: deque[list[tuple[str, str, int]]] = deque(maxlen=_OWED)
        self._thread = ThreadPoolExecutor(1, "veneer-redis")
        self.beat()

    def covered(self) -> float:
        """Return for how many seconds Redis has counted all requests; 0 while Redis does not answer."""
        return max(0.0, time.monotonic() - self._covers_since)

    def take(self, scopes: Sequence[Scope]) -> Future[RedisTaken | RedisRefusal | None]:
        """Reserve one request in all scopes, or in none; None if Redis does not answer."""
        return self._thread.submit(self._try, partial(self._take_now, scopes, time.monotonic()))

    def change(self, taken: Future[Any], tokens: int, requests: int = 0) -> None:
        """Correct a reservation by these amounts, now or when Redis answers again."""

        def work() -> None:
            if isinstance(done := taken.result(), RedisTaken):
                amounts = {"tokens": tokens, "requests": requests}
                self._owed.append([(key, slot, amounts[key.split(":")[2]]) for key, slot in done.slots])
                self._try(self._send_owed)

        self._thread.submit(work)

    def end(self, taken: Future[Any]) -> None:
        """Release the concurrency of a reservation."""

        def work() -> None:
            if isinstance(done := taken.result(), RedisTaken):
                self._running.subtract(done.running)
                self._try(lambda: [self._redis.hincrby(self._key(name), self.server, -1) for name in done.running])

        self._thread.submit(work)

    def beat(self) -> Future[Any]:
        """Tell the other servers that this one is alive; call at least every LEASE / 3 seconds."""
        return self._thread.submit(self._try, self._renew, always=True)

    def close(self) -> None:
        """Give up this server's lease."""
        self._thread.submit(self._try, lambda: self._redis.delete(f"{{veneer}}:server:{self.server}"))
        self._thread.shutdown()
        self._redis.close()

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _key(self, scope: str) -> str:
        return f"{{veneer}}:running:{scope}"

    def _take_now(self, scopes: Sequence[Scope], asked: float) -> RedisTaken | RedisRefusal:
        """Reserve one request. `asked`: by time.monotonic. Raises redis.TimeoutError after _QUEUED seconds."""
        import redis

        if time.monotonic() - asked > _QUEUED:
            raise redis.TimeoutError(f"commands wait more than {_QUEUED:g} s")
        scope, *rest = self._script(args=[json.dumps({"server": self.server, "scopes": scopes})])
        if scope:
            return RedisRefusal(scope - 1, rest[0] - 1 if rest[0] else None, rest[1], float(rest[2]))
        self._covers_since = time.monotonic() - float(rest[0])
        running = [each["name"] for each in scopes if "concurrency" in each]
        self._running.update(running)
        return RedisTaken(running, [(key, slot) for key, slot, *_ in json.loads(rest[1])])

    def _send_owed(self) -> None:
        while self._owed:  # a correction that fails is not sent again, because Redis could have applied it
            self._script(args=[json.dumps({"changes": self._owed.popleft()})])

    def _renew(self) -> None:
        """Renew the lease. After an outage, restore this server's counts.

        All windows then begin anew, because Redis has not counted the requests of the outage.
        """
        lease, seconds = f"{{veneer}}:server:{self.server}", int(LEASE)
        if self._stale or not self._redis.set(lease, 1, ex=seconds, xx=True):
            for name, count in self._running.items():
                self._redis.hset(self._key(name), self.server, count)
            self._redis.set(lease, 1, ex=seconds)
        if self._stale:
            self._redis.set("{veneer}:begun", "{}.{:06d}".format(*self._redis.time()))
            _log.warning("Redis answers again and counts the limits")
        self._send_owed()
        self.away = self._stale = False

    def _try(self, work: Callable[[], Any], *, always: bool = False) -> Any:
        """Return the result of `work`, or None if Redis does not answer."""
        import redis

        if self.away and not always:
            return None
        try:
            return work()
        except (redis.RedisError, ValueError, TypeError, LookupError) as error:  # no answer, or not the script's
            if not self.away:
                _log.warning("Redis does not answer, so limits are approximate (see the database): %s", error)
            self.away, self._stale, self._covers_since = True, True, float("inf")
            return None
