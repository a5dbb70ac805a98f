"""Tokenize rows with a loss mask, and count everything that was left out.

    encoded = encode_rows(rows, tokenizer, config.data)
    encoded.examples[0].input_ids, .trained        same length; trained[i]: token i is a target

Each text is tokenized as a whole, and the loss mask is derived from character positions, so the tokens equal
the tokens at inference. Tokens after the last target are dropped, because nothing is predicted from them.
This module does not depend on models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from veneer.errors import BaseError, DataError, bullets
from veneer.train.config.text import DataSection
from veneer.train.text.render import Rendered, Renderer
from veneer.train.text.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # rows tokenized per call, which limits the tokenizer's memory


@dataclass
class Example:
    """The tokens of one row.

    trained[i]: whether token i is a target, predicted from the tokens before it in the same row; trained[0]
    is False. The two lists have the same length. row: index in the rows given to `encode_rows`."""

    input_ids: list[int]
    trained: list[bool]
    row: int

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Return the number of targets."""
        return sum(self.trained)

    @property
    def prompt(self) -> list[int]:
        """Return the tokens before the first target."""
        return self.input_ids[: self.trained.index(True)]


@dataclass
class Counts:
    """Counts of what happened to the rows during encoding.

    first_rows: name of a count -> the first five rows that it counts
    cut_ends: truncated rows that lost their end, including the end-of-turn token
    changed_turns: turns that render differently when later turns follow
    control: rows that contain the base's control tokens as text
    longest: tokens of the longest row before truncation

    For preferences, each completion counts as a row:
    partners: completions dropped because the other completion of the pair was dropped
    other_prompts: pairs in which the prompt is tokenized differently for the two completions"""

    rows: int = 0
    used: int = 0
    untrained: int = 0
    long_dropped: int = 0
    cut: int = 0
    cut_ends: int = 0
    changed_turns: int = 0
    control: int = 0
    doubled_bos: int = 0
    partners: int = 0
    other_prompts: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    first_rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, where: str, n: int = 1) -> None:
        setattr(self, name, getattr(self, name) + n)
        self.first_rows.setdefault(name, [])
        if len(self.first_rows[name]) < 5:
            self.first_rows[name].append(where)


