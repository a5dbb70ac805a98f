"""Attach adapters to a base, select the active ones, and detach them.

Each model has one Attachment, which owns the adapters and the current selection. `add` wraps every module
that the adapter changes, unless the module is already wrapped; `remove` restores every module that no
remaining adapter changes. A change of the selection is a single assignment, regardless of the number of
adapters and modules. The base's tensors are never written to, and `detach` restores every module. This
module does not depend on files, training or particular models.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.core.adapter import Adapter, NamedMix, Pair, TokenRows, all_finite, check_strength
from veneer.core.forms import Delta, part_problems
from veneer.core.layers import FullModule, Layer, LoraConv, LoraEmbedding, LoraExperts, LoraLinear
from veneer.core.merge import merged_state, parameter_shape, to_matrix, weight_of
from veneer.core.mix_cache import MixCache
from veneer.core.selection import MixBatch, Selection, SpanAdapters, span_problem
from veneer.core.targets import base_modules, expert_parameters, has_bare_weight, kind_of
from veneer.errors import AdapterError, bullets, nearest
from veneer.ops.lora_segments import LoraSegments

_LAYERS: dict[str | None, type[Layer]] = {"linear": LoraLinear, "embedding": LoraEmbedding, "conv": LoraConv}
_SPARE_BYTES = 256 << 20
"""Minimum value of the mix cache's byte limit. For large bases, the limit is 1/32 of the base's size."""
_BATCHES = ("input_ids", "inputs_embeds", "hidden_states", "sample", "pixel_values")
"""Argument names in which models receive a batch. Other tensor arguments, such as positions or masks, can
lack a batch dimension."""
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


def attach(model: nn.Module) -> Attachment:
    """Return an Attachment for `model`.

    The model does not change until an adapter is added. Raises AdapterError if the model, or a module
    inside it, is already attached."""
    if any(m in _ATTACHED or isinstance(m, Layer) for m in model.modules()):
        fix = "use the existing attachment, or detach it first"
        raise AdapterError("this model is attached already", where=type(model).__name__, fix=fix)
    attachment = Attachment(model)
    _ATTACHED[model] = weakref.ref(attachment)
    return attachment


def active_mix(model: nn.Module) -> NamedMix:
    """Return the mix active on all rows of an attached model; () for the base."""
    reference = _ATTACHED.get(model)
    attachment = None if reference is None else reference()
    if attachment is None:
        return ()
    names = {id(adapter): name for name, adapter in attachment.adapters.items()}
    return tuple((names[id(adapter)], strength) for adapter, strength in attachment.selection.mix)


class Attachment:
    """The adapters attached to one base, and the current selection.

    adapters: name -> adapter.
    selection: the active adapters; empty at first.
    cache.limit: byte limit of the cache of weights for mixes used without gradients (core.mix_cache); 0
        disables the cache.

    As a context manager, the attachment detaches itself on exit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.selection = Selection()
        self._layers: dict[str, Layer] = {}
        self._base_modules = dict(base_modules(model))
        stored = sum(t.nbytes for t in {id(p): p for p in model.parameters()}.values())
        self._wrapped: dict[str, nn.Module] = {}
        self._watched: list[RemovableHandle] = []
        self.cache = MixCache(self._wrapped, max(_SPARE_BYTES, stored // 32))
        self._open = True

    # -- adapters ----------------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Adapter, trainable: bool = False, *, finite: bool = False) -> None:
        """Add `adapter` to the base as `name`, without selecting it.

        Each tensor moves to the device of its module.

        trainable: copy the tensors as new parameters; otherwise the tensors are used as they are, without
            gradients.
        finite: set if all tensors are known to be finite, to skip a check that synchronizes with the device.

        If the adapter does not fit, raises one AdapterError that lists all problems, such as missing modules
        and wrong shapes; the base and the attachment are then unchanged."""
        if not self._open:
            raise AdapterError("this attachment is detached", fix="call attach(model) again")
        if name in self.adapters:
            raise AdapterError(f"an adapter named {name!r} is attached already", fix="remove it or choose another name")
        problems = _problems(self._base_modules, adapter, finite) or _overlaps([*self.adapters.values(), adapter])
        if trainable:
            problems += _untrainable(self._base_modules, adapter)
        if problems:
            message = f"adapter {name!r} does not fit this base ({len(problems)} problems)"
            raise AdapterError(f"{message}:\n{bullets(problems, None)}")
        placed = _on_module_devices(adapter, self._base_modules, trainable)
        try:
            self._wrap(self._wrapped_for(adapter))
            self.adapters[name] = placed
        finally:
            self._prune()

    def remove(self, name: str) -> None:
        """Remove an adapter, also from the selection.

        Restores the modules that no other adapter changes."""
        adapter = self._adapter(name)
        self.selection = self.selection.without(adapter)
        self.cache.clear(adapter)
        del self.adapters[name]
        self._prune()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return the trainable tensors of an adapter by stable names.

        The names are `module.A`, `module.B` and `module.magnitude`; `module.weight~a1` and so on for a LoHa
        or LoKr; `module=parameter` for full copies; `embedding#rows` for token rows. Raises AdapterError if
        the adapter was not added with trainable=True."""
        out = {key: t for key, t in self._adapter(name).tensors() if isinstance(t, nn.Parameter)}
        if not out:
            raise AdapterError(f"adapter {name!r} is not trainable", fix="add it with trainable=True")
        return out

    def adapter(self, name: str) -> Adapter:
        """Return a detached, contiguous copy of an adapter with collapsed origins."""
        return self._adapter(name).collapsed().mapped(lambda t: t.detach().clone(memory_format=torch.contiguous_format))

    # -- selection ---------------------------------------------------------------------------------------------------

    def use(self, *mix: str | tuple[str, float]) -> None:
        """Select one mix for all rows; without arguments, select the base.

        mix: adapter names, or (name, strength) tuples.

        The cost does not depend on the number of adapters or modules. With activation checkpointing, do not
        change the selection between a forward pass and its backward pass: the recomputation would use the new
        selection. Raises AdapterError for an unknown name, or for full copies that cannot be mixed as
        requested. Raises ConfigError for an invalid strength (`check_strength`)."""
        self.selection = self._selection(mix)

    def use_rows(self, mixes: Sequence[Sequence[str | tuple[str, float]]]) -> None:
        """Select one mix for each row of a batch; () selects the base.

        The rows are the first dimension of the model's input, and row i gets mixes[i]. With n mixes, a batch
        of k·n rows repeats the list k times, as classifier-free guidance does: [negative…, positive…]. A
        module that is called directly must get n rows. Calling a module that an adapter changes raises
        AdapterError if the module's input has a different number of rows, or if the adapter changes fused
        experts. For everything else, see `use`. The reference implementation is `use` on each row
        separately."""
        if not mixes:
            raise AdapterError("no rows", fix="give one mix for each row of the batch; () selects the base")
        if not self._watched:
            modules = _batch_modules(self.model)
            self._watched = [m.register_forward_pre_hook(self._record_rows, with_kwargs=True) for m in modules]
        self.selection = Selection(rows=MixBatch(tuple(self._selection(tuple(mix)).mix for mix in mixes)))

    def use_spans(self, names: Sequence[str], spans: LoraSegments) -> None:
        """Select one adapter, at strength 1, for each segment of tokens.

        Segments index the tokens that linear layers receive, regardless of the rows of the batch. As with
        `use`, do not change the selection between a forward pass and its backward pass. Raises AdapterError
        for an unknown name, and for an adapter that has anything other than plain pairs on linear layers
        (`span_problem`). The reference implementation is `use` on the tokens of each segment separately."""
        adapters = tuple(self._adapter(name) for name in names)
        for name, adapter in zip(names, adapters, strict=True):
            why = span_problem(adapter)
            if not why and (nonlinear := [n for n in adapter.pairs if not isinstance(self._layers[n], LoraLinear)]):
                why = f"{nonlinear[0]} is not a linear layer"
            if why:
                problem = f"{name!r} cannot act on a part of the tokens: {why}"
                raise AdapterError(problem, fix="use it without other adapters")
        self.selection = Selection(spans=SpanAdapters(adapters, spans))

    @contextmanager
    def using(self, *mix: str | tuple[str, float]) -> Iterator[None]:
        """Select `mix` within a `with` block, then restore the previous selection."""
        previous, self.selection = self.selection, self._selection(mix)
        try:
            yield
        finally:
            self.selection = previous

    def off(self) -> AbstractContextManager[None]:
        """Select the base, without adapters, within a `with` block."""
        return self.using()

    def merged(self, *mix: str | tuple[str, float]) -> dict[str, Tensor]:
        """Return new weights with `mix` merged in; the base's weights are unchanged.

        See `merge.merged_state`."""
        return merged_state(self.model, self._selection(mix).mix)

    # -- detaching ---------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Restore every module and remove all adapters.

        Can be called at any time, and more than once."""
        self.selection = Selection()
        self.cache.clear()
        self.adapters.clear()
        self._prune()
        while self._watched:
            self._watched.pop().remove()
        _ATTACHED.pop(self.model, None)
        self._open = False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    # -- internals ---------------------------------------------------------------------------------------------------

    def _record_rows(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Record the batch size in the selection.

        Registered as a forward pre-hook of the model."""
        if self.selection.rows is not None:
            named = [kwargs[key] for key in _BATCHES if isinstance(kwargs.get(key), Tensor)]
            tensors = (t for t in (*args, *named, *kwargs.values()) if isinstance(t, Tensor) and t.ndim)
            self.selection.rows.batch = next((len(t) for t in tensors), None)

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            have = ", ".join(sorted(self.adapters)) or "none"
            raise AdapterError(f"no adapter named {name!r} is attached", fix=f"attached: {have}")
        return self.adapters[name]

    def _selection(self, mix: tuple[str | tuple[str, float], ...]) -> Selection:
        named = [(m, 1.0) if isinstance(m, str) else (m[0], check_strength(repr(m[0]), m[1])) for m in mix]
        selected = [(name, self._adapter(name), s) for name, s in named if s != 0.0]
        for name, adapter, strength in selected:
            if not adapter.modules:
                continue
            if strength != 1.0:
                examples = ", ".join(sorted(adapter.modules)[:3])
                problem = f"{name!r} replaces entire modules ({examples}), which cannot be scaled by a strength"
                raise AdapterError(problem, fix="use it at strength 1.0")
            for rival_name, rival, _ in selected:
                if rival is not adapter and (both := sorted(set(adapter.modules) & self._wrapped_for(rival))):
                    problem = (
                        f"{name!r} replaces the weights of {', '.join(both[:3])}, which {rival_name!r} also changes"
                    )
                    raise AdapterError(problem, fix="use one of the two")
        return Selection(tuple((adapter, s) for _, adapter, s in selected))

    def _wrapped_for(self, adapter: Adapter) -> set[str]:
        """Return the names of the modules that must be wrapped for `adapter`.

        These include heads that are tied to an embedding with token rows."""
        shared = {id(self._base_modules[n].weight) for n in adapter.token_rows}
        heads = {n for n, m in self._base_modules.items() if id(m._parameters.get("weight")) in shared}
        return _changed_modules(adapter) | heads

    def _wrap(self, names: set[str]) -> None:
        embeddings: dict[int, list[str]] = {}
        for name, module in self._base_modules.items():
            if isinstance(module, nn.Embedding):
                embeddings.setdefault(id(module.weight), []).append(name)
        slots = _slots(self.model)
        for name in sorted(names - set(self._layers)):
            base = self._base_modules[name]
            cls = LoraExperts if expert_parameters(base) else _LAYERS.get(kind_of(base), FullModule)
            sharing = embeddings.get(id(base._parameters.get("weight")), [])
            own_first = [n for n in sharing if n == name] + [n for n in sharing if n != name]
            self._layers[name] = layer = cls(base, name, self, own_first)
            self._wrapped[name] = base
            for parent, key in slots[id(base)]:
                parent._modules[key] = layer

    def _prune(self) -> None:
        """Restore every wrapped module that no adapter changes."""
        needed: set[str] = set().union(*(self._wrapped_for(a) for a in self.adapters.values()))
        if not (unneeded := set(self._layers) - needed):
            return
        slots = _slots(self.model)
        for name in unneeded:
            layer = self._layers.pop(name)
            del self._wrapped[name]
            for parent, key in slots.get(id(layer), []):
                parent._modules[key] = layer.base


def _batch_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that receive a batch.

    These are the model itself, or its parts if the model has no forward method."""
    if type(model).forward is not nn.Module.forward:
        return [model] if model._modules else []
    return [entrance for part in model.children() for entrance in _batch_modules(part)]


def _slots(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Map the id of each module to every (parent, key) that holds the module.

    A wrapper's reference to the module that it wraps is not included."""
    out: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None and not isinstance(parent, Layer):
                out.setdefault(id(child), []).append((parent, key))
    return out


def _changed_modules(adapter: Adapter) -> set[str]:
    owners = {p.module(n) for n, p in adapter.pairs.items()} | {n.rpartition(".")[0] for n in adapter.deltas}
    return owners | set(adapter.modules) | set(adapter.token_rows)


def _overlaps(adapters: list[Adapter]) -> list[str]:
    """Return an error for each conflict between changes of the adapters.

    Two changes conflict if one replaces a module in full and the other changes a module inside it, because
    nested wrappers are ambiguous. Changes of one adapter also conflict if they both replace and change the
    same module, or if they are a pair and token rows for the same module."""
    replaced = {n for a in adapters for n in a.modules}
    names = {n for a in adapters for n in _changed_modules(a)}
    inside = [(n, w) for n in sorted(names) for w in replaced if n.startswith(w + ".")]
    out = [f"{n} lies inside {w}, which is replaced entirely" for n, w in inside]
    for a in adapters:
        twice = set(a.modules) & _changed_modules(replace(a, modules={}))
        twice |= set(a.pairs) & set(a.token_rows)
        out += [f"{n} is changed in two ways by one adapter" for n in sorted(twice)]
    return out


def fit_problems(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return all reasons why `adapter` does not fit `model`, as one line each.

    `model` can already be attached, and is not changed."""
    return _problems(dict(base_modules(model)), adapter)


def _problems(modules: Mapping[str, nn.Module], adapter: Adapter, finite: bool = False) -> list[str]:
    """Return all reasons why `adapter` does not fit these modules, as one line each.

    finite: set if all tensors of the adapter are known to be finite."""
    out: list[str] = []
    for name, pair in adapter.pairs.items():
        out += _pair_problems(modules, name, pair)
    for name, tensors in adapter.modules.items():
        out += _full_problems(modules, name, tensors)
    for name, rows in adapter.token_rows.items():
        out += _rows_problems(modules, name, rows)
    for name, delta in adapter.deltas.items():
        out += _delta_problems(modules, name, delta)
    if not finite:
        out += [f"{n}: not finite" for n, t in adapter.tensors() if not t.is_meta and not all_finite(t)]
    return out


def _missing(modules: Mapping[str, nn.Module], name: str) -> str:
    similar = nearest(name, modules)
    return f"{name}: no such module in the base" + (f"; nearest: {similar[0]}" if similar else "")


def _pair_problems(modules: Mapping[str, nn.Module], name: str, pair: Pair) -> list[str]:
    owner, parameter = pair.module(name), name.rpartition(".")[2] if pair.kind == "experts" else None
    if owner not in modules or not owner:
        return [_missing(modules, owner or name)]
    module = modules[owner]
    if parameter is not None and parameter not in expert_parameters(module):
        return [f"{name}: {type(module).__name__} has no 3-d expert parameter {parameter!r}"]
    is_bare = pair.kind == "linear" and has_bare_weight(module)
    if parameter is None and kind_of(module) != pair.kind and not is_bare:
        return [f"{name}: a pair of kind {pair.kind} does not fit a {type(module).__name__}"]
    if pair.kind == "experts" and pair.magnitude is not None:
        return [f"{name}: DoRA is not defined for fused experts"]
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return [f"{name}: an embedding with max_norm rewrites its own weight when called"]
    return _shape_problems(module, name, pair, parameter)


def _shape_problems(module: nn.Module, name: str, pair: Pair, parameter: str | None) -> list[str]:
    weight = weight_of(module, parameter)
    matrix = to_matrix(module, pair.kind, weight)
    out_features, rank = matrix.shape[-2], pair.rank
    A: tuple[int, ...]
    B: tuple[int, ...]
    if pair.kind == "experts":
        A, B = (len(matrix), rank, matrix.shape[-1]), (len(matrix), out_features, rank)
    elif pair.kind == "conv":
        ones = (1,) * (weight.ndim - 2)
        A, B = (rank, *weight.shape[1:]), (out_features, rank, *ones)
    else:
        A, B = (rank, matrix.shape[-1]), (out_features, rank)
    tensors = [("A", pair.A, A), ("B", pair.B, B)]
    if pair.magnitude is not None and (pair.kind == "embedding" or pair.magnitude.ndim == 1):
        tensors.append(("magnitude", pair.magnitude, (out_features,)))
    elif pair.magnitude is not None:
        wide = tuple(weight.shape if pair.kind == "conv" else matrix.shape)
        if problems := _magnitude_problems(name, pair.magnitude, wide):
            return problems
    if pair.origin is not None:
        tensors += [("origin A", pair.origin[0], A), ("origin B", pair.origin[1], B)]
    return [f"{name}: {w} is {tuple(t.shape)}, the base needs {s}" for w, t, s in tensors if tuple(t.shape) != s]


def _full_problems(modules: Mapping[str, nn.Module], name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    if name not in modules or not name:
        return [_missing(modules, name)]
    state = modules[name].state_dict()
    out = [f"{name}.{k}: no such tensor in {type(modules[name]).__name__}" for k in tensors if k not in state]
    out += [f"{name}.{k}: missing from the full copy" for k in state if k not in tensors]
    shapes = [(k, tuple(tensors[k].shape), tuple(state[k].shape)) for k in tensors if k in state]
    return out + [f"{name}.{k} is {a}, the base needs {b}" for k, a, b in shapes if a != b]


def _delta_problems(modules: Mapping[str, nn.Module], name: str, delta: Delta) -> list[str]:
    owner, _, key = name.rpartition(".")
    if owner not in modules or not owner:
        return [_missing(modules, owner or name)]
    module = modules[owner]
    if expert_parameters(module):
        return [f"{name}: a {delta.form} delta cannot change fused experts"]
    if key not in module._parameters:
        return [f"{name}: {type(module).__name__} has no {key!r}"]
    if delta.form == "replacement" and module._parameters[key] is None:
        return [f"{name}: a new value for a parameter that this {type(module).__name__} does not have"]
    shape = parameter_shape(module, key)
    if problems := part_problems(delta):
        return [f"{name}: {p}" for p in problems]
    if delta.form == "gain":
        value = delta.parts["value"]
        by_output = value.ndim == 1 and len(value) == shape[0]
        by_input = value.ndim > 1 and len(value) == 1 and len(shape) > 1 and value.numel() == shape[1]
        return [] if by_output or by_input else [f"{name}: a gain of {tuple(value.shape)} does not fit {shape}"]
    out = [] if tuple(delta.shape) == shape else [f"{name} is {tuple(delta.shape)}, the base needs {shape}"]
    return out + _magnitude_problems(name, delta.magnitude, shape)


def _untrainable(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    """Return an error for each delta that cannot be trained.

    A delta can be trained only if it is a LoHa or LoKr of a whole parameter, without DoRA."""
    out = []
    for name, delta in adapter.deltas.items():
        owner, _, key = name.rpartition(".")
        plain = delta.form in ("hadamard", "kronecker") and delta.magnitude is None and delta.rows is None
        if not plain or key != "weight" or kind_of(modules.get(owner, nn.Module())) not in ("linear", "conv"):
            out.append(f"{name}: only a LoHa or LoKr of an entire linear or convolution, without DoRA, can be trained")
    return out


def _magnitude_problems(name: str, magnitude: Tensor | None, shape: tuple[int, ...]) -> list[str]:
    """Return the errors in the shape of DoRA's m for a weight of shape (out, in, k…).

    The valid shapes are (out,), one norm per output, and (1, in, 1…), one norm per input."""
    if magnitude is None or magnitude.shape == shape[:1]:
        return []
    by_input = (1, *shape[1:2], *[1] * (len(shape) - 2))
    if len(shape) > 1 and tuple(magnitude.shape) == by_input:
        return []
    return [f"{name}: the magnitude is {tuple(magnitude.shape)}, the base needs {shape[:1]} or {by_input}"]


def _rows_problems(modules: Mapping[str, nn.Module], name: str, rows: TokenRows) -> list[str]:
    module = modules.get(name)
    if module is None:
        return [_missing(modules, name)]
    if not isinstance(module, nn.Embedding):
        return [f"{name}: token rows do not fit a {type(module).__name__}, which is not an embedding"]
    count = module.num_embeddings
    out = [f"{name}: token id {i} is outside the embedding's {count} rows" for i in rows.indices if not 0 <= i < count]
    if len(set(rows.indices)) != len(rows.indices):
        out.append(f"{name}: a token id is listed twice")
    if tuple(rows.rows.shape) != (len(rows.indices), module.embedding_dim):
        need = (len(rows.indices), module.embedding_dim)
        out.append(f"{name}: the token rows are {tuple(rows.rows.shape)}, the base needs {need}")
    return out


def _on_module_devices(adapter: Adapter, modules: Mapping[str, nn.Module], trainable: bool) -> Adapter:
    """Return a copy of the adapter with each tensor on the device of its module.

    If a module has no values yet (meta device), its tensors stay on their device.

    trainable: copy the tensors as new parameters."""

    def device(name: str) -> torch.device | None:
        tensors = [*modules[name].parameters(), *modules[name].buffers()]
        return next((t.device for t in tensors if not t.is_meta), None)

    tensors = adapter.mapped_by_module(lambda name, t: t.detach().to(device(name)))
    if not trainable:
        return tensors
    frozen = {name: pair.origin for name, pair in tensors.pairs.items()}
    out = tensors.mapped(lambda t: nn.Parameter(t.clone()) if t.is_floating_point() else t)
    for name, pair in out.pairs.items():
        pair.origin = frozen[name]
    return out
