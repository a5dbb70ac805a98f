"""OpenAI's grader routes, with OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.sandboxes import sandbox_or_skip
from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyTenancy, ToyText, live
from veneer.jobs.http.graders import grader_routes
from veneer.serve.settings import HttpSettings, QuotaLimits

CHECK: dict[str, Any] = {
    "type": "string_check", "name": "same", "operation": "eq", "input": "{{ sample.output_text }}",
    "reference": "{{ item.want }}",
}  # fmt: skip
PYTHON: dict[str, Any] = {
    "type": "python",
    "name": "mine",
    "source": "def grade(sample, item):\n    return item['n'] / 4\n",
}


def score(says: str, model: str = "toy") -> dict[str, Any]:
    """Let the toy model answer with the last line of its prompt."""
    return {
        "type": "score_model",
        "name": "taste",
        "model": model,
        "range": [0, 10],
        "input": [{"role": "user", "content": f"{{{{ sample.output_text }}}}\nSAY:{says}"}],
    }


@pytest.fixture(scope="module", params=[True, False], ids=["python", "no-python"])
def grading(request: pytest.FixtureRequest) -> Iterator[Any]:
    routes = grader_routes(sandbox=sandbox_or_skip() if request.param else None)
    with (
        live(ToyEngine(ToyText()), ToyCatalog(), ToyTenancy(), routers=[routes]) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="admin", max_retries=0) as client,
    ):
        yield client, request.param


@pytest.fixture
def graders(grading: Any) -> Any:
    return grading[0].fine_tuning.alpha.graders


def test_run(graders: Any) -> None:
    result = graders.run(grader=CHECK, model_sample="Paris", item={"want": "Paris"})
    assert result.reward == 1
    assert (result.metadata.name, result.metadata.type) == ("same", "string_check")
    assert result.metadata.execution_time >= 0
    assert not any(result.metadata.errors.to_dict().values())
    assert graders.run(grader=CHECK, model_sample="Rome", item={"want": "Paris"}).reward == 0


def test_grade_without_a_value_has_a_reason(graders: Any) -> None:
    result = graders.run(grader=CHECK, model_sample="Paris", item={"wanted": "Paris"})
    assert result.reward == 0
    assert result.metadata.errors.invalid_variable_error
    unparsed = {**CHECK, "input": "{{ sample.output_json.city }}"}
    assert graders.run(grader=unparsed, model_sample="Paris", item={"want": "x"}).metadata.errors.sample_parse_error


def test_score_model_grader_uses_this_servers_model(graders: Any) -> None:
    result = graders.run(grader=score("8"), model_sample="a poem")
    assert result.reward == 8
    usage = result.api_model_grader_token_usage_per_model["toy"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"] == result.metadata.token_usage
    assert result.metadata.sampled_model_name == "toy"
    result = graders.run(grader=score("lovely"), model_sample="a poem")
    assert (result.reward, result.metadata.errors.api_model_grader_parse_error) == (0, True)
    with pytest.raises(openai.NotFoundError):
        graders.run(grader=score("8", model="nobody"), model_sample="a poem")


def test_grader_requests_are_limited_and_billed(grading: Any) -> None:
    client = grading[0].with_options(api_key="acme")
    with pytest.raises(openai.RateLimitError):
        client.fine_tuning.alpha.graders.run(grader=score("8"), model_sample="a poem")
    few = {**score("8"), "sampling_params": {"max_completions_tokens": 20}}
    assert client.fine_tuning.alpha.graders.run(grader=few, model_sample="a poem").reward == 8
    with pytest.raises(openai.NotFoundError):  # an adapter of others
        client.fine_tuning.alpha.graders.run(grader={**few, "model": "polite"}, model_sample="a poem")


def test_multi_grader_combines_its_graders(graders: Any) -> None:
    both = {"type": "multi", "name": "both", "graders": {"a": CHECK, "b": score("4")}, "calculate_output": "a + b / 10"}
    result = graders.run(grader=both, model_sample="x", item={"want": "x"})
    assert result.reward == pytest.approx(1.4)
    assert result.sub_rewards == {"a": 1, "b": 4}


def test_validate_returns_the_grader(graders: Any) -> None:
    for grader in (CHECK, score("8")):
        assert graders.validate(grader=grader).grader.to_dict() == grader


@pytest.mark.parametrize(
    ("grader", "param"),
    [
        ({**CHECK, "operation": "is"}, "grader.operation"), ({**CHECK, "type": "strings"}, "grader"),
        ({**CHECK, "reference": "{{ nothing }}"}, "grader"), ({"type": "multi", "name": "m", "graders": {}}, "grader")
    ],
)  # fmt: skip
def test_invalid_grader_is_400(graders: Any, grader: Any, param: str) -> None:
    for call in (lambda: graders.validate(grader=grader), lambda: graders.run(grader=grader, model_sample="x")):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert str(caught.value.param).startswith(param)


def test_python_grader_runs_if_the_operator_allows_it(grading: Any) -> None:
    client, allowed = grading
    graders = client.fine_tuning.alpha.graders
    if not allowed:
        for call in (graders.validate, lambda **own: graders.run(model_sample="x", **own)):
            with pytest.raises(openai.PermissionDeniedError, match="--python-graders"):
                call(grader=PYTHON)
        return
    assert graders.validate(grader=PYTHON).grader.to_dict() == PYTHON
    assert graders.run(grader=PYTHON, model_sample="x", item={"n": 3}).reward == 0.75
    result = graders.run(grader=PYTHON, model_sample="x", item={})
    assert result.reward == 0
    assert result.metadata.errors.python_grader_runtime_error
    assert "KeyError: 'n'" in result.metadata.errors.python_grader_runtime_error_details


def test_text_over_a_limit_is_named(graders: Any) -> None:
    long = {**CHECK, "reference": "{{ item.want }}" * 100}
    with pytest.raises(openai.APIStatusError, match="more than 1,048,576 characters") as caught:
        graders.run(grader=long, model_sample="x", item={"want": "x" * 20_000})
    assert (caught.value.status_code, caught.value.code) == (413, "too_large")


def test_python_is_refused_before_parsing(grading: Any) -> None:
    client, allowed = grading
    if allowed:
        return
    broken = {**PYTHON, "source": "def grade(:"}
    for grader in (broken, {"type": "multi", "name": "m", "graders": {"a": broken}, "calculate_output": "a"}):
        with pytest.raises(openai.PermissionDeniedError):
            client.fine_tuning.alpha.graders.validate(grader=grader)


def test_grader_seconds_of_a_tenant_are_limited() -> None:
    limits = HttpSettings(quotas=QuotaLimits(helper_seconds=1e-9))
    routers = [grader_routes()]
    with (
        live(ToyEngine(ToyText()), ToyCatalog(), ToyTenancy(), settings=limits, routers=routers) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="acme", max_retries=0) as client,
    ):
        validate = client.fine_tuning.alpha.graders.validate
        big = {**CHECK, "reference": "{{ item.want }}" * 5000}
        validate(grader=big)
        with pytest.raises(openai.RateLimitError, match="helper_seconds"):
            validate(grader=big)
        client.with_options(api_key="admin").fine_tuning.alpha.graders.validate(grader=big)
