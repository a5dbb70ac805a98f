"""Offloaded activations: bit-equal gradients, ordered copies, few buffers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.models.text.offload import ActivationOffloader
from veneer.ops.step_sizes import COPIES_OUT

LAYERS, SIZE = 7, (5, 64)


class InOrder:
    """Copies run at once."""

    def to_host(self, source: Tensor, into: Tensor) -> Any:
        into.copy_(source)

    def to_device(self, source: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        return source.to(device), None

    def wait(self, event: Any) -> None:
        """Copies are synchronous."""

    def record_use(self, tensor: Tensor) -> None:
        """Copies are synchronous."""


class Late:
    """A copy stream whose copies run only when something waits for them or for a later copy.

    Without the wait, a reader gets NaN. Counts the copies that are not complete."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], Any]] = []
        self.done = 0
        self.most_back = self.back_open = 0
        self.log: list[str] = []

    def to_host(self, source: Tensor, into: Tensor) -> int:
        self.queue.append(lambda: into.copy_(source))  # which holds its memory, as record_stream does
        self.log.append("out")
        return len(self.queue)

    def to_device(self, source: Tensor, device: torch.device) -> tuple[Tensor, int]:
        into = torch.full_like(source, float("nan"))
        self.queue.append(lambda: into.copy_(source))
        self.log.append("back")
        self.back_open += 1
        self.most_back = max(self.most_back, self.back_open)
        return into, len(self.queue)

    def wait(self, event: int) -> None:
        while self.done < event:
            self.queue[self.done]()
            self.done += 1
        self.log.append("wait")

    def record_use(self, tensor: Tensor) -> None:
        assert tensor.isfinite().all(), "read before it came"
        self.back_open -= 1


class Layer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(SIZE[1], SIZE[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def gradients(layers: list[Layer], run: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    for layer in layers:
        layer.zero_grad()
    y = x.clone().requires_grad_()
    out = y
    for layer in layers:
        out = run(layer, out)
    out.square().sum().backward()
    assert y.grad is not None
    found = [y.grad]
    for layer in layers:
        assert layer.linear.weight.grad is not None
        found.append(layer.linear.weight.grad.clone())
    return found


@pytest.mark.parametrize("stream", [InOrder, Late])
def test_offloaded_gradients_are_bit_equal(stream: Callable[[], Any]) -> None:
    layers, store = [Layer(i) for i in range(LAYERS)], ActivationOffloader(stream(), least=1)
    for step in range(3):  # later steps use the buffers again
        x = torch.randn(*SIZE, generator=torch.Generator().manual_seed(step))
        plain = gradients(layers, lambda layer, x: layer(x), x)
        assert all(map(torch.equal, gradients(layers, store.checkpoint, x), plain))


def test_offload_prefetches_with_few_buffers() -> None:
    stream = Late()
    layers, store = [Layer(i) for i in range(LAYERS)], ActivationOffloader(stream, least=1)
    gradients(layers, store.checkpoint, torch.randn(*SIZE))
    assert stream.log.count("out") == stream.log.count("back") == LAYERS
    assert stream.most_back == 2  # the one layer is s, and the one before it
    forward = stream.log[: stream.log.index("back")]
    assert forward.count("wait") == LAYERS - COPIES_OUT  # the host never runs further ahead
    first = stream.log.index("back")
    assert stream.log[first : first + 3] == ["back", "back", "wait"], (
        "the next copy is queued before this one is awaited"
    )


def test_host_buffers_are_reused_after_release() -> None:
    class Seen(InOrder):
        def __init__(self) -> None:
            self.buffers: list[int] = []

        def to_host(self, source: Tensor, into: Tensor) -> Any:
            self.buffers.append(into.data_ptr())
            return super().to_host(source, into)

    stream = Seen()
    layers, store = [Layer(i) for i in range(LAYERS)], ActivationOffloader(stream, least=1)
    for _ in range(3):
        gradients(layers, store.checkpoint, torch.randn(*SIZE))
        gc.collect()
    assert len(stream.buffers) == 3 * LAYERS
    assert len(set(stream.buffers)) == LAYERS
    x = torch.randn(*SIZE, requires_grad=True)
    first, second = (store.checkpoint(layers[0], x) for _ in range(2))  # two that wait at once
    assert stream.buffers[-1] != stream.buffers[-2]
    (first.sum() + second.sum()).backward()


def test_small_tensors_are_not_prepacked() -> None:
    stream = Late()
    gradients([Layer(0)], ActivationOffloader(stream).checkpoint, torch.randn(*SIZE))
    assert not stream.log
