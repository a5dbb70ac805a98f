"""Load image components from a diffusers directory or a file of original weights.

    model_index.json      name -> [library, class]; each component is in a folder with its name
    <name>/config.json    the component's shape; weights as safetensors: one file, shards, or a variant (.fp16)
    sdxl.safetensors      original weights in one file; missing components come from a diffusers directory

Only classes of diffusers and transformers are instantiated, only safetensors files are opened, and every
tensor must be used. Components that generation does not need (safety checker, feature extractor) are skipped.
The network is not used.

A file of original weights contains no configs. The configs come from the diffusers directory `config`, or
from the hub cache of the repository that diffusers uses for this kind of file. diffusers' converters
translate the tensor names. For FLUX.2 and Qwen-Image, only the denoiser is loaded from the file.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from veneer.errors import BaseError, MissingExtraError, first_few, lacks_memory
from veneer.files.weights import COMPONENT_STEMS, StoredTensor, component_files, file_table, stored_dtype
from veneer.models.architecture import default_fields
from veneer.models.config import LOADED_BYTES
from veneer.models.device import check_memory, choose_device, choose_dtype
from veneer.models.fingerprint import fingerprint_parts, shaping_fields
from veneer.models.image.families import FAMILIES, INDEX_PIPELINES, ImageFamily, denoiser_family
from veneer.models.image.processor import PROCESSORS, read_processor
from veneer.models.loading import check_left_out, check_loaded, errors_only, loading
from veneer.models.patching import widen_products
from veneer.models.quantize import lazy_state, load_part, load_state, saved_kind, scaled_weights
from veneer.models.sources import find_base

_INDEX = "model_index.json"
_LEFT_OUT = {"safety_checker", "feature_extractor", "image_encoder"}
_LIBRARIES = ("diffusers", "transformers")
_LARGE_ENCODERS = {
    *("T5EncoderModel", "Mistral3ForConditionalGeneration", "Qwen3ForCausalLM", "Qwen3Model"),
    "Qwen2_5_VLForConditionalGeneration",
}
_NOT_SHAPE = {"sample_size", "force_upcast", "quantization_config"}


@dataclass
class LoadedParts:
    """The components of a base, and the decisions made while loading them.

    `pipelines`: kind -> pipeline class named in the index. `settings`: flags in the index that are pipeline
    arguments: force_zeros_for_empty_prompt, is_distilled, …"""

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
    """Raise MissingExtraError if diffusers is not installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("image bases need diffusers", extra="image") from error


def meta_denoiser(classname: str, config: Mapping[str, Any]) -> Any:
    """Build a diffusers denoiser on the meta device from the fields of its config.

    Raises MissingExtraError if diffusers is not installed. Errors from diffusers are not caught."""
    require_diffusers()
    import diffusers

    with loading(), torch.device("meta"):
        return getattr(diffusers, classname).from_config(config)


# -- a directory -----------------------------------------------------------------------------------------------------


def read_directory(
    path: Path, dtype: str | torch.dtype, device: str | torch.device, quantize: str | None
) -> LoadedParts:
    """Load every component of a diffusers directory.

    Raises BaseError as in `load_image`."""
    index = read_index(path)
    classes = component_classes(index, path)
    family = family_of_directory(path, classes)
    tables, notes = {}, []
    for name, (_, classname) in classes.items():
        if _has_weights(classname):
            tables[name], variant = stored_tensors(path / name)
            if variant:
                notes.append(f"{name}: using the {variant} weights, because there are no others")
    target_device = choose_device(device)
    kind, reason = choose_dtype(dtype, target_device, stored_dtype(tables[family.denoiser]))
    large = {name for name in tables if name == family.denoiser or classes[name][1] in _LARGE_ENCODERS}
    to_quantize = large if quantize else set[str]()
    _check_memory(path, tables, kind, target_device, quantize, to_quantize)
    parts: dict[str, Any] = {}
    for name, (library, classname) in classes.items():
        part_quantize = quantize if name in to_quantize else None
        parts[name], more = _load_component(
            path / name, library, classname, kind, target_device, part_quantize, name in tables
        )
        notes += [f"{name}: {note}" for note in more]
    digest = parts_fingerprint(parts, tables)
    pipelines = _own_pipelines(index)
    return LoadedParts(family, parts, digest, kind, reason, target_device, notes, pipelines, _flags_of(index))


