"""4-bit and 8-bit bases equal their dequantized weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.bnb_checkpoint import CONFIG, saved_tensors
from tests.edits import edit_json
from tests.families import FAMILIES, VOCAB, llama3
from tests.tiny_base import tiny_base_dir, tiny_tokenizer
from tests.tiny_gguf import tiny_gguf
from veneer.errors import BaseError, ConfigError
from veneer.files.weights import tensor_table
from veneer.models.quantize import load_quantized, quantized_bytes, quantized_weights
from veneer.models.text.base import load_text, read_base_config
from veneer.ops.quantization_formats import KINDS, Blocks4
from veneer.ops.quantized import Quantized

IDS = torch.randint(3, 150, (2, 20), generator=torch.Generator().manual_seed(0))


def dequantized_twin(model: Any) -> Any:
    """Return the same model with dequantized weights."""
    twin = type(model)(model.config)
    state = {n: t.dense().clone() if isinstance(t, Quantized) else t for n, t in model.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    if model.config.get_text_config().tie_word_embeddings:
        twin.tie_weights()
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")
    return twin.eval().requires_grad_(False)


def quantized(model: Any, folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    model.save_pretrained(folder)
    loaded, info = load_quantized(folder, read_base_config(folder), tensor_table(folder), kind, dtype)
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    return loaded.eval()


@pytest.mark.parametrize(
    ("family", "kind"), [*((f, k) for f in FAMILIES for k in ("nf4", "int8")), *(("llama3", k) for k in KINDS[1:4])]
)
def test_every_family_equals_its_dequantized_weights(family: str, kind: str, tmp_path: Path) -> None:
    source = FAMILIES[family]()
    model = quantized(source, tmp_path / "m", kind)
    names = quantized_weights(source)
    assert [n for n, p in model.named_parameters() if isinstance(p, Quantized)] == names
    assert not {n for n in names if "embed" in n or "lm_head" in n or "norm" in n or "router" in n}
    assert all(not p.requires_grad for p in model.parameters() if isinstance(p, Quantized))
    twin = dequantized_twin(model)
    with torch.no_grad():
        assert torch.equal(model(IDS % VOCAB).logits, twin(IDS % VOCAB).logits)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Quantized):
            assert parameter.bytes == quantized_bytes(parameter.shape, kind), name
            got, want = parameter.dense().double(), source.get_parameter(name).detach().double()
            assert float((got - want).norm() / want.norm()) < (0.01 if kind == "int8" else 0.15), name


def test_fused_experts_are_dequantized_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(FAMILIES["mixtral"](), tmp_path / "m", "nf4")
    experts = {n: p for n, p in model.named_parameters() if p.ndim == 3}
    assert experts
    made: list[int] = []
    dense = Blocks4.dense

    def counted(code: Blocks4, dtype: torch.dtype, first: int, last: int) -> Tensor:
        made.append(last - first)
        return dense(code, dtype, first, last)

    monkeypatch.setattr(Blocks4, "dense", counted)
    with torch.no_grad():
        model(IDS)
    assert max(made) == max(p.shape[1] for p in experts.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base_dir(tmp_path_factory.mktemp("quantized"))


def test_a_text_base_states_its_quantization(folder: Path) -> None:
    base = load_text(str(folder), quantize="nf4")
    assert base.quantized == "nf4"
    assert any("4.1" in note and "nf4" in note for note in base.notes), base.notes
    assert load_text(str(folder)).fingerprint == base.fingerprint
    name = quantized_weights(base.model)[0]
    assert torch.equal(base.original(name), load_text(str(folder)).model.get_parameter(name))
    with pytest.raises(BaseError, match="no weight nothing"):
        base.original("nothing")


@pytest.mark.parametrize(
    ("kind", "says"), [("nf5", "nearest: nf4"), ("keep", "not quantized"), ("int9", "not a known quantization")]
)
def test_unknown_quantization_is_refused(folder: Path, kind: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_text(str(folder), quantize=kind)


# -- memory ------------------------------------------------------------------------------------------------------------

_LOADS = """
import sys, json
from pathlib import Path
import torch
from veneer.ops.quantized import Quantized
from veneer.models.quantize import load_quantized
from veneer.models.text.base import read_base_config
from veneer.files.weights import tensor_table
from transformers import LlamaForCausalLM
from veneer.train.loop import peak_memory_bytes

