"""The commands, rows and configuration of docs/how-to/reinforcement.md work with the tiny base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.how_to import run_commands
from tests.serve.whole import Shop, served
from tests.test_readme import ROOT, blocks
from tests.tiny_base import tiny_base_dir
from veneer.train.config.reinforcement import ReinforcementSection

PAGE = (ROOT / "docs" / "how-to" / "reinforcement.md").read_text(encoding="utf-8")


def test_commands_of_the_page_train_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (rows,), (values,), (commands,) = (blocks(PAGE, kind) for kind in ("json", "yaml", "bash"))
    Path("tickets.jsonl").write_text(rows)
    given = yaml.safe_load(values)
    base = str(tiny_base_dir(tmp_path))
    given |= {"base": base, "schedule": given["schedule"] | {"steps": 2}, "evaluation": {"every": 1, "keep": "last"}}
    Path("tickets.yaml").write_text(yaml.safe_dump(given))
    told = run_commands(capsys, commands.splitlines(), base)
    assert "gap 0 (maximum 0, 0.0% above 1%)" in told[0]
    assert "sampled tokens/s" in told[0]
    assert "to train on" not in told[0]  # no warning that there are too few prompts
    assert re.search(r"step 1/2  reward \d\.\d{3} \(exact_match \d\.\d{3}, length \d\.\d{3}\)", told[0])
    assert re.search(r"step 0: validation reward \d\.\d{3} \(exact_match", told[0])
    assert "loss" not in "".join(line for line in told[0].splitlines() if line.startswith("step "))
    report = Path("runs/tickets-grpo/report.html").read_text(encoding="utf-8")
    cards = re.findall(r'<div class="card"><h3>(.*?)</h3>', report)
    assert cards[:4] == ["Validation reward", "Validation, exact_match", "Validation, length", "Training reward"]
    charts = re.findall(r'<div class="panel"><h3>(.*?)</h3>', report)
    assert charts[:3] == ["Reward, mean over the sampled completions", "Reward: exact_match", "Reward: length"]
    assert "<th>after step</th><th>reward</th><th>exact_match</th><th>length</th>" in report


def test_samplers_of_the_page_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer's command and keys train with servers that have the options of the page."""
    monkeypatch.chdir(tmp_path)
    (served_keys,), (commands,) = blocks(PAGE, "yml"), blocks(PAGE, "sh")
    serve, train = (line.split() for line in commands.strip().splitlines())
    assert serve[:2] == ["veneer", "serve"]
    assert "--batch-invariant" in serve
    shop = Shop(tmp_path)
    tiny_base_dir(tmp_path).rename(shop.base_dir)
    shop.adapters.mkdir()
    assert train[2:] == ["veneer", "train", "served.yaml"]
    assert [word.partition("=")[0] for word in train[:2]] == ["VENEER_LIBRARY", "VENEER_SAMPLER_KEY"]
    Path("tickets.jsonl").write_text(blocks(PAGE, "json")[0])
    values, added = yaml.safe_load(blocks(PAGE, "yaml")[0]), yaml.safe_load(served_keys)["reinforcement"]
    values |= {"base": str(shop.base_dir), "schedule": {"steps": 2}, "evaluation": {"every": 2, "keep": "last"}}
    monkeypatch.setenv("VENEER_LIBRARY", shop.library.location)
    with served(shop, batch_invariant=True) as one, served(shop, batch_invariant=True) as two:
        added["samplers"] = [one.url, two.url]
        Path("served.yaml").write_text(yaml.safe_dump(values | {"reinforcement": values["reinforcement"] | added}))
        (told,) = run_commands(capsys, [" ".join(train[2:])], str(shop.base_dir))
    assert re.search(r"step 1/2 .* gap 0 \(maximum 0, 0.0% above 1%\), KL 0", told)
    assert "1 step off-policy" in told


def test_table_of_losses_equals_the_settings() -> None:
    losses = PAGE.partition("\n## Losses\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in losses.splitlines() if line[:1] == "|"]
    for name, *cells in rows[2:]:
        settled = ReinforcementSection(loss=name.split()[0]).with_defaults()  # type: ignore[arg-type]
        clip = "none" if settled.clip_low is None else f"{settled.clip_low:g}, {settled.clip_high:g}"
        assert [settled.baseline, settled.scale, settled.ratio, clip, settled.length] == cells
    assert len(rows) == 9
