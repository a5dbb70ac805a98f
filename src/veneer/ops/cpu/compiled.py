"""The compiled kernels: which there are, what each takes, which of them may be used here and why.

Optional: without a C compiler everything runs on torch's own operations, slower and with the same results within
bfloat16 rounding. `status()` says which of the two it is and why; VENEER_NATIVE=0 turns the compiled kernels off.
The sources are built once on the user's machine (build.py) and called through ctypes. Every kernel is tried beside its
formula once a build (selftest.py); one that fails is left out and named, and torch does its work. Whoever calls a
kernel asks for it by name first: `usable("rms_norm", x, w)`.
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

_pointer, _int64, _float, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_LETTERS = {"p": _pointer, "l": _int64, "f": _float, "i": _int, "u": ctypes.c_uint32}
"""Letters of a signature: the types of a C function's arguments."""
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
    "gather_heads": "plpppplllllfpi",
    "scatter_heads": "plpppplllllfpi",
    "causal_softmax": "pllllllli",
    "softmax_backward": "pplli",
    "token_nll": "pipppllii",
    "blocks4_dense": "ppppfpllllpii",
    "blocks4_quantize": "pippllppi",
    "ggml_dense": "iplpii",
    "rows8_dense": "ppllpii",
}
_AVX512_BF16 = {
    "attend": "pppppplllllfi",
    "attend_backward": "pppppppppplllllfi",
    "lora_forward": "pipppllli",
    "lora_backward": "pipppllli",
    "lora_weight_gradients": "pippppppllli",
    "lora_rows": "plplplppppli",
    "store_rows": "plplpplllppi",
    "rope_and_cache": "plllppppfppplppi",
    "paged_attend": "plplllpplplppfflli",
    "panel_product": "pllppplii",
    "amx_panel_product": "pllppplii",
    "decode": "plplppppppplpllplpppplpi",
}
"""What only a processor with AVX512-BF16 has."""
_AMX = ("amx_panel_product",)
"""What wants AMX beside it, which the system grants a process that asks."""
_TILES = {
    "rope_varlen_attention": "plpppllllflippi",
    "rope_varlen_attention_backward": "pppplpppllllflipi",
    "narrow_rope_varlen_attention": "plpppllllflippi",
    "narrow_rope_varlen_attention_backward": "pppplpppllllflipi",
}
"""What multiplies by libtorch's own small products, of float32 and of bfloat16."""
_WIDE = ("rope_varlen_attention", "rope_varlen_attention_backward")
"""Those of float32."""
SIGNATURES = _EVERYWHERE | _AVX512_BF16 | _TILES
"""Every kernel that there may be: the name of its C function -> the letters of its arguments."""
SOURCES = ("native.c", "quantized.c", "serving.c", "decoder.c", "threads.c", "tiles.c")
HEADERS = ("bf16.h", "serving.h", "amx.h")
_reason = "not looked for yet"


class Kernels:
    """The kernels that are to be used, each an attribute; `compiled` has all there are. `wrong`: of those that failed
    their self-test, how. A kernel that fails raises
    MemoryError, where it has no room, or IndexError, where a target is none."""

    def __init__(self, compiled: ctypes.CDLL, path: Path) -> None:
        self.compiled, self.path = compiled, path
        self.wrong: dict[str, str] = {}

    def has(self, *names: str) -> bool:
        return all(hasattr(self, name) for name in names)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no kernel {name} here")


_FALLIBLE = {
    *("norm_silu", "norm_silu_backward", "causal_softmax", "token_nll", "attend", "attend_backward", "lora_forward"),
    *("lora_backward", "lora_weight_gradients", "paged_attend", "decode", *_TILES),
}
"""Those that say whether they could do their work (bf16.h)."""


def bound(path: str | Path, without: Iterable[str] = ()) -> Kernels:
    """The kernels of a compiled library but those named. Raises OSError for what is none."""
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


_LIBTORCH = ("libtorch_cpu.so", "libtorch_cpu.dylib")


@functools.cache
def _small_products() -> tuple[int | None, int | None, int | None]:
    """Where at::native::cpublas::brgemm is for float32 and for bfloat16, and what a thread calls when it is done with
    it (CPUBlas.h), by the names that C++ gives them in a library; None for what is not there. Those of bfloat16 are
    for processors that multiply it: elsewhere libtorch says by an exception, which C cannot take, that it has none.
    Where there is AMX they run in its tiles, which oneDNN asks the system for (docs/notes/amx.md)."""
    at, folder = "_ZN2at6native7cpublas", Path(torch.__file__).parent / "lib"
    found = next((folder / name for name in _LIBTORCH if (folder / name).is_file()), None)
    if found is None:
        return None, None, None
    library = ctypes.CDLL(str(found))

    def place(*names: str) -> int | None:
        there = next((getattr(library, at + name) for name in names if hasattr(library, at + name)), None)
        return None if there is None else ctypes.cast(there, ctypes.c_void_p).value

    # int64_t is a long on Linux and a long long on macOS
    wide = place("6brgemmEllllllbPKfS3_Pfb", "6brgemmExxxxxxbPKfS3_Pfb")
    narrow = place("6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", "6brgemmExxxxxxbPKN3c108BFloat16ES5_Pfb")
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # wherever there is AMX, too
    has_narrow = has_bf16 and torch.backends.mkldnn.is_available()
    return wide, narrow if has_narrow else None, place("14brgemm_releaseEb")


