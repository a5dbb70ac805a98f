"""Memory of a frozen denoiser in adapter training: measure, recompute, offload.

    measured_activations(forward, parameters)    bytes that a forward pass keeps for its backward pass
    recomputing(base)                            diffusers' own activation checkpointing, for a with-block
    offloading(base, blocks)                     the weights of the last blocks on the CPU, for a with-block
    park(base, names), fetched(base, names)      whole components on the CPU, and back for a with-block

Uses modules and tensors only; no adapters, no data.
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
    """Measure the bytes that autograd keeps after `forward()`.

    Without those of `parameters`."""
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
    """Yield a tensor's storages.

    For a quantized weight its codes, constants and dequantized copy."""
    parts = [t]
    if isinstance(t, Quantized):
        parts = [*t.stored.tensors().values(), *([] if t.kept is None else [t.kept])]
    return (part.untyped_storage() for part in parts)


@contextmanager
def recomputing(base: ImageBase) -> Iterator[None]:
    """Recompute the denoiser's blocks in the backward pass.

    Only the blocks' inputs are kept. Raises ConfigError for a denoiser without support for recomputation."""
    denoiser = base.denoiser
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(denoiser).__name__} cannot recompute activations",
            where="memory.activation_checkpointing",
            fix="set it to off, and batching.micro_rows lower",
        )
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """Return the units that diffusers recomputes, in module order.

    Blocks of a transformer; in a UNet the residual and transformer blocks inside its down, mid and up blocks.
    """
    if hasattr(denoiser, "down_blocks"):
        return [m for m in denoiser.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    lists = [m for m in denoiser.children() if isinstance(m, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


@contextmanager
def offloading(base: ImageBase, count: int) -> Iterator[int]:
    """Keeps the frozen weights of the last `count` blocks on the CPU; each comes to the base's device for its forward
    pass. Yields the bytes that leave the device.

    With recomputation a block's forward runs again in the backward pass, and then too its weights come: what autograd
    keeps of them is freed once the block's gradient is computed. Weights are never written; afterwards the same tensors
    are where they were. Trainable parameters stay on the device."""
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
    """Copy a block's frozen weights to the device only during its forward pass."""
    sizes = [(p.shape, p.dtype, p.device) for _, _, p, _ in weights]
    for module, name, p, away in weights:
        module._parameters[name] = away
        p.data = torch.empty(0, dtype=p.dtype, device=p.device)  # frees the device memory

    def load(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        for module, name, _, away in weights:
            module._parameters[name] = nn.Parameter(
                away.data.to(device, non_blocking=True, copy=True), requires_grad=False
            )

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
    """Move parked components to the base's device inside the with-block."""
    for name in names:
        base.part(name).to(base.device)
    try:
        yield
    finally:
        park(base, names)
