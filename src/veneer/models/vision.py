"""Describe pictures with a local vision-language model through transformers.

    model = load_vision("Qwen/Qwen2.5-VL-3B-Instruct")
    description = model.describe(picture)         description.text · description.cut

Pictures are described one at a time with greedy decoding, so a description depends only on the model, the
instruction and the pixels. A model with a chat template gets a chat message; other models (BLIP, Florence-2)
get their own prompt format. Code in a model's repository is never run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BaseError, ConfigError, lacks_memory, quoted
from veneer.files.weights import stored_dtype, tensor_table
from veneer.models.config import read_config_json
from veneer.models.device import check_memory, choose_device, choose_dtype, limit_threads
from veneer.models.loading import check_loaded, device_map_to, errors_only, loading
from veneer.models.sources import base_outline, find_base

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

INSTRUCTION = (
    "Describe this picture in one or two sentences, for training an image generator: its subject first, then how it "
    "looks and where it is. Plain sentences, no introduction."
)
_PROMPTS = {"florence2": "<MORE_DETAILED_CAPTION>", "paligemma": "caption en"}
"""Default prompts of some families without a chat template.

All other families without a chat template get only the picture."""
_SIDE = 1024
"""Maximum length in pixels of a picture's longer side.

Larger pictures are scaled down, because some processors would otherwise keep every pixel."""
_ENDS = ".!?"
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Description:
    """A description of a picture. `cut`: whether the model reached the token limit.

    A cut description ends after its last complete sentence, if it has one."""

    text: str
    cut: bool = False


@dataclass
class VisionModel:
    """A vision-language model and its processor.

    `family`: the architecture's name in transformers."""

    name: str
    model: Any
    processor: Any
    dtype: torch.dtype
    device: torch.device
    dtype_reason: str

    @property
    def family(self) -> str:
        return str(self.model.config.model_type)

    def describe(self, picture: Image, instruction: str | None = None, *, max_tokens: int = 120) -> Description:
        """Return a greedy description of a picture, in one line of printable characters.

        `instruction`: the prompt; by default INSTRUCTION for a chat model, otherwise the family's default
        prompt. Raises BaseError if the model cannot process the picture or the instruction."""
        import torch

        picture = picture.convert("RGB")
        picture.thumbnail((_SIDE, _SIDE))
        try:
            with errors_only(), torch.no_grad():
                inputs = self._inputs(picture, instruction).to(self.device, self.dtype)
                ids = self.model.generate(**inputs, **_GREEDY, max_new_tokens=max_tokens)[0].tolist()
                prompt_ids = inputs["input_ids"][0].tolist() if "input_ids" in inputs else []
                new = ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else ids
                text = self.processor.decode(new, skip_special_tokens=True)
        except Exception as error:
            if lacks_memory(error):
                raise
            message = " ".join(str(error).split())[:300] or type(error).__name__
            failure = f"{self.name} ({self.family}) cannot describe this picture: {message}"
            raise BaseError(failure, fix="another --instruction, or another model") from error
        return _clean(text, cut=len(new) >= max_tokens and new[-1] not in self._stops)

    @property
    def _stops(self) -> set[int]:
        stops = self.model.generation_config.eos_token_id
        return set(stops) if isinstance(stops, list) else {stops}

    def _inputs(self, picture: Image, instruction: str | None) -> Any:
        if getattr(self.processor, "chat_template", None):
            question = {"type": "text", "text": INSTRUCTION if instruction is None else instruction}
            chat = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
            return self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        words = _PROMPTS.get(self.family) if instruction is None else instruction
        return self.processor(images=picture, return_tensors="pt", **({"text": words} if words else {}))


def _clean(text: str, cut: bool) -> Description:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if cut and (sentence_end := max(line.rfind(end) for end in _ENDS) + 1):
        line = line[:sentence_end]
    return Description(line, cut)


def load_vision(
    name: str, *, dtype: str = "auto", device: str = "auto", say: Callable[[str], None] | None = None
) -> VisionModel:
    """Find and load a vision-language model from a transformers directory or a hub id.

    `dtype`, `device`, `say`: as in `models.text.base.load_text`. Raises BaseError (not found, incomplete,
    without a processor, or not an image-to-text model), ConfigError (an unknown dtype or device),
    ResourceError (not enough memory)."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    # Check the config of a hub model before downloading its weights.
    path = base_outline(name, say=say) or find_base(name, say=say)
    file = path / "config.json"
    if not file.is_file():
        raise _no_model(path, "it has no transformers config.json")
    read_config_json(file)
    config = _read("config", path, lambda: AutoConfig.from_pretrained(path, **_HERE))
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _no_model(path, f"a {quoted(config.model_type)} reads no pictures")
    processor = _read("processor", path, lambda: AutoProcessor.from_pretrained(path, **_HERE))
    if getattr(processor, "image_processor", None) is None:
        raise _no_model(path, "its processor reads no pictures")
    path = find_base(name, say=say)
    table = tensor_table(path)
    where = choose_device(device)
    limit_threads()
    kind, reason = choose_dtype(dtype, where, stored_dtype(table))
    check_memory(path, sum(t.elements * kind.itemsize for t in table), kind, where)
    with loading():
        model, info = _read(
            "model",
            path,
            lambda: AutoModelForImageTextToText.from_pretrained(
                path,
                config=config,
                dtype=kind,
                use_safetensors=True,
                output_loading_info=True,
                device_map=device_map_to(where),
                **_HERE,
            ),
        )
    check_loaded(path, info)
    model.to(where).eval().requires_grad_(False)
    return VisionModel(name, model, processor, kind, where, reason)


_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _read(part: str, path: Path, read: Callable[[], Any]) -> Any:
    try:
        with errors_only():
            return read()
    except Exception as error:
        if lacks_memory(error) or isinstance(error, ConfigError):
            raise
        message = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "try a newer transformers: pip install -U transformers" if "architecture" in message else None
        if isinstance(error, ImportError):  # a package is missing, such as torchvision or num2words
            fix = "install the packages that it needs, or use another model"
        raise BaseError(f"cannot read the {part} of this model: {message}", where=str(path), fix=fix) from error


def _no_model(path: Path, why: str) -> BaseError:
    fix = "one of transformers' AutoModelForImageTextToText: Qwen2.5-VL, SmolVLM, LLaVA, Florence-2, BLIP, …"
    return BaseError(f"this model cannot describe pictures: {why}", where=str(path), fix=fix)
