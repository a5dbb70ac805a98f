"""Two-process runs for test_devices: each process is `python -m tests.train.shared_runs FOLDER`, started as
torchrun would start it.

FOLDER contains the tiny base, its rows, and the run `one`, which a single process trained. Each process
writes its events to FOLDER/seen-RANK.json. As with Ray, the process group exists before the runs, which share
it. Only the last run, `veneer train FOLDER/killed.json`, creates its own group; its second process is killed.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.train.text.tiny_runs import train
from tests.train.tiny_pictures import run as train_pictures
from veneer.cli.main import main as veneer
from veneer.errors import Interrupted, TrainingError
from veneer.models import shard
from veneer.train.events import Evaluated, Event, Note, Stepped
from veneer.train.text import task as run

ONE_ROW = {"batching": {"rows": 4, "micro_rows": 1}}
"""With one row per micro-batch, micro-batches and dropout masks are the same for any number of devices."""
NO_DROPOUT = {"adapter": {"rank": 4, "dropout": 0.0}}
SHARDED: dict[str, dict[str, Any]] = {
    "shard": {**NO_DROPOUT, "schedule": {"steps": 5}, "memory": {"shard": True}},
    "shard-dora": {
        "adapter": {"rank": 4, "dropout": 0.0, "dora": True}, "batching": {"rows": 1}, "schedule": {"steps": 4},
        "memory": {"shard": True, "activation_checkpointing": "on"},
    },
    "shard-nf4": {
        **NO_DROPOUT, "base": {"quantize": "nf4", "dtype": "float32"}, "schedule": {"steps": 5},
        "memory": {"shard": True},
    },
    "shard-int8": {
        **NO_DROPOUT, "base": {"quantize": "int8", "dtype": "float32"}, "schedule": {"steps": 3},
        "memory": {"shard": True, "activation_checkpointing": "on"},
    },
    "shard-whole": {
        "adapter": {"rank": 2, "dropout": 0.0, "modules_to_save": ["lm_head"]}, "schedule": {"steps": 2},
        "memory": {"shard": True},
    },
}  # fmt: skip


def preferences(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of the preference runs, replicated and sharded.

    KTO's reference point is computed from all rows of a step.
    """
    common = {
        **NO_DROPOUT,
        "data": {"train": str(folder / "pairs.jsonl"), "split": 6},
        "schedule": {"steps": 3},
        "optimizer": {"learning_rate": 1e-3},
    }
    return {
        "dpo": {**common, "preference": {"loss": "dpo", "nll": 0.5}},
        # three micro-batches on two processes: one is computed twice but must be counted once
        "dpo-shard": {
            **common,
            "preference": {"loss": "dpo"},
            "batching": {"rows": 3, "micro_rows": 1},
            "memory": {"shard": True},
        },
        "kto-shard": {**common, "preference": {"loss": "kto"}, "memory": {"shard": True}},
    }


FAILS = "now one of them fails"
"""Printed by each process before the last run."""
PICTURES: dict[str, Any] = {"ema": {"decay": 0.6}, "samples": {"prompts": ["a cat"], "steps": 2}}


def numbers(events: list[Event]) -> dict[str, Any]:
    """Return the values of a run's events that should be equal in equal runs."""
    return {
        "losses": [e.loss for e in events if isinstance(e, Stepped)],
        "norms": [e.gradient_norm for e in events if isinstance(e, Stepped)],
        "tokens": [e.tokens for e in events if isinstance(e, Stepped)],
        "extra": [e.extra for e in events if isinstance(e, Stepped)],
        "validation": [[e.loss, e.rows, e.learned_tokens, e.extra] for e in events if isinstance(e, Evaluated)],
        "notes": [e.text for e in events if isinstance(e, Note)],
    }


def main(folder: Path) -> None:
    gc.freeze()  # each run collects garbage at its end; exclude torch's modules
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address, port, is_master=False, wait_for_workers=False
    )  # the launcher's store, which the last run uses
    dist.init_process_group("gloo", store=dist.PrefixStore("shared", store), rank=rank, world_size=count)  # begins anew
    seen: dict[str, Any] = {}
    held: list[int] = []

    def measured(of: Callable[[Any], int]) -> Callable[[Any], int]:
        def bytes_of(model: Any) -> int:
            held.append(of(model))
            return held[-1]

        return bytes_of

    run.whole_bytes, run.local_bytes = measured(shard.whole_bytes), measured(shard.local_bytes)

    def one(name: str, act: Callable[..., Any], *args: Any, **sections: Any) -> None:
        events: list[Event] = []
        result = act(folder, folder / name, *args, on_event=events.append, **sections)
        seen[name] = {**numbers(events), "digest": result.digest, "heard": len(events)}
        dist.barrier()

    def copy_after_step_6(name: str, origin: str) -> None:
        """Copy the run `origin` in its state after step 6."""
        if rank == 0:
            shutil.copytree(folder / origin, folder / name)
            for path in (folder / name / "checkpoints").iterdir():
                if int(path.name.removeprefix("step-")) > 6:
                    shutil.rmtree(path)
        dist.barrier()

    keep = {"checkpoint": {"every": 3, "keep": 9}}
    one("two", train, **ONE_ROW, **keep)
    for name, origin in (("one-then-two", "one"), ("two-then-two", "two")):
        copy_after_step_6(name, origin)
        one(name, train, resume=True, **ONE_ROW, **keep)
    one("idle", train, batching={"rows": 1}, schedule={"steps": 4})
    for name, sections in SHARDED.items():
        held.clear()
        one(name, train, **sections)
        seen[name]["held"] = list(held)
    for name, sections in preferences(folder).items():
        one(name, train, **sections)
    one("pictures", train_pictures, **PICTURES)
    seen["not-finite"] = run_with_failure(rank, folder, float("nan"))
    dist.barrier()
    dist.distributed_c10d._get_default_store().delete_key("veneer/error")
    dist.barrier()
    seen["stopped"] = run_with_failure(rank, folder, None)
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
    print(FAILS, file=sys.stderr, flush=True)
    failing("kill", ["train", str(folder / "killed.json")])


def failing(how: str, command: Sequence[str]) -> None:
    """Run a `veneer` command; its second process fails in its tenth micro-batch.

    how: "kill" for SIGKILL; any other value raises an exception"""
    real, calls = run.text_loss, 0

    def loss(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == 10:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("out of memory, said the allocator")
        return real(*args)

    run.text_loss = loss
    veneer(list(command))


def run_with_failure(rank: int, folder: Path, factor: float | None) -> dict[str, Any]:
    """Train a run in which only the second process fails: with a non-finite loss, or by a signal.

    factor: multiplies the loss; None sends the signal"""
    real, calls = run.text_loss, 0

    def loss(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 12:
            if factor is None:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                return real(*args) * factor
        return real(*args)

    run.text_loss = loss
    name = "stopped" if factor is None else "not-finite"
    try:
        train(folder, folder / name, **ONE_ROW)
    except (Interrupted, TrainingError) as error:
        seen = {"kind": type(error).__name__, "what": error.what, "where": error.where, "told": error.already_shown}
        return {**seen, "code": error.exit_code}
    finally:
        run.text_loss = real
    return {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
