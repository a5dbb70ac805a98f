"""Predict whether other tools load, refuse or misread an adapter's file.

| tool                  | version                                              | method                              |
| PEFT                  | 0.21                                                 | run (tests/formats/test_compatibility)|
| diffusers             | 0.42                                                 | run                                 |
| sd-scripts, A1111     | networks/lora.py 02298e3; A1111's network_*.py,      | source read                         |
|                       | in the version of Forge                              |                                     |
| ComfyUI               | comfy/lora.py 17358c8f, weight_adapter/lora.py       | source read                         |
| vLLM                  | 0.32                                                 | run (docs/how-to/vllm.md)           |
| TGI                   | January 2026, db931fcf                               | source read                         |
| llama.cpp             | convert_lora_to_gguf.py 0b03adaa                     | source read                         |

"fine" means that no problem is known, not that the tool is proven correct. `formats.convert` writes the right
layout for each tool. Uses files and names; no values of tensors.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from veneer.core.adapter import Adapter, alpha_of
from veneer.errors import counted
from veneer.formats.comparison import Refusals
from veneer.formats.folder import CONFIG_FILE
from veneer.formats.loaders import unreachable
from veneer.formats.metadata import json_value
from veneer.formats.module_tensors import changes_by_module
from veneer.formats.names import component_of
from veneer.formats.peft_config import read_config
from veneer.formats.reading import Reading
from veneer.formats.server_export import MAX_VLLM_RANKS, TGI_RANK, refuse_unservable
from veneer.formats.topology import families

_FLAT = ("lora_unet_", "lora_te", "lycoris_", "lora_transformer_")
_UNFLAT_FLUX = re.compile(r"lora_unet_(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)_.*")
_FORMS = {"hadamard": "LoHa", "kronecker": "LoKr", "gain": "(IA)³", "dense": "difference", "replacement": "new bias"}
_LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.+)")

_TOOLS = {"mlx": "mlx-lm", "tinker": "Tinker"}
"""Other tools whose folders also have an adapter_config.json."""

_Verdict = Literal["fine", "wrong", "refused"]
_Found = Iterator[tuple[_Verdict, str]]


@dataclass(frozen=True)
class ToolVerdict:
    """What a tool does with a file.

    `verdict`: refused, if the tool does not load the file; wrong, if it loads it with another effect; fine,
    if no problem is known. `why`: reasons, or for fine, notes for the user. `to`: the right layout for the
    tool, one of convert.TARGETS. `version`: the tool's version."""

    tool: str
    version: str
    verdict: _Verdict
    why: tuple[str, ...]
    to: str


