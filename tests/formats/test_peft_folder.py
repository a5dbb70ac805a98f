"""PEFT folders as files: reproducible bytes, atomic writes, and the card."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.edits import edit_json
from tests.formats.twins import linear_pairs, model, random_adapter
from veneer.core.adapter import Card, LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError, ResourceError
from veneer.formats import peft
from veneer.formats.card import CARD_FILE, README_FILE, card_bytes, file_digest, read_card
from veneer.formats.folder import CONFIG_FILE, TENSOR_FILE

FILES = [README_FILE, CONFIG_FILE, TENSOR_FILE, CARD_FILE]
NAMES = [f"model.layers.{i}.self_attn.{p}" for i in range(3) for p in ("q_proj", "v_proj", "o_proj")]

SCRIPT = """
import torch
from veneer.core.adapter import Adapter, Card, Pair, TokenRows
from veneer.formats import peft
names = {names!r} + ["lm_head"]
pairs = {{n: Pair(torch.full((i % 3 + 1, 4), i + 0.5), torch.ones(4, i % 3 + 1), 1.5) for i, n in enumerate(names)}}
modules = {{"model.norm": {{"weight": torch.ones(4), "bias": torch.zeros(4)}}}}
card = Card(base="org/base", metrics={{"b": 1, "a": {{"z": 2, "y": 0.1}}}}, trigger_words=["x"])
rows = {{"model.embed_tokens": TokenRows((3, 1), torch.ones(2, 4))}}
peft.write_folder(Adapter(pairs, modules, rows, card), {folder!r})
"""


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_two_processes_write_the_same_bytes(tmp_path):
    """Compares this process with another one, whose sets have a different order."""
    ours, theirs = tmp_path / "ours" / "a", tmp_path / "theirs" / "a"
    ours.parent.mkdir()
    theirs.parent.mkdir()
    exec(SCRIPT.format(names=NAMES, folder=str(ours)), {})
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    script = SCRIPT.format(names=NAMES, folder=str(theirs))
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=120)
    assert content(ours) == content(theirs)
    assert sorted(content(ours)) == sorted(FILES)


def test_write_report_matches_the_files(tmp_path):
    adapter = linear_pairs(NAMES)
    written = peft.write_folder(adapter, tmp_path / "a", base_name="org/base")
    assert written.digest == adapter.digest() == peft.read_folder(tmp_path / "a").digest()
    assert written.files == {n: file_digest(tmp_path / "a" / n) for n in (TENSOR_FILE, CONFIG_FILE)}
    card = read_card(tmp_path / "a")
    assert (card.digest, card.files, card.unknown) == (written.digest, written.files, [])
    assert (card.card.base, card.card.rank, card.card.alpha) == ("org/base", 2, 4.0)


def test_config_is_shorter_if_the_base_is_given(tmp_path):
    net = model("llama3")
    adapter = create(net, LoraSpec(rank=4, alpha=8, targets=("q_proj", "layers.1.mlp.up_proj")), seed=0)
    config, _ = peft.encode_folder(random_adapter(adapter), base=net)
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj", "q_proj"]
    config, _ = peft.encode_folder(random_adapter(adapter))
    assert config["target_modules"] == sorted(adapter.pairs)


def test_equal_ranks_share_one_pattern():
    pairs = linear_pairs(NAMES).pairs
    pairs["lm_head"] = linear_pairs(["lm_head"], rank=3).pairs["lm_head"]
    one = NAMES[0]
    pairs[one] = linear_pairs([one], rank=5, scale=1.0).pairs[one]
    adapter = linear_pairs([])
    adapter.pairs = pairs
    config, _ = peft.encode_folder(adapter)
    exact = r"^model\.layers\.0\.self_attn\.q_proj"
    assert config["rank_pattern"] == {"lm_head": 3, exact: 5}
    assert config["alpha_pattern"] == {"lm_head": 6, exact: 5}


def test_dropout_is_written_except_on_experts(tmp_path):
    assert peft.write_folder(replace(linear_pairs(NAMES), dropout=0.1), tmp_path / "a").notes == []
    assert peft.read_folder(tmp_path / "a").dropout == 0.1
    net = model("mixtral", torch.float32)
    experts = create(net, LoraSpec(rank=2, alpha=4, dropout=0.1), seed=0)
    assert "lora_dropout is written as 0" in peft.write_folder(experts, tmp_path / "b", base=net).notes[0]


def test_folder_is_replaced_only_when_complete(tmp_path, monkeypatch):
    old, new = linear_pairs(NAMES, seed=1), linear_pairs(NAMES, seed=2)
    peft.write_folder(old, tmp_path / "a")
    (tmp_path / "a" / "report.html").write_text("kept")
    before = content(tmp_path / "a")

    class Full:
        left = 0

    def write(fd: int, view: memoryview) -> int:
        if Full.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Full.left -= 1
        return real(fd, view)

    real = os.write
    monkeypatch.setattr(os, "write", write)
    calls = 0
    while True:
        Full.left = calls
        try:
            peft.write_folder(new, tmp_path / "a")
            break
        except ResourceError:
            assert content(tmp_path / "a") == before
            calls += 1
    assert calls > len(FILES)
    monkeypatch.setattr(os, "write", real)
    assert peft.read_folder(tmp_path / "a").digest() == new.digest()
    assert (tmp_path / "a" / "report.html").read_text() == "kept"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError):
        peft.write_folder(linear_pairs(NAMES), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_written_over_a_file(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(AdapterError, match="a file is in the way"):
        peft.write_folder(linear_pairs(NAMES), tmp_path / "a")


# -- the card ----------------------------------------------------------------------------------------------------------


def test_card_round_trip_keeps_unknown_keys(tmp_path):
    card = Card(
        "org/base", "sha256:1", "text", 4, 8.0, ["q"], "sha256:2", {"lr": 1e-4}, {"acc": 0.5}, ["w"], "mit", ["p"]
    )
    (tmp_path / CARD_FILE).write_bytes(card_bytes(card, digest="sha256:3", files={"x": "sha256:4"}))
    read = read_card(tmp_path)
    assert (read.card, read.digest, read.files, read.unknown) == (card, "sha256:3", {"x": "sha256:4"}, [])
    edit_json(tmp_path / CARD_FILE, from_the_future={"a": 1}, another=2)
    read = read_card(tmp_path)
    assert read.unknown == ["another", "from_the_future"]
    assert read.card.extra == {"from_the_future": {"a": 1}, "another": 2}


def test_every_field_of_the_wrong_type_is_listed(tmp_path):
    wrong = {
        "rank": "4", "alpha": True, "targets": "q", "metrics": [], "licence": 1, "veneer": 2, "files": {"../x": "y"},
    }  # fmt: skip
    (tmp_path / CARD_FILE).write_text(json.dumps(json.loads(card_bytes(Card())) | wrong))
    with pytest.raises(AdapterError) as caught:
        read_card(tmp_path)
    for key in wrong:
        assert f"{key}" in str(caught.value)
    assert "../x" in str(caught.value)


def test_card_that_json_cannot_represent_is_not_written():
    for value in (float("nan"), {1, 2}):
        with pytest.raises(AdapterError, match="JSON cannot"):
            card_bytes(Card(metrics={"x": value}))


def test_readme_is_replaced_only_if_ours(tmp_path):
    adapter = replace(linear_pairs(NAMES), card=Card(base="org/base", licence="mit", metrics={"loss": 0.25}))
    peft.write_folder(adapter, tmp_path / "a")
    text = (tmp_path / "a" / README_FILE).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "org/base"
    assert front["library_name"] == "peft"
    assert {"lora", "base_model:adapter:org/base"} <= set(front["tags"])
    assert (front["license"], front["pipeline_tag"]) == ("mit", "text-generation")
    assert "| loss | 0.25 |" in text
    assert adapter.digest() in text
    peft.write_folder(replace(adapter, card=Card(base="org/other")), tmp_path / "a")
    assert "org/other" in (tmp_path / "a" / README_FILE).read_text()
    (tmp_path / "a" / README_FILE).write_text("my own words")
    peft.write_folder(adapter, tmp_path / "a")
    assert (tmp_path / "a" / README_FILE).read_text() == "my own words"


def test_readme_command_uses_the_samples_system_message(tmp_path):
    turns = [("system", "Answer with\n```json\n"), ("user", "It's open"), ("assistant", "{}"), ("user", "And now?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    card = Card(base="org/base", kind="text", extra={"sample": {"messages": messages}})
    peft.write_folder(replace(linear_pairs(NAMES), card=card), tmp_path / "a")
    text = (tmp_path / "a" / README_FILE).read_text()
    command = text.partition("````bash\n")[2].partition("\n````")[0]
    given = {"--base": "org/base", "--adapter": "FOLDER", "--system": "Answer with\n```json\n"}
    options = [word for pair in given.items() for word in pair]
    assert shlex.split(command) == ["veneer", "generate", "It's open", *options]
    assert "````\nAnswer with\n```json\n\n````" in text


def test_files_for_other_tools_name_the_bases_hub_id(tmp_path):
    card = Card(base="smollm2-135m", kind="text")
    peft.write_folder(replace(linear_pairs(NAMES), card=card), tmp_path / "a", base_name="smollm2-135m")
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    text = (tmp_path / "a" / README_FILE).read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in text
    assert "veneer generate '…' --base smollm2-135m" in text
    assert "`veneer base get smollm2-135m`" in text
    assert read_card(tmp_path / "a").card.base == "smollm2-135m"


def test_readme_contains_no_local_path(tmp_path):
    peft.write_folder(linear_pairs(NAMES), tmp_path / "a", base_name="/home/me/bases/small")
    text = (tmp_path / "a" / README_FILE).read_text()
    assert "/home/me" not in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "small"