def read_index(path: Path) -> dict[str, Any]:
    """Read a directory's model_index.json.

    Raises BaseError if the file is missing or unreadable."""
    try:
        index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = "a folder saved by diffusers; for a text base, use `veneer generate`; for a ControlNet, --control"
        raise BaseError(f"this is not an image base: it has no {_INDEX}", where=str(path), fix=fix) from error
    except (OSError, ValueError) as error:
        raise BaseError(f"{_INDEX} cannot be read: {error}", where=str(path)) from error
    if not isinstance(index, dict):
        raise BaseError(f"{_INDEX} is not a JSON object", where=str(path))
    return index


def component_classes(index: Mapping[str, Any], path: Path) -> dict[str, tuple[str, str]]:
    """Return name -> (library, class) of the components that are present and needed.

    Raises BaseError for a missing folder and for a class of another library."""
    out = {}
    for name, value in index.items():
        if name.startswith("_") or name in _LEFT_OUT or not isinstance(value, list | tuple) or len(value) != 2:
            continue
        library, classname = value
        if library is None or classname is None:
            continue
        if library not in _LIBRARIES:
            message = f"{name} is a {classname} of {library}; veneer does not run code that comes with a base"
            where = str(path / _INDEX)
            raise BaseError(message, where=where, fix="use a base with components of diffusers and transformers only")
        if not (path / name).is_dir():
            raise BaseError(f"the folder of {name} is missing", where=str(path / name), fix="copy the base again")
        out[name] = (str(library), str(classname))
    return out


def family_of_directory(path: Path, classes: Mapping[str, tuple[str, str]]) -> ImageFamily:
    """Return the family of a directory that has these components.

    Raises BaseError for an unknown family."""
    denoiser = next((n for n in ("unet", "transformer") if n in classes), None)
    if denoiser is None:
        raise BaseError("this base has neither a unet nor a transformer", where=str(path / _INDEX))
    classname = classes[denoiser][1]
    family = denoiser_family(classname, _config_of(path / denoiser))
    if family is None:
        fix = "known: " + ", ".join(row.label for row in FAMILIES.values())
        raise BaseError(f"{classname} belongs to no family that veneer knows", where=str(path / denoiser), fix=fix)
    for name in ("vae", "scheduler"):
        if name not in classes:
            raise BaseError(f"this base has no {name}", where=str(path / _INDEX))
    return family


