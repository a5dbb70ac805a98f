"""A simulation of many GPUs and adapters: cold loads, fairness, cost, and the failure of a zone.

    python benchmarks/scale.py [--quick] [--json] [--plots docs/images/scale]
    python benchmarks/scale.py --server http://localhost:8000 --seats 4     compare with a real `--max-batch 4` server

Requests arrive at random times (Poisson) and name an adapter by Zipf's law. A router sends each request to a
replica: at random, to the replica with the fewest requests, or by affinity (rendezvous hashing, with the load of
a replica bounded). A replica has seats for running requests, keeps the most recently used adapters in memory, and loads
others from the library. Seats are given to tenants in turn, or to requests in order of arrival.

The fields of `Fleet` are the assumptions, with their sources. See docs/scale.md.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
import statistics
import time
import urllib.request
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import simpy
from _report import bar, options, parsed, print_report, report, row, say

ROUTERS = ("random", "least", "affinity")
MOST_COPIES = 256
"""Maximum replicas that affinity tries for an adapter; the most popular of 10,000 adapters needs 120 of 2,000 GPUs."""
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Fleet:
    """The parameters of a simulation. Times are in seconds.

    service: mean time of a request in a seat; the default with 32 seats is 8 requests/s per GPU, which S-LoRA
        reports for Llama 7B and 5 to 2,000 adapters on an A10G (arXiv:2311.03285, table 3: 8.05 to 7.61).
    variation: standard deviation of a request's time, divided by its mean; 1 for exponential times.
    resident: adapters that fit in a replica; 80 MB each (rank 16, Llama 7B, 16 bits) in 8 GB.
    cold: time to load an adapter from the library: 80 MB at 100 MB/s for one stream from S3, plus one request.
    streams: adapters that a replica loads at a time.
    load: offered work, divided by the capacity of all GPUs.
    zipf: exponent of adapter popularity; 1 is between the measured exponents of web requests, 0.6 to 1.2.
    copies: replicas among which affinity chooses for an adapter.
    bound: affinity skips a replica whose requests exceed `bound` times the mean.
    heavy: share of the requests that one tenant sends; the others share the rest evenly.
    zones: zones with equal numbers of GPUs; the first fails at the time `fails`, and returns `away` seconds later.
    price: dollars per GPU hour (A10G, AWS g5.xlarge on demand, us-east-1).
    """

    gpus: int = 20
    adapters: int = 10_000
    seconds: float = 120.0
    seats: int = 32
    service: float = 4.0
    variation: float = 1.0
    resident: int = 100
    cold: float = 0.85
    streams: int = 4
    load: float = 0.6
    zipf: float = 1.0
    router: str = "affinity"
    copies: int = 2
    bound: float = 1.5
    tenants: int = 100
    heavy: float = 0.0
    fair: bool = True
    zones: int = 3
    fails: float = math.inf
    away: float = 30.0
    price: float = 1.006
    seed: int = 0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.load * self.gpus * self.seats / self.service


@dataclass
class Result:
    """What clients saw: (arrival, tenant, seconds until a seat was free and the adapter loaded), and counts."""

    waits: list[tuple[float, int, float]] = field(default_factory=list)
    cold: int = 0
    retried: int = 0
    requests: int = 0

    def wait(self, share: float, keep: Callable[[float, int], bool] = lambda at, tenant: True) -> float:
        """Return a quantile of the waits of the requests that `keep` selects."""
        waits = sorted(wait for at, tenant, wait in self.waits if keep(at, tenant))
        return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else 0.0


class Replica:
    """A GPU: seats, a queue, and the adapters in memory, least recently used first."""

    def __init__(self, env: simpy.Environment, fleet: Fleet, zone: int) -> None:
        self.env, self.fleet, self.zone = env, fleet, zone
        self.start()

    def start(self) -> None:
        """Start, perhaps again, with no request and no adapter in memory."""
        self.load, self.is_up = 0, True
        self.free = self.fleet.seats
        self.adapters: OrderedDict[int, simpy.Event] = OrderedDict()
        self.loads = simpy.Resource(self.env, self.fleet.streams)
        self.down = self.env.event()
        self._queue: list[tuple[float, int, simpy.Event]] = []
        self._served: Counter[int] = Counter()
        self._turn, self._count = 0.0, 0

    def seat(self, tenant: int) -> simpy.Event:
        """Return an event for a free seat. With `fair`, tenants with fewer requests so far go first."""
        self._count += 1
        self._served[tenant] = max(self._served[tenant], int(self._turn)) + 1
        order = self._served[tenant] if self.fleet.fair else self._count
        event = self.env.event()
        heapq.heappush(self._queue, (order, self._count, event))
        self._next()
        return event

    def leave(self) -> None:
        self.free += 1
        self._next()

    def _next(self) -> None:
        while self.free and self._queue:
            self._turn, _, event = heapq.heappop(self._queue)
            self.free -= 1
            event.succeed()

    def adapter(self, name: int) -> tuple[simpy.Event, bool]:
        """Return an event for the adapter in memory, and whether it has to be loaded."""
        is_cold = name not in self.adapters
        return self.keep(name, self.env.process(self._load()) if is_cold else self.adapters[name]), is_cold

    def keep(self, name: int, loaded: simpy.Event) -> simpy.Event:
        """Keep an adapter in memory, in place of the one used least recently if there is no room."""
        self.adapters[name] = loaded
        self.adapters.move_to_end(name)
        if len(self.adapters) > self.fleet.resident:
            self.adapters.popitem(last=False)
        return loaded

    def _load(self) -> Generator[Any, Any, None]:
        with self.loads.request() as stream:
            yield stream
            yield self.env.timeout(self.fleet.cold)

    def fail(self) -> None:
        self.is_up = False
        self.down.succeed()


def simulate(fleet: Fleet) -> Result:
    """Return what clients saw, without the first eighth of the time, in which the queues fill.

    The replicas begin with adapters in memory, as if they had already answered many requests."""
    env, draws, result = simpy.Environment(), random.Random(fleet.seed), Result()
    replicas = [Replica(env, fleet, i % fleet.zones) for i in range(fleet.gpus)]
    choose = {"random": _random, "least": _least, "affinity": _affinity}[fleet.router]
    up, cached = list(replicas), dict[int, list[Replica]]()

    sigma = math.sqrt(math.log(1 + fleet.variation**2))

    def owners(adapter: int, count: int = 0) -> list[Replica]:
        count = min(count or fleet.copies, len(up))
        if len(cached.get(adapter, ())) < count:
            cached[adapter] = owners_of(adapter, count, replicas)
        return cached[adapter]

    def duration() -> float:
        if fleet.variation == 1:
            return draws.expovariate(1 / fleet.service)
        return draws.lognormvariate(math.log(fleet.service) - sigma**2 / 2, sigma) if sigma else fleet.service

    def request(tenant: int, adapter: int) -> Generator[Any, Any, None]:
        began, takes = env.now, duration()
        while True:
            replica = choose(fleet, adapter, up, draws, owners)
            down = replica.down
            replica.load += 1
            seat = replica.seat(tenant)
            yield seat | down
            if not down.triggered:
                ready, is_cold = replica.adapter(adapter)
                result.cold += is_cold and began >= warm
                yield ready | down
            waited = env.now - began
            if not down.triggered:
                yield env.timeout(takes) | down
            if not down.triggered:
                replica.load -= 1
                replica.leave()
                break
            result.retried += 1  # the door tries again, on another replica
        if began >= warm:
            result.waits.append((began, tenant, waited))

    def zone() -> Generator[Any, Any, None]:
        yield env.timeout(fleet.fails)
        failed = [r for r in replicas if r.zone == 0]
        for each in failed:
            each.fail()
        up[:] = [r for r in replicas if r.is_up]
        cached.clear()
        yield env.timeout(fleet.away)
        for each in failed:
            each.start()
        up[:] = replicas
        cached.clear()

    def arrivals() -> Generator[Any, Any, None]:
        while env.now < fleet.seconds:
            yield env.timeout(draws.expovariate(fleet.rate))
            is_heavy = draws.random() < fleet.heavy
            adapter = next(names)
            result.requests += env.now >= warm
            env.process(request(0 if is_heavy else 1 + adapter % fleet.tenants, adapter))

    names = zipf(fleet.adapters, fleet.zipf, draws)
    loaded = env.event()
    loaded.succeed()
    for adapter in itertools.islice(names, 4 * fleet.gpus * min(fleet.resident, fleet.adapters)):
        choose(fleet, adapter, up, draws, owners).keep(adapter, loaded)
    warm = fleet.seconds / 8
    env.process(arrivals())
    if fleet.fails < math.inf:
        env.process(zone())
    env.run()
    return result


def zipf(count: int, exponent: float, draws: random.Random) -> Generator[int, None, None]:
    """Yield numbers below `count`; number k has probability proportional to 1 / (k + 1) ** exponent."""
    total, sums = 0.0, []
    for k in range(count):
        total += (k + 1) ** -exponent
        sums.append(total)
    numbers = range(count)
    while True:
        yield from draws.choices(numbers, cum_weights=sums, k=4096)


def _random(fleet: Fleet, adapter: int, up: Sequence[Replica], draws: random.Random, owners: Any) -> Replica:
    return up[int(draws.random() * len(up))]


def _least(fleet: Fleet, adapter: int, up: Sequence[Replica], draws: random.Random, owners: Any) -> Replica:
    """Return the less loaded of two random replicas (power of two choices)."""
    one, two = (up[int(draws.random() * len(up))] for _ in range(2))
    return one if one.load <= two.load else two


def _affinity(
    fleet: Fleet, adapter: int, up: Sequence[Replica], draws: random.Random, owners: Callable[..., list[Replica]]
) -> Replica:
    """Return the less loaded of the adapter's own replicas, or the first later replica with room.

    This is consistent hashing with bounded loads (arXiv:1608.01350), HAProxy's `hash-balance-factor`."""
    best = min(owners(adapter)[: fleet.copies], key=lambda replica: replica.load)
    # A replica may have as many requests as seats without a queue, so the bound applies only above that.
    limit = max(fleet.seats, fleet.bound * fleet.load * fleet.seats)
    if best.load < limit:
        return best
    return next((replica for replica in owners(adapter, MOST_COPIES) if replica.load < limit), best)


