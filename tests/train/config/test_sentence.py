"""A run in a sentence: what is read, what is not, and that a sentence is the same as its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.load import config_from, load_config
from veneer.train.config.sentence import CLAUSES, is_sentence, read_sentence, sentence_of
from veneer.train.config.text import TrainConfig

ROOT = Path(__file__).parents[3]


def test_a_sentence_is_the_configuration_that_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said, sources = load_config(
        "teach smollm2-135m from tickets.jsonl and more/*.jsonl with a learning rate of 5e-4, for 1,200 steps, rank 8, "
        "4 rows a step, hold out 10%, optimizer.name=adafactor, call it support."
    )
    written, _ = config_from(
        {
            "base": "smollm2-135m",
            "data": {"train": ["tickets.jsonl", "more/*.jsonl"], "split": 0.1},
            "optimizer": {"learning_rate": 5e-4, "name": "adafactor"},
            "schedule": {"steps": 1200},
            "adapter": {"rank": 8},
            "batching": {"rows": 4},
            "output": "runs/support",
        }
    )
    assert said == written
    assert str(sources["adapter.rank"]) == "override `adapter.rank=8`"


def test_a_folder_is_of_pictures_and_what_is_given_after_the_sentence_counts(tmp_path: Path) -> None:
    (tmp_path / "my drawings").mkdir()
    said, _ = load_config(
        f'teach catalogue-flux from "{tmp_path}/my drawings", as a style, '
        'trigger sks, sample "a cat", sample "a dog, red"',
        ["adapter.rank=4"],
    )
    assert isinstance(said, ImageTrainConfig)
    assert (said.preset, said.data.trigger, said.adapter.rank) == ("style", "sks", 4)
    assert said.samples.prompts == ("a cat", "a dog, red")
    assert Path(said.output.directory).name == "my-drawings"
    named, _ = load_config("teach catalogue-flux from the folder drawings")  # which need not be there to be named
    assert isinstance(named, ImageTrainConfig)
    slid, _ = load_config("teach catalogue-flux slide from 'a sad face' to 'a happy face'")
    assert isinstance(slid, ImageTrainConfig)
    assert (slid.slider.negative, slid.slider.positive) == ("a sad face", "a happy face")


def test_what_is_said_of_a_configuration_calls_data_as_it_is_called_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"base": "b", "data": {"train": str(tmp_path / "more" / "a.jsonl")}, "schedule": {"epochs": 1}}
    config, _ = config_from({**values, "output": "runs/x"})
    said = sentence_of(config.model_dump(mode="json", exclude_unset=True))
    assert said == "teach b from more/a.jsonl, 1 epoch, call it x"
    assert config_from({}, read_sentence(said).overrides)[0] == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("teach smollm2-135m from a.jsonl, rnak 16", "`rnak 16` is not read: did you mean `rank N`?"),
        ("teach smollm2-135m from a.jsonl, rank lots", "`rank lots` is not read: it is said as `rank N`, where N is"),
        ("teach smollm2-135m from a.jsonl, rank 4, rank 8", "`rank 4` said it already"),
        ("teach smollm2-135m from a.jsonl, 16 rosw", "`16 rosw` is not read: did you mean `N rows each step`?"),
        ("teach smollm2-135m from a.jsonl beautifully", "`beautifully` is not read"),
        ("teach smollm2-135m, rank 4", "it does not say what is learned"),
        ("teach from a.jsonl", "it does not say what it teaches"),
        ("teach smollm2-135m from a.jsonl, rank 0", "adapter.rank"),
        ("teach smollm2-135m from a.jsonl, optimiser.name=sgd", "optimiser"),
    ],
)
def test_what_is_not_read_is_an_error_with_what_would_be(text: str, says: str) -> None:
    assert is_sentence(text)
    with pytest.raises(ConfigError) as caught:
        load_config(text)
    assert says in str(caught.value)


def test_half_a_sentence_is_read_as_far_as_it_goes() -> None:
    text = "teach smollm2-135m from tickets.jsonl, rank 16, nonsense here, 30 st"
    said = read_sentence(text)
    assert [one.key for one in said.read] == ["base", "data.train", "adapter.rank"]
    assert [(one.words, text[one.start : one.end]) for one in said.unread] == [
        ("nonsense here", "nonsense here"),
        ("30 st", "30 st"),
    ]
    for end in range(len(text)):  # as it is typed
        read_sentence(text[:end])
    assert not is_sentence("teach.yaml")
    assert not is_sentence("runs/teach me.yaml")


_WORDS = st.text("abcdefgh .,'\"\\%=/“”", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
_PATHS = st.from_regex(r"[a-z]{1,6}( [a-z]{1,4})?\.jsonl", fullmatch=True)


@example({"adapter.rank": 1, "data.train": ["a.jsonl", "b.jsonl"], "samples.prompts": ["a", "the"]})
@given(
    st.fixed_dictionaries(
        {"adapter.rank": st.integers(1, 9999), "data.train": st.lists(_PATHS, min_size=2, max_size=3, unique=True)},
        optional={
            "adapter.alpha": st.floats(0.001, 1e6),
            "optimizer.learning_rate": st.floats(1e-7, 1),
            "schedule.steps": st.integers(1, 10**6),
            "data.split": st.one_of(st.integers(0, 99), st.floats(0.01, 0.9)),
            "data.validation": _WORDS,
            "adapter.start": _WORDS,
            "base.quantise": st.sampled_from(["nf4", "int8", "fp4"]),
            "seed": st.integers(0, 9),
            "data.long_rows": st.sampled_from(["cut", "drop", "refuse"]),
            "adapter.dora": st.booleans(),
            "data.columns": st.dictionaries(st.sampled_from(["prompt", "completion"]), _WORDS),
            "report.tags": st.lists(_WORDS, max_size=2),
            "samples.prompts": st.lists(_WORDS, min_size=1, max_size=3),
        },
    )
)
def test_what_a_sentence_is_made_of_is_read_from_it(values: dict[str, Any]) -> None:
    from veneer.train.config.load import parse_yaml

    nested: dict[str, Any] = {"base": {"name": "a base"}, "output": {"directory": "runs/x"}}
    for key, value in values.items():
        section, _, rest = key.partition(".")
        nested |= {section: {**nested.get(section, {}), rest: value}} if rest else {section: value}
    said = read_sentence(sentence_of(nested))
    assert said.whole, (said.text, said.unread)
    read = {line.partition("=")[0]: parse_yaml(line.partition("=")[2], "")[0] for line in said.overrides}
    assert read == {**values, "base": "a base", "output.directory": "runs/x"}


def test_the_page_has_every_clause_and_each_is_of_a_setting_that_there_is() -> None:
    page = (ROOT / "docs" / "how-to" / "train.md").read_text()
    known = {*TrainConfig.model_fields, *ImageTrainConfig.model_fields}
    for clause in CLAUSES:
        assert f"| `{clause.words}` | `{clause.key}` | {clause.meaning} |" in page
        assert clause.key.partition(".")[0] in known
