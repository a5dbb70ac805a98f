from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.train.make_pictures import put, scene, settings
from veneer.errors import DataError, ResourceError
from veneer.train.config.image import ImageDataSection
from veneer.train.image.augmentation import View, crop_view, prepare
from veneer.train.image.cache import LatentCache, TextCache
from veneer.train.image.pictures import TrainingPicture, read_pictures


class Encoder:
    """Encodes latents as means over 8 x 8 pixels. `calls`: number of encoded pictures."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[0] == 1
        self.calls += 1
        return torch.nn.functional.avg_pool2d(pixels, 8)


def one(folder: Path, seed: int = 0, keys: ImageDataSection | None = None) -> TrainingPicture:
    put(folder, "a.png", "x", scene(seed=seed))
    return read_pictures(keys or settings(folder))[0][0]


VIEW = crop_view((48, 32), (32, 24))


def test_latents_are_computed_once(tmp_path: Path) -> None:
    picture, encode, keys = one(tmp_path / "p"), Encoder(), settings()
    first = LatentCache(tmp_path / "cache", fingerprint="b").get(picture, VIEW, keys, encode)
    cache = LatentCache(tmp_path / "cache", fingerprint="b")
    again = cache.get(picture, VIEW, keys, encode)
    cache.get(picture, VIEW, keys, encode)
    assert encode.calls == 1
    assert (cache.hits, cache.misses, cache.damaged) == (1, 0, 0)
    seen = prepare(picture, VIEW, keys)
    assert torch.equal(first.latents, Encoder()(seen.pixels[None])[0])
    assert torch.equal(again.latents, first.latents)
    assert torch.equal(again.sizes, seen.sizes)
    assert again.mask is None
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    assert torch.equal(load_file(file)["latents"], first.latents)  # the safetensors library can read the file
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.name.endswith(".tmp")]


def test_cache_key_depends_on_everything_that_changes_pixels(tmp_path: Path) -> None:
    picture, encode = one(tmp_path / "p"), Encoder()

    def get(picture: TrainingPicture, view: View = VIEW, base: str = "b", **keys: Any) -> None:
        LatentCache(tmp_path / "cache", fingerprint=base).get(picture, view, settings(**keys), encode)

    get(picture)
    for n, view in enumerate(
        [crop_view((48, 32), (24, 24)), crop_view((48, 32), (32, 24), flip=True), crop_view((48, 32), (24, 32))]
    ):
        get(picture, view)
        assert encode.calls == n + 2
    get(picture, base="another base")
    assert encode.calls == 5
    get(
        picture, background="black", mask_floor=0.5, caption_dropout=0.2
    )  # these settings do not affect the cached latents
    assert encode.calls == 5
    get(one(tmp_path / "p", seed=1))
    assert encode.calls == 6
    get(one(tmp_path / "elsewhere"))  # another folder, but equal bytes
    assert encode.calls == 6


def test_masks_and_backgrounds_are_part_of_the_key(tmp_path: Path) -> None:
    image = scene()
    image.putalpha(Image.linear_gradient("L").resize((48, 32)))
    put(tmp_path, "a.png", "x", image)
    picture, encode = read_pictures(settings(tmp_path))[0][0], Encoder()
    cache = LatentCache(tmp_path / "cache", fingerprint="b")
    white = cache.get(picture, VIEW, settings(background="white"), encode)
    assert torch.equal(cache.get(picture, VIEW, settings(background="#ffffff"), encode).latents, white.latents)
    assert not torch.equal(cache.get(picture, VIEW, settings(background="black"), encode).latents, white.latents)
    assert encode.calls == 2
    put(tmp_path, "a.mask.png", None, Image.linear_gradient("L").rotate(90).resize((48, 32)))
    masked = read_pictures(settings(tmp_path))[0][0]
    row = cache.get(masked, VIEW, settings(), encode)
    full = prepare(masked, VIEW, settings()).mask
    assert torch.allclose(row.mask, full.reshape(1, 3, 8, 4, 8).mean((2, 4)))
    floored = cache.get(masked, VIEW, settings(mask_floor=0.5), encode).mask
    assert torch.allclose(floored, 0.5 + 0.5 * row.mask, atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "another's"])
def test_a_damaged_entry_is_counted_and_recomputed(tmp_path: Path, damage: str) -> None:
    picture, encode, keys = one(tmp_path / "p"), Encoder(), settings()
    good = LatentCache(tmp_path / "cache", fingerprint="b").get(picture, VIEW, keys, encode)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    mirrored = crop_view((48, 32), (32, 24), flip=True)
    LatentCache(tmp_path / "other", fingerprint="b").get(picture, mirrored, keys, encode)
    (other,) = (tmp_path / "other").rglob("*.safetensors")
    whole = {"cut": file.read_bytes()[:-8], "empty": b"", "text": b"no", "another's": other.read_bytes()}
    file.write_bytes(whole[damage])
    after = LatentCache(tmp_path / "cache", fingerprint="b")
    assert torch.equal(after.get(picture, VIEW, keys, encode).latents, good.latents)
    assert (after.hits, after.misses, after.damaged) == (0, 1, 1)
    healed = LatentCache(tmp_path / "cache", fingerprint="b")
    assert torch.equal(healed.get(picture, VIEW, keys, encode).latents, good.latents)
    assert (healed.hits, healed.damaged) == (1, 0)


def test_prompt_embeddings_are_cached_by_fingerprint(tmp_path: Path) -> None:
    calls = []

    def encode(prompt: str) -> dict[str, Tensor]:
        calls.append(prompt)
        value = torch.full((1, 3, 2), float(len(prompt)), dtype=torch.bfloat16)
        return {"embeds": value, "mask": torch.ones(1, 3, dtype=torch.bool)}

    for _ in range(2):
        entry = TextCache(tmp_path, fingerprint="b").get("a fox", encode)
        assert entry["embeds"].dtype == torch.bfloat16
        assert entry["embeds"].tolist() == [[[5.0, 5.0]] * 3]
        assert entry["mask"].dtype == torch.bool
    TextCache(tmp_path, fingerprint="c").get("a fox", encode)
    TextCache(tmp_path, fingerprint="c").get("", encode)
    assert calls == ["a fox", "a fox", ""]


def test_the_cache_works_in_memory_only_and_on_disk_only(tmp_path: Path) -> None:
    picture, encode, keys = one(tmp_path / "p"), Encoder(), settings()
    cache = LatentCache(None, fingerprint="b", memory=0)
    for _ in range(2):
        cache.get(picture, VIEW, keys, encode)
    assert encode.calls == 1
    disk = LatentCache(tmp_path / "cache", fingerprint="b", memory=0)
    for _ in range(3):
        disk.get(picture, VIEW, keys, encode)
    assert (disk.misses, disk.hits) == (1, 2)


def test_nonfinite_latents_are_refused_and_not_cached(tmp_path: Path) -> None:
    picture = one(tmp_path / "p")
    with pytest.raises(DataError, match=r"not finite(.|\n)*a\.png(.|\n)*float16"):
        LatentCache(tmp_path / "cache", fingerprint="b").get(picture, VIEW, settings(), lambda x: x[:, :1] / 0)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ResourceError, match="no room to write"):
        LatentCache(tmp_path / "cache", fingerprint="b").get(one(tmp_path / "p"), VIEW, settings(), Encoder())
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.undo()
    with pytest.raises(ResourceError, match="cannot be written"):
        LatentCache(tmp_path / "file", fingerprint="b").get(one(tmp_path / "p"), VIEW, settings(), Encoder())