def owners_of(adapter: int, copies: int, replicas: Sequence[Replica]) -> list[Replica]:
    """Return the adapter's replicas: the first `copies` that are up in an order that the adapter's name determines.

    If a replica fails, only its adapters move, and they return with it, as with rendezvous hashing."""
    found: list[Replica] = []
    order = random.Random(adapter)
    taken = set[int]()
    while len(found) < copies:
        k = int(order.random() * len(replicas))
        if replicas[k].is_up and k not in taken:
            taken.add(k)
            found.append(replicas[k])
    return found


# -- theory, for tests -------------------------------------------------------------------------------------------------


def erlang_wait(servers: int, load: float, service: float) -> float:
    """Return the mean wait of an M/M/c queue (Erlang C). load: share of the servers in use."""
    offered, blocked = servers * load, 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    waits = blocked / (1 - load * (1 - blocked))
    return waits * service / (servers * (1 - load))


def che_hit_rate(count: int, exponent: float, size: int) -> float:
    """Return the hit rate of an LRU cache of `size` of `count` items under Zipf's law (Che's approximation)."""
    weights = [float((k + 1) ** -exponent) for k in range(count)]
    total = sum(weights)
    shares = [w / total for w in weights]
    low, high = 0.0, 1e12
    for _ in range(200):
        span = (low + high) / 2
        low, high = (span, high) if sum(1 - math.exp(-p * span) for p in shares) < size else (low, span)
    return sum(p * (1 - math.exp(-p * low)) for p in shares)


