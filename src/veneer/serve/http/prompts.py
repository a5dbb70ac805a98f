"""Texts, messages and token ids -> prompts; tokens -> texts and bytes. All that a surface asks of a tokenizer.

A tokenizer encodes in one thread at a time (the fast ones keep settings inside), and never on the event loop: a prompt
of a megabyte takes a second, and nobody else should wait for it.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from veneer.errors import VeneerError
from veneer.serve.http.errors import invalid
from veneer.serve.request import Refused

if TYPE_CHECKING:
    from veneer.models.text import TextBase

__all__ = ["Prompts", "Text"]

T = TypeVar("T")


class Text(Protocol):
    """What the surfaces need of a TextBase."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def context(self) -> int: ...
    @property
    def has_chat_template(self) -> bool: ...


class Prompts:
    """One base's tokenizer, as the surfaces use it."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.context = text.context
        self.size = len(text.tokenizer)
        self._special = frozenset(map(int, text.tokenizer.all_special_ids))
        self._lock = threading.Lock()
        self._piece = cache(self._make_piece)

    async def _alone(self, work: Callable[[], T]) -> T:
        def locked() -> T:
            with self._lock:
                return work()

        return await asyncio.to_thread(locked)

    # -- in

    async def of_text(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of a text as it is. `special`: with what the tokenizer puts around texts (bos, say)."""
        ids = await self._alone(lambda: self.text.tokenizer(_clean(text), add_special_tokens=special)["input_ids"])
        return tuple(map(int, ids))

    async def spans(self, text: str, *, special: bool = True) -> list[tuple[int, int, int]]:
        """(token id, start, stop) in characters of the text."""
        tokenizer, text = self.text.tokenizer, _clean(text)
        if not tokenizer.is_fast:
            raise invalid("this base's tokenizer does not say which characters a token covers", "inputs")
        settings = {"add_special_tokens": special, "return_offsets_mapping": True}
        made = await self._alone(lambda: tokenizer(text, **settings))
        return [(int(i), *span) for i, span in zip(made["input_ids"], made["offset_mapping"], strict=True)]

    def of_ids(self, ids: Sequence[int], param: str = "prompt") -> tuple[int, ...]:
        """Token ids that a client gave. Raises Refused(400) for one that is not in the vocabulary."""
        wrong = [i for i in ids if not 0 <= i < self.size]
        if wrong:
            raise invalid(f"token id {str(wrong[0])[:20]} is not one of the vocabulary's 0 … {self.size - 1}", param)
        return tuple(ids)

    async def of_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> tuple[int, ...]:
        """A conversation through the chat template. `variables`: what the client gives the template.

        Raises Refused(400) where there is no template, or it refuses."""
        from veneer.models.generate import encode_prompt  # late: a server listens before torch is there

        settings = set(inspect.signature(self.text.tokenizer.apply_chat_template).parameters) | {"base", "prompt"}
        reserved = sorted(set(variables) & (settings - {"add_generation_prompt", "continue_final_message"}))
        if reserved:  # parameters of the call that renders are no business of a client's
            raise invalid(f"{reserved[0]!r} is not a variable of the template", "chat_template_kwargs")
        if tools:
            variables["tools"] = [dict(tool) for tool in tools]
        turns = [_turn(i, message) for i, message in enumerate(messages)]
        base = cast("TextBase", self.text)
        try:
            return tuple(await self._alone(lambda: encode_prompt(base, turns, **variables)))
        except VeneerError as error:
            raise invalid(error.what, "messages", error.fix) from error

    @property
    def takes_tools(self) -> bool:
        template = self.text.tokenizer.chat_template
        texts = template.values() if isinstance(template, Mapping) else [template or ""]
        return any(re.search(r"\btools\b", str(t)) for t in texts)

    def fits(self, ids: Sequence[int], param: str = "prompt") -> int:
        """How many tokens an answer may have at most. Raises Refused(400) where the prompt leaves no room for one."""
        if not ids:
            raise invalid("the prompt has no tokens", param, "write something")
        room = self.context - len(ids)
        if room < 1:
            what = f"this base's context has {self.context} tokens, and the prompt {len(ids)}"
            raise Refused(what, status=400, code="context_exceeded", param=param, fix="shorten the prompt")
        return room

    # -- out

    async def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        read = self.text.tokenizer.decode
        settings = {"skip_special_tokens": skip_special, "clean_up_tokenization_spaces": False}
        return str(await self._alone(lambda: read(list(ids), **settings)))

    def piece(self, token: int) -> tuple[str, tuple[int, ...]]:
        """(text, bytes) of one token by itself; the text of half a character is "�", its bytes are right."""
        return self._piece(token)

    def special(self, token: int) -> bool:
        return token in self._special

    def _make_piece(self, token: int) -> tuple[str, tuple[int, ...]]:
        tokenizer = self.text.tokenizer
        text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        raw = str(tokenizer.convert_ids_to_tokens(token) or "")
        if "�" not in text:
            return text, tuple(text.encode("utf-8", "replace"))
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", raw):  # SentencePiece's bytes
            return text, (int(found[1], 16),)
        table = _byte_level()
        if raw and all(c in table for c in raw):  # byte-level BPE's alphabet
            return text, tuple(table[c] for c in raw)
        return text, tuple(text.encode("utf-8", "replace"))


def _clean(text: str) -> str:
    """A lone surrogate has no UTF-8, and tokenizers fail on it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _turn(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates take it: content is a text, and `developer` (OpenAI's newer word) is `system`."""
    turn = {key: value for key, value in message.items() if value is not None}
    content = turn.get("content", "")
    if isinstance(content, list):
        content = "".join(_part(i, part) for part in content)
    turn["content"] = _clean(content)
    if turn["role"] == "developer":
        turn["role"] = "system"
    return turn


def _part(i: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("text", "refusal") and isinstance(part.get(kind), str):
        return str(part[kind])
    raise invalid(
        f"messages.{i}.content: a part of type {str(kind)[:40]!r}, and this base reads text alone", "messages"
    )


@cache
def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for 256, 257, …"""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + n): b for n, b in enumerate(rest)}}
