"""Serving under load: a second process sends requests to `veneer serve` over HTTP, at several rates.

    python benchmarks/serving_load.py [--rates 1,2,4,8] [--requests 80] [--quick] [--json]
    python benchmarks/serving_load.py --url http://host:8000 [--key KEY] …

Requests arrive as a Poisson process with the given rate and a fixed seed: times, prompts and adapters are the
same in every run. Prompts have 16, 64 or 256 words, completions 16, 32 or 64 tokens, greedy, ignoring end
tokens. Each request uses one of eight rank-16 adapters or the base. Requests do not wait for earlier
responses, so response times grow if the server is too slow. Reports the completed requests and tokens per
second from the first request to the last token, the times to the first token and between tokens as seen by
the client, and the number of errors, which must be zero.

Without --url, the script creates adapters and starts a server on smollm2-135m (with --quick, on a tiny base).
With --url, it uses all models of that server in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from _report import bar, lines_of, report, row

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = 8
WORDS = (16, 64, 256)
TOKENS = (16, 32, 64)
TEXT = "the door lock of a hall does not open since noon and we wait for your answer please"


# -- a server ----------------------------------------------------------------------------------------------------------


def make_base(work: Path, quick: bool) -> str:
    """Return the value for `--base`.

    With `quick`, it is a new two-layer Llama with random weights and one token per byte."""
    if not quick:
        return "smollm2-135m"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(work / "base")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(work / "base")
    return str(work / "base")


def make_adapters(base_name: str, work: Path) -> None:
    import torch

    from veneer.core.adapter import Card, LoraSpec
    from veneer.core.init import create
    from veneer.formats import peft
    from veneer.models.text.base import load_text

    base = load_text(base_name)
    for i in range(ADAPTERS):
        adapter = create(base.model, LoraSpec(rank=16, alpha=32.0, targets="all-linear"), seed=i)
        for pair in adapter.pairs.values():
            pair.B = torch.randn(pair.B.shape, generator=torch.Generator().manual_seed(i)) * 0.005
        adapter.card = Card(base=base.name, base_fingerprint=base.fingerprint)
        peft.write_folder(adapter, work / "adapters" / f"a{i}")


@contextmanager
def own_server(quick: bool, extra: Sequence[str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        work = Path(folder)
        base = make_base(work, quick)
        (work / "adapters").mkdir()
        make_adapters(base, work)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        program = "from veneer.cli.main import main; main()"
        command = [sys.executable, "-c", program, "serve", "--base", base, "--port", str(port)]
        command += ["--library", str(work / "library"), "--allow-folder", str(work / "adapters"), *extra]
        command += [word for i in range(ADAPTERS) for word in ("--adapter", f"a{i}")]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        with (work / "log").open("w") as log:
            server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            try:
                wait_for(f"http://127.0.0.1:{port}", server, work / "log")
                yield f"http://127.0.0.1:{port}"
                server.send_signal(signal.SIGTERM)
                if server.wait(60):
                    raise SystemExit(
                        f"the server ended with {server.returncode}:\n{(work / 'log').read_text()[-3000:]}"
                    )
            finally:
                server.kill()
                server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server was not ready after ten minutes")


# -- a client ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request: its content, and when to send it, in seconds since the start."""

    at: float
    body: dict[str, Any]


@dataclass
class Seen:
    """A response as seen by the client. `times`: when the first token and each later piece of text arrived."""

    start: float = 0.0
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0
    error: str = ""


