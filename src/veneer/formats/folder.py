"""Find the tensor file in an adapter's folder, by PEFT's and mlx-lm's file names.

This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path

from veneer.errors import AdapterError, UnsafeFileError
from veneer.files.safetensors import PICKLE_SUFFIXES

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
CONFIG_KEY = "veneer.adapter_config"
"""Metadata key of PEFT's configuration in veneer's tensor files. With this key, the scale is known from the
tensor file alone."""
MLX_FILE = "adapters.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_PREFERRED = (TENSOR_FILE, "pytorch_lora_weights.safetensors")


def tensor_file(folder: Path, from_pickle: bool = False) -> Path:
    """Return the path of a folder's tensor file; a file's path is returned unchanged.

    If the folder contains PEFT's configuration, the tensor file is the one with PEFT's or mlx-lm's name.
    Otherwise, it is the only tensor file, or the one with diffusers' or PEFT's name. Raises AdapterError if
    no tensor file exists, or if several exist and none has such a name. Raises UnsafeFileError for a pickle
    without `from_pickle`."""
    if not folder.is_dir():
        return folder
    if (folder / CONFIG_FILE).is_file():
        return _of_peft(folder, from_pickle)
    files = [p for p in sorted(folder.iterdir()) if p.is_file()]
    candidates = [p for p in files if p.suffix.lower() in (".safetensors", ".gguf")]
    candidates = candidates or [p for p in files if from_pickle and p.suffix.lower() in PICKLE_SUFFIXES]
    candidates = [p for p in candidates if p.name in _PREFERRED][:1] or candidates
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(p.name for p in candidates)
    raise AdapterError(
        f"the folder has {len(candidates)} adapter files: {names}" if candidates else "no adapter file in the folder",
        where=str(folder),
        fix="give the file" if candidates else "give a folder that training wrote, or a .safetensors file",
    )


def _of_peft(folder: Path, from_pickle: bool) -> Path:
    path, pickled = folder / TENSOR_FILE, folder / _PICKLE_FILE
    if path.is_file():
        return path
    if (folder / MLX_FILE).is_file():
        return folder / MLX_FILE
    if pickled.exists():
        if from_pickle:
            return pickled
        problem = "the adapter is stored as a pickle, and loading a pickle runs whatever code is in it"
        fix = "--from-pickle (from_pickle=True) reads it through torch's weights-only loader, which runs nothing"
        raise UnsafeFileError(problem, where=str(pickled), fix=fix)
    raise AdapterError(f"the folder has no {TENSOR_FILE}", where=str(folder))
