"""The sampling parameters of text bodies: their types, and conversion to `Sampling`.

A value out of range is Refused (400), under the client's key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from veneer.errors import ConfigError
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, KEYS, at_most
from veneer.serve.http.prompts import Prompts
from veneer.serve.http.service import Service
from veneer.serve.request import GrammarSpec, Sampling, invalid

_LONGEST_GRAMMAR = 200_000

# -- values ------------------------------------------------------------------------------------------------------------

_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = Annotated[dict[str, float], at_most(1024)]


def _kind(value: Any) -> str:
    """Which of the four forms of a prompt a value has."""
    if not isinstance(value, list):
        return "=text"
    first = value[0] if value else ""
    return "=ids" if isinstance(first, int | float) else "=texts" if isinstance(first, str) else "=lists"


def _one_or_several(value: Any) -> str:
    return "=several" if isinstance(value, list) else "=one"


Ids = Annotated[list[_TokenId], FAIL_FAST]
Texts = Annotated[
    Annotated[str, Tag("=text")]
    | Annotated[Ids, Tag("=ids")]
    | Annotated[list[str], FAIL_FAST, at_most(ITEMS), Tag("=texts")]
    | Annotated[list[Ids], FAIL_FAST, at_most(ITEMS), Tag("=lists")],
    Discriminator(_kind),
]
"""OpenAI's prompts: a text or token ids, or a list of either.

Tags begin with = because they are not part of a body: errors omit them.
"""
Stop = Annotated[
    Annotated[str, Tag("=one")] | Annotated[list[str], FAIL_FAST, at_most(KEYS), Tag("=several")],
    Discriminator(_one_or_several),
]
Paths = Annotated[
    Annotated[str, Tag("=one")] | Annotated[list[str | None], FAIL_FAST, at_most(ITEMS), Tag("=several")],
    Discriminator(_one_or_several),
]
"""SGLang's lora_path: one name, or one for each prompt."""
# -- conversion --------------------------------------------------------------------------------------------------------


def sampling_of(**values: Any) -> Sampling:
    """A Sampling; None leaves the default.

    Raises Refused (400) that names the value out of range.
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
    """Token id -> bias, from JSON's text keys."""
    found: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or not math.isfinite(value) or abs(value) > 100:
            raise invalid(f"logit_bias {key[:20]!r}: {value}", "logit_bias", "token id: a number from -100 to 100")
        found[prompts.of_ids([int(key)], "logit_bias")[0]] = value
    return found


def schema_text(schema: Any, param: str) -> str:
    """A JSON schema, given as an object or text, as text."""
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(found, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param} is not a JSON schema", param) from error
    if not isinstance(found, dict | bool):
        raise invalid(f"{param} is not a JSON schema", param, "an object")
    if len(text) > _LONGEST_GRAMMAR:
        raise invalid(f"{param} has {len(text):,} characters", param, f"at most {_LONGEST_GRAMMAR:,}")
    return text


def choices_regex(choices: Sequence[str]) -> str:
    """A regular expression that matches exactly one of some texts."""
    if not choices or any(not c for c in choices):
        raise invalid("a choice is empty, or there is none", "guided_choice")
    return "(" + "|".join(re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", c) for c in choices) + ")"


def one_grammar(found: Sequence[GrammarSpec | None]) -> GrammarSpec | None:
    given = [g for g in found if g is not None]
    if len(given) > 1:
        raise invalid("the answer's form is given in several ways", "response_format", "keep one")
    return given[0] if given else None


def limited(wanted: int, room: int, service: Service, *, asked: bool) -> int:
    """The token limit of an answer.

    Raises Refused (400) if more is requested than possible.
    """
    most = service.settings.max_tokens or room
    if not asked:
        return max(1, min(wanted, room, most))
    if wanted > room:
        what = f"{wanted} tokens are wanted, and the context of {service.prompts.context} has room for {room}"
        raise invalid(what, "max_tokens", "ask for fewer, or shorten the prompt")
    if wanted > most:
        raise invalid(f"max_tokens is {wanted}", "max_tokens", f"this server makes at most {most}")
    return wanted
