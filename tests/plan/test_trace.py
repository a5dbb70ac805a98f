"""A trace's bytes against sums that can be done by hand, and every way in which the host waits."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from veneer.errors import ResourceError
from veneer.ops import transfer
from veneer.ops.quantisation_formats import empty_format
from veneer.ops.quantised import Quantised, stacked_rows
from veneer.ops.transfer import sent
from veneer.plan.fake_cuda import cuda_switch, fake_cuda
from veneer.plan.trace import rounded, traced

pytestmark = pytest.mark.usefixtures("gpu_that_is_not_there")

MB = 1 << 20


def test_tensors_of_the_gpu_are_made_up_and_those_of_the_cpu_are_real() -> None:
    with traced():
        here, there = torch.arange(5), torch.empty(1 << 40, device="cuda")
        assert here.tolist() == [0, 1, 2, 3, 4]
        assert there.device.type == "cuda"
        assert there.shape == (1 << 40,)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(1, device="meta").cpu()
    assert torch.ones(3).sum().item() == 3


def test_a_backward_pass_goes_before_between_and_after_traces() -> None:
    def step(device: str) -> torch.Tensor:
        w = torch.ones(4, 4, device=device, requires_grad=True)
        checkpoint(lambda w: (w @ w).tanh(), w, use_reentrant=False).sum().backward()
        assert w.grad is not None
        return w.grad

    for _ in range(2):
        assert step("cpu").abs().sum() > 0
        with fake_cuda():
            assert step("cuda").shape == (4, 4)
    assert step("cpu").abs().sum() > 0


def test_live_bytes_are_those_of_storages_rounded_to_512() -> None:
    with traced() as trace:
        x = torch.empty(MB, dtype=torch.uint8, device="cuda")
        view = x[10:].view(-1)[::2]
        assert trace.live == MB
        y = torch.empty(1, device="cuda")
        assert trace.live == MB + 512 == MB + rounded(1)
        del x
        assert trace.live == MB + 512  # the view holds it
        del view
        gc.collect()
        assert trace.live == 512
        assert trace.peak == MB + 512
        del y
    assert trace.live == 0


def test_the_peak_is_where_most_lives_and_says_what_that_is() -> None:
    """y = x·W, z = tanh(y): the peak is in the backward pass, with W, x, y's gradient and z, which tanh keeps."""
    n = 1024
    one = n * n * 4
    with traced() as trace:
        w = torch.empty(n, n, device="cuda", requires_grad=True)
        x = torch.empty(n, n, device="cuda")
        assert trace.hold("weights", [w, None]) == one
        z = (x @ w).tanh()
        assert trace.peak == 4 * one
        trace.begin()
        assert trace.peak == trace.live == 3 * one
        z.backward(torch.empty(n, n, device="cuda"))
        assert trace.at_peak["weights"] == one
        assert trace.at_peak["backward"] >= one
        assert sum(trace.at_peak.values()) == trace.peak
        assert sum(trace.makers("weights").values()) == one


def test_codes_of_a_quantised_weight_are_bytes_and_its_values_a_moment() -> None:
    with traced() as trace:
        weight = Quantised(empty_format((512, 1024), "int8", torch.device("cuda")), torch.bfloat16)
        held = trace.hold("weights", [weight])
        assert held == trace.live == 512 * 1024 + 512 * 4
        y = torch.empty(128, 1024, dtype=torch.bfloat16, device="cuda") @ weight.t()  # fewer rows take the codes
        assert y.shape == (128, 512)
        assert trace.live == held + 128 * 512 * 2
        assert trace.peak >= held + 512 * 1024 * 2  # the weight in full


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "_local_scalar_dense"),
        (lambda x: (x > 0).nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: torch.ones(4).to(x.device), "copy to the device"),
        (lambda x: x.copy_(torch.ones(4)), "copy to the device"),
        (lambda x: x.copy_(torch.ones(4), non_blocking=True), "copy to the device"),
        (lambda x: torch.ones(4).to(x.device, non_blocking=True), "copy to the device"),
        (lambda x: torch.tensor([1, 2], device=x.device), "copy to the device"),
    ],
)
def test_what_makes_the_host_wait_is_noted_with_its_line(wait: Any, said: str) -> None:
    with traced() as trace:
        x = torch.empty(4, device="cuda")
        assert not trace.waits
        wait(x)
    assert any(place.startswith(said) and "test_trace.py" in place for place in trace.waits), trace.waits


def test_what_does_not_wait_is_not_noted() -> None:
    with traced() as trace:
        x = sent(torch.ones(4), torch.device("cuda"))
        x.copy_(transfer.pinned(torch.ones(4)), non_blocking=True)
        x = x[torch.arange(2, device="cuda")].bfloat16()
        torch.cat([x, x]).sum()
    assert not trace.waits
    assert [place.split(" tests")[0] for place in trace.casts] == ["float32 to bfloat16"] or trace.casts


def test_large_float32_tensors_are_noted() -> None:
    with traced(wide_from=1000) as trace:
        x = torch.empty(100, 100, dtype=torch.bfloat16, device="cuda")
        small = torch.empty(999, device="cuda")
        assert not trace.wide
        x.float()
        del small
    assert list(trace.wide.values()) == [rounded(40_000)]


def test_two_devices_that_meet_raise() -> None:
    with traced(), pytest.raises(RuntimeError, match="same device"):
        torch.empty(4, device="cuda") + torch.ones(4)


def test_the_attention_of_a_gpu_keeps_no_probabilities() -> None:
    """Flash attention keeps q, k, v, its output and a float for each query and head."""
    n, heads, kv, dim = 512, 8, 2, 64
    with traced() as trace:
        q = torch.empty(1, heads, n, dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        k = torch.empty(1, kv, n, dim, dtype=torch.bfloat16, device="cuda")
        before = trace.live
        o = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        assert trace.live - before < n * heads * (2 * dim + 4) + 4096
        mask = torch.ones(n, n, dtype=torch.bool, device="cuda")
        masked = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        assert masked.shape == q.shape
        (o.sum() + masked.sum()).backward()
        assert q.grad is not None
        assert q.grad.shape == q.shape


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_joined_codes_are_dequantised_into_one_piece_of_memory(kind: str) -> None:
    with traced() as trace:
        parts = [Quantised(empty_format((rows, 512), kind, torch.device("cuda")), torch.bfloat16) for rows in (128, 64)]
        before = trace.live
        trace.begin()
        dense = stacked_rows(parts).dense()
        assert dense.shape == (192, 512)
        assert trace.peak - before == rounded(2 * 192 * 512)
        moved = sum(n * size for (_, size), n in trace.work.items())
        assert moved == pytest.approx(192 * 512 * (2 + {"nf4": 0.5, "int8": 1}[kind]), rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is compiled where torch has CUDA")
def test_a_compiler_that_does_not_work_is_named_without_its_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    with pytest.raises(ResourceError) as found:
        cuda_switch.__wrapped__()
    assert "exit code 1; it printed nothing" in str(found.value.where)
    assert "CXX" in str(found.value.fix)
    assert len(str(found.value)) < 500
