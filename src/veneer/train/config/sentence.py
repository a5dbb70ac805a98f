"""A run in one sentence, as one would say it: the shortest configuration.

    said = read_sentence("teach smollm2-135m from tickets.jsonl, rank 16, 300 steps")
    said.read[1]        SaidSetting(words="rank 16", key="adapter.rank", value=16, …)
    said.unread         () or what of it means nothing, with the nearest that does
    said.overrides      ['base="smollm2-135m"', 'data.train="tickets.jsonl"', 'adapter.rank=16', …]

It is a small grammar and guesses nothing: `teach BASE`, then clauses in any order, each of them one of `CLAUSES`, or a
setting as `optimizer.name=adafactor`. Commas and small words (and, with, for, at, a, each, the, of, in, …) part clauses
and mean nothing. A word with spaces stands in quotes. What is not read is an error (`checked`), never left out. The
overrides are those of the command line, so a sentence is read as strictly as a file, and paths are of the current
folder. Knows words alone; `config.load` makes a configuration of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, bullets, nearest

_FIRST = "teach"
_SMALL = frozenset({"a", "an", "and", "at", "each", "for", "in", "of", "per", "the", "using", "with"})
"""Words that mean nothing by themselves."""
_WORD = re.compile(r"""(?:\d,(?=\d{3}(?!\d))|\\.|"(?:\\.|[^"\\])*"|'[^']*'|“[^”]*”|[^\s,;"'“”])+""")
_QUOTED = re.compile(r""""((?:\\.|[^"\\])*)"|'([^']*)'|“([^”]*)”""")
_SETTING = re.compile(r"[a-z_]+(?:\.\w+)+=.+", re.DOTALL)
_WHOLE = re.compile(r"\d+(?:[,_]\d{3})*")
_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class SentenceClause:
    """A clause. `words`: as it is said, in capitals what stands for a value: N a whole number, X a number, SHARE a
    number of rows or a share of them as 10%, WORD a word, PATHS one or more files. `key`: the setting that it is.
    `value`: where the words say it themselves. `many`: it may be said several times, and they are a list."""

    words: str
    key: str
    meaning: str
    value: Any = None
    many: bool = False


CLAUSES = (
    SentenceClause("from folder WORD", "data.pictures", "pictures, with captions beside them"),
    SentenceClause("from pictures WORD", "data.pictures", "the same"),
    SentenceClause("from PATHS", "data.train", "rows; of a folder its pictures"),
    SentenceClause("slide from WORD to WORD", "slider", "a slider between two prompts, without pictures"),
    SentenceClause("call it WORD", "output.directory", "its name; it is written to runs/NAME"),
    SentenceClause("rank N", "adapter.rank", "rank of every pair"),
    SentenceClause("alpha X", "adapter.alpha", "the scale is alpha / rank"),
    SentenceClause("learning rate X", "optimizer.learning_rate", "peak learning rate"),
    SentenceClause("N steps", "schedule.steps", "optimizer steps"),
    SentenceClause("N epochs", "schedule.epochs", "times over the data"),
    SentenceClause("N rows each step", "batching.rows", "rows of a step"),
    SentenceClause("N pictures each step", "batching.rows", "pictures of a step"),
    SentenceClause("hold out SHARE", "data.split", "held out: a number of them, or a share as 10%"),
    SentenceClause("validate on WORD", "data.validation", "held out: what is in this file or folder"),
    SentenceClause("go on from WORD", "adapter.start", "an adapter to go on training"),
    SentenceClause("checkpoint every N steps", "checkpoint.every", "steps between checkpoints"),
    SentenceClause("publish checkpoints", "checkpoint.adapters", "each can be asked while it trains", True),
    SentenceClause("score every N steps", "evaluation.every", "steps between looks at what is held out"),
    SentenceClause("4 bits", "base.quantise", "the frozen base in 4 bits", "nf4"),
    SentenceClause("8 bits", "base.quantise", "the frozen base in 8 bits", "int8"),
    SentenceClause("seed N", "seed", "fixes what is drawn"),
    SentenceClause("rows up to N tokens", "data.max_length", "longest row"),
    SentenceClause("drop long rows", "data.long_rows", "longer rows are left out", "drop"),
    SentenceClause("cut long rows", "data.long_rows", "longer rows are cut", "cut"),
    SentenceClause("prefer by WORD", "preference.loss", "pairs of answers are learned by dpo, ipo, orpo, kto, simpo"),
    SentenceClause("distil from WORD", "distillation.teacher", "a teacher's words are learned: an adapter, or base"),
    SentenceClause("trigger WORD", "data.trigger", "the word for what the pictures show"),
    SentenceClause("as WORD", "preset", "settings for a style, a subject or a product"),
    SentenceClause("N pixels", "data.resolution", "side of the pictures"),
    SentenceClause("sample every N steps", "samples.every", "steps between sample pictures"),
    SentenceClause("sample WORD", "samples.prompts", "a prompt that is drawn as it learns", many=True),
)
"""Everything that a sentence can say beside the base, in the order in which it is tried."""
_SLOTS = frozenset({"N", "X", "SHARE", "WORD", "PATHS"})
_MEANT = {"N": "a whole number", "X": "a number", "SHARE": "a number of rows, or a share as 10%"}
_PLACES = ("slider.negative", "slider.positive")


