"""Each client's requests run once and in order.

Evictions, errors and other tenants' requests change no result."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from tests.jobs.tinker.small import ROWS, forward_body, read_output, result, small_base, small_service
from tests.serve.http.toy import wait_for
from veneer.adapters.use import load_adapter
from veneer.errors import ConfigError
from veneer.jobs.tinker.checkpoints import Checkpoints, SavedWeights
from veneer.jobs.tinker.service import FutureResult, TinkerService, TrainingRun
from veneer.jobs.tinker.trainer import Lora, PassWork, Trainer, state_bytes, target_names
from veneer.library.library import open_library
from veneer.serve.quota import Quotas
from veneer.serve.request import Refused
from veneer.serve.settings import QuotaLimits

STEP = json.dumps({"adam_params": {"learning_rate": 1e-2}}).encode()


def begun(service: TinkerService, tenant: str = "acme", **lora: Any) -> TrainingRun:
    session = service.create_session(tenant)
    return service.create_run(tenant, session.id, 0, Lora(**({"rank": 2, "seed": 1} | lora)))


def expire(run: TrainingRun, name: str) -> None:
    about = run.checkpoints.folder / "weights" / name / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"expires": 1.0}))


def loss(answer: FutureResult) -> float:
    assert answer.kind == "proto", answer.data
    return read_output(answer.data)[1]["loss:sum"]


def steps(service: TinkerService, run: TrainingRun, first: int, last: int) -> list[float]:
    """Run training steps with the requests from `first` up to `last`; return losses.

    Each step is two requests."""
    found = []
    for seq in range(first, last, 2):
        found.append(loss(result(service, run, seq, "forward", forward_body(run.id, seq, ROWS))))
        result(service, run, seq + 1, "optim_step", STEP)
    return found


def test_loss_falls_and_old_requests_are_recognized(tmp_path: Path) -> None:
    with small_service(tmp_path) as service:
        run = begun(service)
        losses = steps(service, run, 1, 9)
        assert losses == sorted(losses, reverse=True)
        assert [service.is_new(run, seq) for seq in (2, 8, 9)] == [False, False, True]
        with pytest.raises(ConfigError, match="seq_id is 1000000"):
            service.is_new(run, 1_000_000)


def test_requests_run_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    with small_service(tmp_path) as service:
        run = begun(service)
        late = service.submit(run, 2, "optim_step", STEP)
        with pytest.raises(TimeoutError):
            late.result(0.2)
        assert not service.is_new(run, 2)
        result(service, run, 1, "forward", forward_body(run.id, 1, ROWS))
        assert json.loads(late.result(60).data)["metrics"]["grad_norm"] > 0


def test_requests_after_a_missing_number_fail_eventually(tmp_path: Path) -> None:
    """The client can continue with later numbers; a refused request leaves no gap."""
    with small_service(tmp_path) as service:
        run, other = begun(service), begun(service, "globex")
        late = service.submit(run, 2, "optim_step", STEP)
        run.used -= 1000
        result(service, other, 1, "forward", forward_body(other.id, 1, ROWS))
        assert f"request 1 of {run.id} never arrived" in json.loads(late.result(60).data)["error"]
        refused = result(service, run, 3, "refused", b"more tokens than the limit of a minute")
        assert json.loads(refused.data)["error"] == "more tokens than the limit of a minute"
        assert steps(service, run, 4, 6)[0] > 0


def small_quotas(**limits: int) -> Quotas:
    return Quotas(QuotaLimits(**limits))


def test_checkpoints_count_as_files_and_bytes(tmp_path: Path) -> None:
    """Clients and checkpoints count toward the quotas; after a restart, only checkpoints do.

    Removed checkpoints do not count."""
    with small_service(tmp_path, quotas=small_quotas(files=2)) as service:
        run = begun(service)
        result(service, run, 1, "save_weights", b'{"path": "one"}')
        used = service.quotas.used("acme", "disk")
        on_disk = sum(path.stat().st_size for path in (tmp_path / "tinker").rglob("*") if path.is_file())
        assert on_disk <= used < 4 * on_disk
        with pytest.raises(Refused, match=r"limit \(files\)") as error:
            service.create_run("acme", run.session, 1, Lora(2))
        assert error.value.code == "storage_full"
        refused = json.loads(result(service, run, 2, "save_weights", b'{"path": "two"}').data)
        assert "limit (files)" in refused["error"]
        begun(service, "globex")
    with small_service(tmp_path, quotas=small_quotas(files=1)) as service:
        assert service.quotas.used("acme", "files") == 1
        with pytest.raises(Refused, match=r"limit \(files\)"):
            begun(service)
        service.remove("acme", run.id, "weights/one")
        begun(service)


def test_full_quotas_refuse_clients_and_sessions(tmp_path: Path) -> None:
    with small_service(tmp_path, quotas=small_quotas(disk=20_000, memory=5_000)) as service:
        session = service.create_session("acme")
        with pytest.raises(Refused, match=r"limit \(disk\)"):  # the evicted state would not fit the disk quota
            service.create_run("acme", session.id, 0, Lora(4))
        service.create_sampler("acme", session.id, 0, None)
        with pytest.raises(Refused, match=r"limit \(memory\)"):
            service.create_session("acme")


def test_metadata_is_limited(tmp_path: Path) -> None:
    with small_service(tmp_path, quotas=small_quotas(metadata=100)) as service:
        run = begun(service)
        big = {"a": "x" * 100}
        with pytest.raises(Refused, match="metadata") as error:
            service.create_run("acme", run.session, 1, Lora(2), big)
        assert error.value.status == 413
        body = json.dumps({"path": "one", "user_metadata": big}).encode()
        assert "metadata" in json.loads(result(service, run, 1, "save_weights", body).data)["error"]


def test_restart_keeps_checkpoints_and_ends_clients(tmp_path: Path) -> None:
    """A copy of the folder, made while the service runs, simulates a kill."""
    with small_service(tmp_path / "first") as service:
        run, lost = begun(service), begun(service)
        steps(service, run, 1, 3)
        steps(service, lost, 1, 3)
        path = json.loads(result(service, run, 3, "save_weights", b'{"path": "one"}').data)["path"]
        losses = steps(service, run, 4, 8)
        shutil.copytree(tmp_path / "first", tmp_path / "killed", ignore=shutil.ignore_patterns("lock"))
    with small_service(tmp_path / "killed") as service:
        with pytest.raises(Refused, match="restart of the server") as error:
            service.submit(service.run("acme", run.id), 8, "optim_step", STEP)
        assert "continues from a saved checkpoint" in error.value.fix
        with pytest.raises(Refused, match="no training run"):
            service.run("acme", lost.id)
        with pytest.raises(Refused, match="no training run"):
            service.run("globex", run.id)
        session = service.create_session("acme")
        again = service.create_run("acme", session.id, 0, path, optimizer=True)
        assert steps(service, again, 1, 5) == losses
        left = {each.name for each in (tmp_path / "killed" / "tinker").iterdir()}
        assert left - {"live"} == {"lock", run.session}


def test_another_server_has_none_of_the_clients_and_says_so(tmp_path: Path) -> None:
    """Sessions live in one process: behind several servers, a router keeps each client on one of them."""
    with small_service(tmp_path / "one") as one, small_service(tmp_path / "two") as two:
        session = one.create_session("acme")
        assert one.session("acme", session.id) is session
        with pytest.raises(Refused, match="this server has no session") as refused:
            two.session("acme", session.id)
        assert (refused.value.status, "router" in str(refused.value.fix)) == (404, True)
        with pytest.raises(ConfigError, match="another server on this machine"), small_service(tmp_path / "one"):
            pass


def test_unreadable_checkpoint_is_skipped_and_stays(tmp_path: Path) -> None:
    with small_service(tmp_path) as service:
        run = begun(service)
        for seq, name in enumerate(("one", "two"), 1):
            result(service, run, seq, "save_weights", json.dumps({"path": name}).encode())
        about = run.checkpoints.folder / "weights" / "one" / "about.json"
        about.write_text("{")
        assert [each.id for each in run.checkpoints.all()] == ["weights/two"]
        service.remove("acme", run.id, "weights/two")
    with small_service(tmp_path) as service:
        assert service.run("acme", run.id).checkpoints.all() == []
        assert about.exists()


def test_service_can_start_after_a_failed_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_service(tmp_path) as service:
        begun(service).created.result(60)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _no_disk)
        with pytest.raises(OSError, match="no disk"), small_service(tmp_path):
            pass
    with small_service(tmp_path) as service:
        assert not service.runs


def _no_disk(path: Path, **how: Any) -> None:
    raise OSError("no disk")


def test_stop_fails_waiting_requests(tmp_path: Path) -> None:
    with small_service(tmp_path) as service:
        run = begun(service)
        run.created.result(60)
        late = service.submit(run, 2, "optim_step", STEP)
    assert "the server stops" in json.loads(late.result(0).data)["error"]
    with pytest.raises(Refused, match="the server stops"):
        service.submit(run, 3, "optim_step", STEP)


def test_eviction_changes_no_result(tmp_path: Path) -> None:
    """Only one of two clients fits in memory, so states move to disk and back."""
    with small_service(tmp_path / "wide") as service:
        alone = [steps(service, begun(service, seed=seed), 1, 7) for seed in (1, 2)]
        max_memory = 4 * sum(p.nbytes for p in _parameters(service))
    with small_service(tmp_path / "narrow", max_memory=max_memory) as service:
        runs = [begun(service, seed=seed) for seed in (1, 2)]
        found: list[list[float]] = [[], []]
        for seq in (1, 3, 5):
            for run, losses in zip(runs, found, strict=True):
                losses += steps(service, run, seq, seq + 2)
        assert [*(tmp_path / "narrow" / "tinker" / "live").glob("*/state")]
        assert found == alone
        with pytest.raises(ConfigError, match=f"rank 4096 needs .* the limit is {max_memory:,}"):
            begun(service, rank=4096)


def test_pending_forwards_of_many_clients_stay_within_the_memory(tmp_path, monkeypatch):
    """Memory is enough for two small clients, or for the large client.

    All clients take turns, and none waits until another has finished."""
    resident, step, submitted = [], Trainer.step, Event()

    def measured(trainer: Trainer, works: list[PassWork]) -> list[PassWork]:
        submitted.wait(60)  # wait until all requests are submitted
        resident.append(sum(learner.bytes for learner in trainer.learners.values()))
        return step(trainer, works)

    monkeypatch.setattr(Trainer, "step", measured)
    max_memory = state_bytes(small_base().model, Lora(4).spec(target_names(small_base().model)))
    with small_service(tmp_path, max_memory=max_memory) as service:
        runs, finished = [begun(service, rank=rank) for rank in (2, 2, 2, 4)], []
        for run in runs:
            run.created.result(60)
        for run in runs:
            for seq in (1, 2, 3):
                future = service.submit(run, seq, "forward", forward_body(run.id, seq, ROWS))
                future.add_done_callback(lambda _, seq=seq: finished.append(seq))
        submitted.set()
        wait_for(lambda: len(finished) == 12)
    assert max(resident) <= max_memory
    assert finished[:4] == [1, 1, 1, 1]


def _parameters(service: TinkerService) -> list[torch.Tensor]:
    run = next(iter(service.runs.values()))
    return list(run.learner.parameters.values())


def test_failed_request_is_undone_and_affects_no_other_client(tmp_path: Path) -> None:
    """The error names the mistake; later results show no trace of the request."""
    with small_service(tmp_path) as service:
        run, other = begun(service), begun(service, "globex", rank=4)
        first = result(service, run, 1, "forward", forward_body(run.id, 1, ROWS))
        endless = forward_body(run.id, 2, ROWS, weights=lambda targets: [3e38] * len(targets))
        bad = service.submit(run, 2, "forward", endless)
        good = service.submit(other, 1, "forward", forward_body(other.id, 1, ROWS))
        said = json.loads(bad.result(60).data)
        assert "loss is not finite" in said["error"]
        assert said["category"] == "user"
        assert loss(good.result(60)) > 0
        for seq, (body, what) in enumerate(
            [
                ({"adam_params": {"learning_rate": -1}}, "learning_rate must be greater than or equal to 0"),
                ({}, "only optimizer is AdamW"),
                ({"adam_params": {"rate": 1}}, "adam_params.rate"),
                ({"adam_params": {"learning_rate": 1e308}}, "learning_rate must be less than or equal to 1"),
                ({"adam_params": {"eps": 0}}, "eps must be"),
                ({"adam_params": {"weight_decay": 1e9}}, "weight_decay"),
                ({"adam_params": {"learning_rate": None}}, "learning_rate must be a valid number"),
                ({"adam_params": {"learning_rate": 10**400}}, "learning_rate must be"),
            ],
            3,
        ):
            answer = result(service, run, seq, "optim_step", json.dumps(body).encode())
            assert what in json.loads(answer.data)["error"]
        kinds = {
            "save_weights": {"path": 12, "ttl_seconds": "day", "user_metadata": ["a"]},
            "save_weights_for_sampler": {"path": True, "sampling_session_seq_id": "x"},
            "load_weights": {"path": [1]},
        }
        wrong = [(kind, {name: value}) for kind, own in kinds.items() for name, value in own.items()]
        for seq, (kind, body) in enumerate(wrong, 11):
            refused = json.loads(result(service, run, seq, kind, json.dumps(body).encode()).data)
            assert (next(iter(body)) in refused["error"], refused["category"]) == (True, "user"), refused
        last = 11 + len(wrong)
        again = result(service, run, last, "forward", forward_body(run.id, last, ROWS))
        assert again.data == first.data
        assert result(service, run, last + 1, "optim_step", STEP).kind == "json"


def test_checkpoint_is_a_library_adapter(tmp_path: Path) -> None:
    """A checkpoint can be loaded with or without the optimizer's moments.

    A checkpoint is private to its tenant, has a unique name, and expires."""
    with small_service(tmp_path) as service:
        run = begun(service)
        steps(service, run, 1, 5)
        path = json.loads(result(service, run, 5, "save_weights", b'{"path": "one"}').data)["path"]
        assert path == f"tinker://{run.id}/weights/one"
        saved = service.saved("acme", path)
        folder = service.library.resolve(saved.reference)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in folder.iterdir()}
        assert load_adapter(small_base(), str(folder)).digest() == saved.digest
        taken = result(service, run, 6, "save_weights", b'{"path": "one"}')
        assert "already exists" in json.loads(taken.data)["error"]
        assert result(service, run, 7, "save_weights", b'{"path": "one", "overwrite": true}').kind == "json"
        went_on = steps(service, run, 8, 12)
        again = service.create_run("acme", run.session, 1, path, optimizer=True)
        assert steps(service, again, 1, 5) == went_on
        fresh = service.create_run("acme", run.session, 2, path, optimizer=False)
        without = steps(service, fresh, 1, 5)
        assert without[0] == went_on[0]
        assert without[1] != went_on[1]
        back = result(service, run, 12, "load_weights", json.dumps({"path": path, "optimizer": True}).encode())
        assert back.kind == "json"
        assert steps(service, run, 13, 17) == went_on
        with pytest.raises(Refused, match="there is no training run"):
            service.saved("globex", path)
        for name in ("../one", "", "a/b"):
            with pytest.raises((ConfigError, Refused)):
                service.saved("acme", f"tinker://{run.id}/weights/{name}")
            with pytest.raises(ConfigError):
                run.checkpoints.check_name(f"weights/{name}")
        expire(run, "one")
        assert run.checkpoints.all() == []
        run.checkpoints.sweep()
        with pytest.raises(Exception, match=r"no adapter|has no"):
            service.library.find(saved.reference)


def test_invalid_time_to_live_writes_nothing(tmp_path: Path) -> None:
    with small_service(tmp_path) as service:
        run = begun(service)
        refused = result(service, run, 1, "save_weights", b'{"path": "one", "ttl_seconds": 5}')
        assert "ttl_seconds must be greater than or equal to 3600" in json.loads(refused.data)["error"]
        assert not run.checkpoints.folder.exists()


def test_sweep_tolerates_checkpoints_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def read_and_remove(path: Path, encoding: str | None = None) -> str:
        text = read_text(path, encoding=encoding)
        if path.name == "about.json":
            shutil.rmtree(path.parent)
        return text

    folder = tmp_path / "run" / "weights" / "one"
    folder.mkdir(parents=True)
    expired = SavedWeights("weights/one", "s:train:0", 1, "acme/run@1", "", 0, 0.0, expires=1.0)
    (folder / "about.json").write_text(json.dumps(asdict(expired)))
    with open_library(tmp_path / "library") as library:
        monkeypatch.setattr(Path, "read_text", read_and_remove)
        Checkpoints("s:train:0", tmp_path / "run", "acme/run", library).sweep()
    assert not folder.exists()


def test_unused_sessions_are_removed_and_checkpoints_stay(tmp_path: Path) -> None:
    with small_service(tmp_path, days=2 / 86400) as service:
        saver, idle = begun(service), begun(service)
        path = json.loads(result(service, saver, 1, "save_weights", b'{"path": "one"}').data)["path"]
        service.create_sampler("acme", saver.session, 0, None)
        result(service, saver, 2, "save_weights_for_sampler", b'{"sampling_session_seq_id": 1}')
        wait_for(lambda: not service.sessions)
        with pytest.raises(Refused, match="ended with its session"):
            service.submit(saver, 3, "optim_step", STEP)
        with pytest.raises(Refused, match="no sampling session"):
            service.sampler("acme", f"{saver.session}:sample:1")
        wait_for(lambda: idle.id not in service.runs)
        wait_for(lambda: not [*(tmp_path / "tinker" / "live").iterdir()])
        session = service.create_session("acme")
        again = service.create_run("acme", session.id, 0, path, optimizer=True)
        assert json.loads(again.created.result(60).data)["path"] == path
        expire(saver, "one")
        wait_for(lambda: saver.id not in service.runs)


def test_ended_session_takes_no_new_requests(tmp_path: Path) -> None:
    """Requests that still wait fail when the session ends."""
    with small_service(tmp_path, days=3 / 86400) as service:
        run = begun(service)
        late = service.submit(run, 2, "optim_step", STEP)
        service.session("acme", run.session).ended = time.time()
        with pytest.raises(Refused, match="has ended"):
            service.submit(run, 3, "optim_step", STEP)
        with pytest.raises(Refused, match="has ended"):
            service.create_run("acme", run.session, 1, Lora(2))
        assert "the session ended" in json.loads(late.result(60).data)["error"]
