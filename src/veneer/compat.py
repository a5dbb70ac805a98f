"""Undocumented names in other libraries that veneer relies on.

Code looks these names up in the lists below. If the installed version of a library lacks a name, the lookup
raises an error that states the versions of the library and of veneer, unlike a plain AttributeError.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from veneer.errors import MissingExtraError


class MissingInternalError(MissingExtraError, AttributeError):
    """The installed version of a library lacks an undocumented name that veneer uses."""


@dataclass(frozen=True)
class Internals:
    """The undocumented names in one library that veneer uses.

    names: full dotted names, such as "torch._grouped_mm".
    versions: the versions of the library that are known to have these names."""

    library: str
    versions: str
    names: tuple[str, ...]
    _found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, name: str) -> Any:
        """Return the object with this dotted name.

        Raises MissingInternalError if the library lacks the name, KeyError if `names` does not list it."""
        if name not in self._found:
            if name not in self.names:
                raise KeyError(f"{name} is not among the listed internals of {self.library}")
            self._found[name] = self._look_up(name)
        return self._found[name]

    def check(self) -> None:
        """Look up every name. Raises MissingInternalError if the library lacks one."""
        for name in self.names:
            self(name)

    def _look_up(self, name: str) -> Any:
        module, *rest = name.split(".")
        found: Any = importlib.import_module(module)
        for part in rest:
            module = f"{module}.{part}"
            try:
                found = getattr(found, part)
            except AttributeError:
                try:
                    found = importlib.import_module(module)
                except ImportError as error:
                    raise self._missing(name) from error
        return found

    def _missing(self, name: str) -> MissingInternalError:
        have = {}
        for package in (self.library, "veneer"):
            try:
                have[package] = version(package)
            except PackageNotFoundError:
                have[package] = "(version unknown)"
        problem = f"{self.library} {have[self.library]} has no {name}, on which veneer {have['veneer']} relies"
        return MissingInternalError(problem, fix=f"pip install '{self.library}{self.versions}', or a newer veneer")


TORCH = Internals(
    "torch",
    ">=2.9",
    (
        "torch._disable_dynamo",
        "torch._grouped_mm",
        "torch._softmax_backward_data",
        "torch._C._disabled_torch_function_impl",
        "torch.Tensor._make_wrapper_subclass",
        "torch.ops.aten._convert_weight_to_int4pack_for_cpu",
        "torch.ops.aten._weight_int4pack_mm_for_cpu",
        "torch.ops.aten._weight_int8pack_mm",
        "torch.ops.aten.gelu_backward",
        "torch.ops.aten.silu_backward",
        "torch.cpu._is_amx_tile_supported",
    ),
)
BITSANDBYTES = Internals(
    "bitsandbytes", ">=0.50", ("torch.ops.bitsandbytes.dequantize_4bit", "torch.ops.bitsandbytes.gemm_4bit")
)
LIGER = Internals(
    "liger_kernel",
    ">=0.8.5",
    (
        "liger_kernel.ops.rms_norm.LigerRMSNormFunction",
        "liger_kernel.ops.rope.LigerRopeFunction",
        "liger_kernel.ops.fused_linear_cross_entropy.fused_linear_cross_entropy_forward",
    ),
)


@functools.cache
def varlen_attention() -> Any:
    """Return `torch.nn.attention.varlen.varlen_attn`; None if torch is too old.

    torch added the function in 2.10, its scale and window parameters later, and grouped-query attention in
    2.12."""
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    known = inspect.signature(varlen.varlen_attn).parameters
    return varlen.varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None
