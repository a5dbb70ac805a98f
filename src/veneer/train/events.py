"""Events of a run: frozen records, emitted in order.

The loop calls `on_event(event)`; the progress bar, the JSONL log, TensorBoard and the HTML report are
listeners. Uses no models, data or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TOKEN_ACCURACY = "token_accuracy"
"""Key in `extra`: share of trained tokens with their position's top probability."""


@dataclass(frozen=True)
class Event:
    """An event of a run. `to_record` returns the JSON form."""


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
    """The preflight's findings.

    `text`: for the user. `data`: as JSON values."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Probed(Event):
    """The longest batch ran forward and backward once, before step one.

    Without an optimizer step."""

    tokens: int
    rows: tuple[int | str, ...]
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Stepped(Event):
    """One optimizer step is done.

    `loss`: nats per learned token; a preference loss is a mean over pairs. `tokens`: tokens of this step;
    `learned_tokens`: those with a loss. `seconds`: of this step only. `gradient_norm`: global, before
    clipping. `memory_bytes`: the peak so far, on the first device. `extra`: other measurements of the loss,
    such as preference rewards."""

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
    """The validation rows were scored after `step`.

    `loss`: nats per trained token, or pictures' mean squared error or the mean over pairs, which have no
    perplexity. `best`: the lowest so far, including the one before step one; `worse`: above the one before
    step one. `extra`: as in Stepped."""

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
    """A sheet of sample pictures was drawn after `step`; `path`: its file."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint of the state after `step` is on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Stopped(Event):
    """The loop ended after `step`.

    `reason`: "finished", "early stopping" or "interrupted"."""

    step: int
    reason: str


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Do nothing with an event."""


def to_record(event: Event) -> dict[str, Any]:
    """Return a JSON object: `event` is the lower-case class name, then the fields."""
    record = {"event": type(event).__name__.lower(), **asdict(event)}  # type: ignore[call-overload]
    if isinstance(event, Stepped):
        record["tokens_per_second"] = round(event.tokens_per_second, 2)
    return record


def loss_text(loss: float) -> str:
    """Format a loss with four decimals, and zero without a sign."""
    return f"{round(loss, 4) + 0.0:.4f}"


def mean_rewards(metrics: Mapping[str, float]) -> dict[str, float] | None:
    """Return the mean rewards of a step or an evaluation: `reward`, then each part.

    {} if no answer could be scored; None for steps and evaluations without rewards of sampled answers. A
    single reward that equals the sum is not repeated."""
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
    """Return a result as text: the loss, or the mean reward with parts."""
    rewards = mean_rewards(metrics)
    if rewards is None:
        return f"loss {loss_text(loss)}"
    total, parts = rewards.pop("reward", None), parts_text(rewards)
    return "no reward" if total is None else f"reward {total:.3f}{f' ({parts})' if parts else ''}"


def parts_text(rewards: Mapping[str, float]) -> str:
    """Format all rewards except their sum, as `exact_match 0.500, length 0.731`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in rewards.items() if name != "reward")


def validation_text(loss: float, rewarded: bool) -> str:
    """Format a validation loss, or with `rewarded` the mean reward (minus the loss)."""
    return f"validation reward {0.0 - loss:.3f}" if rewarded else f"validation loss {loss_text(loss)}"


def fan_out(*listeners: Listener | None) -> Listener:
    """Return a listener that calls all the others, in order; None is left out."""
    present = [listener for listener in listeners if listener is not None]

    def emit(event: Event) -> None:
        for listener in present:
            listener(event)

    return emit
