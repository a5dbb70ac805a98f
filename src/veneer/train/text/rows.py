"""Read rows from files or a hub data set, detect their format, and validate them.

    rows, about = read_rows(["tickets.jsonl"])
    about.format, about.why          "messages", "a `messages` column of role and content"

| format              | columns                                         | result                            |
| messages            | messages: [{role, content, weight?}], tools?,   | a conversation                    |
|                     | parallel_tool_calls?                            |                                   |
| sharegpt            | conversations: [{from, value}], system?, tools? | a conversation                    |
| prompt-completion   | prompt, completion (texts or message lists)     | a user and an assistant turn      |
| instruction         | instruction, input?, output, system?            | the same (alpaca)                 |
| text                | text                                            | plain text, all of it trained on  |
| preference          | prompt?, chosen, rejected (texts or lists)      | a conversation with two endings   |
| openai-preference   | input: {messages, tools?, …}, preferred_output, | the same                          |
|                     | non_preferred_output (message lists)            |                                   |
| unpaired-preference | prompt, completion, label (true or false)       | a conversation with a label       |
| prompt              | prompt (text or a message list)                 | a conversation without an answer  |

Every unusable row is reported with its file, line and reason. This module does not depend on tokenizers or
models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from veneer.errors import DataError, bullets, nearest
from veneer.train.records import Record, read_data_files
from veneer.train.validation_split import hold_out

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = (
    dict.fromkeys(("human", "user"), "user")
    | dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant")
    | {"system": "system"}
    | dict.fromkeys(("tool", "observation", "function_response"), "tool")
)
# column -> other names, used if the column is absent and data.columns does not name it
_ALIASES = {
    "messages": ("conversation", "dialog"),
    "completion": ("response", "answer"),
    "prompt": ("question",),
    "output": ("response",),
}

_JSON = json.JSONEncoder(sort_keys=True, default=str).encode  # once, because `json.dumps` creates an encoder per call


@dataclass(frozen=True)
class Row:
    """One training row.

    where: file and line
    messages: dicts with role and content, as chat templates require; empty for plain text. In a preference
        row, the messages end with the chosen answer.
    text: plain text; empty for all other formats
    rejected: in a preference row, the same conversation with the rejected answer
    label: whether the answer is desirable, in an unpaired preference row
    instruction: (system, instruction, input, output), for the Alpaca prompt on a base without a chat template
    values: all columns of the row, for rewards"""

    format: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    instruction: tuple[str, str, str, str] | None = None
    tools: tuple[Any, ...] = ()
    where: str = ""
    rejected: tuple[dict[str, Any], ...] = ()
    label: bool | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return the sha256 of the row's content, which does not include the row's location."""
        parts: list[Any] = [self.format, self.messages, self.text, self.instruction, self.tools]
        if self.rejected or self.label is not None:
            parts += [self.rejected, self.label]
        if self.values:
            parts.append(dict(self.values))
        return hashlib.sha256(_JSON(parts).encode()).hexdigest()

    @property
    def prompt_key(self) -> str:
        """Return the sha256 of the content before the last assistant turn, or of all plain text."""
        messages: Sequence[Any] = self.messages[: self.last_assistant()]
        return hashlib.sha256(_JSON([messages, self.text]).encode()).hexdigest()

    def last_assistant(self) -> int:
        """Return the index of the last assistant message, or the number of messages if there is none."""
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return turns[-1] if turns else len(self.messages)

    def shared(self) -> int:
        """Return the length of the prompt: the number of leading messages shared with `rejected`."""
        return next(
            (i for i, (a, b) in enumerate(zip(self.messages, self.rejected, strict=False)) if a != b),
            min(len(self.messages), len(self.rejected)),
        )


@dataclass(frozen=True)
class UnusableRow:
    """A row that cannot be parsed. `values`: its columns."""

    where: str
    why: str
    values: Mapping[str, Any]


@dataclass
class RowsSummary:
    """A summary of the rows: the format, the reason for it, and unused columns."""

    format: str
    why: str
    rows: int
    unused: list[str] = field(default_factory=list)
    duplicates: int = 0


