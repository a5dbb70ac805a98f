"""TGI's routes, including the keys that LoRAX adds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.http.toy import Live


def generate(server: Live, inputs: str = "Hi", **parameters: Any) -> Any:
    return server.post("/generate", {"inputs": inputs, "parameters": {"max_new_tokens": 60, **parameters}})


def test_generate(server: Live) -> None:
    found = generate(server, adapter_id="sql", top_n_tokens=2).json()
    assert found["generated_text"] == "[d-sql*1] Hi"
    details = found["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == len(details["tokens"])
    assert set(details["tokens"][0]) == {"id", "text", "logprob", "special"}
    assert details["tokens"][-1]["special"] is True
    assert [len(top) for top in details["top_tokens"][:-1]] == [2] * (len(details["tokens"]) - 1)
    assert details["prefill"] == []
    assert "details" not in generate(server, details=False).json()
    assert server.engine.seen[0].sampling.temperature == 0


def test_golden_texts_of_two_adapters_and_the_base(server: Live) -> None:
    assert generate(server, adapter_id="sql").json()["generated_text"] == "[d-sql*1] Hi"
    assert generate(server, adapter_id="polite").json()["generated_text"] == "[d-polite*1] Hi"
    assert generate(server).json()["generated_text"] == "[base] Hi"
    assert generate(server, adapter_id="").json()["generated_text"] == "[base] Hi"


def test_an_unknown_adapter_is_404_not_the_base(server: Live) -> None:
    answer = generate(server, adapter_id="nobody")
    assert (answer.status_code, answer.json()["error_type"]) == (404, "model_not_found")
    assert server.engine.seen == []


def test_a_mix_is_a_list(server: Live) -> None:
    answer = generate(server, mix=[{"adapter": "sql", "strength": 0.7}, "polite:0.6"], adapter_source="local").json()
    assert answer["generated_text"] == "[d-polite*0.6+d-sql*0.7] Hi"  # strengths are not normalized: Σ strength · ΔW
    assert generate(server, mix=["sql"], adapter_id="sql").status_code == 422
    assert generate(server, mix=["nobody"]).status_code == 404
    refused = generate(server, merged_adapters={"ids": ["sql"], "weights": [1]})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")


def test_the_stream_has_vllms_events(server: Live) -> None:
    body = {"inputs": "one two three", "parameters": {"max_new_tokens": 60, "seed": 5, "top_n_tokens": 1}}
    events = server.events("/generate_stream", body)
    assert [e["index"] for e in events] == list(range(1, len(events) + 1))
    assert "".join(e["token"]["text"] for e in events) == "[base] one two three"
    assert all(e["generated_text"] is None and e["details"] is None for e in events[:-1])
    assert all(len(e["top_tokens"]) == 1 for e in events[:-1])
    last = events[-1]
    assert last["generated_text"] == "[base] one two three"
    assert last["token"]["special"] is True
    assert last["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": len(events),
        "seed": 5,
        "input_length": len(server.engine.seen[0].prompt),
    }
    raw = server.post("/generate_stream", body).text
    assert raw.startswith('data:{"index":1,')


def test_streams_end_with_length_or_stop_sequence(server: Live) -> None:
    events = server.events("/generate_stream", {"inputs": "abc def", "parameters": {"max_new_tokens": 3}})
    assert len(events) == 3
    assert events[-1]["details"]["finish_reason"] == "length"
    assert events[-1]["generated_text"] == "".join(e["token"]["text"] for e in events)
    body = {"inputs": "abc def ghi", "parameters": {"max_new_tokens": 60, "stop": ["def"]}}
    last = server.events("/generate_stream", body)[-1]
    assert (last["details"]["finish_reason"], last["generated_text"]) == ("stop_sequence", "[base] abc def")


def test_errors_in_mid_stream(server: Live) -> None:
    events = server.events("/generate_stream", {"inputs": "FAIL now please"})
    assert events[-1] == {"error": "the GPU fell off the bus", "error_type": "generation"}


def test_statuses(server: Live) -> None:
    wrong = {"temperature": 0, "top_p": 0, "top_k": 0, "max_new_tokens": 0, "typical_p": 0.5, "watermark": True}
    wrong |= {"truncate": 10, "best_of": 2, "stop": ["x"] * 20, "adapter_source": "hub", "api_token": "secret"}
    wrong |= {"grammar": {"type": "json", "value": 5}, "tempature": 1}
    for parameters in (*({name: value} for name, value in wrong.items()), {"max_new_tokens": 5000}):
        answer = server.post("/generate", {"inputs": "Hi", "parameters": parameters})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), parameters
    assert "did you mean 'temperature'" in generate(server, tempature=1).text
    assert server.post("/generate", {"inputs": ""}).status_code == 422
    assert server.post("/generate", {}).status_code == 422
    failed = generate(server, "FAIL now please")
    assert (failed.status_code, failed.json()["error_type"]) == (424, "generation")
    full = generate(server, "FULL")
    assert (full.status_code, full.json()["error_type"], full.headers["retry-after"]) == (429, "overloaded", "3")
    neutral = {"typical_p": 1.0, "watermark": False, "decoder_input_details": False, "truncate": None, "best_of": 1}
    assert generate(server, **neutral).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "sampled"),
    [
        ({}, False), ({"do_sample": True}, True), ({"temperature": 0.7}, True), ({"temperature": 1.0}, False),
        ({"top_k": 5}, True), ({"top_p": 0.9}, True), ({"repetition_penalty": 1.1}, False),
    ],
)  # fmt: skip
def test_sampling_needs_a_sampling_parameter(server: Live, parameters: Any, sampled: bool) -> None:
    generate(server, **parameters)
    assert (server.engine.seen[0].sampling.temperature > 0) is sampled


def test_full_text_and_grammar(server: Live) -> None:
    assert generate(server, return_full_text=True).json()["generated_text"] == "Hi[base] Hi"
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    assert generate(server, grammar={"type": "json", "value": schema}).json()["generated_text"] == '{"n": 7}'
    assert generate(server, grammar={"type": "regex", "value": "(yes|no)"}).json()["generated_text"] == "yes"


def test_the_root_accepts_streamed_and_whole_requests(server: Live) -> None:
    assert server.post("/", {"inputs": "Hi"}).json()[0]["generated_text"] == "[base] Hi"
    assert server.events("/", {"inputs": "Hi", "stream": True})[-1]["generated_text"] == "[base] Hi"


def test_the_info_route_describes_the_server(server: Live) -> None:
    found = server.get("/info").json()
    assert (found["model_id"], found["max_total_tokens"], found["max_input_tokens"]) == ("toy", 512, 511)
