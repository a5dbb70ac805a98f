"""Sizes of the parts that a step's work is divided into, for execution and planning.

Does not import torch, because planning reads these sizes before anything is loaded.
"""

from __future__ import annotations

import math

MICRO_TOKENS = 2048
"""Default tokens per micro-batch. On a CPU, products reach full speed at about this size. On a GPU, this is
the minimum of `micro_tokens`."""
_MOST_MICRO_TOKENS = 16384
_ABOVE_CORNER = 3.0
"""Target arithmetic intensity of a product, as a multiple of the roofline's ridge point. At the ridge point
itself, no product reaches peak speed. This value is an assumption, not a measurement."""
_DEQUANTIZING = 0.05
"""Maximum share of a product's time spent dequantizing its weight."""


def micro_tokens(
    device: str, corner: float, *, weights: float, operations: float, values: float, code_bytes: float | None = None
) -> int:
    """Return the tokens per micro-batch, a power of 2, above which speed stops improving.

    device: torch's device type.
    corner: operations per second over bytes per second, the ridge point of the roofline: 295 for an H100 (989
        TFLOP/s at 3.35 TB/s), 153 for an A100.
    weights: W, number of weights in all products of the base's layers.
    operations: O, number of weights that one token is multiplied by (less than W for mixtures of experts).
    values: A, inputs and outputs per token.
    code_bytes: bytes per weight stored as codes.

    n tokens take 2·n·O operations and move 2·(W + n·A) bytes in 16 bits, so they reach k times the ridge
    point at

        n = W / (O/(k·corner) − A)

    which for one square weight is 1/(1/(k·corner) − 2/width). If the width limits products to about this
    intensity or less, more tokens help until weights are a fifth of the bytes moved: n = 4·W/A. Dequantizing
    codes before a product moves the codes and 2 bytes per weight, which takes a twentieth of the product's
    time at n = 20·corner·(2 + code)/2·W/O.

    Llama 3.1 8B on an H100: 1,233, rounded up to 2,048; in nf4 7,375, rounded up to 8,192. Memory can limit n
    further (plan/fit.py)."""
    if device != "cuda":
        return MICRO_TOKENS
    reach = operations / (_ABOVE_CORNER * corner) - values
    tokens = min(4 * weights / values, weights / reach if reach > 0 else math.inf)
    if code_bytes is not None:
        tokens = max(tokens, corner * (2 + code_bytes) / 2 / _DEQUANTIZING * weights / operations)
    return min(_MOST_MICRO_TOKENS, max(MICRO_TOKENS, power_of_2(math.ceil(tokens))))


def logits_chunk(device: str) -> int:
    """Return how many positions' logits `ops.loss.token_nll` computes at a time.

    device: torch's device type.

    The result is 256 on a CPU and 1,024 on a GPU. Each chunk reads the whole head, so r positions take at
    most r operations per byte. With 256 positions, this is below the 295 operations per byte that an H100
    needs, whatever the vocabulary. 1,024 positions reach 1 / (1/1,024 + 1/4,096 + 1/128,256) = 814 operations
    per byte at Llama 3.1 8B's sizes. Their logits take 0.26 GB (Gemma 3: 0.54 GB) and are freed before the
    backward pass allocates its own temporaries."""
    return 1024 if device == "cuda" else 256


HEAD_CHUNK = 128
"""Number of positions per chunk of logits if the head must be called as a module (models/text/loss.py)."""
ROW_STEP = 16
"""Minimum step of `rounded_sizes`, in tokens."""
SMALL_INPUT = 1 << 18
"""Maximum number of input elements for the compiled low-rank products, which save no intermediate factors.
With three pairs of rank 16 and inputs of 1,024 × 80, the compiled products take 0.37 ms and torch's take
0.61 ms; with inputs of 4,096 × 640, the compiled products take 16.7 ms and torch's take 14.9 ms."""


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def rounded_sizes(n: int) -> int:
    """Round n up to one of a few sizes: by at most a sixteenth, or by up to 15.

    The sizes are 16, 32, … 512, 544, … 1024, 1088, …. oneDNN compiles a product for each number of rows and
    caches the 1,024 most recent ones with their scratch memory. If every batch had a new size, oneDNN would
    compile at every step, and the heap would fragment."""
    step = max(ROW_STEP, 1 << max(0, (n - 1).bit_length() - 5))
    return n + -n % step


def padded_tokens(tokens: int, expected: int) -> int:
    """Return the number of tokens that a batch is padded to.

    expected: number of tokens whose outputs are used.

    The result always exceeds `rounded_sizes(expected)`, because a layer's number of output rows shows whether
    the layer returned all tokens or only those with used outputs."""
    return max(rounded_sizes(tokens), rounded_sizes(rounded_sizes(expected) + 1))
