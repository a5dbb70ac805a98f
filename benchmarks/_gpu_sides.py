"""The sides of gpu.py: each measures veneer or one of its peers, on a GPU and in its own process.

A side takes a `Task` and returns {"figures": [...], "notes": [...]} or {"left_out": reason}. Each side
reports its results as soon as it has them (`tell`), so a later failure loses nothing. Weights are random and
created on the device, tensor by tensor, from a configuration: nothing is read from disk or network. A dry run
executes the same lines at sizes that take a CPU a moment.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from _report import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
RANK, ALPHA, RATE = 16, 32.0, 1e-4
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Every attention projection of FLUX.1, as selected by `adapter.targets: attention`."""
MIX = (0.8, 0.6, 0.5)
MARK = "RESULT "
"""Prefix of the output lines that contain a side's results so far."""
_BEGAN = time.monotonic()
LONG = 15.0
"""Seconds of measuring after which no further step starts."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements.

    `text`, `large`, `denoiser`: bases in the plan's table, or configurations. `rows`, `length`: number of rows
    in a micro-batch, and tokens in each row. `large_row`, `large_tokens`: tokens in a row and in a micro-batch
    of the large base. `picture`: width and height in pixels. `square`: rows and columns of the probe's
    matrices. `copied`: bytes that the probe copies. `requests`, `prompt`, `new`: number of served requests,
    and tokens in each prompt and completion. `many`: adapters of the largest serving test. `cache`: bytes of
    keys and values."""

    device: str = "cuda"
    text: Any = "meta-llama/Meta-Llama-3-8B"
    large: Any = "meta-llama/Llama-3.1-70B"
    denoiser: Any = "black-forest-labs/FLUX.1-dev"
    rows: int = 2
    length: int = 4096
    large_row: int = 600
    large_tokens: int = 2048
    recomputes: bool = False
    picture: int = 1024
    steps: int = 6
    square: int = 8192
    copied: int = 1 << 31
    requests: int = 128
    prompt: int = 256
    new: int = 64
    many: int = 1000
    cache: int = 8 << 30
    more: dict[str, Any] = field(default_factory=dict)
    """Arguments of the denoiser's class that are not in the plan's table."""


CARD = Sizes()
_TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}  # fmt: skip
DRY = Sizes(
    device="cpu",
    text=_TINY,
    large={**_TINY, "num_hidden_layers": 3},
    rows=2,
    length=16,
    large_row=12,
    large_tokens=24,
    recomputes=True,
    picture=64,
    steps=2,
    square=64,
    copied=1 << 16,
    requests=4,
    prompt=6,
    new=3,
    many=6,
    cache=1 << 22,
    denoiser={
        "model_type": "flux",
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "in_channels": 16,
        "guidance_embeds": True,
        "text_tokens": 8,
    },
    more={"axes_dims_rope": (4, 6, 6)},
)


@dataclass(frozen=True)
class Task:
    """Arguments of a side.

    `probe`: measured speed and bandwidth of the GPU; None if the probe failed. `work`: a temporary folder.
    `dry`: use the sizes of a dry run. `limit`: seconds after which the side is stopped; 0 for no limit."""

    work: str
    dry: bool = False
    probe: Mapping[str, float] | None = None
    limit: float = 0.0

    @property
    def sizes(self) -> Sizes:
        return DRY if self.dry else CARD


@dataclass(frozen=True)
class Figure:
    """A measurement.

    `roofline`: upper bound on this GPU. `planned`: prediction of `veneer plan`. Both are in `unit`."""

    metric: str
    value: float
    unit: str
    roofline: float | None = None
    planned: float | None = None


def _result(figures: Sequence[Figure], *notes: str) -> dict[str, Any]:
    return {"figures": [asdict(f) for f in figures], "notes": list(notes)}


def tell(result: Mapping[str, Any]) -> None:
    """Print a side's results so far. Only the last such line counts, even if the side fails later."""
    print(MARK + json.dumps(result), flush=True)


# -- the card ----------------------------------------------------------------------------------------------------------


