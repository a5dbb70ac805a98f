"""The files of an image base: a diffusers directory to loaded components. (One file: image_single_file.)

    model_index.json      name -> [library, class]; each component in a folder of its name
    <name>/config.json    the component's shape; weights beside it as safetensors, whole, sharded, or a variant (.fp16)

Only classes of diffusers and transformers are made, only safetensors are opened, and every tensor must have its place.
What a picture does not need (safety checker, feature extractor) is left out. Nothing here asks a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.errors import BaseError, MissingExtraError
from veneer.models.fingerprint import fingerprint_parts, shaping_fields
from veneer.models.image.families import FAMILIES, ImageFamily, family_label, family_of
from veneer.models.loading import loading
from veneer.models.quantise import lazy_state, load_part, load_state, saved_kind
from veneer.models.sources import find
from veneer.models.text.base import check_loaded, check_memory, choose_device, choose_dtype
from veneer.models.weights import StoredTensor, file_table, pickles_refused, stored_dtype

__all__ = [
    "INDEX",
    "Loaded",
    "components",
    "config_of",
    "control_of",
    "digest_of",
    "family_of_directory",
    "fields_of",
    "flags_of",
    "has_weights",
    "load_component",
    "own_pipelines",
    "read_directory",
    "read_index",
    "require_diffusers",
    "table_of",
    "unreadable",
]

INDEX = "model_index.json"
_LEFT_OUT = {"safety_checker", "feature_extractor", "image_encoder"}
_LIBRARIES = ("diffusers", "transformers")
_LARGE_ENCODERS = {
    *("T5EncoderModel", "Mistral3ForConditionalGeneration", "Qwen3ForCausalLM"),
    "Qwen2_5_VLForConditionalGeneration",
}
_WRITTEN = ("diffusion_pytorch_model", "model")
_NOT_SHAPE = {"sample_size", "force_upcast", "quantization_config"}


@dataclass
class Loaded:
    """The components of a base and what was settled in loading them. `pipelines`: kinds whose class the index names.
    `settings`: the index' flags, which are arguments of pipelines: force_zeros_for_empty_prompt, is_distilled, …"""

    family: ImageFamily
    parts: dict[str, Any]
    fingerprint: str
    dtype: torch.dtype
    dtype_reason: str
    device: torch.device
    notes: list[str] = field(default_factory=list)
    pipelines: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def require_diffusers() -> None:
    """Raises MissingExtraError where diffusers is not installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("image bases need diffusers", fix="pip install 'veneer[image]'") from error


# -- directories -----------------------------------------------------------------------------------------------------


def read_directory(path: Path, dtype: str | torch.dtype, device: str | torch.device, quantise: str | None) -> Loaded:
    """Every component of a diffusers directory. Raises BaseError as `load_image` says."""
    index = read_index(path)
    classes = components(index, path)
    family = family_of_directory(path, classes)
    folders = {name: path / name for name in classes}
    tables, notes = {}, []
    for name, (_, classname) in classes.items():
        if has_weights(classname):
            tables[name], variant = table_of(folders[name])
            if variant:
                notes.append(f"{name}: only the {variant} weights are there, and they are used")
    where = choose_device(device)
    kind, reason = choose_dtype(dtype, where, stored_dtype(tables[family.denoiser]))
    _check_room(path, tables, kind, where, quantise, family)
    parts: dict[str, Any] = {}
    for name, (library, classname) in classes.items():
        quant = quantise if name == family.denoiser or classname in _LARGE_ENCODERS else None
        parts[name], more = load_component(folders[name], library, classname, kind, where, quant, name in tables)
        notes += [f"{name}: {note}" for note in more]
    return Loaded(
        family,
        parts,
        digest_of(parts, tables),
        kind,
        reason,
        where,
        notes,
        own_pipelines(index, family),
        flags_of(index),
    )


def read_index(path: Path) -> dict[str, Any]:
    """model_index.json of a directory. Raises BaseError where it is none."""
    try:
        found = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        kind, fix = "", None
        if (path / "config.json").exists():
            kind = str(config_of(path).get("_class_name") or "a text base")
            fix = "give the folder around it"
            if kind == "a text base":
                fix = "`veneer generate` uses it, and data.train is what it learns from"
            elif "ControlNet" in kind:
                fix = f"use it with --control canny@{path}=PICTURE"
        raise BaseError(
            f"this is no image base: it has no {INDEX}" + (f", it is {kind}" if kind else ""), where=str(path), fix=fix
        ) from error
    except (OSError, ValueError) as error:
        raise BaseError(f"{INDEX} cannot be read: {error}", where=str(path)) from error
    if not isinstance(found, dict):
        raise BaseError(f"{INDEX} is not a JSON object", where=str(path))
    return found


def components(index: Mapping[str, Any], path: Path) -> dict[str, tuple[str, str]]:
    """name -> (library, class) of what is there and needed."""
    out = {}
    for name, value in index.items():
        if name.startswith("_") or name in _LEFT_OUT or not isinstance(value, list | tuple) or len(value) != 2:
            continue
        library, classname = value
        if library is None or classname is None:
            continue
        if library not in _LIBRARIES:
            raise BaseError(
                f"{name} is a {classname} of {library}: code that came with the base is not run",
                where=str(path / INDEX),
                fix="use a base whose components are diffusers' and transformers'",
            )
        if not (path / name).is_dir():
            raise BaseError(f"the folder of {name} is missing", where=str(path / name), fix="copy the base again")
        out[name] = (str(library), str(classname))
    return out


def family_of_directory(path: Path, classes: Mapping[str, tuple[str, str]]) -> ImageFamily:
    denoiser = next((n for n in ("unet", "transformer") if n in classes), None)
    if denoiser is None:
        raise BaseError("this base has neither a unet nor a transformer", where=str(path / INDEX))
    classname = classes[denoiser][1]
    family = family_of(classname, config_of(path / denoiser))
    if family is None:
        raise BaseError(
            f"{classname} is of no family that veneer knows",
            where=str(path / denoiser),
            fix="known: " + ", ".join(row.label for row in FAMILIES.values()),
        )
    for name in ("vae", "scheduler"):
        if name not in classes:
            raise BaseError(f"this base has no {name}", where=str(path / INDEX))
    return family


def own_pipelines(index: Mapping[str, Any], family: ImageFamily) -> dict[str, str]:
    """FLUX.2 klein's pipelines are not dev's; the index says which it is."""
    if family.name == "flux2" and index.get("_class_name") == "Flux2KleinPipeline":
        return {"text": "Flux2KleinPipeline", "inpaint": "Flux2KleinInpaintPipeline"}
    return {}


def flags_of(index: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in index.items() if not n.startswith("_") and isinstance(v, bool | int | float | str)}


def config_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseError("config.json cannot be read", where=str(folder), fix="copy the base again") from error
    return found if isinstance(found, dict) else {}


def has_weights(classname: str) -> bool:
    return not any(word in classname for word in ("Tokenizer", "Scheduler", "Processor"))


def table_of(folder: Path) -> tuple[list[StoredTensor], str]:
    """The stored tensors of a component, and the variant where only one is there."""
    for variant in ("", ".fp16"):
        for stem in _WRITTEN:
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                return file_table(_shards(index)), variant.removeprefix(".")
            if (folder / f"{stem}{variant}.safetensors").exists():
                return file_table([folder / f"{stem}{variant}.safetensors"]), variant.removeprefix(".")
    raise pickles_refused(folder)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseError("the index of the weight files cannot be read", where=str(index)) from error
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise BaseError(
            f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:5])}",
            where=str(index.parent),
            fix="copy or download the base again; its index names them",
        )
    return files


def _check_room(
    path: Path,
    tables: Mapping[str, list[StoredTensor]],
    dtype: torch.dtype,
    device: torch.device,
    quantise: str | None,
    family: ImageFamily,
) -> None:
    bytes_each = {"nf4": 0.6, "int8": 1.1}.get(quantise or "", dtype.itemsize)
    needs = 0.0
    for name, table in tables.items():
        needs += sum(t.elements for t in table) * (bytes_each if name == family.denoiser else dtype.itemsize)
    check_memory(path, int(needs), dtype, device)


def load_component(
    folder: Path,
    library: str,
    classname: str,
    dtype: torch.dtype,
    device: torch.device,
    quantise: str | None,
    weights: bool,
) -> tuple[Any, tuple[str, ...]]:
    import importlib

    cls = getattr(importlib.import_module(library), classname, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise BaseError(
            f"the installed {library} has no {classname}", where=str(folder), fix=f"pip install -U {library}"
        )
    options: dict[str, Any] = {"local_files_only": True}
    if weights:
        options |= {"use_safetensors": True, "output_loading_info": True}
        options["torch_dtype" if library == "diffusers" else "dtype"] = dtype
        if not any((folder / f"{s}.safetensors{i}").exists() for s in _WRITTEN for i in ("", ".index.json")):
            options["variant"] = "fp16"
    saved = saved_kind(config_of(folder), str(folder)) if weights else ""
    with loading():
        try:
            if saved or (quantise and weights):
                made = _in_codes(cls, folder, library, quantise or "", dtype)
            else:
                made = cls.from_pretrained(folder, **options)
        except Exception as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                raise
            raise unreadable(folder, error) from error
    if not weights:
        return made, ()
    model, info = made
    notes = check_loaded(folder, info)
    return model.to(device), notes


def _in_codes(cls: Any, folder: Path, library: str, kind: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A component with its linear weights as `kind`, or as a checkpoint of bitsandbytes has them."""
    from transformers import AutoConfig

    table, _ = table_of(folder)
    if library == "diffusers":
        return load_part(cls, folder, table, kind, dtype)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    model, info = load_state(cls, config, lazy_state(table), kind, dtype)
    return model.eval(), info


