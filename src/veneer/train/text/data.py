"""Read the rows of a text run and plan its steps.

data = read_data(config, base)               rows and their tokens, for training and validation
steps = planned_steps(data.train.items, config, …)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from veneer.core.adapter import Adapter
from veneer.errors import DataError
from veneer.train.config.reinforcement import PROMPT_FORMATS
from veneer.train.config.text import TrainConfig, preference_formats
from veneer.train.lazy import Lazy, token_counts
from veneer.train.loop import LazySteps, Micro, Step
from veneer.train.records import ArrowRows, Lines, large_files
from veneer.train.text.batches import Batch, collate, plan_steps
from veneer.train.text.encode import EncodedRows, EncodedTable, Example, chunked, encoded_chunks, encoded_rows
from veneer.train.text.preference import Item, answer_rows, collate_items, preference_items
from veneer.train.text.prompts import PromptItem, planned_rollouts, prompt_split
from veneer.train.text.render import Renderer
from veneer.train.text.rows import (
    KEYS,
    PAIR_FORMATS,
    Row,
    RowsSummary,
    UnusableRow,
    count_duplicates,
    data_digest,
    digest_of_keys,
    keys_of,
    read_rows,
    refuse_unusable,
    row_parser,
    split_default,
)
from veneer.train.text.token_cache import read_table, write_table
from veneer.train.validation_split import hold_out

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

_VERSION = 1
"""Changing this makes veneer tokenize all data again."""
_SAMPLED = 2000
"""Rows of a large file that are checked before all of it is tokenized."""
_SAY_EVERY = 10
"""Seconds between two messages about progress."""


@dataclass
class DataSplit:
    """Rows and their tokens.

    texts: the rows that were encoded. For preferences, there is one row per completion; otherwise, `texts`
    equals `rows`. items: the units of a step: examples, pairs of examples, or prompts. digest: `data_digest` of
    the rows. keys: returns `keys_of` the texts."""

    rows: Sequence[Row]
    texts: Sequence[Row]
    encoded: EncodedRows
    items: Sequence[Example] | Sequence[Item] | Sequence[PromptItem]
    digest: str
    keys: Callable[[], npt.NDArray[np.void]]


@dataclass
class TextData:
    """The data of a run. `start`: the adapter that training starts from."""

    train: DataSplit
    held_out: DataSplit
    metadata: RowsSummary | None
    start: Adapter | None = None


def _nothing(*args: Any) -> None:
    """Do nothing."""


def read_data(
    config: TrainConfig,
    base: TextBase,
    *,
    say: Callable[[str], None] = _nothing,
    on_sample: Callable[[TextData, int], None] = _nothing,
) -> TextData:
    """Read, split and encode the rows.

    Rows of large files, except CSV and JSON, are tokenized once and then read from mapped files (`token_cache`).

    say: called with progress messages while a large file is tokenized. on_sample: called before a large file is
    tokenized, with the data of a sample of its rows and the number of all its rows.

    Raises DataError if the rows do not fit the loss; also raises the errors of `read_rows`."""
    data = config.data
    train = _opened(data.files("train"), data.limit, config, base)
    held = None if data.validation is None else _opened(data.files("validation"), None, config, base)
    for source in (train, *([] if held is None else [held])):
        if config.preference.loss is None and source.summary.format in PAIR_FORMATS:
            text = "these rows have a chosen and a rejected answer, and the run would train on the chosen answers only"
            fix = "preference.loss=dpo uses both; otherwise provide rows with prompt and completion"
            raise DataError(text, where=source.rows[0].where, fix=fix)
    keys, rows = _encode(train, config, base, say, on_sample), train.rows
    if held is not None:
        _encode(held, config, base, say, on_sample)
        training, validation = (encode_split(source.rows, config, base, source.table) for source in (train, held))
        return TextData(training, validation, train.summary)
    hexadecimal = (key.tobytes().hex() for key in keys)
    default = split_default(len(rows))
    selected = hold_out(hexadecimal, len(rows), data.split, seed=config.split_seed, default=default)
    held_out = np.array(selected, np.int64)
    splits: list[DataSplit] = []
    for chosen in (np.delete(np.arange(len(rows)), held_out), held_out):
        some = Lazy(len(chosen), lambda i, chosen=chosen: rows[int(chosen[i])])  # type: ignore[misc]
        splits.append(encode_split(some if train.name else [*some], config, base, train.table, chosen))
    return TextData(splits[0], splits[1], train.summary)


@dataclass
class _Source:
    """The rows of some files. table: the tokens of the rows; None for prompts.

    For a large file, `rows` are read when they are needed. columns: the columns of its records. name: the name
    of its table in `token_cache`."""

    rows: Sequence[Any]
    summary: RowsSummary
    columns: Sequence[str] = ()
    name: str = ""
    table: EncodedTable | None = None


def _opened(files: Sequence[str], limit: int | None, config: TrainConfig, base: TextBase) -> _Source:
    """Read the rows of small files, or index the rows of large files. Raises the errors of `read_rows`."""
    options = row_options(config)
    lines = None if config.sampling is not None else large_files(files, limit)  # data sets of prompts are small
    if lines is None:
        return _Source(*read_rows(files, limit=limit, **options))
    name = _table_name(lines, config, base)
    table, about = read_table(name) or (None, {})
    columns = about["columns"] if about else lines.columns()
    parse, summary = row_parser(lines, columns, **options)
    summary = replace(summary, rows=len(lines), duplicates=about.get("duplicates", 0))
    return _Source(Lazy(len(lines), lambda i: parse(lines[i])), summary, columns, name, table)


def _table_name(lines: Lines | ArrowRows, config: TrainConfig, base: TextBase) -> str:
    """Return the digest of everything that determines the table of some records."""
    import tokenizers
    import transformers

    data, tokenizer = config.data, base.tokenizer
    renderer = Renderer(tokenizer, data.chat_template)
    tokenizer("a")  # resets the truncation and padding that a tokenizer's file can set
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, type(tokenizer).__name__, tokenizer.special_tokens_map]
    settings = data.model_dump(include={"train_on", "max_length", "long_rows"})
    versions = [_VERSION, transformers.__version__, tokenizers.__version__]
    options = {key: sorted(v) if isinstance(v, set | frozenset) else v for key, v in row_options(config).items()}
    parts = [versions, lines.digest, len(lines), backend and backend.to_str(), special, renderer.template, settings]
    parts += [options, config.preference.loss is not None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _encode(
    source: _Source,
    config: TrainConfig,
    base: TextBase,
    say: Callable[[str], None],
    on_sample: Callable[[TextData, int], None],
) -> npt.NDArray[np.void]:
    """Set a source's table and number of duplicates, and return the key of each row."""
    rows = source.rows
    if config.sampling is not None:
        keys: npt.NDArray[np.void] = keys_of(rows)["key"]
        return keys
    if not source.name:
        source.table = EncodedTable.joined(_chunks(chunked(rows), config, base))
    elif source.table is None:
        _sample(source, config, base, on_sample)
        _tokenize(source, config, base, say)
    assert source.table is not None
    return _row_keys(source.table)


