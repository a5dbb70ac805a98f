"""The `distillation` section: teacher, sampling, and divergence."""

from __future__ import annotations

from typing import ClassVar, Literal

from veneer.train.config.section import Section, setting


class DistillationSection(Section):
    """Trains on a teacher's distribution over the model's own completions.

    `batching.rows` is the number of prompts per step."""

    named: ClassVar[str] = "distillation"
    updates: ClassVar[int] = 1

    teacher: str | None = setting(None, "adapter (library name or folder), or base")
    base: str | None = setting(None, "the teacher's base, loaded in addition to the trained base", "the trained base")
    system: str = setting("", "system message for the teacher only")
    divergence: Literal["reverse", "forward"] = setting(
        "reverse",
        "reverse: KL(student ‖ teacher), mode-seeking; forward: KL(teacher ‖ student), mode-covering",
        "arXiv 2306.08543",
    )
    group: int = setting(1, "completions per prompt", ge=1)
    max_tokens: int = setting(256, "maximum completion tokens; longer completions are truncated and counted", gt=0)
    temperature: float = setting(1.0, "sampling temperature; the compared distributions do not change", gt=0, le=100)
    rows: int = setting(64, "completions sampled at once; does not change the result", gt=0)
    gap: float = setting(
        0.2, "maximum mean sampler-trainer mismatch, in nats", "rounding in bfloat16 alone causes 0.05 or more", gt=0
    )
