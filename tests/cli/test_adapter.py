"""`veneer adapter`: printed output, `--json`, and exit codes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.attached import attached
from tests.cli import run as cli
from tests.edits import edit_json
from tests.formats.twins import linear_pairs, random_adapter
from tests.tiny_base import tiny_base_dir
from veneer.core.adapter import Adapter, Card, LoraSpec
from veneer.core.forms import delta_of
from veneer.core.init import create
from veneer.formats import peft
from veneer.models.text.base import load_text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base_dir(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with two adapters of the base: `a`, and `zero`, which is untrained."""
    folder = tmp_path_factory.mktemp("adapters")
    text = load_text(str(base))
    untrained = create(text.model, LoraSpec(rank=4, alpha=8, targets=("q_proj", "down_proj"), rslora=True), seed=0)
    card = Card(base=text.name, base_fingerprint=text.fingerprint, metrics={"loss": 0.5})
    for name, adapter in {"a": random_adapter(untrained), "zero": untrained}.items():
        peft.write_folder(replace(adapter, card=card), folder / name, base=text.model)
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """Run `veneer adapter` and return its output, or its stderr if it fails."""
    out = cli.run(capsys, "adapter", *map(str, argv), code=code)
    assert "Traceback" not in out.err
    return out.out if out.out or not code else out.err


def failures(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, str]:
    found = json.loads(run(capsys, "verify", *argv, "--json", code=2))
    assert found["ok"] is False
    return {c["check"]: c["detail"] for c in found["checks"] if c["ok"] is False}


def test_inspect_describes_an_adapter_without_its_base(capsys, made):
    found = json.loads(run(capsys, "inspect", made / "a", "--json"))
    assert (found["pairs"], found["ranks"], found["rslora"], found["dora"]) == (4, {"4": 4}, True, False)
    assert found["scales"] == {"4": 4}  # 8/√4
    assert found["digest"] == peft.read_folder(made / "a").digest()
    target = found["targets"]["q_proj"]
    pairs = [p for n, p in peft.read_folder(made / "a").pairs.items() if n.endswith("q_proj")]
    norm = sum(float((p.scale * p.B.double() @ p.A.double()).square().sum()) for p in pairs) ** 0.5
    assert target["delta_norm"] == pytest.approx(norm, rel=1e-9)
    assert (target["count"], target["kind"]) == (2, "linear")
    text = run(capsys, "inspect", made / "a")
    for words in ("rsLoRA", "q_proj", "down_proj", found["digest"], '{"loss": 0.5}', "4 pairs"):
        assert words in text


def test_verify_of_a_sound_adapter(capsys, made, base):
    found = json.loads(run(capsys, "verify", made / "a", "--json"))
    assert found["ok"] is True
    assert [c["check"] for c in found["checks"]] == ["card", "hashes", "contents", "digest", "not zero"]
    found = json.loads(run(capsys, "verify", made / "a", "--base", base, "--json"))
    assert [c["check"] for c in found["checks"]][-3:] == ["base", "fits", "effect"]
    assert all(c["ok"] for c in found["checks"])
    assert "logits move by up to" in run(capsys, "verify", made / "a", "--base", base)


def test_an_image_base_error_names_the_right_command(capsys, made, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "omit --base" in run(capsys, "verify", made / "a", "--base", tmp_path, code=2)
    said = run(capsys, "merge", made / "a", "--base", tmp_path, "-o", tmp_path / "out", code=2)
    assert "image bases need --by-shard" in said


def test_verify_without_a_card_skips_the_comparison(capsys, made, tmp_path):
    copied = copy(made / "a", tmp_path)
    (copied / "veneer.json").unlink()
    found = json.loads(run(capsys, "verify", copied, "--json"))
    assert found["ok"] is True
    assert found["checks"][0]["ok"] is None


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_verify_sees_changed_tensors_and_changed_scales(capsys, made, tmp_path):
    copied = copy(made / "a", tmp_path)
    tensors = load_file(copied / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first] + 1}, copied / "adapter_model.safetensors")
    assert set(failures(capsys, str(copied))) == {"hashes", "digest"}
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert "adapter_config.json" in failures(capsys, str(copied))["hashes"]


