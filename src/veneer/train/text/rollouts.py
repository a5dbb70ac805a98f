"""Answers drawn from an adapter while it is trained: what is asked, what comes back, and who draws.

    with make(base, attachment, settings) as sampler:        `make`: handed in, for drawing is serving's and above this
        drawn = sampler.draw([AnswerWanted(prompt, seed, how, "run"), …])
        logps = replayed_logps(base.model, ids, lengths, trained, sampler.replay(ids, lengths, trained, "run"))

What is drawn from are the very pairs that an attachment has now, over the base that it is on: nothing is saved, merged
or synchronised, and of the base nothing is copied that was not asked for. `veneer.serve.engine.live` is the one that
there is.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from veneer.models.text.replay import Replay
from veneer.ops.attention import SharedRows

if TYPE_CHECKING:
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase


@dataclass(frozen=True)
class Drawing:
    """How an answer is drawn. `temperature` 0 is the best token always. `grammar`: what it must match, by its kind,
    `json_schema`, `json_object` or `regex`, and as text. Ranges as `veneer.serve.request.Sampling` has them."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    grammar: tuple[str, str] | None = None


@dataclass(frozen=True)
class AnswerWanted:
    """An answer that is wanted. `prompt`: token ids. `seed`: the answer is a function of it, the prompt, `how` and the
    adapter's values, whoever is drawn beside it. `adapter`: its name on the attachment, "" for the base alone."""

    prompt: tuple[int, ...]
    seed: int
    how: Drawing
    adapter: str = ""


@dataclass(frozen=True)
class Rollout:
    """An answer that was drawn. `tokens`: the one that ended it with them. `logps`: the log-probability of each, in
    nats, in the model's distribution at temperature 1, with nothing changed; `drawn`: in the one it was drawn from.
    `text`: without what ended it. `cut`: whether it ended at `max_tokens`. `cached`: tokens of the prompt whose keys
    and values were there. `others`: parts of `tokens`, from and to, that an environment said and nobody drew: `logps`
    and `drawn` have none of them."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    drawn: tuple[float, ...]
    text: str
    cut: bool
    cached: int = 0
    others: tuple[tuple[int, int], ...] = ()

    @property
    def trained(self) -> list[bool]:
        """Which of `tokens` were drawn."""
        own = [True] * len(self.tokens)
        for first, last in self.others:
            own[first:last] = [False] * (last - first)
        return own

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, which keep every float."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rollout:
        made: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**made | {"others": tuple((int(a), int(b)) for a, b in values.get("others", ()))})


@dataclass(frozen=True)
class SamplerSettings:
    """`rows`: answers drawn at once. `context`: tokens of a prompt and its answer, 0 for the base's own. `pack_bytes`:
    what a second copy of the base's projections may take, in the order in which few rows are multiplied by them
    fastest; 0 for none.

    `exact`: an answer's bits depend on nothing beside it, and a `replay` gives them again."""

    rows: int = 32
    context: int = 0
    pack_bytes: int = 0
    exact: bool = True


class Sampler(Protocol):
    """Draws from the adapters of an attachment, as they are when it is asked."""

    settings: SamplerSettings

    @abstractmethod
    def problems(self, adapter: str) -> list[str]:
        """Why nothing can be drawn from an adapter on the attachment, one line each."""

    @abstractmethod
    def draw(
        self, asked: Sequence[AnswerWanted], interrupted: Callable[[], bool] = lambda: False
    ) -> list[Rollout] | None:
        """The answers, in the order in which they are asked for; None as soon as `interrupted()`. Adapters must not
        change meanwhile. Raises VeneerError for what cannot be drawn: a prompt beyond the context, an unusable
        adapter, a grammar that is none."""

    @abstractmethod
    def replay(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        trained: Tensor,
        adapter: str = "",
        shared: SharedRows | None = None,
    ) -> Replay:
        """The forward that `draw` runs, over rows that are there: arguments as `token_logps` has them. Where it is
        `exact` its values are those with which the rows' tokens were drawn, to the bit."""


MakeSampler = Callable[["TextBase", "Attachment", SamplerSettings], AbstractContextManager[Sampler]]


def drawn_figures(drawn: Sequence[Rollout], seconds: float) -> dict[str, float]:
    """What is logged of a draw: tokens of an answer (mean) and of all, seconds, how many answers were cut, and their
    share; and that of the prompts' tokens whose keys and values were there."""
    tokens, cut, count = sum(len(r.logps) for r in drawn), sum(r.cut for r in drawn), max(1, len(drawn))
    return {
        "answer_tokens": tokens / count,
        "drawn_tokens": float(tokens),
        "drawn_seconds": seconds,
        "cut_answers": float(cut),
        "cut_share": cut / count,
        "prompt_cached": sum(r.cached for r in drawn) / max(1, sum(len(r.prompt) for r in drawn)),
    }


def draw_seed(*key: int | str) -> int:
    """A seed of 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()) >> 1
