"""The compiled kernels: signatures, loading, and availability on this machine.

The kernels are optional. Without a C compiler, everything runs with torch operations: more slowly, with the
same results up to bfloat16 rounding. `status()` reports whether the kernels are used and why;
VENEER_NATIVE=0 disables them. The sources are built once on the user's machine (build.py) and called through
ctypes. Every kernel is tested against its formula once per build (selftest.py). A kernel that fails is
reported, and torch operations are used instead. Callers first look up a kernel by name: `usable("rms_norm",
x, w)`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.ops.cpu.build import build_kernels, find_compiler, why_not_compiled
from veneer.ops.lowrank import LowRank
from veneer.ops.profile import profile

_pointer, _int64, _float, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_LETTERS = {"p": _pointer, "l": _int64, "f": _float, "i": _int, "u": ctypes.c_uint32}
"""Argument types of the C functions, keyed by the letters used in signatures."""
_EVERYWHERE = {
    "use_threads": "i",
    "stay": "pii",
    "meet_asleep": "ip",
    "rms_norm": "pppllfi",
    "rms_norm_backward": "ppppllfi",
    "norm_silu": "pppppllllfi",
    "norm_silu_backward": "ppppppllllfi",
    "dropped": "ppluuufi",
    "dora_scale": "pppplli",
    "dora_scale_backward": "ppppplli",
    "silu_gate": "pplli",
    "silu_gate_backward": "pppplli",
    "geglu": "pplli",
    "geglu_backward": "ppplli",
    "gelu_tanh": "ppli",
    "gelu_tanh_backward": "pppli",
    "causal_softmax": "pllllllli",
    "softmax_backward": "pplli",
    "token_nll": "pipppllii",
    "blocks4_dense": "ppppfpllllpii",
    "blocks4_quantize": "pippllppi",
    "ggml_dense": "iplpii",
    "rows8_dense": "ppllpii",
}
_AVX512 = {
    "attend": "pppppplllllfi",
    "attend_backward": "pppppppppplllllfi",
    "lora_forward": "pipppllli",
    "lora_backward": "pipppllli",
    "lora_weight_gradients": "pippppppllli",
}
"""Kernels that require AVX-512."""
_VECTORS = {
    "lora_rows": "plplplppppli",
    "store_rows": "plplpplllppi",
    "rope_and_cache": "plllppppfppplppi",
    "paged_attend": "plplllpplplppfflli",
    "panel_product": "pllppplii",
    "amx_panel_product": "pllppplii",
    "decode": "plplppppppplpllplpppplpi",
}
"""Kernels for serving, which require AVX-512, AVX2 with FMA, or NEON (vec.h)."""
_AMX = ("amx_panel_product",)
"""Kernels that also require AMX, which a process must request from the operating system."""
_VNNI = {"int8_product": "pllpplilpplppppi"}
"""Kernels that require AVX512-VNNI."""
_TILES = {
    "conv3x3": "ppllipplllllli",
    "float_product": "pllipllipplllppliillli",
    "rope_varlen_attention": "plpppllllflippi",
    "rope_varlen_attention_backward": "pppplpppllllflipi",
    "narrow_rope_varlen_attention": "plpppllllflippi",
    "narrow_rope_varlen_attention_backward": "pppplpppllllflipi",
}
"""Kernels that use libtorch's small matrix products, in float32 or bfloat16."""
_WIDE = ("conv3x3", "float_product", "rope_varlen_attention", "rope_varlen_attention_backward")
"""The kernels in `_TILES` that compute in float32."""
SIGNATURES = _EVERYWHERE | _AVX512 | _VECTORS | _VNNI | _TILES
"""All kernels: C function name -> letters of its argument types."""
SOURCES = ("native.c", "quantized.c", "int8.c", "serving.c", "decoder.c", "threads.c", "tiles.c")
HEADERS = ("bf16.h", "vec.h", "serving.h", "amx.h")
_reason = "not looked for yet"


class Kernels:
    """The usable kernels, as attributes; `compiled` is the whole library.

    wrong: kernel -> how it failed its self-test.

    A kernel raises MemoryError if its temporary buffers cannot be allocated, and IndexError for an invalid
    target."""

    def __init__(self, compiled: ctypes.CDLL, path: Path) -> None:
        self.compiled, self.path = compiled, path
        self.wrong: dict[str, str] = {}

    def has(self, *names: str) -> bool:
        return all(hasattr(self, name) for name in names)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the kernel {name} is not available")


