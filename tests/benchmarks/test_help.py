"""The help of each benchmark says what it measures."""

from __future__ import annotations

import pytest

from tests.benchmarks.runs import BENCH_HOME, run_benchmark

MEASURES = {
    "image_generation.py": "diffusers + PEFT",
    "image_training.py": "diffusers + PEFT",
    "serving.py": "tokens per second with and without",
    "serving_load.py": "Poisson process",
    "text_training.py": "share of the floor",
}


@pytest.mark.parametrize("name", MEASURES)
def test_help_says_what_the_benchmark_measures(name: str) -> None:
    assert MEASURES[name] in run_benchmark(name, "--help", **BENCH_HOME).stdout
