"""A frozen base split over the processes of a run: each keeps 1/N of every weight (FSDP2, torch's `fully_shard`).

    call = shard(model, model.model.layers, device)
    loss = call(text_loss, model, ids, lengths, trained)      on every process, the same number of times
    loss.backward()

The weights of a block are gathered for its forward pass and again for its backward pass, and let go of after each; what
lies outside of the blocks (embedding, head) is there for the length of a `call`; between calls there are only parts.
Parameters of any dtype can be split; of quantised weights the codes and constants are, and dequantised when used as
ever. Buffers stay whole. Trained tensors that are no parameters of `model`, as an attachment's, are left whole too, and
nothing is done to their gradients.

There is no way back: the model is of use inside `call` alone from now on. Needs torch.distributed, initialised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from veneer.core.targets import base_modules, base_of
from veneer.models.unread import Unread, read_buffers
from veneer.ops.quantization_formats import with_tensors
from veneer.ops.quantized import Quantized

T = TypeVar("T")


class CallWithWeights(Protocol):
    """Calls a function while the weights of a sharded model are gathered; returns its result."""

    def __call__(self, act: Callable[..., T], /, *args: Any) -> T: ...


def call_whole(act: Callable[..., T], /, *args: Any) -> T:
    """The `CallWithWeights` of a model that is not sharded: it calls the function."""
    return act(*args)


class _Whole(nn.Module):
    """A module whose forward is any function over `model`: FSDP gathers weights around a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[..., Any], *args: Any) -> Any:
        return act(*args)


class Sharded:
    """The `CallWithWeights` of a sharded model. What looks at weights outside of a call asks for those of a module:

        call.at(module)      from now on the weights of this module's block are there, and no other block's
        call.let_go()        no block's are

    both on every process, after a first call. A tensor of a gathered weight stays where it is: it may be kept, is empty
    while the weight is parted, and has the weight's values again whenever that is gathered, in a backward pass too."""

    def __init__(self, whole: _Whole, blocks: Mapping[int, _Block]) -> None:
        self._whole, self._blocks = whole, blocks
        self._now: _Block | None = None

    def __call__(self, act: Callable[..., T], /, *args: Any) -> T:
        out: T = self._whole(act, *args)
        return out

    def at(self, module: nn.Module) -> None:
        block = self._blocks.get(id(base_of(module)))
        if block is not None and block is not self._now:
            self.let_go()
            self._now = block
            block.module.unshard()
            block.put_together()

    def let_go(self) -> None:
        if self._now is not None:
            self._now.module.reshard()
        self._now = None


@dataclass(frozen=True)
class _Block:
    """What is gathered at once: an FSDP module, and what its parameters are put together to."""

    module: Any
    apart: Sequence[_Apart | _Joined]

    def put_together(self, *_: Any) -> None:
        for each in self.apart:
            each.gather()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one after another: those of the longest list of modules, a decoder's layers."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda own: sum(p.numel() for m in own for p in m.parameters()), default=[])


