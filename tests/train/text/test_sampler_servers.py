"""Reinforcement with sampling servers equals the run with the embedded engine, whatever happens to a server.

The servers are real ones in threads, with the run's library. Faulty servers are the real ones behind a function
that changes their answers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.library.conftest import _s3_server, postgres, s3  # noqa: F401
from tests.serve.http.toy import free_port
from tests.serve.whole import Shop, Whole, served
from tests.train.stopping import interrupt_at
from tests.train.text.drawn_runs import REWARDED, config_of, measured, run_drawn, with_prompts
from tests.train.text.tiny_runs import TENSORS
from veneer.errors import ConfigError, Interrupted, TrainingError
from veneer.library.library import open_library
from veneer.models.text.base import TextBase
from veneer.train.checkpoint import seed_of
from veneer.train.events import Event, Note, Stepped

STEPS = 4
OURS = {"gap_kl", "weight", "drawn_seconds", "prompt_cached", "dropped_answers"}
"""Metrics that depend on where completions are sampled."""


class Place(Shop):
    """A shop with the base of `with_prompts`."""

    @property
    def base_dir(self) -> Path:
        return self.folder / "tiny-base"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = with_prompts(tmp_path_factory.mktemp("servers"), lambda i: {"team": "it" if i % 2 else "hr"})
    (folder / "adapters").mkdir()
    return Place(folder)


@pytest.fixture(scope="module")
def servers(place: Place) -> Iterator[list[Whole]]:
    with served(place, batch_invariant=True) as one, served(place, batch_invariant=True) as two:
        yield [one, two]


@pytest.fixture(autouse=True)
def shared_library(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_LIBRARY", place.library.location)


@pytest.fixture(scope="module")
def base(place: Place) -> TextBase:
    return place.base


@pytest.fixture(scope="module")
def embedded(place: Place, base: TextBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of the run that samples in this process."""
    output = tmp_path_factory.mktemp("embedded")
    train(place, output, base, [])
    return output


def train(
    place: Place,
    output: Path,
    base: TextBase,
    samplers: list[str],
    on_event: Callable[[Event], None] | None = None,
    resume: bool = False,
    **own: Any,
) -> None:
    r = own.pop("reinforcement", {}) | ({"samplers": samplers} if samplers else {})
    steps = {"schedule": {"steps": STEPS}, "evaluation": {"every": 2, "keep": "last"}} | own
    run_drawn(config_of(REWARDED, place.folder, output, reinforcement=r, **steps), base, on_event, resume)


def same(one: Path, other: Path) -> bool:
    logs = [[{k: v for k, v in x.items() if k not in OURS} for x in measured(each)] for each in (one, other)]
    return (one / TENSORS).read_bytes() == (other / TENSORS).read_bytes() and logs[0] == logs[1]