def _own_pipelines(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the pipelines that the index names, such as FLUX.2 klein's or Kontext's.

    The denoiser does not determine these pipelines: klein and dev share a denoiser class but not their
    pipelines, and Kontext has the same denoiser as FLUX.1 dev."""
    return dict(INDEX_PIPELINES.get(str(index.get("_class_name")), {}))


def _flags_of(index: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in index.items() if not n.startswith("_") and isinstance(v, bool | int | float | str)}


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseError("config.json cannot be read", where=str(folder), fix="copy the base again") from error
    return config if isinstance(config, dict) else {}


def _has_weights(classname: str) -> bool:
    return not any(word in classname for word in ("Tokenizer", "Scheduler", "Processor"))


def stored_tensors(folder: Path) -> tuple[list[StoredTensor], str]:
    """Return a component's stored tensors, and its variant.

    The variant is "fp16" if the folder has only fp16 weights, else ""."""
    files, variant = component_files(folder)
    return file_table(files), variant


def _check_memory(
    path: Path,
    tables: Mapping[str, list[StoredTensor]],
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    to_quantize: set[str],
) -> None:
    """Raise ResourceError if memory is too small to load the components.

    `to_quantize`: names of the components that will be quantized."""
    bytes_each = LOADED_BYTES.get(quantize or "", dtype.itemsize)
    needs = 0.0
    for name, table in tables.items():
        needs += sum(t.elements for t in table) * (bytes_each if name in to_quantize else dtype.itemsize)
    check_memory(path, int(needs), dtype, device)


def _load_component(
    folder: Path,
    library: str,
    classname: str,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    weights: bool,
) -> tuple[Any, tuple[str, ...]]:
    cls = getattr(importlib.import_module(library), classname, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        message = f"the installed {library} has no {classname}"
        raise BaseError(message, where=str(folder), fix=f"pip install -U {library}")
    options: dict[str, Any] = {"local_files_only": True}
    if weights:
        options |= {"use_safetensors": True, "output_loading_info": True}
        options["torch_dtype" if library == "diffusers" else "dtype"] = dtype
        if not any((folder / f"{s}.safetensors{i}").exists() for s in COMPONENT_STEMS for i in ("", ".index.json")):
            options["variant"] = "fp16"
    saved = saved_kind(_config_of(folder), str(folder)) if weights else ""
    component: Any
    with loading():
        try:
            if classname in PROCESSORS:
                component = read_processor(folder)
            elif saved or (weights and (quantize or scaled_weights(stored_tensors(folder)[0]))):
                component = _load_quantized(cls, folder, library, quantize or "", dtype)
            else:
                component = cls.from_pretrained(folder, **options)
        except Exception as error:
            if lacks_memory(error):
                raise
            raise unreadable(folder, error) from error
    if not weights:
        _apply_lowercase(component)
        return component, ()
    model, info = component
    notes = check_loaded(folder, info, _HARMLESS)
    return model.to(device), notes


def _apply_lowercase(part: Any) -> None:
    """Make a tokenizer lowercase its input if its config says so (`do_lower_case`).

    T5's tokenizer class ignores this setting."""
    backend = getattr(part, "backend_tokenizer", None)
    if backend is not None and backend.normalizer is None and part.init_kwargs.get("do_lower_case"):
        from tokenizers.normalizers import Lowercase

        backend.normalizer = Lowercase()


def _load_quantized(cls: Any, folder: Path, library: str, kind: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Load a component with quantized linear weights.

    The format is `kind`, or the format of the component's bitsandbytes checkpoint."""
    from transformers import AutoConfig

    table, _ = stored_tensors(folder)
    if library == "diffusers":
        return load_part(cls, folder, table, kind, dtype)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    model, info = load_state(cls, config, lazy_state(table), kind, dtype)
    return model.eval(), info


def unreadable(where: Path, error: Exception) -> BaseError:
    """Return a BaseError for an unreadable component, with the library's message."""
    message = " ".join(str(error).split())[:300] or type(error).__name__
    return BaseError(f"this component of the base cannot be read: {message}", where=str(where))


def parts_fingerprint(parts: Mapping[str, Any], tables: Mapping[str, list[StoredTensor]]) -> str:
    """Return a base's fingerprint from its components' config fields and tensors."""
    fields = {name: _fields_of(part) for name, part in parts.items() if name in tables}
    return fingerprint_parts({name: (fields[name], tables[name]) for name in fields})


def _fields_of(part: Any) -> dict[str, Any]:
    """Return a component's class name and its non-default config fields."""
    from transformers import PreTrainedConfig

    if isinstance(part.config, PreTrainedConfig):
        fields = shaping_fields(part.config)
    else:
        installed = {n: p.default for n, p in inspect.signature(type(part).__init__).parameters.items()}
        usual = default_fields(type(part).__name__, installed)
        fields = {n: v for n, v in part.config.items() if not n.startswith("_") and _plain(v) != _plain(usual.get(n))}
    fields = {n: v for n, v in fields.items() if n not in _NOT_SHAPE}
    return fields | {"class": type(part).__name__}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# -- ControlNets -----------------------------------------------------------------------------------------------------


def control_of(name: str, family: ImageFamily, denoiser: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a ControlNet for a base with this family and denoiser.

    Raises BaseError as in `load_control`."""
    try:
        folder = find_base(name)
    except BaseError as error:
        fix = "a folder saved by diffusers, or a hub id; canny=PICTURE uses the base's own ControlNet"
        raise BaseError(f"ControlNet {name!r}: {error.what}", where=error.where, fix=fix) from error
    if not (folder / "config.json").exists():
        raise BaseError("this is not a ControlNet: it has no config.json", where=str(folder))
    config = _config_of(folder)
    classname = str(config.get("_class_name", ""))
    if classname == "ControlNetModel":
        row = denoiser_family("UNet2DConditionModel", config)
    else:
        row = next((f for f in FAMILIES.values() if f.control and f.control == classname), None)
    if row is None:
        raise BaseError(f"this is not a ControlNet: its config says {classname or 'nothing'}", where=str(folder))
    if row.name != family.name and {row.name, family.name} != {"sd15", "sd2"}:
        raise BaseError(f"this is a ControlNet for {row.label}, but the base is {family.label}", where=str(folder))
    for size in _CONTROL_SIZES:
        control_size, base_size = config.get(size), denoiser.config.get(size)
        if control_size is not None and base_size is not None and _plain(control_size) != _plain(base_size):
            message = f"this ControlNet is for another base: its {size} is {control_size}, the base's {base_size}"
            raise BaseError(message, where=str(folder))
    model, _ = _load_component(folder, "diffusers", classname, dtype, device, None, True)
    control: nn.Module = model.eval()
    widen_products(control)
    return control.requires_grad_(False)


_CONTROL_SIZES = (
    *("cross_attention_dim", "block_out_channels", "joint_attention_dim", "num_attention_heads"),
    *("attention_head_dim", "caption_projection_dim", "pooled_projection_dim"),
)


# -- one file of original weights --------------------------------------------------------------------------------------

_OF_ADAPTERS = (".lora_A.weight", ".lora_down.weight", ".lora_B.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w2")


def read_single_file(
    path: Path, config: str | Path | None, dtype: str | torch.dtype, device: str | torch.device, quantize: str | None
) -> LoadedParts:
    """Load a checkpoint with original tensor names, using diffusers' from_single_file.

    Only local configs are used. Components that the checkpoint does not contain (tokenizers, scheduler; for
    FLUX the text encoders and the VAE) come from `config`, or from the hub cache of the repository that
    diffusers uses for this kind of checkpoint."""
    import diffusers

    table = file_table([path])
    if any(t.name.endswith(_OF_ADAPTERS) for t in table):
        raise BaseError(
            "this is an adapter, not a base", where=str(path), fix=f"name the adapter's base, and pass --adapter {path}"
        )
    if quantize:
        fix = "save it as a directory"
        raise BaseError("a single-file base cannot be quantized while it is read", where=str(path), fix=fix)
    folder = _configs_for(path, config, table)
    index = read_index(folder)
    classes = component_classes(index, folder)
    family = family_of_directory(folder, classes)
    stored = components_in(table)
    if stored and family.denoiser not in stored:
        raise BaseError(f"this file contains no {family.denoiser}, only {', '.join(sorted(stored))}", where=str(path))
    pipelines = {**family.pipelines, **_own_pipelines(index)}
    loads_parts = hasattr(getattr(diffusers, pipelines["text"]), "from_single_file")
    # For the other families, diffusers loads only the denoiser from a single file.
    stored = stored & set(classes) | {family.denoiser} if loads_parts else {family.denoiser}
    target_device = choose_device(device)
    kind, reason = choose_dtype(dtype, target_device, stored_dtype(table))
    check_memory(path, sum(t.elements for t in table) * kind.itemsize, kind, target_device)
    parts: dict[str, Any] = {}
    tables = {"file": table}
    notes = [f"configs come from {folder}"]
    for name in [name for name in classes if name not in stored]:
        library, classname = classes[name]
        if _has_weights(classname):
            try:
                tables[name], _ = stored_tensors(folder / name)
            except BaseError as error:
                message = f"neither the file nor the directory of configs has weights for {name}"
                fix = f"set config= to a directory with the weights of {name}"
                raise BaseError(message, where=str(path), fix=fix) from error
        part = folder / name
        parts[name], more = _load_component(part, library, classname, kind, target_device, None, name in tables)
        notes += [f"{name}: {note}" for note in more]
    with loading():
        state = _state_of(path, table, kind)
        try:
            for name in sorted(stored):
                parts[name] = _read_part(name, *classes[name], state, folder, kind, loads_parts)
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            if "meta tensor" in message:  # The file lacks one of the component's tensors.
                message = "some of its weights are not in the file"
            fix = "set config= to a diffusers directory of the same kind of model"
            message = f"diffusers cannot read this file as {family.label}: {message}"
            raise BaseError(message, where=str(path), fix=fix) from error
    del state
    parts = {name: parts[name] for name in classes}
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.to(target_device)
    with errors_only():
        unused = _unused(table, {name: parts[name] for name in stored})
    other_parts = tuple(prefix for prefix, parts in _PREFIXES.items() if not parts & stored)
    check_left_out(path, [name for name in unused if not name.startswith(other_parts)], _HARMLESS)
    if unused:
        names = first_few(unused, 6)
        notes.append(f"{len(unused)} of the file's {len(table)} tensors are not used: {names}")
    _check_prediction(path, unused, parts["scheduler"])
    fields = {n: _fields_of(p) for n, p in parts.items() if isinstance(p, nn.Module)}
    digest = fingerprint_parts({"file": (fields, table), **{n: ({}, t) for n, t in tables.items() if n != "file"}})
    pipelines = _own_pipelines(index)
    return LoadedParts(family, parts, digest, kind, reason, target_device, notes, pipelines, _flags_of(index))


def _read_part(
    name: str,
    library: str,
    classname: str,
    state: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    loads_part: bool,
) -> Any:
    """Build a component from a file's tensors, with the configs in `folder`.

    diffusers' converters translate the names of the tensors. `loads_part`: whether diffusers has a
    single-file pipeline for the family."""
    if loads_part:
        from diffusers.loaders.single_file import load_single_file_sub_model

        return load_single_file_sub_model(
            library_name=library,
            class_name=classname,
            name=name,
            checkpoint=state,
            pipelines=None,
            is_pipeline_module=False,
            cached_model_config_path=str(folder),
            local_files_only=True,
            torch_dtype=dtype,
        )
    import diffusers

    plain = {n.removeprefix("model.diffusion_model."): tensor for n, tensor in state.items()}
    options = {"config": str(folder), "subfolder": name, "local_files_only": True, "torch_dtype": dtype}
    return getattr(diffusers, classname).from_single_file(plain, **options)


def _state_of(path: Path, table: list[StoredTensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the file's tensors by name.

    Floating-point tensors are converted to `dtype`, and scaled weights are multiplied by their scales."""
    from safetensors.torch import load_file

    if not scaled_weights(table):
        plain: dict[str, Tensor] = load_file(path)
        return plain
    state = {name: lazy[...] for name, lazy in lazy_state(table).items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


_PREFIXES = {
    "model.diffusion_model.": {"unet", "transformer"}, "first_stage_model.": {"vae"}, "vae.": {"vae"},
    "cond_stage_model.": {"text_encoder"}, "conditioner.embedders.0.": {"text_encoder"},
    "conditioner.embedders.1.": {"text_encoder_2"}, "text_encoders.clip_l.": {"text_encoder"},
    "text_encoders.clip_g.": {"text_encoder_2"}, "text_encoders.t5xxl.": {"text_encoder_2", "text_encoder_3"},
    "double_blocks.": {"transformer"}, "joint_blocks.": {"transformer"},
}  # fmt: skip


def components_in(table: Iterable[StoredTensor]) -> set[str]:
    """Return the components that a checkpoint with original names contains."""
    names = [t.name for t in table]
    out: set[str] = set()
    for prefix, parts in _PREFIXES.items():
        if any(name.startswith(prefix) for name in names):
            out |= parts
    if any(n.startswith("text_encoders.clip_g.") for n in names):  # SD3's third text encoder is T5
        out -= set() if any(n.startswith("text_encoders.t5xxl.") for n in names) else {"text_encoder_3"}
    return out


def _configs_for(path: Path, config: str | Path | None, table: list[StoredTensor]) -> Path:
    if config is not None:
        folder = find_base(str(config))
        if folder.is_file():
            raise BaseError("config must be a diffusers directory, but this is a file", where=str(folder))
        return folder
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type
    from huggingface_hub import snapshot_download

    fix = "set config= to a diffusers directory of the same kind of model (its configs and tokenizers are enough)"
    try:
        shapes = {t.name: torch.empty(t.shape, device="meta") for t in table}
        repo = DIFFUSERS_DEFAULT_PIPELINE_PATHS[infer_diffusers_model_type(shapes)]["pretrained_model_name_or_path"]
        if any(name.endswith("txt_norm.weight") for name in shapes):  # diffusers mistakes Qwen-Image for SD 1.
            repo = "Qwen/Qwen-Image"
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise BaseError("diffusers does not know what kind of model this file is", where=str(path), fix=fix) from error
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except Exception as error:
        message = f"reading this file requires the configs of {repo}, which are not on this machine"
        fix = f"{fix}, or download the configs once: `hf download {repo} --include '*.json' '*.txt' '*.model'`"
        raise BaseError(message, where=str(path), fix=fix) from error


# -- unused tensors of a file ------------------------------------------------------------------------------------------

_CLIP = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
_WITHOUT_PREFIX = ("Flux2Transformer2DModel", "QwenImageTransformer2DModel")
"""Classes for which `_read_part` removes the tensor names' prefix."""
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model.")


_HARMLESS = re.compile(
    r"(.*\.)?(position_ids|inv_freq|logit_scale|attn_mask|num_batches_tracked|text_projection(\.weight)?)"
    r"|(.*\.)?(spiece_model|tekken_model)"  # a tokenizer, stored as bytes
    r"|model_ema\..*"  # an average of other weights in the file
    r"|(first_stage_model|vae)\.(loss|model_ema)\..*"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*"  # SD2 uses the second-to-last layer
    r"|betas|(\w+_)?alphas_cumprod(_prev)?|posterior_\w+|logvar|denoiser\.sigmas|model_sampling\..*"  # noise schedule
    r"|v_pred|ztsnr"  # see `_check_prediction`
)
"""Names of tensors that do not affect a picture.

Any other unused tensor is an error, because ignoring one (such as the scales of 8-bit weights) can change
every picture."""


def _check_prediction(path: Path, unused: Iterable[str], scheduler: Any) -> None:
    """Raise BaseError if the file says v-prediction, but the scheduler does not."""
    stated = scheduler.config.get("prediction_type")
    if "v_pred" in unused and stated != "v_prediction":
        message = f"the file marks a v-prediction model (v_pred), but the scheduler's config says {stated!r}"
        fix = 'set config= to a directory with a scheduler_config.json that has "prediction_type": "v_prediction"'
        raise BaseError(message, where=str(path), fix=fix)


class _Attached(TorchFunctionMode):
    """A mode in which `detach` returns the tensor itself.

    The tensors that diffusers' converters return then keep their autograd history."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def _unused(table: Iterable[StoredTensor], parts: Mapping[str, Any]) -> list[str]:
    """Return the names of a file's tensors that none of these components uses.

    diffusers' converters run again on meta tensors that require a gradient. Autograd then shows which of the
    file's tensors contribute to the components' weights, even if a converter splits, joins or transposes
    them."""
    state = {
        name: torch.empty(lazy.shape, device="meta", requires_grad=True)
        for name, lazy in lazy_state(list(table)).items()
    }
    taken: list[Tensor] = []
    for part in parts.values():
        stored = part.state_dict()
        shapes = {_plain_name(name): tensor.shape for name, tensor in stored.items()}
        for convert in [dict] if stored.keys() <= state.keys() else _converters(part):
            with _Attached():
                converted = convert(dict(state)).items()
            taken += [t for name, t in converted if isinstance(t, Tensor) and shapes.get(_plain_name(name)) == t.shape]
    used = torch.autograd.grad([t.sum() for t in taken if t.requires_grad], list(state.values()), allow_unused=True)
    return [name for name, gradient in zip(state, used, strict=True) if gradient is None]


def _plain_name(name: str) -> str:
    return name.removeprefix("text_model.")  # Only one of transformers' CLIP classes has this level.


_Converter = Callable[[dict[str, Tensor]], Mapping[str, Any]]


def _converters(part: nn.Module) -> list[_Converter]:
    """Return the diffusers converters that may have converted a component's weights.

    A text encoder gets all converters for text encoders; each converter looks for a different prefix."""
    from diffusers.loaders import single_file_utils
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kind = type(part).__name__
    if kind in SINGLE_FILE_LOADABLE_CLASSES:
        convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
        prefix = "model.diffusion_model." if kind in _WITHOUT_PREFIX else ""

        def converted(state: dict[str, Tensor]) -> Mapping[str, Any]:
            plain = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            result: Mapping[str, Any] = convert(checkpoint=plain, config=dict(part.config))  # type: ignore[arg-type]
            return result

        return [converted]
    if kind.startswith("T5"):
        return [single_file_utils.convert_sd3_t5_checkpoint_to_diffusers]
    ldm, open_clip = single_file_utils.convert_ldm_clip_checkpoint, single_file_utils.convert_open_clip_checkpoint
    return [
        ldm,
        *(lambda state, p=p: ldm(state, p) for p in _CLIP),
        *(lambda state, p=p: open_clip(part, state, p) for p in _OPEN_CLIP),
    ]
