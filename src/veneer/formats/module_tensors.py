"""Convert the tensors of one module to pairs and deltas, and back.

| suffixes (any of)                                                  | reading                                  |
| lora_down/_up, lora_A/_B, lora.down/.up, lora_linear_layer.…,      | pair, s = alpha/rank; no alpha: s = 1    |
| down/up (`.default` too)                                           |                                          |
| … with lora_mid (Tucker)                                           | A'[p,i,k…] = Σ_q mid[p,q,k…]·down[q,i]   |
| lora_B.bias                                                        | delta of the bias, with the pair's s     |
| bias_indices, bias_values, bias_size (sparse, LyCORIS)             | dense delta next to the pair, with its s |
| hada_w1_a …_w2_b, hada_t1, hada_t2                                 | LoHa, s = alpha/(rows of w1_b)           |
| lokr_w1 or _a·_b, lokr_w2 or _a·_b (lokr_t2)                       | LoKr, s = alpha/rank; 1 if both are full |
| weight, on_input                                                   | (IA)³ gain                               |
| diff, diff_b · w_norm, b_norm                                      | dense deltas of weight and bias          |
| set_weight · scale, or only weight (a vector)                      | full replacement weight                  |
| dora_scale (out, 1…) or (1, in, 1…) · lora_magnitude_vector (out)  | magnitude of the pair, LoHa or LoKr      |

Sources: files of sd-scripts, LyCORIS, PEFT, diffusers and ComfyUI. A LoHa or LoKr of a convolution can be
stored flat: its shape is (out, in·k·k) until `fitted` reshapes it to the weight. If both factors of a LoKr
are full, LyCORIS ignores alpha. PEFT uses alpha even then, but stores it in a configuration that this module
does not read. This module works on one module's tensors, and does not depend on module names or files.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from veneer.core.adapter import Adapter, Pair, PairKind, alpha_of, scale_of
from veneer.core.forms import Delta, part_problems
from veneer.errors import AdapterError, bullets
from veneer.formats.keys import REFUSED, ROLES

if TYPE_CHECKING:
    from torch import Tensor

MAX_RANK = 1 << 16

_ROLE = [(role, re.compile(pattern)) for role, pattern in ROLES.items()]
_REFUSE = [(re.compile(pattern), why) for pattern, why in REFUSED.items()]


@dataclass
class ModuleChanges:
    """The changes of one module in a file.

    `deltas`: "weight" or "bias" -> Delta. `full`: parameter -> its new value."""

    pair: Pair | None = None
    deltas: dict[str, Delta] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)


def changes_by_module(adapter: Adapter) -> dict[str, ModuleChanges]:
    """Return {canonical module: all changes of the module}, sorted by name.

    Token rows belong to no module and are left out."""
    out: dict[str, ModuleChanges] = defaultdict(ModuleChanges)
    for name, pair in adapter.pairs.items():
        out[name].pair = pair
    for name, delta in adapter.deltas.items():
        module, _, parameter = name.rpartition(".")
        out[module].deltas[parameter] = delta
    for name, tensors in adapter.modules.items():
        out[name].full = dict(tensors)
    return dict(sorted(out.items()))


def widened(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Convert tensors of 8-bit floats to bfloat16; return all tensors and a note.

    bfloat16 represents every value of both 8-bit formats exactly and supports arithmetic. Other tensors do
    not change."""
    narrow = {key for key, t in tensors.items() if t.is_floating_point() and t.dtype.itemsize == 1}
    out = {key: t.bfloat16() if key in narrow else t for key, t in tensors.items()}
    message = f"{len(narrow)} tensors are stored in 8 bits: they are read as bfloat16, which holds the same values"
    return out, [message] if narrow else []


