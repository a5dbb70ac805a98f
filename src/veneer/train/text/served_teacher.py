"""A teacher on a server: its log-probabilities of the student's tokens.

    with served_teacher(section, base) as teacher:                   compares its tokens with the student's
        found = teacher.read([(ids, count), …], interrupted)         for the last `count` tokens of each

A request is /v1/completions with token IDs as the prompt: the teacher's prompt and the completion. One token
is sampled, because most servers require one, and ignored. There are two forms; the first that the server
answers is used:

    prompt_logprobs: k      vLLM and veneer: choices[0].prompt_logprobs[i] = {id: {logprob, decoded_token}, …}
    echo, logprobs: 1       OpenAI's older form: choices[0].logprobs = {tokens, token_logprobs}, prompt first

The second form names the likeliest tokens by text, which can be ambiguous, so it serves only the sampled
tokens. Retries and failures are those of a judge (`rewards.server`); an answer that the server refuses has
the reason in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, MismatchError, quoted, shown
from veneer.train.config.section import how_asked
from veneer.train.rewards.server import AwaitedServer, Unanswered

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase
    from veneer.train.config.distillation import DistillationSection

_PROBED = 128
"""Number of tokens whose texts are compared."""
_SPACES = str.maketrans("\u2581\u0120\u010a", "   ")
_CERTAIN = 1.05
"""Maximum sum of one position's rounded probabilities."""
_NEVER = -9000.0
"""Lower bound of log-probabilities: servers write −9999 for probability 0."""


@dataclass(frozen=True)
class TeacherLogps:
    """The teacher's log-probabilities for a completion.

    `logps`: log q of each token. `likeliest`: the named tokens of each position with their log q, including
    the sampled token; empty if not requested."""

    logps: tuple[float, ...]
    likeliest: tuple[Mapping[int, float], ...] = ()


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher on a server.

    `named`: number of likeliest tokens requested per position; 0 for none. `by_id`: whether the server has
    vLLM's form. `context`: maximum tokens of a prompt."""

    server: AwaitedServer
    model: str
    named: int
    by_id: bool
    context: int

    @property
    def name(self) -> str:
        return f"{self.model} at {self.server.url}"

    def read(
        self, answers: Sequence[tuple[Sequence[int], int]], interrupted: Callable[[], bool] = lambda: False
    ) -> list[TeacherLogps | str] | None:
        """Return the log-probabilities of the last `count` of `ids`, for each item.

        An item without a result has the reason instead. Returns None as soon as `interrupted()`. Raises
        UnavailableError if the server stays unavailable, ConfigError if it refuses all questions."""
        return self.server.each(self._read, answers, interrupted)

    def _read(self, answer: tuple[Sequence[int], int]) -> TeacherLogps | str:
        ids, count = answer
        try:
            places = _places(self.server, self.model, ids, self.named, by_id=self.by_id)
            told = [_checked(place, token) for place, token in zip(places[-count:], ids[-count:], strict=True)]
        except Unanswered as error:
            return str(error)
        likeliest = tuple({id: logp for id, (logp, _) in place.items()} for place in told) if self.named else ()
        return TeacherLogps(tuple(place[token][0] for place, token in zip(told, ids[-count:], strict=True)), likeliest)


_Place = Mapping[int, tuple[float, str | None]]
"""The tokens at a position of a prompt: ID -> (log q, the token's text or None)."""


@contextmanager
def served_teacher(section: DistillationSection, base: TextBase) -> Iterator[ServedTeacher]:
    """Connect to the teacher of `section.url` and check it with one request.

    Raises MismatchError if its tokens differ from the student's, ConfigError if it gives no prompt
    log-probabilities or refuses requests, UnavailableError if it is unavailable."""
    assert section.url is not None
    model, named = str(section.teacher), section.top_logprobs if section.divergence == "forward" else 0
    with AwaitedServer(section.url, "teacher", "distillation.patience", **how_asked(section)) as server:
        by_id = _compared(server, model, named, base)
        context = _context(server, model) or base.context
        yield ServedTeacher(server, model, named, by_id, min(base.context, context - 1))  # one token is sampled


