"""Read the rows of a text run and plan its steps.

data = read_data(config, base)               rows and their tokens, for training and validation
steps = planned_steps(data.train.items, config, …)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.core.adapter import Adapter
from veneer.errors import DataError
from veneer.train.config.reinforcement import PROMPT_FORMATS
from veneer.train.config.text import TrainConfig, preference_formats
from veneer.train.loop import LazySteps, Micro, Step
from veneer.train.text.batches import Batch, collate, plan_steps
from veneer.train.text.encode import EncodedRows, Example, encode_rows
from veneer.train.text.preference import Item, answer_rows, collate_items, preference_items
from veneer.train.text.prompts import PromptItem, planned_rollouts, prompt_split
from veneer.train.text.rows import Row, RowsSummary, read_rows, split_rows

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase


@dataclass
class DataSplit:
    """Rows and their tokens.

    texts: the rows that were encoded. For preferences, there is one row per completion; otherwise, `texts`
    equals `rows`. items: the units of a step: examples, pairs of examples, or prompts."""

    rows: list[Row]
    texts: list[Row]
    encoded: EncodedRows
    items: Sequence[Example] | Sequence[Item] | Sequence[PromptItem]


@dataclass
class TextData:
    """The data of a run. `start`: the adapter that training starts from."""

    train: DataSplit
    held_out: DataSplit
    metadata: RowsSummary | None
    start: Adapter | None = None


def read_data(config: TrainConfig, base: TextBase) -> TextData:
    """Read, split and encode the rows.

    Raises DataError if the rows do not fit the loss; also raises the errors of `read_rows`."""
    loss, options = config.preference.loss, row_options(config)
    rows, metadata = read_rows(config.data.files("train"), limit=config.data.limit, **options)
    if config.data.validation is not None:
        held_rows, _ = read_rows(config.data.files("validation"), **options)
    else:
        rows, held_rows = split_rows(rows, config.data.split, seed=config.split_seed)
    if loss is None and (pairs := [row for row in (*rows, *held_rows) if row.rejected]):
        text = "these rows have a chosen and a rejected answer, and the run would train on the chosen answers only"
        fix = "preference.loss=dpo uses both; otherwise provide rows with prompt and completion"
        raise DataError(text, where=pairs[0].where, fix=fix)
    return TextData(encode_split(rows, config, base), encode_split(held_rows, config, base), metadata)


def row_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options for reading the rows of a run."""
    loss, samples = config.preference.loss, config.sampling is not None
    formats = PROMPT_FORMATS if samples else None if loss is None else preference_formats(loss)
    return {"format": config.data.format, "columns": config.data.columns, "formats": formats, "values": samples}


def encode_split(rows: list[Row], config: TrainConfig, base: TextBase) -> DataSplit:
    """Encode each row as an item: an example, a pair of completions, or a prompt."""
    if config.sampling is not None:
        prompts, encoded = prompt_split(rows, config, base)
        return DataSplit(rows, rows, encoded, prompts)
    if config.preference.loss is None:
        encoded = encode_rows(rows, base.tokenizer, config.data)
        return DataSplit(rows, rows, encoded, encoded.examples)
    texts, owners = answer_rows(rows)
    encoded = encode_rows(texts, base.tokenizer, config.data)
    items, encoded = preference_items(encoded, rows, owners, paired=config.preference.loss != "kto")
    return DataSplit(rows, texts, encoded, items)


def planned_steps(items: Sequence[Any], config: TrainConfig, rows: Sequence[Row] = (), devices: int = 1) -> LazySteps:
    """Return all steps of the run in order, planned one epoch at a time.

    Each step has at least one micro-batch per device.

    items: the items of a DataSplit."""
    if config.sampling is not None:
        return planned_rollouts(items, config, rows)
    lengths = [e.tokens for e in items]
    make: Callable[[Any], Batch] = collate if config.preference.loss is None else collate_items

    def micro(indices: list[int]) -> Micro:
        batch_items = [items[i] for i in indices]
        return Micro(
            tokens=sum(e.tokens for e in batch_items),
            trained=sum(e.trained_tokens for e in batch_items),
            rows=tuple(rows[e.row].where if rows else e.row for e in batch_items),
            make=lambda: make(batch_items),
            units=None if config.preference.loss is None else len(batch_items),
            items=tuple(batch_items),
        )

    def of_epoch(epoch: int) -> list[Step]:
        plan = plan_steps(lengths, config.batching, seed=config.seed, epoch=epoch, pieces=devices)
        return [Step(tuple(micro(m) for m in micros), epoch + (i + 1) / len(plan)) for i, micros in enumerate(plan)]

    return LazySteps(of_epoch, epochs=config.epochs, steps=config.steps)
