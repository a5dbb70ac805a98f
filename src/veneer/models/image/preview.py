"""What a picture looks like before it is done: a batch's latents between two steps, through the VAE.

    x̂₀ = x − σ·(x − x_before) / (σ − σ_before)

Euler's steps go straight, so the last one points at what the denoiser takes the finished picture to be. Schedulers that
step otherwise show their latents as they are, noise included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.models.image.predict import decode_latents, unpacked

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.models.image.base import ImageBase

__all__ = ["Preview"]

_STRAIGHT = ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


class Preview:
    """One batch of pictures of one size on its way. `step` is told of each step, `look` shows a row."""

    def __init__(self, base: ImageBase, width: int, height: int) -> None:
        self.base, self.width, self.height = base, width, height
        self._before: Tensor | None = None
        self._now: Tensor | None = None
        self._scheduler: Any = None

    def step(self, scheduler: Any, latents: Tensor) -> None:
        self._before, self._now, self._scheduler = self._now, latents, scheduler

    @torch.no_grad()
    def look(self, row: int) -> Image:
        """The picture of one row as far as it is."""
        from PIL import Image as pil

        latents = unpacked(self.base, self._ahead()[row : row + 1], self.width, self.height)
        pixels = (decode_latents(self.base, latents)[0].float() / 2 + 0.5).clamp(0, 1).nan_to_num()
        return pil.fromarray((pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy())

    def _ahead(self) -> Tensor:
        now, before = self._now, self._before
        assert now is not None, "no step was taken"
        at = getattr(self._scheduler, "step_index", None)
        if before is None or not at or type(self._scheduler).__name__ not in _STRAIGHT:
            return now
        was, sigma = (float(self._scheduler.sigmas[i]) for i in (at - 1, at))
        return now - sigma * (now - before) / (sigma - was) if sigma != was else now
