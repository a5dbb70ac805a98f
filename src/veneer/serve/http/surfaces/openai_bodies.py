"""What /v1/chat/completions and /v1/completions take: OpenAI's keys, vLLM's further ones, and the ways to a mix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from veneer.serve.http.errors import invalid
from veneer.serve.http.fields import (
    FIRST,
    ITEMS,
    Bias,
    Body,
    Grammar,
    Ids,
    Lora,
    MixField,
    Neutral,
    Objects,
    Paths,
    Seed,
    Stop,
    Strict,
    Texts,
    at_most,
    bias_of,
    checked,
    choices_regex,
    one_grammar,
    sampling,
    schema_text,
    stops_of,
)
from veneer.serve.http.house import House
from veneer.serve.request import Sampling

__all__ = ["Chat", "Completion", "Message", "StreamOptions", "grammar_of"]

_NO_BEAMS = "answers are sampled, not searched in beams"
_GREEDY_OR_NOT = "the answer would be another one"
Choices = Annotated[list[str], FIRST, at_most(1000)]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Shared(Body):
    """What chat and completions have in common."""

    ignored: ClassVar[frozenset[str]] = frozenset({
        "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "prediction", "guided_decoding_backend", "guided_whitespace_pattern", "request_id",
    })  # fmt: skip
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        "use_beam_search": ((False,), _NO_BEAMS),
        "length_penalty": ((1.0,), _NO_BEAMS),
        "early_stopping": ((False,), _NO_BEAMS),
        "prompt_logprobs": ((), "use echo with logprobs on /v1/completions"),
        "guided_grammar": ((), "grammars in EBNF are not read; use a JSON schema or a regular expression"),
        "bad_words": (([],), "use logit_bias"),
        "allowed_token_ids": (([],), "use logit_bias, or a grammar"),
        "logits_processors": (([],), "no code of a client's is run"),
        "skip_special_tokens": ((True,), "answers are text without special tokens"),
        "spaces_between_special_tokens": ((True, False), _GREEDY_OR_NOT),
        "include_stop_str_in_output": ((False,), "a stop text is never part of the answer; stop_reason names it"),
        "truncate_prompt_tokens": ((), "nothing is cut unasked; send a shorter prompt"),
        "return_tokens_as_token_ids": ((False,), "ask for logprobs, or use /tokenize"),
        "return_token_ids": ((False,), "ask for logprobs, or use /tokenize"),
        "priority": ((0,), "the operator sets each tenant's weight"),
        "kv_transfer_params": ((), "this server is one process"),
        "mm_processor_kwargs": (({},), "this base reads text alone"),
        "vllm_xargs": (({},), _GREEDY_OR_NOT),
        "structural_tag": ((), "use tools, or response_format"),
    }

    model: str = Field(default="", max_length=512, description="the base, an adapter, a route, or base:adapter")
    mix: MixField | None = None
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="prompts share what was computed under equal salts alone",
    )
    lora: Annotated[list[Lora], FIRST, at_most(64)] | None = None
    lora_path: Paths | None = None
    temperature: float | None = None
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
    best_of: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(default=None, max_length=20_000)
    guided_choice: Choices | None = None
    structured_outputs: dict[str, Any] | None = None

    def choices(self, house: House) -> int:
        n, most = self.n or 1, house.settings.max_choices
        if n > most:
            raise invalid(f"n is {n}", "n", f"at most {most} answers to a prompt")
        if self.best_of not in (None, n):
            raise invalid(f"best_of is {self.best_of} and n {n}", "best_of", "leave best_of out: every answer is sent")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options goes with stream", "stream_options")
        return n

    def path(self) -> str | None:
        """SGLang's lora_path, where it is the same for every prompt."""
        if not isinstance(self.lora_path, list):
            return self.lora_path
        if len(set(self.lora_path)) > 1:
            raise invalid(
                "lora_path names different adapters for one request's prompts", "lora_path", "one request each"
            )
        return self.lora_path[0] if self.lora_path else None

    def adapters(self) -> dict[str, Any]:
        """The arguments of House.choose."""
        mix = None if self.mix is None else [(part.adapter, part.strength) for part in self.mix]
        lora = None if self.lora is None else [(part.id, part.scale) for part in self.lora]
        return {"model": self.model, "mix": mix, "lora": lora, "lora_path": self.path()}

    def sampling(
        self, house: House, *, room: int, max_tokens: int | None, default: int, logprobs: int | None,
        prompt_logprobs: bool = False, grammar: Grammar | None = None,
    ) -> Sampling:  # fmt: skip
        """`room`: tokens that the context leaves; `default`: for a request that does not say how many it wants."""
        wanted = min(default, room) if max_tokens is None else max_tokens
        return sampling(
            max_tokens=limited(wanted, room, house, asked=max_tokens is not None),
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=bias_of(self.logit_bias, house.prompts),
            seed=self.seed,
            stop=stops_of(self.stop, house.settings.max_stops),
            stop_ids=house.prompts.of_ids(self.stop_token_ids or [], "stop_token_ids"),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=one_grammar([grammar, grammar_of(self)]),
        )


