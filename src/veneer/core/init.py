"""Create untrained adapters on any kind of module, without changing the base.

All initializations except loftq start with a delta of zero.

    zero-b      A ~ U(−1/√in, 1/√in), B = 0           (embedding: A = 0, B ~ N(0, 1), as in the original LoRA)
    gaussian    A ~ N(0, 1/rank²), B = 0              (embedding: as above)
    pissa       W = U·S·Vᵀ: A = √(S_r/s)·V_rᵀ, B = U_r·√(S_r/s), origin = (A, B)         arXiv 2404.02948
    olora       W = Q·R: A = R_r, B = Q_r, origin = (A, B)                               arXiv 2406.01775
    loftq       W − W̃ = U·S·Vᵀ, W̃ the dequantized weight: A = √(S_r/s)·V_rᵀ, B = U_r·√(S_r/s)
                                                                                         arXiv 2310.08659
    DoRA        magnitude = ‖W + s·B·A‖, which is ‖W‖ at delta zero                      arXiv 2402.09353
    LoHa        a1 ~ N(0, 0.1²), b1, b2 ~ N(0, 1), a2 = 0                                LyCORIS, arXiv 2309.14859
    LoKr        w2 or b2 = 0; each other factor ~ U(−1/√n, 1/√n), n = columns            LyCORIS (PEFT: "lycoris")

PiSSA and OLoRA, as published, subtract the initial s·B·A from the base. Here, `origin` holds the initial A
and B and is subtracted from the delta, so the base stays unchanged. LoftQ, as published, alternates between
quantizing W − s·B·A and fitting A and B. Here, only A and B are fitted, once, which is the best fit for the
given quantized base. The delta of a loftq adapter is the base's quantization error, so the adapter works only
with the quantized base that it was created on. This module does not depend on how adapters are attached,
trained or written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Card, LoraSpec, Pair, TokenRows, scale_of
from veneer.core.forms import Delta, trained_shapes
from veneer.core.merge import adapted_norm, to_matrix, weight_of
from veneer.core.targets import Target, base_modules, full_modules, resolve_targets, target_matches, token_embeddings
from veneer.errors import ConfigError, TargetError
from veneer.ops.quantized import Quantized, dequantized

T = TypeVar("T", int, float)


def create(
    model: nn.Module,
    spec: LoraSpec,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    original: Callable[[str], Tensor] | None = None,
) -> Adapter:
    """Return the untrained adapter that `spec` describes, deterministic in `seed`.

    Tensors are created on the modules' devices, or on the CPU if the modules have no values yet (meta). Full
    copies and token rows start with the base's values, converted to `dtype`.

    original: function from a parameter name to the weight before quantization; required for loftq.

    Raises ConfigError for numbers out of range. Raises TargetError for patterns without a match, and for
    modules that the chosen initialization does not support."""
    _check(spec)
    targets = resolve_targets(model, spec) if spec.targets else []
    modules = dict(base_modules(model))
    generator = torch.Generator().manual_seed(seed)
    card = Card(rank=spec.rank, alpha=spec.alpha)
    card.targets = [spec.targets] if isinstance(spec.targets, str) else list(spec.targets)
    out = Adapter(card=card, rslora=spec.rslora, dropout=spec.dropout)
    for target in targets:
        module = modules[target.module_name]
        if spec.kind == "lora":
            out.pairs[target.name] = _pair(module, target, spec, generator, dtype, original)
        else:
            out.deltas[f"{target.name}.weight"] = _delta(module, target, spec, generator, dtype)
    for name in full_modules(model, spec):
        state = modules[name].state_dict()
        out.modules[name] = {
            k: dequantized(t.detach()).to(dtype if t.is_floating_point() else t.dtype, copy=True)
            for k, t in state.items()
        }
    for name, ids in token_embeddings(model, spec).items():
        rows = weight_of(modules[name])[list(ids)].to(dtype, copy=True)
        out.token_rows[name] = TokenRows(ids, rows)
    return out


def _check(spec: LoraSpec) -> None:
    for rank in (spec.rank, *spec.rank_pattern.values()):
        if rank < 1:
            raise ConfigError(f"rank {rank} is not possible", fix="give a rank of 1 or more")
    for alpha in (spec.alpha, *spec.alpha_pattern.values()):
        if not (math.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"alpha {alpha} is not possible", fix="give a positive alpha")
    if not 0.0 <= spec.dropout < 1.0:
        raise ConfigError(f"dropout {spec.dropout} is not possible", fix="give a fraction of at least 0 and below 1")
    if spec.init not in (initializers := ("zero-b", "gaussian", "pissa", "olora", "loftq")):
        raise ConfigError(f"no initialization named {spec.init!r}", fix=f"choose one of {', '.join(initializers)}")
    if spec.kind not in (kinds := ("lora", "loha", "lokr")):
        raise ConfigError(f"no kind of adapter named {spec.kind!r}", fix=f"choose one of {', '.join(kinds)}")
    if spec.factor is not None and spec.factor < 1:
        raise ConfigError(f"factor {spec.factor} is not possible", fix="give 1 or more, or leave it out")
    of_pairs = {"dora": spec.dora, "dropout": spec.dropout, f"init {spec.init!r}": spec.init != "zero-b"}
    if spec.kind != "lora" and (set_options := [name for name, set_ in of_pairs.items() if set_]):
        raise ConfigError(
            f"{' and '.join(set_options)}: supported only with kind lora, not {spec.kind}", fix="leave it out"
        )
    if not (spec.targets or spec.modules_to_save or spec.token_rows):
        raise TargetError("nothing to train: no targets, no modules_to_save, no token_rows", fix="try all-linear")


def _first(patterns: Mapping[str, T], name: str, default: T) -> T:
    return next((value for pattern, value in patterns.items() if target_matches(pattern, name)), default)


def _rank_and_alpha(spec: LoraSpec, name: str) -> tuple[int, float]:
    """Return a target's rank and alpha, from the first matching pattern or the spec."""
    return _first(spec.rank_pattern, name, spec.rank), float(_first(spec.alpha_pattern, name, spec.alpha))


