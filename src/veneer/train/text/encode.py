"""Tokenize rows with a loss mask, and count everything that was left out.

    encoded = encode_rows(rows, tokenizer, config.data)
    encoded.examples[0].input_ids, .trained        same length; trained[i]: token i is a target
    table = EncodedTable.joined(encoded_chunks(chunked(rows), renderer, config.data))

Each text is tokenized as a whole, and the loss mask is derived from character positions, so the tokens equal
the tokens at inference. Tokens after the last target are dropped, because nothing is predicted from them.
This module does not depend on models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from veneer.errors import BaseError, DataError, bullets
from veneer.train.config.text import DataSection
from veneer.train.lazy import Lazy
from veneer.train.text.render import Rendered, Renderer
from veneer.train.text.rows import Row, keys_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024  # rows tokenized per call, which limits the tokenizer's memory
_SCANNED = 1 << 22  # tokens read at once
_SHOWN = 20  # rows that an error names
TOKEN_BITS = np.int32(0x7FFFFFFF)
_TRAINED = np.int32(-0x80000000)
_Tokens = npt.NDArray[np.int32]
_Integers = npt.NDArray[Any]


class Example:
    """The tokens of one row.

    coded: (tokens,) int32, token ids, with the top bit set for targets, which are predicted from the tokens
    before them in the same row; the first token is never a target. row: index in the rows that were encoded."""

    __slots__ = ("coded", "row")

    def __init__(self, input_ids: Sequence[int], trained: Sequence[bool], row: int) -> None:
        self.coded, self.row = _coded(input_ids, np.array(trained, np.bool_)), row

    @classmethod
    def of(cls, coded: _Tokens, row: int) -> Example:
        example = cls.__new__(cls)
        example.coded, example.row = coded, row
        return example

    @property
    def input_ids(self) -> list[int]:
        ids: list[int] = (self.coded & TOKEN_BITS).tolist()
        return ids

    @property
    def trained(self) -> list[bool]:
        """Return whether each token is a target."""
        mask: list[bool] = (self.coded < 0).tolist()
        return mask

    @property
    def tokens(self) -> int:
        return len(self.coded)

    @property
    def trained_tokens(self) -> int:
        """Return the number of targets."""
        return int(np.count_nonzero(self.coded < 0))

    @property
    def prompt(self) -> list[int]:
        """Return the tokens before the first target."""
        return self.input_ids[: self.trained.index(True)]


def _coded(ids: Sequence[int], trained: npt.NDArray[np.bool_]) -> _Tokens:
    """Return token ids as int32, with the top bit set for targets."""
    return np.array(ids, np.int32) | np.where(trained, _TRAINED, np.int32(0))


class Examples(Lazy[Example]):
    """The examples of an encoded table, read from memory or from a mapped file.

    counts: as in `token_counts`."""

    def __init__(self, table: EncodedTable, texts: _Integers, rows: _Integers) -> None:
        ends, lengths = table.texts["end"][texts], table.texts["kept"][texts].astype(np.int64)
        self.counts = lengths, table.texts["trained"][texts].astype(np.int64)
        begins = ends - lengths
        super().__init__(
            len(texts), lambda i: Example.of(table.tokens[begins[i] : begins[i] + lengths[i]], int(rows[i]))
        )


@dataclass
class Counts:
    """Counts of what happened to the rows during encoding.

    first_rows: name of a count -> the first five rows that it counts
    cut_ends: truncated rows that lost their end, including the end-of-turn token
    changed_turns: turns that render differently when later turns follow
    control: rows that contain the base's control tokens as text
    longest: tokens of the longest row before truncation
    ended: used rows with a trained token that ends a completion
    unbegun: used rows that do not begin with the begin-of-text token

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
    ended: int = 0
    unbegun: int = 0
    first_rows: dict[str, list[str]] = field(default_factory=dict)

    def add_rows(self, name: str, numbers: npt.NDArray[Any], rows: Sequence[Row]) -> None:
        """Add one number per row to a count."""
        setattr(self, name, getattr(self, name) + int(numbers.sum()))
        if len(found := np.flatnonzero(numbers)):
            self.first_rows[name] = [rows[i].where for i in found[:5].tolist()]

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
    vocabulary: the distinct token ids of the examples
    left: index of each dropped row -> reason"""

    examples: Sequence[Example]
    counts: Counts
    renderer: Renderer
    end_ids: set[int]
    chat: bool
    cut_rows: set[int]
    vocabulary: _Integers
    left: dict[int, str] = field(default_factory=dict)


def vocabulary_of(tokens: Iterable[_Tokens]) -> _Integers:
    """Return the distinct token ids of coded tokens, in ascending order."""
    seen = np.zeros(0, np.bool_)
    for part in tokens:
        for at in range(0, len(part), _SCANNED):
            found = np.bincount(part[at : at + _SCANNED] & TOKEN_BITS) > 0
            short, long = sorted((seen, found), key=len)
            seen = long.copy()
            seen[: len(short)] |= short
    return np.flatnonzero(seen)


_FLAGS = ("untrained", "long_dropped", "cut", "cut_ends", "control", "doubled_bos")
"""Counts of `Counts` that have one bit per text in an encoded table, from the lowest bit."""
_REFUSED, _NO_BOS, _HAS_EOS, _HAS_MARKER, _CHAT, _APPENDS_EOS = (1 << i for i in range(len(_FLAGS), len(_FLAGS) + 6))

# end: position in the tokens where the text ends; kept, trained: its tokens there, and the targets among them;
# tokens: tokens before truncation; row: index of its row; key, prompt: `Row.key` and half of `Row.prompt_key`;
# row_key: key of the row, which differs from `key` if the row has several texts
_FIELDS = (
    "end <i8, kept <i4, trained <i4, tokens <i4, row <i4, changed <u2, flags <u2, key V32, prompt V16, row_key V32"
)
TEXT = np.dtype([(name, kind) for name, kind in (field.split() for field in _FIELDS.split(", "))])


@dataclass
class EncodedTable:
    """Encoded texts in flat arrays, in memory or in mapped files.

    tokens: (N,) int32, coded as in Example. texts: (texts,) TEXT, in the order of the rows. errors: index of
    each text that cannot be rendered -> reason."""

    tokens: _Tokens
    texts: npt.NDArray[np.void]
    errors: dict[int, str] = field(default_factory=dict)

    @classmethod
    def joined(cls, chunks: Iterable[EncodedTable]) -> EncodedTable:
        """Return the chunks of `encoded_chunks` as one table in memory."""
        parts = list(chunks)
        tokens = np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)])
        texts = np.concatenate([np.zeros(0, TEXT), *(part.texts for part in parts)])
        return cls(tokens, texts, {i: why for part in parts for i, why in part.errors.items()})


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
    table = EncodedTable.joined(encoded_chunks(chunked(rows), renderer, data))
    return encoded_rows(table, np.arange(len(rows)), rows, renderer, data, refuse=refuse)


def chunked(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows in chunks that limit the tokenizer's memory."""
    for at in range(0, len(rows), CHUNK):
        yield [*rows[at : at + CHUNK]]


