"""Original modules map to the same modules and rows as in diffusers' checkpoint converters.

Every value encodes the number of its tensor and of its row, so that a wrong module, part or order is visible.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.formats.test_topology import denoiser
from veneer.formats.topology import Family, ModuleTarget, families

peer = pytest.importorskip("diffusers.loaders.single_file_utils")

CONVERTERS = {
    "sd3": peer.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd3-large": peer.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux1": peer.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": peer.convert_flux2_transformer_checkpoint_to_diffusers,
    "z-image": peer.convert_z_image_transformer_checkpoint_to_diffusers,
}
"""diffusers' converters of original checkpoints.

Qwen-Image has no converter, because its original names are diffusers' names."""


def marked(rows: int, number: int) -> Tensor:
    return torch.arange(rows, dtype=torch.float64)[:, None] + number * (1 << 20)


def checkpoint(family: Family) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an original checkpoint, and the weights it must become in diffusers.

    Each weight has one column."""
    shapes = {f"{family.denoiser}.{n}": tuple(p.shape) for n, p in denoiser(family.name).named_parameters()}
    original: dict[str, Tensor] = {}
    want: dict[str, Tensor] = {}
    for number, (name, places) in enumerate(family.originals.items()):
        rows = sum(shapes[f"{p.module}.weight"][0] for p in places)
        suffix = "scale" if name.endswith(("query_norm", "key_norm")) else "weight"
        for part in (suffix, *(["bias"] if f"{places[0].module}.bias" in shapes else [])):
            value = marked(rows, 2 * number + (part == "bias"))
            original[f"{name}.{part}"] = value
            for place in places:
                target = f"{place.module.partition('.')[2]}.{'bias' if part == 'bias' else 'weight'}"
                want[target] = placed(value, place)
    return original, want


def placed(value: Tensor, place: ModuleTarget) -> Tensor:
    if place.part:
        begin, end, total = place.part
        unit = len(value) // total
        return value[begin * unit : end * unit]
    return torch.cat([value[len(value) // 2 :], value[: len(value) // 2]]) if place.swap else value


@pytest.mark.parametrize("name", CONVERTERS)
def test_transformer_names_match_diffusers(name: str) -> None:
    original, want = checkpoint(families()[name])
    extra = {"pos_embed": torch.zeros(1, 4, 8)} if name.startswith("sd3") else {}
    got = CONVERTERS[name]({**{k: v.clone() for k, v in original.items()}, **extra})
    compare(got, want, ignore={"pos_embed.pos_embed"})


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_unet_names_match_diffusers(name: str) -> None:
    original, want = checkpoint(families()[name])
    config = dict(denoiser(name).config)
    if name == "sdxl":
        config["class_embed_type"] = None
    source = {f"model.diffusion_model.{k}": v for k, v in original.items()}
    compare(peer.convert_ldm_unet_checkpoint(source, config), want)


def compare(got: dict[str, Tensor], want: dict[str, Tensor], ignore: set[str] | None = None) -> None:
    assert set(got) - (ignore or set()) == set(want)
    assert [k for k, v in want.items() if not torch.equal(got[k], v)] == []
