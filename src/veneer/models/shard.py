"""Shard a frozen base over a run's processes with FSDP2 (torch's `fully_shard`).

    call = shard(model, model.model.layers, device)
    loss = call(text_loss, model, ids, lengths, trained)      on every process, the same number of times
    loss.backward()

Each process keeps 1/N of every weight. FSDP gathers a block's weights for its forward pass and again for its
backward pass, and frees them after each pass. Weights outside the blocks (embedding, head) are gathered for
the duration of a `call`. Parameters of any dtype can be sharded. For a quantized weight, the codes and
constants are sharded; the weight is dequantized when it is used. Buffers are not sharded. Trained tensors
that are not parameters of `model`, such as the weights of an attached adapter, are not sharded either, and
their gradients are not reduced.

Sharding cannot be undone: afterwards, the model can only be used inside `call`. torch.distributed must be
initialized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from veneer.core.targets import base_modules, base_of
from veneer.models.sharded_weights import ShardReader, read_buffers
from veneer.ops.quantization_formats import with_tensors
from veneer.ops.quantized import Quantized

T = TypeVar("T")


class CallWithWeights(Protocol):
    """A function that calls another function while a model's weights are gathered."""

    def __call__(self, act: Callable[..., T], /, *args: Any) -> T: ...


def call_unsharded(act: Callable[..., T], /, *args: Any) -> T:
    """Call `act`. This is the `CallWithWeights` of a model that is not sharded."""
    return act(*args)


class _Root(nn.Module):
    """A module whose forward calls any function.

    FSDP gathers weights only around a module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[..., Any], *args: Any) -> Any:
        return act(*args)


class Sharded:
    """The `CallWithWeights` of a sharded model.

    To read weights outside a call:

        call.gather_block(module)      gather this module's block and free the previous one
        call.reshard()                 free the gathered block

    The first `call` must come before these methods, and every process must call the methods. Tensors of a
    gathered weight can be kept: they are empty while the weight is sharded, and have their values again
    whenever the weight is gathered, including in a backward pass."""

    def __init__(self, root: _Root, blocks: Mapping[int, _Block]) -> None:
        self._whole, self._blocks = root, blocks
        self._now: _Block | None = None

    def __call__(self, act: Callable[..., T], /, *args: Any) -> T:
        out: T = self._whole(act, *args)
        return out

    def gather_block(self, module: nn.Module) -> None:
        block = self._blocks.get(id(base_of(module)))
        if block is not None and block is not self._now:
            self.reshard()
            self._now = block
            block.module.unshard()
            block.assemble()

    def reshard(self) -> None:
        if self._now is not None:
            self._now.module.reshard()
        self._now = None


@dataclass(frozen=True)
class _Block:
    """An FSDP module, gathered as a whole, and the weights built from its parameters."""

    module: Any
    apart: Sequence[_ShardedCodes | _Joined]

    def assemble(self, *_: Any) -> None:
        for each in self.apart:
            each.gather()


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules to gather one at a time: members of the largest ModuleList.

    In a decoder, these are the layers."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda modules: sum(p.numel() for m in modules for p in m.parameters()), default=[])


def shard(
    model: nn.Module,
    parts: Sequence[nn.Module],
    device: torch.device,
    unread: ShardReader | None = None,
    together: Sequence[Sequence[nn.Module]] = (),
) -> Sharded:
    """Shard every parameter of `model` along its first dimension.

    Moves the shards to `device` block by block, so no device ever holds the whole model. All later uses of
    the model must go through the returned function.

    `unread`: reader with which each process reads its own shards. With a reader, the model must be on the
    meta device. `together`: groups of linear modules with the same input. The gathered weights of a group are
    rows of one tensor."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    root = _Root(model)
    inside: set[int] = set()
    names: dict[int, tuple[str, ...]] = {}
    there: dict[int, _Block] = {}
    for prefix, module in base_modules(model):
        for key, p in module.named_parameters(recurse=False):
            names.setdefault(id(p), (f"{prefix}.{key}" if prefix else key,))
    for group in [*parts, root]:
        owned = [m for m in group.modules() if id(m) not in inside]
        inside.update(map(id, owned))
        joined = _joined(owned, together, names)
        unread_weights = _unread_weights(owned, names) if unread else []
        apart: list[_ShardedCodes | _Joined] = [*_split_codes(owned), *joined]
        fully_shard(group, mesh=mesh, reshard_after_forward=True)
        for each in unread_weights:
            assert unread is not None
            each.store_shards(unread.part(each.names, each.weight, mesh.get_local_rank(), mesh.size(), device))
        block = _Block(group, apart)
        for weight in apart:
            weight.release()
        if apart:
            # Keep these tensors: a backward pass gathers into the same memory without calling hooks, both for
            # weights saved by autograd and for recomputed forward passes. Between passes, the tensors are
            # empty.
            group.register_forward_pre_hook(block.assemble)
        there.update({id(m): block for m in owned})
    if unread:
        read_buffers(model, unread, device)
    return Sharded(root, there)


@dataclass(frozen=True)
class _UnreadWeight:
    """A weight on the meta device that has not been read yet.

    `names`: names of the weights in the files whose rows form this weight. `users`: (module, name) of each
    module that uses the weight."""

    names: tuple[str, ...]
    weight: Tensor
    users: list[tuple[nn.Module, str]]

    def store_shards(self, shards: Sequence[Tensor]) -> None:
        """Replace the meta tensors that `fully_shard` created with this process's shards."""
        from torch.distributed.tensor import DTensor

        users = [self.users]
        if isinstance(self.weight, Quantized):
            module, key = self.users[0]
            users = [[(module, name)] for name in _code_names(key, self.weight)]
        for holders, local in zip(users, shards, strict=True):
            module, key = holders[0]
            there = module._parameters[key]
            assert isinstance(there, DTensor)
            how = {"run_check": False, "shape": there.shape, "stride": there.stride()}
            part = DTensor.from_local(local, there.device_mesh, there.placements, **how)
            parameter = nn.Parameter(part, requires_grad=False)
            for module, key in holders:
                module._parameters[key] = parameter


