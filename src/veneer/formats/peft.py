"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read and written strictly.

    key = "base_model.model." + module + suffix                              the adapter's name is not in the key

| on a module       | suffix and shape                                                                                |
| linear            | .lora_A.weight (r, in)   .lora_B.weight (out, r)                                                |
| convolution       | .lora_A.weight (r, in, k…)   .lora_B.weight (out, r/groups, 1…)                                 |
| embedding         | .lora_embedding_A (r, rows)   .lora_embedding_B (dim, r)                                        |
| DoRA, each        | .lora_magnitude_vector (out,), for a convolution (1, out, 1…)                                   |
| expert parameters | .lora_A.weight (E·r, in)   .lora_B.weight (out, r·E); A counts experts first, B ranks first.    |
|                   | Of several parameters of one module the last declared has the plain key, each earlier one a     |
|                   | further `.base_layer` in front of the suffix                                                    |
| modules_to_save   | .PARAMETER: full copies                                                                         |
| token indices     | .token_adapter.trainable_tokens_delta (tokens, dim): whole rows; which ones is in the config    |
| targeted embedding| .base_layer.weight: PEFT's copy of the base's own rows, no part of the adapter                  |

    scale = alpha/r, rsLoRA alpha/√r;  r and alpha from rank_pattern and alpha_pattern where the first key that matches
    `(.*\\.)?(KEY)$` says so

docs/formats/peft.md has the whole specification, numbered. What cannot be read with the same effect is refused with the
reason; everything wrong with a folder is one AdapterError. Knows files and names; does not know what made the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.core.adapter import Adapter, Card
from veneer.errors import AdapterError, UnsafeFileError
from veneer.formats.card import CARD_FILE, read_card
from veneer.formats.peft_config import CONFIG_FILE, TENSOR_FILE, read_config
from veneer.formats.peft_read import Base, Loaded, interpret
from veneer.formats.peft_write import Written, encode, write
from veneer.formats.tensors import read_adapter_tensors

__all__ = [
    "CONFIG_FILE",
    "TENSOR_FILE",
    "Base",
    "Loaded",
    "Opened",
    "Written",
    "encode",
    "interpret",
    "load",
    "open_folder",
    "read",
    "write",
]

PICKLE_FILE = "adapter_model.bin"


def read(folder: str | Path, base: Base = None) -> Adapter:
    """The adapter in a PEFT folder.

    Plain pairs need no base. With one (the model, its outline, or its module names) every name, kind and shape is
    checked against it, and old layouts of expert weights are recognised. Raises one AdapterError that lists everything
    missing, extra, misshapen or not understood; UnsafeFileError for pickles and headers that lie."""
    return load(folder, base).adapter


def load(folder: str | Path, base: Base = None) -> Loaded:
    """`read`, with the configuration and the notes."""
    opened = open_folder(folder)
    return interpret(opened.config, opened.tensors, base, where=str(folder), card=opened.card)


@dataclass(frozen=True)
class Opened:
    """What is in a PEFT folder, uninterpreted."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    card: Card | None


def open_folder(folder: str | Path, *, file: Path | None = None, from_pickle: bool = False) -> Opened:
    """The configuration, the tensors and the card of a folder; `file`: the one with the tensors, where it is not called
    adapter_model. A pickle is read only with `from_pickle`. Raises as `read`."""
    folder = Path(folder)
    config = read_config(folder)
    file = file or _tensor_file(folder, from_pickle)
    tensors, _ = read_adapter_tensors(file, from_pickle=from_pickle)
    card = read_card(folder).card if (folder / CARD_FILE).is_file() else None
    return Opened(config, tensors, card)


def _tensor_file(folder: Path, from_pickle: bool) -> Path:
    path, pickled = folder / TENSOR_FILE, folder / PICKLE_FILE
    if path.is_file():
        return path
    if pickled.exists():
        if from_pickle:
            return pickled
        raise UnsafeFileError(
            "the adapter is stored as a pickle, and loading a pickle runs whatever code is in it",
            where=str(pickled),
            fix="--from-pickle (from_pickle=True) reads it through torch's weights-only loader, which runs nothing",
        )
    raise AdapterError(f"the folder has no {TENSOR_FILE}", where=str(folder))
