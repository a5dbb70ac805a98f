"""Requests in their order, each once: through crashes, evictions, mistakes, and beside another tenant's."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs.pretended import until
from tests.jobs.tinker.small import ROWS, forward_body, read_output, small_base, small_service, told
from veneer.adapters.use import load_adapter
from veneer.errors import ConfigError
from veneer.jobs.tinker.journal import KEPT, FutureResult, Journal
from veneer.jobs.tinker.service import NotHere, SessionOver, TinkerService, TrainingRun
from veneer.jobs.tinker.trainer import Lora
from veneer.serve.quota import Quotas
from veneer.serve.request import Refused
from veneer.serve.settings import QuotaLimits

STEP = json.dumps({"adam_params": {"learning_rate": 1e-2}}).encode()


def begun(service: TinkerService, tenant: str = "acme", **lora: Any) -> TrainingRun:
    session = service.create_session(tenant, {})
    return service.create_run(tenant, session.id, 0, Lora(**({"rank": 2, "seed": 1} | lora)), None)


def loss(answer: FutureResult) -> float:
    assert answer.kind == "proto", answer.data
    return read_output(answer.data)[1]["loss:sum"]


def steps(service: TinkerService, run: TrainingRun, first: int, last: int) -> list[float]:
    """Losses of the steps from request `first` to `last`, two requests each."""
    found = []
    for seq in range(first, last, 2):
        found.append(loss(told(service, run, seq, "forward", forward_body(run.id, seq, ROWS))))
        told(service, run, seq + 1, "optim_step", STEP)
    return found


def test_it_learns_and_no_request_is_done_twice(tmp_path: Path) -> None:
    with small_service(tmp_path) as service:
        run = begun(service)
        found = steps(service, run, 1, 9)
        assert found == sorted(found, reverse=True)
        before = told(service, run, 9, "forward", forward_body(run.id, 9, ROWS, only=True))
        for seq in (8, 2):
            assert not service.submit(run, seq, "optim_step", STEP)
        after = told(service, run, 10, "forward", forward_body(run.id, 10, ROWS, only=True))
        assert before.data == after.data
        with pytest.raises(ConfigError, match=r"request 9 of .* was forward"):
            service.submit(run, 9, "optim_step", STEP)


def test_requests_wait_for_those_before_them(tmp_path: Path) -> None:
    with small_service(tmp_path) as service:
        run = begun(service)
        service.submit(run, 2, "optim_step", STEP)
        late = service.answer(run, 2)
        assert late is not None
        with pytest.raises(TimeoutError):
            late.result(0.2)
        told(service, run, 1, "forward", forward_body(run.id, 1, ROWS))
        assert json.loads(late.result(60).data)["metrics"]["grad_norm"] > 0


def test_nobody_waits_for_ever_for_a_request_that_never_comes(tmp_path: Path) -> None:
    """Those behind it fail, and the client goes on after them; one that was refused is told, and leaves no gap."""
    with small_service(tmp_path) as service:
        run, other = begun(service), begun(service, "globex")
        service.submit(run, 2, "optim_step", STEP)
        late = service.answer(run, 2)
        assert late is not None
        run.came -= 1000
        told(service, other, 1, "forward", forward_body(other.id, 1, ROWS))
        assert f"request 1 of {run.id} never came" in json.loads(late.result(60).data)["error"]
        assert steps(service, run, 3, 7)[0] > 0
        answer = told(service, run, 7, "refused", b"it has more tokens than a minute of yours")
        assert json.loads(answer.data)["error"] == "it has more tokens than a minute of yours"
        assert steps(service, run, 8, 10)[0] > 0
        with pytest.raises(ConfigError, match="seq_id is 1000000"):
            service.submit(run, 1_000_000, "optim_step", STEP)


def small_quotas(**limits: int) -> Quotas:
    return Quotas(QuotaLimits(**limits))


def test_requests_that_wait_have_a_limit(tmp_path: Path) -> None:
    """The limit covers all clients of a tenant; finished requests make room."""
    with small_service(tmp_path, quotas=small_quotas(requests=3)) as service:
        run, second, other = begun(service), begun(service), begun(service, "globex")
        for each, seq in ((run, 2), (run, 3), (second, 2)):
            service.submit(each, seq, "optim_step", STEP)
        for each, seq in ((run, 4), (second, 3)):
            with pytest.raises(Refused, match=r"limit \(requests\)") as error:
                service.submit(each, seq, "optim_step", STEP)
            assert error.value.status == 429
        told(service, other, 1, "optim_step", STEP)
    with small_service(
        tmp_path, quotas=small_quotas(requests=4)
    ) as service:  # waiting requests still count after a restart
        run = service.run("acme", run.id)
        told(service, service.run("acme", second.id), 1, "optim_step", STEP)
        told(service, run, 1, "optim_step", STEP)
        until(lambda: service.quotas.used("acme", "requests") == 0)


def test_what_is_kept_counts_as_files_and_bytes(tmp_path: Path) -> None:
    """Sessions, clients, samplers and checkpoints count, including those from before a restart; removals make room."""
    with small_service(tmp_path, quotas=small_quotas(files=5)) as service:
        run = begun(service)
        service.create_sampler("acme", run.session, 0, None)
        for _ in range(2):
            service.create_sampler("acme", run.session, 1, None)
        told(service, run, 1, "save_weights", b'{"path": "one"}')
        used = service.quotas.used("acme", "disk")
        on_disk = sum(path.stat().st_size for path in (tmp_path / "tinker").rglob("*") if path.is_file())
        assert on_disk <= used < 2 * on_disk
        for more in (
            lambda: service.create_session("acme", None),
            lambda: service.create_run("acme", run.session, 1, Lora(2), None),
            lambda: service.create_sampler("acme", run.session, 2, None),
        ):
            with pytest.raises(Refused, match=r"limit \(files\)") as error:
                more()
            assert error.value.code == "storage_full"
        refused = json.loads(told(service, run, 2, "save_weights", b'{"path": "two"}').data)
        assert "limit (files)" in refused["error"]
        begun(service, "globex")
    with small_service(tmp_path, quotas=small_quotas(files=5)) as service:
        assert service.quotas.used("acme", "files") == 5
        with pytest.raises(Refused, match=r"limit \(files\)"):
            service.create_session("acme", None)
        service.remove(service.run("acme", run.id), "weights/one")
        service.create_session("acme", None)


def test_a_full_disk_quota_refuses_requests_and_states(tmp_path: Path) -> None:
    with small_service(tmp_path, quotas=small_quotas(disk=20_000)) as service:
        run = begun(service)
        with pytest.raises(Refused, match=r"limit \(disk\)"):
            service.submit(run, 1, "forward", bytes(20_001))
        answer = told(service, run, 1, "forward", forward_body(run.id, 1, ROWS))
        assert "limit (disk)" in json.loads(answer.data)["error"]  # no room for the state created by a first pass
        assert told(service, run, 2, "refused", b"no room").kind == "failed"


def test_metadata_has_a_limit(tmp_path: Path) -> None:
    with small_service(tmp_path, quotas=small_quotas(metadata=100)) as service:
        run = begun(service)
        big = {"a": "x" * 100}
        for make in (
            lambda: service.create_session("acme", big),
            lambda: service.create_run("acme", run.session, 1, Lora(2), big),
        ):
            with pytest.raises(Refused, match="metadata") as error:
                make()
            assert error.value.status == 413
        body = json.dumps({"path": "one", "user_metadata": big}).encode()
        assert "metadata" in json.loads(told(service, run, 1, "save_weights", body).data)["error"]


def test_runs_that_are_listed_stay_on_the_disk(tmp_path: Path) -> None:
    with small_service(tmp_path) as service:
        session = service.create_session("acme", None)
        for number in range(70):
            service.create_run("acme", session.id, number, Lora(2), None)
        assert len(service.runs) == 64
    with small_service(tmp_path) as service:
        ids = service.runs_of("acme")
        assert len({service.described("acme", id).name for id in ids}) == 70
        assert not service.runs


def test_a_crash_at_any_request_loses_nothing(tmp_path: Path) -> None:
    """The folder as a kill leaves it after each request, taken up by another process: what was answered is there, what
    was not is done, and the client ends where it would have ended."""
    with small_service(tmp_path / "whole") as service:
        run = begun(service)
        id, whole = run.id, steps(service, run, 1, 7)
        for seq in range(1, 7):
            copy = tmp_path / f"kill-{seq}"
            shutil.copytree(tmp_path / "whole", copy, ignore=shutil.ignore_patterns("lock"))
            journal = copy / "tinker" / id.partition(":")[0] / "train-0" / "journal"
            _cut(journal, seq)
    for seq in range(1, 7):
        with small_service(tmp_path / f"kill-{seq}") as service:
            run = service.run("acme", id)
            future = service.answer(run, seq)
            assert future is not None, "it was taken before the kill"
            future.result(60)
            went_on = steps(service, run, seq + 1 + seq % 2, 7) if seq % 2 == 0 else _odd(service, run, seq)
            assert went_on == whole[len(whole) - len(went_on) :]


def _odd(service: TinkerService, run: TrainingRun, seq: int) -> list[float]:
    told(service, run, seq + 1, "optim_step", STEP)
    return steps(service, run, seq + 2, 7)


def _cut(journal: Path, seq: int) -> None:
    """As it was when request `seq` had come and its answer was being written."""
    data, at = journal.read_bytes(), 0
    while True:
        line = data.index(b"\n", at)
        head = json.loads(data[at:line])
        end = line + 1 + head["n"]
        if head["k"] == "told" and head["seq"] == seq:
            journal.write_bytes(data[: (line + end) // 2])
            return
        at = end


def test_closing_logs_states_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_service(tmp_path) as service:
        first, second = begun(service), begun(service)
        whole = steps(service, first, 1, 5)
        steps(service, second, 1, 3)
        shutil.rmtree(first.folder / "states", ignore_errors=True)
        (first.folder / "states").write_text("in the way")
    (told,) = [record for record in caplog.records if first.id in record.getMessage()]
    assert "could not be written" in told.getMessage()
    assert told.exc_info
    assert not any(second.id in record.getMessage() for record in caplog.records)
    (first.folder / "states").unlink()
    with small_service(tmp_path) as service:
        again = service.run("acme", first.id)
        assert steps(service, again, 5, 7)[0] < whole[-1]


def test_an_eviction_is_a_wait(tmp_path: Path) -> None:
    """Room for one of two clients: their states go to the disk and come back, and neither notices."""
    with small_service(tmp_path / "wide") as service:
        alone = [steps(service, begun(service, seed=seed), 1, 7) for seed in (1, 2)]
        room = 4 * sum(p.nbytes for p in _parameters(service))
    with small_service(tmp_path / "narrow", room=room) as service:
        runs = [begun(service, seed=seed) for seed in (1, 2)]
        found: list[list[float]] = [[], []]
        for seq in (1, 3, 5):
            for run, losses in zip(runs, found, strict=True):
                losses += steps(service, run, seq, seq + 2)
        assert (tmp_path / "narrow" / "tinker" / runs[0].session / "train-0" / "states").is_dir()
        assert found == alone
    narrow = tmp_path / "narrow"
    with small_service(narrow, room=room // 4) as service:  # begun anew with less
        run = service.run("acme", runs[0].id)
        answer = told(service, run, 7, "forward", forward_body(run.id, 7, ROWS))
        assert "the server has room for" in json.loads(answer.data)["error"]
        with pytest.raises(ConfigError, match=f"rank 4096 takes .* room for {room // 4:,}"):  # before it is made
            begun(service, rank=4096)


def test_one_that_is_not_wanted_leaves_the_memory_and_nobody_notices(tmp_path: Path) -> None:
    with small_service(tmp_path, days=1) as service:
        run, other = begun(service), begun(service)
        whole = steps(service, other, 1, 7)
        found = steps(service, run, 1, 3)
        service.rest(run)
        service.submit(other, 7, "optim_step", STEP)
        until(lambda: run.id not in service.runs)
        before = service.answer(run, 2)
        assert before is not None
        assert before.result(0).kind == "json"
        assert found + steps(service, run, 3, 7) == whole
        assert service.runs[run.id] is not run


def _parameters(service: TinkerService) -> list[torch.Tensor]:
    run = next(iter(service.runs.values()))
    assert run.learner is not None
    return list(run.learner.parameters.values())


def test_a_clients_mistake_is_its_own_answer_and_undoes_itself(tmp_path: Path) -> None:
    """It says what is wrong; the next request is as if it had never been, whoever shares the pass."""
    with small_service(tmp_path) as service:
        run, other = begun(service), begun(service, "globex", rank=4)
        first = told(service, run, 1, "forward", forward_body(run.id, 1, ROWS))
        endless = forward_body(run.id, 2, ROWS, weights=lambda targets: [3e38] * len(targets))
        service.submit(run, 2, "forward", endless)
        service.submit(other, 1, "forward", forward_body(other.id, 1, ROWS))
        bad, good = service.answer(run, 2), service.answer(other, 1)
        assert bad is not None
        assert good is not None
        said = json.loads(bad.result(60).data)
        assert "loss is not finite" in said["error"]
        assert said["category"] == "user"
        assert loss(good.result(60)) > 0
        for seq, (body, what) in enumerate(
            [
                ({"adam_params": {"learning_rate": -1}}, "learning_rate is -1"),
                ({}, "AdamW's alone"),
                ({"adam_params": {"rate": 1}}, "adam_params has no 'rate'"),
                ({"adam_params": {"learning_rate": 1e308}}, "learning_rate is 1e+308: from 0 to 1"),
                ({"adam_params": {"eps": 0}}, "eps is 0.0"),
                ({"adam_params": {"weight_decay": 1e9}}, "weight_decay"),
                ({"adam_params": {"learning_rate": None}}, "learning_rate is not a finite number"),
                ({"adam_params": {"learning_rate": 10**400}}, "learning_rate is not a finite number"),
            ],
            3,
        ):
            answer = told(service, run, seq, "optim_step", json.dumps(body).encode())
            assert what in json.loads(answer.data)["error"]
        kinds = {
            "save_weights": {"path": 12, "ttl_seconds": "day", "user_metadata": ["a"]},
            "save_weights_for_sampler": {"path": True, "sampling_session_seq_id": "x"},
            "load_weights": {"path": [1]},
        }
        wrong = [(kind, {name: value}) for kind, own in kinds.items() for name, value in own.items()]
        for seq, (kind, body) in enumerate(wrong, 11):
            refused = json.loads(told(service, run, seq, kind, json.dumps(body).encode()).data)
            assert (next(iter(body)) in refused["error"], refused["category"]) == (True, "user"), refused
        last = 11 + len(wrong)
        again = told(service, run, last, "forward", forward_body(run.id, last, ROWS))
        assert again.data == first.data
        assert told(service, run, last + 1, "optim_step", STEP).kind == "json"


def test_what_is_saved_is_an_adapter_of_the_library(tmp_path: Path) -> None:
    """It loads with its moments or without; another's is not there; a name is taken once; a time to live ends."""
    with small_service(tmp_path) as service:
        run = begun(service)
        steps(service, run, 1, 5)
        path = json.loads(told(service, run, 5, "save_weights", b'{"path": "one"}').data)["path"]
        assert path == f"tinker://{run.id}/weights/one"
        saved = service.saved("acme", path)
        folder = service.library.resolve(saved.reference)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in folder.iterdir()}
        assert load_adapter(small_base(), str(folder)).digest() == saved.digest
        taken = told(service, run, 6, "save_weights", b'{"path": "one"}')
        assert "there is a checkpoint" in json.loads(taken.data)["error"]
        assert told(service, run, 7, "save_weights", b'{"path": "one", "overwrite": true}').kind == "json"
        went_on = steps(service, run, 8, 12)
        again = service.create_from("acme", run.session, 1, path, True, None)
        assert steps(service, again, 1, 5) == went_on
        fresh = service.create_from("acme", run.session, 2, path, False, None)
        without = steps(service, fresh, 1, 5)
        assert without[0] == went_on[0]
        assert without[1] != went_on[1]
        back = told(service, run, 12, "load_weights", json.dumps({"path": path, "optimizer": True}).encode())
        assert back.kind == "json"
        assert steps(service, run, 13, 17) == went_on
        with pytest.raises(NotHere, match="there is no training run"):
            service.saved("globex", path)
        for name in ("../one", "", "a/b"):
            with pytest.raises((ConfigError, NotHere)):
                service.saved("acme", f"tinker://{run.id}/weights/{name}")
            with pytest.raises(ConfigError):
                run.checkpoints.place("weights", name)
        run.checkpoints.keep_for("weights/one", -1)
        assert run.checkpoints.all() == []
        run.checkpoints.sweep()
        with pytest.raises(Exception, match=r"no adapter|has no"):
            service.library.find(saved.reference)


