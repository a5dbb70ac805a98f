"""Edge pictures, which the ControlNets are trained on beside depths: white lines on black, as Canny draws them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def edges(pictures: Tensor | NDArray[np.uint8]) -> Tensor:
    """Canny edges (thresholds 100 and 200) of pictures: (n, 3, h, w) in -1 … 1, or (n, h, w, 3) uint8.

    Returns (n, 3, h, w) in -1 … 1: lines at 1, the rest at -1."""
    import cv2

    if isinstance(pictures, Tensor):
        pictures = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    lines = np.stack([cv2.Canny(np.ascontiguousarray(picture), 100, 200) for picture in pictures])
    return torch.from_numpy(lines).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1).contiguous()
