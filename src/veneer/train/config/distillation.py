"""What `distillation` holds: the teacher, how answers are drawn for it, and the divergence that is learned."""

from __future__ import annotations

from typing import ClassVar, Literal

from veneer.train.config.section import Section, setting


class DistillationSection(Section):
    """Learning a teacher's distribution on the model's own answers; without a `teacher`, nothing is drawn.

    `batching.rows` counts prompts. `veneer data draw` keeps a teacher's answers as rows instead."""

    named: ClassVar[str] = "distillation"
    updates: ClassVar[int] = 1

    teacher: str | None = setting(
        None,
        "who is learned from: an adapter of the library or a folder, base for a base with nothing on it, or with `url` "
        "a model of that server",
    )
    base: str | None = setting(
        None, "another base that the teacher is, in memory beside the trained one", "the base that is trained"
    )
    url: str | None = setting(
        None,
        "server of the teacher, as http://localhost:8000/v1, which gives log-probabilities of prompts",
        "this process",
        pattern=r"^https?://\S+$",
    )
    key: str | None = setting(
        None, "variable of the environment with the server's key", "no key is sent", pattern=r"^[A-Za-z_]\w*$"
    )
    timeout: float = setting(120.0, "seconds that the server may take for one answer", gt=0)
    patience: float = setting(
        600.0, "seconds that the server may be away before the run stops", "a restart is no end of a run", ge=0
    )
    at_once: int = setting(8, "answers that the server reads at once", gt=0, le=256)
    most_failed: float = setting(
        0.1, "share of a step's answers that the server may fail to read; above it the run stops", ge=0, le=1
    )
    top_logprobs: int = setting(
        20,
        "with `url` and forward: likeliest tokens of each place that the server gives; the rest counts as one",
        "what servers allow without being told otherwise",
        gt=0,
    )
    system: str = setting("", "what the teacher is told before each conversation and the student is not")
    divergence: Literal["reverse", "forward"] = setting(
        "reverse",
        "KL(student ‖ teacher), which keeps to what the teacher likes best, or KL(teacher ‖ student), which covers all",
        "arXiv 2306.08543; the answers are the student's own",
    )
    group: int = setting(1, "answers drawn to each prompt", "more prompts say more than more answers", ge=1)
    max_tokens: int = setting(256, "most tokens of an answer; one that is longer is cut there, and counted", gt=0)
    temperature: float = setting(1.0, "of the draw; neither distribution is changed by it", gt=0, le=100)
    rows: int = setting(64, "answers drawn at once; changes memory and speed, never the result", gt=0)
    gap: float = setting(
        0.2,
        "largest mean difference of the sampler's and the trainer's log-probabilities, in nats",
        "bfloat16 rounds to 0.05 and more; student and teacher are compared by the trainer's own values",
        gt=0,
    )
    price: float | None = setting(
        None,
        "US dollars of a million prompt tokens, as `veneer tenant price` has it: what `system` costs is said",
        ge=0,
    )