def encoded_rows(
    table: EncodedTable,
    chosen: _Integers,
    texts: Sequence[Row],
    renderer: Renderer,
    data: DataSection,
    *,
    refuse: bool = True,
) -> EncodedRows:
    """Return the chosen texts of a table. Raises the errors of `encode_rows`.

    chosen: (texts,) the indices of the texts in the table, in ascending order. texts: the same texts."""
    about = {name: table.texts[name][chosen] for name in ("flags", "tokens", "changed", "kept")}
    flags, tokenizer = about["flags"], renderer.tokenizer

    def lines(bit: int, text: Callable[[int], str]) -> list[str]:
        """Return a line for each text with this bit; lines that an error does not show are empty."""
        found = np.flatnonzero(flags & bit).tolist()
        return [f"{texts[i].where}: {text(i)}" if n < _SHOWN else "" for n, i in enumerate(found)]

    if refuse:
        fix = "correct these rows, or set data.train_on or data.chat_template"
        bad = lines(_REFUSED, lambda i: table.errors[int(chosen[i])])
        refuse_rows(bad, len(texts), "cannot be encoded", fix)
    counts = Counts(rows=len(texts), longest=int(about["tokens"].max(initial=0)))
    if data.long_rows == "refuse" and refuse:
        fix = f"set data.max_length={counts.longest} (more memory), or data.long_rows=drop or cut"
        long = lines(_bit("long_dropped"), lambda i: f"{about['tokens'][i]} tokens")
        refuse_rows(long, len(texts), f"are longer than data.max_length, {data.max_length} tokens", fix)
    for name in _FLAGS:
        counts.add_rows(name, flags & _bit(name) > 0, texts)
    counts.add_rows("changed_turns", about["changed"], texts)
    left = {i: table.errors[int(chosen[i])] for i in np.flatnonzero(flags & _REFUSED).tolist()}
    left |= dict.fromkeys(np.flatnonzero(flags & _bit("untrained")).tolist(), "no token to train on")
    for i in np.flatnonzero(flags & _bit("long_dropped")).tolist():
        left[i] = f"{about['tokens'][i]:,} tokens, more than data.max_length, {data.max_length:,}"
    kept = np.flatnonzero(about["kept"])
    examples = Examples(table, chosen[kept], kept)
    counts.used, counts.tokens, counts.trained_tokens = len(kept), *(int(n.sum()) for n in examples.counts)
    end_ids = set[int]()
    ended: _Integers = np.zeros(len(kept), np.uint16)
    for how, has, token in ((_APPENDS_EOS, _HAS_EOS, tokenizer.eos_token_id), (_CHAT, _HAS_MARKER, _marker(renderer))):
        if token is not None and (flags & how).any():
            end_ids, ended = end_ids | {token}, ended | flags[kept] & has
    counts.ended, counts.unbegun = int(np.count_nonzero(ended)), int(np.count_nonzero(flags[kept] & _NO_BOS))
    runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1) if len(chosen) else []
    ends = ((table.texts["end"][run[0]] - table.texts["kept"][run[0]], table.texts["end"][run[-1]]) for run in runs)
    vocabulary = vocabulary_of(table.tokens[start:end] for start, end in ends)
    cut_rows = set(np.flatnonzero(flags & _bit("cut")).tolist())
    return EncodedRows(examples, counts, renderer, end_ids, bool((flags & _CHAT).any()), cut_rows, vocabulary, left)