def notes_of(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


@contextlib.contextmanager
def in_front_of(
    url: str,
    change: Callable[[dict[str, Any]], Any] = lambda answer: answer,
    hold: Callable[[dict[str, Any]], None] = lambda request: None,
) -> Iterator[str]:
    """Forward requests to `url`, and yield an address whose answers are changed by `change`.

    `change` can return bytes instead of an object, or raise ConnectionError to close the connection. `hold` is
    called with each request before it is forwarded."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            hold(json.loads(body))
            answer = httpx.post(f"{url}{self.path}", content=body, headers={"content-type": "application/json"})
            try:
                changed = change(answer.json()) if answer.status_code == 200 else answer.content
            except ConnectionError:
                return
            content = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
            self.send_response(answer.status_code)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content)

        def log_message(self, *args: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# -- equal runs --------------------------------------------------------------------------------------------------------


def test_run_on_servers_equals_the_embedded_run(
    place: Place, servers: list[Whole], base: TextBase, embedded: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    train(place, tmp_path, base, [server.url for server in servers], events.append)
    assert same(tmp_path, embedded)
    metrics = measured(tmp_path)
    assert [x["gap_max"] for x in metrics] == [0.0] * STEPS
    assert [(x["gap_kl"], x["weight"], x["policy_lag"]) for x in metrics] == [(0.0, 1.0, 0.0)] * STEPS
    assert all(server.engine.stats().generated_tokens for server in servers)  # both took a part
    with open_library() as library:
        assert not library.search(name="sampling-")  # the run's versions are removed at its end
    assert "Sampler-trainer mismatch: estimate of the KL" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_other_settings_equal_the_embedded_run(
    place: Place, servers: list[Whole], base: TextBase, tmp_path: Path
) -> None:
    own = {"updates": 2, "temperature": 0.8, "top_p": 0.9, "kl": 0.1}
    train(place, tmp_path / "here", base, [], reinforcement=own)
    train(place, tmp_path / "there", base, [servers[0].url + "/v1"], reinforcement=own)
    assert same(tmp_path / "there", tmp_path / "here")


@pytest.mark.slow
def test_a_library_on_s3_between_trainer_and_samplers_changes_nothing(
    place: Place,
    base: TextBase,
    embedded: Path,
    tmp_path: Path,
    s3: str,  # noqa: F811
    postgres: Callable[[], str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trainer and samplers have the bucket and PostgreSQL in common, and no folder."""
    monkeypatch.setenv("VENEER_LIBRARY", location := f"{s3}/library")
    monkeypatch.setenv("VENEER_LIBRARY_INDEX", postgres())
    far = Place(place.folder)
    far.library = open_library(location)
    with served(far, batch_invariant=True) as server:
        train(place, tmp_path, base, [server.url], reinforcement={"publish": "acme/policy"})
        assert server.engine.stats().generated_tokens
    far.library.close()
    assert same(tmp_path, embedded)


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly(
    place: Place, servers: list[Whole], base: TextBase, embedded: Path, tmp_path: Path
) -> None:
    urls = [server.url for server in servers]
    with pytest.raises(Interrupted):
        train(place, tmp_path, base, urls, interrupt_at(3))
    train(place, tmp_path, base, urls, resume=True)
    assert same(tmp_path, embedded)


@pytest.mark.slow
def test_a_lost_server_does_not_change_the_run(
    place: Place, servers: list[Whole], base: TextBase, embedded: Path, tmp_path: Path
) -> None:
    """A sampler closes its connections from the second step on; then both do, until the run says so."""
    events: list[Event] = []
    down: set[int] = set()

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, Stepped):
            down.update({1: {0}, 2: {0, 1}}.get(event.step, ()))
        if isinstance(event, Note) and "the run waits" in event.text:
            down.clear()

    def lost(which: int) -> Callable[[dict[str, Any]], Any]:
        def change(answer: dict[str, Any]) -> Any:
            if which in down:
                raise ConnectionError
            return answer

        return change

    with in_front_of(servers[0].url, lost(0)) as one, in_front_of(servers[1].url, lost(1)) as two:
        train(place, tmp_path, base, [one, two], on_event)
    assert same(tmp_path, embedded)
    notes = notes_of(events)
    assert f"the sampler {one} is set aside: RemoteProtocolError" in notes
    assert "no sampler is available; the run waits until one is" in notes
    assert "is available again" in notes


@pytest.mark.slow
def test_a_server_that_is_away_at_the_start_is_waited_for(
    place: Place, servers: list[Whole], base: TextBase, embedded: Path, tmp_path: Path
) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    events: list[Event] = []
    train(place, tmp_path, base, [gone, servers[0].url], events.append)
    assert f"the sampler {gone} is set aside: ConnectError" in notes_of(events)
    assert same(tmp_path, embedded)


# -- staleness ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_staleness_samples_ahead_within_its_bound(
    place: Place, servers: list[Whole], base: TextBase, tmp_path: Path
) -> None:
    """The first step's completions are fresh; later ones are at most as old as allowed, and weighted."""
    own = {"staleness": 2, "gap": 100.0}
    train(place, tmp_path, base, [server.url for server in servers], reinforcement=own)
    metrics = measured(tmp_path)
    assert [x["policy_lag"] for x in metrics] == [0.0, 1.0, 2.0, 2.0]
    assert metrics[0]["gap_mean"] == 0.0
    assert metrics[-1]["gap_mean"] > 0
    assert metrics[-1]["gap_kl"] > 0
    assert metrics[-1]["weight"] != 1.0


