"""How the tools call the tensors of one module: suffix -> role; the table of what they mean is in `leaves`. Knows names
alone."""

from __future__ import annotations

import re

__all__ = ["REFUSED", "ROLES", "split_key"]

ROLES: dict[str, str] = {
    "A": r"lora_A(?:\.[^.]+)?\.weight|(?:lora_|lora\.|lora_linear_layer\.)?down\.weight|down",
    "B": r"lora_B(?:\.[^.]+)?\.weight|(?:lora_|lora\.|lora_linear_layer\.)?up\.weight|up",
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
    r"oft_blocks|oft_diag|oft_R(?:\.[^.]+)?(?:\.weight)?|rescale": "OFT (or BOFT), which turns the weight",
    r"boft_R(?:\.[^.]+)?|boft_s(?:\.[^.]+)?": "BOFT, which turns the weight",
    r"[ab][12]\.weight|bm\.weight": "GLoRA, whose change depends on the weight",
    r"[qp]_layer\.weight|lambda_layer": "T-LoRA, whose rank depends on the timestep",
    r"ia3_l(?:\.[^.]+)?": "PEFT's (IA)³, which scales the bias too",
    r"lokr_t1": "a LoKr with a core on its first factor, which LyCORIS itself never reads",
}
_ANY = "|".join(f"(?:{p})" for p in (*ROLES.values(), *REFUSED, "weight|scale"))
# The shortest module text that leaves a whole suffix. `_lora_down` is how one mistaken converter joined the two;
# a colon is how lists of pairs (`unet:0:up`) do.
_KEY = re.compile(
    rf"(?P<module>.+?)(?:\.|_(?=lora_(?:up|down|mid)\.weight$)|(?<=\d):(?=(?:up|down)$))(?P<suffix>{_ANY})"
)


def split_key(key: str) -> tuple[str, str] | None:
    """(module text, suffix) of a tensor's name, or None for a name that no adapter format ends like this.

    The module text is as the file has it: `x.processor.to_q_lora.down.weight` gives `x.processor.to_q_lora` and
    `down.weight`, XLabs' `double_blocks.0.processor.qkv_lora1.up.weight` the text up to `qkv_lora1`, and `unet:0:up`
    gives `unet:0` and `up`."""
    match = _KEY.fullmatch(key)
    if match is None or (match["suffix"] in ("up", "down") and ":" not in key):
        return None
    return match["module"], match["suffix"]
