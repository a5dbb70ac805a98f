"""In which pieces a step's work is done: numbers alone, for whoever does the work and whoever counts it.

Loads no torch: a plan reads these before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ATTENTION_BLOCK = 64
"""Queries a block of attention. Fewer skip more of the triangle, in work and in kept probabilities; more make larger
products. A whole step at 512 tokens a row: 64 takes 1.5% longer than 128 and 0.15 GB less; 256 and above lose on
both."""
COPIES_OUT = 2
"""Copies of activations to the host that are on their way at once: more only hold memory, where the link is what is
waited for."""
MICRO_TOKENS = 2048
"""Tokens of a micro-batch where nobody says it: all of them on a CPU, whose products are as fast as they get from about
this n; the least on a GPU (`micro_tokens`)."""
_MOST_MICRO_TOKENS = 16384
_ABOVE_CORNER = 3.0
"""Operations a byte, in corners of the roof, that a product is given: at the corner itself none is at its roof.
Assumed; no card was timed."""
_DEQUANTISING = 0.05
"""Share of a product's time that dequantizing its weight may take."""


def micro_tokens(
    device: str, corner: float, *, weights: float, operations: float, values: float, code_bytes: float | None = None
) -> int:
    """Tokens of a micro-batch from which more do not help, a power of 2. `device`: its type, as torch has it. `corner`:
    operations a second over bytes a second, where its roof bends: 295 of an H100 (989 TFLOP/s at 3.35 TB/s), 153 of an
    A100. Of a base's layers: `weights` W of all products; `operations` O, those that a token is multiplied with (fewer
    where it picks experts); `values` A of inputs and outputs a token; `code_bytes` of a weight that is kept in codes.

    n tokens do 2·n·O operations and move 2·(W + n·A) bytes in 16 bits, so they are k corners up the roof from

        n = W / (O/(k·corner) − A)

    which for one square weight is 1/(1/(k·corner) − 2/width). Where the width keeps products about there or
    below, more tokens help until weights are a fifth of what is moved: n = 4·W/A. Codes are dequantized before a
    product, which moves them and 2 bytes; a twentieth of the product's time is n = 20·corner·(2 + code)/2·W/O.

    Llama 3.1 8B on an H100: 1,233, so 2,048; in nf4 7,375, so 8,192. Memory may allow fewer (plan/fit.py)."""
    if device != "cuda":
        return MICRO_TOKENS
    reach = operations / (_ABOVE_CORNER * corner) - values
    wanted = min(4 * weights / values, weights / reach if reach > 0 else math.inf)
    if code_bytes is not None:
        wanted = max(wanted, corner * (2 + code_bytes) / 2 / _DEQUANTISING * weights / operations)
    return min(_MOST_MICRO_TOKENS, max(MICRO_TOKENS, power_of_2(math.ceil(wanted))))


def logits_chunk(device: str) -> int:
    """Positions whose logits exist at once in `ops.loss.token_nll`. `device`: its type, as torch has it.

    Each chunk reads the whole head, so r positions do at most r operations for a byte. 256 on a CPU; on a GPU that is
    below the 295 that an H100 wants, whatever the vocabulary. 1,024 there: 1 / (1/1,024 + 1/4,096 + 1/128,256) = 814 at
    Llama 3.1 8B's sizes, and logits of 0.26 GB (Gemma 3: 0.54 GB), which are gone when the backward pass makes its own
    on the way."""
    return 1024 if device == "cuda" else 256


HEAD_CHUNK = 128
"""Positions whose logits exist at once where the head has to be called (models/text/loss.py)."""
ROW_STEP = 16
"""Rows are attended to as if their lengths were multiples of this where `few_sizes` rounds a batch."""
SMALL_INPUT = 1 << 18
"""Elements of an input up to which its low-rank products are worth compiled calls, which keep no factors (1,024 × 80:
0.37 ms instead of 0.61 for three pairs of rank 16; 4,096 × 640: 16.7 instead of 14.9)."""


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def few_sizes(n: int) -> int:
    """n rounded up to one of few sizes, no more than a sixteenth (or 15) above it: 16, 32, … 512, 544, … 1024, 1088, …

    oneDNN compiles a product for each number of rows that it meets and keeps it with its scratch until there are 1,024
    others. Rows of ever new lengths never come to an end of that, and tensors of ever new sizes leave holes in the
    heap."""
    step = max(ROW_STEP, 1 << max(0, (n - 1).bit_length() - 5))
    return n + -n % step


def padded_tokens(tokens: int, wanted: int) -> int:
    """Tokens of a batch, padding included, of which the outputs of `wanted` are used.

    Always more than `few_sizes(wanted)`: whether a layer gave all of them or those that are used is told by their
    number."""
    return max(few_sizes(tokens), few_sizes(few_sizes(wanted) + 1))


def grouped_rows(lengths: Sequence[int], *, waste: float = 0.25, step: int = 1) -> list[tuple[int, list[int]]]:
    """Rows that are attended to together, from long to short: (places of each, the rows' indices).

    A row is at most `waste` of its group's longest shorter than that; places are the longest's length, rounded up to a
    multiple of `step`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    out: list[tuple[int, list[int]]] = []
    while order:
        longest = lengths[order[0]]
        taken = sorted(i for i in order if lengths[i] >= longest * (1 - waste))
        out.append((longest + -longest % step, taken))
        order = [i for i in order if i not in set(taken)]
    return out


def key_ranges(length: int, window: int | None = None) -> list[tuple[int, int, int]]:
    """(first query, end, first key) of each block of queries of a row; its keys run from `first key` to `end`: those up
    to the block's end, no further back than `window`."""
    size = min(ATTENTION_BLOCK, length)
    return [(q, min(q + size, length), 0 if window is None else max(0, q - window + 1)) for q in range(0, length, size)]