_FALLIBLE = {
    *("norm_silu", "norm_silu_backward", "causal_softmax", "token_nll", "attend", "attend_backward", "lora_forward"),
    *("lora_backward", "lora_weight_gradients", "paged_attend", "panel_product", "amx_panel_product"),
    *("decode", *_VNNI, *_TILES),
}
"""Kernels that return an error code (bf16.h)."""


def load_library(path: str | Path, without: Iterable[str] = ()) -> Kernels:
    """Load a compiled library, except for the kernels in `without`.

    Raises OSError for an invalid file."""
    compiled = ctypes.CDLL(str(path))
    library = Kernels(compiled, Path(path))
    products = _small_products()
    compiled.use_products.argtypes, compiled.use_products.restype = [_pointer] * 3, None
    compiled.use_products(*products)
    not_here = {name for name in _TILES if products[name not in _WIDE] is None}.union(without)
    if not compiled.amx_granted():
        not_here.update(_AMX)
    for name, arguments in SIGNATURES.items():
        function = getattr(compiled, name, None)
        if function is None and name in _EVERYWHERE:
            raise OSError(f"{path} has no {name}")
        if function is not None and name not in not_here:
            function.argtypes, function.restype = [_LETTERS[letter] for letter in arguments], None
            if name in _FALLIBLE:
                function.restype, function.errcheck = _int, _checked
            setattr(library, name, function)
    return library


_BF16_ISAS = ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")
"""A value of ONEDNN_MAX_CPU_ISA that contains one of these allows AVX512-BF16."""
_LIBTORCH = ("libtorch_cpu.so", "libtorch_cpu.dylib")


@functools.cache
def _small_products() -> tuple[int | None, int | None, int | None]:
    """Return addresses of libtorch's small matrix products and their release function.

    The two products, in float32 and bfloat16, are at::native::cpublas::brgemm (CPUBlas.h), looked up by their
    mangled C++ names. The address of a missing function is None. The bfloat16 product is used only if the
    processor has bfloat16 instructions and oneDNN may use them. Otherwise, the product throws an exception, which C
    cannot catch. On processors with AMX, the products run on AMX tiles, which oneDNN requests from the operating
    system (docs/notes/amx.md)."""
    at, folder = "_ZN2at6native7cpublas", Path(torch.__file__).parent / "lib"
    library_path = next((folder / name for name in _LIBTORCH if (folder / name).is_file()), None)
    if library_path is None:
        return None, None, None
    library = ctypes.CDLL(str(library_path))

    def address(*names: str) -> int | None:
        there = next((getattr(library, at + name) for name in names if hasattr(library, at + name)), None)
        return None if there is None else ctypes.cast(there, ctypes.c_void_p).value

    # int64_t is long on Linux and long long on macOS.
    wide = address("6brgemmEllllllbPKfS3_Pfb", "6brgemmExxxxxxbPKfS3_Pfb")
    narrow = address("6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", "6brgemmExxxxxxbPKN3c108BFloat16ES5_Pfb")
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # This is also true on every processor with AMX.
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    has_narrow = has_bf16 and torch.backends.mkldnn.is_available() and any(isa in allowed for isa in _BF16_ISAS)
    return wide, narrow if has_narrow else None, address("14brgemm_releaseEb")


def _checked(result: int, function: Any, arguments: Any) -> int:
    if result == 1:
        raise MemoryError(f"{function.__name__}: out of memory for its temporary buffers")
    if result == 2:
        raise IndexError(f"{function.__name__}: a target is not a token of the vocabulary")
    return result


def kernels() -> Kernels | None:
    """Return the compiled kernels, loaded once per process, or None if unavailable.

    The machine's profile decides whether their products use bfloat16 instructions or float32 (bf16.h)."""
    return kernels_for(profile().arithmetic)


