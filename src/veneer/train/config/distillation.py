"""The section `distillation`: teacher, sampling, and divergence."""

from __future__ import annotations

from typing import ClassVar, Literal

from veneer.train.config.section import Section, setting


class DistillationSection(Section):
    """Training on a teacher's distribution over the model's own completions.

    `batching.rows` counts prompts."""

    named: ClassVar[str] = "distillation"
    updates: ClassVar[int] = 1

    teacher: str | None = setting(None, "adapter (library name or folder), base, or with `url` a served model")
    base: str | None = setting(None, "the teacher's base, also in memory", "the trained base")
    url: str | None = setting(
        None,
        "teacher's server, as http://localhost:8000/v1, with prompt logprobs",
        "this process",
        pattern=r"^https?://\S+$",
    )
    key: str | None = setting(None, "environment variable with the server's key", "none", pattern=r"^[A-Za-z_]\w*$")
    timeout: float = setting(120.0, "seconds per request", gt=0)
    patience: float = setting(600.0, "seconds of outage before the run stops", "survives a restart", ge=0)
    at_once: int = setting(8, "concurrent requests", gt=0, le=256)
    most_failed: float = setting(
        0.1, "maximum share of a step's completions that the server fails to score", ge=0, le=1
    )
    system: str = setting("", "system message for the teacher only")
    divergence: Literal["reverse", "forward"] = setting(
        "reverse", "KL(student ‖ teacher), mode-seeking, or KL(teacher ‖ student), covering", "arXiv 2306.08543"
    )
    group: int = setting(1, "completions per prompt", ge=1)
    max_tokens: int = setting(256, "maximum completion tokens; longer ones are cut and counted", gt=0)
    temperature: float = setting(1.0, "sampling temperature; distributions stay", gt=0, le=100)
    rows: int = setting(64, "completions sampled at once; does not change the result", gt=0)
    gap: float = setting(
        0.2, "maximum mean sampler-trainer mismatch, in nats", "bfloat16 rounds to 0.05 and more", gt=0
    )