@dataclass(frozen=True)
class SaidSetting:
    """A part of the sentence that was read. `start`, `end`: where it stands in the text."""

    words: str
    key: str
    value: Any
    start: int
    end: int


@dataclass(frozen=True)
class UnreadWords:
    """A part of the sentence that means nothing. `hint`: what would."""

    words: str
    hint: str
    start: int
    end: int


@dataclass(frozen=True)
class Sentence:
    """A sentence as it was read. `missing`: what it still has to say."""

    text: str
    read: tuple[SaidSetting, ...]
    unread: tuple[UnreadWords, ...]
    missing: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return not self.unread and not self.missing

    @property
    def overrides(self) -> list[str]:
        """What was read, as `section.key=value`; where nothing says how it is called, by what it is learned from."""
        out = [f"{said.key}={_yaml(said.value)}" for said in self.read]
        if not any(said.key.startswith("output") for said in self.read):
            out.append(f"output.directory={_yaml(f'runs/{_name_of(self.read)}')}")
        return out

    def checked(self) -> Sentence:
        """Raises ConfigError with every word that means nothing, and what is missing."""
        wrong = [f"`{unread.words}` is not read: {unread.hint}" for unread in self.unread]
        wrong += [f"it does not say {missing}" for missing in self.missing]
        if wrong:
            what = wrong[0] if len(wrong) == 1 else f"{len(wrong)} things are wrong:\n{bullets(wrong, None)}"
            fix = "as in: teach smollm2-135m from tickets.jsonl, rank 16 (docs/how-to/train.md has all clauses)"
            raise ConfigError(what, where="the sentence", fix=fix)
        return self


def is_sentence(text: str | os.PathLike[str]) -> bool:
    """Whether what was given in a configuration's place is a sentence, and no file's name."""
    words = os.fspath(text).split()
    return len(words) > 1 and words[0].lower() == _FIRST


def read_sentence(text: str) -> Sentence:
    """Everything that `text` says and does not say; raises nothing, for it may be half typed."""
    words = [word for word in _words(text) if word.quoted or word.text.lower() not in _SMALL]
    read, wrong = list[SaidSetting](), list[tuple[_Word, str]]()
    at = 0
    if words and words[0].text.lower() == _FIRST:
        at = 1
        if len(words) > 1 and (words[1].quoted or _clause(words, 1) is None):
            at = 2
            read.append(SaidSetting(text[words[0].start : words[1].end], "base", words[1].text, 0, words[1].end))
    while at < len(words):
        found = _clause(words, at)
        if found is None:
            wrong.append((words[at], _hint(words, at)))
            at += 1
            continue
        settings, end = found
        start, stop = words[at].start, words[end - 1].end
        for key, value, many in settings:
            before = next((said for said in read if said.key == key), None)
            if before is not None and not many:
                wrong.append((_Word(text[start:stop], start, stop, True), f"`{before.words}` said it already"))
                continue
            if before is not None:
                read.remove(before)
                value = [*before.value, *value]
            read.append(SaidSetting(text[start:stop], key, value, start, stop))
        at = end
    keys = {said.key for said in read}
    missing = ["what it teaches: teach BASE"] if "base" not in keys else []
    if not keys & {"data.train", "data.pictures", "slider.positive"}:
        missing.append("what is learned: from FILE, or from a folder of pictures")
    return Sentence(text, tuple(read), _together(text, wrong), tuple(missing))