def _checked(result: int, function: Any, arguments: Any) -> int:
    if result == 1:
        raise MemoryError(f"{function.__name__}: no memory for what it works with")
    if result == 2:
        raise IndexError(f"{function.__name__}: a target is no token of the vocabulary")
    return result


@functools.cache
def kernels() -> Kernels | None:
    """The compiled kernels, or None. Looked for once a process."""
    global _reason
    if os.environ.get("VENEER_NATIVE", "1") == "0":
        _reason = "turned off by VENEER_NATIVE=0"
        return None
    compiler, note = find_compiler("CC", ("cc", "gcc", "clang"))
    if compiler is None:
        _reason = "; ".join(["no C compiler (cc, gcc or clang) on the path", *([note] if note else []), "install one"])
        return None
    here = Path(__file__).parent
    try:
        made = build_kernels(compiler, [here / name for name in SOURCES], [here / name for name in HEADERS])
        library = bound(made.library, made.wrong)
        library.wrong = made.wrong
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        unset = ", or unset CC" if os.environ.get("CC") == compiler else ""
        way = f"; install a C compiler that works (gcc or clang){unset}"
        failed = isinstance(error, subprocess.SubprocessError)  # and not a folder, or what was built
        _reason = f"they could not be built: {why_not_compiled(compiler, error)}{way if failed else ''}"
        return None
    wrong = ", ".join(f"{name} {why}" for name, why in made.wrong.items())
    parts = [f"compiled by {compiler}", f"left out: {wrong}" if wrong else "", note, *made.notes]
    _reason = "; ".join(part for part in parts if part)
    return library


def status() -> str:
    """One line for a report: which kernels run and why."""
    return (
        f"native CPU kernels: {_reason}"
        if kernels() is not None
        else f"torch's own operations (native CPU kernels: {_reason})"
    )


def usable(names: str | tuple[str, ...], *tensors: Tensor) -> Kernels | None:
    """The library if it has these kernels and every tensor is a contiguous bfloat16 one on the CPU, else None."""
    if all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tensors):
        library = kernels()
        return library if library is not None and library.has(*([names] if isinstance(names, str) else names)) else None
    return None


def has(*names: str) -> bool:
    """Whether there are compiled kernels, these among them."""
    library = kernels()
    return library is not None and library.has(*names)


def why_missing(*names: str) -> str:
    """Why these kernels are not to be used, in a line; "" where they are."""
    library = kernels()
    if library is None:
        return f"no compiled kernels: {_reason}"
    gone = [name for name in names if not library.has(name)]
    if not gone:
        return ""
    if failed := [f"{name} {library.wrong[name]}" for name in gone if name in library.wrong]:
        why = f"the self-test failed ({', '.join(failed)})"
    elif all(name in _TILES for name in gone):
        why = "there are no products of libtorch's own for it on this processor"
    elif all(name in _AMX for name in gone):
        why = "this processor has no AMX, or the system keeps it"
    else:
        why = "this processor has no AVX512-BF16"
    return f"no compiled {', '.join(gone)}: {why}"


PAGED = ("store_rows", "rope_and_cache", "paged_attend")
"""The kernels that read and write pages in their own layout: all of them or none."""


class _LowRankStruct(ctypes.Structure):
    """A low-rank product as the kernels take it; A and B are pointers to contiguous float32."""

    _fields_ = (
        ("A", _pointer),
        ("B", _pointer),
        ("first", _int64),
        ("last", _int64),
        ("rank", _int64),
        ("scale", _float),
    )


def low_rank_structs(products: Sequence[LowRank]) -> ctypes.Array[Any]:
    """The products as C reads them, each a struct of pointers: good as long as the products' tensors live."""
    made = (_LowRankStruct(p.A.data_ptr(), p.B.data_ptr(), p.first, p.last, len(p.A), p.scale) for p in products)
    return (_LowRankStruct * len(products))(*made)


def strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """All but the last of each, as the kernels for any layout take them."""
    flat = [step for t in tensors for step in t.stride()[:-1]]
    return (_int64 * len(flat))(*flat)