def _tokenize(source: _Source, config: TrainConfig, base: TextBase, say: Callable[[str], None]) -> None:
    """Write the table of a large file, and set it and the duplicates of the source."""
    rows, summary = source.rows, source.summary
    bad: list[str] = []
    began = said = time.monotonic()

    def chunks() -> Iterator[list[Row]]:
        nonlocal said
        done = 0
        for chunk in chunked(rows):
            bad.extend(f"{row.where}: {row.why}" for row in chunk if isinstance(row, UnusableRow))
            yield [row for row in chunk if isinstance(row, Row)]
            done += len(chunk)
            if time.monotonic() > said + _SAY_EVERY:
                said = time.monotonic()
                left = (said - began) * (len(rows) / done - 1)
                say(f"tokenized {done:,} of {len(rows):,} rows, {left:.0f} s left")

    def check(table: EncodedTable) -> dict[str, Any]:
        refuse_unusable(bad, len(rows), summary.format)
        encode_split(rows, config, base, table)
        duplicates = count_duplicates(_row_keys(table))
        return {"columns": source.columns, "duplicates": duplicates}

    source.table, about = write_table(source.name, _chunks(chunks(), config, base), check)
    source.summary = replace(summary, duplicates=about["duplicates"])
    seconds = max(0.1, time.monotonic() - began)
    tokens = len(source.table.tokens)
    say(f"tokenized {len(rows):,} rows, {tokens:,} tokens, in {seconds:.0f} s ({tokens / seconds:,.0f} tokens/s)")


def _sample(source: _Source, config: TrainConfig, base: TextBase, on_sample: Callable[[TextData, int], None]) -> None:
    """Call `on_sample` with evenly spaced rows. Errors say that the rows are a sample."""
    count = len(source.rows)
    rows = [source.rows[i] for i in np.linspace(0, count - 1, min(count, _SAMPLED), dtype=np.int64).tolist()]
    summary = replace(source.summary, rows=len(rows))
    try:
        bad = [f"{row.where}: {row.why}" for row in rows if isinstance(row, UnusableRow)]
        refuse_unusable(bad, len(rows), summary.format)
        sample = TextData(encode_split(rows, config, base), encode_split([], config, base), summary)
    except DataError as error:
        text = f"in a sample of {len(rows):,} of {count:,} rows: {error.what}"
        raise DataError(text, where=error.where, fix=error.fix) from None
    on_sample(sample, count)


