"""Caches of latents and text embeddings on disk, keyed by a hash of their inputs.

    latents = LatentCache(folder, fingerprint=base.fingerprint)
    entry = latents.get(picture, view, settings, encode)   encode: (1, 3, h, w) pixels -> (1, c, h/f, w/f)
    texts = TextCache(folder, fingerprint=base.fingerprint)
    tensors = texts.get("a red fox", encode)               encode: prompt -> {name: tensor}

The key of an entry is a sha256 digest of the bytes of the image file and the mask file, the view, the settings
that change pixels, the encoder's fingerprint, and `_VERSION`. A changed image, crop or base has a new key, so
entries are never stale. Entries are safetensors files with a checksum. A damaged entry is counted and
recomputed. Each entry is encoded separately, so its content does not depend on other entries. Writes are
atomic, so runs can share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterError, DataError, ResourceError
from veneer.files.safetensors import read_tensors, write_tensors
from veneer.train.config.image import ImageDataSection
from veneer.train.image.augmentation import View, latent_mask, prepare
from veneer.train.image.pictures import TrainingPicture

_VERSION = 2  # version of the file format and of the pixel processing; a new version invalidates all entries
_CHECKSUM = "veneer.sha256"


@dataclass(frozen=True)
class LatentRow:
    """The latents of a view.

    latents: (c, h/f, w/f); mask: (1, h/f, w/f) float32 in 0..1 or None; sizes: (6,) float32 time ids."""

    latents: Tensor
    mask: Tensor | None
    sizes: Tensor


class _Store:
    """A store of cache entries by key, kept in `folder` and, up to `memory` bytes, in memory.

    Without a folder, entries are in memory only.

    hits: number of entries that were read. misses: number of entries that were computed. damaged: number of
    entries that were recomputed because their file was invalid."""

    def __init__(self, folder: str | Path | None, *, fingerprint: str, memory: int = 1 << 30) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.fingerprint = fingerprint
        self.hits = self.misses = self.damaged = 0
        self._free_bytes = memory
        self._entries: dict[str, dict[str, Tensor]] = {}

    def _get(
        self, inputs: Sequence[Any], label: object, compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the entry for `inputs`, a list of JSON values. If there is no entry, compute it.

        label: what is encoded, for error messages."""
        key = hashlib.sha256(json.dumps([_VERSION, self.fingerprint, *inputs]).encode()).hexdigest()
        if key in self._entries:
            return self._entries[key]
        path = None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"
        entry = self._read(path, key) if path is not None and path.exists() else None
        if entry is None:
            entry = {n: t.detach().to("cpu").contiguous() for n, t in compute().items()}
            _require_finite(entry, label)
            if path is not None:
                _write(path, key, entry)
            self.misses += 1
        else:
            self.hits += 1
        size = sum(t.nbytes for t in entry.values())
        if self.folder is None or size <= self._free_bytes:
            self._free_bytes -= size
            self._entries[key] = entry
        return entry

    def _read(self, path: Path, key: str) -> dict[str, Tensor] | None:
        """Return the entry, or None if the file is truncated or altered, or if it has another key.

        Such files are counted in `damaged`."""
        with contextlib.suppress(AdapterError, ValueError, OSError):
            tensors, metadata = read_tensors(path)
            entry = {n: t.clone() for n, t in tensors.items()}
            if metadata.get(_CHECKSUM) == _checksum(key, entry):
                return entry
        self.damaged += 1
        return None


class LatentCache(_Store):
    """A cache of latents.

    fingerprint: identifies the encoder by the base's fingerprint and the dtype."""

    def get(
        self, picture: TrainingPicture, view: View, settings: ImageDataSection, encode: Callable[[Tensor], Tensor]
    ) -> LatentRow:
        """Return the latents of a view, its mask on the grid of the latents, and its time ids.

        encode: (1, 3, h, w) float32 pixels in -1..1 -> (1, c, h/f, w/f).

        Raises DataError if the image has changed on disk since it was read, or if its latents are not finite;
        ResourceError if the disk is full."""
        has_mask = picture.alpha or picture.mask is not None
        content: list[Any] = [picture.digest, settings.colour if picture.transparent else None]
        content += [picture.mask_digest, picture.alpha, settings.mask_floor if has_mask else None]

        @torch.no_grad()
        def compute() -> dict[str, Tensor]:
            prepared = prepare(picture, view, settings)
            out = {"latents": encode(prepared.pixels[None])[0]}
            if prepared.mask is not None:
                out["mask"] = latent_mask(prepared.mask, *out["latents"].shape[-2:])
            return out

        tensors = self._get(["latents", content, *_view_key(view)], picture.path, compute)
        sizes = torch.tensor(view.time_ids, dtype=torch.float32)
        return LatentRow(tensors["latents"], tensors.get("mask"), sizes)


class TextCache(_Store):
    """A cache of text embeddings.

    fingerprint: the base's fingerprint, with the dtype and length of encoded prompts."""

    def get(
        self,
        prompt: str,
        encode: Callable[[str], Mapping[str, Tensor]],
        references: Sequence[tuple[TrainingPicture, View]] = (),
        settings: ImageDataSection | None = None,
    ) -> dict[str, Tensor]:
        """Return the result of `encode` for the prompt, from the cache if possible.

        references: images that the encoder reads with the prompt. settings: how to decode these images.

        Raises the same errors as LatentCache.get."""
        colour = settings.colour if settings is not None else None
        pictures = [[p.digest, colour if p.transparent else None, *_view_key(view)] for p, view in references]
        inputs = ["text", prompt, *([pictures] if pictures else [])]
        return self._get(inputs, f"the prompt {prompt!r}", lambda: encode(prompt))


def _view_key(view: View) -> tuple[Any, ...]:
    return view.resized, view.top, view.left, view.width, view.height, view.flip


def _require_finite(entry: Mapping[str, Tensor], label: object) -> None:
    for name, tensor in entry.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            fix = "encode in bfloat16 or float32: SDXL's own VAE overflows in float16"
            raise DataError(f"the encoder's `{name}` are not finite numbers", where=str(label), fix=fix)


def _checksum(key: str, entry: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256(key.encode())
    for name, tensor in sorted(entry.items()):
        h.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        h.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _write(path: Path, key: str, entry: Mapping[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, entry, {_CHECKSUM: _checksum(key, entry)})
    except (OSError, AdapterError) as error:
        message = f"the cache cannot be written: {getattr(error, 'what', None) or getattr(error, 'strerror', error)}"
        fix = "free some space, or set data.cache to a folder that can be written"
        raise ResourceError(message, where=str(path), fix=fix) from None
