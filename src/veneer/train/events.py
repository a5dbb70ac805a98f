"""Events of a run: frozen records, emitted in order.

The loop calls `on_event(event)`. The progress bar, the JSONL log, TensorBoard and the HTML report are
listeners. This module does not use models, data or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TOKEN_ACCURACY = "token_accuracy"
"""Key in `extra`: share of trained tokens that have the highest probability at their position."""


@dataclass(frozen=True)
class Event:
    """An event of a run. `to_record` returns its JSON form."""


@dataclass(frozen=True)
class Note(Event):
    """A sentence for the user: a decision, a warning, or a number."""

    text: str


@dataclass(frozen=True)
class Resolved(Event):
    """The settings of the run: key -> value, and key -> origin."""

    settings: dict[str, Any]
    sources: dict[str, str]


@dataclass(frozen=True)
class Checked(Event):
    """The preflight has checked the run.

    text: the findings as text for the user. data: the findings as JSON values."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Probed(Event):
    """The longest batch was run forward and backward before step one, without an optimizer step."""

    tokens: int
    rows: tuple[int | str, ...]
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Stepped(Event):
    """An optimizer step was taken.

    loss: nats per trained token or, for a preference loss, the mean over pairs
    tokens: tokens of this step; learned_tokens: tokens with a loss
    seconds: duration of this step
    gradient_norm: global norm before clipping
    memory_bytes: peak memory since the start, on the first device
    extra: other metrics of the loss, such as preference rewards"""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    learned_tokens: int
    seconds: float
    memory_bytes: int
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Evaluated(Event):
    """The held-out rows were scored after `step`.

    loss: nats per trained token, mean squared error (images), or mean over pairs (preferences)
    perplexity: None for images and preferences
    best: whether the loss is the lowest so far, including the loss before step one
    worse: whether the loss is higher than before step one
    extra: as in Stepped"""

    step: int
    loss: float
    perplexity: float | None
    rows: int
    learned_tokens: int
    seconds: float
    best: bool
    worse: bool = False
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled(Event):
    """A sheet of sample images was generated after `step`. `path`: its file."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint of the state after `step` was written."""

    step: int
    path: str


@dataclass(frozen=True)
class Stopped(Event):
    """The loop ended after `step`.

    reason: "finished", "early stopping" or "interrupted"."""

    step: int
    reason: str


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore an event."""


def to_record(event: Event) -> dict[str, Any]:
    """Return a JSON object: `event`, the lower-case class name, and the fields."""
    record = {"event": type(event).__name__.lower(), **asdict(event)}  # type: ignore[call-overload]
    if isinstance(event, Stepped):
        record["tokens_per_second"] = round(event.tokens_per_second, 2)
    return record


def loss_text(loss: float) -> str:
    """Format a loss with four decimals, and zero without a sign."""
    return f"{round(loss, 4) + 0.0:.4f}"


def mean_rewards(metrics: Mapping[str, float]) -> dict[str, float] | None:
    """Return the mean rewards of a step or an evaluation: `reward`, the sum, then each part.

    Returns {} if no completion could be scored, and None if the run does not reward sampled completions. If
    there is only one reward, it is not repeated as a part."""
    if "reward_failed" not in metrics:
        return None
    parts = {
        name.removeprefix("reward_"): value
        for name, value in metrics.items()
        if name.startswith("reward_") and name != "reward_failed"
    }
    total = {"reward": metrics["reward"]} if "reward" in metrics else {}
    return total if list(parts.values()) == list(total.values()) else total | parts


def measure_text(loss: float, metrics: Mapping[str, float]) -> str:
    """Return a result as text: the loss, or the mean reward with its parts."""
    rewards = mean_rewards(metrics)
    if rewards is None:
        return f"loss {loss_text(loss)}"
    total, parts = rewards.pop("reward", None), parts_text(rewards)
    return "no reward" if total is None else f"reward {total:.3f}{f' ({parts})' if parts else ''}"


def parts_text(rewards: Mapping[str, float]) -> str:
    """Format all rewards except their sum, as `exact_match 0.500, length 0.731`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in rewards.items() if name != "reward")


def validation_text(loss: float, rewarded: bool) -> str:
    """Format a validation loss or, if `rewarded`, the mean reward, which is minus the loss."""
    return f"validation reward {0.0 - loss:.3f}" if rewarded else f"validation loss {loss_text(loss)}"


def fan_out(*listeners: Listener | None) -> Listener:
    """Return a listener that calls the given listeners in order. None is skipped."""
    present = [listener for listener in listeners if listener is not None]

    def emit(event: Event) -> None:
        for listener in present:
            listener(event)

    return emit