def shard(
    model: nn.Module,
    parts: Sequence[nn.Module],
    device: torch.device,
    unread: Unread | None = None,
    together: Sequence[Sequence[nn.Module]] = (),
) -> Sharded:
    """Splits every parameter of `model` along its first dimension and moves the parts to `device`, block by block, so
    that no device ever holds the whole. Returns the function through which everything that uses the model is called.

    `unread`: the model is on the meta device, and each process reads its own parts of the weights from there.
    `together`: linear modules whose weights lie below one another whenever they are gathered, as products of one input
    want them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = _Whole(model)
    inside: set[int] = set()
    names: dict[int, tuple[str, ...]] = {}
    there: dict[int, _Block] = {}
    for prefix, module in base_modules(model):
        for key, p in module.named_parameters(recurse=False):
            names.setdefault(id(p), (f"{prefix}.{key}" if prefix else key,))
    for group in [*parts, whole]:
        owned = [m for m in group.modules() if id(m) not in inside]
        inside.update(map(id, owned))
        joined = _joined(owned, together, names)
        wanted = _wanted(owned, names) if unread else []
        apart: list[_Apart | _Joined] = [*_taken_apart(owned), *joined]
        fully_shard(group, mesh=mesh, reshard_after_forward=True)
        for each in wanted:
            assert unread is not None
            each.put(unread.part(each.names, each.weight, mesh.get_local_rank(), mesh.size(), device))
        block = _Block(group, apart)
        for one in apart:
            one.leave()
        if apart:
            # They stay: a backward pass gathers into the same place, for what autograd keeps of the weights and for a
            # forward that is recomputed there, without hooks. In between they are empty.
            group.register_forward_pre_hook(block.put_together)
        there.update({id(m): block for m in owned})
    if unread:
        read_buffers(model, unread, device)
    return Sharded(whole, there)


@dataclass(frozen=True)
class _Wanted:
    """A weight on the meta device that was not read yet. `names`: of what lies below one another in it, in the files.
    `places`: (module, name) of each that has it."""

    names: tuple[str, ...]
    weight: Tensor
    places: list[tuple[nn.Module, str]]

    def put(self, own: Sequence[Tensor]) -> None:
        """Puts the parts of this process where `fully_shard` has left those on the meta device."""
        from torch.distributed.tensor import DTensor

        places = [self.places]
        if isinstance(self.weight, Quantized):
            module, key = self.places[0]
            places = [[(module, name)] for name in _code_names(key, self.weight)]
        for holders, local in zip(places, own, strict=True):
            module, key = holders[0]
            there = module._parameters[key]
            assert isinstance(there, DTensor)
            how = {"run_check": False, "shape": there.shape, "stride": there.stride()}
            part = DTensor.from_local(local, there.device_mesh, there.placements, **how)
            made = nn.Parameter(part, requires_grad=False)
            for module, key in holders:
                module._parameters[key] = made


def _wanted(modules: Sequence[nn.Module], names: Mapping[int, tuple[str, ...]]) -> list[_Wanted]:
    found: dict[int, _Wanted] = {}
    for module in modules:
        for key, weight in module._parameters.items():
            if weight is not None:
                found.setdefault(id(weight), _Wanted(names[id(weight)], weight, [])).places.append((module, key))
    return list(found.values())


def _code_names(key: str, weight: Quantized) -> tuple[str, ...]:
    """What the tensors of a quantised parameter are called where they are parameters."""
    return tuple(f"{key}_{name.replace('.', '_')}" for name in weight.stored.tensors())


@dataclass(frozen=True)
class _Apart:
    """A quantised weight whose codes are parameters of `owner`, so that they can be split; `absent`: the same weight on
    the meta device, to be seen until codes are gathered. `places`: (module, name) of each that has it."""

    absent: Quantized
    owner: nn.Module
    names: tuple[str, ...]
    places: list[tuple[nn.Module, str]]

    def gather(self) -> None:
        self._put(self._whole())

    def leave(self) -> None:
        self._put(self.absent)

    def _whole(self) -> Quantized:
        codes = [getattr(self.owner, name) for name in self.names]
        shapes = [t.shape for t in self.absent.stored.tensors().values()]
        values = (code.detach().view(shape) for code, shape in zip(codes, shapes, strict=True))
        return self.absent.like(with_tensors(self.absent.stored, values))

    def _put(self, weight: Quantized) -> None:
        for module, name in self.places:
            # Not by register_parameter: it is no parameter of its own, and changes with every forward pass.
            module._parameters[name] = weight  # type: ignore[assignment]


def _taken_apart(modules: Sequence[nn.Module]) -> list[_Apart]:
    found: dict[int, _Apart] = {}
    for module in modules:
        for name, weight in list(module._parameters.items()):
            if not isinstance(weight, Quantized):
                continue
            if id(weight) not in found:
                tensors = weight.stored.tensors()
                names = _code_names(name, weight)
                for own, tensor in zip(names, tensors.values(), strict=True):
                    # A scalar cannot be split: it is one of a row.
                    module.register_parameter(own, nn.Parameter(tensor.reshape(tensor.shape or 1), requires_grad=False))
                absent = weight.like(weight.stored.moved(lambda t: t.to("meta")))
                found[id(weight)] = _Apart(absent, module, names, [])
            del module._parameters[name]
            found[id(weight)].places.append((module, name))
    return list(found.values())


@dataclass(frozen=True)
class _Joined:
    """Weights that are rows of one parameter, `_TOGETHER` of `owner`: those of `modules`, in order. `absent`: as it is
    to be seen until it is gathered."""

    absent: Tensor
    owner: nn.Module
    modules: Sequence[nn.Module]
    rows: Sequence[int]

    def gather(self) -> None:
        self._put(self.owner.get_parameter(_TOGETHER).detach())

    def leave(self) -> None:
        self._put(self.absent)

    def _put(self, weight: Tensor) -> None:
        for module, own in zip(self.modules, weight.split(list(self.rows)), strict=True):
            module._parameters["weight"] = own  # type: ignore[assignment]


_TOGETHER = "weights_together"


def _joined(
    owned: Sequence[nn.Module], together: Sequence[Sequence[nn.Module]], names: dict[int, tuple[str, ...]]
) -> list[_Joined]:
    """Plain frozen weights of one dtype and width, joined in the first module; quantised ones are not copied at all
    when they are joined (ops.quantised.stacked_rows). `names` learns what the new parameters are."""
    here, out = set(map(id, owned)), []
    for group in together:
        modules = [base_of(m) for m in group]
        weights = [m._parameters.get("weight") for m in modules]
        plain = [w for w in weights if w is not None and not isinstance(w, Quantized) and not w.requires_grad]
        if len(plain) < len(modules) or len(modules) < 2 or not all(id(m) in here for m in modules):
            continue
        if len({(w.dtype, w.shape[1]) for w in plain}) > 1 or len({id(w) for w in plain}) < len(plain):
            continue
        whole = nn.Parameter(torch.cat([w.detach() for w in plain]), requires_grad=False)
        names[id(whole)] = tuple(name for w in plain for name in names[id(w)])
        for module in modules:
            del module._parameters["weight"]
        modules[0].register_parameter(_TOGETHER, whole)
        out.append(_Joined(whole.detach().to("meta"), modules[0], modules, [len(w) for w in plain]))
    return out


def whole_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers before it is split, read or not."""
    return _bytes([*model.parameters(), *model.buffers()])


def local_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers that this process holds."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return _bytes([t.to_local() if hasattr(t, "to_local") else t for t in tensors if not t.is_meta])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.bytes if isinstance(t, Quantized) else t.numel() * t.element_size() for t in tensors)
