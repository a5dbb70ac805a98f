"""Describe a base without loading its weights, with modules on the meta device."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.core.adapter import hub_id
from veneer.files.weights import file_table, stored_dtype, tensor_table
from veneer.models.device import choose_device, choose_dtype
from veneer.models.fingerprint import fingerprint
from veneer.models.image.base import Components, default_size, prediction_of, vae_scale
from veneer.models.image.families import topology_name
from veneer.models.image.files import (
    component_classes,
    components_in,
    family_of_directory,
    parts_fingerprint,
    read_index,
    require_diffusers,
    stored_tensors,
    unreadable,
)
from veneer.models.loading import loading
from veneer.models.sources import is_image_base
from veneer.models.text.base import end_of_turn, read_base_config, read_tokenizer


def describe_base(name: str, path: Path) -> dict[str, Any]:
    """Return a JSON-ready description of the base at `path`.

    Text base: family, sizes, stored and chosen dtype with the reason, fingerprint, the token that ends a
    turn, and every kind of linear module and expert parameter with shape and count. Image base: family,
    prediction type, components with their parameter counts, picture size, stored and chosen dtype with the
    reason, fingerprint, and every kind of linear module that an adapter can change. Single-file image base:
    the facts in the file's header."""
    if not is_image_base(path):
        return _text(name, path)
    return _image_file(name, path) if path.is_file() else _image_directory(name, path)


def _text(name: str, path: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    table, config, tokenizer = tensor_table(path), read_base_config(path), read_tokenizer(path)
    stored = stored_dtype(table)
    dtype, reason = choose_dtype("auto", choose_device("auto"), stored)
    with loading(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    turn = end_of_turn(tokenizer)
    linear = Counter(
        (n.rpartition(".")[2], m.in_features, m.out_features)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    )
    experts = Counter((n.rpartition(".")[2], tuple(p.shape)) for n, p in model.named_parameters() if p.dim() == 3)
    return {
        "name": name,
        **({"hub_id": hub_id(name)} if hub_id(name) != name else {}),
        "path": str(path),
        "family": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "vocabulary": text.vocab_size,
        "context": getattr(text, "max_position_embeddings", None),
        "stored_dtype": stored,
        "stored_bytes": sum(t.size for t in table),
        "runs_in": str(dtype).removeprefix("torch."),
        "because": reason,
        "chat_template": bool(tokenizer.chat_template),
        "end_of_turn": None if turn is None else tokenizer.convert_ids_to_tokens(turn),
        "fingerprint": fingerprint(path, config, table),
        "linear_modules": [{"target": t, "count": n, "in": i, "out": o} for (t, i, o), n in linear.items()],
        "expert_parameters": [{"target": t, "count": n, "shape": list(s)} for (t, s), n in experts.items()],
    }


def _image_directory(name: str, path: Path) -> dict[str, Any]:
    require_diffusers()
    classes = component_classes(read_index(path), path)
    family = family_of_directory(path, classes)
    parts: dict[str, Any] = {}
    tables = {}
    for part, (library, classname) in classes.items():
        if "Tokenizer" in classname or "Processor" in classname:
            continue
        parts[part] = _on_meta(path / part, library, classname)
        if isinstance(parts[part], nn.Module):
            tables[part], _ = stored_tensors(path / part)
    denoiser, vae = parts[family.denoiser], parts["vae"]
    stored = stored_dtype(tables[family.denoiser])
    dtype, reason = choose_dtype("auto", choose_device("auto"), stored)
    scale = vae_scale(vae)
    tree = Components({n: parts[n] for n in (family.denoiser, *family.encoders) if parts.get(n) is not None})
    linear = Counter(
        (n.partition(".")[0], _last_name(n), m.in_features, m.out_features)
        for n, m in tree.named_modules()
        if isinstance(m, nn.Linear)
    )
    return {
        "name": name,
        "path": str(path),
        "family": topology_name(family, denoiser.config),
        "kind": family.label,
        "predicts": prediction_of(family, parts["scheduler"], path),
        "parameters": sum(t.elements for table in tables.values() for t in table),
        "components": [
            {"name": n, "class": classes[n][1], "parameters": sum(t.elements for t in table)}
            for n, table in tables.items()
        ],
        "picture": default_size(denoiser, vae, scale),
        "multiple_of": scale * family.patch,
        "stored_dtype": stored,
        "stored_bytes": sum(t.size for table in tables.values() for t in table),
        "runs_in": str(dtype).removeprefix("torch."),
        "because": reason,
        "fingerprint": parts_fingerprint(parts, tables),
        "linear_modules": [
            {"target": t, "component": c, "count": n, "in": i, "out": o} for (c, t, i, o), n in linear.items()
        ],
    }


def _last_name(name: str) -> str:
    """Return the last part of a dotted name, or the last two if it ends in a number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _on_meta(folder: Path, library: str, classname: str) -> Any:
    cls: Any = getattr(importlib.import_module(library), classname, None)
    if cls is None:
        raise unreadable(folder, ImportError(f"the installed {library} has no {classname}"))
    with loading(), torch.device("cpu" if "Scheduler" in classname else "meta"):
        try:
            if library == "transformers":
                return cls(cls.config_class.from_pretrained(folder, local_files_only=True))
            return cls.from_config(cls.load_config(folder, local_files_only=True))
        except Exception as error:
            raise unreadable(folder, error) from error


def _image_file(name: str, path: Path) -> dict[str, Any]:
    table = file_table([path])
    return {
        "name": name,
        "path": str(path),
        "holds": ", ".join(sorted(components_in(table))) or "nothing known here",
        "parameters": sum(t.elements for t in table),
        "stored_dtype": stored_dtype(table),
        "stored_bytes": sum(t.size for t in table),
    }
