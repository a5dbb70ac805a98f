"""Large files: rows read from disk and tokens from mapped files, compared with the same rows in memory."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train.text.tiny_runs import TENSORS, train, values_of, write_rows
from veneer.errors import DataError, Interrupted
from veneer.models.home import veneer_home
from veneer.models.text.base import TextBase
from veneer.train import records
from veneer.train.config.load import config_from
from veneer.train.text import data as data_module
from veneer.train.text import token_cache
from veneer.train.text.data import TextData, read_data
from veneer.train.text.encode import TEXT, EncodedTable, Example
from veneer.train.text.token_cache import read_table, write_table


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Treat every file as large, with empty caches."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(records, "LARGE", -1)
    shutil.rmtree(veneer_home() / "tokens", ignore_errors=True)


def read(folder: Path, base: TextBase, file: Path, **sections: Any) -> TextData:
    data = {"train": str(file), **sections.pop("data", {})}
    config: Any = config_from(values_of(folder, folder / "run", data=data, **sections))[0]
    return read_data(config, base)


def contents(data: TextData) -> list[Any]:
    """Return everything that a run reads of its data."""
    out: list[Any] = [data.metadata]
    for split in (data.train, data.held_out):
        encoded = split.encoded
        out += [(e.input_ids, e.trained, e.tokens, e.trained_tokens, e.row) for e in encoded.examples]
        out += [vars(encoded.counts), encoded.end_ids, encoded.chat, encoded.cut_rows, encoded.left, split.digest]
        out += [encoded.vocabulary.tolist(), split.keys().tolist(), [*split.rows], [*split.texts], len(split.items)]
    return out


WORDS = st.text("ab é\u2028😀", max_size=30).map(lambda text: f"x{text}")
CHATS = st.lists(WORDS, min_size=2, max_size=5).map(
    lambda texts: {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}
)
PAIRS = st.tuples(WORDS, WORDS, WORDS).map(lambda t: {"prompt": t[0], "chosen": f"a{t[1]}", "rejected": f"b{t[2]}"})
SETTINGS = st.fixed_dictionaries(
    {
        "max_length": st.integers(8, 60),
        "long_rows": st.sampled_from(["cut", "drop"]),
        "train_on": st.sampled_from(["assistant", "last", "all"]),
        "limit": st.none() | st.integers(2, 9),
        "split": st.integers(0, 1),
    }
)


@given(
    st.lists(CHATS, min_size=2, max_size=9) | st.lists(PAIRS, min_size=2, max_size=6),
    SETTINGS,
    st.sampled_from(["dpo", "kto"]),
    st.sampled_from(["\n", "\r\n", "\n \n"]),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_on_disk_equal_rows_in_memory(
    shared: Path,
    base: TextBase,
    tmp_path: Path,
    rows: list[Any],
    section: dict[str, Any],
    loss: str,
    newline: str,
    bom: bytes,
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bom + "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode())
    sections: dict[str, Any] = {"data": section}
    if "chosen" in rows[0]:
        sections = {"data": section | {"train_on": "assistant"}, "preference": {"loss": loss}}
    results = []
    for limit in (records.LARGE, -1, -1):  # in memory, written, read again
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "LARGE", limit)
            patch.setattr("veneer.train.text.encode.CHUNK", 3)
            results.append(contents(read(shared, base, file, **sections)))
    assert results[0] == results[1] == results[2]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("source", ["parquet", "hub"])
@pytest.mark.parametrize("limit", [None, 30])
def test_mapped_rows_equal_rows_in_memory(
    shared: Path, base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, limit: int | None
) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (shared / "rows.jsonl").read_text().splitlines()]
    for n, part in enumerate((rows[:17], rows[17:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{n}.parquet")
    files = [str(tmp_path / f"{n}.parquet") for n in range(2)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_parquet(files))
    data = {"train": "hub:org/set" if source == "hub" else files, "limit": limit}
    results = []
    for size in (1 << 24, -1, -1):  # in memory, written, read again
        monkeypatch.setattr(records, "LARGE", size)
        results.append(contents(read(shared, base, tmp_path, data=data)))
    assert results[0] == results[1] == results[2]
    assert len([*(veneer_home() / "tokens").iterdir()]) == 1


@pytest.mark.usefixtures("large")
def test_a_replaced_parquet_file_with_the_same_time_is_read_again(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "rows.parquet"
    for text in ("old", "new"):
        pq.write_table(pa.Table.from_pylist([{"text": text}]), file)
        os.utime(file, (1, 1))
        rows = records.large_files([str(file)])
        assert rows is not None
        assert rows[0].values == {"text": text}


@pytest.mark.usefixtures("large")
def test_large_parquet_files_that_are_not_one_data_set(shared: Path, base: TextBase, tmp_path: Path) -> None:
    """Files with different columns are read into memory; damaged files are named."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"prompt": f"a{i}", "completion": "b"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(turns), tmp_path / "0.parquet")
    pq.write_table(pa.Table.from_pylist([{**turn, "more": 1} for turn in turns]), tmp_path / "1.parquet")
    assert len(read(shared, base, tmp_path, data={"train": str(tmp_path), "split": 0}).train.rows) == 8
    (tmp_path / "1.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a Parquet file") as error:
        read(shared, base, tmp_path, data={"train": str(tmp_path)})
    assert "1.parquet" in str(error.value)


