"""Peak memory of a training run, calculated from the shapes of the base's matrices.

    text_memory(shape, load, device)      memory of a text run in bytes, per part
    run_memory(counts, load, device)      the same for any base, from its counts

For the backward pass, a block saves the inputs and outputs of its matrices. With N tokens, hidden size d,
heads H and K of size h, MLP width f, and e bytes per value:

    e·N·(d + (H + 2K)·h)        the input of q, k and v, and their outputs
    e·N·(H·h + d)               the input and output of o
    e·N·(d + 2f) + e·N·d        the input of gate and up, their outputs, the output of down (its input is recomputed)
    e·N·Σ rank                  x·Aᵀ of every pair

and half as much again for each expert of a token, because experts gather their inputs.

The peak is at the start of the backward pass, when all of these values are saved and the gradients inside one
block are allocated. The size of these gradients is the block's saved bytes times a coefficient from `FITS`. A
run measures its longest batch before the first step, and shows the measured peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from veneer.ops.step_sizes import HEAD_CHUNK, logits_chunk
from veneer.plan.shape import TextShape, layer_pairs, pair_parameters
from veneer.plan.tables import Device

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec

_STATES = {"adamw": 8, "adam": 8, "adafactor": 0, "sgd": 0}
"""Bytes of optimizer state per float32 parameter. Adafactor's row and column statistics are negligible."""


class Fit(NamedTuple):
    """Coefficients that shapes do not determine.

    process: bytes before anything is loaded.
    working: bytes allocated in the backward pass of the widest block, relative to the bytes that the block
        saves.
    unplaced: share of activations lost to allocator fragmentation."""

    process: int
    working: float
    unplaced: float


FITS = {
    ("cpu", "text"): Fit(610_000_000, 1.2, 0.04),
    ("cpu", "image"): Fit(630_000_000, 2.0, 0.04),
    ("cuda", "text"): Fit(600_000_000, 1.2, 0.05),
    ("cuda", "image"): Fit(600_000_000, 2.0, 0.05),
}
"""Coefficients by device and kind of run.

CPU: fitted to the measured peaks of benchmarks/plan.py (docs/how-to/plan.md). `process` covers Python, torch,
transformers, oneDNN and, for images, diffusers. CUDA: `process` is the CUDA context with cuBLAS, 0.4 to 0.8
GB depending on card and driver. `process` and `unplaced` are assumptions, because no card was measured."""
CPU_LATER = 130_000_000
"""The part of `process` that the first steps on a CPU add, for oneDNN's compiled products and the heap."""


