"""Request bodies of the text routes, converted to `Sampling`.

An invalid value raises Refused (400), which names the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from veneer.errors import ConfigError
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, KEYS, Body, MixField, Objects, Strict, at_most, mix_of
from veneer.serve.http.prompts import Prompts
from veneer.serve.http.service import Service
from veneer.serve.request import GrammarSpec, Sampling, invalid

# -- values ------------------------------------------------------------------------------------------------------------


def _prompt_form(value: Any) -> str:
    """Return the tag of a prompt value: =text, =ids, =texts or =lists."""
    if not isinstance(value, list):
        return "=text"
    first = value[0] if value else ""
    return "=ids" if isinstance(first, int | float) else "=texts" if isinstance(first, str) else "=lists"


Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], FAIL_FAST]
Bias = Annotated[dict[str, float], at_most(1024)]
Limit = Annotated[int, Field(ge=1, lt=1 << 31)]
Texts = Annotated[
    Annotated[str, Tag("=text")]
    | Annotated[Ids, Tag("=ids")]
    | Annotated[list[str], FAIL_FAST, at_most(ITEMS), Tag("=texts")]
    | Annotated[list[Ids], FAIL_FAST, at_most(ITEMS), Tag("=lists")],
    Discriminator(_prompt_form),
]
"""OpenAI's `prompt`: a text, a list of token ids, or a list of either.

The tags start with "=", so that error messages can leave them out.
"""
Stop = Annotated[
    Annotated[str, Tag("=one")] | Annotated[list[str], FAIL_FAST, at_most(KEYS), Tag("=several")],
    Discriminator(lambda value: "=several" if isinstance(value, list) else "=one"),
]
Choices = Annotated[list[str], FAIL_FAST, at_most(1000)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Strict):
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    json_object: bool | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Objects | None = None
    name: str | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # OpenAI's client sends these fields back with an assistant message; they must be null.
    refusal: None = None
    audio: None = None
    annotations: None = None
    function_call: None = None


# -- bodies ------------------------------------------------------------------------------------------------------------


class TextBody(Body):
    """Fields shared by the bodies of chat completions and completions."""

    ignored: ClassVar = frozenset(
        (
            "metadata",
            "service_tier",
            "parallel_tool_calls",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prediction",
            "request_id",
            "spaces_between_special_tokens",
        )
    )
    refused: ClassVar = {
        **dict.fromkeys(("use_beam_search", "early_stopping", "include_stop_str_in_output"), False),
        **dict.fromkeys(("no_stop_trim", "return_hidden_states"), False),  # vllm-router adds these
        **{key: [] for key in ("bad_words", "allowed_token_ids", "logits_processors")},
        **{key: {} for key in ("mm_processor_kwargs", "vllm_xargs")},
        **dict.fromkeys(("truncate_prompt_tokens", "kv_transfer_params", "structural_tag"), None),
        "skip_special_tokens": True,
        "length_penalty": 1.0,
        "priority": 0,
        "best_of": 1,
    }

    limit_name: ClassVar = "max_tokens"
    model: str = Field(default="", max_length=512, description="the base, an adapter, a route, or base:adapter")
    mix: MixField | None = None
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=512, description="only prompts with equal salts share cached blocks"
    )
    lora_path: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[Ids, at_most(64)] | None = None
    min_tokens: int = Field(default=0, ge=0, lt=1 << 31)
    ignore_eos: bool = False
    logit_bias: Bias | None = None
    n: int | None = Field(default=None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    store: bool | None = Field(default=None, description="if false, the completion is not stored for feedback")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def choices(self, service: Service) -> int:
        n, most = self.n or 1, service.settings.max_choices
        if n > most:
            raise invalid(f"n is {n}", "n", f"at most {most} answers to a prompt")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options requires stream", "stream_options")
        return n

    def adapters(self) -> dict[str, Any]:
        """Return the keyword arguments for `Service.choose`."""
        return {"model": self.model, "mix": mix_of(self.mix), "lora_path": self.lora_path}

    def sampling(
        self,
        service: Service,
        *,
        available: int,
        max_tokens: int | None,
        grammar: GrammarSpec | None = None,
        **more: Any,
    ) -> Sampling:
        """Return the request's sampling parameters.

        `available`: tokens left in the context. `more`: further parameters, such as logprobs.
        """
        names = "min_tokens temperature top_p min_p presence_penalty frequency_penalty repetition_penalty seed"
        return sampling_of(
            **{name: getattr(self, name) for name in names.split()},
            **more,
            max_tokens=limited(max_tokens, available, service, self.limit_name),
            top_k=None if self.top_k is None else max(self.top_k, 0),
            logit_bias=bias_of(self.logit_bias, service.prompts),
            stop=stops_of(self.stop, service.settings.max_stops),
            stop_ids=service.prompts.of_ids(self.stop_token_ids or [], "stop_token_ids"),
            ignore_eos=self.ignore_eos,
            grammar=_one_grammar([grammar, *self._grammars()]),
        )

    def _grammars(self) -> list[GrammarSpec | None]:
        """Return the grammars that the request asks for, in all fields that can contain a grammar."""
        form, structured = self.response_format, self.structured_outputs or StructuredOutputs()
        grammars: list[GrammarSpec | None] = []
        if form is not None and form.type == "json_schema":
            if form.json_schema is None:
                raise invalid("response_format has no json_schema", "response_format")
            grammars.append(("json_schema", schema_text(form.json_schema.json_schema, "response_format")))
        if structured.json_schema is not None:
            grammars.append(("json_schema", schema_text(structured.json_schema, "structured_outputs")))
        if structured.regex is not None:
            grammars.append(("regex", structured.regex))
        if structured.choice is not None:
            grammars.append(("regex", choices_regex(structured.choice)))
        if structured.json_object or (form is not None and form.type == "json_object"):
            grammars.append(("json_object", ""))
        return grammars


class ChatBody(TextBody):
    refused: ClassVar = {
        **TextBody.refused,
        **dict.fromkeys(("prompt_logprobs", "audio", "web_search_options", "reasoning_effort", "verbosity"), None),
        "chat_template": None,
        **dict.fromkeys(("echo", "add_special_tokens"), False),
        **dict.fromkeys(("return_tokens_as_token_ids", "return_token_ids"), False),
        **dict.fromkeys(("separate_reasoning", "stream_reasoning", "include_reasoning"), True),
        **{key: [] for key in ("functions", "documents")},
        "function_call": "none",
        "modalities": ["text"],
    }
    messages: Annotated[list[Message], FAIL_FAST, at_most(ITEMS)] = Field(min_length=1)
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[Objects, at_most(128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def limit(self) -> int | None:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise invalid("max_tokens and max_completion_tokens differ", "max_completion_tokens", "keep one")
        return next(iter(both), None)

    def alternatives(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs requires logprobs", "top_logprobs", "logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def variables(self) -> dict[str, Any]:
        """Return the chat template's variables, without messages and tools."""
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise invalid("the last message is not an assistant message", "continue_final_message")
        return template_variables(self.chat_template_kwargs, self.add_generation_prompt, self.continue_final_message)