@pytest.mark.usefixtures("large")
def test_large_files_that_cannot_be_opened(tmp_path: Path) -> None:
    """A folder among the files is named; more files than can be open at once are read into memory."""
    import resource

    for n in range(80):
        write_rows(tmp_path / f"{n}.jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        assert records.large_files([str(tmp_path)]) is None
        assert records.read_data_files([str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (tmp_path / "x.jsonl").mkdir()
    assert records.large_files([str(tmp_path)]) is None
    with pytest.raises(DataError, match="Is a directory"):
        records.read_data_files([str(tmp_path)])


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans())))
def test_tokens_and_mask_survive_in_one_number(tokens: list[tuple[int, bool]]) -> None:
    ids, trained = [token for token, _ in tokens], [on for _, on in tokens]
    example = Example(ids, trained, 3)
    assert (example.input_ids, example.trained, example.row) == (ids, trained, 3)
    assert (example.tokens, example.trained_tokens) == (len(ids), sum(trained))


@pytest.mark.usefixtures("large")
def test_a_large_file_trains_the_same_adapter_and_resumes(shared: Path, base: TextBase, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "LARGE", 1 << 20)
        whole = train(shared, tmp_path / "whole", base)

    def stop(event: Any) -> None:
        if getattr(event, "step", 0) == 5 and type(event).__name__ == "Stepped":
            os.kill(os.getpid(), signal.SIGINT)

    notes: list[str] = []
    with pytest.raises(Interrupted):
        train(shared, tmp_path / "cut", base, on_event=lambda e: (notes.append(getattr(e, "text", "")), stop(e)))
    assert any(note.startswith("tokenized 40 rows") for note in notes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "encoded_chunks", None)  # the second start finds the tokens
        result = train(shared, tmp_path / "cut", base, resume=True)
    assert result.loss == whole.loss
    first, second = ((tmp_path / name / TENSORS).read_bytes() for name in ("whole", "cut"))
    assert first == second


