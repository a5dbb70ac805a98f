"""Parse tensor names, and detect which tool wrote a file.

    key = module text + suffix    `split_key`. ROLES lists the suffixes of all tools; module_tensors.py
                                  explains the suffixes
    lora_A.NAME.weight            `check_one_adapter`: PEFT removes the adapter's name from the keys when it
                                  saves an adapter. A state dict taken from a model still has such keys and
                                  can hold several adapters
    layout                        `detect_format` returns the tool and the reasons for choosing it. A file
                                  that mixes the names of several tools can be read too

| format        | names                                                                                        |
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

This module uses only names, and does not need torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from veneer.errors import AdapterError

ROLES: dict[str, str] = {
    "A": r"lora_A(?:\.[^.]+)?\.weight|(?:lora_|lora\.|lora_linear_layer\.)?down\.weight",
    "B": r"lora_B(?:\.[^.]+)?\.weight|(?:lora_|lora\.|lora_linear_layer\.)?up\.weight",
    "mid": r"lora_mid\.weight",
    "rows A": r"lora_embedding_A(?:\.[^.]+)?",
    "rows B": r"lora_embedding_B(?:\.[^.]+)?",
    "bias of B": r"lora_B(?:\.[^.]+)?\.bias",
    "magnitude of outputs": r"lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",
    **{
        name: name
        for name in (
            *("alpha", "dora_scale", "scalar", "bias_indices", "bias_values", "bias_size"),
            *(f"hada_w{n}_{ab}" for n in "12" for ab in "ab"),
            *("hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_t2"),
            *(f"lokr_w{n}_{ab}" for n in "12" for ab in "ab"),
            *("diff", "diff_b", "w_norm", "b_norm", "on_input", "set_weight", "reshape_weight"),
        )
    },
}
REFUSED: dict[str, str] = {
    r"oft_blocks|oft_diag|oft_R(?:\.[^.]+)?(?:\.weight)?|rescale": "OFT (or BOFT), which rotates the weight",
    r"boft_R(?:\.[^.]+)?|boft_s(?:\.[^.]+)?": "BOFT, which rotates the weight",
    r"[ab][12]\.weight|bm\.weight": "GLoRA: its change depends on the weight",
    r"[qp]_layer\.weight|lambda_layer": "T-LoRA: its rank depends on the timestep",
    r"ia3_l(?:\.[^.]+)?": "PEFT's (IA)³, which scales the bias too",
    r"lokr_t1": "a LoKr with a core on its first factor, which LyCORIS itself never reads",
}
_ANY = "|".join(f"(?:{p})" for p in (*ROLES.values(), *REFUSED, "weight|scale"))
# Matches the shortest module text before a complete suffix. One faulty converter joins module and suffix with
# `_`, as in `_lora_down`.
_KEY = re.compile(rf"(?P<module>.+?)(?:\.|_(?=lora_(?:up|down|mid)\.weight$))(?P<suffix>{_ANY})")


def split_key(key: str) -> tuple[str, str] | None:
    """Return (module text, suffix) of a tensor's name, or None if the suffix is unknown.

    The module text is returned exactly as in the file: `x.processor.to_q_lora.down.weight` gives
    `x.processor.to_q_lora` and `down.weight`; for XLabs' `double_blocks.0.processor.qkv_lora1.up.weight`, the
    module text ends with `qkv_lora1`."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match["module"], match["suffix"])


_NAMED = re.compile(
    r".+\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save)"
    r"(?:\.(?!weight$|bias$)(?P<name>[^.]+))?(?:\.[^.]+)*"
)


def check_one_adapter(keys: Iterable[str], *, where: str = "") -> None:
    """Raise AdapterError, naming every adapter, if the keys belong to several adapters."""
    counts = Counter(match["name"] or "" for key in keys if (match := _NAMED.fullmatch(key)))
    if len(counts) > 1:
        listing = ", ".join(f"{n or '(no name)'} ({count} tensors)" for n, count in sorted(counts.items()))
        fix = "save each adapter to its own file, as PEFT's save_pretrained does"
        raise AdapterError(f"the file holds {len(counts)} adapters: {listing}", where=where, fix=fix)


_RULES: tuple[tuple[str, str, str], ...] = (
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
        "BFL's names without a prefix, with biases of B or scales of norms",
    ),
    (
        "diffusers-old",
        r".*(\.processor\.|_lora\.(down|up)\.|\.lora\.(down|up)\.|\.lora_linear_layer\.).*",
        "diffusers' names from before PEFT",
    ),
    ("diffusers", r"(unet|transformer|text_encoder(_[23])?)\..*|.*\.lora_(A|B|magnitude_vector).*", "diffusers' names"),
    ("plain", r".*\.(lora_(down|up|mid)\.weight|alpha|dora_scale)", "module names without a prefix, with lora_down"),
)
_COMPILED = [(name, re.compile(pattern), why) for name, pattern, why in _RULES]
FORMATS = (*(name for name, _, _ in _RULES), "gguf", "mlx", "tinker")
# A single name of one of these formats decides the format, even if most names match another format.
_MARKS = {"bfl-control", "xlabs", "lycoris", "onetrainer"}


def detect_format(keys: Iterable[str], metadata: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the detected format, and the reasons: each kind of name with its count.

    The format is "unknown" if no name matches."""
    keys = list(keys)
    counts: Counter[str] = Counter()
    for key in keys:
        counts.update([next((name for name, pattern, _ in _COMPILED if pattern.fullmatch(key)), "unknown")])
    formats = [name for name, _ in counts.most_common() if name != "unknown"]
    marked = [name for name in formats if name in _MARKS]
    name = (marked or formats or ["unknown"])[0]
    why = {name: why for name, _, why in _RULES}
    reasons = [f"{counts[n]} of {len(keys)} tensors: {why[n]}" for n in formats]
    if metadata.get("lora_adapter_metadata"):
        reasons.append("lora_adapter_metadata, as diffusers writes it")
    if metadata.get("ss_network_module"):
        reasons.append(f"ss_network_module = {metadata['ss_network_module'][:80]}")
    if name in ("diffusers", "peft", "comfyui") and any(key.endswith(".alpha") for key in keys):
        reasons.append("an alpha for each module")
    if counts["unknown"]:
        reasons.append(f"{counts['unknown']} of {len(keys)} tensors: unknown layout")
    return name, reasons