def plan(rate: float, n: int, models: Sequence[str], seed: int) -> list[Asked]:
    dice, at, out = random.Random(f"{seed} {rate}"), 0.0, []
    for i in range(n):
        at += dice.expovariate(rate)
        prompt = " ".join(dice.choices(TEXT.split(), k=dice.choice(WORDS)))
        body = {
            "model": models[i % len(models)],
            "prompt": f"{i} {prompt}",
            "max_tokens": dice.choice(TOKENS),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        out.append(Asked(at, body))
    return out


async def ask(client: httpx.AsyncClient, asked: Asked, begin: float) -> Seen:
    await asyncio.sleep(max(0.0, begin + asked.at - time.perf_counter()))
    seen = Seen(start=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=asked.body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise RuntimeError(f"{answer.status_code} {answer.text[:300]}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    told = json.loads(line[6:])
                    if "error" in told:
                        raise RuntimeError(str(told["error"])[:300])
                    seen.tokens = (told.get("usage") or {}).get("completion_tokens", seen.tokens)
                    if told["choices"]:
                        seen.times.append(time.perf_counter())
                elif line == "data: [DONE]":
                    seen.end = time.perf_counter()
        if not seen.end or seen.tokens != asked.body["max_tokens"]:
            raise RuntimeError(f"{seen.tokens} tokens of {asked.body['max_tokens']}, and then the stream ended")
    except (httpx.HTTPError, RuntimeError, ValueError, KeyError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


async def load(url: str, key: str, rate: float, n: int, models: Sequence[str], seed: int) -> list[Seen]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=600) as client:
        begin = time.perf_counter() + 0.05
        return await asyncio.gather(*(ask(client, asked, begin) for asked in plan(rate, n, models, seed)))


def models_of(url: str, key: str) -> list[str]:
    """Return the names of the base and its adapters, as listed by the server."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=60)
    answer.raise_for_status()
    return [model["id"] for model in answer.json()["data"]]


# -- report ------------------------------------------------------------------------------------------------------------


def at(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def rows_of(rate: float, seen: Sequence[Seen]) -> list[dict[str, Any]]:
    fine = [s for s in seen if not s.error]
    name = f"{rate:g} requests/s asked"
    if not fine:
        return [row(name, "errors", len(seen), "")]
    seconds = max(s.end for s in fine) - min(s.start for s in seen)
    first = [1e3 * (s.times[0] - s.start) for s in fine]
    between = [1e3 * (b - a) for s in fine for a, b in zip(s.times, s.times[1:], strict=False)]
    out = [
        row(name, "answered", len(fine) / seconds, "requests/s"),
        row(name, "generated", sum(s.tokens for s in fine) / seconds, "tokens/s"),
    ]
    for what, values in (("first token", first), ("between tokens", between)):
        out.append(row(name, f"{what}, median", statistics.median(values) if values else 0.0, "ms"))
        out += [row(name, f"{what}, p{100 * share:.0f}", at(values, share), "ms") for share in (0.95, 0.99)]
    return [*out, row(name, "errors", len(seen) - len(fine), "")]


def run(url: str, key: str, rates: Sequence[float], n: int, seed: int) -> dict[str, Any]:
    models = models_of(url, key)
    warm = asyncio.run(load(url, key, 50.0, len(models), models, seed + 1))  # use every adapter once
    rows: list[dict[str, Any]] = []
    errors = [s.error for s in warm if s.error]
    for rate in rates:
        seen = asyncio.run(load(url, key, rate, n, models, seed))
        errors += [s.error for s in seen if s.error]
        rows += rows_of(rate, seen)
        print(f"{rate:g} requests/s: {len(errors)} errors so far", file=sys.stderr)
    for error in sorted(set(errors))[:10]:
        print(f"error: {error}", file=sys.stderr)
    about = {"requests": n, "models": len(models), "seed": seed}
    return report(rows, [bar("errors", 0, len(errors), at_least=False)], about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny base, two rates: does it run, not how fast")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--key", default="", help="its API key")
    parser.add_argument("--rates", default="", help="requests per second, as 1,2,4,8")
    parser.add_argument("--requests", type=int, help="at each rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve-flags", default="", help="more for the server's command line, as '--max-batch 16'")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rates = [float(rate) for rate in (args.rates or ("10,40" if args.quick else "1,2,4,8")).split(",")]
    n = args.requests or (12 if args.quick else 80)
    if args.url:
        result = run(args.url.rstrip("/"), args.key, rates, n, args.seed)
    else:
        with own_server(args.quick, args.serve_flags.split()) as url:
            result = run(url, "", rates, n, args.seed)
    print(json.dumps(result) if args.json else "\n".join(lines_of(result)))
    if not all(b["ok"] for b in result["bars"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
