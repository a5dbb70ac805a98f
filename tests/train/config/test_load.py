from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families import llama3
from tests.tiny_base import VOCAB_SIZE, tiny_tokenizer
from tests.train.text.test_preflight import TinyBase
from veneer.errors import ConfigError
from veneer.train.config.image import ImageTrainConfig, image_reference
from veneer.train.config.load import common_settings, config_from, load_config, parse_yaml, settings_of, short_names
from veneer.train.config.rewards import REWARD_KINDS
from veneer.train.config.section import Section
from veneer.train.config.text import SECTIONS, layer_indices, reference, sections
from veneer.train.inspect import inspect_run
from veneer.train.text.data import TextData, encode_split
from veneer.train.text.rows import read_rows, split_rows

ROOT = Path(__file__).parents[3]
MINIMAL = "base: smollm2-135m\ndata:\n  train: rows.jsonl\noutput: out\n"


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    file = tmp_path / name
    file.write_text(text)
    return file


def error(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value)


def test_options_settings_and_values_make_one_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = common_settings(base="smollm2-135m", data=("desk.jsonl", "more/*.jsonl"), rank=8, learning_rate=5e-4)
    made, sources = load_config(None, [*settings, "optimizer.name=adafactor"])
    written, _ = config_from(
        {
            "base": "smollm2-135m",
            "data": {"train": ["desk.jsonl", "more/*.jsonl"]},
            "adapter": {"rank": 8},
            "optimizer": {"learning_rate": 5e-4, "name": "adafactor"},
            "output": "runs/desk",
        }
    )
    assert made == written
    assert sources["adapter.rank"] == "override `adapter.rank=8`"
    assert load_config(None, settings_of(made.model_dump(mode="json", exclude_unset=True)))[0] == made
    short, others = short_names(settings)
    assert short == {"base": "smollm2-135m", "rank": "8", "learning_rate": "0.0005"}
    assert others == ['data.train=["desk.jsonl", "more/*.jsonl"]']


def test_a_folder_means_images_and_names_the_output(tmp_path: Path) -> None:
    (tmp_path / "my drawings").mkdir()
    made, _ = load_config(None, common_settings(base="catalogue-flux", data=f"{tmp_path}/my drawings"))
    assert Path(made.output.directory).name == "my-drawings"
    slider = ["base=catalogue-flux", "slider.negative=a sad face", "slider.positive=a happy face"]
    assert Path(load_config(None, slider)[0].output.directory).name == "a-happy-face"


def test_data_names_can_be_invalid_file_names() -> None:
    assert common_settings(data="x" * 1500) == [f"data.train={'x' * 1500}"]


def test_each_value_has_its_source(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "optimizer:\n  learning_rate: 5e-4\n")
    config, sources = load_config(file, ["adapter.rank=8", "schedule.warmup=0.1"])
    assert (config.base.name, config.optimizer.learning_rate, config.adapter.rank) == ("smollm2-135m", 5e-4, 8)
    assert sources["base.name"] == f"{file}:1"
    assert sources["optimizer.learning_rate"] == f"{file}:6"
    assert sources["adapter.rank"] == "override `adapter.rank=8`"
    assert sources["adapter.targets"].startswith("default (adapting only attention layers")
    assert set(sources) == {f"{s}.{k}" for s, m in SECTIONS.items() for k in m.model_fields} | {"seed"}


@pytest.mark.parametrize(
    ("text", "value"), [("5e-4", 5e-4), ("1E-3", 1e-3), ("0.001", 0.001), (".5", 0.5), ("1", 1.0), ("1_0.5", 10.5)]
)
def test_numbers_can_be_written_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    for content, overrides in (
        (f"optimizer: {{learning_rate: {text}}}\n", []),
        ("", [f"optimizer.learning_rate={text}"]),
    ):
        assert load_config(write(tmp_path, MINIMAL + content), overrides)[0].optimizer.learning_rate == value


