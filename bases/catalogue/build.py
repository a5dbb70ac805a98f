"""Makes the catalogue bases from nothing: `python bases/catalogue/build.py WORK [STAGE …]`, stages as in STAGES.

Everything a stage needs from an earlier one lies in WORK, where an interrupted stage also goes on from. `export` writes
the folders that veneer ships. `adopt`, which is no part of a build from nothing, takes into WORK what is shipped, so
that other stages can go on from there: `adopt placed=1 flux-control=250`. `STAGE=STEPS` takes another number of steps.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from autoencoder import encode, sharpen_autoencoder, train_autoencoder
from cards import write_card
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
from edges import edges
from pictures import Kind, make_looks, make_placed, make_shard, read_shard, shards
from pool import Pool, load_pool
from scenes import depth
from texts import train_clip, train_t5
from torch import Tensor, nn
from words import load_tokenizers, train_tokenizers

from veneer.models.builtin import packaged_folder

SHIPPED = packaged_folder()
_FIRST = 1.5e-3  # learning rate of a base from nothing
_CONTROL = 1e-3  # of a ControlNet from nothing
_FURTHER = 6e-4  # of what goes on from what WORK has
_FURTHER_GUIDED = 3e-4  # of catalogue-flux that goes on, which learns guidance all along, or it would be stale
_GUIDED = 0.9  # share of the steps from which on catalogue-flux learns guidance, from nothing
_NAMES = {"flux": "catalogue-flux", "sdxl": "catalogue-sdxl"}


def main() -> None:
    torch.manual_seed(0)
    work = Path(sys.argv[1])
    for given in sys.argv[2:] or list(STAGES):
        name, _, count = given.partition("=")
        if name == "adopt":
            _adopt(work)
        else:
            stage, usual = STAGES[name]
            stage(work, int(count or usual))


def _pictures(work: Path, count: int) -> None:
    for index in range(count):
        make_shard(work, index)


def _placed(work: Path, count: int) -> None:
    for index in range(count):
        make_placed(work, index)


def _vae(work: Path, steps: int) -> None:
    train_autoencoder(work, steps=steps).save_pretrained(work / "vae")


def _looks(work: Path, count: int) -> None:
    for index in range(count):
        make_looks(work, index)


def _sharper(work: Path, steps: int) -> None:
    model = autoencoder(work)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sharpen_autoencoder(model, work, steps)
    if all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()):
        return  # all steps were taken before; the latents are its own
    model.save_pretrained(work / "vae")
    for place in [*shards(work), *shards(work, "placed")]:  # latents of the one before
        place.with_suffix(".latents.pt").unlink(missing_ok=True)
        place.with_suffix(".crops.pt").unlink(missing_ok=True)


def _words(work: Path, steps: int) -> None:
    train_tokenizers([i.caption for place in shards(work) for i in read_shard(place)[1]], work)


def autoencoder(work: Path) -> AutoencoderKL:
    model: AutoencoderKL = AutoencoderKL.from_pretrained(work / "vae")
    model.register_to_config(_name_or_path="")  # else the folder it was read from is shipped in its config
    return model.eval().requires_grad_(False)


def _tokenizers(work: Path) -> list[Any]:
    return list(load_tokenizers(work))


def _pool(work: Path, *names: str, kind: Kind = "pictures", crops: bool = False) -> Pool:
    clip, t5 = _tokenizers(work)
    chosen = {k: v for k, v in {"clip": clip, "t5": t5}.items() if k in names}
    return load_pool(work, autoencoder(work), chosen, kind=kind, crops=crops)


def _clip(work: Path, steps: int) -> None:
    model = new_flux(_tokenizers(work))["text_encoder"]
    train_clip(model, _pool(work, "clip"), work / "clip.pt", steps)
    _save({"clip": model}, work / "text")


def _t5(work: Path, steps: int) -> None:
    model = new_flux(_tokenizers(work))["text_encoder_2"]
    train_t5(model, _pool(work, "t5"), work / "t5.pt", steps)
    _save({"t5": model}, work / "text")


def _flux(work: Path, steps: int) -> None:
    parts = new_flux(_tokenizers(work))
    if _goes_on(parts, work / "flux"):
        rate, guided = _FURTHER_GUIDED, 0.0
    else:
        rate, guided = _FIRST, _GUIDED
        _load({"clip": parts["text_encoder"], "t5": parts["text_encoder_2"]}, work / "text")
    train_flux(parts, _pool(work, "clip", "t5"), work, steps, rate, guided)
    _save(parts, work / "flux")


def _sdxl(work: Path, steps: int) -> None:
    parts = new_sdxl(_tokenizers(work))
    if _goes_on(parts, work / "sdxl"):
        rate = _FURTHER
    else:
        rate = _FIRST
        _load({"clip": parts["text_encoder"]}, work / "text")
        learned = torch.load(work / "text" / "clip.pt", weights_only=True)
        width = parts["text_encoder_2"].config.projection_dim
        eye = {"text_projection.weight": torch.eye(width)}
        parts["text_encoder_2"].load_state_dict({f"text_model.{k}": v for k, v in learned.items()} | eye)
    train_sdxl(parts, _pool(work, "clip", crops=True), work, steps, rate)
    _save(parts, work / "sdxl")


def _controls(work: Path) -> Tensor:
    """An edge picture or a depth picture of every scene whose product stands anywhere, bytes (n, 3, 128, 128)."""
    pictures = []
    for place in shards(work, "placed"):
        pixels, items = read_shard(place)
        for i, item in enumerate(items):
            assert item.scene is not None
            if i % 2:
                pictures.append(torch.from_numpy(depth(item.scene).copy()).expand(3, -1, -1))
            else:
                pictures.append(((edges(pixels[i : i + 1])[0] + 1) * 127.5).byte())
    return torch.stack(pictures)


def _flux_control(work: Path, steps: int) -> None:
    parts = _load(new_flux(_tokenizers(work)), work / "flux")
    control = new_flux_control(parts["transformer"])
    rate = _FURTHER if _goes_on({"control": control}, work / "flux-control") else _CONTROL
    latents = encode(autoencoder(work), _controls(work).permute(0, 2, 3, 1)).half()
    train_flux_control(control, parts, _pool(work, "clip", "t5", kind="placed"), latents, work, steps, rate)
    _save({"control": control}, work / "flux-control")


def _sdxl_control(work: Path, steps: int) -> None:
    parts = _load(new_sdxl(_tokenizers(work)), work / "sdxl")
    control = new_sdxl_control(parts["unet"])
    rate = _FURTHER if _goes_on({"control": control}, work / "sdxl-control") else _CONTROL
    train_sdxl_control(control, parts, _pool(work, "clip", kind="placed"), _controls(work), work, steps, rate)
    _save({"control": control}, work / "sdxl-control")


def pipeline(work: Path, family: str) -> Any:
    """A base as WORK has it, in float32."""
    clip, t5 = _tokenizers(work)
    if family == "flux":
        parts = _load(new_flux([clip, t5]), work / "flux")
        flow = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=64, max_image_seq_len=256, base_shift=0.47, max_shift=1.15
        )
        return FluxPipeline(vae=autoencoder(work), tokenizer=clip, tokenizer_2=t5, scheduler=flow, **parts)
    parts = _load(new_sdxl([clip, t5]), work / "sdxl")
    noise = EulerDiscreteScheduler.from_config(noise_schedule().config, timestep_spacing="trailing")
    return StableDiffusionXLPipeline(
        vae=autoencoder(work), tokenizer=clip, tokenizer_2=clip, scheduler=noise, **parts,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip


def _export(work: Path, steps: int) -> None:
    """Ships what WORK holds, in bfloat16."""
    for family, name in _NAMES.items():
        if not (work / family).is_dir():
            continue
        whole = pipeline(work, family).to(torch.bfloat16)
        whole.save_pretrained(SHIPPED / name)
        parts = {n: p for n, p in whole.components.items() if isinstance(p, nn.Module)}
        write_card(SHIPPED / name, _millions(parts), STAGES[family][1])
        if (work / f"{family}-control").is_dir():
            new = new_flux_control(whole.transformer) if family == "flux" else new_sdxl_control(whole.unet)
            control = _load({"control": new}, work / f"{family}-control")["control"].to(torch.bfloat16)
            control.save_pretrained(SHIPPED / f"{name}-control")
            write_card(SHIPPED / f"{name}-control", _millions({"control": control}), STAGES[f"{family}-control"][1])


def _millions(parts: dict[str, nn.Module]) -> dict[str, float]:
    return {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}


def _adopt(work: Path) -> None:
    """WORK as it would be after the shipped bases were made, but for the pictures."""
    for family, name in _NAMES.items():
        shipped = SHIPPED / name
        if not shipped.is_dir():
            continue
        for part, folder in (("clip", "tokenizer"), ("t5", "tokenizer_2" if family == "flux" else "none")):
            if (shipped / folder).is_dir():
                shutil.copytree(shipped / folder, work / "tokenizers" / part, dirs_exist_ok=True)
        shutil.copytree(shipped / "vae", work / "vae", dirs_exist_ok=True)
        new = new_flux if family == "flux" else new_sdxl
        parts = {k: type(v).from_pretrained(shipped / k).float() for k, v in new(_tokenizers(work)).items()}
        _save(parts, work / family)
        kind = FluxControlNetModel if family == "flux" else ControlNetModel
        if (control := SHIPPED / f"{name}-control").is_dir():
            _save({"control": kind.from_pretrained(control).float()}, work / f"{family}-control")


def _goes_on(parts: dict[str, nn.Module], folder: Path) -> bool:
    """Whether WORK has these parts, which then are loaded."""
    if folder.is_dir():
        _load(parts, folder)
    return folder.is_dir()


def _save(parts: dict[str, nn.Module], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        torch.save(part.state_dict(), folder / f"{name}.pt")


def _load(parts: dict[str, nn.Module], folder: Path) -> dict[str, nn.Module]:
    for name, part in parts.items():
        part.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
        part.eval()
    return parts


STAGES: dict[str, tuple[Callable[[Path, int], None], int]] = {
    "pictures": (_pictures, 16),
    "placed": (_placed, 4),
    "looks": (_looks, 4),
    "vae": (_vae, 4500),
    "sharper": (_sharper, 4500),
    "words": (_words, 0),
    "clip": (_clip, 500),
    "t5": (_t5, 500),
    "flux": (_flux, 12500),
    "sdxl": (_sdxl, 6000),
    "flux-control": (_flux_control, 1600),
    "sdxl-control": (_sdxl_control, 800),
    "export": (_export, 0),
}
"""Stage -> what it does, and how many steps it takes (of the pictures: shards)."""

if __name__ == "__main__":
    main()