def probe(task: Task) -> dict[str, Any]:
    """Measure the limits of the GPU: the speed of a large bfloat16 product and the bandwidth of a large copy.

    Each is the best of ten."""
    import torch

    s = task.sizes
    name, memory, about = "a CPU, dry run", 0, dict[str, str]()
    if s.device == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        about = {"compute capability": capability, "CUDA": str(torch.version.cuda), "driver": _driver()}
    card = {"card": name, "memory": f"{memory / 1e9:.1f} GB", **about}
    tell(_result([]) | {"card": card})
    a, b = (torch.randn(s.square, s.square, device=s.device).bfloat16() for _ in range(2))
    rate = 2 * s.square**3 / min(_seconds(lambda: a @ b, s.device, 10, warm=3))
    source = torch.zeros(s.copied, dtype=torch.uint8, device=s.device)
    target = torch.empty_like(source)
    bandwidth = 2 * s.copied / min(_seconds(lambda: target.copy_(source), s.device, 10, warm=3))
    figures = [
        Figure("bfloat16 product", rate / 1e12, "TFLOP/s"),
        Figure("memory bandwidth", bandwidth / 1e9, "GB/s"),
    ]
    return _result(figures) | {"probe": {"operations": rate, "bandwidth": bandwidth}, "card": card}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _seconds(run: Callable[[], Any], device: str, times: int, warm: int = 1) -> list[float]:
    """Return the seconds of up to `times` runs, after `warm` runs that do not count.

    At least one run counts, however long it takes."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    seconds: list[float] = []
    began = time.perf_counter()
    for i in range(warm + times):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
        if i >= warm and time.perf_counter() - began > LONG:
            break
    return seconds[warm:]


def _planned_for(task: Task) -> tuple[Any, Any, Any]:
    """Return (the plan's device, the rates that the plan assumes for it, the rates that the probe measured)."""
    from veneer.plan.tables import Device, device_by_cuda_name
    from veneer.plan.time import Rates, rates_of

    device = Device("a dry run", "cpu", 64 << 30, 1e12, 20e9)
    if task.sizes.device == "cuda":
        import torch

        device = device_by_cuda_name(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
    probed = None if task.probe is None else Rates(**task.probe, source="the probe")
    return device, rates_of(device), probed


def _at_most(work: Any, probed: Any) -> float | None:
    """Return the maximum units of `work` per second on the probed GPU, limited by operations or by bytes."""
    if probed is None:
        return None
    return 1 / max(work.operations / probed.operations, work.bytes / probed.bandwidth)


def _scaled(by: float, value: float | None) -> float | None:
    return None if value is None else by * value


def _peak(device: str, planned: Any) -> Figure:
    """Return the peak of allocated memory, and the plan's value without CUDA context and fragmentation."""
    import torch

    if device == "cuda":
        counted = planned.peak - planned.context - planned.rounding
        return Figure("peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB", planned=counted / 1e9)
    return Figure("peak memory", peak_bytes() / 1e9, "GB", planned=planned.peak / 1e9)


def gpu_tests(task: Task) -> dict[str, Any]:
    """Run the tests marked `gpu` in a pytest process; in a dry run, run one trivial test.

    If the time limit is exceeded, the finished tests are reported."""
    report, said = Path(task.work) / "gpu-tests.xml", Path(task.work) / "gpu-tests.txt"
    env = dict(os.environ) | {"TRITON_INTERPRET": "0"}  # tests/conftest.py would otherwise select Triton's interpreter
    files = [str(f) for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text(encoding="utf-8")]
    if task.dry:
        one = Path(task.work) / "test_dry.py"
        one.write_text("import pytest\n\n\n@pytest.mark.gpu\ndef test_one() -> None:\n    pass\n", encoding="utf-8")
        files = [str(one)]
        env = {k: v for k, v in env.items() if not k.startswith("PYTEST_")} | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    where = Path(task.work) if task.dry else ROOT
    with said.open("wb") as out:
        try:
            code = subprocess.run(
                [*command, *files],
                cwd=where,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=max(task.limit - _LAST, 1.0) if task.limit else None,
            ).returncode
        except subprocess.TimeoutExpired:
            return ended_tests(said.read_text(encoding="utf-8", errors="replace"), task.limit)
    if code not in (0, 1) or not report.exists():
        raise RuntimeError(f"pytest ended with {code}:\n{said.read_text(encoding='utf-8', errors='replace')[-3000:]}")
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.get('classname')}.{case.get('name')}: {' '.join(str(found.get('message')).split())[:200]}"
        for case in suite.iter("testcase")
        for found in case
        if found.tag in ("failure", "error")
    ]
    failed = count["failures"] + count["errors"]
    figures = [
        Figure("passed", count["tests"] - failed - count["skipped"], "tests"),
        Figure("failed", failed, "tests"),
        Figure("skipped", count["skipped"], "tests"),
    ]
    return _result(figures, *bad)


_LAST = 5.0
"""Seconds before the limit at which the tests are stopped, to leave time for reporting."""
_ENDED = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.M)


def ended_tests(said: str, limit: float) -> dict[str, Any]:
    """Return the results of the finished tests, read from the output of an interrupted `pytest -v`."""
    ended = _ENDED.findall(said)
    count = Counter(word for _, word in ended)
    bad = [f"{name}: {word.lower()}" for name, word in ended if word in ("FAILED", "ERROR")]
    last = f" after {ended[-1][0]}" if ended else ""
    figures = [
        Figure("passed", count["PASSED"], "tests"),
        Figure("failed", len(bad), "tests"),
        Figure("skipped", count["SKIPPED"], "tests"),
    ]
    return _result(figures, f"stopped{last}: {limit:.0f} s were given; make test-gpu runs them all", *bad)


