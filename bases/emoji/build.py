"""Makes the emoji bases from nothing: `python bases/emoji/build.py WORK [STAGE …]`, stages in the order of STAGES.

Everything a stage needs from an earlier one lies in WORK, where an interrupted stage also goes on from. `export` writes
the four folders that veneer ships; `adopt`, which is no part of a build from nothing, takes the shipped weights into
WORK, so that the stages after it train them further. Recipe, times and results: bases/emoji/README.md.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoencoder import encode_all, train_autoencoder
from cards import write_cards
from controls import new_flux_control, new_sdxl_control, train_flux_control, train_sdxl_control
from denoisers import new_flux, new_sdxl, noise_schedule, train_flux, train_sdxl
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    StableDiffusionXLPipeline,
)  # fmt: skip
from drawings import Drawings, caption, load_drawings
from edges import edges
from safetensors import safe_open
from texts import train_clip, train_t5
from torch import Tensor, nn
from torch.nn import functional as F
from words import kept_tokenizers

from veneer.models.builtin import packaged_place

STAGES = {
    "vae": 2000, "clip": 600, "t5": 600, "flux": 1800, "sdxl": 2200, "flux-canny": 250, "sdxl-canny": 250, "export": 0
}  # fmt: skip
"""Stage -> steps."""

SHIPPED = packaged_place()


def main() -> None:
    work, stages = Path(sys.argv[1]), sys.argv[2:] or list(STAGES)
    if stages[0] == "adopt":
        _adopt(work)
        stages = stages[1:]
    torch.manual_seed(0)
    drawings = load_drawings(work).select(held_out=False)
    captions = [caption(n, s) for n, s in zip(drawings.names, drawings.styles, strict=True)]
    tokenizers = kept_tokenizers(captions, work)
    for stage in stages:
        _STAGES[stage](work, drawings, tokenizers, STAGES[stage])


def _adopt(work: Path) -> None:
    for part, folder in (("clip", "tokenizer"), ("t5", "tokenizer_2")):
        shutil.copytree(SHIPPED / "emoji-flux" / folder, work / "tokenizers" / part, dirs_exist_ok=True)
    shutil.copytree(SHIPPED / "emoji-flux" / "vae", work / "vae", dirs_exist_ok=True)
    tokenizers = kept_tokenizers([], work)
    for name, new, control in (("flux", new_flux, FluxControlNetModel), ("sdxl", new_sdxl, ControlNetModel)):
        parts = {k: type(v).from_pretrained(SHIPPED / f"emoji-{name}" / k) for k, v in new(tokenizers).items()}
        _save(parts, work / name)
        _save({"control": control.from_pretrained(SHIPPED / f"emoji-{name}-canny")}, work / f"{name}-canny")


def _vae(work: Path, drawings: Drawings, tokenizers: list[Any], steps: int) -> None:
    train_autoencoder(drawings, work, steps=steps).save_pretrained(work / "vae")


def _autoencoder(work: Path) -> AutoencoderKL:
    model: AutoencoderKL = AutoencoderKL.from_pretrained(work / "vae")
    model.register_to_config(_name_or_path="")  # else the folder it was read from is shipped in its config
    return model.eval().requires_grad_(False)


def _clip(work: Path, drawings: Drawings, tokenizers: list[Any], steps: int) -> None:
    model = new_flux(tokenizers)["text_encoder"]
    train_clip(model, tokenizers[0], encode_all(_autoencoder(work), drawings), drawings, work / "clip.pt", steps)
    _save({"clip": model}, work / "text")


def _t5(work: Path, drawings: Drawings, tokenizers: list[Any], steps: int) -> None:
    model = new_flux(tokenizers)["text_encoder_2"]
    train_t5(model, tokenizers[1], encode_all(_autoencoder(work), drawings), drawings, work / "t5.pt", steps)
    _save({"t5": model}, work / "text")


def _and_outlined(work: Path, drawings: Drawings) -> Drawings:
    """All drawings, then all of them in the same order with lines."""
    lines = load_drawings(work, outlined=True).select(held_out=False)
    return Drawings(
        np.concatenate([drawings.pixels, lines.pixels]), drawings.names + lines.names, drawings.styles + lines.styles
    )


def _flux(work: Path, drawings: Drawings, tokenizers: list[Any], steps: int) -> None:
    parts, drawings = new_flux(tokenizers), _and_outlined(work, drawings)
    if (work / "flux").is_dir():
        _load(parts, work / "flux")
    else:
        _load({"clip": parts["text_encoder"], "t5": parts["text_encoder_2"]}, work / "text")
    train_flux(parts, tokenizers, encode_all(_autoencoder(work), drawings), drawings, work, steps)
    _save(parts, work / "flux")


def _sdxl(work: Path, drawings: Drawings, tokenizers: list[Any], steps: int) -> None:
    vae, parts, drawings = _autoencoder(work), new_sdxl(tokenizers), _and_outlined(work, drawings)
    if (work / "sdxl").is_dir():
        _load(parts, work / "sdxl")
    else:
        _load({"clip": parts["text_encoder"]}, work / "text")
        learned = torch.load(work / "text" / "clip.pt", weights_only=True)
        parts["text_encoder_2"].load_state_dict(
            {f"text_model.{k}": v for k, v in learned.items()} | {"text_projection.weight": torch.eye(96)}
        )
    pixels, sizes = _crops(drawings)
    crops = (encode_all(vae, pixels), sizes)
    train_sdxl(parts, tokenizers, encode_all(vae, drawings), crops, drawings, work, steps)
    _save(parts, work / "sdxl")


def _crops(drawings: Drawings) -> tuple[Tensor, Tensor]:
    """A crop of each drawing enlarged to 72 … 112 pixels, and its time ids: original size, top left, target size.

    The original size is the drawing's own, as SDXL's data has it: what is cut is told by the corner alone."""
    generator = torch.Generator().manual_seed(1)
    out, ids = [], []
    for picture in torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1:
        side = int(torch.randint(72, 113, (), generator=generator))
        top, left = (int(torch.randint(0, side - 63, (), generator=generator)) for _ in range(2))
        large = F.interpolate(picture[None], size=(side, side), mode="bilinear", antialias=True)
        out.append(large[0, :, top : top + 64, left : left + 64])
        ids.append([side, side, top, left, 64, 64])
    return torch.stack(out), torch.tensor(ids)


def _flux_canny(work: Path, drawings: Drawings, tokenizers: list[Any], steps: int) -> None:
    vae, parts = _autoencoder(work), _load(new_flux(tokenizers), work / "flux")
    control = _control(work, "flux-canny", new_flux_control(parts["transformer"]))
    lines = encode_all(vae, edges(drawings.pixels))
    train_flux_control(control, parts, tokenizers, encode_all(vae, drawings), lines, drawings, work, steps)
    _save({"control": control}, work / "flux-canny")


def _sdxl_canny(work: Path, drawings: Drawings, tokenizers: list[Any], steps: int) -> None:
    parts = _load(new_sdxl(tokenizers), work / "sdxl")
    control = _control(work, "sdxl-canny", new_sdxl_control(parts["unet"]))
    latents = encode_all(_autoencoder(work), drawings)
    train_sdxl_control(control, parts, tokenizers, latents, edges(drawings.pixels), drawings, work, steps)
    _save({"control": control}, work / "sdxl-canny")


def _control(work: Path, stage: str, control: nn.Module) -> nn.Module:
    """What is there already is trained on, beside the base's new weights."""
    if (work / stage).is_dir():
        _load({"control": control}, work / stage)
    return control