def _pair(
    module: nn.Module,
    target: Target,
    spec: LoraSpec,
    generator: torch.Generator,
    dtype: torch.dtype,
    original: Callable[[str], Tensor] | None,
) -> Pair:
    rank, alpha = _rank_and_alpha(spec, target.name)
    scale = scale_of(alpha, rank, spec.rslora)
    weight = weight_of(module, target.parameter)
    is_random = spec.init not in ("pissa", "olora", "loftq")
    if is_random and not spec.dora:  # only the weight's shape is needed
        matrix = to_matrix(module, target.kind, torch.empty(weight.shape, device="meta"))
    else:
        matrix = to_matrix(module, target.kind, dequantized(weight)).float()
    if spec.dora and target.kind == "experts":
        problem = f"DoRA is not defined for the fused experts {target.name}"
        raise TargetError(problem, fix="exclude them (`exclude: ['*.experts']`) or train without DoRA")
    if not is_random:
        if rank > min(matrix.shape[-2:]):
            raise TargetError(
                f"{spec.init} cannot have rank {rank} on {target.name}: at most {min(matrix.shape[-2:])}",
                fix="lower the module's rank with rank_pattern, or exclude the module",
            )
        if spec.init == "loftq":
            lost = _quantization_error(module, target, weight, matrix, original)
            A, B = _pissa(lost, rank, scale)
        else:
            A, B = (_pissa if spec.init == "pissa" else _olora)(matrix, rank, scale)
        if target.kind == "conv":
            A, B = A.reshape(rank, *weight.shape[1:]), B.reshape(*B.shape, *[1] * (weight.ndim - 2))
        A, B = A.to(dtype), B.to(dtype)
        pair = Pair(A, B, scale, target.kind, origin=None if spec.init == "loftq" else (A.clone(), B.clone()))
    else:
        A, B = _random(matrix, weight, target, rank, spec.init, generator)
        # The weights of a meta base are loaded later.
        where = torch.device("cpu") if weight.is_meta else weight.device
        pair = Pair(A.to(where, dtype), B.to(where, dtype), scale, target.kind)
    if spec.dora:
        pair.magnitude = adapted_norm(matrix, pair).to(dtype)
    return pair


