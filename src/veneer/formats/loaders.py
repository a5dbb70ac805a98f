"""Under which names the loaders of other tools look for a module: what is written is checked by their rules, not ours.

A loader walks the model that it loads into, makes of each module's name the text that it expects in a file, and takes
what it finds there. What no module asks for is dropped, by most of them without a word: so a name that has lost or
gained a level has no effect, however well veneer's own reader, which knows many spellings, would read it back.

| target    | whose rule                                                 | asked for, for module m of its model       |
| peft      | PeftModel.load_adapter (load_state_dict, not strict)       | base_model.model.m                         |
| vllm      | parse_fine_tuned_lora_name, get_lora(m) for each m         | base_model.model.m                         |
| tgi       | adapters/lora.py, map_weights_for_model                    | base_model.model.m                         |
| diffusers | load_lora_weights: keys by a component's prefix, then PEFT | unet.m, transformer.m, text_encoder(_2).m  |
| kohya     | LoRANetwork.create_modules of sd-scripts and musubi-tuner  | lora_unet_, lora_te(1, 2, 3)_ + m, _ for . |
| comfyui   | comfy/lora.py, model_lora_keys_unet and _clip              | diffusion_model.m, text_encoders.NAME.m    |

m is the name in that tool's own class: a language model's as it is; a denoiser's without the component, under the names
of the original code (kohya, ComfyUI) or of diffusers' class. llama.cpp's names are in formats/gguf.py, from its own
table. Knows names; no tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from veneer.formats.keys import split_key
from veneer.formats.kohya import LYCORIS
from veneer.formats.names import choose_family
from veneer.formats.topology import Family, flat

_LOADERS = {"peft": "PEFT", "vllm": "vLLM", "tgi": "TGI", "kohya": "sd-scripts", "comfyui": "ComfyUI"}
_PEFT_KEY = re.compile(
    r"(?P<module>.+?)(\.base_layer)*\.(lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?"
    r"|token_adapter\.trainable_tokens_delta|base_layer\.(weight|bias)|bias)"
)


def _own_names(modules: Iterable[str]) -> dict[str, str]:
    """Canonical name -> the name in its own class, to which PEFT would attach it. Only where one image family has every
    module is a component taken off: the same condition under which the reader puts it on. (No language model calls
    anything `unet`.)"""
    modules = list(modules)
    choice = choose_family(dict.fromkeys(modules))
    whole = choice.family is not None and all(m in choice.family.modules for m in modules)
    whole = whole or all(m.startswith("unet.") for m in modules)
    return {m: m.partition(".")[2] if whole else m for m in modules}


def unreachable(modules: Collection[str], keys: Iterable[str], to: str, family: Family | None = None) -> list[str]:
    """One line for each name in `keys` that no module of the target's model asks for, and each of the canonical
    `modules` that is meant and that its loader finds nothing for. `family`: of an image model's targets."""
    loader = _LOADERS.get(to, to)
    if family is None:
        asked: Mapping[str, Collection[str]] = {
            f"base_model.model.{own}": [m] for m, own in _own_names(modules).items()
        }
        texts = {_module_of(key, asked) for key in keys}
    else:
        asked = _asked(family, to)
        texts = {parts[0] if (parts := split_key(key)) else key for key in keys}
    found = {module for text in texts for module in asked.get(text, ())}
    out = [f"{text}: {loader} asks for no such module" for text in sorted(texts - set(asked))]
    return out + [f"{module}: {loader} would find nothing for it" for module in sorted(set(modules) - found)]


def _module_of(key: str, asked: Mapping[str, Collection[str]]) -> str:
    """The module of a key of a PEFT file: in front of PEFT's suffix, or, of a full copy, the longest that is asked
    for."""
    match = _PEFT_KEY.fullmatch(key)
    if match is not None and (match["module"] in asked or not key.endswith(".bias")):
        return match["module"]
    parts = key.split(".")  # a bias can be one of a full copy, and of a module inside it
    owners = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((owner for owner in owners if owner in asked), match["module"] if match else key)


def _asked(family: Family, to: str) -> Mapping[str, Collection[str]]:
    """Text -> the canonical modules that what is found under it changes."""
    out: dict[str, list[str]] = defaultdict(list)
    for module in family.modules:
        component, _, own = module.partition(".")
        if to == "diffusers":
            out[module].append(module)
        elif component != family.denoiser and to == "kohya":
            out[family.kohya_encoder(component) + flat(own)].append(module)
        elif component != family.denoiser:
            out[f"text_encoders.{family.comfyui_encoder(component)}.transformer.{own}"].append(module)
        elif to == "kohya" and family.diffusers_named:
            out[f"lora_unet_{flat(own)}"].append(module)
    if to != "diffusers" and not (to == "kohya" and family.diffusers_named):
        for original, places in family.originals.items():
            text = f"lora_unet_{flat(original)}" if to == "kohya" else f"diffusion_model.{original}"
            out[text] += [place.module for place in places]
            for place in places if len(places) > 1 else ():  # LyCORIS' and ComfyUI's names for rows of it
                out[LYCORIS + flat(place.module.partition(".")[2])].append(place.module)
    return out