def test_on_and_off_are_strings(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "memory:\n  activation_checkpointing: on\n")
    assert load_config(file)[0].memory.activation_checkpointing == "on"
    assert load_config(file, ["memory.activation_checkpointing=off"])[0].memory.activation_checkpointing == "off"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("optimizer: {learnin_rate: 1}", "`optimizer.learnin_rate`; did you mean `optimizer.learning_rate`?"),
        ("optimizers: {learning_rate: 1}", "unknown key `optimizers`; did you mean `optimizer`?"),
        ("learning_rate: 1", "unknown key `learning_rate`; did you mean `optimizer.learning_rate`?"),
        ("optimizer: {rank: 4}", "unknown key `optimizer.rank`; did you mean `adapter.rank`?"),
        ("adapter: {zzz: 4}", "unknown key `adapter.zzz`; valid keys: rank, alpha"),
        ("adapter: {factor: 4}", "`adapter.factor` needs `adapter.kind: lokr`"),
        ("adapter: {kind: loha, dora: true}", "`adapter.dora` needs `adapter.kind: lora`"),
        ("adapter: {kind: loha, factor: 8}", "`adapter.factor` needs `adapter.kind: lokr`"),
        ("adapter: {kind: lokr, modules_to_save: [x]}", "`adapter.modules_to_save` needs `adapter.kind: lora`"),
        ("adapter: {kind: lokr}\noptimizer: {loraplus_ratio: 4.0}", "`optimizer.loraplus_ratio` needs A and B"),
        ("adapter: {rank: '16'}", '`adapter.rank` should be a valid integer, found "16"'),
        ("adapter: {rank: 1.5}", "`adapter.rank` should be a valid integer, found 1.5"),
        ("adapter: {rank: true}", "`adapter.rank` should be a valid integer, found true"),
        ("adapter: {rank: 0}", "`adapter.rank` should be greater than 0, found 0"),
        ("adapter: {targets: 5}", "`adapter.targets` should be a valid string or a list, found 5"),
        ("adapter: {dora: yes}", '`adapter.dora` should be a valid boolean, found "yes"'),
        ("adapter: {layers: 3-1}", "`adapter.layers: 3-1` is not a list of block numbers or ranges"),
        ("optimizer: {learning_rate: fast}", '`optimizer.learning_rate` should be a valid number, found "fast"'),
        ("optimizer: {learning_rate: .nan}", "`optimizer.learning_rate` should be"),
        ("optimizer: {name: lion}", "`optimizer.name` should be 'adamw', 'adam'"),
        ("optimizer: 3", "`optimizer` should be a section"),
        ("optimizer: {betas: [0.9, 1.0]}", "`optimizer.betas` should be less than 1, found 1.0"),
        ("batching: {mode: pack}", "`batching.mode: pack` needs `batching.tokens`"),
        ("batching: {tokens: 100}", "`batching.tokens` needs `batching.mode: pack`"),
        ("batching: {mode: pack, tokens: 9999, rows: 4}", "`batching.rows` needs `batching.mode: bucket`"),
        ("schedule: {epochs: 1, steps: 10}", "both set the length of the run"),
        ("schedule: {warmup: 1.5}", "`schedule.warmup: 1.5` is a share of all steps"),
        ("checkpoint: {every: 0}", "`checkpoint.every` should be greater than 0 or 'epoch', found 0"),
        ("evaluation: {every: sometimes}", "`evaluation.every` should be a valid integer or 'epoch', found"),
        ("seed: -1", "`seed` should be greater than or equal to 0"),
    ],
)
def test_invalid_settings_are_named_with_their_location(tmp_path: Path, line: str, says: str) -> None:
    assert says in error(tmp_path, MINIMAL + line + "\n")


@pytest.mark.parametrize("key", ["output", "data.train"])
def test_an_empty_path_is_refused(tmp_path: Path, key: str) -> None:
    assert "is empty" in error(tmp_path, MINIMAL, f"{key}=''")


def test_unknown_keys_are_named_with_their_location(tmp_path: Path) -> None:
    text = error(tmp_path, MINIMAL + "adapter:\n  rank: 8\n  rnak: 4\n", "adapter.aplha=3")
    assert "did you mean `adapter.rank`? (" in text
    assert "run.yaml:7)" in text
    assert "did you mean `adapter.alpha`? (override `adapter.aplha=3`)" in text


def test_all_errors_are_listed_at_once(tmp_path: Path) -> None:
    wrong = "data: {train: x.jsonl, splt: 3}\nadapter: {rank: a}\nbatching: {rows: 0}\n"
    text = error(tmp_path, wrong, "x", "batching=3")
    assert text.startswith("7 things are wrong:")
    required = ("`base.name` is required", "`output.directory` is required")
    assert all(part in text for part in (*required, "data.splt", "adapter.rank", "batching.rows"))
    both = "data: {train: x, validation: y, split: 3}\nbase: b\noutput: o\nschedule: {epochs: 1, steps: 2}\n"
    assert error(tmp_path, both).startswith("2 things are wrong:")
    nothing_held = "base: b\noutput: o\ndata: {train: x, split: 0}\nevaluation: {patience: 3}\n"
    assert "`evaluation.patience` needs held-out rows" in error(tmp_path, nothing_held)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: [", "not valid YAML"),
        ("- a\n- b\n", "expected sections"),
        ("just text", "expected sections"),
        (MINIMAL + "seed: 1\nseed: 2\n", "`seed` occurs twice, on lines 5 and 6"),
        ("base: a\n\tdata: b\n", "not valid YAML"),
        ("", "`base.name` is required"),
    ],
)
def test_files_that_are_not_a_configuration(tmp_path: Path, text: str, says: str) -> None:
    assert says in error(tmp_path, text)


def test_a_base_given_as_configuration_gets_a_hint(tmp_path: Path) -> None:
    weights = tmp_path / "base.gguf"
    weights.write_bytes(b"GGUF\xbd\x00")
    for base in (tmp_path, weights):
        with pytest.raises(ConfigError, match="the configuration file cannot be read") as caught:
            load_config(base)
        assert "`base:`" in str(caught.value.fix)
        assert "Errno" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "support.yaml")
    with pytest.raises(ConfigError, match=r"did you mean .*support\.yaml\?"):
        load_config(tmp_path / "suport.yaml")


