"""A teacher on a server: its log-probabilities of the student's tokens.

    with served_teacher(section, base) as teacher:             compares its tokens with the student's
        found = teacher.read([(ids, count), …], interrupted)   log q of the last `count` tokens of each

A request is /v1/completions with token IDs as the prompt (the teacher's prompt and the completion) and
`prompt_logprobs`, as vLLM and veneer serve it. One token is sampled, because servers require one, and ignored.
Retries and failures are those of a judge (`rewards.server`); an answer that the server refuses has the reason
in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, MismatchError, quoted, shown
from veneer.train.config.section import server_settings
from veneer.train.rewards.server import AwaitedServer, Unanswered

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase
    from veneer.train.config.distillation import DistillationSection

_PROBED = 128
"""Number of tokens whose texts are compared."""
_SPACES = str.maketrans("\u2581\u0120\u010a", "   ")
_NEVER = -9000.0
"""Lower bound of log-probabilities: servers write −9999 for probability 0."""


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher on a server."""

    server: AwaitedServer
    model: str

    @property
    def name(self) -> str:
        return f"{self.model} at {self.server.url}"

    def read(
        self, answers: Sequence[tuple[Sequence[int], int]], interrupted: Callable[[], bool] = lambda: False
    ) -> list[tuple[float, ...] | str] | None:
        """Return log q of the last `count` of `ids`, for each item.

        An item without a result has the reason instead. Returns None as soon as `interrupted()`. Raises
        UnavailableError if the server stays unavailable, ConfigError if it refuses all questions."""
        return self.server.each(self._read, answers, interrupted)

    def _read(self, answer: tuple[Sequence[int], int]) -> tuple[float, ...] | str:
        ids, count = answer
        try:
            logps = [logp for logp, _ in self.prompt_logps(ids)[-count:]]
        except Unanswered as error:
            return str(error)
        for logp in logps:
            if logp <= _NEVER:
                return "the teacher gives a token of the answer no probability at all"
            if not math.isfinite(logp) or logp > 1e-3:
                return f"the teacher gives a token of the answer {logp}, not a log-probability"
        return tuple(min(0.0, logp) for logp in logps)

    def prompt_logps(self, ids: Sequence[int]) -> list[tuple[float, str | None]]:
        """Return (log q, the token's text or None) of all tokens but the first. Raises Unanswered."""
        body: dict[str, Any] = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0}
        answer = self.server.response("/completions", body | {"prompt_logprobs": 0})
        body_read = self.server.read(answer, "completion")
        try:
            positions = [
                {int(id): entries for id, entries in at.items()}
                for at in body_read["choices"][0]["prompt_logprobs"][1:]
            ]
            missing = [id for id, at in zip(ids[1:], positions, strict=True) if id not in at]
            if missing:
                raise Unanswered(f"the teacher gives the token {missing[0]} no log-probability")
            entries = [at[id] for id, at in zip(ids[1:], positions, strict=True)]
            return [(float(each["logprob"]), each.get("decoded_token")) for each in entries]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise self.server.unread(answer, "completion with log-probabilities of its prompt") from None


@contextmanager
def served_teacher(section: DistillationSection, base: TextBase) -> Iterator[ServedTeacher]:
    """Connect to the teacher of `section.url` and check it with one request.

    Raises MismatchError if its tokens differ from the student's, ConfigError if it gives no prompt
    log-probabilities or refuses requests, UnavailableError if it is unavailable."""
    assert section.url is not None
    with AwaitedServer(section.url, "teacher", "distillation.patience", **server_settings(section)) as server:
        teacher = ServedTeacher(server, str(section.teacher))
        _check_tokenizer(teacher, base)
        yield teacher


def _check_tokenizer(teacher: ServedTeacher, base: TextBase) -> None:
    """Compare the texts of tokens from the student's entire vocabulary.

    Raises MismatchError if they differ, ConfigError if the server gives no log-probabilities or texts."""
    special, tokenizer = set(base.tokenizer.all_special_ids), base.tokenizer
    plain = [id for id in range(len(tokenizer)) if id not in special]
    count = min(_PROBED, base.context // 2, len(plain))
    ids = [plain[i * len(plain) // count] for i in range(count)]
    try:
        texts = {id: text for id, (_, text) in zip(ids[1:], teacher.prompt_logps(ids), strict=True)}
    except Unanswered as error:
        raise ConfigError(
            f"the teacher {quoted(teacher.model)} gives no log-probabilities of the student's tokens: {error}",
            where=teacher.server.url,
            fix="serve the teacher with vLLM or veneer, by a base with the student's tokenizer; any server's answers "
            "are rows for training on examples",
        ) from None
    comparable = {id: text for id, text in texts.items() if text and not text.startswith(("token_id:", "bytes:"))}
    if not comparable:
        raise ConfigError(
            "the teacher's server returns no texts of tokens to compare its tokenizer by",
            where=teacher.server.url,
            fix="return token texts (vLLM: without --return-tokens-as-token-ids)",
        )
    ours = {id: str(tokenizer.decode([id])) for id in comparable}
    apart = [id for id, text in comparable.items() if not _alike(ours[id], text)]
    if apart:
        their_text, our_text = (quoted(shown(each[apart[0]])) for each in (comparable, ours))
        raise MismatchError(
            f"the teacher has another tokenizer: {len(apart):,} of {len(comparable):,} tokens that were compared "
            f"differ, as {apart[0]}: {their_text} there, {our_text} here",
            where=f"distillation.teacher: {teacher.name}; student: {base.name}",
            fix="take a teacher of the student's family; any teacher's answers are rows for training on examples",
        )


def _alike(ours: str, theirs: str) -> bool:
    """Return whether two texts can be the same token.

    Servers write a space as it is, as ▁ or Ġ, or omit it, and differ for parts of a character."""
    if "\ufffd" in ours or "\ufffd" in theirs:
        return True
    a, b = (text.translate(_SPACES).strip() for text in (ours, theirs))
    return a == b