# -- scenarios ---------------------------------------------------------------------------------------------------------

LEDGER_BYTES = 250
"""Bytes of a ledger line, as benchmarks/ledger_window.py writes them to PostgreSQL."""


def scaled(fleet: Fleet, budget: int) -> Fleet:
    """Return the fleet with a duration of about `budget` requests, between 30 seconds and 10 minutes."""
    return replace(fleet, seconds=min(600.0, max(30.0, budget / fleet.rate)))


def described(fleet: Fleet, result: Result) -> dict[str, float]:
    served = max(1, len(result.waits))
    return {
        "requests/s": fleet.rate,
        "cold, %": 100 * result.cold / served,
        "wait, mean": statistics.fmean(wait for _, _, wait in result.waits),
        "wait, p95": result.wait(0.95),
        "wait, p99": result.wait(0.99),
        "loads/s": result.cold / (fleet.seconds * 7 / 8),
        "dollars": fleet.price * fleet.gpus / 3600 / fleet.rate * 1e6,
    }


def sizes(budget: int, gpus: Sequence[int], adapters: Sequence[int]) -> list[tuple[Fleet, dict[str, float]]]:
    found = []
    for n in gpus:
        for count in adapters:
            for router in ROUTERS:
                fleet = scaled(Fleet(gpus=n, adapters=count, router=router), budget)
                found.append((fleet, described(fleet, simulate(fleet))))
                say(f"{n} GPUs, {count:,} adapters, {router}: {found[-1][1]['cold, %']:.1f}% cold")
    return found