@pytest.mark.slow
def test_servers_sample_while_the_trainer_trains(
    place: Place, servers: list[Whole], base: TextBase, tmp_path: Path
) -> None:
    """With staleness 1, a step ends although the samplers hold back the completions of the next one."""
    ended, waited = threading.Event(), threading.Event()
    seeds = {seed_of(0, 2, row, k) for row in range(12) for k in range(6)}  # of the second step

    def on_event(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 1:
            ended.set()

    def hold(request: dict[str, Any]) -> None:
        if request["seed"] in seeds:
            waited.set()
            assert ended.wait(300)

    with in_front_of(servers[0].url, hold=hold) as url:
        own = {"staleness": 1, "gap": 100.0}
        train(place, tmp_path, base, [url], on_event, reinforcement=own, data={"split": 0}, schedule={"steps": 2})
    assert waited.is_set()


# -- faulty servers ----------------------------------------------------------------------------------------------------


def altered(**values: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a change of the answer's only choice; a function as a value gets the old one."""

    def change(answer: dict[str, Any]) -> Any:
        choice = answer["choices"][0]
        for key, value in values.items():
            choice[key] = value(choice[key]) if callable(value) else value
        return answer

    return change


def from_other(answer: dict[str, Any]) -> Any:
    answer["sampled_by"]["adapters"] = [["sha256:" + "0" * 64, 1.0]]
    return answer


def from_base(answer: dict[str, Any]) -> Any:
    return answer | {"sampled_by": answer["sampled_by"] | {"base": "sha256:another"}}


def nan(logprobs: dict[str, Any]) -> dict[str, Any]:
    return logprobs | {"token_logprobs": [float("nan")] * len(logprobs["token_logprobs"])}


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "adapter": (from_other, "it sampled from .*0000.* instead of sha256:"),
    "base": (from_base, "its base is sha256:another"),
    "tokens": (altered(token_ids=lambda ids: [*ids, 5, 5, 5, 5, 5, 5, 5, 5]), "log-probabilities"),
    "vocabulary": (altered(token_ids=lambda ids: [1 << 20] * len(ids)), "not in the vocabulary"),
    "nan": (altered(logprobs=nan), "is not finite, or is positive"),
    "positive": (altered(sampling_logprobs=lambda values: [1.0] * len(values)), "is not finite, or is positive"),
    "reason": (altered(finish_reason="error"), "ended with 'error'"),
    "page": (lambda answer: b"<html>\x1b[2J</html>", "not a completion with token_ids"),
    "nested": (lambda answer: b"[" * 100_000, "not a completion with token_ids"),
    "number": (altered(sampling_logprobs=lambda values: [-(10**400)] * len(values)), "not a completion"),
    "huge": (lambda answer: b"[" * (8 << 20), "exceeds"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_is_refused_at_the_start(
    place: Place, servers: list[Whole], base: TextBase, tmp_path: Path, fault: str
) -> None:
    change, message = FAULTS[fault]
    with (
        in_front_of(servers[0].url, change) as url,
        pytest.raises(ConfigError, match=message) as error,
    ):
        train(place, tmp_path, base, [url])
    assert url in str(error.value.where)
    assert "\x1b" not in str(error.value)


@pytest.mark.slow
def test_answers_of_a_server_that_turns_faulty_are_dropped(
    place: Place, servers: list[Whole], base: TextBase, embedded: Path, tmp_path: Path
) -> None:
    """The good server takes over the requests, and the step counts the dropped answers."""
    answered = threading.Event()

    def change(answer: dict[str, Any]) -> Any:
        good = not answered.is_set()
        answered.set()
        return answer if good else from_other(answer)

    with in_front_of(servers[0].url, change) as url:
        train(place, tmp_path, base, [url, servers[1].url], evaluation={"at_start": False, "every": 2, "keep": "last"})
    assert (tmp_path / TENSORS).read_bytes() == (embedded / TENSORS).read_bytes()
    assert sum(x.get("dropped_answers", 0) for x in measured(tmp_path)) > 0


@pytest.mark.slow
def test_a_run_with_only_faulty_servers_stops(
    place: Place, servers: list[Whole], base: TextBase, tmp_path: Path
) -> None:
    answered = threading.Event()

    def change(answer: dict[str, Any]) -> Any:
        good = not answered.is_set()
        answered.set()
        return answer if good else altered(token_ids=[])(answer)

    with in_front_of(servers[0].url, change) as url, pytest.raises(TrainingError, match="cannot be used") as error:
        train(place, tmp_path, base, [url], evaluation={"at_start": False, "every": 100})
    assert url in str(error.value.where)


@pytest.mark.slow
def test_a_server_that_lies_about_its_adapter_is_found_by_the_mismatch(
    place: Place, servers: list[Whole], base: TextBase, tmp_path: Path
) -> None:
    """The server claims the requested digest, but its log-probabilities are not those of the adapter."""

    def lie(logprobs: dict[str, Any]) -> dict[str, Any]:
        return logprobs | {"token_logprobs": [x - 0.2 for x in logprobs["token_logprobs"]]}

    change = altered(logprobs=lie, sampling_logprobs=lambda values: [x - 0.2 for x in values])
    with (
        in_front_of(servers[0].url, change) as url,
        pytest.raises(TrainingError, match=r"differ by 0\.2 nats") as error,
    ):
        train(place, tmp_path, base, [url])
    assert "samplers" in str(error.value.fix)


@pytest.mark.slow
def test_a_server_without_the_library_is_refused(
    place: Place, servers: list[Whole], base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"HTTP 404: .*does not exist") as error:
        train(place, tmp_path / "run", base, [servers[0].url])
    assert "--library" in str(error.value.fix)


def test_the_key_is_sent_and_never_shown(
    place: Place, base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(place, batch_invariant=True, keys=("right-key",)) as server:
        monkeypatch.setenv("VENEER_SAMPLER_KEY", "wrong-key")
        with pytest.raises(ConfigError, match="HTTP 401") as error:
            train(place, tmp_path, base, [server.url], schedule={"steps": 1})
        assert "wrong-key" not in str(error.value)
        assert "VENEER_SAMPLER_KEY" in str(error.value.fix)
        monkeypatch.setenv("VENEER_SAMPLER_KEY", "right-key")
        train(place, tmp_path, base, [server.url], schedule={"steps": 1})


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"samplers": ["ftp://host"]}, "is not a URL like"),
        ({"samplers": ["http://user:secret@host:1"]}, "host is not a URL like"),
        ({"staleness": 1}, "needs `reinforcement.samplers`"),
        ({"publish": "a"}, "needs `reinforcement.samplers`"),
        ({"samplers": ["http://a:1"], "updates": 2, "staleness": 1}, "must be a multiple"),
    ],
)
def test_contradictory_settings_are_refused(place: Place, tmp_path: Path, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config_of(REWARDED, place.folder, tmp_path, reinforcement=own)
    assert "secret" not in str(error.value)


# -- the library -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_the_run_s_own_versions_are_removed(
    place: Place, servers: list[Whole], base: TextBase, embedded: Path, tmp_path: Path
) -> None:
    """The name can have other versions; while the run goes on, it adds at most two of its own."""
    counts: list[int] = []
    with open_library() as library:
        own = library.add(embedded, "acme/policy").version.reference

        def on_event(event: Event) -> None:
            if isinstance(event, Stepped):
                counts.append(len(library.search(name="acme/policy", all_versions=True)))

        train(place, tmp_path, base, [servers[0].url], on_event, reinforcement={"publish": "acme/policy"})
        assert max(counts) <= 3
        assert [v.reference for v in library.search(name="acme/policy", all_versions=True)] == [own]
        library.remove("acme/policy")
