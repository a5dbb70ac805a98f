"""The tensors of one module, as the tools name them, and the pair and deltas they stand for; and back.

| suffixes (any of)                                                  | reading                                  |
| lora_down/_up, lora_A/_B, lora.down/.up, lora_linear_layer.…,      | pair, s = alpha/rank; no alpha: s = 1    |
| down/up (`.default` too)                                           |                                          |
| … with lora_mid (Tucker)                                           | A'[p,i,k…] = Σ_q mid[p,q,k…]·down[q,i]   |
| lora_B.bias                                                        | delta of the bias, with the pair's s     |
| bias_indices, bias_values, bias_size (sparse, LyCORIS)             | dense delta beside the pair, with its s  |
| hada_w1_a …_w2_b, hada_t1, hada_t2                                 | LoHa, s = alpha/(rows of w1_b)           |
| lokr_w1 or _a·_b, lokr_w2 or _a·_b (lokr_t2)                       | LoKr, s = alpha/rank; 1 if both are full |
| weight, on_input                                                   | (IA)³ gain                               |
| diff, diff_b · w_norm, b_norm                                      | dense deltas of weight and bias          |
| set_weight · scale, or weight alone (a vector)                     | whole new weight                         |
| dora_scale (out, 1…) or (1, in, 1…) · lora_magnitude_vector (out)  | magnitude of the pair, the LoHa, the LoKr|

Sources: the files of sd-scripts, LyCORIS, PEFT, diffusers and ComfyUI. A LoHa or LoKr of a convolution may be stored
flat: its shape is (out, in·k·k) until `fitted` to the weight. Knows one module's tensors; no names of modules, no
files. LyCORIS ignores alpha where both factors of a LoKr are full; PEFT's own LoKr files do not, and say so in a config
that this module does not see. Reading is in `leaves_read`, writing in `leaves_write`.
"""

from __future__ import annotations

from veneer.formats.leaves_read import MAX_RANK, Leaf, fitted, read_leaf, split_key, widened
from veneer.formats.leaves_write import write_leaf

__all__ = ["MAX_RANK", "Leaf", "fitted", "read_leaf", "split_key", "widened", "write_leaf"]
