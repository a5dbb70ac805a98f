"""Sizes into which a step's work is divided, shared by execution and planning.

Does not load torch: plans read these sizes before anything is loaded.
"""

from __future__ import annotations

import math

MICRO_TOKENS = 2048
"""Default tokens of a micro-batch: on a CPU, products reach full speed at about this n; on a GPU, the
minimum (`micro_tokens`)."""
_MOST_MICRO_TOKENS = 16384
_ABOVE_CORNER = 3.0
"""Arithmetic intensity of a product as a multiple of the roofline's corner: at the corner itself, no
product reaches its roof. Assumed; no card was timed."""
_DEQUANTIZING = 0.05
"""Share of a product's time that dequantizing its weight can take."""


def micro_tokens(
    device: str, corner: float, *, weights: float, operations: float, values: float, code_bytes: float | None = None
) -> int:
    """Return the micro-batch tokens, a power of 2, beyond which more do not help.

    device: torch's device type.
    corner: operations per second over bytes per second, the corner of the roofline: 295 for an H100 (989
        TFLOP/s at 3.35 TB/s), 153 for an A100.
    weights: W, of all products of the base's layers.
    operations: O, weights that one token is multiplied by (fewer if tokens choose experts).
    values: A, inputs and outputs per token.
    code_bytes: bytes per weight stored as codes.

    n tokens take 2·n·O operations and move 2·(W + n·A) bytes in 16 bits, so they are at k corners of the
    roofline from

        n = W / (O/(k·corner) − A)

    which for one square weight is 1/(1/(k·corner) − 2/width). If the width keeps products at about this
    intensity or below, more tokens help until weights are a fifth of the bytes moved: n = 4·W/A.
    Dequantizing codes before a product moves the codes and 2 bytes per weight; that is a twentieth of the
    product's time at n = 20·corner·(2 + code)/2·W/O.

    Llama 3.1 8B on an H100: 1,233, so 2,048; in nf4 7,375, so 8,192. Memory can allow fewer (plan/fit.py)."""
    if device != "cuda":
        return MICRO_TOKENS
    reach = operations / (_ABOVE_CORNER * corner) - values
    tokens = min(4 * weights / values, weights / reach if reach > 0 else math.inf)
    if code_bytes is not None:
        tokens = max(tokens, corner * (2 + code_bytes) / 2 / _DEQUANTIZING * weights / operations)
    return min(_MOST_MICRO_TOKENS, max(MICRO_TOKENS, power_of_2(math.ceil(tokens))))


def logits_chunk(device: str) -> int:
    """Return the positions whose logits exist at once in `ops.loss.token_nll`.

    device: torch's device type. Each chunk reads the whole head, so r positions take at most r operations
        per byte. 256 on a CPU; on a GPU that is below the 295 that an H100 needs, whatever the vocabulary.
        1,024 on a GPU: 1 / (1/1,024 + 1/4,096 + 1/128,256) = 814 at Llama 3.1 8B's sizes, and logits of
        0.26 GB (Gemma 3: 0.54 GB), which are freed before the backward pass allocates its own temporaries."""
    return 1024 if device == "cuda" else 256


HEAD_CHUNK = 128
"""Positions whose logits exist at once if the head must be called as a module (models/text/loss.py)."""
ROW_STEP = 16
"""Least step of `rounded_sizes`, in tokens."""
SMALL_INPUT = 1 << 18
"""Elements of an input up to which compiled calls, which keep no factors, pay off for low-rank products
(1,024 × 80: 0.37 ms instead of 0.61 for three pairs of rank 16; 4,096 × 640: 16.7 instead of 14.9)."""


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def rounded_sizes(n: int) -> int:
    """Round n up to one of few sizes, at most a sixteenth (or 15) larger.

    16, 32, … 512, 544, … 1024, 1088, … oneDNN compiles a product for each number of rows and caches it
    with its scratch memory until there are 1,024 others. Rows of always new lengths would keep compiling,
    and tensors of always new sizes would fragment the heap."""
    step = max(ROW_STEP, 1 << max(0, (n - 1).bit_length() - 5))
    return n + -n % step


def padded_tokens(tokens: int, expected: int) -> int:
    """Return the tokens of a padded batch; `expected` of its outputs are used.

    Always more than `rounded_sizes(expected)`, because the number of outputs tells whether a layer returned all
    tokens or only the used ones."""
    return max(rounded_sizes(tokens), rounded_sizes(rounded_sizes(expected) + 1))