@dataclass(frozen=True)
class _File:
    """A file's facts without tensor values."""

    path: Path
    reading: Reading

    @property
    def adapter(self) -> Adapter:
        return self.reading.adapter

    @cached_property
    def keys(self) -> list[str]:
        used = {key for keys in self.reading.used.values() for key in keys}
        return sorted({*used, *self.reading.unused, *self.reading.unpaired})

    @cached_property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration; {} if this is not a PEFT folder."""
        return read_config(self.path) if (self.path / CONFIG_FILE).is_file() else {}

    @property
    def is_folder(self) -> bool:
        """Whether the file is a PEFT folder."""
        return bool(self.config) and self.reading.format not in _TOOLS

    @property
    def folder_problem(self) -> str:
        """Why the file is not a PEFT folder."""
        tool = _TOOLS.get(self.reading.format)
        return f"this is a folder of {tool}'s, in names of its own" if tool else "this is one file"

    @property
    def is_gguf(self) -> bool:
        return self.reading.format == "gguf"

    @cached_property
    def is_flat(self) -> bool:
        return any(key.startswith(_FLAT) for key in self.keys)

    @cached_property
    def is_image(self) -> bool:
        return any(component_of(name) for name in changes_by_module(self.adapter)) or bool(self.reading.family)

    @cached_property
    def forms(self) -> Counter[str]:
        """Form -> number of weight changes that are not pairs, and of whole new weights."""
        out = Counter(d.form for name, d in self.adapter.deltas.items() if name.endswith(".weight"))
        return out + Counter(
            {"whole new weight": sum("weight" in tensors for tensors in self.adapter.modules.values())}
        )

    @cached_property
    def dora(self) -> tuple[int, int]:
        """Number of magnitudes along the outputs, and along the inputs."""
        magnitudes = [p.magnitude for p in self.adapter.pairs.values()]
        magnitudes += [d.magnitude for d in self.adapter.deltas.values()]
        ndims = [m.ndim for m in magnitudes if m is not None]
        return sum(n == 1 for n in ndims), sum(n > 1 for n in ndims)

    @cached_property
    def split(self) -> bool:
        """Whether fused projections are block-diagonal with alpha for one part."""
        return any("split_qkv parts" in note for note in self.reading.notes)

    def has(self, *suffixes: str) -> int:
        """Return how many keys end in one of these suffixes."""
        return sum(key.endswith(suffixes) for key in self.keys)

    def forms_text(self, *but: str) -> str:
        """Return the changes that are not pairs as text: "3 LoKr, 1 difference"."""
        return ", ".join(f"{n} {_FORMS.get(form, form)}" for form, n in sorted(self.forms.items()) if form not in but)


def check_tools(path: Path, reading: Reading) -> list[ToolVerdict]:
    """Return what each tool for this kind of base does with the adapter at `path`.

    reading: the adapter as read from `path`."""
    file = _File(path, reading)
    tools: list[tuple[str, str, str, Callable[[_File], _Found]]] = [("PEFT", "0.21", "peft", _peft)]
    if file.is_image:
        tools += [
            ("diffusers", "0.42", "diffusers", _diffusers),
            ("ComfyUI", "comfy/lora.py 17358c8f", "comfyui", _comfyui),
            ("sd-scripts and A1111", "networks/lora.py 02298e3", "kohya", _kohya),
        ]
    else:
        tools += [
            ("vLLM", "0.32", "vllm", _vllm),
            ("TGI", "db931fcf", "tgi", _tgi),
            ("llama.cpp", "convert_lora_to_gguf.py 0b03adaa", "gguf", _llama_cpp),
        ]
    out = []
    for tool, version, to, check in tools:
        problems = list(check(file))
        worst: tuple[_Verdict, ...] = ("refused", "wrong")
        verdict: _Verdict = next((kind for kind in worst if any(kind == k for k, _ in problems)), "fine")
        out.append(
            ToolVerdict(tool, version, verdict, tuple(message for kind, message in problems if kind == verdict), to)
        )
    return out


# -- PEFT, and what draws ----------------------------------------------------------------------------------------------


def _peft(file: _File) -> _Found:
    if not file.is_folder:
        yield "refused", f"it loads a folder with {CONFIG_FILE}, which has the ranks and scales; {file.folder_problem}"
    elif file.is_image:
        yield "fine", "of an image model's denoiser: PeftModel.from_pretrained(pipe.unet or pipe.transformer, FOLDER)"


def _diffusers(file: _File) -> _Found:
    """Check a pipeline's load_lora_weights."""
    family = file.reading.family or ""
    if file.is_gguf:
        yield "refused", "it reads no GGUF adapters"
        return
    if file.is_folder:
        yield (
            "refused",
            "its pipelines look for pytorch_lora_weights.safetensors, with unet. or transformer. before names",
        )
        return
    if any(key.startswith("diffusion_model.") for key in file.keys) and family in ("sd15", "sd2", "sdxl", "flux1"):
        yield "wrong", "it reads only names that begin with unet. or transformer., and the file has none: nothing acts"
        return
    if forms := file.forms_text(*(("kronecker",) if family in ("flux2", "z-image") else ())):
        yield "wrong", f"it loads only pairs, and not: {forms}"
    if n := file.has("dora_scale"):
        yield "wrong", f"it leaves dora_scale out, with a warning: DoRA is lost in {counted(n, 'module')}"
    if not file.is_flat:
        return
    alphas = {round(alpha_of(p.scale, p.rank), 6) for p in file.adapter.pairs.values()}
    if len(alphas) > 1 and family in ("sd15", "sd2", "sdxl"):
        yield "wrong", f"of {len(alphas)} different alphas it loses those of attention modules"
    named = [any(key.startswith(f"lora_unet_{side}_block") for key in file.keys) for side in ("input", "down")]
    if all(named):
        yield "wrong", "of names in both styles it loses the tensors named as in the original code"
    if family == "flux1":
        if file.split:
            yield (
                "wrong",
                "fused projections act at a third or a quarter: their alpha is for one part, their rank for all",
            )
        if n := len({k.partition(".")[0] for k in file.keys if _UNFLAT_FLUX.fullmatch(k.partition(".")[0])}):
            yield "wrong", f"it drops {counted(n, 'module')} outside of the blocks (img_in … final_layer)"
        if any(key.startswith("lora_te3_") for key in file.keys):
            yield "wrong", "it drops T5 (lora_te3_)"


def _comfyui(file: _File) -> _Found:
    if file.is_gguf:
        yield "refused", "it reads no GGUF adapters"
        return
    if file.is_folder:
        yield "refused", f"it loads single files, and ignores {CONFIG_FILE}, which has the scales"
        return
    outputs, _ = file.dora
    if n := file.has("lora_magnitude_vector", "lora_magnitude_vector.weight"):
        yield "wrong", f"it reads magnitudes only as dora_scale: DoRA is lost in {counted(n, 'module')}"
    elif outputs:
        yield "wrong", f"it divides the outputs of DoRA by ‖W‖ and not by ‖W + ΔW‖, in {counted(outputs, 'module')}"
    if n := file.forms["gain"]:
        yield "wrong", f"it does not support (IA)³, in {counted(n, 'module')}"
    if n := file.has("lora_B.bias"):
        yield "wrong", f"it ignores lora_B.bias in {counted(n, 'module')}"
    if file.split:
        yield "wrong", "fused projections act at a third or a quarter: their alpha is for one part, their rank for all"
    stated = {key.removesuffix(".alpha") for key in file.keys if key.endswith(".alpha")}
    scaled = [name for name, pair in file.adapter.pairs.items() if pair.scale != 1]
    if scaled and not stated and json_value(file.reading.metadata, "lora_adapter_metadata"):
        where = f"{counted(len(scaled), 'module')}, whose scales are only in lora_adapter_metadata"
        yield "wrong", f"it takes a scale without an alpha for 1: wrong in {where}"


