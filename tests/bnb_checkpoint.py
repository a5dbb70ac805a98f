"""The state dict of a base with 4-bit weights, in the format of bitsandbytes checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.ops.quantization_formats import Blocks4, dynamic_map, four_bit_values
from veneer.ops.quantized import Quantized

CONFIG: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}
"""The `quantization_config` that such a checkpoint has in config.json."""


def saved_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return doubly quantized 4-bit weights as several tensors each, and other tensors unchanged."""
    out: dict[str, Tensor] = {}
    for name, weight in state.items():
        code = weight.stored if isinstance(weight, Quantized) else None
        if not isinstance(code, Blocks4) or code.absmax2 is None or code.mean is None:
            out[name] = weight.contiguous()
            continue
        about = {
            "quant_type": code.kind,
            "blocksize": code.block,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "shape": list(code.shape),
            "nested_blocksize": code.nested,
            "nested_dtype": "float32",
            "nested_offset": float(code.mean),
        }
        out |= {
            name: code.packed[:, None],
            f"{name}.absmax": code.absmax,
            f"{name}.quant_map": four_bit_values(code.kind).clone(),
            f"{name}.nested_absmax": code.absmax2,
            f"{name}.nested_quant_map": dynamic_map().clone(),
            f"{name}.quant_state.bitsandbytes__{code.kind}": torch.tensor(
                list(json.dumps(about).encode()), dtype=torch.uint8
            ),
        }
    return out