def encoded_chunks(
    chunks: Iterable[Sequence[Row]],
    renderer: Renderer,
    data: DataSection,
    texts_of: Callable[[Sequence[Row]], tuple[Sequence[Row], Sequence[int]]] = lambda rows: (rows, range(len(rows))),
) -> Iterator[EncodedTable]:
    """Yield the encoded texts of each chunk of rows as a part of a table.

    While a chunk is tokenized, which releases the GIL, the next chunks are read and rendered.

    texts_of: returns the texts of some rows, and the index of each text's row."""
    if renderer.tokenizer("a", verbose=False).encodings is None:  # the call also turns truncation and padding off
        text = "the base's tokenizer does not report which characters a token covers"
        raise BaseError(text, fix="give the base a fast tokenizer (tokenizer.json)")
    marker = _marker(renderer)  # before the thread starts, because the tokenizer cannot be called twice at once
    bases = [0, 0, 0]  # rows, texts and tokens before the chunk
    waiting: list[Callable[[], EncodedTable]] = []
    with ThreadPoolExecutor(1) as pool:
        for rows in chunks:
            texts, owners = texts_of(rows)
            rendered = [_rendered(renderer, text, data) for text in texts]
            usable = [r for r in rendered if isinstance(r, Rendered)]
            encodings = pool.submit(_encode_texts, renderer.tokenizer, usable)
            about = np.zeros(len(texts), TEXT)
            about["row"] = np.array(owners, np.int64) + bases[0]
            bases[0] += len(rows)
            keys = keys_of(texts)
            about["key"], about["prompt"] = keys["key"], keys["prompt"]
            about["row_key"] = keys["key"] if texts is rows else keys_of(rows)["key"][list(owners)]
            waiting.append(partial(_finished, texts, rendered, encodings, about, bases, renderer, marker, data))
            if len(waiting) > 2:
                yield waiting.pop(0)()
        for finish in waiting:
            yield finish()


def _rendered(renderer: Renderer, row: Row, data: DataSection) -> Rendered | str:
    try:
        return renderer.render(row, data.train_on)
    except ValueError as error:
        return str(error)


