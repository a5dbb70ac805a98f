"""Models as judges: over HTTP, or through a Python function."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from veneer.errors import ConfigError, UnavailableError
from veneer.train.config.rewards import JudgeReward
from veneer.train.rewards.build import build_rewards
from veneer.train.rewards.judge import Question, Reply
from veneer.train.rewards.reward import Answer, RewardScore
from veneer.train.rewards.server import ServerJudge
from veneer.train.rewards.template import MAX_FILLED

Says = Callable[[dict[str, Any], int], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, says: Says) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.says, self.asked, self.keys = says, list[dict[str, Any]](), list[str | None]()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print server errors, except disconnects of clients that stopped waiting, which some tests cause."""
        if not isinstance(sys.exception(), BrokenPipeError | ConnectionResetError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        self.server.asked.append(body)
        status, said = self.server.says(body, len(self.server.asked))
        if callable(said):
            return said(self)
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(says: Says) -> Iterator[Server]:
    with Server(says) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def completion(text: str | None, refusal: str | None = None, end: str = "stop") -> tuple[int, Any]:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return 200, {
        "choices": [{"message": message, "finish_reason": end}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }


def judged(server: Server | None, *texts: str, ask: Any = None, **more: Any) -> list[RewardScore]:
    own: dict[str, Any] = {"kind": "judge", "prompt": "{{ item.about }}? {{ sample.output_text }}"}
    section = JudgeReward(**own, url=server.url if server else None, **more)
    answers = [Answer([], text, {"about": "Good"}) for text in texts]
    with build_rewards([section], ask=ask, most_failed=1) as rewards:
        return rewards.judge(answers).scores["judge"]


def test_json_scores_are_scaled_to_the_range() -> None:
    replies = {"a": '{"steps": ["2 of 4 facts"], "result": 7}', "b": '```json\n{"steps": [], "result": 2.5}\n```'}
    with serving(lambda body, n: completion(replies[body["messages"][-1]["content"][6]])) as server:
        scores = judged(server, *replies, model="wise", at_once=2)
    assert [s.value for s in scores] == [0.7, 0.25]
    assert {body["model"] for body in server.asked} == {"wise"}
    assert {body["temperature"] for body in server.asked} == {0}
    texts = sorted(body["messages"][0]["content"] for body in server.asked)
    assert [text.partition("\n\n")[0] for text in texts] == [f"Good? {text}" for text in replies]
    assert all("JSON object" in text and "from 0 to 10" in text for text in texts)
    form = server.asked[0]["response_format"]["json_schema"]["schema"]
    for result, allowed in ((7, True), (2.5, True), (10, True), (11, False), ("7/10", False)):
        assert Draft202012Validator(form).is_valid({"steps": [], "result": result}) == allowed


SCORED_MESSAGES = [
    ("7", 0.7), ("Score: **4**", 0.4), ("0", 0), ("7, that is 7.0", 0.7), ('{"score": 6}', 0.6),
    ("I would say 3, no: 8.5.", None), ("2/10", None), ("80%", None), ("-1", None), ("\u22123", None),
    ('{"result": 3} or {"result": 8}', None), ('{"steps": ["5 facts"], "result": null}', None),
    ('{"result": NaN}', None), ('{"result": true}', None), ('{"result": 1' + "0" * 400 + "}", None),
    ("1,5", None), ("fine", None),
]  # fmt: skip


@pytest.mark.parametrize(("message", "value"), SCORED_MESSAGES)
def test_exactly_one_number_is_a_score(message: str, value: float | None) -> None:
    (score,) = judged(None, "x", ask=lambda questions: [Reply(message)] * len(questions))
    assert score.value == value
    assert bool(score.error) == (value is None)


def test_truncated_reply_has_no_score() -> None:
    with serving(lambda body, n: completion("The answer is 1", end="length")) as server:
        (served,) = judged(server, "x")
    (here,) = judged(None, "x", ask=lambda questions: [Reply("The answer is 1", cut=True)])
    for score in (served, here):
        assert score.value is None
        assert "truncated at its token limit" in score.error


@pytest.mark.parametrize(
    "error", [{"message": "unavailable", "param": "response_format.type"}, {"message": "no"}, "no"]
)
def test_response_format_is_omitted_if_unsupported(error: Any) -> None:
    def says(body: dict[str, Any], n: int) -> tuple[int, Any]:
        return (400, {"error": error}) if "response_format" in body else completion('{"result": 5}')

    with serving(says) as server:
        assert [s.value for s in judged(server, "x", "y", at_once=1)] == [0.5, 0.5]
    assert ["response_format" in body for body in server.asked] == [True, False, False]


def test_one_refused_question_does_not_affect_others() -> None:
    def says(body: dict[str, Any], n: int) -> tuple[int, Any]:
        return (400, {"error": "too long"}) if "bad" in body["messages"][0]["content"] else completion("5")

    with serving(says) as server:
        bad, fine = judged(server, "bad", "good", at_once=1)
    assert (bad.value, fine.value) == (None, 0.5)
    assert "response_format" in server.asked[-1]


def garbled(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    handler.wfile.write(b"no gzip")


UNUSABLE_REPLIES = [
    (completion("fine"), "no number"), (completion("11"), "outside 0 to 10"), (completion("-1"), "outside 0 to 10"),
    (completion(None, "I will not"), "I will not"), (completion(""), "is empty"), ((200, {"x": 1}), "not a chat"),
    ((200, garbled), "cannot be read"),
    ((400, {"error": {"message": "too long", "param": "messages"}}), "too long"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "error"), UNUSABLE_REPLIES)
def test_unusable_reply_has_no_score(message: tuple[int, Any], error: str) -> None:
    with serving(lambda body, n: message if "bad" in body["messages"][0]["content"] else completion("5")) as server:
        bad, fine = judged(server, "bad", "good")
    assert bad.value is None
    assert error in bad.error
    assert fine.value == 0.5


@pytest.mark.parametrize(
    ("part", "pause", "more", "error"),
    [(b" ", 0.02, {"timeout": 0.2}, "timed out 3 times"), (bytes(1 << 20), 0.0, {}, "exceeds 64 MB")],
    ids=["dripping", "pouring"],
)
def test_endless_responses_end(part: bytes, pause: float, more: dict[str, Any], error: str) -> None:
    """Some servers send a space now and then while they work, so no single read times out. Others would send data
    until the memory is full."""

    def endless(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while True:
                handler.wfile.write(part)
                time.sleep(pause)

    with serving(lambda body, n: (200, endless) if "bad" in str(body["messages"]) else completion("5")) as server:
        bad, fine = judged(server, "bad", "good", **more)
    assert (bad.value, fine.value) == (None, 0.5)
    assert error in bad.error


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://host:port/v1"])
def test_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="the judge's url is invalid"), ServerJudge(url, patience=0) as judge:
        judge([Question([], "m")])


def test_equal_questions_are_sent_once() -> None:
    with serving(lambda body, n: completion("5")) as server:
        assert len(judged(server, "same", "same", "other", "same")) == 4
    assert len(server.asked) == 2


def test_unavailable_judge_is_retried() -> None:
    with serving(lambda body, n: (503, {}) if n == 1 else completion("5")) as server:
        (score,) = judged(server, "x", patience=20)
    assert score.value == 0.5
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_unavailable_judge_stops_the_run(status: int) -> None:
    with serving(lambda body, n: (status, {})) as server, pytest.raises(UnavailableError, match=f"HTTP {status}"):
        judged(server, "x", patience=0)
    with pytest.raises(UnavailableError, match="ConnectError"):  # the server is stopped by now
        judged(server, "x", patience=0)


def test_late_reply_has_no_score() -> None:
    gone = threading.Event()

    def says(body: dict[str, Any], n: int) -> tuple[int, Any]:
        if "slow" in body["messages"][0]["content"]:
            gone.wait(5)
        return completion("5")

    with serving(says) as server:
        slow, fine = judged(server, "slow", "x", timeout=0.2)
        gone.set()
    assert "timed out 3 times" in slow.error
    assert fine.value == 0.5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_errors_common_to_all_questions_stop_immediately(status: int) -> None:
    with serving(lambda body, n: (status, {"error": "no"})) as server, pytest.raises(ConfigError, match=f"{status}"):
        judged(server, "x")


def test_unsupported_settings_are_omitted() -> None:
    def says(body: dict[str, Any], n: int) -> tuple[int, Any]:
        for param in ("max_tokens", "temperature"):
            if param in body:
                return 400, {"error": {"message": f"no {param}", "param": param}}
        return completion("5")

    with serving(says) as server:
        assert [s.value for s in judged(server, "x", "y", at_once=1)] == [0.5, 0.5]
    assert len(server.asked) == 4  # x is retried twice; y omits the refused options at once
    assert server.asked[-1]["max_completion_tokens"] == 512


def test_key_is_sent_and_never_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigError, match="JUDGE_KEY does not contain a valid API key"):
        ServerJudge("http://127.0.0.1:9/v1", key="JUDGE_KEY")
    with pytest.raises(ConfigError, match="contains a user name or a password") as in_url:
        ServerJudge("http://me:secret-word@127.0.0.1:9/v1")
    monkeypatch.setenv("JUDGE_KEY", "secret\nword")
    with pytest.raises(ConfigError, match="does not contain a valid API key") as invalid:
        ServerJudge("http://127.0.0.1:9/v1", key="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "secret-word\n")
    with serving(lambda body, n: (401, {"error": "who?"})) as server:
        with pytest.raises(ConfigError) as refused:
            judged(server, "x", key="JUDGE_KEY")
        assert server.keys == ["Bearer secret-word"]
    assert "secret" not in f"{in_url.value} {invalid.value} {refused.value} {caplog.text}"


def test_local_model_answers_through_a_function() -> None:
    asked: list[Question] = []

    def ask(questions: Sequence[Question]) -> list[Reply]:
        asked.extend(questions)
        return [Reply("3") if "x" in q.messages[0]["content"] else Reply(error="out of context") for q in questions]

    scores = judged(None, "x", "y", ask=ask, model="polite")
    assert [(s.value, s.error) for s in scores] == [(0.3, ""), (None, "out of context")]
    assert {q.model for q in asked} == {"polite"}
    with pytest.raises(ConfigError, match="no model is available"):
        judged(None, "x")


def test_too_long_prompt_has_no_score() -> None:
    def ask(questions: Sequence[Question]) -> list[Reply]:
        return [Reply("3") for _ in questions]

    long, short = judged(None, "x" * (MAX_FILLED + 1), "x", ask=ask)
    assert (long.value, short.value) == (None, 0.3)
    assert "characters" in long.error
