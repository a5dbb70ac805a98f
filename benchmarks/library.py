"""Library with 10,000 adapters: list, search and resolve, on SQLite and optionally on PostgreSQL.

    python benchmarks/library.py [--quick] [--adapters 10000] [--postgresql URL] [--json]

Adapters are small files with cards like those of an image library; only index and links are timed. Each query
uses different words and names. Times are for one process with an open library: p50, p95, and mean processor
time, which is more meaningful on a busy machine. The first 200 adapters are added one by one and timed. The
rows of the others are inserted in bulk, and then the tables are analyzed. --quick uses 500 adapters. The
PostgreSQL database (or schema) must be empty.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _report import bar, lines_of, report, row

from veneer.library import index as ix
from veneer.library.describe_files import AdapterDescription
from veneer.library.library import Library, open_library
from veneer.library.store import blob_path, canonical, manifest_path

BAR_MS = 50.0
ADDED = 200
WORDS = ["lantern", "harbour", "ink", "portrait", "forest", "neon", "clay", "winter", "poster", "engraving", "marble"]
BASES = ["stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev", "runwayml/stable-diffusion-v1-5"]


def card(n: int) -> dict[str, Any]:
    pick = random.Random(n)
    return {
        "base": pick.choice(BASES),
        "base_fingerprint": "sha256:" + hashlib.sha256(bytes([n % 3])).hexdigest(),
        "kind": "image",
        "rank": pick.choice([8, 16, 32, 64]),
        "trigger_words": [f"{pick.choice(WORDS)} style {n}", pick.choice(WORDS)],
        "licence": pick.choice(["mit", "openrail"]),
        "parents": ["sha256:" + hashlib.sha256(str(n // 10).encode()).hexdigest()],
        "targets": [f"unet.block.{i}.to_{x}" for i in range(10) for x in "qkv"],
    }


def name(n: int) -> str:
    return f"{WORDS[n % len(WORDS)]}-{n:05}"


def fill(library: Library, count: int, work: Path) -> float:
    """Fill the library; return adapters per second for the first ones, which are added as a user would."""
    path, start = work / "a.safetensors", time.perf_counter()
    for n in range(ADDED):
        data, told = made(n)
        path.write_bytes(data)
        library.add(path, name(n), tags=tags(n), describe=lambda _, told=told: told)
    rate = ADDED / (time.perf_counter() - start)
    with ix.index_transaction(library.engine) as c:
        for n in range(ADDED, count):
            data, told = made(n)
            files = {path.name: (hashlib.sha256(data).hexdigest(), len(data))}
            described = {k: {"sha256": h, "size": s} for k, (h, s) in files.items()}
            manifest = canonical({"veneer-manifest": 1, "files": described})
            entry = hashlib.sha256(manifest).hexdigest()
            contents = {blob_path(h): data for h, _ in files.values()} | {manifest_path(entry): manifest}
            for at, content in contents.items():
                (work / "library" / at).parent.mkdir(parents=True, exist_ok=True)
                (work / "library" / at).write_bytes(content)
            ix.claim(c, {at: len(content) for at, content in contents.items()})
            library.upsert_entry(c, entry, files, told)
            ix.insert_rows(c, ix.names, [{"name": name(n), "latest": 1, "next": 2}])
            row = {"name": name(n), "version": 1, "entry": entry, "added": "2026-01-01T00:00:00Z", "source": ""}
            ix.insert_rows(c, ix.versions, [row])
            ix.insert_rows(c, ix.tags, [{"name": name(n), "version": 1, "tag": t} for t in tags(n)])
    with library.engine.begin() as c:  # as a server does within a minute
        c.exec_driver_sql("ANALYZE")
    return rate


def made(n: int) -> tuple[bytes, AdapterDescription]:
    data = random.Random(n).randbytes(256)
    return data, AdapterDescription("sha256:" + hashlib.sha256(data).hexdigest(), "made", card(n))


def tags(n: int) -> list[str]:
    return [f"customer-{n % 100}", WORDS[n % 7]]


def timed(act: Callable[[int], Any], times: int) -> tuple[float, float, float]:
    """Return (p50, p95, mean processor time) in milliseconds."""
    act(0)
    taken, own = [], time.process_time()
    for n in range(times):
        start = time.perf_counter()
        act(n)
        taken.append((time.perf_counter() - start) * 1000)
    own = (time.process_time() - own) / times * 1000
    return statistics.median(taken), statistics.quantiles(taken, n=20)[-1], own


def queries(library: Library, count: int) -> dict[str, Callable[[int], Any]]:
    pick = random.Random(1)
    some = [pick.randrange(count) for _ in range(1000)]
    digests = [library.find(name(n)).digest for n in some[:200]]
    for n in some[:200]:
        library.resolve(name(n))
    return {
        "list, a page of 50": lambda i: library.search(limit=50, offset=some[i]),
        "find a name": lambda i: library.find(name(some[i])),
        "find a digest's prefix": lambda i: library.find(digests[i % 200][:19]),
        "resolve, linked before": lambda i: library.resolve(name(some[i % 200])),
        "resolve, the first time": lambda i: library.resolve(name(some[200 + i])),
        "search by name": lambda i: library.search(name=name(some[i])[:-2], limit=50),
        "search by tag": lambda i: library.search(tags=[f"customer-{i % 100}"], limit=50),
        "search by base and tag": lambda i: library.search(base=BASES[i % 3], tags=[WORDS[i % 7]], limit=50),
        "search by trigger word": lambda i: library.search(trigger=WORDS[i % len(WORDS)], limit=50),
        "search by parent": lambda i: library.search(parent=card(some[i])["parents"][0], limit=50),
        "search words, some hits": lambda i: library.search(f"style {some[i]} mit", limit=50),
        "search words, no hit": lambda i: library.search(f"nothing like {some[i]}x", limit=50),
    }


def measure(index: str | None, kind: str, count: int, times: int, say: Callable[[str], None]) -> tuple[list, list]:
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as folder, open_library(Path(folder) / "library", index) as library:
        rows.append(row(kind, "adds", fill(library, count, Path(folder)), "adapters/s"))
        say(f"{kind}: {count:,} adapters added")
        for what, act in queries(library, count).items():
            p50, p95, own = timed(act, times)
            each = {"p50": p50, "p95": p95, "processor": own}
            rows += [row(f"{kind}: {what}", metric, value, "ms") for metric, value in each.items()]
            bars.append(bar(f"{kind}: {what}, p95 in ms", BAR_MS, p95, at_least=False))
        start = time.perf_counter()
        library.search()
        rows.append(row(f"{kind}: list everything", "once", (time.perf_counter() - start) * 1000, "ms"))
    return rows, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 adapters")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--postgresql", metavar="URL", help="also measure with the index there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    count, times = (500, 50) if options.quick else (options.adapters, 200)
    say = (lambda _: None) if options.json else (lambda line: print(line, file=sys.stderr))
    rows, bars = measure(None, "SQLite", count, times, say)
    if options.postgresql:
        more, further = measure(options.postgresql, "PostgreSQL", count, times, say)
        rows, bars = rows + more, bars + further
    result = report(rows, bars, {"adapters": count})
    print(json.dumps(result, indent=2) if options.json else "\n".join(lines_of(result)))


if __name__ == "__main__":
    main()