def run(quick: bool, plots: Path | None) -> dict[str, Any]:
    budget = 20_000 if quick else 60_000
    rows: list[dict[str, Any]] = []
    gpus, adapters = ((20, 200), (10_000, 100_000)) if quick else ((20, 200, 2_000), (10_000, 100_000, 1_000_000))
    units = {"requests/s": "requests/s", "cold, %": "%", "loads/s": "loads/s", "dollars": "$ for a million requests"}
    grid = sizes(budget, gpus, adapters)
    for fleet, values in grid:
        name = f"{fleet.gpus:,} GPUs, {fleet.adapters:,} adapters, {fleet.router}"
        rows += [row(name, key, value, units.get(key, "s")) for key, value in values.items()]

    # One tenant sends 60% of the requests, in total 1.1 times the capacity.
    for fair in (False, True):
        fleet = scaled(Fleet(heavy=0.6, load=1.1, fair=fair, router="least"), budget)
        found, name = simulate(fleet), f"one tenant floods, {'tenants take turns' if fair else 'order of arrival'}"
        rows.append(row(name, "wait of the tenant, p95", found.wait(0.95, lambda at, tenant: tenant == 0), "s"))
        rows.append(row(name, "wait of the others, p95", found.wait(0.95, lambda at, tenant: tenant > 0), "s"))

    # A third of the GPUs fails for 30 seconds.
    for load in (0.5, 0.6, 0.7):
        for router in ("least", "affinity"):
            fleet = Fleet(gpus=60, load=load, router=router, seconds=120, fails=50, away=30)
            found, name = simulate(fleet), f"a zone of three fails, {load:.0%} load, {router}"
            rows += [
                row(name, "requests without an answer", found.requests - len(found.waits), ""),
                row(name, "requests tried again", found.retried, ""),
                row(name, "wait before, p95", found.wait(0.95, lambda at, tenant: at < 50), "s"),
                row(name, "wait while it is away, p95", found.wait(0.95, lambda at, tenant: 50 <= at < 80), "s"),
                row(name, "wait after, p95", found.wait(0.95, lambda at, tenant: at >= 90), "s"),
            ]
    if plots:
        draw(grid, plots)
    lost = sum(r["value"] for r in rows if r["metric"] == "requests without an answer")
    return report(rows, [bar("requests lost when a zone fails", 0, lost, at_least=False)], {"quick": quick})


