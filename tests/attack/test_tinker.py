"""Tinker requests over a tenant's limits are refused, and memory and file descriptors stay bounded."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.attack.harness import MEMORY, Server
from tests.jobs.tinker.small import part, varint

API = "/api/v1"


def session(server: Server, **more: Any) -> str:
    return str(server.post(f"{API}/create_session", {"tags": [], "sdk_version": "0", **more}).json["session_id"])


def model(server: Server, owner: str, number: int = 0) -> str:
    body = {"session_id": owner, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": 1, "seed": 1}}
    return str(server.post(f"{API}/create_model", body).json["model_id"])


def zeros(run: str, seq: int, rows: int, width: int, times: int = 1) -> bytes:
    """Return a forward_backward body of one row, with `times` sparse tensors without values."""
    starts = part(2, bytes(8 * (rows + 1)))
    sparse = part(2, starts) + b"\x18\x02" + part(4, varint(rows) + varint(width))
    tokens = part(1, part(1, part(1, np.array([1, 2, 3], "<i4").tobytes())))
    row = tokens + b"".join(part(2, part(1, b"target_tokens" + b"x" * i) + part(2, sparse)) for i in range(times))
    return part(1, run.encode()) + b"\x10" + varint(seq) + part(3, row) + part(4, b"cross_entropy")


@pytest.fixture
def peak(trainer: Server) -> Any:
    """Yield a function that returns the server's peak memory in bytes during the test."""
    ends, most = threading.Event(), [trainer.memory()]

    def watch() -> None:
        while not ends.wait(0.02):
            most[0] = max(most[0], trainer.memory())

    thread = threading.Thread(target=watch)
    thread.start()

    def stop() -> int:
        ends.set()
        thread.join()
        return most[0]

    yield stop
    stop()


def test_tensors_of_zeros_take_no_memory(trainer: Server, peak: Any) -> None:
    """Three requests of 7 MB, each with 25 tensors of 268 MB, are refused because of that size.

    A request within the limit reserves its unpacked memory, so later requests can be refused until it
    ends."""
    run, initial = model(trainer, session(trainer)), trainer.memory()
    headers = trainer.headers("a") | {"content-type": "application/x-protobuf"}

    def send(body: bytes) -> httpx.Response:
        return httpx.post(f"{trainer.url}{API}/forward_backward", content=body, headers=headers, timeout=60)

    with trainer.watched():
        answers = trainer.together([lambda: send(zeros(run, 1, 36_000, 930, times=25))] * 3)
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
            assert "bytes of tensors" in answer.text
        assert send(zeros(run, 1, 900_000, 37)).status_code == 200
        assert {send(zeros(run, seq, 900_000, 37)).status_code for seq in (2, 3, 4)} <= {200, 429}
        while (refused := trainer.post(f"{API}/retrieve_future", {"request_id": f"{run}:1"})).status == 408:
            pass
    assert "target_tokens has the shape" in refused.body.decode()
    assert peak() - initial < 512 << 20  # one request takes 266 MB, and the first request also loads modules
    assert trainer.growth_from(initial) < MEMORY


def test_metadata_of_clients_has_a_limit(trainer: Server) -> None:
    initial = trainer.memory()
    named = {"model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 1}}
    body = {**named, "session_id": session(trainer), "user_metadata": {"x": "y" * (7 << 20)}}
    for _ in range(10):
        answer = trainer.post(f"{API}/create_model", body)
        assert (answer.status, answer.code) == (413, "too_large")
        assert "metadata" in answer.body.decode()
    assert trainer.growth_from(initial) < MEMORY


def test_hundreds_of_runs_open_no_files(trainer: Server) -> None:
    owner, process = session(trainer), psutil.Process(trainer.process.pid)
    model(trainer, owner)
    initial = process.num_fds()
    for number in range(1, 150):
        model(trainer, owner, number)
    answer = trainer.get(f"{API}/training_runs?limit=1000")
    assert len(answer.json["training_runs"]) >= 150
    assert process.num_fds() < initial + 20


def test_failed_samples_leave_nothing(trainer: Server) -> None:
    named = {"session_id": session(trainer), "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = trainer.post(f"{API}/create_sampling_session", named).json["sampling_session_id"]
    body = {"sampling_session_id": sampler, "prompt": {"chunks": []}, "sampling_params": {}}
    initial = trainer.memory()
    for i in range(100):
        for more in ({"num_samples": 4096, "seq_id": i}, {"seq_id": 10**4000 + i}, {"seq_id": i}):
            assert trainer.post(f"{API}/asample", {**body, **more}).status == 400
    assert trainer.growth_from(initial) < MEMORY
