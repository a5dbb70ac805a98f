"""Any sequence of operations on adapters leaves the base the same bit for bit.

The base is a small bfloat16 model with every kind of module. A state machine runs random sequences of these
operations: attach, add, use, mix, merge, remove and detach, and forward passes and adds that fail.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from veneer.core import Adapter, LoraSpec, attach, create
from veneer.core.attach import Attachment
from veneer.core.forms import Delta
from veneer.errors import AdapterError

DTYPE = torch.bfloat16


class Small(nn.Module):
    """A model with an embedding, a tied head, a convolution, linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight
        self.fail = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.down(torch.tanh(self.up(x)))
        if self.fail:
            raise RuntimeError("a failure in the middle")
        out: Tensor = self.head(self.norm(x))
        return out


def base(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small().to(DTYPE).requires_grad_(False)


SPECS = [
    LoraSpec(rank=2, targets=("words", "mix", "up", "down")),
    LoraSpec(rank=3, targets=("up", "mix"), dora=True),
    LoraSpec(rank=2, targets=("down",), init="pissa"),
    LoraSpec(rank=2, targets=("up",), modules_to_save=("norm",)),
    LoraSpec(rank=2, targets=("up",), token_rows={"words": (3, 7)}),
]
WITH_DELTAS = len(SPECS)
IDS = torch.tensor([[1, 3, 7, 10], [0, 2, 3, 4]])


def adapter_of(kind: int, seed: int) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    if kind < WITH_DELTAS:
        fresh = create(base(), SPECS[kind], seed=seed)
        return fresh.mapped(lambda t: t + 0.2 * torch.randn(t.shape, generator=g).to(t.dtype))
    w1, w2 = torch.randn(3, 2, generator=g), torch.randn(4, 4, generator=g)
    return Adapter(
        deltas={
            "up.weight": Delta("kronecker", {"w1": w1, "w2": w2}, (12, 8), 0.1),
            "up.bias": Delta("dense", {"value": torch.randn(12, generator=g)}, (12,)),
            "norm.weight": Delta("dense", {"value": torch.randn(8, generator=g)}, (8,)),
            "mix.weight": Delta("gain", {"value": torch.randn(8, generator=g)}),
        }
    )


class Use(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.model = base()
        self.tensors = dict(self.model.state_dict(keep_vars=True))
        self.copies = {n: t.clone() for n, t in self.tensors.items()}
        self.modules = dict(self.model.named_modules())
        self.own = self.model(IDS)
        self.attachment: Attachment | None = None
        self.outputs: dict[tuple[tuple[str, float], ...], Tensor] = {}

    @precondition(lambda self: self.attachment is None)
    @rule()
    def attach_it(self) -> None:
        self.attachment = attach(self.model)
        self.outputs.clear()

    @precondition(lambda self: self.attachment is not None)
    @rule(name=st.sampled_from("abcd"), kind=st.integers(0, WITH_DELTAS), seed=st.integers(0, 3))
    def add(self, name: str, kind: int, seed: int) -> None:
        if name in self.attachment.adapters:
            with pytest.raises(AdapterError, match="attached already"):
                self.attachment.add(name, adapter_of(kind, seed))
            return
        self.attachment.add(name, adapter_of(kind, seed))

    @precondition(lambda self: self.attachment is not None)
    @rule(name=st.sampled_from("abcd"))
    def failing_add(self, name: str) -> None:
        wrong = adapter_of(0, 0)
        wrong.pairs["mix"].B = wrong.pairs["mix"].B[:-1]
        before = dict(self.attachment.adapters)
        with pytest.raises(AdapterError):
            self.attachment.add(name, wrong)
        assert self.attachment.adapters == before

    @precondition(lambda self: self.attachment is not None and self.attachment.adapters)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        mix = self._mix(data)
        if self._refused(mix):
            before = self.attachment.selection
            with pytest.raises(AdapterError, match="replaces"):
                self.attachment.use(*mix)
            assert self.attachment.selection is before
            return
        self.attachment.use(*mix)
        y = self.model(IDS)
        if mix in self.outputs:
            assert torch.equal(y, self.outputs[mix]), "the same mix gave another output later"
        self.outputs[mix] = y

    def _mix(self, data: st.DataObject) -> tuple[tuple[str, float], ...]:
        names = data.draw(st.lists(st.sampled_from(sorted(self.attachment.adapters)), unique=True, max_size=3))
        return tuple((n, data.draw(st.sampled_from([1.0, -0.5, 2.0, 0.0]))) for n in names)

    def _refused(self, mix: tuple[tuple[str, float], ...]) -> bool:
        """Return whether a mix is invalid.

        A full copy of a module needs strength 1, and no other adapter in the mix can change the module.
        """
        acting = [(self.attachment.adapters[n], s) for n, s in mix if s]
        whole = [s for a, s in acting if a.modules]
        norms = [a for a, _ in acting if a.modules or "norm.weight" in a.deltas]
        return any(s != 1.0 for s in whole) or (bool(whole) and len(norms) > 1)

    @precondition(lambda self: self.attachment is not None)
    @rule()
    def no_selection_is_the_base(self) -> None:
        with self.attachment.off():
            assert torch.equal(self.model(IDS), self.own)

    @precondition(lambda self: self.attachment is not None)
    @rule()
    def failing_forward(self) -> None:
        self.model.fail = True
        try:
            with pytest.raises(RuntimeError, match="in the middle"):
                self.model(IDS)
        finally:
            self.model.fail = False

    @precondition(lambda self: self.attachment is not None and self.attachment.adapters)
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        """The output of the merged copy, in float32, equals the unmerged output to 1e-5 of its largest value."""
        mix = self._mix(data)
        wide = copy.deepcopy(base().float())
        with attach(wide) as other:
            for name, _ in mix:
                other.add(name, self.attachment.adapters[name])
            if self._refused(mix):
                return
            other.use(*mix)
            y = wide(IDS)
            state = other.merged(*mix)
        for name, tensor in state.items():
            owner, _, key = name.rpartition(".")
            setattr(wide.get_submodule(owner), key, nn.Parameter(tensor, requires_grad=False))
        assert (wide(IDS) - y).abs().max() <= 1e-5 * max(1.0, float(y.abs().max()))

    @precondition(lambda self: self.attachment is not None and self.attachment.adapters)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.attachment.adapters)))
        self.attachment.remove(name)
        self.outputs = {mix: y for mix, y in self.outputs.items() if name not in dict(mix)}

    @precondition(lambda self: self.attachment is not None)
    @rule()
    def detach(self) -> None:
        self.attachment.detach()
        self.attachment = None
        assert torch.equal(self.model(IDS), self.own)
        assert dict(self.model.named_modules()) == self.modules

    @invariant()
    def base_is_unchanged(self) -> None:
        """The base keeps the same tensor objects with the same bits, attached or not."""
        now = self.model.state_dict(keep_vars=True)
        assert list(now) == list(self.tensors)
        for name, tensor in now.items():
            assert tensor is self.tensors[name], f"{name} is another tensor"
            assert torch.equal(tensor.view(torch.int16), self.copies[name].view(torch.int16)), name

    def teardown(self) -> None:
        if self.attachment is not None:
            self.detach()


TestUse = Use.TestCase
TestUse.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)
