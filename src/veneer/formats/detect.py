"""Which tool's layout the names of a file are, and why. Knows names; reads nothing, and what it says decides nothing:
a file of several tools' names is read all the same.

| format        | names                                                                                        |
| cloneofsimo   | unet:0:up                                                                                    |
| xlabs         | ….processor.qkv_lora1.down.weight                                                            |
| bfl-control   | double_blocks.… without a prefix, with lora_B.bias or the norms' scales                      |
| lycoris       | LoHa, LoKr, (IA)³, full differences; lycoris_…                                               |
| onetrainer    | lora_transformer_…                                                                           |
| kohya         | lora_unet_… lora_te…                                                                         |
| comfyui       | diffusion_model.… (ai-toolkit writes it with lora_A, ComfyUI's own nodes with lora_down)     |
| peft          | base_model.model.…                                                                           |
| diffusers-old | ….processor.to_q_lora.down.weight, ….lora.down.weight, ….lora_linear_layer.down.weight       |
| diffusers     | unet.… transformer.… text_encoder.… with lora_A; also without a prefix                       |
| plain         | module names without a prefix, with lora_down                                                |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

__all__ = ["FORMATS", "format_of"]

_RULES: tuple[tuple[str, str, str], ...] = (
    ("cloneofsimo", r"(unet|text_encoder):\d+:(up|down)", "numbered pairs"),
    ("xlabs", r".*\.processor\.(qkv|proj)_lora[12]?\..*", "XLabs' processor names"),
    (
        "lycoris",
        r"lycoris_.*|.*\.(hada_|lokr_|on_input|diff$|diff_b$|w_norm|b_norm|bias_(indices|values|size)).*",
        "LyCORIS' prefix or tensors",
    ),
    ("onetrainer", r"lora_transformer_.*", "the prefix lora_transformer_"),
    ("kohya", r"lora_(unet|te\d?)_.*", "the prefixes lora_unet_ and lora_te"),
    ("comfyui", r"(model\.)?diffusion_model\..*|text_encoders\..*", "the prefix diffusion_model."),
    ("peft", r"base_model\.model\..*", "the prefix base_model.model."),
    (
        "bfl-control",
        r"(double|single)_blocks\..*(lora_B\.bias|_norm\.scale)",
        "BFL's names without a prefix, biases of B or scales of norms",
    ),
    (
        "diffusers-old",
        r".*(\.processor\.|_lora\.(down|up)\.|\.lora\.(down|up)\.|\.lora_linear_layer\.).*",
        "diffusers' names of before PEFT",
    ),
    (
        "diffusers",
        r"(unet|transformer|text_encoder(_[23])?)\..*|.*\.lora_(A|B|magnitude_vector).*",
        "diffusers' names",
    ),
    ("plain", r".*\.(lora_(down|up|mid)\.weight|alpha|dora_scale)", "module names without a prefix, with lora_down"),
)
_COMPILED = [(name, re.compile(pattern), why) for name, pattern, why in _RULES]
FORMATS = (*(name for name, _, _ in _RULES), "gguf")
# These mark a whole file; the names beside theirs are plain ones of another format.
_MARKS = {"bfl-control", "xlabs", "lycoris", "cloneofsimo", "onetrainer"}


def format_of(keys: Iterable[str], metadata: Mapping[str, str]) -> tuple[str, list[str]]:
    """The format, and the reasons: what names there are and how many of each; "unknown" where none is known."""
    keys = list(keys)
    counts: Counter[str] = Counter()
    for key in keys:
        counts.update([next((name for name, pattern, _ in _COMPILED if pattern.fullmatch(key)), "unknown")])
    known = [name for name, _ in counts.most_common() if name != "unknown"]
    marked = [name for name in known if name in _MARKS]
    name = (marked or known or ["unknown"])[0]
    why = {name: why for name, _, why in _RULES}
    reasons = [f"{counts[n]} of {len(keys)} tensors: {why[n]}" for n in known]
    if metadata.get("lora_adapter_metadata"):
        reasons.append("lora_adapter_metadata, as diffusers writes it")
    if metadata.get("ss_network_module"):
        reasons.append(f"ss_network_module = {metadata['ss_network_module'][:80]}")
    if name in ("diffusers", "peft", "comfyui") and any(key.endswith(".alpha") for key in keys):
        reasons.append("an alpha for each module beside it")
    if counts["unknown"]:
        reasons.append(f"{counts['unknown']} of {len(keys)} tensors: no layout known here")
    return name, reasons