def _chunks(chunks: Iterable[list[Row]], config: TrainConfig, base: TextBase) -> Iterator[EncodedTable]:
    renderer = Renderer(base.tokenizer, config.data.chat_template)
    texts_of = {} if config.preference.loss is None else {"texts_of": answer_rows}
    return encoded_chunks(chunks, renderer, config.data, **texts_of)


def _row_keys(table: EncodedTable) -> npt.NDArray[np.void]:
    """Return the key of each row, (rows,) V32, from the row's first text."""
    keys: npt.NDArray[np.void] = table.texts["row_key"][np.unique(table.texts["row"], return_index=True)[1]]
    return keys


def row_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options for reading the rows of a run."""
    loss, samples = config.preference.loss, config.sampling is not None
    formats = PROMPT_FORMATS if samples else None if loss is None else preference_formats(loss)
    return {"format": config.data.format, "columns": config.data.columns, "formats": formats, "values": samples}


def encode_split(
    rows: Sequence[Row],
    config: TrainConfig,
    base: TextBase,
    table: EncodedTable | None = None,
    chosen: npt.NDArray[np.int64] | None = None,
) -> DataSplit:
    """Encode each row as an item: an example, a pair of completions, or a prompt.

    table: a table that already contains the rows. chosen: (rows,) the indices of the rows in the table, in
    ascending order; None for all rows of the table."""
    if config.sampling is not None:
        prompts, encoded = prompt_split(rows, config, base)
        return DataSplit(rows, rows, encoded, prompts, data_digest(rows), lambda: keys_of(rows))
    table = EncodedTable.joined(_chunks(chunked(rows), config, base)) if table is None else table
    chosen = np.arange(len(rows)) if chosen is None else chosen
    renderer, is_text = Renderer(base.tokenizer, config.data.chat_template), config.preference.loss is None
    row_of_text = table.texts["row"]
    indices = chosen if is_text else np.flatnonzero(np.isin(row_of_text, chosen))
    owners = np.searchsorted(chosen, row_of_text[indices])
    first = np.searchsorted(owners, np.arange(len(rows)))  # the first text of each row

    def answer(i: int) -> Row:
        return answer_rows([rows[owners[i]]])[0][int(i - first[owners[i]])]

    texts = rows if is_text else Lazy(len(indices), answer)
    encoded = encoded_rows(table, indices, texts, renderer, config.data)
    items: Sequence[Any] = encoded.examples
    if not is_text:
        paired = config.preference.loss != "kto"
        items, encoded = preference_items(encoded, rows, owners.tolist(), paired=paired)

    def keys() -> npt.NDArray[np.void]:
        out = np.empty(len(indices), KEYS)
        out["key"], out["prompt"] = table.texts["key"][indices], table.texts["prompt"][indices]
        return out

    digest = digest_of_keys(table.texts["row_key"][indices[first]].tobytes())
    return DataSplit(rows, texts, encoded, items, digest, keys)


def planned_steps(items: Sequence[Any], config: TrainConfig, rows: Sequence[Row] = (), devices: int = 1) -> LazySteps:
    """Return all steps of the run in order, planned one epoch at a time.

    Each step has at least one micro-batch per device.

    items: the items of a DataSplit."""
    if config.sampling is not None:
        return planned_rollouts(items, config, rows)
    lengths, targets = token_counts(items)
    make: Callable[[Any], Batch] = collate if config.preference.loss is None else collate_items

    def of_epoch(epoch: int) -> Sequence[Step]:
        plan = plan_steps(lengths, config.batching, seed=config.seed, epoch=epoch, pieces=devices)
        tokens, trained = plan.sums(lengths), plan.sums(targets)

        def micro(m: int) -> Micro:
            indices = plan.rows(m)

            def row(i: int) -> int | str:
                owner: int = items[indices[i]].row
                return rows[owner].where if rows else owner

            return Micro(
                tokens=int(tokens[m]),
                trained=int(trained[m]),
                rows=Lazy(len(indices), row),
                make=lambda: make([items[i] for i in indices]),
                units=None if config.preference.loss is None else len(indices),
                items=Lazy(len(indices), lambda i: items[indices[i]]),
            )

        def step(k: int) -> Step:
            return Step(tuple(map(micro, range(plan.steps[k], plan.steps[k + 1]))), epoch + (k + 1) / len(plan))

        return Lazy(len(plan), step)

    return LazySteps(of_epoch, epochs=config.epochs, steps=config.steps)