def sentence_of(values: Mapping[str, Any]) -> str:
    """The sentence that says a configuration's values, those that have no clause as `section.key=value`; data below
    the current folder are called as from there. `read_sentence` of it reads the same."""
    flat = {key: _from_here(key, value) for key, value in _flat(values) if value is not None}
    base = flat.pop("base.name", flat.pop("base", ""))
    parts = [f"{_FIRST} {_word(str(base))}"]
    output = flat.pop("output.directory", flat.pop("output", None))
    if all(key in flat for key in _PLACES):
        parts[0] += f" slide from {_word(str(flat.pop(_PLACES[0])))} to {_word(str(flat.pop(_PLACES[1])))}"
    for key, value in flat.items():
        parts += _said(key, value) or [f"{key}={_quoted(_yaml(value))}"]
    first = [part for part in parts[1:] if part.startswith("from ")]
    parts = [" ".join([parts[0], *first]), *(part for part in parts[1:] if part not in first)]
    if output is not None:
        folder = Path(str(output))
        parts.append(f"call it {_word(folder.name if folder.parent.name == 'runs' else str(folder))}")
    return ", ".join(parts)


# -- words -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int
    quoted: bool


def _words(text: str) -> Iterator[_Word]:
    for found in _WORD.finditer(text):
        whole, plain = _QUOTED.fullmatch(found[0]), found[0].rstrip(".") or found[0]
        if whole:
            inside = next(group for group in whole.groups() if group is not None)
            yield _Word(re.sub(r"\\(.)", r"\1", inside), found.start(), found.end(), True)
        else:
            yield _Word(plain, found.start(), found.start() + len(plain), False)


_Read = tuple[list[tuple[str, Any, bool]], int]


def _clause(words: list[_Word], at: int) -> _Read | None:
    """The settings (key, value, whether several are a list) that begin at a word, and where the next words are."""
    if not words[at].quoted and _SETTING.fullmatch(words[at].text):
        key, _, value = words[at].text.partition("=")
        inner = _QUOTED.fullmatch(value)
        plain = next(g for g in inner.groups() if g is not None) if inner else value
        return [
            (key, _Plain(re.sub(r"\\(.)", r"\1", plain) if inner and inner[1] is not None else plain), False)
        ], at + 1
    for clause in CLAUSES:
        if (found := _matched(clause, words, at)) is not None:
            return found
    return None


class _Plain(str):
    """YAML as it was given."""


def _matched(clause: SentenceClause, words: list[_Word], at: int) -> _Read | None:
    values = list[Any]()
    for wanted in (word for word in clause.words.split() if word not in _SMALL):
        if at >= len(words):
            return None
        if wanted not in _SLOTS:
            if words[at].quoted or not _same(words[at].text, wanted):
                return None
        elif wanted == "PATHS":
            paths = [words[at].text]
            while at + 1 < len(words) and _is_path(words[at + 1]) and _clause(words, at + 1) is None:
                at += 1
                paths.append(words[at].text)
            values.append(paths[0] if len(paths) == 1 else paths)
        elif (value := _value(wanted, words[at])) is None:
            return None
        else:
            values.append(value)
        at += 1
    if clause.key == "slider":
        return [(key, value, False) for key, value in zip(_PLACES, values, strict=True)], at
    value = clause.value if clause.value is not None else values[0]
    if clause.key == "data.train" and isinstance(value, str) and os.path.isdir(os.path.expanduser(value)):
        return [("data.pictures", value, False)], at
    if clause.key == "output.directory" and "/" not in value:
        value = f"runs/{value}"
    return [(clause.key, [value] if clause.many else value, clause.many)], at


def _same(word: str, wanted: str) -> bool:
    return word.lower().removesuffix("s") == wanted.removesuffix("s")


def _is_path(word: _Word) -> bool:
    return not _NUMBER.fullmatch(word.text) and (word.quoted or any(sign in word.text for sign in "./*:"))


def _value(slot: str, word: _Word) -> Any:
    text = word.text
    if slot == "WORD":
        return text
    if slot in ("N", "SHARE") and _WHOLE.fullmatch(text):
        return int(re.sub("[,_]", "", text))
    if slot == "SHARE" and text.endswith("%") and _NUMBER.fullmatch(text[:-1]):
        return float(text[:-1]) / 100
    return float(text) if slot != "N" and _NUMBER.fullmatch(text) else None