@pytest.mark.usefixtures("large")
def test_bad_rows_are_named_with_their_line_and_leave_no_tokens(shared: Path, base: TextBase, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = tmp_path / "bad.jsonl"
    cases = [
        ("{", "malformed"),
        (json.dumps({"messages": []}), "empty list"),
        (json.dumps({"messages": [good["messages"][0], {"role": "assistant", "content": "long " * 300}]}), "longer"),
    ]
    for bad, problem in cases:
        file.write_text("".join(json.dumps(good) + "\n" if n != 1500 else f"{bad}\n" for n in range(1, 2501)))
        with pytest.raises(DataError, match=problem) as error:
            read(shared, base, file, data={"max_length": 64})
        assert f"{file}:1500: " in str(error.value)
    assert not [*(veneer_home() / "tokens").iterdir()]


@pytest.mark.usefixtures("large")
def test_a_sample_of_a_large_file_is_checked_first(shared: Path, base: TextBase, tmp_path: Path) -> None:
    file = tmp_path / "silent.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n' * 3000)
    with pytest.raises(Exception, match=r"in a sample of 2,000 of 3,000 rows: no row is left to train on"):
        train(shared, tmp_path / "run", base, data={"train": str(file), "split": 0})
    assert not (veneer_home() / "tokens").exists()


@pytest.mark.usefixtures("large")
def test_every_setting_that_changes_tokens_has_its_own_table(shared: Path, base: TextBase, tmp_path: Path) -> None:
    file, template = tmp_path / "rows.jsonl", tmp_path / "own.jinja"
    write_rows(file)
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    tables = veneer_home() / "tokens"

    def written(**section: Any) -> int:
        read(shared, base, file, data=section)
        return len([*tables.iterdir()])

    changes: list[dict[str, Any]] = [{}, {"train_on": "last"}, {"max_length": 100}, {"long_rows": "cut"}, {"limit": 30}]
    changes += [{"format": "messages"}, {"columns": {"messages": "messages"}}, {"chat_template": str(template)}]
    assert [written(**change) for change in changes] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert written(split=3, split_seed=5) == 8  # the split selects rows of the same table
    template.write_text("{% for m in messages %}{{ m.content }}!\n{% endfor %}")
    assert written(chat_template=str(template)) == 9
    base.tokenizer.add_tokens(["printer"])
    assert written() == 10
    file.write_text(file.read_text().replace("printer", "scanner"))
    assert written() == 11


@pytest.mark.usefixtures("large")
def test_a_file_that_changes_during_the_run_is_an_error(shared: Path, base: TextBase, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file)
    rows = read(shared, base, file).train.rows
    with file.open("a") as more:
        more.write("{}\n")
    with pytest.raises(DataError, match="changed while the run"):
        rows[3]


def table(*numbers: int) -> EncodedTable:
    return EncodedTable(np.array(numbers, np.int32), np.zeros(1, TEXT))


def no_errors(made: EncodedTable) -> dict[str, Any]:
    return {"tokens": len(made.tokens)}


def forked(work: Callable[[], object]) -> int:
    """Return the id of a child that does `work` and ends, with 1 after an error: it must not run further tests."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.usefixtures("large")
def test_tables_of_killed_writers_are_never_read() -> None:
    def killed() -> Iterator[EncodedTable]:
        yield table(1, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.waitpid(forked(lambda: write_table("a", killed(), no_errors)), 0)[1] == signal.SIGKILL
    tables = veneer_home() / "tokens"
    (left,) = tables.iterdir()
    assert read_table("a") is None
    for path in (left, *left.iterdir()):
        os.utime(path, (0, 0))
    made, about = write_table("a", [table(1, 2), table(3)], no_errors)
    assert (made.tokens.tolist(), about["tokens"], [*tables.iterdir()]) == ([1, 2, 3], 3, [tables / "a"])
    (tables / "a" / "tokens.bin").write_bytes(b"1234")  # damaged: not read, and replaced
    assert read_table("a") is None
    assert write_table("a", [table(7)], no_errors)[0].tokens.tolist() == [7]
    for about in ("null", "[]", "{}"):
        (tables / "a" / "about.json").write_text(about)
        assert read_table("a") is None


@pytest.mark.usefixtures("large")
def test_the_slower_of_two_writers_uses_the_faster_ones_table() -> None:
    def slow() -> Iterator[EncodedTable]:
        yield table(1)
        assert write_table("a", [table(1)], no_errors)[0].tokens.tolist() == [1]

    assert write_table("a", slow(), no_errors)[0].tokens.tolist() == [1]
    assert [folder.name for folder in (veneer_home() / "tokens").iterdir()] == ["a"]


@pytest.mark.usefixtures("large")
def test_a_table_that_another_run_has_written_since_is_kept() -> None:
    write_table("a", [table(1)], no_errors)
    assert write_table("a", [table(2)], no_errors)[0].tokens.tolist() == [1]


@pytest.mark.usefixtures("large")
def test_processes_that_start_together_get_the_same_table(shared: Path, base: TextBase, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file)

    def start(n: int) -> None:
        examples = read(shared, base, file).train.encoded.examples
        (tmp_path / f"{n}.json").write_text(json.dumps([e.input_ids for e in examples]))

    children = [forked(functools.partial(start, n)) for n in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "LARGE", 1 << 20)
        wanted = [e.input_ids for e in read(shared, base, file).train.encoded.examples]
    assert [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)] == [wanted, wanted]
    assert len([*(veneer_home() / "tokens").iterdir()]) == 1


@pytest.mark.usefixtures("large")
def test_least_recently_used_tables_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "MOST_BYTES", 1200)
    for n, name in enumerate("abc"):
        made, _ = write_table(name, [table(*[n] * 50)], no_errors)
        os.utime(veneer_home() / "tokens" / name, (1000 + n,) * 2)
    assert read_table("a") is not None  # now the newest
    monkeypatch.setattr(token_cache, "MOST_BYTES", 800)
    write_table("d", [table(*range(50))], no_errors)
    assert [read_table(name) is not None for name in "abcd"] == [True, False, False, True]
    assert made.tokens.tolist() == [2] * 50  # a run keeps the table that it has open
    assert read_table("d") is not None