def _finished(
    texts: Sequence[Row],
    rendered: Sequence[Rendered | str],
    encodings: Future[list[Any]],
    about: npt.NDArray[np.void],
    bases: list[int],
    renderer: Renderer,
    marker: int | None,
    data: DataSection,
) -> EncodedTable:
    """Return a chunk's texts as a part of a table, and advance `bases` to the next chunk."""
    bos, eos = renderer.tokenizer.bos_token_id, renderer.tokenizer.eos_token_id
    encoded, parts, errors = iter(encodings.result()), [np.zeros(0, np.int32)], dict[int, str]()
    values: list[tuple[int, ...]] = []
    for i, (row, r) in enumerate(zip(texts, rendered, strict=True)):
        if isinstance(r, str):
            errors[bases[1] + i] = r
            values.append((bases[2], 0, 0, 0, 0, _REFUSED))
            continue
        coded, flags = _tokens(next(encoded), r, eos), _CHAT * r.chat | _APPENDS_EOS * r.append_eos
        if any(renderer.has_control(str(m["content"])) for m in row.messages) or renderer.has_control(row.text):
            flags |= _bit("control")
        if bos is not None and len(coded) > 1 and coded[0] == bos and coded[1] & TOKEN_BITS == bos:
            flags |= _bit("doubled_bos")
        targets = np.flatnonzero(coded < 0)
        # The tokens after the last target predict nothing.
        full = coded = coded[: targets[-1] + 1 if len(targets) else 0]
        if not len(coded):
            flags |= _bit("untrained")
        elif len(coded) > data.max_length and data.long_rows == "cut":
            coded, lost = _cut(coded, data.max_length, bos)
            flags |= _bit("cut") | _bit("cut_ends") * lost
        elif len(coded) > data.max_length:
            flags |= _bit("long_dropped")
            coded = coded[:0]
        trained = (coded[coded < 0] & TOKEN_BITS).tolist()
        for token, bit in ((eos, _HAS_EOS), (marker, _HAS_MARKER)):
            flags |= bit * (token is not None and token in trained)
        flags |= _NO_BOS * (bos is not None and len(coded) > 0 and coded[0] != bos)
        bases[2] += len(coded)
        values.append((bases[2], len(coded), len(trained), len(full), min(r.changed_turns, 0xFFFF), flags))
        parts.append(coded)
    fields = ("end", "kept", "trained", "tokens", "changed", "flags")
    for name, column in zip(fields, np.array(values, np.int64).reshape(-1, len(fields)).T, strict=True):
        about[name] = column
    bases[1] += len(texts)
    return EncodedTable(np.concatenate(parts), about, errors)


def _bit(name: str) -> int:
    return 1 << _FLAGS.index(name)


def _encode_texts(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> list[Any]:
    """Return the encoding of each text.

    The tokenizer adds special tokens to plain text only, because a chat template writes BOS and EOS
    itself. Calls the `tokenizers` library directly, because transformers' conversion to lists of ids takes
    as long as tokenizing. `encoded_chunks` has turned truncation off."""
    encodings: list[Any] = []
    for chat, some in itertools.groupby(rendered, lambda r: r.chat):
        encodings += tokenizer.backend_tokenizer.encode_batch([r.text for r in some], add_special_tokens=not chat)
    return encodings


def _tokens(encoding: Any, r: Rendered, eos: int | None) -> _Tokens:
    """Return the coded tokens of a text. If `r.append_eos`, append the end-of-text token."""
    ids, spans = encoding.ids, [_span(encoding, start, end) for start, end in r.trained_spans]
    if r.append_eos and eos is not None:
        if not ids or ids[-1] != eos:
            ids.append(eos)
        spans.append((len(ids) - 1, len(ids)))
    coded = np.array(ids, np.int32)
    for first, last in spans:
        coded[first:last] |= _TRAINED
    coded[:1] &= TOKEN_BITS
    return coded


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


def _cut(coded: _Tokens, limit: int, bos: int | None) -> tuple[_Tokens, bool]:
    """Truncate a row to at most `limit` tokens. Return (tokens, whether the end was cut).

    Drops the oldest tokens before the first target, but keeps a leading BOS and the token directly before the
    target. If the row is still too long, drops its end. At least one target remains."""
    first = int(np.argmax(coded < 0))
    head = 1 if bos is not None and coded[0] == bos and first > 1 and limit > 2 else 0
    drop = min(max(0, first - 1 - head), len(coded) - limit)
    coded = np.concatenate([coded[:head], coded[head + drop :]])
    lost = len(coded) > limit
    return coded[: np.flatnonzero(coded[:limit] < 0)[-1] + 1], lost


def _marker(renderer: Renderer) -> int | None:
    """Return the last token of the template's end marker, which ends a completion."""
    if not renderer.end_marker:
        return None
    ids: list[int] = renderer.tokenizer(renderer.end_marker, add_special_tokens=False)["input_ids"]
    return ids[-1] if ids else None


def refuse_rows(lines: Sequence[str], rows: int, problem: str, fix: str) -> None:
    """Raise DataError if `lines` is not empty.

    lines: a description of each unusable row. rows: total number of rows."""
    if lines:
        raise DataError(f"{len(lines)} of {rows} rows {problem}:\n{bullets(lines)}", fix=fix)
