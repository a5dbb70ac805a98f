"""An image base in one file of original weights, through diffusers' own converters; FLUX.1's denoiser by our own.

    read_single_file(path, config, …)      what the file holds from it, the rest from a diffusers directory

Such a file has no configs: they are read from `config`, or from the hub's cache of the repository that diffusers takes
for this kind of file. Of FLUX.2 and Qwen-Image the file gives the denoiser alone. Nothing here asks a network.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.errors import BaseError, MissingExtraError
from veneer.models.compat_diffusers import DIFFUSERS
from veneer.models.fingerprint import fingerprint_parts
from veneer.models.image.files import (
    Loaded,
    components,
    config_of,
    family_of_directory,
    fields_of,
    flags_of,
    has_weights,
    load_component,
    own_pipelines,
    read_index,
    table_of,
)
from veneer.models.image.flux_file import flux_model, is_flux_original
from veneer.models.image.leftovers import left_over, some_of
from veneer.models.loading import errors_only, loading
from veneer.models.sources import find
from veneer.models.text.base import check_memory, choose_device, choose_dtype
from veneer.models.weights import StoredTensor, file_table, stored_dtype

__all__ = ["held_by", "read_single_file"]

_OF_ADAPTERS = (".lora_A.weight", ".lora_down.weight", ".lora_B.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w2")


def read_single_file(
    path: Path, config: str | Path | None, dtype: str | torch.dtype, device: str | torch.device, quantise: str | None
) -> Loaded:
    """A checkpoint of original names through diffusers' from_single_file, with configs that are on this machine.

    What the checkpoint does not hold (tokenizers, scheduler; for FLUX text encoders and VAE) comes from `config`, or
    from the hub's cache of the repository that diffusers takes for this kind of checkpoint."""
    import diffusers

    if importlib.util.find_spec("accelerate") is None:  # without it diffusers makes up what a file lacks
        raise MissingExtraError("a base in one file needs accelerate", fix="pip install 'veneer[image]'")
    table = file_table([path])
    if any(t.name.endswith(_OF_ADAPTERS) for t in table):
        raise BaseError("this is an adapter, not a base", where=str(path), fix=f"name its base, and --adapter {path}")
    folder = _configs_for(path, config, table)
    index = read_index(folder)
    classes = components(index, folder)
    family = family_of_directory(folder, classes)
    if quantise:
        raise BaseError(
            "a single-file base cannot be quantised while it is read", where=str(path), fix="save it as a directory"
        )
    held = held_by(table)
    if held and family.denoiser not in held:
        raise BaseError(f"this file holds no {family.denoiser}: {', '.join(sorted(held))}", where=str(path))
    pipelines = {**family.pipelines, **own_pipelines(index, family)}
    whole = hasattr(getattr(diffusers, pipelines["text"]), "from_single_file")
    held = held & set(classes) | {family.denoiser} if whole else {family.denoiser}  # of the others the denoiser alone
    where = choose_device(device)
    kind, reason = choose_dtype(dtype, where, stored_dtype(table))
    check_memory(path, sum(t.elements for t in table) * kind.itemsize, kind, where)
    given: dict[str, Any] = {}
    tables = {"file": table}
    notes = [f"configs come from {folder}"]
    for name, (library, classname) in classes.items():
        if name in held:
            continue
        if has_weights(classname):
            try:
                tables[name], _ = table_of(folder / name)
            except BaseError as error:
                raise BaseError(
                    f"the file holds no {name}, and the directory of configs has no weights of one",
                    where=str(path),
                    fix=f"config= a directory with the weights of {name}",
                ) from error
        given[name], more = load_component(folder / name, library, classname, kind, where, None, name in tables)
        notes += [f"{name}: {note}" for note in more]
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True, "torch_dtype": kind}
    settings = {k: v for k, v in family.settings.items() if v is None}
    if family.name == "flux1" and is_flux_original([t.name for t in table]):
        given[family.denoiser], note = _flux(path, config_of(folder / family.denoiser), kind)
        notes += note
    with loading():
        try:
            if not held - given.keys():
                parts = {name: given[name] for name in classes}
            elif whole:
                made = getattr(diffusers, pipelines["text"]).from_single_file(
                    str(path), **options, **given, **settings
                )  # fmt: skip
                parts = {name: getattr(made, name) for name in classes}
            else:
                cls = getattr(diffusers, classes[family.denoiser][1])
                parts = {**given, family.denoiser: _denoiser_of(path, cls, family.denoiser, options)}
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            if "meta tensor" in said:  # what no tensor of the file was put into
                said = "some of its weights are not in the file"
            raise BaseError(
                f"diffusers cannot read this file as {family.label}: {said}",
                where=str(path),
                fix="config= a diffusers directory of the same kind of model",
            ) from error
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.to(where)
    if family.name == "flux1":
        _check_widths(path, parts)
    with errors_only():
        left = left_over(table, {name: parts[name] for name in held})
    if left:
        notes.append(f"{len(left)} of the file's {len(table)} tensors have no place and are left out: {some_of(left)}")
    fields = {n: fields_of(p) for n, p in parts.items() if isinstance(p, nn.Module)}
    digest = fingerprint_parts({"file": (fields, table), **{n: ({}, t) for n, t in tables.items() if n != "file"}})
    return Loaded(family, parts, digest, kind, reason, where, notes, own_pipelines(index, family), flags_of(index))