@dataclass(frozen=True, kw_only=True)
class RunLoad:
    """How a run trains. `size` is the number of tokens or images in a micro-batch.

    micros: micro-batches per step.
    dtype: dtype of the base.
    quantize: nf4, fp4, int8 or None.
    compute: "int8" if products with frozen weights run in 8 bits, else "auto".
    double: whether the quantization constants are quantized too.
    offload: number of blocks, counted from the last, that are in CPU memory until needed.
    base_passes: additional forward passes per step of the base without adapter."""

    micros: int = 1
    rank: int = 16
    dtype: str = "bfloat16"
    quantize: str | None = None
    compute: str = "auto"
    double: bool = True
    checkpointing: bool = False
    optimizer: str = "adamw"
    offload: int = 0
    base_passes: float = 0

    @property
    def size(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Load(RunLoad):
    """The load of a text run.

    lengths: tokens of each row in the largest micro-batch.
    trained: share of these tokens that have a loss.
    full: number of trained parameters outside the pairs (fully trained weights, token rows).
    compared: whether the loss compares each token's distribution with another model's."""

    lengths: tuple[int, ...]
    trained: float = 1.0
    spec: LoraSpec | None = field(default=None, kw_only=True)
    full: int = field(default=0, kw_only=True)
    compared: bool = field(default=False, kw_only=True)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def trained_tokens(self) -> int:
        """Return the number of tokens with a loss."""
        return max(1, round(self.trained * self.tokens))

    @property
    def size(self) -> int:
        return self.tokens

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


@dataclass
class Counts:
    """Counts of a base and of one micro-batch.

    kind: "text" or "image", as in the keys of FITS.
    buffers: values in memory that are not parameters.
    matrices: parameters that `quantize` quantizes.
    rows: number of rows of these matrices.
    largest: size of the largest weight that is dequantized at once.
    saved: values, in the base's dtype, that are saved for the backward pass.
    inputs: values in the inputs of all blocks.
    block: values that the widest block saves.
    ends: values that are saved after the last block.
    adapted: values in the inputs and outputs of adapted layers, which the low-rank products read and write again.
    delta_values: float32 values computed from an adapter's parts.
    forward, backward: operations of each pass.
    attention: the part of `forward` that multiplies queries, keys and values; `backward` contains twice as many.
    calls: products in one pass, the mean of both passes; each product has a cost that does not depend on its size.
    frozen: the part of `forward` that multiplies by frozen weights of linear layers, without the head.
    head: operations of the head in both passes.
    logits: bytes of one chunk of logits.
    blocks: parameters of each block."""

    kind: str = "text"
    parameters: int = 0
    buffers: int = 0
    matrices: int = 0
    rows: int = 0
    largest: int = 0
    trainable: int = 0
    saved: float = 0.0
    inputs: float = 0.0
    block: float = 0.0
    ends: float = 0.0
    adapted: float = 0.0
    delta_values: int = 0
    forward: float = 0.0
    backward: float = 0.0
    attention: float = 0.0
    frozen: float = 0.0
    calls: float = 0.0
    head: float = 0.0
    logits: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one device.

    constants: quantization constants.
    dequantized: the largest weight that is dequantized at once.
    working: gradients inside a block.
    context: the process (CPU) or the CUDA context.
    rounding: lost to fragmentation.
    cache: keys and values of sampled completions.
    teacher: a separate base that serves as the teacher.
    host: bytes in CPU memory, not part of the sum."""

    weights: int = 0
    constants: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    working: int = 0
    dequantized: int = 0
    context: int = 0
    rounding: int = 0
    cache: int = 0
    teacher: int = 0
    host: int = 0

    @property
    def parts(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "host"}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def beyond_base(self) -> int:
        """Return the peak bytes, not counting the process and the base."""
        return self.peak - self.weights - self.constants - self.context


def dtype_bytes(dtype: str) -> int:
    """Return the number of bytes per value."""
    return 4 if dtype == "float32" else 2


class _Weights(Protocol):
    @property
    def parameters(self) -> int: ...
    @property
    def matrices(self) -> int: ...
    @property
    def rows(self) -> int: ...


def weight_bytes(base: _Weights, dtype: str, quantize: str | None, double: bool = True) -> tuple[int, int]:
    """Return (weights, quantization constants) of a base in memory, in bytes.

    nf4, fp4: 4 bits per weight and one absmax per 64 weights. The absmax is a float32 or, if `double`, 8 bits
    plus one float32 per 256 absmax values: 4 + 8/64 + 32/(64·256) = 4.127 bits (arXiv 2305.14314). int8: one
    byte per weight and one float32 per row. Embeddings, norms and head are in `dtype`."""
    if quantize is None:
        return base.parameters * dtype_bytes(dtype), 0
    plain = (base.parameters - base.matrices) * dtype_bytes(dtype)
    if quantize == "int8":
        return plain + base.matrices, 4 * base.rows
    bits = 8 / 64 + 32 / (64 * 256) if double else 32 / 64
    return plain + base.matrices // 2, round(base.matrices * bits / 8)


def run_memory(counts: Counts, load: RunLoad, device: Device, *, process: int | None = None) -> Memory:
    """Return a run's memory in bytes, per part.

    process: bytes of the process before the base is loaded, if known (CPU)."""
    fit, e, trainable = FITS[device.kind, counts.kind], dtype_bytes(load.dtype), counts.trainable
    weights, constants = weight_bytes(counts, load.dtype, load.quantize, load.double)
    weights += e * counts.buffers
    inputs, ends = e * counts.inputs, e * counts.ends
    saved, block, host = e * counts.saved + ends + 4 * counts.delta_values, e * counts.block, 0
    working = fit.working * block
    if load.checkpointing:
        saved, working = inputs + ends, working + block
    if offloaded_blocks := offloaded(counts, load):
        host = e * sum(offloaded_blocks)
        weights -= host - e * max(offloaded_blocks)  # The block in use is on the device.
    working = max(0.0, working - counts.logits)  # the logits are already freed
    transient, dequantized = saved + counts.logits + working, e * counts.largest if load.quantize else 0
    # PiSSA and OLoRA also store the initial values
    initial_copies = 2 if getattr(getattr(load, "spec", None), "init", "") in ("pissa", "olora") else 1
    return Memory(
        weights=weights,
        constants=constants,
        adapter=(4 * initial_copies + (e if e == 2 else 0)) * trainable,  # plus 16-bit copies for 16-bit products
        gradients=4 * trainable if load.micros > 1 else max(0, 4 * trainable - round(transient)),
        optimizer=_STATES.get(load.optimizer, 8) * trainable,
        activations=round(saved),
        logits=counts.logits,
        working=round(working),
        dequantized=dequantized,
        context=fit.process if process is None else process,
        rounding=round(fit.unplaced * (transient + dequantized)),
        host=host,
    )


def offloaded(counts: Counts, load: RunLoad) -> list[int]:
    """Return the number of parameters of each block that is offloaded to CPU memory."""
    return counts.blocks[-load.offload :] if load.offload else []


def text_memory(shape: TextShape, load: Load, device: Device, *, process: int | None = None) -> Memory:
    """Return a text run's memory in bytes, per part. `process`: as in `run_memory`."""
    return run_memory(text_counts(shape, load, device), load, device, process=process)


def text_counts(shape: TextShape, load: Load, device: Device) -> Counts:
    """Return the counts of a micro-batch on a language model.

    Each weight takes 2 operations per token in the forward pass, and 2 in the backward pass, because frozen
    weights have no gradient. Attention takes 4 operations per visible key and channel in the forward pass,
    and 8 in the backward pass. The head runs only on trained tokens; on the fast paths (`shape.keeps`), the
    part of the last layer that follows its attention also runs only on trained tokens."""
    spec, tokens, trained = load.spec, load.tokens, load.trained_tokens
    initial_copies = 2 if spec is not None and spec.init in ("pissa", "olora") else 1
    dora, dropped = spec is not None and spec.dora, spec is not None and spec.dora and spec.dropout > 0
    counts = Counts(
        parameters=shape.parameters,
        matrices=shape.matrices,
        rows=shape.rows,
        largest=shape.largest,
        trainable=pair_parameters(shape, spec, rank=load.rank) + load.full,
        inputs=float(shape.hidden * tokens * len(shape.layers)),
        head=4.0 * trained * shape.vocabulary * shape.hidden,
        logits=_logits(shape, load, device),
    )
    last_tokens = tokens
    for i, (layer, pairs) in enumerate(zip(shape.layers, layer_pairs(shape, spec, load.rank), strict=True)):
        if shape.keeps and i == len(shape.layers) - 1:
            last_tokens = trained
        saved = float(tokens * layer.normed)
        for name, parts in layer.products.items():
            n, adapted = tokens if name == "qkv" else last_tokens, [part for part in parts if part.name in pairs]
            counts.calls += 1 + (dora and bool(adapted))
            values = sum(part.active * part.outputs for part in parts)
            values += parts[0].active * parts[0].inputs * (name != "down")
            saved += n * values * (1.5 if parts[0].times > 1 else 1)  # Experts gather their inputs.
            if dora and adapted and (name != "gate_up" or dropped):  # backward needs the input of the DoRA scale
                saved += n * sum(part.outputs for part in parts)
            for part in parts:
                # With DoRA and dropout, the weight is multiplied by x before and after dropout.
                times = 2 if dropped and part in adapted else 1
                counts.forward += 2.0 * times * n * part.multiplied
                counts.frozen += 2.0 * times * n * part.multiplied
                # The first layer's q, k and v need no input gradient: no trained parameter precedes them.
                counts.backward += 2.0 * times * n * part.multiplied * (i > 0 or name != "qkv")
            outputs = sum(part.active * part.outputs for part in adapted)
            counts.adapted += n * (outputs + bool(adapted) * parts[0].active * parts[0].inputs)
            for part in adapted:
                pair, uses = pairs[part.name], initial_copies * n * part.active
                saved += uses * pair.rank
                counts.delta_values += pair.delta_values
                counts.forward += uses * pair.forward
                counts.backward += uses * (pair.operations - pair.forward)
        visible = sum(visible_keys(length, layer.window) for length in load.lengths)
        attention = 4.0 * layer.heads * layer.head_dim * visible
        counts.attention += attention
        counts.forward += attention
        counts.backward += 2 * attention
        counts.saved += saved
        counts.block = max(counts.block, saved)
        counts.blocks.append(layer.matrices + layer.small)
    counts.ends = float(shape.hidden * (2 * last_tokens + trained))
    return counts


def _logits(shape: TextShape, load: Load, device: Device) -> int:
    """Return the bytes of the logits of one chunk.

    If two models are compared, this includes the logits and log-softmax of both, and three temporaries for
    the divergence and its gradient, all in float32."""
    if load.compared:
        return 7 * 4 * min(load.trained_tokens, HEAD_CHUNK) * shape.vocabulary
    return dtype_bytes(load.dtype) * min(load.trained_tokens, logits_chunk(device.kind)) * shape.vocabulary


def visible_keys(length: int, window: int | None = None) -> int:
    """Return how many keys the queries of a row see in total."""
    visible = length if window is None else min(length, window)
    return visible * (visible + 1) // 2 + (length - visible) * visible


def kept_dequantized(shape: TextShape, memory: Memory, available: int) -> int:
    """Return how many bytes of whole layers can remain dequantized in the unused memory.

    available: usable bytes of the device."""
    spare = available - memory.peak
    each = 2 * max((layer.matrices for layer in shape.layers), default=0)
    return 0 if each == 0 or spare <= 0 else min(spare // each, len(shape.layers)) * each


def packed_weights(shape: TextShape, dtype: str, faster: Callable[[int, int, bool], bool]) -> int:
    """Return the bytes of a run's prepacked weight copies.

    Each fused product has one copy for x·Wᵀ and one for the gradient of x. The first layer's q, k and v need
    no gradient of x, because nothing before them is trained. Experts have no copies.

    faster: (out, in, whether the product is x·Wᵀ) -> whether a copy is faster."""
    count = 0
    for i, layer in enumerate(shape.layers):
        for name, parts in layer.products.items():
            if any(part.times > 1 for part in parts):
                continue
            rows, columns = sum(part.outputs for part in parts), parts[0].inputs
            directions = (True,) if i == 0 and name == "qkv" else (True, False)
            count += sum(faster(rows, columns, is_forward) for is_forward in directions) * rows * columns
    ways_of_head = sum(faster(shape.vocabulary, shape.hidden, is_forward) for is_forward in (True, False))
    return dtype_bytes(dtype) * (count + ways_of_head * shape.vocabulary * shape.hidden)
