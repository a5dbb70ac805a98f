"""Save the output of a text run: the result, the adapter in PEFT's format with its card, and the report."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment
from veneer.formats import peft
from veneer.formats.card import generate_command, opening, read_card, sample_messages
from veneer.formats.folder import TENSOR_FILE
from veneer.models.text.generate import complete
from veneer.train.report.log import duration
from veneer.train.report.page import Page
from veneer.train.save import Outcome, base_facts
from veneer.train.text.rows import Row

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase


_PROMPT = 1000
"""Maximum characters of `prompt`, the last user message, in a card."""
_LONGEST = 50_000
"""Maximum characters of all messages of a prompt in a card."""


@dataclass
class RunResult(Outcome):
    """The result of a text run.

    loss, validation: nats per trained token; for preferences, the mean over pairs
    tokens_per_second: measured during training only
    measured: rewards and other metrics (train.text.preference) of the saved adapter on the held-out split
    measured_before: the same metrics before the first step"""

    tokens: int = 0
    learned_tokens: int = 0
    tokens_per_second: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)
    measured_before: dict[str, float] = field(default_factory=dict)


def text_metrics(result: RunResult) -> dict[str, Any]:
    """Return the metrics for the adapter's card."""
    speed, measured = round(result.tokens_per_second, 1), result.measured or None
    counts = {"tokens": result.tokens, "learned_tokens": result.learned_tokens}
    return result.metrics(**counts, measured=measured, tokens_per_second=speed)


def write_adapter(adapter: Adapter, folder: Path, base: TextBase) -> str:
    """Write the adapter in PEFT's format with its card, and return the digest of the written adapter."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    adapter = replace(adapter, card=replace(adapter.card, created=created))
    return peft.write_folder(adapter, folder, base_name=base.name, base=base.model).digest


def sample_prompt(rows: Iterable[Row]) -> dict[str, Any]:
    """Return the prompt of the first row that is a text conversation, or {}.

    The keys are `messages`, all messages before the row's answer, and `prompt`, the beginning of the last of
    these messages."""
    for row in rows:
        turns = [{"role": m.get("role"), "content": m.get("content")} for m in row.messages]
        prompt = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        if row.tools or not prompt or not all(isinstance(text, str) for turn in prompt for text in turn.values()):
            continue
        if sum(len(str(turn["content"])) for turn in prompt) <= _LONGEST:
            return {"prompt": str(prompt[-1]["content"])[:_PROMPT], "messages": prompt}
    return {}


def sample_answers(
    base: TextBase, attachment: Attachment, name: str, messages: Sequence[Mapping[str, str]], tokens: int
) -> dict[str, str]:
    """Return greedy completions of `messages`, each of at most `tokens` tokens.

    The keys are `base` (without adapter) and `adapter` (with the adapter `name`). Raises BaseError,
    DataError."""
    answers = {}
    for name_of_mix, mix in (("base", ()), ("adapter", (name,))):
        with attachment.using(*mix):
            answers[name_of_mix] = complete(base, [messages], max_new_tokens=tokens)[0].text
    return answers


def text_report(result: RunResult, folder: Path, base: TextBase, seconds: float, loss: str) -> Page:
    """Return the text-specific parts of the report.

    `seconds`: duration of all steps. `loss`: description of the loss, for its heading."""
    predicted = result.preflight.get("numbers", {}).get("predicted_seconds")
    detail = f"{result.tokens:,} tokens in {duration(seconds)}"
    detail += "" if predicted is None else f" · {duration(predicted)} predicted"
    share = f"{result.learned_tokens / max(1, result.tokens):.0%} of all"
    return Page(
        base=base.name,
        weights=folder / TENSOR_FILE,
        details=base_facts(base),
        usage=_usage(folder, base),
        cards=[
            ("Steps", f"{result.steps:,}", result.stopped),
            ("Speed", f"{result.tokens_per_second:,.0f} tokens/s", detail),
            ("Learned tokens", f"{result.learned_tokens:,}", share),
        ],
        loss=f"Loss, {loss}",
    )


def _usage(folder: Path, base: TextBase) -> list[tuple[str, str]]:
    messages = sample_messages(read_card(folder).card.extra)
    system, text = opening(messages)
    system_argument = f", system={system!r}" if system else ""
    words = shlex.join(["veneer", "eval", "--base", base.name, "--adapter", str(folder), "--data", "held_out.jsonl"])
    return [
        ("On the command line", f"{generate_command(base.name, str(folder), messages)}\n{words}"),
        (
            "In Python",
            f'import veneer\n\nbase = veneer.load_base("{base.name}")\n'
            f'print(veneer.generate(base, [{text or "…"!r}], adapters=["{folder}"]{system_argument})[0])',
        ),
        (
            "With PEFT",
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base.directory}")\n'
            f'model = PeftModel.from_pretrained(base, "{folder}")',
        ),
    ]