def _delta(module: nn.Module, target: Target, spec: LoraSpec, generator: torch.Generator, dtype: torch.dtype) -> Delta:
    """Return an untrained LoHa or LoKr.

    If neither factor of a LoKr is decomposed, there is no rank and the scale is 1, as in LyCORIS and in tools
    that read LyCORIS files."""
    assert spec.kind != "lora"
    if target.kind not in ("linear", "conv"):
        target_kind = "fused experts" if target.kind == "experts" else "embedding"
        fix = f"exclude it (`exclude: ['*{target.name.rpartition('.')[2]}']`), or train with kind: lora"
        raise TargetError(f"{spec.kind} is not defined for the {target_kind} {target.name}", fix=fix)
    rank, alpha = _rank_and_alpha(spec, target.name)
    weight = weight_of(module)
    shape = tuple(weight.shape)
    if target.kind == "linear":
        shape = tuple(to_matrix(module, "linear", torch.empty(shape, device="meta")).shape)
    parts: dict[str, Tensor] = {}
    for name, factor_shape in trained_shapes(spec.kind, shape, rank, spec.factor, spec.decompose_both).items():
        t = torch.zeros(factor_shape)
        if spec.kind == "loha" and name != "a2":
            t.normal_(std=0.1 if name == "a1" else 1.0, generator=generator)
        elif spec.kind == "lokr" and name not in ("w2", "b2"):
            bound = 1 / math.sqrt(factor_shape[1])
            t.uniform_(-bound, bound, generator=generator)
        parts[name] = t.to("cpu" if weight.is_meta else weight.device, dtype)
    ranked = "b1" in parts or "b2" in parts
    scale = scale_of(alpha, rank, spec.rslora) if ranked else 1.0
    return Delta("hadamard" if spec.kind == "loha" else "kronecker", parts, shape, scale)


def _quantization_error(
    module: nn.Module, target: Target, weight: Tensor, matrix: Tensor, original: Callable[[str], Tensor] | None
) -> Tensor:
    """Return W − W̃, the quantization error, as a matrix."""
    if not isinstance(weight, Quantized) or original is None:
        problem = f"loftq starts from the quantization error, which is not known for {target.name}"
        fix = "use a base quantized from 16 bits (base.quantize=nf4), quantized targets, or another init"
        raise ConfigError(problem, where="adapter.init", fix=fix)
    unquantized = original(f"{target.module_name}.{target.parameter or 'weight'}").to(matrix.device)
    return to_matrix(module, target.kind, unquantized).float() - matrix


def _random(
    matrix: Tensor, weight: Tensor, target: Target, rank: int, init: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    out_features, in_features = matrix.shape[-2:]
    lead = matrix.shape[:-2]
    A = torch.empty(*lead, rank, in_features)
    B = torch.zeros(*lead, out_features, rank)
    if target.kind == "embedding":
        return A.zero_(), B.normal_(generator=generator)
    if init == "gaussian":
        A.normal_(std=1 / rank, generator=generator)
    else:
        bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = √5, nn.Linear's default
        A.uniform_(-bound, bound, generator=generator)
    if target.kind == "conv":
        return A.reshape(rank, *weight.shape[1:]), B.reshape(*B.shape, *[1] * (weight.ndim - 2))
    return A, B


def _pissa(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[..., :rank] / scale).sqrt()
    return (root[..., :, None] * Vh[..., :rank, :]).contiguous(), (U[..., :rank] * root[..., None, :]).contiguous()


def _olora(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(matrix)
    return R[..., :rank, :].contiguous(), Q[..., :rank].contiguous()