def _compared(server: AwaitedServer, model: str, named: int, base: TextBase) -> bool:
    """Return whether the server has vLLM's form.

    The request has tokens from the student's entire vocabulary, whose texts are compared."""
    special, tokenizer = set(base.tokenizer.all_special_ids), base.tokenizer
    plain = [id for id in range(len(tokenizer)) if id not in special]
    count = min(_PROBED, base.context // 2, len(plain))
    ids = [plain[i * len(plain) // count] for i in range(count)]
    refused: list[str] = []
    for by_id in (True, False):
        try:
            places = _places(server, model, ids, named, by_id=by_id)
            told = {id: _naming(id, place)[id][1] for place, id in zip(places[1:], ids[1:], strict=True)}
        except Unanswered as error:
            refused.append(f"{'prompt_logprobs' if by_id else 'echo with logprobs'}: {error}")
            continue
        _check_texts(server, model, base, told)
        if named and not by_id:
            raise ConfigError(
                "the teacher's server names no likeliest tokens by their ids, which forward KL compares",
                where=f"{server.url}: {refused[0]}",
                fix="learn distillation.divergence=reverse, or serve the teacher with vLLM or veneer",
            )
        return by_id
    told_why = "\n".join(f"  - {line}" for line in refused)
    raise ConfigError(
        f"the teacher {quoted(model)} gives no log-probabilities of the student's tokens:\n{told_why}",
        where=server.url,
        fix="serve the teacher with vLLM or veneer, by a base with the student's tokenizer; any server's answers are "
        "rows for training on examples",
    )


def _check_texts(server: AwaitedServer, model: str, base: TextBase, told: Mapping[int, str | None]) -> None:
    """Check that token IDs have the same texts on the server.

    Raises MismatchError if they differ, ConfigError if the server sends no texts."""
    known = {id: text for id, text in told.items() if text and not text.startswith(("token_id:", "bytes:"))}
    if not known:
        raise ConfigError(
            "the teacher's server does not tell the texts of tokens, by which its tokenizer would be compared",
            where=server.url,
            fix="serve it so that it does (vLLM: without --return-tokens-as-token-ids)",
        )
    ours = {id: str(base.tokenizer.decode([id])) for id in known}
    apart = [id for id, text in known.items() if not _alike(ours[id], text)]
    if apart:
        theirs, here = (quoted(shown(texts[apart[0]])) for texts in (known, ours))
        raise MismatchError(
            f"the teacher has another tokenizer: {len(apart):,} of {len(known):,} tokens that were compared "
            f"differ, as {apart[0]}: {theirs} to it, {here} here",
            where=f"distillation.teacher: {model} at {server.url}, beside {base.name}",
            fix="take a teacher of the student's family; any teacher's answers are rows for training on examples",
        )


def _alike(ours: str, theirs: str) -> bool:
    """Return whether two texts can be the same token.

    Servers write a space as it is, as ▁ or Ġ, or omit it, and differ for parts of a character."""
    if "\ufffd" in ours or "\ufffd" in theirs:
        return True
    a, b = (text.translate(_SPACES).strip() for text in (ours, theirs))
    return a == b


def _context(server: AwaitedServer, model: str) -> int | None:
    """Return the context length of the server's model; None if it is unknown."""
    try:
        cards = server.read(server.response("/models"), "list of models")["data"]
        lengths = [card["max_model_len"] for card in cards if card.get("id") == model]
    except (Unanswered, ConfigError, LookupError, TypeError, AttributeError):
        return None
    return lengths[0] if lengths and isinstance(lengths[0], int) else None


def _places(server: AwaitedServer, model: str, ids: Sequence[int], named: int, *, by_id: bool) -> list[_Place | None]:
    """Return the server's tokens at each position of `ids`.

    None where the server gives none, as for the first token. Raises Unanswered."""
    body: dict[str, Any] = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0}
    body |= {"prompt_logprobs": named} if by_id else {"echo": True, "logprobs": 1}
    answer = server.response("/completions", body)
    read = server.read(answer, "completion")
    try:
        choice = read["choices"][0]
        if by_id:
            places = [None if place is None else _by_id(place) for place in choice["prompt_logprobs"]]
        else:
            texts, logps = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
            places = [
                None if logp is None else {id: (float(logp), text)}
                for id, text, logp in zip(ids, texts, logps, strict=False)
            ]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise server.unread(answer, "completion with log-probabilities of its prompt") from None
    if len(places) != len(ids):
        raise Unanswered(f"the teacher tells of {len(places):,} tokens, and was asked about {len(ids):,}")
    return places


def _by_id(place: Mapping[str, Any]) -> _Place:
    return {int(id): (float(told["logprob"]), told.get("decoded_token")) for id, told in place.items()}


def _naming(token: int, place: _Place | None) -> _Place:
    """Return the position's tokens. Raises Unanswered if they lack `token`."""
    if place is None or token not in place:
        raise Unanswered(f"the teacher gives the token {token} no log-probability")
    return place


def _checked(place: _Place | None, token: int) -> _Place:
    """Return a sampled token's position with valid log-probabilities.

    Raises Unanswered if the token's log q is not a valid number."""
    named = _naming(token, place)
    value = named[token][0]
    if value <= _NEVER:
        raise Unanswered("the teacher gives a token of the answer no probability at all")
    if not math.isfinite(value) or value > 1e-3:
        raise Unanswered(f"the teacher gives a token of the answer {value}, which is no log-probability")
    likely = {id: (min(0.0, logp), text) for id, (logp, text) in named.items() if _NEVER < logp <= 1e-3}
    total = math.fsum(math.exp(logp) for logp, _ in likely.values())
    if total > _CERTAIN:
        raise Unanswered(f"the teacher gives a place probabilities that add up to {total:.3g}")
    return likely