def test_answers_are_kept_for_a_while_and_half_a_record_is_none(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    for seq in range(1, KEPT + 20):
        journal.asked(seq, "forward", b"x" * seq)
        journal.told(seq, FutureResult("json", str(seq).encode()))
    journal.trim(KEPT)
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"k": "asked", "seq": 9999, "op": "forward", "n": 50}\nhalf')
    again = Journal.open(tmp_path / "journal")
    assert sorted(again.requests) == list(range(KEPT + 1, KEPT + 20))
    assert sorted(again.answers) == list(range(20, KEPT + 20))
    assert again.last == KEPT + 19
    again.asked(KEPT + 20, "forward", b"whole")
    third = Journal.open(tmp_path / "journal")
    assert third.body(KEPT + 20) == b"whole"


def test_what_nobody_comes_back_for_goes_and_what_was_saved_stays(tmp_path: Path) -> None:
    """Sessions that nobody used for a month: of one that saved something that is left, and goes on in another session;
    of one that did not, nothing is. One that was used lately stays whole."""
    with small_service(tmp_path) as service:
        saver, idle, lately = (begun(service) for _ in range(3))
        for run in (saver, idle, lately):
            steps(service, run, 1, 3)
        path = json.loads(told(service, saver, 3, "save_weights", b'{"path": "one"}').data)["path"]
        service.create_sampler("acme", idle.session, 0, None)
        told(service, saver, 4, "save_weights_for_sampler", b'{"sampling_session_seq_id": 1}')
        went_on = steps(service, saver, 5, 7)
    for session in (saver.session, idle.session):
        for file in (tmp_path / "tinker" / session).rglob("*"):
            os.utime(file, (0, time.time() - 31 * 86400))
    with small_service(tmp_path) as service:
        until(lambda: not (tmp_path / "tinker" / idle.session).exists())
        with pytest.raises(NotHere, match="there is no training run"):
            service.run("acme", idle.id)
        left = tmp_path / "tinker" / saver.session / "train-0"
        until(lambda: not any((left / name).exists() for name in ("states", "snapshots")))
        with pytest.raises(SessionOver, match="not used for 30 days"):
            service.submit(service.run("acme", saver.id), 7, "optim_step", STEP)
        with pytest.raises(SessionOver, match="is over"):
            service.sampler("acme", f"{saver.session}:sample:1")
        assert steps(service, service.run("acme", lately.id), 3, 5) == went_on
        again = service.create_from("acme", lately.session, 1, path, True, None)
        assert steps(service, again, 1, 3) == went_on
        service.run("acme", saver.id).checkpoints.keep_for("weights/one", -1)
    with small_service(tmp_path):
        until(lambda: not (tmp_path / "tinker" / saver.session).exists())


def test_a_session_ends_under_those_who_wait(tmp_path: Path) -> None:
    """One that its client ended takes nothing new, and goes in a while with what still waits in it."""
    with small_service(tmp_path, days=3 / 86400) as service:
        run = begun(service)
        service.submit(run, 2, "optim_step", STEP)
        waits = service.answer(run, 2)
        assert waits is not None
        service.finish("acme", run.session)
        with pytest.raises(SessionOver, match="is over"):
            service.submit(run, 3, "optim_step", STEP)
        with pytest.raises(SessionOver, match="is over"):
            service.create_run("acme", run.session, 1, Lora(2), None)
        assert "went away" in json.loads(waits.result(60).data)["error"]
        with pytest.raises(SessionOver, match="is over"):
            service.answer(run, 2)
        until(lambda: not (tmp_path / "tinker" / run.session).exists())