class CompletionBody(TextBody):
    refused: ClassVar = {**TextBody.refused, "suffix": ""}
    prompt: Texts
    max_tokens: Limit | None = 16
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="number of most likely tokens to return for each prompt token, as in vLLM",
    )
    add_special_tokens: bool = True
    return_token_ids: bool = Field(
        default=False, description="also return token ids, as in vLLM, and the digests of the adapters that were used"
    )
    return_tokens_as_token_ids: bool = Field(
        default=False, description="in logprobs, write each token as token_id:N, as in vLLM"
    )

    def texts(self, service: Service) -> list[str | list[int]]:
        """Return the prompts as a list."""
        prompt: Any = self.prompt
        prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
        most = service.settings.max_prompts
        if not 0 < len(prompts) <= most:
            raise invalid(f"there are {len(prompts)} prompts", "prompt", f"from 1 to {most}")
        if len(prompts) * (self.n or 1) > most:
            raise invalid(f"{len(prompts)} prompts with {self.n} answers each", "n", f"at most {most} answers")
        return prompts


def template_variables(
    kwargs: dict[str, Any] | None, add_generation_prompt: bool, continue_final_message: bool
) -> dict[str, Any]:
    """Convert a body's fields to chat template variables, without messages and tools."""
    variables = dict(kwargs or {})
    if continue_final_message:
        variables["continue_final_message"] = True
    if continue_final_message or not add_generation_prompt:
        variables["add_generation_prompt"] = False
    return variables


# -- conversion --------------------------------------------------------------------------------------------------------


def sampling_of(**values: Any) -> Sampling:
    """Return a Sampling with these values; a parameter with the value None has its default.

    Raises Refused (400), which names the invalid value.
    """
    try:
        return Sampling(**{key: value for key, value in values.items() if value is not None})
    except ConfigError as error:
        raise invalid(error.what, error.where, error.fix) from error


def stops_of(stop: Stop | None, most: int) -> tuple[str, ...]:
    stops = tuple([stop] if isinstance(stop, str) else stop or [])
    if len(stops) > most:
        raise invalid(f"stop has {len(stops)} texts", "stop", f"at most {most}")
    if any(not 0 < len(s) <= 1000 for s in stops):
        raise invalid("a stop text is empty or longer than 1,000 characters", "stop")
    return stops


def bias_of(bias: Bias | None, prompts: Prompts) -> dict[int, float]:
    """Return logit_bias as token id -> bias; in JSON, the ids are strings."""
    biases: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or not math.isfinite(value) or abs(value) > 100:
            raise invalid(f"logit_bias {key[:20]!r}: {value}", "logit_bias", "token id: a number from -100 to 100")
        biases[prompts.of_ids([int(key)], "logit_bias")[0]] = value
    return biases


def schema_text(schema: Any, param: str) -> str:
    """Return a JSON schema as text. `schema`: an object, or JSON text."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(parsed, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param} is not a JSON schema", param) from error
    if not isinstance(parsed, dict | bool):
        raise invalid(f"{param} is not a JSON schema", param, "an object")
    return text


def choices_regex(choices: Sequence[str]) -> str:
    """Return a regular expression that matches these texts and nothing else."""
    if not choices or any(not c for c in choices):
        raise invalid("choice needs at least one text, and none can be empty", "structured_outputs")
    return "(" + "|".join(re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", c) for c in choices) + ")"


def _one_grammar(grammars: Sequence[GrammarSpec | None]) -> GrammarSpec | None:
    present = [grammar for grammar in grammars if grammar is not None]
    if len(present) > 1:
        raise invalid("several fields set the format of the answer", "response_format", "keep one")
    return present[0] if present else None


def limited(requested: int | None, available: int, service: Service, param: str = "max_tokens") -> int:
    """Return the maximum number of tokens for a completion.

    `requested`: None for as many as possible. `param`: the field's name. Raises Refused (400) if `requested`
    exceeds `available` or the server's limit.
    """
    most = service.settings.max_tokens or available
    if requested is None:
        return max(1, min(available, most))
    if requested > available:
        context = service.prompts.context
        message = (
            f"{requested} tokens are requested, but the prompt leaves {available} of the context's {context} tokens"
        )
        raise invalid(message, param, "request fewer, or shorten the prompt")
    if requested > most:
        raise invalid(f"{param} is {requested}", param, f"at most {most} on this server")
    return requested