def read_rows(sources: str | Sequence[str], **options: Any) -> tuple[list[Row], RowsSummary]:
    """Read rows from files, globs or hub data sets (`hub:ID@SPLIT`), in the given order.

    options: see `parse_rows`.

    Raises DataError for a missing or empty file, for unusable rows (up to 20 are listed with line numbers),
    and if the format cannot be recognized from the columns."""
    parsed, metadata = parse_rows(sources, **options)
    rows = [row for row in parsed if isinstance(row, Row)]
    bad = [f"{row.where}: {row.why}" for row in parsed if isinstance(row, UnusableRow)]
    refuse_unusable(bad, len(parsed), metadata.format)
    return rows, metadata


def parse_rows(
    sources: str | Sequence[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    formats: Collection[str] | None = None,
    values: bool = False,
) -> tuple[list[Row | UnusableRow], RowsSummary]:
    """Read rows like `read_rows`, but include unusable rows in the result.

    The files of a glob are read in alphabetical order.

    formats: the candidates for `auto`. The default is all formats except unpaired-preference, because a
    supervised run would learn its completions regardless of their labels. values: keep all columns of each
    row."""
    records = read_data_files([sources] if isinstance(sources, str) else sources, limit)
    data_columns = list(dict.fromkeys(column for record in records for column in record.values))
    parse, summary = row_parser(records, data_columns, format=format, columns=columns, formats=formats, values=values)
    rows = [parse(record) for record in records]
    keys = [row.key for row in rows if isinstance(row, Row)]
    return rows, replace(summary, rows=len(keys), duplicates=len(keys) - len(set(keys)))


def row_parser(
    records: Sequence[Record],
    data_columns: list[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    formats: Collection[str] | None = None,
    values: bool = False,
) -> tuple[Callable[[Record], Row | UnusableRow], RowsSummary]:
    """Return the function that converts a record, and a summary that counts no rows yet.

    data_columns: the columns of all records. The other arguments are as in `parse_rows`."""
    candidates = _UNASKED if formats is None else formats
    name, mapping, why = _choose(data_columns, format, dict(columns or {}), records, candidates)

    def parse(record: Record) -> Row | UnusableRow:
        try:
            row = _row(name, record, mapping)
        except ValueError as error:
            return UnusableRow(record.where, str(error), record.values)
        return replace(row, values=dict(record.values)) if values else row

    used = {mapping.get(c, c) for c in format_columns(name)}
    return parse, RowsSummary(name, why, 0, [] if values else [c for c in data_columns if c not in used])


def refuse_unusable(bad: Sequence[str], rows: int, format: str) -> None:
    """Raise DataError if `bad`, a line for each unusable row, is not empty."""
    if bad:
        text = f"{len(bad)} of {rows} rows are not usable as `{format}`:\n{bullets(bad)}"
        raise DataError(text, fix=f"correct or remove them; if they are not `{format}`, set data.format")


def format_columns(format: str) -> tuple[str, ...]:
    """Return the columns of a format: required, then optional."""
    return _FORMATS[format].needed + _FORMATS[format].optional


def question_and_answer(row: Row) -> tuple[str, str, str]:
    """Return a row's prompt, trained answer and rejected answer; "" for a missing part."""

    def joined_text(messages: Sequence[Mapping[str, Any]]) -> str:
        texts = [m.get("content") or json.dumps(m.get("tool_calls") or "", ensure_ascii=False) for m in messages]
        texts = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in texts]
        if len(messages) == 1:
            return texts[0]
        return "\n".join(f"{m['role']}: {text}" for m, text in zip(messages, texts, strict=True))

    at = row.shared() if row.rejected else row.last_assistant()
    return joined_text(row.messages[:at]), row.text or joined_text(row.messages[at:]), joined_text(row.rejected[at:])


KEYS = np.dtype([("key", "V32"), ("prompt", "V16")])
"""A row's `key`, and the first half of its `prompt_key`."""


def keys_of(rows: Iterable[Row]) -> npt.NDArray[np.void]:
    """Return the keys of the rows: (rows,) KEYS."""
    pairs = (bytes.fromhex(row.key + row.prompt_key[:32]) for row in rows)
    return np.frombuffer(b"".join(pairs), KEYS)


def split_rows(rows: Sequence[Row], split: int | float | None, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows), selected by `hold_out`. See `split_default`."""
    keys = (row.key for row in rows)
    selected = hold_out(keys, len(rows), split, seed=seed, default=split_default(len(rows)))
    training = sorted({*range(len(rows))} - {*selected})
    return [rows[i] for i in training], [rows[i] for i in selected]


def split_default(rows: int) -> int:
    """Return how many rows are held out if `data.split` is not set: 5%, at most 500, and none below 20 rows."""
    return min(500, max(1, round(0.05 * rows))) if rows >= 20 else 0


def leakage(
    train: Sequence[Row],
    held_out: Sequence[Row],
    train_keys: npt.NDArray[np.void] | None = None,
    held_keys: npt.NDArray[np.void] | None = None,
) -> tuple[list[str], list[str]]:
    """Return the held-out rows that are also training rows, and those that only share a prompt with a training row.

    Each entry names both rows, as `held.jsonl:3 is train.jsonl:8`.

    train_keys, held_keys: `keys_of` the rows, if they are known."""
    theirs, ours = (
        keys_of(rows) if keys is None else keys for rows, keys in ((train, train_keys), (held_out, held_keys))
    )
    shared = list[dict[int, str]]()  # for keys, then for prompts: held-out row -> the names of both rows
    for column in ("key", "prompt"):
        candidates = np.flatnonzero(np.isin(_first_bytes(theirs[column]), _first_bytes(ours[column]))).tolist()
        first = {theirs[column][i].tobytes(): i for i in reversed(candidates)}
        found = ((i, first.get(key.tobytes())) for i, key in enumerate(ours[column]))
        shared.append({i: f"{held_out[i].where} is {train[at].where}" for i, at in found if at is not None})
    identical, prompts = shared
    return [*identical.values()], [text for i, text in prompts.items() if i not in identical]


def _first_bytes(keys: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Return the first eight bytes of each key as a number, which NumPy sorts a hundred times as fast."""
    return np.frombuffer(keys.tobytes(), np.uint64).reshape(len(keys), keys.dtype.itemsize // 8)[:, 0]


def count_duplicates(keys: npt.NDArray[np.void]) -> int:
    """Return how many keys equal an earlier key."""
    return len(keys) - len(np.unique(_first_bytes(keys)))


def data_digest(rows: Iterable[Row]) -> str:
    """Return the sha256 of the rows' contents in order.

    The digest does not depend on file names and file formats."""
    return digest_of_keys(b"".join(bytes.fromhex(row.key) for row in rows))


def digest_of_keys(keys: bytes) -> str:
    """Return the `data_digest` of rows with these keys, of 32 bytes each."""
    return "sha256:" + hashlib.sha256(keys).hexdigest()


def _choose(
    present: list[str], format: str, columns: dict[str, str], records: Sequence[Record], formats: Collection[str]
) -> tuple[str, dict[str, str], str]:
    """Return (format, column of the format -> column of the data, reason).

    Raises DataError if the columns fit no format."""
    where, have = records[0].where, f"the columns are {', '.join(present) or 'none'}"
    names = {c for name in _FORMATS for c in format_columns(name)}
    for ours, theirs in columns.items():
        if ours not in names:
            text = f"data.columns names `{ours}`, which no format has{_hint(ours, names)}"
            raise DataError(text, fix=f"the names are {', '.join(sorted(names))}")
        if theirs not in present:
            text = f"data.columns says that `{ours}` is in column `{theirs}`, which the data does not have"
            raise DataError(text, where=where, fix=f"{have}{_hint(theirs, present)}")
    for name in [each for each in _FORMATS if each in formats] if format == "auto" else [format]:
        needed = _FORMATS[name].needed
        mapping = {c: columns.get(c) or present_column(c, present, set(columns.values())) for c in needed}
        if all(mapping.values()) and set(columns) <= {*format_columns(name)}:
            mapping = columns | mapping
            renamed = [f"`{theirs}` as {ours}" for ours, theirs in mapping.items() if ours != theirs]
            why = f"by {' and '.join(f'`{c}`' for c in needed)}" if format == "auto" else "set by data.format"
            return name, mapping, why + (f" ({', '.join(renamed)})" if renamed else "")
    if format != "auto":
        needed = _FORMATS[format].needed
        missing = [c for c in needed if c not in columns and c not in present]
        text = f"data.format is `{format}`, but there is no column {' or '.join(f'`{c}`' for c in missing)}; {have}"
        advice = f"name your column: data.columns: {{{missing[0] if missing else needed[0]}: YOUR_COLUMN}}"
        raise DataError(text, where=where, fix=advice)
    fix = "name the format and columns, for example data.format: prompt-completion, "
    fix += "data.columns: {prompt: question, completion: label}"
    if "preference" in formats and "text" not in formats:
        also = " (kto: or prompt, completion and label)" if "unpaired-preference" in formats else ""
        fix = f"this run needs columns prompt, chosen and rejected{also}; name your columns in data.columns"
    raise DataError(f"the format cannot be recognised: {have}", where=where, fix=fix)


def _hint(name: str, names: Iterable[str]) -> str:
    suggestions = nearest(name, list(names), 1)
    return f"; did you mean `{suggestions[0]}`?" if suggestions else ""


def present_column(column: str, present: Sequence[str], taken: Collection[str] = ()) -> str:
    """Return the name that a format's column has in `present`: its own name, an alias, or "" if absent."""
    for name in (column, *_ALIASES.get(column, ())):
        if name in present and name not in taken:
            return name
    return ""


def _row(format: str, record: Record, mapping: Mapping[str, str]) -> Row:
    """Return the record as a Row. Raise ValueError, with the problem, for an unusable record."""
    values = {c: record.values.get(mapping.get(c, c)) for c in format_columns(format)}
    for c in _FORMATS[format].needed:
        if values[c] is None:
            theirs = mapping.get(c, c)
            suggestions = nearest(theirs, [k for k in record.values if k not in mapping.values()], 1)
            raise ValueError(f"no `{theirs}`" + (f"; did you mean `{suggestions[0]}`?" if suggestions else ""))
    tools = _decoded(values.get("tools")) or ()
    if not isinstance(tools, list | tuple):
        raise ValueError("`tools` is not a list")
    row = _FORMATS[format].convert(values)
    return replace(row, tools=row.tools or tuple(tools), where=record.where)


def _from_instruction(values: Mapping[str, Any]) -> Row:
    system, inp = (_text(values.get(c) or "", c, empty=True) for c in ("system", "input"))
    instruction, output = _text(values["instruction"], "instruction"), _text(values["output"], "output", empty=True)
    user = f"{instruction}\n\n{inp}" if inp else instruction
    first = ({"role": "system", "content": system},) if system else ()
    return Row("instruction", (*first, _user(user), _assistant(output)), instruction=(system, instruction, inp, output))


def _from_prompt(values: Mapping[str, Any]) -> Row:
    prompt = _decoded(values["prompt"])
    if isinstance(prompt, list):
        return Row("messages", _messages(prompt, "prompt"))
    return Row("prompt-completion", (_user(_text(prompt, "prompt")),))


def _from_completion(values: Mapping[str, Any]) -> Row:
    prompt, completion = _decoded(values["prompt"]), _decoded(values["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        return Row("messages", _messages([*prompt, *completion], "prompt and completion"))
    answer = _assistant(_text(completion, "completion", empty=True))
    return Row("prompt-completion", (_user(_text(prompt, "prompt")), answer))


def _from_judged(values: Mapping[str, Any]) -> Row:
    kind, messages = _conversation(_decoded(values["prompt"]), _decoded(values["completion"]), "completion")
    return Row(kind, messages, label=_label(values["label"]))


def _from_openai_pair(values: Mapping[str, Any]) -> Row:
    """Return the row for a record in OpenAI's preference format.

    Such a record has an input, which is the prompt and its tools, and a message list for each answer."""
    prompt_input = values["input"]
    if not isinstance(prompt_input, Mapping):
        raise ValueError(f"`input` should be a mapping with messages, found {_kind(prompt_input)}")
    prompt = _messages(prompt_input.get("messages"), "input.messages")
    chosen, rejected = (list(_messages(values[name], name)) for name in ("preferred_output", "non_preferred_output"))
    row = _from_pair({"prompt": list(prompt), "chosen": chosen, "rejected": rejected})
    return replace(row, tools=tuple(prompt_input.get("tools") or ()))


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _from_pair(values: Mapping[str, Any]) -> Row:
    """Return a conversation with its chosen and its rejected ending.

    Without a `prompt` column, the messages that both endings begin with are the prompt."""
    prompt = _decoded(values.get("prompt"))
    (kind, chosen), (rejected_kind, rejected) = (
        _conversation(prompt, _decoded(values[c]), c) for c in ("chosen", "rejected")
    )
    row = Row(kind if kind == rejected_kind else "messages", chosen, rejected=rejected)
    shared = row.shared()
    if chosen == rejected:
        raise ValueError("`chosen` and `rejected` are the same")
    if shared == 0:
        raise ValueError("`chosen` and `rejected` do not begin with the same prompt; give it as `prompt`")
    if shared in (len(chosen), len(rejected)):
        raise ValueError("one of `chosen` and `rejected` is the beginning of the other")
    return row


def _conversation(prompt: Any, answer: Any, name: str) -> tuple[str, tuple[dict[str, Any], ...]]:
    """Return (format, messages) of a prompt and an answer, each of which is a text or a list of messages.

    Many data sets repeat the prompt as the first message of each answer. The repeated message is removed."""
    if isinstance(answer, list):
        messages = _messages(answer, name)
        if prompt is None or (isinstance(prompt, str) and messages[0] == {"role": "user", "content": prompt}):
            return "messages", messages
    elif prompt is None:
        raise ValueError(f"`prompt` is required if `{name}` is text")
    else:
        messages = (_assistant(_text(answer, name, empty=True)),)
    if isinstance(prompt, list):
        return "messages", (*unlearned(_messages(prompt, "prompt")), *messages)
    kind = "messages" if isinstance(answer, list) else "prompt-completion"
    return kind, (_user(_text(prompt, "prompt")), *messages)


def unlearned(messages: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the messages, with weight 0 for assistant turns.

    The model reads these turns as part of the prompt, but is not trained on them."""
    return tuple({**m, "weight": 0} if m["role"] == "assistant" else m for m in messages)


def _label(value: Any) -> bool:
    """Return a label, given as a boolean or, as in CSV files, the text "true" or "false"."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"`label` should be true (desirable) or false, found {value!r}")
    return value


def _decoded(value: Any) -> Any:
    """Decode a list that a CSV or Parquet file stores as JSON text; return other values unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _text(value: Any, name: str, *, empty: bool = False) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` is {value}, which means a missing value in tables")
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"`{name}` should be text, found {_kind(value)}")
    if not value.strip() and not empty:
        raise ValueError(f"`{name}` is empty")
    return value


def _messages(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    value = _decoded(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{name}` should be a list of messages, found {_kind(value)}")
    if not value:
        raise ValueError(f"`{name}` is an empty list")
    return tuple(_message(m, f"{name}[{i}]") for i, m in enumerate(value))


def _message(m: Any, name: str) -> dict[str, Any]:
    if not isinstance(m, Mapping):
        raise ValueError(f"`{name}` should be a mapping with role and content, found {_kind(m)}")
    role, content = m.get("role"), m.get("content")
    if role not in ROLES:
        suggestions = nearest(str(role), ROLES, 1)
        hint = f" (did you mean `{suggestions[0]}`?)" if suggestions else ""
        text = f"`{name}.role` is {role!r}{hint}; roles are {', '.join(ROLES)}" if role else f"`{name}` has no role"
        raise ValueError(text)
    fields = {k: v for k, v in m.items() if v is not None}  # Parquet fills missing keys with None
    if isinstance(content, list):
        content = "".join(_part(p, name) for p in content)
    if "function_call" in fields:
        raise ValueError(f"`{name}.function_call` is the old form of tool_calls: use tool_calls")
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], f"{name}.tool_calls", role)
    if content is None and m.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"`{name}.content` should be text, found {_kind(content)}")
    if "weight" in fields and (isinstance(fields["weight"], bool) or fields["weight"] not in (0, 1)):
        raise ValueError(f"`{name}.weight` is {fields['weight']!r}; it can be 0 (not learned) or 1")
    return {**fields, "role": role, "content": content}


def _tool_calls(value: Any, name: str, role: str) -> list[Any]:
    """Return the tool calls of a message unchanged. Raise ValueError for invalid calls.

    The arguments of a call can be JSON text, as in OpenAI's format, or a mapping, as in chat templates."""
    if role != "assistant":
        raise ValueError(f"`{name}` is only allowed for the assistant, but the role is {role!r}")
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"`{name}` should be a list of calls, found {_kind(value)}")
    for i, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"`{name}[{i}]` has no function name")
        arguments = function.get("arguments", {})
        try:
            is_object = isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, Mapping)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError(f"`{name}[{i}].function.arguments` is not a JSON object: {str(arguments)[:60]!r}")
    return list(value)


def _part(part: Any, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    raise ValueError(f"`{name}.content` has a part that is not text ({kind})")


def _from_sharegpt(values: Mapping[str, Any]) -> Row:
    turns, system = _decoded(values["conversations"]), values.get("system")
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError(f"`conversations` should be a list of mappings with from and value, found {_kind(turns)}")
    messages: list[dict[str, Any]] = [{"role": "system", "content": _text(system, "system")}] if system else []
    for i, turn in enumerate(turns):
        name = f"conversations[{i}]"
        if isinstance(turn, Mapping) and ("from" in turn or "role" not in turn):
            role = _SHAREGPT.get(str(turn.get("from")))
            if role is None:
                raise ValueError(f"`{name}.from` is {turn.get('from')!r}; known roles are {', '.join(_SHAREGPT)}")
            if not isinstance(turn.get("value"), str):
                raise ValueError(f"`{name}.value` should be text, found {_kind(turn.get('value'))}")
            turn = {"role": role, "content": turn["value"], "weight": turn.get("weight")}
        messages.append(_message(turn, name))
    return Row("sharegpt", tuple(messages))


_KINDS = {
    "NoneType": "nothing",
    "str": "text",
    "int": "a number",
    "float": "a number",
    "bool": "true/false",
    "list": "a list",
    "dict": "a mapping",
}


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else _KINDS.get(type(value).__name__, type(value).__name__)


@dataclass(frozen=True)
class _Format:
    """A row format: the function that converts its columns, and the required and optional columns."""

    convert: Callable[[Mapping[str, Any]], Row]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


_FORMATS = {
    "messages": _Format(
        lambda values: Row("messages", _messages(values["messages"], "messages")),
        ("messages",),
        ("tools", "parallel_tool_calls"),
    ),
    "sharegpt": _Format(_from_sharegpt, ("conversations",), ("system", "tools")),
    "prompt-completion": _Format(_from_completion, ("prompt", "completion")),
    "instruction": _Format(_from_instruction, ("instruction", "output"), ("input", "system")),
    "text": _Format(lambda values: Row("text", text=_text(values["text"], "text")), ("text",)),
    "preference": _Format(_from_pair, ("chosen", "rejected"), ("prompt", "tools")),
    "openai-preference": _Format(_from_openai_pair, ("input", "preferred_output", "non_preferred_output")),
    "unpaired-preference": _Format(_from_judged, ("prompt", "completion", "label"), ("tools",)),
    "prompt": _Format(_from_prompt, ("prompt",), ("tools",)),
}
"""Formats, in the order in which `auto` tries them."""
PAIR_FORMATS = ("preference", "openai-preference")
"""Formats of rows with a chosen and a rejected answer."""
_UNASKED = _FORMATS.keys() - {
    "unpaired-preference",  # has the columns of prompt-completion, plus `label`, which is an ambiguous name
    "prompt",  # has nothing to train on
}
