"""Every kernel compiled for GPUs that are not there: it fits their registers and shared memory.

`python -m tests.ops.cuda.test_launch` writes the table of docs/notes/cuda.md anew. What compiles runs in a process of
its own, as triton compiles nothing in one where it interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.cuda import serving_steps  # noqa: F401 - its steps are in STEPS then
from tests.ops.cuda.steps import STEPS
from veneer.ops.cuda import launch, norms
from veneer.ops.cuda.launch import KERNELS, SHARED_LIMITS, Launch, recorded, resources
from veneer.ops.dispatch import choices, dispatch
from veneer.ops.transfer import made_up

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "notes" / "cuda.md"
BEGIN, END = "<!-- compiled: begin -->\n", "<!-- compiled: end -->\n"


def launches(target: str = "sm_90") -> dict[str, list[Launch]]:
    """Step -> what it launches that no step before it does, on a card of this kind."""
    seen: set[str] = set()
    out: dict[str, list[Launch]] = {}
    hip = "6.4" if target.startswith("gfx") else None
    for name, step in STEPS.items():
        with FakeTensorMode(), torch.no_grad(), recorded() as found, mock.patch.object(torch.version, "hip", hip):
            step()
        for each in found:
            if repr(each) not in seen:
                seen.add(repr(each))
                out.setdefault(name, []).append(each)
    return out


def compiled(targets: Iterable[str], whole: bool) -> list[list[object]]:
    """[step, kernel, constants, target, registers, stack, shared] of every kernel, or of all its launches."""
    rows: list[list[object]] = []
    for target in targets:
        kernels: set[str] = set()
        for step, found in launches(target).items():
            for each in found:
                if not whole and each.name in kernels:
                    continue
                kernels.add(each.name)
                got = resources(each, target)
                constants = ", ".join(f"{n}={v}" for n, v in each.constants.items() if v is not None and n.isupper())
                rows.append([step, each.name, constants, target, got.registers, got.stack, got.shared])
    return rows


def compiled_elsewhere(targets: list[str], whole: bool, cache: Path) -> list[list[object]]:
    code = (
        f"import json; from tests.ops.cuda import test_launch as t; print(json.dumps(t.compiled({targets}, {whole})))"
    )
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT / "src"),
    }
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    rows: list[list[object]] = json.loads(ran.stdout.splitlines()[-1])
    return rows


def wrong(rows: list[list[object]]) -> list[str]:
    """Any spill, and shared memory beyond the card's."""
    out = []
    for step, kernel, constants, target, _, stack, shared in rows:
        if stack:
            out.append(f"{kernel} ({constants}; {step}) spills {stack} bytes a thread on {target}")
        if int(str(shared)) > SHARED_LIMITS[str(target)]:
            out.append(f"{kernel} ({constants}; {step}) wants {shared} bytes of shared memory on {target}")
    return out


def test_every_kernel_is_in_a_step() -> None:
    names = {each.name for found in launches().values() for each in found}
    assert {k.__name__.lstrip("_") for k in KERNELS} == names


def test_every_kernel_has_a_row_in_the_page_s_table() -> None:
    rows = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()[2:]
    assert {row.split("|")[1].strip() for row in rows} == {k.__name__.lstrip("_") for k in KERNELS}


def test_every_kernel_compiles_for_an_h100_without_spilling(tmp_path: Path) -> None:
    rows = compiled_elsewhere(["sm_90"], False, tmp_path)
    assert {row[1] for row in rows} == {k.__name__.lstrip("_") for k in KERNELS}
    assert all(int(str(row[4])) > 0 for row in rows)
    assert not wrong(rows), "\n".join(wrong(rows))


@pytest.mark.slow
def test_every_launch_compiles_for_every_target_and_fits(tmp_path: Path) -> None:
    rows = compiled_elsewhere(list(SHARED_LIMITS), True, tmp_path)
    assert not wrong(rows), "\n".join(wrong(rows))


