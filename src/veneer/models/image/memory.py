"""Measure and reduce the memory of a frozen denoiser during adapter training.

    measured_activations(forward, parameters)    bytes that a forward pass keeps for its backward pass
    recomputing(base)                            with-block: diffusers' activation checkpointing
    offloading(base, blocks)                     with-block: the weights of the last blocks are on the CPU
    park(base, names), fetched(base, names)      move components to the CPU, and back inside a with-block

This module works only with modules and tensors. It does not depend on adapters or training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.ops.quantized import Quantized

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase


def measured_activations(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves in `forward()`, excluding `parameters`."""
    parameter_storages = {storage.data_ptr() for p in parameters for storage in _storages(p)}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved.update({s.data_ptr(): s.nbytes() for s in _storages(t) if s.data_ptr() not in parameter_storages})
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    total = sum(saved.values())
    del result
    return total


def _storages(t: Tensor) -> Iterator[torch.UntypedStorage]:
    """Return an iterator over a tensor's storages.

    A quantized weight has storages for its codes, its constants and its dequantized copy."""
    parts = [t]
    if isinstance(t, Quantized):
        parts = [*t.stored.tensors().values(), *([] if t.kept is None else [t.kept])]
    return (part.untyped_storage() for part in parts)


@contextmanager
def recomputing(base: ImageBase) -> Iterator[None]:
    """Enable activation checkpointing for the denoiser inside the with-block.

    Autograd keeps only the inputs of the blocks and recomputes the blocks in the backward pass. Raises
    ConfigError if the denoiser does not support recomputation."""
    denoiser = base.denoiser
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        message = f"{type(denoiser).__name__} cannot recompute activations"
        where = "memory.activation_checkpointing"
        raise ConfigError(message, where=where, fix="turn it off, and lower batching.micro_rows")
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks that diffusers recomputes, in module order.

    For a transformer, these are its blocks. For a U-Net, they are the residual and transformer blocks inside
    the down, mid and up blocks."""
    if hasattr(denoiser, "down_blocks"):
        return [m for m in denoiser.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    lists = [m for m in denoiser.children() if isinstance(m, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


@contextmanager
def offloading(base: ImageBase, count: int) -> Iterator[int]:
    """Keep the frozen weights of the last `count` blocks on the CPU in the with-block.

    Yields the number of bytes moved off the device. Each block's weights are copied to the base's device for
    the block's forward pass. With recomputation, the forward pass runs again in the backward pass and copies
    the weights again; autograd frees the second copy once the block's gradient is computed. At the end, the
    original parameters are restored. Trainable parameters stay on the device."""
    offloaded = blocks_of(base.denoiser)[-count:] if count else []
    undo: list[Callable[[], None]] = []
    moved = 0
    try:
        for block in offloaded:
            weights = []
            for module in block.modules():
                for name, p in module._parameters.items():
                    if p is not None and not p.requires_grad:
                        away = nn.Parameter(_to_cpu(p.data, base.device), requires_grad=False)
                        weights.append((module, name, p, away))
                        moved += p.numel() * p.element_size()
            undo.append(_hook(block, weights, base.device))
        yield moved
    finally:
        for restore in undo:
            restore()


def _to_cpu(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.to("cpu", copy=True)
    return copy.pin_memory() if device.type == "cuda" else copy


def _hook(block: nn.Module, weights: list[tuple[nn.Module, str, Any, Any]], device: torch.device) -> Callable[[], None]:
    """Add hooks that copy a block's frozen weights to the device in its forward pass.

    Returns a function that removes the hooks and restores the original parameters."""
    sizes = [(p.shape, p.dtype, p.device) for _, _, p, _ in weights]
    for module, name, p, away in weights:
        module._parameters[name] = away
        p.data = torch.empty(0, dtype=p.dtype, device=p.device)  # frees the device memory

    def load(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        for module, name, _, away in weights:
            weight = away.data.to(device, non_blocking=True, copy=True)
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def unload(_module: nn.Module, _args: Any, _out: Any) -> None:
        for module, name, _, away in weights:
            module._parameters[name] = away

    handles = [
        block.register_forward_pre_hook(load, with_kwargs=True),
        block.register_forward_hook(unload, always_call=True),
    ]

    def restore() -> None:
        for handle in handles:
            handle.remove()
        for (module, name, p, away), (_, _, home) in zip(weights, sizes, strict=True):
            p.data = away.data.to(home, copy=True)
            module._parameters[name] = p

    return restore


def park(base: ImageBase, names: Sequence[str]) -> int:
    """Move components to CPU memory; return the bytes freed on the base's device."""
    parts = [base.part(name) for name in names]
    for part in parts:
        part.to("cpu")
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


@contextmanager
def fetched(base: ImageBase, names: Sequence[str]) -> Iterator[None]:
    """Move parked components to the base's device, inside the with-block."""
    for name in names:
        base.part(name).to(base.device)
    try:
        yield
    finally:
        park(base, names)