def _kohya(file: _File) -> _Found:
    if file.is_gguf or file.is_folder or not file.is_flat:
        yield "refused", "it reads only names that begin with lora_unet_ or lora_te, and the file has none"
        return
    if (name := file.reading.family) and (family := families().get(name)) is not None:
        modules = set(changes_by_module(file.adapter))
        lost = [line for line in unreachable(modules, file.keys, "kohya", family) if line.endswith("nothing for it")]
        if len(lost) >= len(modules):
            yield "refused", "no module has a name that sd-scripts reads"
            return
        if lost:
            yield "wrong", f"sd-scripts finds nothing for {len(lost)} of {counted(len(modules), 'module')}"
    if forms := file.forms_text():
        yield "wrong", f"sd-scripts' networks.lora reads only pairs; lycoris.kohya reads the rest: {forms}"
    outputs, inputs = file.dora
    if outputs:
        yield "wrong", f"A1111 takes DoRA's magnitudes along the inputs: wrong in {counted(outputs, 'module')}"
    if outputs + inputs:
        yield "wrong", "sd-scripts' networks.lora leaves dora_scale out; lycoris.kohya reads it as it is meant"
    if file.split:
        yield "wrong", "A1111 has fused projections at a third or a quarter: their alpha is for one part, not for all"


# -- servers of texts --------------------------------------------------------------------------------------------------


_NEEDS_FOLDER = f"it loads a PEFT folder, with {CONFIG_FILE}; "


def _unservable(file: _File, server: str) -> Iterator[str]:
    refused: Refusals = defaultdict(list)
    refuse_unservable(file.adapter, changes_by_module(file.adapter), server, refused)
    for reason, modules in refused.items():
        yield f"{reason} ({counted(len(set(modules)), 'module')})"


def _patterns(file: _File) -> list[str]:
    return [key for key in ("rank_pattern", "alpha_pattern") if file.config.get(key)]


def _vllm(file: _File) -> _Found:
    if not file.is_folder:
        yield "refused", _NEEDS_FOLDER + file.folder_problem
        return
    for reason in _unservable(file, "vLLM"):
        yield "refused", reason
    if patterns := _patterns(file):
        yield "wrong", f"before 0.32 it drops {' and '.join(patterns)}: one alpha/r acts in every module"
    rank = max((p.rank for p in file.adapter.pairs.values()), default=0)
    if (need := next((n for n in MAX_VLLM_RANKS if n >= rank), 0)) > 16:
        yield "fine", f"start it with --max-lora-rank {need} or more; its default is 16"


def _tgi(file: _File) -> _Found:
    if not file.is_folder:
        yield "refused", _NEEDS_FOLDER + file.folder_problem
        return
    for reason in _unservable(file, "TGI"):
        yield "wrong", reason
    if patterns := _patterns(file):
        yield "wrong", f"it drops {' and '.join(patterns)}: one alpha/r acts in every module"
    rank = int(file.config.get("r") or 1)
    padded = max(8, rank) if rank <= 8 else rank + -rank % TGI_RANK
    if padded != rank:
        yield (
            "wrong",
            f"after the first kind of module the scale is {rank}/{padded} of the intended one: ranks are padded",
        )
    layers: dict[str, set[str]] = defaultdict(set)
    for name in file.adapter.pairs:
        if (match := _LAYER.fullmatch(name)) is not None:
            layers[match[3]].add(match[2])
    complete = set().union(*layers.values()) if layers else set()
    if lacking := sorted(kind for kind, present in layers.items() if present != complete):
        yield "wrong", f"kinds that some layer lacks are dropped in all: {', '.join(lacking)}"


def _llama_cpp(file: _File) -> _Found:
    """Check a GGUF file, or a folder for llama.cpp's converter."""
    if file.is_gguf:
        return
    if not file.is_folder:
        yield "refused", f"it loads GGUF, and its converter takes a folder with {CONFIG_FILE}"
        return
    for reason in _unservable(file, "llama.cpp"):
        yield "refused", reason
    if file.config.get("use_rslora"):
        yield "wrong", "its converter writes only lora_alpha, so rsLoRA acts at 1/√rank of its scale"
    if file.config.get("alpha_pattern"):
        yield "wrong", "its converter drops alpha_pattern: one alpha is for every module"