def _denoiser_of(path: Path, cls: Any, name: str, options: Mapping[str, Any]) -> Any:
    """The denoiser of a family whose pipeline diffusers does not read from one file, though it reads its denoiser."""
    from safetensors.torch import load_file

    state = {n.removeprefix("model.diffusion_model."): tensor for n, tensor in load_file(path).items()}
    return cls.from_single_file(state, subfolder=name, **options)


def _flux(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, list[str]]:
    """FLUX.1's denoiser by the shapes of the file, and in which numbers the directory's is another."""
    from safetensors.torch import load_file

    made = flux_model(load_file(path), config, dtype, str(path))
    other = [
        f"{key} is {made.config[key]} ({config[key]} there)"
        for key in sorted(config.keys() & made.config.keys())
        if not key.startswith("_") and _plain(made.config[key]) != _plain(config[key])
    ]
    return made, [f"transformer: its shapes are not those of its configs: {', '.join(other)}"] if other else []


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_widths(path: Path, parts: Mapping[str, Any]) -> None:
    """Raises BaseError where FLUX.1's denoiser is of another model than what reads prompts and draws for it."""
    denoiser = parts["transformer"].config
    wanted = {
        "text_encoder": ("hidden_size", denoiser.pooled_projection_dim),
        "text_encoder_2": ("d_model", denoiser.joint_attention_dim),
        "vae": ("latent_channels", (denoiser.out_channels or denoiser.in_channels) // 4),
    }
    bad = [
        f"{name} has {what} {getattr(parts[name].config, what)}, the denoiser wants {wants}"
        for name, (what, wants) in wanted.items()
        if parts.get(name) is not None and getattr(parts[name].config, what) != wants
    ]
    if bad:
        fix = "config= a diffusers directory of the same kind of model"
        raise BaseError(f"this file does not go with its directory: {'; '.join(bad)}", where=str(path), fix=fix)


_HELD = {
    "model.diffusion_model.": {"unet", "transformer"},
    "first_stage_model.": {"vae"},
    "vae.": {"vae"},
    "cond_stage_model.": {"text_encoder"},
    "conditioner.embedders.0.": {"text_encoder"},
    "conditioner.embedders.1.": {"text_encoder_2"},
    "text_encoders.clip_l.": {"text_encoder"},
    "text_encoders.clip_g.": {"text_encoder_2"},
    "text_encoders.t5xxl.": {"text_encoder_2", "text_encoder_3"},
    "double_blocks.": {"transformer"},
    "joint_blocks.": {"transformer"},
}


def held_by(table: Iterable[StoredTensor]) -> set[str]:
    """Which components a checkpoint of original names holds."""
    names = [t.name for t in table]
    out: set[str] = set()
    for prefix, parts in _HELD.items():
        if any(name.startswith(prefix) for name in names):
            out |= parts
    if any(n.startswith("text_encoders.clip_g.") for n in names):  # SD3: T5 is the third
        out -= set() if any(n.startswith("text_encoders.t5xxl.") for n in names) else {"text_encoder_3"}
    return out


def _configs_for(path: Path, config: str | Path | None, table: list[StoredTensor]) -> Path:
    if config is not None:
        found = find(str(config))
        if found.is_file():
            raise BaseError("config is a diffusers directory, and this is a file", where=str(found))
        return found
    from huggingface_hub import snapshot_download

    kind_of, paths = (
        DIFFUSERS(f"diffusers.loaders.single_file_utils.{name}")
        for name in ("infer_diffusers_model_type", "DIFFUSERS_DEFAULT_PIPELINE_PATHS")
    )
    fix = "config= a diffusers directory of the same kind of model (its configs and tokenizers are enough)"
    try:
        shapes = {t.name: torch.empty(t.shape, device="meta") for t in table}
        kind = kind_of(shapes)
        repo = paths[kind]["pretrained_model_name_or_path"]
        if any(name.endswith("txt_norm.weight") for name in shapes):  # diffusers takes it for Stable Diffusion 1
            repo = "Qwen/Qwen-Image"
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise BaseError("diffusers does not know what kind of model this file is", where=str(path), fix=fix) from error
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except Exception as error:
        raise BaseError(
            f"this file is read with the configs of {repo}, and they are not on this machine",
            where=str(path),
            fix=f"{fix}, or fetch them once: `hf download {repo} --include '*.json' '*.txt' '*.model'`",
        ) from error