def limited(wanted: int, room: int, house: House, *, asked: bool) -> int:
    """How many tokens an answer gets. Raises Refused(400) for more than asked can be had."""
    most = house.settings.max_tokens or room
    if not asked:
        return max(1, min(wanted, room, most))
    if wanted > room:
        what = f"{wanted} tokens are wanted, and the context of {house.prompts.context} has room for {room}"
        raise invalid(what, "max_tokens", "ask for fewer, or shorten the prompt")
    if wanted > most:
        raise invalid(f"max_tokens is {wanted}", "max_tokens", f"this server makes at most {most}")
    return wanted


class _JsonSchema(Strict):
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None
    wanted: dict[str, Any] = Field(alias="schema")


class _Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _Structured(Strict):
    wanted: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = Field(default=None, max_length=20_000)
    choice: Choices | None = None
    json_object: bool | None = None


def grammar_of(body: Shared) -> Grammar | None:
    """The one form that the answer must have, by whatever name it was asked for."""
    found: list[Grammar | None] = []
    if body.response_format is not None:
        form: _Format = checked(_Format, body.response_format, "response_format")
        if form.type == "json_schema":
            if form.json_schema is None:
                raise invalid("response_format has no json_schema", "response_format")
            found.append(("json_schema", schema_text(form.json_schema.wanted, "response_format")))
        elif form.type == "json_object":
            found.append(("json_object", ""))
    structured: _Structured = checked(_Structured, body.structured_outputs or {}, "structured_outputs")
    for schema in (body.guided_json, structured.wanted):
        found.append(None if schema is None else ("json_schema", schema_text(schema, "guided_json")))
    for regex in (body.guided_regex, structured.regex):
        found.append(None if regex is None else ("regex", regex))
    for choice in (body.guided_choice, structured.choice):
        found.append(None if choice is None else ("regex", choices_regex(choice)))
    found.append(("json_object", "") if structured.json_object else None)
    return one_grammar(found)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Objects | None = None
    name: str | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What OpenAI's client gives back with an assistant's turn, always empty here.
    refusal: None = None
    audio: None = None
    annotations: None = None
    function_call: None = None


class Chat(Shared):
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        **Shared.refused,
        "functions": (([],), "it is the old form of tools"),
        "function_call": (("none",), "it is the old form of tool_choice"),
        "modalities": ((["text"],), "this base writes text alone"),
        "audio": ((), "this base writes text alone"),
        "web_search_options": ((), "this server looks nothing up"),
        "reasoning_effort": ((), "this base has no such setting; chat_template_kwargs reaches its template"),
        "verbosity": ((), "this base has no such setting"),
        "echo": ((False,), "a conversation is not repeated"),
        "chat_template": ((), "no template of a client's is run"),
        "documents": (([],), "write them into a message"),
        "add_special_tokens": ((False,), "the chat template writes them"),
    }
    messages: Annotated[list[Message], FIRST, at_most(ITEMS)] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
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
            raise invalid("top_logprobs goes with logprobs", "top_logprobs", "logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def variables(self) -> dict[str, Any]:
        """What the template gets beside messages and tools."""
        found = dict(self.chat_template_kwargs or {})
        if self.continue_final_message:
            if self.messages[-1].role != "assistant":
                raise invalid("the last message is not the assistant's", "continue_final_message")
            return {**found, "continue_final_message": True, "add_generation_prompt": False}
        return found if self.add_generation_prompt else {**found, "add_generation_prompt": False}


class Completion(Shared):
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        **Shared.refused,
        "suffix": (("",), "this base continues a text, and does not fill gaps"),
    }
    prompt: Texts
    max_tokens: int | None = Field(default=16, ge=1, lt=1 << 31)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    add_special_tokens: bool = True

    def texts(self, house: House) -> list[str | list[int]]:
        """The prompts, one for each."""
        given: Any = self.prompt
        prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        most = house.settings.max_prompts
        if not 0 < len(prompts) <= most:
            raise invalid(f"there are {len(prompts)} prompts", "prompt", f"from 1 to {most}")
        return prompts
