"""CUDA tensors without a GPU: they have a shape, a dtype and a device, and no values (torch's FakeTensorMode).

    with fake_cuda():
        x = torch.empty(1 << 20, 1 << 20, device="cuda")       2 TB that nobody has

torch makes such tensors on a machine without CUDA, and stops in a backward pass, where a build for CPUs alone knows no
stream and no device guard. fake_cuda.cpp gives it both; it is compiled once, by the C++ compiler and the headers that
came with torch. On a machine with a GPU nothing is compiled, and nothing is put on the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _foreach_utils

from veneer.errors import ResourceError
from veneer.ops.cpu.build import compile_library, distrusted, find_compiler, trusted_folder, why_not_compiled

_SOURCE = Path(__file__).with_suffix(".cpp")
_one = threading.RLock()


@contextmanager
def fake_cuda(*, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within the with-block every operation on a CUDA tensor is made up, and so is what is made on `device="cuda"`.

    `capability`: what the device says of itself; 9.0 is an H100. The whole process is within it, and one thread at a
    time. Raises ResourceError where torch lacks CUDA and there is no C++ compiler."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with _one, ExitStack() as undo:
        if not torch.cuda.is_available():
            switch = cuda_switch()
            switch(1)
            undo.callback(switch, 0)
        about = SimpleNamespace(
            name="fake",
            major=capability[0],
            minor=capability[1],
            multi_processor_count=132,
            warp_size=32,
            total_memory=80 << 30,
            shared_memory_per_block_optin=232448,
            max_threads_per_multi_processor=2048,
        )
        answers: dict[str, Any] = {
            "get_device_capability": capability,
            "get_device_properties": about,
            "current_device": 0,
            "get_device_name": "fake",
            "is_bf16_supported": True,
            "mem_get_info": (80 << 30, 80 << 30),
            "memory_reserved": 0,
            "memory_allocated": 0,
        }
        for name, answer in answers.items():
            undo.enter_context(mock.patch.object(torch.cuda, name, lambda *_, _a=answer, **__: _a))
        # the thread that a device has in a backward pass would not be within this block
        undo.enter_context(torch.autograd.set_multithreading_enabled(False))
        undo.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        types = [*_foreach_utils._foreach_supported_types, FakeTensor]  # gradients are clipped by one kernel, not each
        undo.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", types))
        undo.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


_own_attention = F.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch runs on a GPU, where a build without CUDA would take the formula: flash attention for 16 bits without
    a mask, the memory-efficient one with a mask (which has no grouped heads), the formula for the rest."""
    aten: Any = torch.ops.aten
    dim, given = query.shape[-1], (query, key, value)
    if query.device.type == "cuda" and query.dtype != torch.float32 and dim == value.shape[-1] and dim % 8 == 0:
        if attn_mask is None and dim <= 256:
            out: Tensor = aten._scaled_dot_product_flash_attention(*given, dropout_p, is_causal, scale=scale)[0]
            return out
        if attn_mask is not None and not enable_gqa:
            bias = attn_mask
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
            bias = bias.expand(*query.shape[:2], query.shape[2], key.shape[2])
            out, *_ = aten._scaled_dot_product_efficient_attention(
                *given, bias, True, dropout_p, is_causal, scale=scale
            )
            return out
    return _own_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@functools.cache
def cuda_switch() -> Any:
    """The compiled function by which autograd takes CUDA to be there. Raises ResourceError where it cannot be had."""
    compiler, note = find_compiler("CXX", ("c++", "g++", "clang++"))
    what = (
        "a step on CUDA cannot be traced here: this torch is built for CPUs, and what autograd asks of CUDA is missing"
    )
    if compiler is None:
        way = "install a C++ compiler (g++ or clang++), or trace where torch has CUDA"
        raise ResourceError(what, where=note or None, fix=way)
    home = Path(torch.__file__).parent
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}"]
    links = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), torch.__version__, compiler]).encode()).hexdigest()[:16]
    try:
        library = trusted_folder([]) / f"fake-cuda-{key}.so"
        if library.exists() and distrusted(library):
            library.unlink()
        if not library.exists():
            compile_library([compiler, *flags], [_SOURCE], library, links)
        function = ctypes.CDLL(str(library)).fake_cuda
    except (OSError, subprocess.SubprocessError) as error:
        way = "a C++ compiler that works (g++ or clang++), named by CXX or on the path; or trace where torch has CUDA"
        raise ResourceError(what, where=why_not_compiled(compiler, error), fix=way) from error
    function.argtypes, function.restype = [ctypes.c_int], None
    return function
