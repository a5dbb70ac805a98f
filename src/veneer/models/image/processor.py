"""Process Qwen-Image-Edit's prompts: texts with pictures, as in Qwen2.5-VL.

    processor = read_processor(folder)
    processor(text=["…<|vision_start|><|image_pad|><|vision_end|>make it red"], images=[picture],
    return_tensors="pt")

transformers' Qwen2VLProcessor needs torchvision for videos. This processor combines the tokenizer and the
Pillow image processor, and repeats each picture token once for each merged patch of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSORS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")
"""transformers processor classes that `PicturePrompts` replaces."""
_PICTURE_TOKEN = "<|image_pad|>"


class PicturePrompts:
    """A tokenizer and an image processor for texts that contain pictures."""

    def __init__(self, pictures: Any, tokenizer: Any) -> None:
        self.pictures, self.tokenizer = pictures, tokenizer

    def __call__(self, text: Sequence[str], images: Image | Sequence[Image] | None = None, **options: Any) -> Any:
        """Return a transformers BatchFeature with input_ids and attention_mask.

        With pictures, the result also has pixel_values (patches, values per patch) and image_grid_thw
        (pictures, 3). `options`: tokenizer options."""
        from transformers import BatchFeature

        encoded: dict[str, Any] = {}
        filled = list(text)
        if images is not None:
            encoded = dict(self.pictures(images=images, return_tensors="pt"))
            merged = (encoded["image_grid_thw"].prod(-1) // self.pictures.merge_size**2).tolist()
            counts = iter(merged)
            for i, part_text in enumerate(filled):
                first, *following = part_text.split(_PICTURE_TOKEN)
                filled[i] = first + "".join(_PICTURE_TOKEN * next(counts) + part for part in following)
        return BatchFeature({**self.tokenizer(filled, **options), **encoded})


def read_processor(folder: Path) -> PicturePrompts:
    """Load the processor from a folder with a tokenizer and preprocessor_config.json."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pictures = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return PicturePrompts(pictures, AutoTokenizer.from_pretrained(folder, local_files_only=True))