@functools.cache
def kernels_for(arithmetic: str) -> Kernels | None:
    """Return the kernels that multiply in "bfloat16" or "float32", or None if unavailable."""
    global _reason
    if os.environ.get("VENEER_NATIVE", "1") == "0":
        _reason = "turned off by VENEER_NATIVE=0"
        return None
    if os.name != "posix":
        _reason = "they are not built on Windows"
        return None
    compiler, compiler_note = find_compiler("CC", ("cc", "gcc", "clang"))
    if compiler is None:
        _reason = "; ".join(
            ["no C compiler (cc, gcc or clang) on the path", *([compiler_note] if compiler_note else []), "install one"]
        )
        return None
    here = Path(__file__).parent
    try:
        more = ["-DFLOAT32_PRODUCTS"] if arithmetic == "float32" else []
        build = build_kernels(compiler, [here / name for name in SOURCES], [here / name for name in HEADERS], more)
        library = load_library(build.library, build.rejected)
        library.wrong = build.rejected
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        unset = ", or unset CC" if os.environ.get("CC") == compiler else ""
        advice = f"; install a C compiler that works (gcc or clang){unset}"
        failed = isinstance(error, subprocess.SubprocessError)  # Other errors mean a folder problem or a broken build.
        _reason = f"they could not be built: {why_not_compiled(compiler, error)}{advice if failed else ''}"
        return None
    rejected = ", ".join(f"{name} {why}" for name, why in build.rejected.items())
    parts = [f"compiled by {compiler}", f"left out: {rejected}" if rejected else "", compiler_note, *build.notes]
    _reason = "; ".join(part for part in parts if part)
    return library


def status() -> str:
    """Return a one-line report: whether the compiled kernels are used, and why."""
    return (
        f"native CPU kernels: {_reason}"
        if kernels() is not None
        else f"torch's own operations (native CPU kernels: {_reason})"
    )


def usable(names: str | tuple[str, ...], *tensors: Tensor) -> Kernels | None:
    """Return the library if it can run these kernels on these tensors, or else None.

    The tensors must be contiguous bfloat16 CPU tensors."""
    if all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tensors):
        library = kernels()
        return library if library is not None and library.has(*([names] if isinstance(names, str) else names)) else None
    return None


def has(*names: str) -> bool:
    """Return whether the compiled kernels are available and include these names."""
    library = kernels()
    return library is not None and library.has(*names)


def why_missing(*names: str) -> str:
    """Return a one-line reason why these kernels cannot be used, or "" if they can."""
    library = kernels()
    if library is None:
        return f"no compiled kernels: {_reason}"
    missing = [name for name in names if not library.has(name)]
    if not missing:
        return ""
    if failed := [f"{name} {library.wrong[name]}" for name in missing if name in library.wrong]:
        why = f"the self-test failed ({', '.join(failed)})"
    elif all(name in _TILES for name in missing):
        why = "libtorch has no small matrix products for it on this processor"
    elif all(name in _AMX for name in missing):
        why = "this processor has no AMX, or the operating system does not allow it"
    elif all(name in _VNNI for name in missing):
        why = "this processor has no AVX512-VNNI"
    else:
        needs = "AVX-512, AVX2 or NEON" if missing[0] in _VECTORS else "AVX-512"
        why = f"this processor has no {needs}"
    return f"no compiled {', '.join(missing)}: {why}"


PAGED = ("store_rows", "rope_and_cache", "paged_attend")
"""The kernels for paged caches.

The kernels have their own cache layout, so either all of them are used, or none."""


class _LowRankStruct(ctypes.Structure):
    """A low-rank product in the kernels' C layout; A and B are contiguous float32."""

    _fields_ = (
        ("A", _pointer),
        ("B", _pointer),
        ("first", _int64),
        ("last", _int64),
        ("rank", _int64),
        ("scale", _float),
    )


def low_rank_structs(products: Sequence[LowRank]) -> ctypes.Array[Any]:
    """Return the products as C structs, which are valid while the tensors are alive."""
    structs = (_LowRankStruct(p.A.data_ptr(), p.B.data_ptr(), p.first, p.last, len(p.A), p.scale) for p in products)
    return (_LowRankStruct * len(products))(*structs)


def strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Return all strides except the last of each tensor.

    For kernels that accept any layout."""
    flat = [step for t in tensors for step in t.stride()[:-1]]
    return (_int64 * len(flat))(*flat)
