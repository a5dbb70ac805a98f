"""What reads the prompts of Qwen-Image-Edit: texts in which pictures stand, as Qwen2.5-VL takes them.

    processor = read_processor(folder)
    processor(text=["…<|vision_start|><|image_pad|><|vision_end|>make it red"], images=[picture], return_tensors="pt")

transformers' Qwen2VLProcessor cannot be made without torchvision, for the films that it also reads. This one is of the
two parts of it that pictures need, its tokenizer and its processor of pictures on Pillow, and does between them what
it does: each picture's token stands once for each merged patch of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.models.compat_transformers import TRANSFORMERS

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSORS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")
"""transformers' classes of which an index may say that they read the prompts."""
_PLACE = "<|image_pad|>"


class PicturePrompts:
    """Tokens of texts, and the patches of the pictures that stand in them, in their order."""

    def __init__(self, pictures: Any, tokenizer: Any) -> None:
        self.pictures, self.tokenizer = pictures, tokenizer

    def __call__(self, text: Sequence[str], images: Image | Sequence[Image] | None = None, **options: Any) -> Any:
        """transformers' BatchFeature: input_ids, attention_mask; pixel_values (patches, values of one) and
        image_grid_thw (pictures, 3) with pictures. `options`: of the tokenizer."""
        from transformers import BatchFeature

        seen: dict[str, Any] = {}
        filled = list(text)
        if images is not None:
            seen = dict(self.pictures(images=images, return_tensors="pt"))
            merged = (seen["image_grid_thw"].prod(-1) // self.pictures.merge_size**2).tolist()
            counts = iter(merged)
            for i, one in enumerate(filled):
                first, *rest = one.split(_PLACE)
                filled[i] = first + "".join(_PLACE * next(counts) + part for part in rest)
        return BatchFeature({**self.tokenizer(filled, **options), **seen})


def read_processor(folder: Path) -> PicturePrompts:
    """Of a component's folder: preprocessor_config.json, and a tokenizer."""
    from transformers import AutoTokenizer

    kind = TRANSFORMERS("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil")
    return PicturePrompts(
        kind.from_pretrained(folder, local_files_only=True),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )
