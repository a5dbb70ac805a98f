"""What a training run on a language model holds in memory at its peak, part by part, counted and not measured.

    text_memory(shape, load, device)        bytes by part

What a layer keeps for its backward pass is what the autograd functions of ops save; with N tokens in the micro-batch of
which M are trained (both as models/text/loss.py rounds them up for 16 bits on a CPU), P places of attention (shorter
rows of a group are padded to its longest), hidden d, heads H and K of dim h, gated width f, e bytes a value:

    e·(2N·d + P·(H + 2K)·h)       the first norm's input and output, q, k and v as they are turned
    M'·e·(H·h + 2d + 2f + …)      attention's output, the second norm's input and output, gate and up; M' is M in the
                                  last layer where the fast paths leave the other tokens out, else N
    e·Σ rank·(N + in + out)       x·Aᵀ of each pair, and its factors as they were cast and stacked
    e·N·(2d + (H + 2K)·h)         with DoRA, what its gains multiply
    e·H·Σ blocks                  probabilities, on a CPU without the tiles of ops/cpu/tiles.c: those, and flash
                                  attention, make them again from the output and log Σ exp (4·N·H bytes)

On a GPU the pairs' factors are cast once a step, are nobody's zeros and stay: they are counted with the adapter.

The peak is where the backward pass begins: everything is kept, and the last layer's gradients are made. Gradients of
the pairs come as activations go, so they count only where they are more, or where a step has several micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from veneer.ops.sizes import (
    COPIES_OUT,
    HEAD_CHUNK,
    ROW_STEP,
    SMALL_INPUT,
    few_sizes,
    grouped_rows,
    key_ranges,
    logits_chunk,
    padded_tokens,
)
from veneer.plan.pairs import PairCosts
from veneer.plan.shape import LayerShape, LinearShape, TextShape, layer_pairs, pair_parameters
from veneer.plan.tables import Device

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec

_STATES = {"adamw": 8, "adam": 8, "nadam": 8, "radam": 8, "adamax": 8, "rmsprop": 4, "adafactor": 0, "sgd": 0}
"""Bytes of an optimizer's state for each float32 parameter (Adafactor's are rows and columns: too few to count)."""

CUDA_CONTEXT = 600_000_000
"""What CUDA, cuBLAS and their kernels take before a tensor is there: 0.4 to 0.8 GB by card and driver: assumed."""
CUDA_ROUNDING = 0.05
"""Share of activations that the caching allocator cannot place (blocks of 2 MB, and holes between them): assumed."""
CPU_PROCESS = 480_000_000
"""Resident memory of Python, torch, transformers and oneDNN beside everything counted, where it is not calibrated."""
CPU_LATER = 130_000_000
"""The part of that which comes with the first steps: oneDNN's compiled products and the heap around them."""
_ON_THEIR_WAY = COPIES_OUT + 2
"""Inputs of layers on the device at once where they wait on the host: those that go, the layer's own and one more
(models/text/offload.py)."""
CPU_ROUNDING = 0.04
"""Share of activations that the C library's heap cannot place."""


@dataclass(frozen=True)
class Load:
    """What a run puts through a base. `lengths`: tokens of each row in the largest micro-batch; `trained`: the share
    of them with a loss. `micros`: micro-batches in a step. `dtype`: of the base. `quantise`: nf4, fp4, int8 or None;
    `double`: its constants are quantized too. `inputs_on_host`: inputs of recomputed layers stay in CPU memory.
    `kept`: bytes of layers that stay dequantized. `whole`: parameters trained besides the pairs (full copies, token
    rows). `compared`: each token's distribution is compared with another model's."""

    lengths: tuple[int, ...]
    trained: float = 1.0
    micros: int = 1
    rank: int = 16
    spec: LoraSpec | None = None
    dtype: str = "bfloat16"
    quantise: str | None = None
    double: bool = True
    checkpointing: bool = False
    optimizer: str = "adamw"
    inputs_on_host: bool = False
    kept: int = 0
    whole: int = 0
    compared: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def rounds(self, device: Device) -> bool:
        """Whether models/text/loss.py makes its products of few sizes."""
        return device.kind == "cpu" and self.dtype != "float32"

    def computed(self, device: Device) -> int:
        """Tokens that layers work on, padding included."""
        return padded_tokens(self.tokens, self._trained) if self.rounds(device) else self.tokens

    def wanted(self, device: Device) -> int:
        """Tokens that the head works on, padding included."""
        return few_sizes(self._trained) if self.rounds(device) else self._trained

    @property
    def _trained(self) -> int:
        return max(1, round(self.trained * self.tokens))

    def attended(self, device: Device) -> tuple[int, ...]:
        """Places of each row in attention, its padding included."""
        if device.kind != "cpu":
            return self.lengths
        groups = grouped_rows(self.lengths, step=ROW_STEP if self.rounds(device) else 1)
        return tuple(places for places, rows in groups for _ in rows)

    @property
    def begins_in_base(self) -> bool:
        """Whether pairs keep their initial values, which are subtracted again when the adapter is saved."""
        return self.spec is not None and self.spec.init in ("pissa", "olora")

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @classmethod
    def of(cls, tokens_per_row: int, micro_tokens: int, batch: int, **more: Any) -> Load:
        """A load of rows of one length, as many in a micro-batch as fit, of a step of `batch` rows."""
        rows = max(1, min(batch, micro_tokens // max(1, tokens_per_row)))
        return cls((tokens_per_row,) * rows, micros=-(-batch // rows), **more)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one device. `constants`: of quantisation. `dequantised`: the one weight that is in full
    precision at a time, and those kept so. `working`: gradients of activations on their way. `context`: the process
    (CPU) or CUDA itself. `rounding`: what the allocator cannot place. `cache`: keys and values of a server;
    `teacher`: another base, which a run learns from. `host`: bytes
    in the CPU's memory, not in the sum."""

    weights: int = 0
    constants: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    working: int = 0
    dequantised: int = 0
    context: int = 0
    rounding: int = 0
    cache: int = field(default=0, kw_only=True)
    teacher: int = field(default=0, kw_only=True)
    host: int = field(default=0, kw_only=True)

    @property
    def parts(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "host"}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def beyond_base(self) -> int:
        """What is still to be allocated once the process and the base are in memory."""
        return self.peak - self.weights - self.constants - self.context


def dtype_bytes(dtype: str) -> int:
    """Bytes of one value."""
    return 4 if dtype == "float32" else 2


def weight_bytes(shape: TextShape, dtype: str, quantise: str | None, double: bool = True) -> tuple[int, int]:
    """(weights, quantisation constants) of a base in memory.

    nf4, fp4: 4 bits a weight and an absmax for each 64, as float32, or as 8 bits with a float32 for each 256 of them:
    4 + 8/64 + 32/(64·256) = 4.127 bits (arXiv 2305.14314). int8: a byte a weight and a float32 a row. Embeddings, norms
    and head stay in `dtype`."""
    plain = shape.parameters - shape.matrices
    each = dtype_bytes(dtype)
    if quantise is None:
        return shape.parameters * each, 0
    if quantise == "int8":
        rows = sum(linear.times * linear.outputs for layer in shape.layers for linear in layer.linears)
        return plain * each + shape.matrices, 4 * rows
    bits = 8 / 64 + 32 / (64 * 256) if double else 32 / 64
    return plain * each + shape.matrices // 2, round(shape.matrices * bits / 8)


def text_memory(shape: TextShape, load: Load, device: Device, *, process: int | None = None) -> Memory:
    """Bytes by part. `process`: what the process holds before the base is loaded, as calibrated (CPU)."""
    e = dtype_bytes(load.dtype)
    weights, constants = weight_bytes(shape, load.dtype, load.quantise, load.double)
    trainable = pair_parameters(shape, load.spec, rank=load.rank) + load.whole
    pairs = layer_pairs(shape, load.spec, load.rank)
    trained, tokens = load.wanted(device), load.computed(device)
    last = len(shape.layers) - 1

    def meets(i: int) -> int:
        """Tokens that a layer works on after its attention."""
        return trained if i == last and shape.keeps else tokens

    layers = [
        _LayerMemory(layer, pairs[i], shape.hidden, load, device, meets(i)) for i, layer in enumerate(shape.layers)
    ]
    ends = e * shape.hidden * (2 * meets(last) + trained)  # the last norm's input and output, and the head's gradient
    logits = _logits(shape, trained, load, device)
    inputs = e * shape.hidden * tokens * len(layers) if load.checkpointing else 0
    away = load.inputs_on_host and device.kind == "cuda"
    if load.checkpointing:
        kept = (min(inputs, e * shape.hidden * tokens * _ON_THEIR_WAY) if away else inputs) + ends
        largest = max(layers, key=lambda one: one.kept + one.working, default=None)
        working = 0 if largest is None else largest.kept + largest.working
        working = max(logits, working) - logits
    else:
        first = e * shape.hidden * tokens if layers else 0  # the first norm's input: nothing before it is trained
        kept = sum(one.kept for one in layers) - first + ends
        # The last layer's backward comes first; when another one's needs more, the last one's is gone already.
        most = layers[-1].working
        if len(layers) > 1:
            most = max(most, max(one.working for one in layers[:-1]) - layers[-1].kept)
        working = max(0, most - logits)
    adapter, states = 4 * trainable * (1 + load.begins_in_base), _STATES.get(load.optimizer, 8) * trainable
    adapter += sum(one.cast for one in layers)
    moving = kept + logits + working
    gradients = 4 * trainable if load.micros > 1 else max(0, 4 * trainable - moving)
    dequantised = _dequantised(shape, load)
    host = inputs if away else 0
    if device.kind == "cpu":
        context, share = (CPU_PROCESS if process is None else process), CPU_ROUNDING
    else:
        context, share = CUDA_CONTEXT, CUDA_ROUNDING
    return Memory(
        weights,
        constants,
        adapter,
        gradients,
        states,
        kept,
        logits,
        working,
        dequantised,
        context,
        round(share * (moving + dequantised)),
        host=host,
    )


def memory_together(
    shape: TextShape, loads: Sequence[Load], device: Device, most: int, *, process: int | None = None
) -> tuple[Memory, int]:
    """Bytes by part of runs that are trained in one pass, and the tokens of its largest pass: the base once, the
    largest micro-batches of as many runs as make at most `most` tokens, and the adapter, gradients and optimizer of
    each."""
    lengths: tuple[int, ...] = ()
    for load in sorted(loads, key=lambda load: -load.tokens):
        if not lengths or sum(lengths) + load.tokens <= most:
            lengths += load.lengths
    widest = max(loads, key=lambda load: load.rank if load.spec is None else load.spec.rank)
    shared = replace(widest, lengths=lengths, trained=max(load.trained for load in loads))
    each = [text_memory(shape, replace(load, micros=2), device, process=process) for load in loads]
    together = replace(
        text_memory(shape, shared, device, process=process),
        adapter=sum(own.adapter for own in each),
        gradients=sum(own.gradients for own in each),
        optimizer=sum(own.optimizer for own in each),
    )
    return together, sum(lengths)


def _dequantised(shape: TextShape, load: Load) -> int:
    """The largest joined weight in the base's dtype, and what is kept dequantised."""
    if load.quantise is None:
        return 0
    products = (parts for layer in set(shape.layers) for parts in layer.products.values())
    most = max((sum(part.inputs * part.outputs for part in parts) for parts in products), default=0)
    return dtype_bytes(load.dtype) * most + load.kept


def kept_dequantised(shape: TextShape, memory: Memory, room: int) -> int:
    """Bytes of layers that may stay dequantised in `room` bytes of memory: whole layers, from the first on."""
    spare = room - memory.peak
    each = 2 * max((layer.matrices for layer in shape.layers), default=0)
    return 0 if each == 0 or spare <= 0 else min(spare // each, len(shape.layers)) * each


def packed_weights(shape: TextShape, dtype: str, faster: Callable[[int, int, bool], bool]) -> int:
    """Bytes of weights that a run keeps a second time, in the order of their products: a copy for x·Wᵀ and one for the
    gradient of x, of those that are multiplied as one together. `faster`: (out, in, whether x·Wᵀ) -> whether it is
    worth a copy. Nothing before the first layer is trained: its q, k and v need no gradient of x. Experts have none."""
    count = 0
    for i, layer in enumerate(shape.layers):
        for name, parts in layer.products.items():
            if any(part.times > 1 for part in parts):
                continue
            rows, columns = sum(part.outputs for part in parts), parts[0].inputs
            ways = (True,) if i == 0 and name == "qkv" else (True, False)
            count += sum(faster(rows, columns, turned) for turned in ways) * rows * columns
    ways_of_head = sum(faster(shape.vocabulary, shape.hidden, turned) for turned in (True, False))
    return dtype_bytes(dtype) * (count + ways_of_head * shape.vocabulary * shape.hidden)


def _logits(shape: TextShape, trained: int, load: Load, device: Device) -> int:
    """A chunk's logits, and beside them the float32 softmax where no kernel makes it in place; of two models that are
    compared, the logits and log-softmax of both and three more on the way to the divergence or back, in float32."""
    if load.compared:
        return 7 * 4 * min(trained, HEAD_CHUNK) * shape.vocabulary
    e = dtype_bytes(load.dtype)
    each = e if device.native else 8 if e == 4 else 12
    return each * min(trained, logits_chunk(device.kind)) * shape.vocabulary


@dataclass(frozen=True)
class _LayerMemory:
    """What one layer keeps between its forward and its backward pass, and what its backward pass makes on the way."""

    layer: LayerShape
    pairs: dict[str, PairCosts]
    hidden: int
    load: Load
    device: Device
    after: int

    @property
    def tokens(self) -> int:
        return self.load.computed(self.device)

    @property
    def places(self) -> tuple[int, ...]:
        return self.load.attended(self.device)

    @property
    def kept(self) -> int:
        """Bytes for the backward pass."""
        layer, d, n, m = self.layer, self.hidden, self.tokens, self.after
        e = dtype_bytes(self.load.dtype)
        heads = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
        out = layer.heads * layer.head_dim
        attended = n if self.device.tiles else sum(self.places)
        values = n * 2 * d + attended * heads + m * (out + 2 * d) + n * d * (layer.norms - 2)
        if self.device.tiles and m < n:
            values += n * out  # what attention gave, before the last layer's are picked
        if layer.head_norms:
            values += n * (layer.heads + layer.kv_heads) * layer.head_dim
        values += m * self._mlp()
        values += self._low_rank() + self._dora()
        return e * values + self._probabilities() + 4 * sum(pair.made for pair in self.pairs.values())

    def _dora(self) -> int:
        """Values that DoRA keeps beside: what its gains multiply. Of gate and up it stands in for the output, which is
        made of it again; with dropout that is made of more."""
        spec, values = self.load.spec, 0
        if spec is None or not spec.dora:
            return 0
        for name, parts in self.layer.products.items():
            own = any(part.name in self.pairs for part in parts)
            if own and (name != "gate_up" or spec.dropout):
                values += (self.tokens if name == "qkv" else self.after) * sum(part.outputs for part in parts)
        return values

    def _mlp(self) -> int:
        """Values a token of the gated MLP and of the experts."""
        values = 0.0
        for name, parts in self.layer.products.items():
            width = sum(part.active * part.outputs for part in parts)
            if name == "gate_up":
                values += width
            elif name == "experts.gate_up":  # gathered inputs, both halves, act(gate), their product, outputs
                values += 2 * width + 2 * sum(part.active * part.inputs for part in parts)
        return round(values)

    def _pairs(self, parts: Sequence[LinearShape]) -> list[tuple[LinearShape, int]]:
        """Those of the parts that have a pair, with its rank; what pairs began with is another one beside."""
        twice = 1 + self.load.begins_in_base
        having = [(part, self.pairs[part.name].rank) for part in parts if part.name in self.pairs]
        return [(part, twice * rank) for part, rank in having if rank]

    @property
    def cast(self) -> int:
        """Bytes of the pairs' factors in the base's dtype, where they outlive the layer (ops/cuda/lowrank.py)."""
        if self.device.kind == "cpu" or self.load.dtype == "float32":
            return 0
        every = (pair for parts in self.layer.products.values() for pair in self._pairs(parts))
        return dtype_bytes(self.load.dtype) * sum(r * (p.inputs + p.outputs) for p, r in every if p.times == 1)

    def _low_rank(self) -> int:
        """Values of x·Aᵀ for each pair, and of the pairs' factors as they were cast and stacked on a CPU."""
        values = 0
        for name, parts in self.layer.products.items():
            n, own = self.tokens if name == "qkv" else self.after, self._pairs(parts)
            if not own:
                continue
            if any(part.times > 1 for part, _ in own):
                values += round(sum(n * part.active * (r + part.outputs) for part, r in own))
                continue
            total = sum(r for _, r in own)
            if self.device.low_rank and self.load.dtype != "float32" and n * own[0][0].inputs <= SMALL_INPUT:
                values += n * sum(-(-r // 16) * 16 for _, r in own)
                continue
            values += n * total
            if self.device.kind != "cpu":
                continue
            rows = sum(part.outputs for part in parts)
            if self.load.dtype != "float32" or len(parts) > 1:
                values += total * own[0][0].inputs
            values += total * rows
        return values

    def _probabilities(self) -> int:
        if self.device.tiles:
            return 4 * self.tokens * self.layer.heads  # log Σ exp
        return dtype_bytes(self.load.dtype) * self.layer.heads * seen_keys(self.places, self.layer.window)

    @property
    def working(self) -> int:
        """Bytes of the backward pass of the MLP, where the most is in memory: the gradients of its output and input,
        d_h, d_gate, d_up and act(gate) ⊙ up."""
        m, d, e = self.after, self.hidden, dtype_bytes(self.load.dtype)
        widest = max(
            (
                sum(p.outputs * max(p.active, 1) for p in parts)
                for name, parts in self.layer.products.items()
                if name.endswith("gate_up")
            ),
            default=0,
        )
        copies = 2.0 if self.device.native and e == 2 else 3.0
        if self.load.spec is not None and self.load.spec.dora:  # outputs with their gains, and gradients without
            copies += 2
        mlp = m * (copies * widest + 3 * d)
        heads = (self.layer.heads + 2 * self.layer.kv_heads) * self.layer.head_dim
        attention = self.tokens * (2 * heads + 2 * self.layer.heads * self.layer.head_dim + 2 * d)
        freed = m * self._mlp()
        again = [p.outputs for parts in self.layer.products.values() for p in parts if self._is_made_again(p.name)]
        return round(e * (max(mlp, attention - freed) + self.tokens * max(again, default=0)))

    def _is_made_again(self, name: str) -> bool:
        """Whether a backward pass makes what a LoHa or LoKr had on its way."""
        return name in self.pairs and not self.pairs[name].rank


def seen_keys(lengths: Sequence[int], window: int | None = None) -> int:
    """Σ over queries of the keys that ops.attention multiplies them with: blocks of queries see all keys up to the
    block's end, no further back than the window."""
    return sum((end - q) * (end - first) for length in lengths for q, end, first in key_ranges(length, window))