def _unread_weights(modules: Sequence[nn.Module], names: Mapping[int, tuple[str, ...]]) -> list[_UnreadWeight]:
    weights: dict[int, _UnreadWeight] = {}
    for module in modules:
        for key, weight in module._parameters.items():
            if weight is not None:
                weights.setdefault(id(weight), _UnreadWeight(names[id(weight)], weight, [])).users.append((module, key))
    return list(weights.values())


def _code_names(key: str, weight: Quantized) -> tuple[str, ...]:
    """Return the parameter names for the codes and constants of a quantized parameter."""
    return tuple(f"{key}_{name.replace('.', '_')}" for name in weight.stored.tensors())


@dataclass(frozen=True)
class _ShardedCodes:
    """A quantized weight whose codes and constants are parameters of `owner`.

    FSDP shards these parameters. `absent`: the weight on the meta device, used until the codes are gathered.
    `users`: (module, name) of each module that uses the weight."""

    absent: Quantized
    owner: nn.Module
    names: tuple[str, ...]
    users: list[tuple[nn.Module, str]]

    def gather(self) -> None:
        self._assign(self._assembled())

    def release(self) -> None:
        self._assign(self.absent)

    def _assembled(self) -> Quantized:
        codes = [getattr(self.owner, name) for name in self.names]
        shapes = [t.shape for t in self.absent.stored.tensors().values()]
        values = (code.detach().view(shape) for code, shape in zip(codes, shapes, strict=True))
        return self.absent.like(with_tensors(self.absent.stored, values))

    def _assign(self, weight: Quantized) -> None:
        for module, name in self.users:
            # Not register_parameter: this weight is derived from other parameters and is replaced in every
            # forward pass.
            module._parameters[name] = weight  # type: ignore[assignment]


def _split_codes(modules: Sequence[nn.Module]) -> list[_ShardedCodes]:
    sharded: dict[int, _ShardedCodes] = {}
    for module in modules:
        for name, weight in list(module._parameters.items()):
            if not isinstance(weight, Quantized):
                continue
            if id(weight) not in sharded:
                tensors = weight.stored.tensors()
                names = _code_names(name, weight)
                for code_name, tensor in zip(names, tensors.values(), strict=True):
                    # A scalar cannot be sharded, so store it as one row.
                    code = nn.Parameter(tensor.reshape(tensor.shape or 1), requires_grad=False)
                    module.register_parameter(code_name, code)
                absent = weight.like(weight.stored.moved(lambda t: t.to("meta")))
                sharded[id(weight)] = _ShardedCodes(absent, module, names, [])
            del module._parameters[name]
            sharded[id(weight)].users.append((module, name))
    return list(sharded.values())


@dataclass(frozen=True)
class _Joined:
    """The weights of `modules`, joined as rows of `owner`'s parameter `_TOGETHER`.

    `absent`: the weight on the meta device, used until the parameter is gathered."""

    absent: Tensor
    owner: nn.Module
    modules: Sequence[nn.Module]
    rows: Sequence[int]

    def gather(self) -> None:
        self._assign(self.owner.get_parameter(_TOGETHER).detach())

    def release(self) -> None:
        self._assign(self.absent)

    def _assign(self, weight: Tensor) -> None:
        for module, rows in zip(self.modules, weight.split(list(self.rows)), strict=True):
            module._parameters["weight"] = rows  # type: ignore[assignment]


_TOGETHER = "weights_together"


def _joined(
    owned: Sequence[nn.Module], together: Sequence[Sequence[nn.Module]], names: dict[int, tuple[str, ...]]
) -> list[_Joined]:
    """Join each group's frozen weights into one parameter of the group's first module.

    The weights must have the same dtype and width. Quantized weights are not joined here, because they can be
    joined without a copy (ops.quantized.stacked_rows). Adds the new parameters to `names`."""
    here, out = set(map(id, owned)), []
    for group in together:
        modules = [base_of(m) for m in group]
        weights = [m._parameters.get("weight") for m in modules]
        plain = [w for w in weights if w is not None and not isinstance(w, Quantized) and not w.requires_grad]
        if len(plain) < len(modules) or len(modules) < 2 or not all(id(m) in here for m in modules):
            continue
        if len({(w.dtype, w.shape[1]) for w in plain}) > 1 or len({id(w) for w in plain}) < len(plain):
            continue
        parameter = nn.Parameter(torch.cat([w.detach() for w in plain]), requires_grad=False)
        names[id(parameter)] = tuple(name for w in plain for name in names[id(w)])
        for module in modules:
            del module._parameters["weight"]
        modules[0].register_parameter(_TOGETHER, parameter)
        out.append(_Joined(parameter.detach().to("meta"), modules[0], modules, [len(w) for w in plain]))
    return out


def whole_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers before sharding.

    Weights that have not been read yet are included."""
    return _bytes([*model.parameters(), *model.buffers()])


def local_bytes(model: nn.Module) -> int:
    """Return the bytes of the shards and buffers that this process holds."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return _bytes([t.to_local() if hasattr(t, "to_local") else t for t in tensors if not t.is_meta])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.bytes if isinstance(t, Quantized) else t.numel() * t.element_size() for t in tensors)
