"""Losses of packed rows, and rounding of row lengths to a few sizes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.attached import attached
from tests.families import FAMILIES, VOCAB
from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.models.patching import fast_report
from veneer.models.text.fast import fast
from veneer.models.text.loss import rows_nll, text_loss, token_logps
from veneer.ops.attention import SharedRows


def some_rows(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Return rows in which only the last third of the tokens counts in the loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
    return ids, lengths, torch.cat([torch.arange(n) >= max(1, 2 * n // 3) for n in lengths])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[21, 5, 9], [3], [40], [17, 17, 16, 2, 30, 11]])
def test_padding_changes_neither_losses_nor_gradients(family: str, lengths: list[int]) -> None:
    """In float64, rounding the sizes of matrix products must change nothing."""
    model: Any = FAMILIES[family]().double()
    with attach(model) as attachment:
        adapter = create(model, LoraSpec(rank=4), seed=0)
        attachment.add("a", adapter, trainable=True)
        attachment.use("a")
        parameters = list(attachment.parameters("a").values())
        with torch.no_grad():
            for p in parameters:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        with fast(model):
            if not fast_report(model).rows:
                pytest.skip("this family takes padded rows, which are not rounded")
            found = []
            for rounded in (False, True):
                nll = rows_nll(model, *some_rows(lengths), rounded=rounded)
                found.append([nll.detach(), *torch.autograd.grad(nll.sum(), parameters)])
    for plain, padded in zip(*found, strict=True):
        assert (padded - plain).norm() <= 1e-5 * plain.norm()  # norms and adapter weights are float32


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_change_neither_losses_nor_gradients(family: str) -> None:
    """Two prompts have three and two completions, in float64.

    Losses and gradients equal those of separate rows."""
    model: Any = FAMILIES[family]().double()
    places, lengths, first = [], [], 0
    for prompt, answers in ((9, (4, 1, 6)), (5, (3, 12))):
        own = first + prompt
        for n in answers:
            places += [*range(first, first + prompt), *range(own, own := own + n)]
            lengths.append(prompt + n)
        first = own
    shared = SharedRows.from_indices(torch.tensor(places))
    ids = torch.randint(3, VOCAB, (first,), generator=torch.Generator().manual_seed(0))
    said = shared.places.bincount() == 1
    with attached(model, create(model, LoraSpec(rank=4), seed=0), trainable=True) as attachment:
        parameters = list(attachment.parameters("a").values())
        with torch.no_grad():
            for p in parameters:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))

        def found(*rows: Any) -> list[torch.Tensor]:
            logps = token_logps(model, *rows)
            return [logps.detach(), *torch.autograd.grad((logps * logps).sum(), parameters)]

        with fast(model):
            if not fast_report(model).rows:
                pytest.skip("this family has no rows without padding in float64")
            whole = found(ids[shared.places], lengths, said[shared.places])
            once = found(ids, lengths, said, shared)
        padded = found(ids, lengths, said, shared)
    for a, b, c in zip(whole, once, padded, strict=True):
        assert (b - a).norm() <= 1e-5 * a.norm()  # norms and adapter weights are float32
        assert (c - a).norm() <= 1e-4 * a.norm()


class Shapes(TorchDispatchMode):
    """A dispatch mode that records the sizes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("mm", "linear", "matmul")):
            self.seen.add((str(func), *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def test_row_lengths_are_rounded_to_few_sizes() -> None:
    """oneDNN caches every compiled product, together with its scratch memory.

    So the second sixty batches must add almost no new sizes."""
    model: Any = FAMILIES["llama3"]().bfloat16()
    drawn = random.Random(0)
    with attached(model, create(model, LoraSpec(rank=4), seed=0), trainable=True), fast(model), Shapes() as shapes:
        counts = []
        for seed in range(120):
            lengths = [drawn.randint(20, 40) for _ in range(4)]
            text_loss(model, *some_rows(lengths, seed)).backward()
            if seed % 60 == 59:
                counts.append(len(shapes.seen))
    assert counts[1] < 1.15 * counts[0]