def read_module(
    suffixes: Mapping[str, Tensor], *, alpha: float | None = None, rslora: bool = False, where: str = ""
) -> ModuleChanges:
    """Return a module's changes from its tensors, named by `split_key`'s suffixes.

    Tensors are not copied, except for a Tucker pair.

    alpha: an alpha from a configuration or a correction, which overrides the alpha in the file. If both are
        missing, alpha is the rank.

    Raises one AdapterError naming every tensor that is unknown, unpaired, misshapen or of an unsupported
    algorithm (OFT, BOFT, GLoRA, T-LoRA)."""
    reader = _Reader({}, rslora)
    for suffix, tensor in suffixes.items():
        role = next((role for role, pattern in _ROLE if pattern.fullmatch(suffix)), None)
        if role is None and suffix == "weight" and "on_input" in suffixes:
            role = "gain"
        if role is None and tensor.ndim == 1 and (suffix == "scale" or len(suffixes) == 1):
            role = "set_weight" if suffix in ("scale", "weight") else None
        refused = next((why for pattern, why in _REFUSE if pattern.fullmatch(suffix)), None)
        if role is None:
            reader.problems.append(
                f"{suffix} {tuple(tensor.shape)}: {refused or 'not a tensor of any known adapter type'}"
            )
        elif role in reader.have:
            reader.problems.append(f"{suffix} {tuple(tensor.shape)}: a second tensor with the same role")
        elif not tensor.is_floating_point() and role not in _WHOLE_NUMBERS:
            reader.problems.append(f"{suffix} {tuple(tensor.shape)}: {tensor.dtype} is not a floating-point type")
        else:
            reader.have[role] = tensor
            reader.suffix[role] = suffix
    return reader.changes(alpha, where)


_MAX_ELEMENTS = 1 << 29  # maximum number of elements of a weight created here: 4 times the largest known weight
_WHOLE_NUMBERS = {"alpha", "on_input", "bias_indices", "bias_size", "reshape_weight"}