def test_verify_reports_a_missing_tensor(capsys, made, tmp_path):
    copied = copy(made / "a", tmp_path)
    tensors = load_file(copied / "adapter_model.safetensors")
    gone = next(k for k in tensors if "lora_B" in k)
    del tensors[gone]
    save_file(tensors, copied / "adapter_model.safetensors")
    assert "B missing" in failures(capsys, str(copied))["contents"]
    assert "FAILED" in run(capsys, "verify", copied, code=2)


def test_verify_sees_an_adapter_that_does_nothing(capsys, made, base):
    assert set(failures(capsys, str(made / "zero"))) == {"not zero"}
    assert set(failures(capsys, str(made / "zero"), "--base", str(base))) == {"not zero", "effect"}


def test_verify_measures_a_lokr(capsys, base, tmp_path):
    model = load_text(str(base)).model
    made = create(model, LoraSpec(kind="lokr", rank=2), seed=0)
    peft.write_folder(made, tmp_path / "untrained")
    assert set(failures(capsys, str(tmp_path / "untrained"))) == {"not zero"}
    for delta in made.deltas.values():
        delta.parts["w2" if "w2" in delta.parts else "b2"].fill_(0.01)
    peft.write_folder(made, tmp_path / "lokr")
    checks = {c["check"]: c for c in json.loads(run(capsys, "verify", tmp_path / "lokr", "--json"))["checks"]}
    whole = sum(float(delta_of(torch.zeros(d.shape), d).norm()) ** 2 for d in made.deltas.values()) ** 0.5
    assert f"‖ΔW‖ = {whole:.4g} in all" in checks["not zero"]["detail"]


def test_verify_sees_another_base(capsys, made, tmp_path):
    other = tiny_base_dir(tmp_path)
    tensors = load_file(other / "model.safetensors")
    name = next(n for n in tensors if "q_proj" in n)
    save_file(tensors | {name: tensors[name] + 0.1}, other / "model.safetensors", metadata={"format": "pt"})
    found = failures(capsys, str(made / "a"), "--base", str(other))
    assert set(found) == {"base"}
    assert found["base"].count("sha256:") == 2


def test_verify_sees_names_and_shapes_that_do_not_fit(capsys, base, tmp_path):
    peft.write_folder(
        linear_pairs(["model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj"]), tmp_path / "a"
    )
    detail = failures(capsys, str(tmp_path / "a"), "--base", str(base))["fits"]
    assert "the base needs" in detail
    assert "model.layers.7.self_attn.q_proj: no such module" in detail


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_merge_writes_a_model_that_computes_what_the_mix_does(capsys, made, base, tmp_path):
    text = load_text(str(base), dtype="float32")
    before = {n: t.clone() for n, t in text.model.state_dict().items()}
    adapter = peft.read_folder(made / "a")
    with attached(text.model, adapter, 0.5):
        want = logits(text.model)
    out = tmp_path / "merged"
    argv = (f"{made / 'a'}:0.5", made / "zero", "--base", base, "-o", out, "--dtype", "float32", "--json")
    report = json.loads(run(capsys, "merge", *argv))
    assert [a["strength"] for a in report["adapters"]] == [0.5, 1.0]
    assert report["adapters"][0]["digest"] == adapter.digest()
    assert report["delta_error"] < 1e-5
    assert report["changed"] > 0.99
    assert json.loads((out / "merge.json").read_text()) == report
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    again = load_text(str(base), dtype="float32").model.state_dict()
    assert all(torch.equal(t, before[n]) for n, t in again.items())
    assert load_text(str(out)).tokenizer("hello")["input_ids"] == text.tokenizer("hello")["input_ids"]