def _hint(words: list[_Word], at: int) -> str:
    """What the words from here on were near to."""
    text, given = words[at].text, bool(_NUMBER.fullmatch(words[at].text))
    if at == 0:
        return f"a sentence begins with {_FIRST}"
    if given and at + 1 < len(words):
        text = words[at + 1].text
    fitting = sorted(CLAUSES, key=lambda clause: clause.words.startswith(("N ", "X ")) is not given)
    begun = [c.words for c in fitting if c.words[0].islower() and _same(text, c.words.split()[0])]
    heads = dict[str, str]()
    for clause in fitting:
        heads = {**{word: clause.words for word in clause.words.split() if word not in _SLOTS | _SMALL}, **heads}
    if begun:
        slots = [f"{slot} is {_MEANT[slot]}" for slot in _MEANT if slot in begun[0].split()]
        return f"it is said as `{begun[0]}`" + (f", where {slots[0]}" if slots else "")
    if "=" in text:
        return "a setting is section.key=value, as optimizer.name=adafactor"
    near = nearest(text.lower(), heads, 1)
    return f"did you mean `{heads[near[0]]}`?" if near else "it is none of the clauses (docs/how-to/train.md)"


def _together(text: str, wrong: list[tuple[_Word, str]]) -> tuple[UnreadWords, ...]:
    """Neighbours with nothing but space between them are one, by the hint of the first that has one."""
    out = list[UnreadWords]()
    for word, hint in sorted(wrong, key=lambda one: one[0].start):
        last = out[-1] if out else None
        if last is not None and not text[last.end : word.start].strip():
            keep = last.hint if not last.hint.startswith("it is none") else hint
            out[-1] = UnreadWords(text[last.start : word.end], keep, last.start, word.end)
        else:
            out.append(UnreadWords(text[word.start : word.end], hint, word.start, word.end))
    return tuple(out)


def _name_of(read: tuple[SaidSetting, ...]) -> str:
    """What a run is called by what it learns: the name of its first file or folder, or where its slider leads."""
    found = {said.key: said.value for said in read}
    source = found.get("data.train") or found.get("data.pictures") or found.get("slider.positive") or ""
    first = str(source[0] if isinstance(source, list) else source).rstrip("/")
    stem = Path(first.rpartition(":")[2]).stem
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "adapter"


# -- and back ----------------------------------------------------------------------------------------------------------


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and not before:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{before}{key}", value


def _from_here(key: str, value: Any) -> Any:
    """Of data, a path below the current folder without it."""
    here = os.path.join(os.getcwd(), "")
    if isinstance(value, list | tuple):
        return [_from_here(key, each) for each in value]
    inside = isinstance(value, str) and key.startswith("data.") and value.startswith(here) and len(value) > len(here)
    return value[len(here) :] if inside else value


def _said(key: str, value: Any) -> list[str]:
    """The clause of a setting, or several; nothing where none says it as it is."""
    for clause in (clause for clause in CLAUSES if clause.key == key):
        if clause.value is not None:
            if clause.value == value:
                return [clause.words]
            continue
        each = list(value) if isinstance(value, list | tuple) else [value]
        slot = next(word for word in clause.words.split() if word in _SLOTS)
        if slot == "PATHS" and all(_is_path(_Word(str(one), 0, 0, False)) for one in each):
            return [clause.words.replace("PATHS", " and ".join(_word(str(one)) for one in each))]
        if slot == "PATHS" or (len(each) > 1 and not clause.many):
            continue
        words = [_word(_number(one) if isinstance(one, float) else str(one)) for one in each]
        if [_value(slot, next(_words(word))) for word in words] == each:
            return [_counted(clause.words, slot, word) for word in words]
    return []


def _counted(clause: str, slot: str, word: str) -> str:
    """The clause with its value: 2 epochs, 1 epoch."""
    said = clause.replace(slot, word)
    return re.sub(r"^1 (\w+?)s\b", r"1 \1", said) if slot == "N" else said


def _word(text: str) -> str:
    """A word as it can stand in a sentence: in quotes where it is none by itself."""
    found = list(_words(text))
    plain = len(found) == 1 and not found[0].quoted and found[0].text == text and text.lower() not in _SMALL
    return text if plain and not re.search(r"""["'“”\\]""", text) else _in_quotes(text)


def _number(value: float) -> str:
    return short if float(short := f"{value:g}") == value else repr(value)


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w.:/+-]+", text) else _in_quotes(text)


def _in_quotes(text: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _yaml(value: Any) -> str:
    return value if isinstance(value, _Plain) else json.dumps(value, ensure_ascii=False)