def unreadable(where: Path, error: Exception) -> BaseError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return BaseError(f"this component of the base cannot be read: {said}", where=str(where))


def digest_of(parts: Mapping[str, Any], tables: Mapping[str, list[StoredTensor]]) -> str:
    fields = {name: fields_of(part) for name, part in parts.items() if name in tables}
    return fingerprint_parts({name: (fields[name], tables[name]) for name in fields})


def fields_of(part: Any) -> dict[str, Any]:
    """What of a component's config shapes it: class, and whatever is not at the class's default."""
    import inspect

    from transformers import PreTrainedConfig

    if isinstance(part.config, PreTrainedConfig):
        found = shaping_fields(part.config)
    else:
        usual = {n: p.default for n, p in inspect.signature(type(part).__init__).parameters.items()}
        found = {
            n: v for n, v in part.config.items() if not n.startswith("_") and _plain(v) != _plain(usual.get(n))
        }  # fmt: skip
    found = {n: v for n, v in found.items() if n not in _NOT_SHAPE}
    return found | {"class": type(part).__name__}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# -- ControlNets -----------------------------------------------------------------------------------------------------


def control_of(name: str, family: ImageFamily, denoiser: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A ControlNet for a base of `family` with that denoiser. Raises BaseError as `load_control` says."""
    try:
        folder = find(name)
    except BaseError as error:
        fix = "a folder as diffusers saves one, or a hub id; canny=PICTURE takes the base's own"
        raise BaseError(f"ControlNet {name!r}: {error.what}", where=error.where, fix=fix) from error
    if folder.is_file():
        raise BaseError("a ControlNet is a directory with config.json", where=str(folder))
    if not (folder / "config.json").exists():
        raise BaseError("this is no ControlNet: it has no config.json", where=str(folder))
    config = config_of(folder)
    classname = str(config.get("_class_name", ""))
    theirs = _control_family(classname, config)
    if theirs is None:
        raise BaseError(f"this is no ControlNet: its config says {classname or 'nothing'}", where=str(folder))
    if theirs != family.name and {theirs, family.name} != {"sd15", "sd2"}:
        raise BaseError(
            f"this is a ControlNet for {family_label(theirs)}, the base is {family.label}", where=str(folder)
        )
    if not family.control:
        raise BaseError(f"diffusers has no ControlNet for {family.label}", where=str(folder))
    for size in _CONTROL_SIZES:
        own, base = config.get(size), denoiser.config.get(size)
        if own is not None and base is not None and _plain(own) != _plain(base):
            raise BaseError(
                f"this ControlNet is for another base: its {size} is {own}, the base's {base}", where=str(folder)
            )
    model, _ = load_component(folder, "diffusers", classname, dtype, device, None, True)
    made: nn.Module = model.eval()
    return made.requires_grad_(False)


_CONTROL_SIZES = (
    *("cross_attention_dim", "block_out_channels", "joint_attention_dim", "num_attention_heads"),
    *("attention_head_dim", "caption_projection_dim", "pooled_projection_dim"),
)


def _control_family(classname: str, config: Mapping[str, Any]) -> str | None:
    if classname == "ControlNetModel":
        row = family_of("UNet2DConditionModel", config)
        return row.name if row else None
    return next((f.name for f in FAMILIES.values() if f.control == classname), None)