@dataclass
class EncodedRows:
    """The result of `encode_rows`.

    end_ids: token ids that end a completion (end-of-turn, or end-of-text for plain rows)
    cut_rows: indices of truncated rows
    chat: whether a chat template rendered any of the rows
    left: index of each dropped row -> reason"""

    examples: list[Example]
    counts: Counts
    renderer: Renderer
    end_ids: set[int]
    chat: bool
    cut_rows: set[int]
    left: dict[int, str] = field(default_factory=dict)


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: DataSection, *, refuse: bool = True
) -> EncodedRows:
    """Tokenize rows according to `data`.

    Uses chat_template, train_on, max_length and long_rows of `data`. With refuse=False, rows that would
    otherwise raise an error are dropped.

    Raises DataError, with a list of rows, for rows that cannot be rendered unambiguously, and for rows that
    are too long if long_rows is "refuse". Raises BaseError for conversations if the base has no chat
    template.
    """
    renderer = Renderer(tokenizer, data.chat_template)
    counts = Counts(rows=len(rows))
    rendered: dict[int, Rendered] = {}
    left: dict[int, str] = {}
    for i, row in enumerate(rows):
        try:
            rendered[i] = renderer.render(row, data.train_on)
        except ValueError as error:
            left[i] = str(error)
    if refuse:
        bad = [f"{rows[i].where}: {why}" for i, why in left.items()]
        refuse_rows(
            bad, len(rows), "cannot be encoded", "correct these rows, or set data.train_on or data.chat_template"
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    examples: list[Example] = []
    long: list[str] = []
    cut_rows: set[int] = set()
    for (i, r), encoding in zip(rendered.items(), _encode_texts(tokenizer, list(rendered.values())), strict=True):
        row, (ids, trained) = rows[i], _tokens(encoding, r, eos)
        if r.changed_turns:
            counts.add("changed_turns", row.where, r.changed_turns)
        if any(renderer.has_control(str(m["content"])) for m in row.messages) or renderer.has_control(row.text):
            counts.add("control", row.where)
        if bos is not None and ids[:2] == [bos, bos]:
            counts.add("doubled_bos", row.where)
        if True not in trained:
            counts.add("untrained", row.where)
            left[i] = "no token to train on"
            continue
        ids, trained = _without_tail(ids, trained)
        counts.longest = max(counts.longest, len(ids))
        if len(ids) > data.max_length and data.long_rows != "cut":
            long.append(f"{row.where}: {len(ids)} tokens")
            left[i] = f"{len(ids):,} tokens, more than data.max_length, {data.max_length:,}"
            counts.add("long_dropped", row.where)
            continue
        if len(ids) > data.max_length:
            counts.add("cut", row.where)
            cut_rows.add(i)
            ids, trained, lost = _cut(ids, trained, data.max_length, bos)
            if lost:
                counts.add("cut_ends", row.where)
        examples.append(Example(ids, trained, i))
        counts.tokens += len(ids)
        counts.trained_tokens += sum(trained)
    if data.long_rows == "refuse" and refuse:
        fix = f"set data.max_length={counts.longest} (more memory), or data.long_rows=drop or cut"
        refuse_rows(long, len(rows), f"are longer than data.max_length, {data.max_length} tokens", fix)
    counts.used = len(examples)
    texts = list(rendered.values())
    chat = any(r.chat for r in texts)
    return EncodedRows(examples, counts, renderer, _end_ids(renderer, texts, eos), chat, cut_rows, left)


def _encode_texts(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> Iterator[Any]:
    """Yield the encoding of each text.

    The tokenizer adds special tokens to plain text only, because a chat template writes BOS and EOS
    itself."""
    for chat, some in itertools.groupby(rendered, lambda r: r.chat):
        texts = [r.text for r in some]
        for at in range(0, len(texts), _CHUNK):
            batch = tokenizer(texts[at : at + _CHUNK], add_special_tokens=not chat, verbose=False)
            if batch.encodings is None:
                text = "the base's tokenizer does not report which characters a token covers"
                raise BaseError(text, fix="give the base a fast tokenizer (tokenizer.json)")
            yield from batch.encodings


def _tokens(encoding: Any, r: Rendered, eos: int | None) -> tuple[list[int], list[bool]]:
    """Return (ids, trained) of a text. If `r.append_eos`, append the end-of-text token."""
    ids = list(encoding.ids)
    trained = [False] * len(ids)
    for start, end in r.trained_spans:
        first, last = _span(encoding, start, end)
        trained[first:last] = [True] * (last - first)
    if r.append_eos and eos is not None:
        if ids and ids[-1] == eos:
            trained[-1] = True
        else:
            ids.append(eos)
            trained.append(True)
    if trained:
        trained[0] = False
    return ids, trained


def _span(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """Return the range of tokens that cover a trained range of characters.

    The range includes a token that straddles `start`, because the token contains the first letters of the
    completion."""
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None:
        return 0, 0
    # Some tokenizers trim spaces from offsets: a token of only spaces over [a, b) has the offsets (b, b).
    while first > 0 and (o := encoding.token_to_chars(first - 1)) is not None and o[0] == o[1] and o[0] > start:
        first -= 1
    last = next(t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None) + 1
    # Several tokens of one multi-byte character can have the same offsets; char_to_token returns the first.
    while last < len(encoding.ids) and (o := encoding.token_to_chars(last)) is not None and start < o[1] <= end:
        last += 1
    return first, last


def _without_tail(ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
    end = len(trained)
    while end and not trained[end - 1]:
        end -= 1
    return ids[:end], trained[:end]


def _cut(ids: list[int], trained: list[bool], limit: int, bos: int | None) -> tuple[list[int], list[bool], bool]:
    """Truncate a row to at most `limit` tokens. Return (ids, trained, whether the end was cut).

    Drops the oldest tokens before the first target, but keeps a leading BOS and the token directly before the
    target. If the row is still too long, drops its end. At least one target remains."""
    first = trained.index(True)
    head = 1 if bos is not None and ids[0] == bos and first > 1 and limit > 2 else 0
    spare = max(0, first - 1 - head)
    drop = min(spare, len(ids) - limit)
    ids = ids[:head] + ids[head + drop :]
    trained = trained[:head] + trained[head + drop :]
    lost = len(ids) > limit
    ids, trained = _without_tail(ids[:limit], trained[:limit])
    return ids, trained, lost


def _end_ids(renderer: Renderer, rendered: Sequence[Rendered], eos: int | None) -> set[int]:
    """Return the token ids that end a completion.

    They are the template's end marker, and EOS if plain rows end with EOS."""
    ends: set[int] = set()
    if any(r.append_eos for r in rendered) and eos is not None:
        ends.add(eos)
    if any(r.chat for r in rendered) and renderer.end_marker:
        marker = renderer.tokenizer(renderer.end_marker, add_special_tokens=False)["input_ids"]
        if marker:
            ends.add(marker[-1])
    return ends


def refuse_rows(lines: Sequence[str], rows: int, problem: str, fix: str) -> None:
    """Raise DataError if `lines` is not empty.

    lines: a description of each unusable row. rows: total number of rows."""
    if lines:
        raise DataError(f"{len(lines)} of {rows} rows {problem}:\n{bullets(lines)}", fix=fix)
