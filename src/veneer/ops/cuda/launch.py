"""How the kernels of this folder are written, run, and compiled for a GPU that is not there.

    @kernel
    def _double(x, y, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

    y = torch.empty_like(x)
    run_kernel(_double, (block_count(n, 1024),), x, y, n, BLOCK=1024)

A function of this folder allocates what it returns and launches; on a fake or meta tensor the launch is left out, and
the result has the right shape. Three checks need no GPU:

    TRITON_INTERPRET=1 and VENEER_OPS=cuda   kernels run on tensors of the CPU, as numpy operations
    with recorded() as launches              what a step on fake CUDA tensors would launch, with its constants …
    resources(launch, target)                … compiled for a GPU: its registers, stack and shared memory

Triton is imported with this module, which only ops that were given a CUDA tensor import; without it, and on a GPU where
a first small kernel does not run, there are none, and the references in torch run.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.ops.dispatch import Implementation
from veneer.ops.transfer import made_up

try:
    import triton
    from triton import language as tl
except ImportError:  # of a torch without CUDA
    triton = tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether kernels run in triton's interpreter (TRITON_INTERPRET=1 when triton was first imported)."""

KERNELS: list[Any] = []
"""Every kernel of this folder, as `kernel` made it."""


def kernel(function: Callable[..., Any] | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, where there is triton. For a function that is launched; `device_function` is for their parts.

    `varying`: whole numbers that are new at each launch, for whose values nothing is compiled anew."""
    if function is None:
        return lambda function: kernel(function, varying=varying)
    if triton is None:
        return function
    function.__dict__["varying"] = varying
    KERNELS.append(triton.jit(function, do_not_specialize=list(varying)))
    return KERNELS[-1]


def device_function(function: Callable[..., Any]) -> Any:
    """`triton.jit` for what kernels call."""
    return function if triton is None else triton.jit(function)


_OLDEST = (8, 0)
"""Compute capability from which kernels run: bfloat16 and asynchronous copies came with it."""


@device_function
def double(x, y, n, BLOCK: tl.constexpr):
    """y = 2·x: the small kernel that is tried before any other."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


def on_amd() -> bool:
    """Whether torch's GPUs are AMD's."""
    return torch.version.hip is not None


@functools.cache
def trouble_on(device: torch.device) -> str:
    """Why kernels cannot run on this GPU; "" where they can: a small one was compiled, launched, and right."""
    if on_amd():
        return "kernels are cut for GPUs of NVIDIA"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        found, wanted = (".".join(map(str, pair)) for pair in (capability, _OLDEST))
        return f"kernels want compute capability {wanted}, this GPU has {found}"
    try:
        n = 100
        x = torch.arange(n, dtype=torch.float32, device=device)
        y = torch.zeros_like(x)
        with torch.cuda.device(device):
            double[(2,)](x, y, n, BLOCK=64)
        right = torch.equal(y, x + x)
    except Exception as error:  # of triton's, of the C compiler that it calls, of the driver
        said = str(error).strip().splitlines() or [""]
        return f"a small kernel could not run: {type(error).__name__}: {said[0]}"
    return "" if right else "a small kernel gave wrong numbers"


def why_missing() -> str:
    """Why no kernel can run at all, on the current GPU if there is one; "" where they can."""
    if triton is None:
        return "triton is not installed"
    if INTERPRETED or not torch.cuda.is_available() or made_up(torch.empty(0, device="cuda")):
        return ""
    return trouble_on(torch.device("cuda", torch.cuda.current_device()))


def takes(*tensors: Tensor | None) -> bool:
    """Whether kernels can run on these: all on one GPU that they run on (or, interpreted, on the CPU), none in float64,
    which they would round to float32."""
    if triton is None:
        return False
    given = [t for t in tensors if t is not None]
    device = given[0].device
    if device.type != "cuda" and not INTERPRETED:
        return False
    if not all(t.device == device and t.dtype != torch.float64 for t in given):
        return False
    return INTERPRETED or made_up(given[0]) or not trouble_on(device)


def contiguous(*tensors: Tensor | None) -> bool:
    """`takes`, of tensors whose elements lie in order."""
    return takes(*tensors) and all(t is None or t.is_contiguous() for t in tensors)


def implements(
    table: dict[str, Implementation],
    op: str,
    takes: Callable[..., bool] = contiguous,
    wants: str = "contiguous tensors",
) -> Callable[[Any], Any]:
    """Puts what it decorates into `table` as what runs `op`."""

    def put(run: Any) -> Any:
        table[op] = Implementation(run, takes, wants, why_missing, "cuda")
        return run

    return put


def block_count(n: int, block: int) -> int:
    """⌈n / block⌉"""
    return -(-n // block)


# -- launching ---------------------------------------------------------------------------------------------------------

_recording: list[list[Launch]] = []


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments, its constants and its options: what is compiled once.

    `signature`: name -> triton's type; "constexpr" for what is in `constants`. `aligned`: places of arguments that are
    multiples of 16."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).lstrip("_")


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Runs a kernel on `grid` programs. `settings`: its constants by name, and options of triton's: num_warps,
    num_stages, enable_fp_fusion (a·b + c rounded once: by default yes)."""
    settings.setdefault("enable_fp_fusion", True)
    first = next(a for a in arguments if isinstance(a, Tensor))
    if _recording:
        _recording[-1].append(_launch_of(kernel, arguments, settings))
    if made_up(first) or not all(grid):
        return
    if first.device.type != "cuda":
        kernel[grid](*arguments, **settings)
        return
    with torch.cuda.device(first.device):
        kernel[grid](*arguments, **settings)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched within the block, each time that it is: also on fake tensors, where nothing runs."""
    launches: list[Launch] = []
    _recording.append(launches)
    try:
        yield launches
    finally:
        _recording.remove(launches)


_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


def _launch_of(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Launch:
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | {n: v for n, v in settings.items() if n in names}
    signature, constants, aligned = {}, {}, []
    annotations = kernel.fn.__annotations__
    for at, name in enumerate(names):
        value = given.get(name)
        if "constexpr" in str(annotations.get(name, "")) or value is None or value is True or value is False:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned.append(at)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif name in kernel.fn.varying:
            signature[name] = "i32"
        elif value == 1:  # as triton does when it launches
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [] if value % 16 else [at]
    options = {n: v for n, v in settings.items() if n not in names}
    return Launch(kernel, signature, constants, tuple(aligned), options)


# -- compiled for a GPU that is not there ------------------------------------------------------------------------------

SHARED_LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Target -> bytes of shared memory that a block may have (CUDA C programming guide, table "Technical specifications
per compute capability"; AMD CDNA 3 ISA, LDS)."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. `stack`: bytes a thread has in memory because registers did not do: 0 unless it
    spills. `shared`: bytes of shared memory a block."""

    registers: int
    stack: int
    shared: int


def resources(launch: Launch, target: str) -> Resources:
    """Compiles a launch for one of SHARED_LIMITS. Raises what triton raises where it cannot be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(at,): [["tt.divisibility", 16]] for at in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    if target.startswith("sm_"):
        binary = triton.compile(source, GPUTarget("cuda", int(target[3:]), 32), options=launch.options)
        registers, stack = _of_cubin(binary.asm["cubin"])
    else:
        options = {k: v for k, v in launch.options.items() if k != "num_stages"}
        binary = triton.compile(source, GPUTarget("hip", target, 64), options=options)
        registers, stack = _of_amdgcn(binary.asm["amdgcn"])
    return Resources(registers, stack, binary.metadata.shared)


_FRAME_SIZE, _REGISTER_COUNT, _WORDS = 0x11, 0x2F, 4  # of .nv.info: what `cuobjdump -elf` names EIATTR_… and EIFMT_SVAL


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of its stack) from the .nv.info section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = {_FRAME_SIZE: 0, _REGISTER_COUNT: 0}
    for name, _, _, _, at, length in headers:
        start = headers[names][4] + name
        if cubin[start : cubin.index(b"\0", start)] != b".nv.info":
            continue
        end = at + length
        while at < end:
            form, attribute, bytes_ = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form != _WORDS:
                continue
            if attribute in found:
                found[attribute] = max(found[attribute], struct.unpack_from("<I", cubin, at + 4)[0])
            at += bytes_
    return found[_REGISTER_COUNT], found[_FRAME_SIZE]


def _of_amdgcn(text: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch a thread) from the metadata at an assembly's end."""
    values = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    return values["vgpr_count"], values["private_segment_fixed_size"]


# -- what kernels share ------------------------------------------------------------------------------------------------


@device_function
def product(a, b, WIDE: tl.constexpr, sums=None):
    """a·b (+ sums) summed in float32. WIDE: of factors made float32 first: float32 itself, and all that is interpreted,
    where triton multiplies bfloat16 as if its bits were a whole number's."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums)


def wide(dtype: torch.dtype) -> bool:
    """Of `product`."""
    return INTERPRETED or dtype == torch.float32


_BY_HAND = tl.constexpr(INTERPRETED) if tl is not None else INTERPRETED


@device_function
def rounded(value, to):
    """A float32 value in the type that `to` points to, rounded to the nearest. Of bfloat16 bit by bit where it is
    interpreted: triton's interpreter cuts the last bits off, and makes a small number of −0."""
    if _BY_HAND and to.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        up = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (up >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(to.dtype.element_ty)
