"""A mix of every kind of adapter, each in its tool's layout, equals the sum of the defined ΔW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.image_twins import diffusers_pipeline, levels, parameter_of, picture
from veneer.imaging.adapters import ImagePipeline, parse_use
from veneer.imaging.generate import ImageRequest, Options, generate
from veneer.models.image.base import ImageBase

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
OTHER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "unet.mid_block.resnets.0.conv1"
TEXT = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
RANK = 2

Made = tuple[dict[str, Tensor], Tensor]
"""Tensors of a module by suffix, and ΔW by the tool's definition.

ΔW is float64 and has the weight's shape."""


def rand(*shape: int, seed: int, size: float = 0.3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def flat_product(up: Tensor, down: Tensor, like: Tensor) -> Tensor:
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(like.shape)


def locon(W: Tensor) -> Made:
    down, up = rand(RANK, *W.shape[1:], seed=1), rand(len(W), RANK, *[1] * (W.ndim - 2), seed=2)
    own = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    return own, flat_product(up, down, W) / RANK


def tucker(W: Tensor) -> Made:
    down, mid = rand(RANK, W.shape[1], 1, 1, seed=3), rand(RANK, RANK, *W.shape[2:], seed=4)
    up = rand(len(W), RANK, 1, 1, seed=5)
    delta = torch.einsum("op,pqhw,qi->oihw", up.double()[..., 0, 0], mid.double(), down.double()[..., 0, 0])
    own = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    return own | {"alpha": torch.tensor(float(RANK))}, delta


def dora(W: Tensor, on_input: bool) -> Made:
    own, delta = locon(W)
    new = W.double() + delta
    m = W.double().norm(dim=0, keepdim=True) if on_input else W.double().norm(dim=1, keepdim=True)
    m = m * 1.4
    return own | {"dora_scale": m.float()}, new * m.float().double() / new.norm(dim=int(not on_input), keepdim=True) - W


def loha(W: Tensor) -> Made:
    a1, b1, a2, b2 = (
        rand(*shape, seed=6 + i, size=0.8)
        for i, shape in enumerate([(len(W), RANK), (RANK, W[0].numel()), (len(W), RANK), (RANK, W[0].numel())])
    )
    own = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    delta = (a1.double() @ b1.double()) * (a2.double() @ b2.double()) / RANK
    return own, delta.reshape(W.shape)


def lokr(W: Tensor) -> Made:
    """Return a LoKr with two full factors, for which LyCORIS ignores alpha."""
    w1, w2 = rand(2, 2, seed=10), rand(len(W) // 2, W.shape[1] // 2, *W.shape[2:], seed=11)
    left = w1.double().reshape(2, 2, *[1] * (W.ndim - 2))
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(0.5)}, torch.kron(left, w2.double())


def ia3(W: Tensor) -> Made:
    gain = rand(len(W), 1, seed=12)
    return {"weight": gain, "on_input": torch.tensor(False)}, W.double() * gain.double().reshape(
        -1, *[1] * (W.ndim - 1)
    )


def dense(W: Tensor) -> Made:
    diff = rand(*W.shape, seed=13, size=0.1)
    return {"diff": diff}, diff.double()


KINDS: dict[str, tuple[Callable[[Tensor], Made], tuple[str, ...]]] = {
    "locon": (locon, (LINEAR, CONV, TEXT)),
    "tucker": (tucker, (CONV,)),
    "dora-out": (lambda W: dora(W, on_input=False), (LINEAR,)),
    "dora-in": (lambda W: dora(W, on_input=True), (OTHER,)),
    "loha": (loha, (LINEAR, CONV)),
    "lokr": (lokr, (OTHER, CONV)),
    "ia3": (ia3, (LINEAR,)),
    "dense": (dense, (OTHER, CONV)),
}


def flat(module: str) -> str:
    component, _, rest = module.partition(".")
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{rest.replace('.', '_')}"


def test_mix_of_all_kinds_equals_their_defined_sum(
    base: ImageBase, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = diffusers_pipeline(place)
    changes: dict[str, Tensor] = {}
    uses = []
    for i, (kind, (define, modules)) in enumerate(KINDS.items()):
        strength = (0.5, -0.4, 0.7)[i % 3]
        tensors = {}
        for module in modules:
            own, delta = define(parameter_of(pipe, module).detach())
            tensors |= {f"{flat(module)}.{suffix}": t.contiguous() for suffix, t in own.items()}
            changes[module] = changes.get(module, 0) + strength * delta
        save_file(tensors, f"{kind}.safetensors")
        uses.append(f"{kind}.safetensors:{strength}")
    plain = picture(pipe, "a cat", 1)
    for module, change in changes.items():
        weight = parameter_of(pipe, module)
        weight.data = (weight.detach().double() + change).float()
    with ImagePipeline(base) as mixer:
        (found,) = generate(mixer, [ImageRequest("a cat", seed=1, uses=tuple(map(parse_use, uses)))], Options(steps=4))
        hashed = found.infotext.fields["Lora hashes"]
    assert levels(found.image, picture(pipe, "a cat", 1)) <= 1
    assert levels(found.image, plain) > 5
    assert hashed.count(": ") == len(KINDS), "every one is in the infotext"