def test_file_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs"
    here = tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    (folder / "model").mkdir()
    monkeypatch.chdir(here)
    text = "base: model\ndata: {train: [a.jsonl, '*.csv', org/set, 'hub:x/y@z'], chat_template: t.jinja}\noutput: out\n"
    config, _ = load_config(write(folder, text), ["data.validation=v.jsonl"])
    assert config.base.name == str(folder / "model")
    assert config.data.files("train") == (str(folder / "a.jsonl"), str(folder / "*.csv"), "hub:org/set", "hub:x/y@z")
    assert config.data.chat_template == str(folder / "t.jinja")
    assert config.output.directory == str(folder / "out")
    assert config.data.files("validation") == (str(here / "v.jsonl"),)
    assert load_config(write(folder, text), ["output=o"])[0].output.directory == str(here / "o")
    assert load_config(write(folder, text), ["base=org/model"])[0].base.name == "org/model"


def test_the_recipe_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, MINIMAL))
    assert str(tmp_path) not in str(config.recipe())
    assert config.recipe()["data"]["train"] == "rows.jsonl"


def test_an_override_can_set_one_entry_of_a_mapping(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "adapter:\n  rank_pattern: {q_proj: 4}\n")
    config, _ = load_config(file, ["adapter.rank_pattern.layers.0.v_proj=8"])
    assert config.adapter.rank_pattern == {"q_proj": 4, "layers.0.v_proj": 8}


def test_the_adapter_section_becomes_cores_spec(tmp_path: Path) -> None:
    own = ["adapter.layers=0-2,5", "adapter.targets=[q_proj, .v_proj]", "adapter.alpha=7"]
    spec = load_config(write(tmp_path, MINIMAL), own)[0].adapter.spec()
    assert (spec.layers, spec.targets, spec.alpha, spec.rank) == ((0, 1, 2, 5), ("q_proj", ".v_proj"), 7.0, 16)


def test_layer_ranges() -> None:
    assert layer_indices("0-2, 7") == (0, 1, 2, 7)
    assert layer_indices([3, 1]) == (3, 1)
    assert layer_indices(None) is None


def test_a_configuration_can_be_a_dictionary() -> None:
    values: dict[str, Any] = {"base": "b", "data": {"train": "hub:a/b", "split": 0.1}, "output": os.devnull}
    config, sources = config_from(values, ["seed=3"])
    assert (config.seed, config.data.split, config.epochs) == (3, 0.1, 3)
    assert sources["seed"] == "override `seed=3`"
    assert config_from(values, ["schedule.steps=5"])[0].epochs is None


@pytest.mark.parametrize("model", [*SECTIONS.values(), *sections(ImageTrainConfig).values(), *REWARD_KINDS.values()])
def test_every_key_has_a_description(model: type[Section]) -> None:
    assert model.__doc__
    assert all(f.description or key == "kind" for key, f in model.model_fields.items())


@pytest.mark.parametrize(("file", "page"), [("config.md", reference), ("image-config.md", image_reference)])
def test_the_reference_pages_are_up_to_date(file: str, page: Callable[[], str]) -> None:
    assert (ROOT / "docs" / "reference" / file).read_text() == page()  # to update: run the command in the file


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_shipped_examples_pass_a_dry_run(file: Path, tmp_path: Path) -> None:
    """Reads, splits, encodes and inspects each example's rows with the tiny base.

    No finding may stop a run, and no row may be unused or cut.
    """
    config, _ = load_config(file, [f"output={tmp_path / 'out'}"])
    rows, about = read_rows(
        config.data.files("train"), format=config.data.format, columns=config.data.columns, limit=config.data.limit
    )
    train, held = split_rows(rows, config.data.split, seed=config.seed)
    model = llama3(vocab_size=VOCAB_SIZE, max_position_embeddings=4096)
    base: Any = TinyBase(model, tiny_tokenizer(), context=4096)
    report = inspect_run(config, base, TextData(*(encode_split(part, config, base) for part in (train, held)), about))
    assert [f.text for f in report.findings if f.level == "stop"] == []
    warned = {f.check for f in report.findings if f.level == "warn"}
    assert warned <= {"schedule", "held out"}, report.text()
    assert report.sample


def test_the_full_example_has_every_default() -> None:
    """Without its `#: ` marks, examples/all-keys.yaml is the complete configuration."""
    lines = (ROOT / "examples" / "all-keys.yaml").read_text().splitlines()
    text = "\n".join(line.replace("#: ", "", 1) for line in lines)
    values, _ = parse_yaml(text, "all-keys.yaml")
    config, _ = config_from(values)
    for section, model in SECTIONS.items():
        for key, f in model.model_fields.items():
            assert key in (values[section] if isinstance(values[section], dict) else {key}), f"{section}.{key}"
            if not f.is_required():
                assert getattr(getattr(config, section), key) == f.default, f"{section}.{key}"
