"""Train one run on a Ray cluster.

    python examples/cluster/ray_train.py CONFIG.yaml [section.key=value]...

Ray starts `--workers` processes, each with one GPU, and creates the process group. veneer detects the group
and distributes each step. Configuration, data, output and VENEER_HOME must be on a shared file system. If a
worker is lost, Ray restarts all workers, and the run resumes from its newest checkpoint.

Requires `pip install 'ray[train]'`.
"""

from __future__ import annotations

import argparse
from typing import Any


def work(job: dict[str, Any]) -> None:
    """Train the run in one worker process."""
    import veneer

    veneer.train_text(job["config"], *job["overrides"], resume=True)


def main() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--cpu", action="store_true", help="without GPUs")
    given = parser.parse_args()
    TorchTrainer(
        work,
        train_loop_config={"config": given.config, "overrides": given.overrides},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