def test_a_fake_tensor_gives_the_right_shape_and_launches_nothing() -> None:
    with FakeTensorMode(), torch.no_grad():
        x, w = torch.empty(3, 5, 64, device="cuda", dtype=torch.bfloat16), torch.empty(64, device="cuda")
        assert made_up(x)
        run = dispatch("rms_norm", x, w)
        assert run is norms.rms_norm_forward
        y = run(x, w, 1e-5)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")
    assert not made_up(torch.empty(2))


def test_without_triton_it_is_torch_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "triton", None)
    assert dispatch("rms_norm", torch.ones(3, 16), torch.ones(16)) is None
    assert choices("cuda")["rms_norm"][:2] == ("torch", "triton is not installed")
    assert launch.kernel(wrong) is launch.device_function(wrong) is wrong


class _Card:
    """A GPU for `launch.takes`: what torch says of it, and what the first kernel does there."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), hip: str | None = None) -> None:
        self.tries, self.times, self.error = 0, 2.0, ""
        launch.trouble_on.cache_clear()
        patch.setattr(torch.version, "hip", hip)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(launch, "double", {(2,): self._run})

    def _run(self, x: torch.Tensor, y: torch.Tensor, n: int, BLOCK: int) -> None:
        self.tries += 1
        if self.error:
            raise RuntimeError(self.error)
        y[:n] = self.times * x[:n]

    def trouble(self) -> str:
        return launch.trouble_on(torch.device("cpu"))


def test_kernels_run_where_a_first_small_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    card = _Card(monkeypatch)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert (card.trouble(), card.trouble(), card.tries) == ("", "", 1)
    launch.trouble_on.cache_clear()
    card.times = 3.0
    assert card.trouble() == "a small kernel gave wrong numbers"
    launch.trouble_on.cache_clear()
    card.error = "Failed to find C compiler.\nPlease specify one"
    assert card.trouble() == "a small kernel could not run: RuntimeError: Failed to find C compiler."
    launch.trouble_on.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "why"),
    [
        ((7, 5), None, "kernels want compute capability 8.0, this GPU has 7.5"),
        ((9, 4), "6.4", "kernels are cut for GPUs of NVIDIA"),
    ],
)
def test_no_kernel_is_tried_on_a_card_that_is_too_old_or_not_nvidias(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, why: str
) -> None:
    card = _Card(monkeypatch, capability, hip)
    assert (card.trouble(), card.tries) == (why, 0)
    launch.trouble_on.cache_clear()


def test_where_the_first_kernel_fails_the_reference_runs_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.empty(3, 16, device="meta")  # stands for a tensor of the GPU
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "made_up", lambda _: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: x)
    monkeypatch.setattr(launch, "trouble_on", lambda device: f"it would not on {device}")
    assert launch.why_missing() == "it would not on cuda:0"
    assert choices("cuda")["rms_norm"][:2] == ("torch", "it would not on cuda:0")
    with FakeTensorMode():
        y = torch.zeros(3, 16, device="cuda")
        assert not launch.takes(y)
        monkeypatch.setattr(launch, "made_up", made_up)
        assert launch.takes(y)


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_compiled() -> None:
    assert not launch.INTERPRETED
    assert launch.why_missing() == ""
    assert launch.takes(torch.ones(3, device="cuda"))


def table() -> str:
    rows = compiled(SHARED_LIMITS, True)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for _, kernel, constants, target, registers, stack, shared in rows:
        spilled = f" +{stack} B" if stack else ""
        cells.setdefault((str(kernel), str(constants)), {})[str(target)] = f"{registers}{spilled} / {shared}"
    lines = [f"| kernel | constants | {' | '.join(SHARED_LIMITS)} |", "| --- " * (len(SHARED_LIMITS) + 2) + "|"]
    for (kernel, constants), found in sorted(cells.items()):
        lines.append(f"| {kernel} | {constants} | {' | '.join(found.get(t, '–') for t in SHARED_LIMITS)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