def _export(work: Path, drawings: Drawings, tokenizers: list[Any], steps: int) -> None:
    """Ships what WORK holds."""
    clip, t5 = tokenizers
    shipped = []
    if (work / "flux").is_dir():
        parts = _load(new_flux(tokenizers), work / "flux")
        flow = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=64, max_image_seq_len=256, base_shift=0.47, max_shift=1.15
        )
        pipeline: Any = FluxPipeline(vae=_autoencoder(work), tokenizer=clip, tokenizer_2=t5, scheduler=flow, **parts)
        shipped += _ship(pipeline, work, "flux", new_flux_control(parts["transformer"]))
    if (work / "sdxl").is_dir():
        parts = _load(new_sdxl(tokenizers), work / "sdxl")
        noise = EulerDiscreteScheduler.from_config(noise_schedule().config, timestep_spacing="trailing")
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(work), tokenizer=clip, tokenizer_2=clip, scheduler=noise, **parts,
            force_zeros_for_empty_prompt=False, add_watermarker=False,
        )  # fmt: skip
        shipped += _ship(pipeline, work, "sdxl", new_sdxl_control(parts["unet"]))
    write_cards({n: SHIPPED / n for n in shipped}, {n: _sizes(SHIPPED / n) for n in shipped}, STAGES)


def _sizes(folder: Path) -> dict[str, float]:
    """{part: million parameters} of every weights file in a folder."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = file.parent.name if file.parent != folder else "controlnet"
        with safe_open(file, "pt") as opened:
            found[part] = sum(math.prod(opened.get_slice(k).get_shape()) for k in opened.keys()) / 1e6  # noqa: SIM118
    return found


def _ship(pipeline: Any, work: Path, name: str, control: Any) -> list[str]:
    """A base and, where it is trained, its ControlNet; the names of both folders."""
    folder = SHIPPED / f"emoji-{name}"
    if folder.exists():
        for part in folder.iterdir():
            if part.is_dir():
                shutil.rmtree(part)
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    if not (work / f"{name}-canny").is_dir():
        return [folder.name]
    _load({"control": control}, work / f"{name}-canny")
    control.to(torch.bfloat16).save_pretrained(SHIPPED / f"emoji-{name}-canny")
    return [folder.name, f"emoji-{name}-canny"]


def _save(parts: dict[str, nn.Module], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, part in parts.items():
        torch.save(part.state_dict(), folder / f"{name}.pt")


def _load(parts: dict[str, nn.Module], folder: Path) -> dict[str, nn.Module]:
    for name, part in parts.items():
        part.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
        part.eval()
    return parts


_STAGES = {
    "vae": _vae, "clip": _clip, "t5": _t5, "flux": _flux, "sdxl": _sdxl, "flux-canny": _flux_canny,
    "sdxl-canny": _sdxl_canny, "export": _export,
}  # fmt: skip

if __name__ == "__main__":
    main()