# -- random bases, on the device ---------------------------------------------------------------------------------------


def _config(base: Any) -> dict[str, Any]:
    from veneer.plan.tables import base_config

    return dict(base) if isinstance(base, dict) else base_config(base)


def _bare_text(base: Any) -> Any:
    """Return a language model with its weights on the meta device."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    given = _config(base)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    with init_empty_weights(include_buffers=False):  # real buffers: they are computed, not loaded
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _bare_denoiser(base: Any, more: Mapping[str, Any]) -> Any:
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    about = ("model_type", "encoders", "vae", "text_tokens")
    config = {k: v for k, v in _config(base).items() if k not in about}
    with init_empty_weights(include_buffers=False):
        return FluxTransformer2DModel(patch_size=1, **config, **more).eval()


def _filled(model: Any, device: str, kept_as: Callable[[str, Any], Any] = lambda name, weight: weight) -> Any:
    """Fill the model with random bfloat16 weights, one at a time.

    Norms are 1, biases 0, and matrices normal with standard deviation 0.02.

    `kept_as`: (parameter name, weight) -> the value to store."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if weight.ndim > 1:
            weight.normal_(0, 0.02, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        owner, _, key = name.rpartition(".")
        kept = kept_as(name, weight)
        if not isinstance(kept, torch.nn.Parameter):
            kept = torch.nn.Parameter(kept, requires_grad=False)
        setattr(model.get_submodule(owner), key, kept)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    return model


def _quantizer(model: Any, kind: str | None) -> Callable[[str, Any], Any]:
    """Return the `kept_as` function that quantizes weights to `kind`; without a kind, weights stay as is."""
    from veneer.models.quantize import quantized_weights
    from veneer.ops.quantized import quantize

    names = set(quantized_weights(model)) if kind else set()
    return lambda name, weight: quantize(weight, str(kind)) if name in names else weight


# -- training text -----------------------------------------------------------------------------------------------------


def settled(plan: Any) -> tuple[Any, str]:
    """Return (the plan's load for one GPU of this kind, ""), or (None, the reason why the run does not fit)."""
    if plan.planned is None:
        return None, f"{plan.peak / 1e9:.1f} GB are needed, and {plan.available / 1e9:.1f} GB may be taken"
    load, device = plan.planned
    if device.count > 1:
        return None, f"on one such card it wants {plan.changes[0].text}"
    return load, ""


def _described(plan: Any, load: Any) -> str:
    """Describe the run in one line."""
    changed = "" if plan.fits else f"; as the plan changes it: {', '.join(plan.changes[0].settings)}"
    rows = f"{len(load.lengths)} × {load.longest} tokens" if hasattr(load, "lengths") else f"{load.pictures} picture"
    kept = "made again" if load.checkpointing else "kept"
    return f"{rows}, rank {load.rank}, {load.quantize or load.dtype}, activations {kept}{changed}"


def _train(task: Task, base: Any, load: Any, steps: int, others: Sequence[tuple[int, ...]] = ()) -> dict[str, Any]:
    """Measure AdamW steps on random tokens with the fast paths; all tokens count in the loss.

    `others`: row lengths of further micro-batches to measure, in the first half of the time limit. A real run
    chooses among such sizes (ops/step_sizes.py)."""
    import torch

    import veneer
    from veneer.models.text.fast import fast
    from veneer.models.text.loss import text_loss
    from veneer.plan.memory import text_counts, text_memory
    from veneer.plan.plan import TrainingJob, text_plan
    from veneer.plan.shape import text_shape
    from veneer.plan.time import run_work

    where, (device, rates, probed) = task.sizes.device, _planned_for(task)
    shape = text_shape(_config(base))
    plan = text_plan("", shape, load, device, TrainingJob(len(load.lengths), load.longest))
    load, why = settled(plan)
    if load is None:
        return {"left_out": why}
    bare = _bare_text(base)
    model = _filled(bare, where, _quantizer(bare, load.quantize))
    attachment = veneer.attach(model)
    spec = veneer.LoraSpec(rank=load.rank, alpha=ALPHA, targets="all-linear")
    attachment.add("a", veneer.create(model, spec, seed=0), trainable=True)
    attachment.use("a")
    parameters = list(attachment.parameters("a").values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    model.train()
    if load.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    last = torch.zeros((), device=where)

    def step_on(lengths: tuple[int, ...]) -> Callable[[], None]:
        tokens = sum(lengths)
        ids = torch.randint(3, shape.vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).to(where)
        trained = torch.ones(len(lengths), lengths[0], dtype=torch.bool, device=where)
        trained[:, 0] = False  # the first token of a row is not predicted
        trained, count = trained.flatten(), tokens - len(lengths)

        def step() -> None:
            nonlocal last
            loss = text_loss(model, ids, list(lengths), trained) / count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            last = loss.detach()

        return step

    def took(lengths: tuple[int, ...]) -> float:
        one = statistics.median(_seconds(step_on(lengths), where, steps, warm=min(2, steps)))
        if not torch.isfinite(last):
            raise RuntimeError(f"the loss is {float(last)}")
        return one

    if where == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with fast(model, keep=8 * plan.dequantizable // 10) as how:  # the memory budget that a run would use
        one = took(load.lengths)
        work = run_work(text_counts(shape, load, device), load)
        memory = text_memory(shape, load, device)
        figures = [
            Figure(
                "training",
                load.tokens / one,
                "tokens/s",
                _scaled(load.tokens, _at_most(work, probed)),
                load.tokens / rates.seconds(work),
            ),
            Figure(
                "arithmetic",
                work.operations / one / 1e12,
                "TFLOP/s",
                None if probed is None else probed.operations / 1e12,
                rates.operations / 1e12,
            ),
            _peak(where, memory),
        ]
        notes = [_described(plan, load), how.summary()]
        tell(_result(figures, *notes))
        for lengths in others:
            if task.limit and not task.dry and time.monotonic() - _BEGAN > task.limit / 2:
                notes.append(f"no time for micro-batches of {len(lengths)} × {lengths[0]:,}")
                break
            tokens = sum(lengths)
            name = f"training, micro-batches of {len(lengths)} × {lengths[0]:,}"
            figures.append(Figure(name, tokens / took(lengths), "tokens/s"))
            tell(_result(figures, *notes))
    return _result(figures, *notes)


def _load_8b(task: Task, quantize: str | None = None) -> Any:
    from veneer.plan.memory import Load

    return Load((task.sizes.length,) * task.sizes.rows, rank=RANK, quantize=quantize)


def _load_70b(task: Task) -> Any:
    """Return the load of `veneer plan --base meta-llama/Llama-3.1-70B --rows 5000 --tokens-per-row 600`."""
    from veneer.plan.memory import Load

    s = task.sizes
    rows = (s.large_row,) * (s.large_tokens // s.large_row)
    return Load(rows, rank=RANK, quantize="nf4", checkpointing=s.recomputes)


def train(task: Task) -> dict[str, Any]:
    return _train(task, task.sizes.text, _load_8b(task), task.sizes.steps, _smaller(task))


def _smaller(task: Task) -> list[tuple[int, ...]]:
    """Return micro-batches with a quarter, an eighth and half of the tokens of the measured micro-batch."""
    return [(task.sizes.length // 4,) * rows for rows in (2, 1, 4)]


def qlora(task: Task) -> dict[str, Any]:
    return _train(task, task.sizes.text, _load_8b(task, "nf4"), task.sizes.steps, _smaller(task))


def large(task: Task) -> dict[str, Any]:
    """Measure one step, after one that does not count."""
    return _train(task, task.sizes.large, _load_70b(task), 1)


def _peer_steps(task: Task, model: Any, *notes: str) -> dict[str, Any]:
    """Measure the same steps with a transformers model to which the peer has added an adapter."""
    import torch

    s = task.sizes
    vocabulary = _config(s.text)["vocab_size"]
    ids = torch.randint(3, vocabulary, (s.rows, s.length), generator=torch.Generator().manual_seed(0)).to(s.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if s.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    one = statistics.median(_seconds(step, s.device, s.steps, warm=min(2, s.steps)))
    peak = torch.cuda.max_memory_allocated() if s.device == "cuda" else peak_bytes()
    figures = [
        Figure("training", s.rows * s.length / one, "tokens/s"),
        Figure("peak memory", peak / 1e9, "GB"),
    ]
    return _result(figures, *notes)


def bitsandbytes_peft(task: Task) -> dict[str, Any]:
    """Measure bitsandbytes' Linear4bit under PEFT's layers.

    If the activations do not fit in memory, they are recomputed."""
    import bitsandbytes
    import torch
    from peft import LoraConfig, get_peft_model

    model = _bare_text(task.sizes.text)
    blocks = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    for name, module in blocks.items():
        owner, _, key = name.rpartition(".")
        four = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        setattr(model.get_submodule(owner), key, four)

    def four_bits(name: str, weight: Any) -> Any:
        if name.removesuffix(".weight") not in blocks:
            return weight
        return bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(task.sizes.device)

    _filled(model, task.sizes.device, four_bits)
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(LINEARS)))
    try:
        return _peer_steps(task, model, "activations kept")
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return _peer_steps(task, model, "activations made again: kept, they do not fit")


def unsloth(task: Task) -> dict[str, Any]:
    """Measure Unsloth with its own loader, on a checkpoint written for it."""
    from unsloth import FastLanguageModel  # must precede transformers, which Unsloth patches

    import torch  # isort: skip
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    s, folder = task.sizes, Path(task.work) / "unsloth"
    plain = _filled(_bare_text(s.text), s.device)
    plain.save_pretrained(folder)
    words = models.WordLevel({str(i): i for i in range(plain.config.vocab_size)}, unk_token="0")
    ends = {"bos_token": "1", "eos_token": "2", "pad_token": "0"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **ends).save_pretrained(folder)
    del plain
    torch.cuda.empty_cache()
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=s.length, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=0,
        target_modules=list(LINEARS),
        use_gradient_checkpointing="unsloth",
    )
    return _peer_steps(task, model, "use_gradient_checkpointing='unsloth', as its notebooks have it")


# -- products and ops --------------------------------------------------------------------------------------------------


def products(task: Task) -> dict[str, Any]:
    """Measure x·Wᵀ with few rows, as in decoding, for the widest weight of a block in several formats.

    Then measure single ops of a training step."""
    import torch
    import torch.nn.functional as F

    from veneer.ops.quantized import quantize

    s, config = task.sizes, _config(task.sizes.text)
    inputs, outputs = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator(s.device).manual_seed(0)
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=s.device).normal_(0, 0.02, generator=generator)
    copies = 2 if task.dry else 8  # more weights than fit in the GPU's cache
    figures: list[Figure] = []
    for kind, a_weight in (("bfloat16", 2.0), ("nf4", 0.52), ("int8", 1.0)):
        kept = [weight.clone() if kind == "bfloat16" else quantize(weight, kind) for _ in range(copies)]
        for rows in (1, 8, 64):
            x = torch.randn(rows, inputs, generator=generator, device=s.device).bfloat16()

            def all_of_them(x: Any = x, kept: Any = kept) -> None:
                for w in kept:
                    F.linear(x, w)

            with torch.no_grad():
                one = min(_seconds(all_of_them, s.device, 10, warm=3)) / copies
            most = None
            if task.probe is not None:
                moved = a_weight * weight.numel() + 2.0 * rows * (inputs + outputs)
                most = 1 / max(2 * rows * weight.numel() / task.probe["operations"], moved / task.probe["bandwidth"])
            figures.append(Figure(f"{kind}, {rows} row{'s' if rows > 1 else ''}", 1 / one, "products/s", most))
            tell(_result(figures))
        del kept
    note = _ops(task, figures)
    return _result(figures, f"a weight of {outputs:,} × {inputs:,}, {copies} of them in turn", note)


def _ops(task: Task, figures: list[Figure]) -> str:
    """Add figures for the ops of a training step, forward and backward; return a note.

    Each op is measured with its library and with torch."""
    import torch

    from veneer.ops.attention import RowLayout, VarlenSettings, rope_varlen_attention
    from veneer.ops.dispatch import override_ops
    from veneer.ops.loss import token_nll
    from veneer.ops.norms import rms_norm

    s, config = task.sizes, _config(task.sizes.text)
    n, width, heads, kv = s.rows * s.length, *(config[k] for k in ("hidden_size", *_HEADS))
    dim = width // heads
    generator = torch.Generator(s.device).manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16, device=s.device).normal_(0, 0.5, generator=generator)

    x, qkv = normal(n, width).requires_grad_(), normal(n, heads + 2 * kv, dim).requires_grad_()
    weight, head, angles = normal(width), normal(config["vocab_size"], width), normal(n, dim // 2)
    targets = torch.randint(0, len(head), (n,), generator=generator, device=s.device)
    settings = VarlenSettings(RowLayout([s.length] * s.rows, s.device), dim**-0.5)
    cos, sin = angles.cos(), angles.sin()
    given = {
        "rms_norm_autograd": ("liger", x, lambda: rms_norm(x, weight, 1e-5)),
        "rope": ("liger", qkv, lambda: rope_varlen_attention(qkv, cos, sin, kv, settings)),
        "varlen_attention": ("varlen", qkv, lambda: rope_varlen_attention(qkv, cos, sin, kv, settings)),
        "linear_cross_entropy": ("liger", x, lambda: token_nll(x, head, targets)),
    }
    for op, (library, leaf, run) in given.items():
        for name in (library, "torch"):
            with override_ops(**{op: name}):
                one = min(_seconds(lambda: torch.autograd.grad(run().sum(), leaf), s.device, 10, warm=2))  # noqa: B023
            figures.append(Figure(f"{op}, {name}", 1 / one, "calls/s"))
            tell(_result(figures))
    return f"ops: {n:,} tokens; rope and varlen_attention are each timed with the whole of attention around them"


_HEADS = ("num_attention_heads", "num_key_value_heads")


# -- serving -----------------------------------------------------------------------------------------------------------


def _prompts(task: Task) -> list[tuple[int, ...]]:
    words = _config(task.sizes.text)["vocab_size"] - 3
    return [tuple((i * 37 + j * 11) % words + 3 for j in range(task.sizes.prompt)) for i in range(task.sizes.requests)]


class _Numbers:
    """Minimal tokenizer for the engine: decodes ids as numbers."""

    def decode(self, token_ids: Any, **settings: Any) -> str:
        return "".join(f" {int(i)}" for i in token_ids)


def serve(task: Task) -> dict[str, Any]:
    """Measure generated tokens per second; the time includes processing the prompts.

    Covers the base, 8 adapters of rank 16 on all seven projections, and many adapters of rank 8 on q and v,
    requested with frequencies that follow Zipf's law."""
    import torch

    import veneer
    from veneer.models.text.base import TextBase
    from veneer.plan.fit import usable_memory
    from veneer.plan.memory import weight_bytes
    from veneer.plan.serving import Traffic, serving
    from veneer.plan.shape import text_shape
    from veneer.serve.engine.engine import TextEngine
    from veneer.serve.request import BASE, Finished, Request, Sampling
    from veneer.serve.settings import EngineSettings

    s, (device, rates, probed) = task.sizes, _planned_for(task)
    shape = text_shape(_config(s.text))
    model = _bare_text(s.text)
    prompts, where = _prompts(task), torch.device(s.device)

    def adapter(seed: int, rank: int, targets: Any) -> Any:
        made = veneer.create(model, veneer.LoraSpec(rank=rank, alpha=2.0 * rank, targets=targets), seed=seed)
        generator = torch.Generator(where).manual_seed(seed)
        for pair in made.pairs.values():
            pair.B = torch.empty(pair.B.shape, device=where).normal_(0, 0.005, generator=generator)
        return made.mapped(lambda t: t.bfloat16())

    # the GPU holds the base, keys and values, and each adapter twice: as loaded and as prepared for products
    heads = shape.layers[0]
    pairs = 2 * 8 * shape.hidden * len(shape.layers) * 4  # upper bound for the bfloat16 bytes of rank 8 on q and v
    shelves = 2 * (s.many * pairs + 8 * 8 * pairs)
    needs = sum(weight_bytes(shape, "bfloat16", None)) + s.cache + shelves
    if needs > usable_memory(device):
        return {"left_out": f"about {needs / 1e9:.0f} GB are needed, and {device.memory / 1e9:.0f} GB are there"}
    _filled(model, s.device)
    eight = {f"{i:064x}": adapter(i, RANK, "all-linear") for i in range(8)}
    first = adapter(100, 8, ("q_proj", "v_proj"))
    many = {f"{100 + i:064x}": first.mapped(lambda t, i=i: t * (1 + i / s.many)) for i in range(s.many)}
    shelf = {**eight, **many}
    base = TextBase(
        "random",
        model,
        _Numbers(),
        Path(task.work),
        "",
        torch.bfloat16,
        where,
        "as asked for",  # type: ignore[arg-type]
        context=_config(s.text)["max_position_embeddings"],
    )
    settings = EngineSettings(rows=s.requests, budget=8192, cache_bytes=s.cache, adapter_bytes=2 * shelves)
    sampling = Sampling(max_tokens=s.new, temperature=0.0, ignore_eos=True)

    def rate(engine: TextEngine, digests: Sequence[str | None], times: int = 2) -> float:
        """Return tokens per second, the best of `times` runs; each run starts with an empty cache."""

        async def answer(prompt: tuple[int, ...], digest: str | None) -> None:
            mix = BASE if digest is None else ((digest, 1.0),)
            async for event in engine.events(Request(prompt, sampling, mix)):
                if isinstance(event, Finished) and event.reason != "length":
                    raise RuntimeError(f"a request ended with {event.reason}: {event.error}")

        async def all_of_them() -> None:
            given = zip(prompts, digests, strict=False)
            await asyncio.gather(*(answer(p, d) for p, d in given))

        def run() -> None:
            engine.cache.forget()
            asyncio.run(all_of_them())

        return min(len(prompts), len(digests)) * s.new / min(_seconds(run, s.device, times, warm=0))

    def beside(metric: str, value: float, rank: int, adapters: int) -> Figure:
        traffic = Traffic(s.prompt, s.new, s.requests, adapters)
        said = [
            None if r is None else serving(shape, device, r, traffic, rank=rank).tokens_per_second
            for r in (probed, rates)
        ]
        return Figure(metric, value, "tokens/s", *said)

    n, names = s.requests, list(eight)
    dice = random.Random(0)
    zipf = dice.choices(list(many), [1 / (i + 1) for i in range(s.many)], k=n)
    with TextEngine(base, lambda digest, _: shelf[digest], settings) as engine:
        rate(engine, [None] * min(n, 8), 1)
        figures = [beside("base", rate(engine, [None] * n), 1, 0)]
        tell(_result(figures))
        under = [names[i % 8] for i in range(n)]
        rate(engine, under[:8], 1)
        figures.append(beside("8 adapters", rate(engine, under), RANK, 8))
        tell(_result(figures))
        alone = s.new / min(_seconds(lambda: rate(engine, [None], 1), s.device, 1, warm=0))
        figures.append(Figure("one request alone", alone, "tokens/s"))
        tell(_result(figures))
        for digest in many:
            engine.residents.load(digest, shelf[digest])
        figures.append(Figure(f"{s.many:,} adapters", rate(engine, zipf, 1), "tokens/s"))
        how = f"the engine runs {engine.runner.how}"
    shape_of = f"{n} requests of {s.prompt} + {s.new} tokens; {heads.kv_heads} heads of keys and values"
    return _result(figures, shape_of, how)


def vllm(task: Task) -> dict[str, Any]:
    """Measure vLLM with its default settings, dummy weights, and adapters loaded from files."""
    import json

    import torch
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    s, folder = task.sizes, Path(task.work) / "vllm"
    model = _bare_text(s.text)
    model.config.save_pretrained(folder)
    generator = torch.Generator("cuda").manual_seed(0)

    def random_matrix(*shape: int) -> Any:
        return torch.empty(*shape, device="cuda").normal_(0, 0.005, generator=generator).bfloat16().cpu()

    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    blocks = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    for i in range(8):
        (own := folder / f"a{i}").mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, m in blocks.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = random_matrix(RANK, m.in_features)
            tensors[f"base_model.model.{name}.lora_B.weight"] = random_matrix(m.out_features, RANK)
        save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {**about, "target_modules": list(LINEARS), "base_model_name_or_path": str(folder)}
        (own / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    del model
    torch.cuda.empty_cache()
    engine = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_num_seqs=s.requests,
        max_model_len=s.prompt + s.new + 16,
        enable_lora=True,
        max_loras=8,
        max_cpu_loras=8,
        max_lora_rank=RANK,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=s.new, temperature=0, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": list(p)} for p in _prompts(task)]
    under = [LoRARequest(f"a{i % 8}", i % 8 + 1, str(folder / f"a{i % 8}")) for i in range(s.requests)]

    def rate(requests: Any) -> float:
        run = lambda: engine.generate(prompts, sampling, lora_request=requests, use_tqdm=False)  # noqa: E731
        return s.requests * s.new / min(_seconds(run, s.device, 2, warm=1))

    note, figures = "enable_lora, its own compilation and graphs", [Figure("8 adapters", rate(under), "tokens/s")]
    tell(_result(figures, note))
    return _result([*figures, Figure("base", rate(None), "tokens/s")], note)


# -- pictures ----------------------------------------------------------------------------------------------------------


def flux(task: Task) -> dict[str, Any]:
    """Measure a training step and denoiser calls of FLUX.1.

    The step trains rank 16 on every attention projection. The calls are measured for the base and for three
    stacked adapters."""
    import torch

    from veneer.plan.image import ImageLoad, image_counts
    from veneer.plan.plan import TrainingJob, image_plan

    s, (device, _, _) = task.sizes, _planned_for(task)
    config = {**_config(s.denoiser), **s.more}
    load = ImageLoad(pictures=1, height=s.picture, width=s.picture, rank=RANK)
    plan = image_plan("", config, load, device, TrainingJob(1))
    load, why = settled(plan)
    if load is None:
        return {"left_out": why}
    if load.height != s.picture:
        return {"left_out": f"pictures of {s.picture} × {s.picture} do not fit: {plan.changes[0].text}"}
    bare = _bare_denoiser(s.denoiser, s.more)
    model = _filled(bare, s.device, _quantizer(bare, load.quantize))
    given = _flux_inputs(config, s.picture, s.device)
    t = torch.full((1,), 0.5, device=s.device).bfloat16()

    def call(x: Any) -> Any:
        return model(hidden_states=x, timestep=t, return_dict=False, **given)[0]

    places = (s.picture // 16) ** 2
    clean, noise = (torch.randn(1, places, config["in_channels"], device=s.device).bfloat16() for _ in range(2))
    counts = image_counts(config, load)
    trained, how = _train_flux(task, model, call, clean, noise, load, counts)
    tell(_result(trained, how))
    figures = [*trained, *_draw_flux(task, model, call, clean, counts)]
    return _result(figures, f"{s.picture} × {s.picture}: {_described(plan, load)}", how)


_OF_FLUX: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "targets": JOINT}


def _train_flux(
    task: Task, model: Any, call: Callable[[Any], Any], clean: Any, noise: Any, load: Any, counts: Any
) -> tuple[list[Figure], str]:
    import torch

    import veneer
    from veneer.models.image.fast import fast_denoiser
    from veneer.plan.memory import run_memory
    from veneer.plan.time import run_work

    s, (device, rates, probed) = task.sizes, _planned_for(task)
    last = torch.zeros((), device=s.device)
    with veneer.attach(model) as attachment:
        attachment.add("a", veneer.create(model, veneer.LoraSpec(**_OF_FLUX), seed=0), trainable=True)
        attachment.use("a")
        parameters = list(attachment.parameters("a").values())
        optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
        if load.checkpointing:
            model.enable_gradient_checkpointing()
        model.train()

        def step() -> None:
            nonlocal last
            loss = (call(0.5 * clean + 0.5 * noise).float() - (noise - clean).float()).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            last = loss.detach()

        if s.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with fast_denoiser(model) as how:
            one = statistics.median(_seconds(step, s.device, s.steps, warm=min(2, s.steps)))
    if not torch.isfinite(last):
        raise RuntimeError(f"the loss is {float(last)}")
    work = run_work(counts, load)
    figure = Figure("training", 1 / one, "steps/s", _at_most(work, probed), 1 / rates.seconds(work))
    return [figure, _peak(s.device, run_memory(counts, load, device))], how.summary()


def _draw_flux(task: Task, model: Any, call: Callable[[Any], Any], x: Any, counts: Any) -> list[Figure]:
    import torch

    import veneer
    from veneer.plan.time import Work

    s, (_, rates, probed) = task.sizes, _planned_for(task)
    # A forward pass has half of a step's products and a third of its attention, and reads each weight once.
    forward = Work(counts.forward, 2.0 * counts.parameters)
    model.eval()
    with veneer.attach(model) as attachment, torch.no_grad():
        for i in range(len(MIX)):
            adapter = veneer.create(model, veneer.LoraSpec(**_OF_FLUX), seed=i)
            generator = torch.Generator(s.device).manual_seed(i)
            for pair in adapter.pairs.values():
                pair.B = torch.empty(pair.B.shape, device=s.device).normal_(0, 0.02, generator=generator)
            attachment.add(f"a{i}", adapter.mapped(lambda t: t.bfloat16()))
        rate = {}
        for name, mix in (("base", ()), ("three adapters", [(f"a{i}", strength) for i, strength in enumerate(MIX)])):
            attachment.use(*mix)
            rate[name] = 1 / statistics.median(_seconds(lambda: call(x), s.device, s.steps, warm=1))
    alone, mixed = rate.values()
    return [
        Figure("drawing, base", alone, "calls/s", _at_most(forward, probed), 1 / rates.seconds(forward)),
        Figure("drawing, three adapters", mixed, "calls/s"),
        Figure("three adapters over the base", 100 * (alone / mixed - 1), "%"),
    ]


def _flux_inputs(config: Mapping[str, Any], picture: int, device: str) -> dict[str, Any]:
    """Return FLUX.1's inputs for one picture, except latents and time."""
    import torch

    side, text = picture // 16, config["text_tokens"]

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()

    places = torch.zeros(side * side, 3, device=device)
    places[:, 1] = torch.arange(side, device=device).repeat_interleave(side)
    places[:, 2] = torch.arange(side, device=device).repeat(side)
    return {
        "encoder_hidden_states": noise(1, text, config["joint_attention_dim"]),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 3.5, device=device).bfloat16() if config.get("guidance_embeds") else None,
        "img_ids": places.bfloat16(),
        "txt_ids": torch.zeros(text, 3, device=device).bfloat16(),
    }


# -- all sides ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A measurement by veneer or by a peer.

    `limit`: maximum seconds. `needs`: the peer's package, which can be in another environment."""

    part: str
    name: str
    limit: float
    run: Callable[[Task], dict[str, Any]]
    needs: str = ""

    @property
    def key(self) -> str:
        return f"{self.part}: {self.name}"


SIDES = [
    Side("tests", "marked gpu", 90, gpu_tests),
    Side("train", "veneer, Llama 3 8B, bf16", 75, train),
    Side("qlora", "veneer, Llama 3 8B, nf4", 60, qlora),
    Side("large", "veneer, Llama 3.1 70B, nf4", 75, large),
    Side("serve", "veneer, Llama 3 8B", 75, serve),
    Side("flux", "veneer, FLUX.1 dev", 65, flux),
    Side("products", "veneer, few rows", 30, products),
    Side("qlora", "bitsandbytes + PEFT", 75, bitsandbytes_peft, "bitsandbytes"),
    Side("serve", "vLLM", 150, vllm, "vllm"),
    Side("qlora", "Unsloth", 120, unsloth, "unsloth"),
]
"""All sides in the order in which they run; veneer's come first, so that slow peers take none of their time."""
PROBE = Side("probe", "the card", 30, probe)
PARTS = list(dict.fromkeys(side.part for side in [PROBE, *SIDES]))