def draw(grid: Sequence[tuple[Fleet, dict[str, float]]], folder: Path) -> None:
    """Draw the share of cold requests by number of adapters, a panel for each number of GPUs, as SVG."""
    gpus, counts = (sorted({getattr(f, key) for f, _ in grid}) for key in ("gpus", "adapters"))
    colors = {"random": "#b5541c", "least": "#2f6f9f", "affinity": "#3a7d44"}
    wide, high, gap = 200, 150, 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(gpus) * (wide + gap) + gap} {high + 110}" '
        'font-family="sans-serif" font-size="12" role="img" aria-label="Cold requests by router">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, n in enumerate(gpus):
        left, top = gap + i * (wide + gap), 40
        parts.append(f'<text x="{left}" y="{top - 14}" font-weight="bold">{n:,} GPUs: cold requests, %</text>')
        for percent in (0, 25, 50, 75, 100):
            y = top + high - high * percent / 100
            parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{y}" y2="{y}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{percent}</text>')
        at = {count: left + wide * k / max(1, len(counts) - 1) for k, count in enumerate(counts)}
        for count, x in at.items():
            parts.append(f'<text x="{x}" y="{top + high + 18}" text-anchor="middle">{count:,}</text>')
        parts.append(f'<text x="{left + wide / 2}" y="{top + high + 36}" text-anchor="middle">adapters</text>')
        for router, color in colors.items():
            values = {f.adapters: v["cold, %"] for f, v in grid if f.gpus == n and f.router == router}
            points = " ".join(f"{at[c]:.0f},{top + high - high * v / 100:.0f}" for c, v in sorted(values.items()))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    for k, (router, color) in enumerate(colors.items()):
        parts.append(f'<rect x="{gap + k * 110}" y="{high + 88}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{gap + k * 110 + 18}" y="{high + 98}">{router}</text>')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cold.svg").write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


# -- a real server -----------------------------------------------------------------------------------------------------

TOKENS = 24
"""Mean length of an answer in the comparison with a real server; lengths are exponential."""


def stream(url: str, base: str, tokens: int) -> tuple[float, float]:
    """Stream an answer of this many tokens. Return the seconds until its first and until its last token."""
    body = {"model": base, "prompt": "Ticket:", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), JSON)
    began, first = time.monotonic(), 0.0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: ") and not first:
                first = time.monotonic() - began
    return first, time.monotonic() - began


def compare(url: str, seats: int, seconds: float) -> dict[str, Any]:
    """Compare a real server's waits for a seat with the waits that the simulation predicts.

    The service time is measured with all seats in use. The wait of a request is its time to the first token,
    less the median of that time when nothing waits."""
    draws = random.Random(0)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        base = json.load(answer)["data"][0]["id"]
    with ThreadPoolExecutor(512) as pool:
        lengths = [max(1, round(draws.expovariate(1 / TOKENS))) for _ in range(20 * seats)]
        alone = statistics.median(stream(url, base, 1)[0] for _ in range(9))
        began = time.monotonic()
        with ThreadPoolExecutor(seats) as busy:
            list(busy.map(partial(stream, url, base), lengths))
        service = (time.monotonic() - began) * seats / len(lengths)
        rows = [row("a real server", "service time with all seats in use", service, "s")]
        for load in (0.5, 0.7, 0.85):
            fleet = Fleet(
                gpus=1, adapters=1, zones=1, cold=0.0, seats=seats, service=service, load=load, fair=False,
                router="random", seconds=20_000 / (load * seats / service),
            )  # fmt: skip
            answers, until = [], time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(draws.expovariate(fleet.rate))
                answers.append(pool.submit(stream, url, base, max(1, round(draws.expovariate(1 / TOKENS)))))
            waits = sorted(max(0.0, answer.result()[0] - alone) for answer in answers)
            predicted = simulate(fleet)
            name = f"{load:.0%} load, {len(waits)} requests"
            rows += [
                row(name, "wait, mean, measured", statistics.fmean(waits), "s"),
                row(name, "wait, mean, simulated", statistics.fmean(wait for *_, wait in predicted.waits), "s"),
                row(name, "wait, p95, measured", waits[int(0.95 * len(waits))], "s"),
                row(name, "wait, p95, simulated", predicted.wait(0.95), "s"),
            ]
    return report(rows, [], {"server": True})


def main() -> None:
    parser = options(__doc__, "fewer sizes and requests, in under a minute")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument("--server", help="URL of a veneer server: compare its waits with the simulation's")
    parser.add_argument("--seats", type=int, default=4, help="with --server: its --max-batch")
    args = parsed(parser)
    seconds = 30.0 if args.quick else 90.0
    found = compare(args.server, args.seats, seconds) if args.server else run(args.quick, args.plots)
    print_report(found, args.json)


if __name__ == "__main__":
    main()