def test_merge_into_16_bits_reports_the_rounding_error(capsys, made, base, tmp_path):
    text = run(capsys, "merge", made / "a", "--base", base, "-o", tmp_path / "m", "--dtype", "bfloat16")
    assert "rounding to bfloat16" in text
    assert "% of" in text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_merge_with_large_rounding_error_needs_accept_loss(capsys, made, base, tmp_path):
    def merge(to: str, strength: str, *more: str, code: int = 0) -> str:
        argv = ("merge", f"{made / 'a'}:{strength}", "--base", base, "-o", tmp_path / to, "--dtype", "bfloat16", *more)
        ran = cli.run(capsys, "adapter", *map(str, argv), code=code)
        return ran.out + ran.err

    warned = merge("a", "0.01")
    assert "warning: rounding to bfloat16 gives the merged change" in warned
    assert "--dtype float32 is exact; --stochastic 0 keeps it on average" in warned
    refused = merge("b", "0.0005", code=2)
    assert "nothing was written" in refused
    assert "--dtype float32, --stochastic 0, or --accept-loss" in refused
    assert not (tmp_path / "b").exists()
    assert "warning" in merge("c", "0.0005", "--accept-loss")
    assert "warning" not in merge("d", "0.0005", "--stochastic", "7")
    assert json.loads((tmp_path / "d" / "merge.json").read_text())["rounding"] == "stochastic, seed 7"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inspect", "nowhere"], "there is no adapter 'nowhere'"),
        (["verify", "nowhere", "--base", "BASE"], "there is no adapter 'nowhere'"),
        (["merge", "nowhere", "--base", "BASE", "-o", "OUT"], "there is no adapter 'nowhere'"),
        (["merge", "A", "--base", "BASE", "-o", "BASE"], "exists and is not empty"),
        (["merge", "A", "--base", "BASE", "-o", "OUT", "--dtype", "int4"], "there is no dtype 'int4'"),
        (["merge", "A", "A", "--base", "BASE", "-o", "OUT"], "named twice"),
        (["merge", "--base", "BASE", "-o", "OUT"], "Missing argument"),
    ],
)
def test_errors_exit_with_2_and_write_nothing(capsys, made, base, tmp_path, argv, words):
    names = {"A": str(made / "a"), "BASE": str(base), "OUT": str(tmp_path / "out")}
    assert words in run(capsys, *(names.get(a, a) for a in argv), code=2)
    assert list(tmp_path.iterdir()) == []


def test_merge_of_another_bases_adapter_needs_an_option(capsys, base, made, tmp_path):
    text = load_text(str(base))
    adapter = replace(peft.read_folder(made / "a"), card=Card(base="org/other", base_fingerprint="sha256:other"))
    peft.write_folder(adapter, tmp_path / "a", base=text.model)
    said = run(capsys, "merge", tmp_path / "a", "--base", base, "-o", tmp_path / "m", code=2)
    assert "sha256:other" in said
    assert text.fingerprint in said
    run(capsys, "merge", tmp_path / "a", "--base", base, "-o", tmp_path / "m", "--allow-other-base")


def test_a_full_disk_during_a_merge_leaves_no_files(capsys, base, made, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    real = PreTrainedModel.save_pretrained

    def full(self, folder, **settings):
        real(self, folder, **settings)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert "no space left on the device" in run(
        capsys, "merge", made / "a", "--base", base, "-o", tmp_path / "m", code=2
    )
    assert list(tmp_path.iterdir()) == []


def test_adapter_with_every_kind_of_change_is_described(capsys, tmp_path):
    adapter = Adapter(linear_pairs(["a.q_proj"]).pairs, {"norm": {"weight": torch.ones(4)}}, card=Card(licence="mit"))
    peft.write_folder(adapter, tmp_path / "a")
    edit_json(tmp_path / "a" / "veneer.json", mood="good")
    text = run(capsys, "inspect", tmp_path / "a")
    for words in ("full copies  norm", "licence      mit", "note: veneer.json: the key 'mood'"):
        assert words in text
