"""A pair and deltas -> the tensors of one module by suffix. Knows no names of modules."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.core.adapter import Pair, alpha_of
from veneer.core.forms import Delta
from veneer.errors import AdapterError
from veneer.formats.leaves_read import Leaf

__all__ = ["write_leaf"]


def write_leaf(leaf: Leaf, naming: str) -> dict[str, Tensor]:
    """The tensors of a leaf by suffix: what `read_leaf` reads back to the same effect.

    | naming    | pair                           | alpha               | other forms                                   |
    | kohya     | lora_down.weight, lora_up.…    | always              | all, LyCORIS' names; set_weight for `full`    |
    | lora.up   | lora.down.weight, lora.up.…    | always              | none but diff, diff_b                         |
    | diffusers | lora_A.weight, lora_B.weight   | where the s is not 1| lora_B.bias                                   |
    | peft      | lora_A.weight, lora_B.weight   | the config's matter | lora_B.bias                                   |

    AdapterError lists what the naming has no tensors for. Scales are exact: alpha is a float32 where that holds it, a
    float64 elsewhere; what has no alpha (a dense delta, a LoKr of two whole factors) has its scale multiplied in, in
    float32."""
    known = {"kohya": _DOWN_UP, "lora.up": ("lora.down.weight", "lora.up.weight"), "diffusers": _A_B, "peft": _A_B}
    if naming not in known:
        raise ValueError(f"naming is one of {', '.join(known)}, not {naming!r}")
    out: dict[str, Tensor] = {}
    problems: list[str] = []
    if leaf.pair is not None:
        _write_pair(leaf.pair.collapsed(), naming, known[naming], out, problems)
    for name, delta in leaf.deltas.items():
        _write_delta(name, delta, leaf, naming, out, problems)
    for name, value in leaf.full.items():
        if naming == "kohya" and name == "weight":
            out["set_weight"] = value
        else:
            problems.append(f"a whole new {name} {tuple(value.shape)}")
    if problems:
        raise AdapterError(f"the {naming} naming has no tensors for:\n" + "\n".join(f"    {p}" for p in problems))
    return out


_DOWN_UP = ("lora_down.weight", "lora_up.weight")
_A_B = ("lora_A.weight", "lora_B.weight")


def _write_pair(pair: Pair, naming: str, names: tuple[str, str], out: dict[str, Tensor], problems: list[str]) -> None:
    shape = (pair.B.shape[0], *pair.A.shape[1:])
    if pair.kind == "experts" or (pair.kind == "embedding" and names != _A_B):
        problems.append(f"a pair of {pair.kind}, A {tuple(pair.A.shape)}")
        return
    if pair.kind == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    out[names[0]], out[names[1]] = pair.A, pair.B
    if naming in ("kohya", "lora.up") or (naming == "diffusers" and pair.scale != 1):
        out["alpha"] = _number(alpha_of(pair.scale, pair.rank))
    m = pair.magnitude
    if m is None:
        return
    if naming == "kohya":
        out["dora_scale"] = _dora_scale(m, shape)
    elif naming == "lora.up" or m.ndim > 1:
        problems.append(f"a magnitude {tuple(m.shape)}" + (" along the inputs" if m.ndim > 1 else ""))
    else:
        out["lora_magnitude_vector"] = m if len(shape) == 2 else m.reshape(1, -1, *[1] * (len(shape) - 2))


def _write_delta(name: str, delta: Delta, leaf: Leaf, naming: str, out: dict[str, Tensor], problems: list[str]) -> None:
    what = f"a {delta.form} change of the {name} {tuple(delta.shape)}"
    if delta.rows is not None:
        problems.append(f"{what}, of which only rows {delta.rows[0]} to {delta.rows[1]} count")
    elif delta.form == "dense" and naming in ("kohya", "lora.up"):
        if name == "weight" and leaf.pair is not None:
            problems.append(f"{what} beside a pair")
            return
        weight = leaf.deltas.get("weight")
        norm = naming == "kohya" and weight is not None and weight.form == "dense" and len(weight.shape) == 1
        suffix = {"weight": "w_norm", "bias": "b_norm"} if norm else {"weight": "diff", "bias": "diff_b"}
        out[suffix[name]] = _times(delta.parts["value"], delta.scale)
    elif delta.form == "dense" and name == "bias" and leaf.pair and leaf.pair.scale and leaf.pair.magnitude is None:
        same = delta.scale == leaf.pair.scale
        out["lora_B.bias"] = (
            delta.parts["value"] if same else _times(delta.parts["value"], delta.scale / leaf.pair.scale)
        )
    elif naming != "kohya" or name != "weight" or leaf.pair is not None:
        problems.append(what)
    elif delta.form == "gain":
        value = _times(delta.parts["value"], delta.scale)
        out["weight"], out["on_input"] = value.reshape(-1), torch.tensor(int(value.ndim > 1))
    else:
        _write_product(delta, out)


def _write_product(delta: Delta, out: dict[str, Tensor]) -> None:
    """hada_… and lokr_… of a LoHa or LoKr. A factor with a core is stored (rank, out), another one (out, rank)."""
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
    single = torch.tensor(value, dtype=torch.float32)
    return single if float(single) == value else torch.tensor(value, dtype=torch.float64)


def _times(value: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return value
    return value * scale if value.dtype == torch.float64 else value.float() * scale