folder = Path(sys.argv[1])
config, table = read_base_config(folder), tensor_table(folder)
small = Path(sys.argv[2])
load_quantized(small, read_base_config(small), tensor_table(small), "nf4", torch.bfloat16)  # its own imports
cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
model, _ = load_quantized(folder, config, table, "nf4", torch.bfloat16)
weights = sum(p.bytes if isinstance(p, Quantized) else p.nbytes for p in model.parameters())
print(json.dumps({"took": peak_memory_bytes(cpu) - before, "weights": weights}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_loading_needs_little_more_than_the_quantized_model(tmp_path: Path, folder: Path) -> None:
    """Loads 135 MB of bfloat16 weights from files of one layer each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=512, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, str] = {}
    for part in sorted({n.split(".")[2] for n in shapes}):
        own = {n: torch.full(s, 0.01).bfloat16() for n, s in shapes.items() if n.split(".")[2] == part}
        save_file(own, tmp_path / f"model-{part}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(own, f"model-{part}.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOADS, str(tmp_path), str(folder)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    full = sum(2 * torch.Size(s).numel() for s in shapes.values())
    shard = max(f.stat().st_size for f in tmp_path.glob("model-*.safetensors"))
    assert found["weights"] < 0.29 * full
    assert found["took"] < found["weights"] + shard, (found, full, shard)


# -- bitsandbytes' checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base in which each row of a weight is a whole number of blocks.

    bitsandbytes 0.50 dequantizes narrower rows wrongly on a CPU (see tests/ops/test_quantized.py)."""
    folder = tmp_path_factory.mktemp("wide")
    llama3(vocab_size=384, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved_by_bitsandbytes(base: Path, folder: Path, dtype: torch.dtype, **asked: Any) -> Any:
    """Save a base that bitsandbytes quantized, with its tokenizer, and return its model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    how = {"quantization_config": BitsAndBytesConfig(**asked), "dtype": dtype, "device_map": {"": "cpu"}}
    theirs = AutoModelForCausalLM.from_pretrained(base, **how)
    theirs.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_checkpoint_of_bitsandbytes_loads_as_the_same_model(
    wide: Path, tmp_path: Path, kind: str, double: bool
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    asked = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": torch.float32}
    theirs = saved_by_bitsandbytes(wide, tmp_path / "m", torch.float32, load_in_4bit=True, **asked)
    base = load_text(str(tmp_path / "m"), dtype="float32")
    assert base.quantized == kind
    own = dict(base.model.named_parameters())
    for name, parameter in theirs.named_parameters():
        if getattr(parameter, "quant_state", None) is not None:
            weight = own[name]
            assert torch.equal(weight.dense(), functional.dequantize_4bit(parameter.data, parameter.quant_state))
    theirs.train()  # in eval mode, its linear layers can round to bfloat16
    torch.testing.assert_close(base.model(IDS).logits, theirs(IDS).logits)
    with pytest.raises(ConfigError, match="quantized already"):
        load_text(str(tmp_path / "m"), quantize="nf4")
    assert load_text(str(tmp_path / "m"), quantize="keep").quantized == kind


def test_an_8_bit_checkpoint_of_bitsandbytes_loads(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    theirs = saved_by_bitsandbytes(folder, tmp_path / "m", torch.float16, load_in_8bit=True)
    base = load_text(str(tmp_path / "m"), dtype="float32")
    assert base.quantized == "int8"
    for name in quantized_weights(base.model):
        weight, parameter = base.model.get_parameter(name), theirs.get_parameter(name)
        exact = parameter.data.double() * parameter.SCB.double()[:, None] / 127
        torch.testing.assert_close(weight.dense().double(), exact, rtol=1e-5, atol=0)


def test_saved_weights_load_in_bitsandbytes(wide: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM

    model, _ = load_quantized(wide, read_base_config(wide), tensor_table(wide), "nf4", torch.bfloat16)
    model.config.quantization_config = CONFIG
    model.config.save_pretrained(tmp_path)
    state = {n: t for n, t in saved_tensors(model.state_dict()).items() if n != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    for name, parameter in theirs.named_parameters():
        if getattr(parameter, "quant_state", None) is not None:
            weight = model.get_parameter(name)
            assert torch.equal(weight.dense(), functional.dequantize_4bit(parameter.data, parameter.quant_state))


def test_error_names_an_unsupported_quantization(folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(folder, tmp_path / "m"))
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BaseError, match="gptq"):
        load_text(str(base))


# -- GGUF --------------------------------------------------------------------------------------------------------------


def test_kept_gguf_blocks_equal_dequantized_weights(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file, quantized=True)
    full, kept = load_text(str(file), dtype="float32"), load_text(str(file), dtype="float32", quantize="keep")
    weights = [p for p in kept.model.parameters() if isinstance(p, Quantized)]
    assert kept.quantized == "gguf"
    assert {p.stored.kind for p in weights} == {"Q8_0"}
    assert len(weights) == len(
        [n for n in quantized_weights(full.model) if full.model.get_parameter(n).shape[1] % 32 == 0]
    )
    assert all(8 * p.bytes == 8.5 * p.numel() for p in weights)  # 32 weights take 32 bytes and a float16
    with torch.no_grad():
        assert torch.equal(kept.model(IDS).logits, full.model(IDS).logits)
    assert kept.fingerprint == full.fingerprint
    with pytest.raises(ConfigError, match="quantized already"):
        load_text(str(file), quantize="nf4")


def test_concurrent_quantized_loads_do_not_mix(tmp_path: Path) -> None:
    """transformers' registry of quantizers is global.

    Concurrent loads must neither use nor remove each other's entries."""
    FAMILIES["llama3"]().save_pretrained(tmp_path / "m")
    config, tensors = read_base_config(tmp_path / "m"), tensor_table(tmp_path / "m")
    kinds = ["nf4", "int8", "fp4", "int8"] * 3
    together = threading.Barrier(len(kinds))

    def load(kind: str) -> set[str]:
        together.wait(30)
        loaded, _ = load_quantized(tmp_path / "m", config, tensors, kind, torch.float32)
        return {p.stored.kind for p in loaded.parameters() if isinstance(p, Quantized)}

    tie = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(len(kinds)) as pool:
        assert list(pool.map(load, kinds)) == [{kind} for kind in kinds]
    assert PreTrainedModel.tie_weights is tie  # transformers removes this method during a load, and must restore it
