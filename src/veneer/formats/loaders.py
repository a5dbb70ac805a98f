"""Check tensor names against the rules of other tools' loaders.

A loader walks its model, forms a key from each module's name, and loads what it finds under the key. Most
loaders silently drop other keys, so a name with a missing or extra level has no effect, even if veneer's own
reader accepts it.

| target    | rule of                                                    | key for module m of the model              |
| peft      | PeftModel.load_adapter (load_state_dict, not strict)       | base_model.model.m                         |
| vllm      | parse_fine_tuned_lora_name, get_lora(m) for each m         | base_model.model.m                         |
| diffusers | load_lora_weights: keys by a component's prefix, then PEFT | unet.m, transformer.m, text_encoder(_2).m  |
| kohya     | LoRANetwork.create_modules of sd-scripts and musubi-tuner  | lora_unet_, lora_te(1, 2, 3)_ + m, _ for . |
| comfyui   | comfy/lora.py, model_lora_keys_unet and _clip              | diffusion_model.m, text_encoders.NAME.m    |

m is the module's name in the tool's own model class. For a language model, m is the canonical name. For a
denoiser, m has no component prefix and is the original name (kohya, ComfyUI) or the name in diffusers' class.
formats/gguf.py has its own table for llama.cpp's names. This module uses only names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from veneer.formats.keys import split_key
from veneer.formats.kohya import LYCORIS
from veneer.formats.names import choose_family
from veneer.formats.topology import Family, flat

_LOADERS = {"peft": "PEFT", "vllm": "vLLM", "kohya": "sd-scripts", "comfyui": "ComfyUI"}
_PEFT_KEY = re.compile(
    r"(?P<module>.+?)(\.base_layer)*\.(lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?"
    r"|token_adapter\.trainable_tokens_delta|base_layer\.(weight|bias)|bias)"
)


def _class_names(modules: Iterable[str]) -> dict[str, str]:
    """Map canonical names to the names within the model's own class, as PEFT expects.

    The component prefix is removed only if one image family has all the modules. The reader adds the prefix
    under the same condition. No language model has a module called `unet`."""
    modules = list(modules)
    choice = choose_family(dict.fromkeys(modules))
    is_pipeline = choice.family is not None and all(m in choice.family.modules for m in modules)
    is_pipeline = is_pipeline or all(m.startswith("unet.") for m in modules)
    return {m: m.partition(".")[2] if is_pipeline else m for m in modules}


def unreachable(modules: Collection[str], keys: Iterable[str], to: str, family: Family | None = None) -> list[str]:
    """Return one line for each name that the target's loader would not load.

    Covers `keys` that match no module of the target's model, and canonical `modules` without a key.

    family: the image family, required for the targets diffusers, kohya and comfyui."""
    loader = _LOADERS.get(to, to)
    if family is None:
        expected: Mapping[str, Collection[str]] = {
            f"base_model.model.{name}": [m] for m, name in _class_names(modules).items()
        }
        texts = {_module_of(key, expected) for key in keys}
    else:
        expected = _expected_keys(family, to)
        texts = {parts[0] if (parts := split_key(key)) else key for key in keys}
    reached = {module for text in texts for module in expected.get(text, ())}
    out = [f"{text}: {loader} reads no such module" for text in sorted(texts - set(expected))]
    return out + [f"{module}: {loader} would find no tensors for it" for module in sorted(set(modules) - reached)]


def _module_of(key: str, expected: Mapping[str, Collection[str]]) -> str:
    """Return the module of a PEFT key: the text before PEFT's suffix.

    For a key of a full copy, return the longest prefix that is in `expected`."""
    match = _PEFT_KEY.fullmatch(key)
    if match is not None and (match["module"] in expected or not key.endswith(".bias")):
        return match["module"]
    parts = key.split(".")  # a bias can belong to a full copy, or to a module inside a full copy
    owners = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((owner for owner in owners if owner in expected), match["module"] if match else key)


def _expected_keys(family: Family, to: str) -> Mapping[str, Collection[str]]:
    """Return {key: canonical modules}; tensors named with the key change these modules."""
    out: dict[str, list[str]] = defaultdict(list)
    for module in family.modules:
        component, _, name = module.partition(".")
        if to == "diffusers":
            out[module].append(module)
        elif component != family.denoiser and to == "kohya":
            out[family.kohya_encoder(component) + flat(name)].append(module)
        elif component != family.denoiser:
            out[f"text_encoders.{family.comfyui_encoder(component)}.transformer.{name}"].append(module)
        elif to == "kohya" and family.diffusers_named:
            out[f"lora_unet_{flat(name)}"].append(module)
    if to != "diffusers" and not (to == "kohya" and family.diffusers_named):
        for original, targets in family.originals.items():
            text = f"lora_unet_{flat(original)}" if to == "kohya" else f"diffusion_model.{original}"
            out[text] += [target.module for target in targets]
            for target in targets if len(targets) > 1 else ():  # LyCORIS and ComfyUI also name a fused module's parts
                out[LYCORIS + flat(target.module.partition(".")[2])].append(target.module)
    return out