@dataclass
class _Reader:
    """Reader that removes the tensors it uses from `have`; any tensor left there is an error."""

    have: dict[str, Tensor]
    rslora: bool
    alpha: float | None = None
    suffix: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def changes(self, alpha: float | None, where: str) -> ModuleChanges:
        self.alpha, changes = self._alpha(alpha), ModuleChanges()
        magnitude = self._take_magnitude()
        if magnitude is not None and "bias of B" in self.have:
            self.problems.append("lora_B.bias with a magnitude: PEFT does not define both")
        for form in (self._pair, self._hadamard, self._kronecker, self._gain, self._dense):
            form(changes)
        if magnitude is not None:
            self._decompose(changes, magnitude)
        if not (changes.pair or changes.deltas or changes.full or self.have or self.problems):
            self.problems.append(
                f"{', '.join(sorted(self.suffix)) or 'nothing'}: without the tensors that belong to it"
            )
        suffixes = ", ".join(sorted(self.suffix.values()))
        for role, tensor in self.have.items():
            self.problems.append(f"{self.suffix[role]} {tuple(tensor.shape)}: without its partner among {suffixes}")
        for name, delta in changes.deltas.items():
            self.problems += [f"{name}: {p}" for p in part_problems(delta)]
        if self.problems:
            raise AdapterError(f"tensors that cannot be read:\n{bullets(self.problems, None)}", where=where or None)
        return changes

    def _change(self, changes: ModuleChanges, name: str, delta: Delta) -> None:
        if name in changes.deltas:
            self.problems.append(f"two changes of the same {name}: {changes.deltas[name].form} and {delta.form}")
        changes.deltas[name] = delta

    def _pop_all(self, *roles: str) -> list[Tensor] | None:
        """Remove and return the tensors of these roles; return None if any is missing.

        If any is missing, no tensor is removed."""
        if any(role not in self.have for role in roles):
            return None
        return [self.have.pop(role) for role in roles]

    def _alpha(self, alpha: float | None) -> float | None:
        stored = self.have.pop("alpha", None)
        if alpha is None and stored is not None:
            if stored.numel() != 1:
                self.problems.append(f"alpha {tuple(stored.shape)}: one number is expected")
                return None
            alpha = float(stored)
        if alpha is not None and (not math.isfinite(alpha) or alpha == 0):
            reason = "sd-scripts and LyCORIS read 0 as the rank, others as no effect" if alpha == 0 else "not finite"
            self.problems.append(f"alpha = {alpha:g}: {reason}")
            return None
        return alpha

    def _scale(self, rank: int) -> float:
        if not 0 < rank <= MAX_RANK:
            self.problems.append(f"rank {rank:,}: only ranks from 1 to {MAX_RANK:,} are supported")
            return 1.0
        scale = scale_of(rank if self.alpha is None else self.alpha, rank, self.rslora)
        return scale * self._scalar()

    def _scalar(self) -> float:
        """Remove and return LyCORIS' trained scalar, a factor of ΔW; return 1.0 if missing.

        Current versions of LyCORIS fold the factor into the weights; some older versions store it."""
        scalar = self.have.pop("scalar", None)
        if scalar is not None and scalar.numel() != 1:
            self.problems.append(f"scalar {tuple(scalar.shape)}: one number is expected")
            return 1.0
        return 1.0 if scalar is None else float(scalar)

    def _pair(self, changes: ModuleChanges) -> None:
        if rows := self._pop_all("rows A", "rows B"):
            A, B = rows
            changes.pair = Pair(A, B, self._scale(A.shape[0] if A.ndim else 0), "embedding")
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                self._misfit(A, B)
            return
        if not (factors := self._pop_all("A", "B")):
            return
        A, B = factors
        if (mid := self.have.pop("mid", None)) is not None:
            A, B = self._without_core(A, mid, B)
        if min(A.ndim, B.ndim) < 2:
            self._misfit(A, B)
            return
        if (A.ndim > 2 and B.ndim == 2) or (B.ndim > 2 and A.ndim == 2):
            n = max(A.ndim, B.ndim)  # trailing 1×1 dimensions of one tensor were squeezed
            A, B = (t.reshape(*t.shape, *[1] * (n - t.ndim)) for t in (A, B))
        if A.ndim != B.ndim or A.shape[0] != B.shape[1] or math.prod(B.shape[2:]) != 1:
            self._misfit(A, B)
        changes.pair = Pair(A, B, self._scale(A.shape[0]), "linear" if A.ndim == 2 else "conv")
        if (bias := self.have.pop("bias of B", None)) is not None:
            self._change(changes, "bias", Delta("dense", {"value": bias}, (B.shape[0],), changes.pair.scale))
        if sparse := self._pop_all("bias_indices", "bias_values", "bias_size"):
            self._sparse(changes, *sparse)
        if (shape := self.have.pop("reshape_weight", None)) is not None:
            stated, have = shape.reshape(-1)[:16].tolist(), [B.shape[0], *A.shape[1:]]
            if stated != have:
                self.problems.append(f"reshape_weight {stated}: the pair is for {have}")

    def _misfit(self, A: Tensor, B: Tensor) -> None:
        self.problems.append(f"A {tuple(A.shape)} and B {tuple(B.shape)} are not (rank, in…) and (out, rank)")

    def _without_core(self, A: Tensor, mid: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B of an equal convolution pair, with the core merged into A.

        A' = Σ_q mid[p,q,k…]·A[q,i], computed in float64, stored as float32."""
        rank = A.shape[0] if A.ndim else 0
        if mid.ndim < 3 or mid.shape[:2] != (rank, rank) or A.ndim < 2 or math.prod(A.shape[2:]) != 1:
            self.problems.append(f"lora_mid {tuple(mid.shape)} on A {tuple(A.shape)}: (rank, rank, k…) is expected")
            return A, B
        if math.prod(mid.shape[2:]) * A.numel() > _MAX_ELEMENTS:
            self.problems.append(f"lora_mid {tuple(mid.shape)} on A {tuple(A.shape)}: the product is too large")
            return A, B
        import torch

        wide = torch.float64 if torch.float64 in (A.dtype, mid.dtype) else torch.float32
        return torch.einsum("pq...,qi->pi...", mid.double(), A.double().flatten(1)).to(wide), B.to(wide)

    def _sparse(self, changes: ModuleChanges, indices: Tensor, values: Tensor, size: Tensor) -> None:
        """Add s·(sparse matrix) to ΔW.

        LyCORIS stores indices and sizes as int16, so values of 32,768 and more wrap around."""
        assert changes.pair is not None
        A, B = changes.pair.A, changes.pair.B
        shape = (B.shape[0], *A.shape[1:])
        flat = (shape[0], math.prod(shape[1:]))
        if math.prod(flat) > _MAX_ELEMENTS:
            self.problems.append(f"bias_size {tuple(size.shape)} of a weight {flat}: too large")
            return
        wrap = (lambda t: t.long() & 0xFFFF) if str(indices.dtype) == "torch.int16" else (lambda t: t.long())
        at, values = wrap(indices), values.reshape(-1)
        fits = at.ndim == 2 and at.shape == (2, len(values)) and wrap(size).tolist() == list(flat)
        if not fits or (len(values) and bool((at.amin() < 0) | (at[0].amax() >= flat[0]) | (at[1].amax() >= flat[1]))):
            stated = size.reshape(-1)[:4].tolist()
            self.problems.append(f"bias_indices {tuple(indices.shape)}, bias_size {stated}: do not fit {flat}")
            return
        value = values.new_zeros(flat).index_put((at[0], at[1]), values, accumulate=True)
        self._change(changes, "weight", Delta("dense", {"value": value.reshape(shape)}, shape, changes.pair.scale))

    def _hadamard(self, changes: ModuleChanges) -> None:
        if not (parts := self._pop_all("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")):
            return
        a1, b1, a2, b2 = parts
        cores = self._pop_all("hada_t1", "hada_t2")
        if any(t.ndim != 2 for t in parts) or any(t.ndim < 3 for t in cores or ()):
            self.problems.append(f"LoHa of {', '.join(str(tuple(t.shape)) for t in parts)}: matrices are expected")
            return
        named = {"a1": a1, "b1": b1, "a2": a2, "b2": b2}
        shape: tuple[int, ...] = (a1.shape[0], b1.shape[1])
        if cores:
            named |= {"a1": a1.t(), "a2": a2.t(), "t1": cores[0], "t2": cores[1]}  # with a core, a is (rank, out)
            shape = (a1.shape[1], b1.shape[1], *cores[0].shape[2:])
        self._change(changes, "weight", Delta("hadamard", named, shape, self._scale(b1.shape[0])))

    def _kronecker(self, changes: ModuleChanges) -> None:
        if not any(role.startswith("lokr_") for role in self.have):
            return
        named: dict[str, Tensor] = {}
        ranks: list[int] = []
        for n in "12":
            if full_matrix := self._pop_all(f"lokr_w{n}"):
                named[f"w{n}"] = full_matrix[0]
            elif product := self._pop_all(f"lokr_w{n}_a", f"lokr_w{n}_b"):
                core = self.have.pop("lokr_t2", None) if n == "2" else None
                a, b = product
                if core is not None:
                    a, named["t2"] = a.t() if a.ndim == 2 else a, core  # with a core, a is (rank, out)
                named |= {f"a{n}": a, f"b{n}": b}
                ranks.append(b.shape[0] if b.ndim else 0)
        if len({name[1] for name in named}) < 2:
            self.problems.append(
                "a LoKr with one factor only: expected lokr_w1 and lokr_w2, each in full or as _a and _b"
            )
            return
        if ("t2" in named and named["t2"].ndim < 3) or any(named[p].ndim != 2 for p in named if p[0] in "ab"):
            self.problems.append(
                f"LoKr of {', '.join(str(tuple(t.shape)) for t in named.values())}: matrices are expected"
            )
            return
        if self.alpha is not None and len(set(ranks)) > 1:
            self.problems.append(f"LoKr factors of ranks {ranks[0]} and {ranks[1]}: alpha applies to one rank only")
        first, second = named.get("w1"), named.get("w2")
        s1 = tuple(first.shape) if first is not None else (named["a1"].shape[0], named["b1"].shape[1])
        s2 = tuple(second.shape) if second is not None else (named["a2"].shape[0], named["b2"].shape[1])
        s2 += tuple(named["t2"].shape[2:]) if "t2" in named else ()
        if len(s1) != 2 or len(s2) < 2:
            self.problems.append(f"LoKr factors {s1} and {s2}: a matrix and a matrix or kernel are expected")
            return
        shape = (s1[0] * s2[0], s1[1] * s2[1], *s2[2:])
        self._change(
            changes, "weight", Delta("kronecker", named, shape, self._scale(ranks[-1]) if ranks else self._scalar())
        )

    def _gain(self, changes: ModuleChanges) -> None:
        if not (parts := self._pop_all("gain", "on_input")):
            return
        value = parts[0].reshape(-1)
        if len(value) != max(parts[0].shape, default=1):
            self.problems.append(f"weight {tuple(parts[0].shape)}: one factor for each output or input is expected")
        self._change(changes, "weight", Delta("gain", {"value": value[None] if bool(parts[1].any()) else value}))

    def _dense(self, changes: ModuleChanges) -> None:
        for role, name in (("diff", "weight"), ("w_norm", "weight"), ("diff_b", "bias"), ("b_norm", "bias")):
            if (value := self.have.pop(role, None)) is None:
                continue
            self._change(changes, name, Delta("dense", {"value": value}, tuple(value.shape), self._scalar()))
        if (value := self.have.pop("set_weight", None)) is not None:
            changes.full["weight"] = value
            if changes.pair is not None or "weight" in changes.deltas:
                self.problems.append(f"a full replacement weight {tuple(value.shape)}, and a change of the original")

    def _take_magnitude(self) -> Tensor | None:
        stored = [self.have.pop(role, None) for role in ("dora_scale", "magnitude of outputs")]
        scale, vector = stored
        if scale is not None and vector is not None:
            self.problems.append("both dora_scale and lora_magnitude_vector")
        return scale if scale is not None else None if vector is None else vector.reshape(-1)

    def _decompose(self, changes: ModuleChanges, stored: Tensor) -> None:
        """Assign the magnitude to the pair, LoHa or LoKr.

        The shape of `stored` determines the axis: (out, 1…) or (1, in, 1…)."""
        delta = changes.deltas.get("weight")
        if changes.pair is not None and (delta is not None or changes.pair.kind == "embedding"):
            self.problems.append(f"dora_scale {tuple(stored.shape)}: undefined in combination with a second change")
        elif changes.pair is not None:
            shape = (changes.pair.B.shape[0], *changes.pair.A.shape[1:])
            changes.pair.magnitude = self._along(stored, shape)
        elif delta is not None and delta.form in ("hadamard", "kronecker"):
            if delta.shape[1] != math.prod(stored.shape[1:2]) and stored.ndim == 4 and stored.shape[0] == 1:
                delta.shape = _unflattened(delta.shape, stored.shape[1])
            delta.magnitude = self._along(stored, delta.shape)
        else:
            self.problems.append(f"dora_scale {tuple(stored.shape)}: there is no change that dora_scale applies to")

    def _along(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if stored.ndim and stored.numel() == stored.shape[0] == shape[0]:
            return stored.reshape(-1)
        if stored.ndim >= 2 and stored.numel() == stored.shape[1] == shape[1]:
            return stored.reshape(1, -1, *[1] * (len(shape) - 2))
        self.problems.append(f"dora_scale {tuple(stored.shape)}: neither (out, 1…) nor (1, in, 1…) of {shape}")
        return None


def _unflattened(flat: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Return (out, in·k·k) as (out, in, k, k) for a square kernel, otherwise unchanged."""
    side = math.isqrt(flat[1] // width) if width and len(flat) == 2 else 0
    return (flat[0], width, side, side) if side and side * side * width == flat[1] else flat


def fitted(changes: ModuleChanges, shape: tuple[int, ...], *, where: str = "") -> ModuleChanges:
    """Reshape the changes to the shape of the weight, without changing values.

    Converts a 1×1 convolution's pair to a linear pair and vice versa, and reshapes a LoHa or LoKr that was
    stored flat. Raises AdapterError if the sizes do not fit."""
    pair, deltas = changes.pair, dict(changes.deltas)
    if pair is not None and pair.kind != "embedding":
        have = (pair.B.shape[0], *pair.A.shape[1:])
        kind: PairKind = "linear" if len(shape) == 2 else "conv"
        flat = len(have) == 2 and have == (shape[0], math.prod(shape[1:]))
        if not flat and _squeezed(have) != _squeezed(shape):
            raise AdapterError(f"the pair is for a weight {have}, the base's is {shape}", where=where or None)
        ones = [1] * (len(shape) - 2)
        A, B = pair.A.reshape(-1, *shape[1:]), pair.B.reshape(-1, pair.rank, *ones)
        m = pair.magnitude
        m = m if m is None or m.ndim == 1 else m.reshape(1, -1, *ones)
        pair = replace(pair, A=A, B=B, kind=kind, magnitude=m)
    delta = deltas.get("weight")
    if delta is not None and delta.form != "gain":
        m = delta.magnitude
        if (
            math.prod(delta.shape) != math.prod(shape)
            or delta.shape[0] != shape[0]
            or delta.rows
            or (m is not None and m.ndim > 1 and m.numel() != shape[1])
        ):
            raise AdapterError(f"the change is for a weight {delta.shape}, the base's is {shape}", where=where or None)
        m = m if m is None or m.ndim == 1 else m.reshape(1, -1, *[1] * (len(shape) - 2))
        parts = {"value": delta.parts["value"].reshape(shape)} if delta.form == "dense" else delta.parts
        deltas["weight"] = replace(delta, shape=tuple(shape), magnitude=m, parts=parts)
    return ModuleChanges(pair, deltas, dict(changes.full))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the first two dimensions if all others are 1, otherwise the whole shape."""
    return tuple(shape[:2]) if math.prod(shape[2:]) == 1 else tuple(shape)


def write_module(changes: ModuleChanges) -> dict[str, Tensor]:
    """Return a module's tensors by suffix, under kohya's and LyCORIS' names.

    `read_module` reads the tensors back with the same effect. Scales are exact: alpha is stored as float32 if
    float32 represents it exactly, else as float64. For changes without alpha (a dense delta, a LoKr with two
    full factors), the scale is multiplied into the tensors in float32.

    Raises AdapterError listing the changes that have no tensor names."""
    out: dict[str, Tensor] = {}
    problems: list[str] = []
    if changes.pair is not None:
        _write_pair(changes.pair.collapsed(), out, problems)
    for name, delta in changes.deltas.items():
        _write_delta(name, delta, changes, out, problems)
    for name, value in changes.full.items():
        if name == "weight":
            out["set_weight"] = value
        else:
            problems.append(f"a full replacement {name} {tuple(value.shape)}")
    if problems:
        raise AdapterError(f"kohya's naming has no tensors for:\n{bullets(problems, None)}")
    return out


def _write_pair(pair: Pair, out: dict[str, Tensor], problems: list[str]) -> None:
    if pair.kind in ("experts", "embedding"):
        problems.append(f"a pair of kind {pair.kind}, A {tuple(pair.A.shape)}")
        return
    out["lora_down.weight"], out["lora_up.weight"] = pair.A, pair.B
    out["alpha"] = _number(alpha_of(pair.scale, pair.rank))
    if pair.magnitude is not None:
        out["dora_scale"] = _dora_scale(pair.magnitude, (pair.B.shape[0], *pair.A.shape[1:]))


def _write_delta(name: str, delta: Delta, changes: ModuleChanges, out: dict[str, Tensor], problems: list[str]) -> None:
    label = f"a {delta.form} change of the {name} {tuple(delta.shape)}"
    if delta.rows is not None:
        problems.append(f"{label}, limited to rows {delta.rows[0]} to {delta.rows[1]}")
    elif delta.form == "dense":
        if name == "weight" and changes.pair is not None:
            problems.append(f"{label} with a pair")
            return
        weight = changes.deltas.get("weight")
        norm = weight is not None and weight.form == "dense" and len(weight.shape) == 1
        suffix = {"weight": "w_norm", "bias": "b_norm"} if norm else {"weight": "diff", "bias": "diff_b"}
        out[suffix[name]] = _times(delta.parts["value"], delta.scale)
    elif name != "weight" or changes.pair is not None:
        problems.append(label)
    elif delta.form == "gain":
        value = _times(delta.parts["value"], delta.scale)
        out["weight"], out["on_input"] = value.reshape(-1), value.new_tensor(value.ndim > 1).long()
    else:
        _write_product(delta, out)


def _write_product(delta: Delta, out: dict[str, Tensor]) -> None:
    """Add the hada_… or lokr_… tensors of a LoHa or LoKr to `out`.

    A factor with a core is stored as (rank, out), other factors as (out, rank)."""
    prefix = "hada" if delta.form == "hadamard" else "lokr"
    for part, t in delta.parts.items():
        letter, n = part[0], part[1]
        flip = letter == "a" and f"t{n}" in delta.parts
        out[f"{prefix}_w{n}_{letter}" if letter in "ab" else f"{prefix}_{part}"] = t.t().contiguous() if flip else t
    ranks = [delta.parts[b].shape[0] for b in ("b1", "b2") if b in delta.parts]
    if ranks and (delta.form == "hadamard" or len(set(ranks)) == 1):
        out["alpha"] = _number(alpha_of(delta.scale, ranks[0]))
    elif delta.scale != 1:
        first = next(name for name in ("lokr_w1", "lokr_w1_a") if name in out)
        out[first] = _times(out[first], delta.scale)
    if delta.magnitude is not None:
        out["dora_scale"] = _dora_scale(delta.magnitude, delta.shape)


def _dora_scale(magnitude: Tensor, shape: tuple[int, ...]) -> Tensor:
    return magnitude.reshape(-1, *[1] * (len(shape) - 1)) if magnitude.ndim == 1 else magnitude


def _number(value: float) -> Tensor:
    import torch

    single = torch.tensor(value, dtype=torch.float32)
    return single if float(single) == value else torch.tensor(value, dtype=torch.float64)


def _times(value: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return value
    return value * scale if value.dtype.itemsize == 8 else value.float() * scale
