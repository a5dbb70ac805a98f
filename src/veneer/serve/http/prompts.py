"""Tokenization for the HTTP routes: texts, messages and token ids -> prompts; tokens -> texts and bytes.

A text's length is checked before the text is tokenized: a text with more characters than the longest text
that could fit in the context is rejected at once. Other texts are tokenized in admission threads, never on
the event loop. The threads share an immutable copy of the tokenizer, so that they do not wait for each other.
A tokenizer that cannot be copied (a slow tokenizer, or a subclass) encodes in one thread at a time.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from veneer.errors import VeneerError
from veneer.serve.engine.admission import AdmittedRequest
from veneer.serve.request import Refused, invalid

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizedBase:
    """A base's tokenizer.

    `context`: maximum tokens of prompt and completion together; for an image base, the limit of its first
    text encoder. `family`: the architecture's name in transformers. `parameters`: number of weights, 0 if
    unknown. `stored`: the dtype of most weights in the files, such as "BF16". `size`: bytes of the weight files.
    """

    name: str
    tokenizer: Any
    context: int
    has_chat_template: bool = False
    family: str = ""
    parameters: int = 0
    stored: str = ""
    size: int = 0


class Prompts:
    """Converts between texts and tokens for the HTTP routes, with one base's tokenizer."""

    def __init__(self, base: TokenizedBase) -> None:
        self.base = base
        self.context = base.context
        self.size = len(base.tokenizer)
        self._special = frozenset(map(int, base.tokenizer.all_special_ids))
        self._lock = threading.Lock()
        self.piece = cache(self._piece)
        """Returns (text, bytes) of a token. If the token is only part of a character, the text is "�".
        The bytes are always exact."""
        self._reader = _reader(base.tokenizer)
        self.most = self.context * max(map(len, base.tokenizer.get_vocab()))
        """Maximum characters of a text that fits in the context: its length if every token were the longest."""

    # -- encoding ------------------------------------------------------------------------------------------------------

    async def of_parts(
        self, texts: Sequence[str], admitted: AdmittedRequest, *, special: bool = True, param: str = "prompt"
    ) -> list[tuple[int, ...]]:
        """Return the token ids of each text.

        Raises Refused (400, context_exceeded) for a text that cannot fit.
        """
        for text in texts:
            self.measure(len(text), param)
        return await admitted.work(sum(map(len, texts)), lambda: [self.encode(t, special=special) for t in texts])

    def measure(self, characters: int, param: str = "prompt") -> None:
        """Raise Refused (400, context_exceeded) if a text has more than `most` characters.

        Called before the text is tokenized."""
        if characters > self.most:
            message = f"the prompt has {characters:,} characters; a context of {self.context:,} tokens holds at most "
            message += f"{self.most:,}"
            raise Refused(message, status=400, code="context_exceeded", param=param, fix="shorten the prompt")

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Return a text's token ids. Blocking: run in an admission thread."""
        text = _clean(text)
        if self._reader is not None:
            return tuple(_ids(self._reader, text, special))
        with self._lock:
            return tuple(map(int, self.base.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]))

    def of_ids(self, ids: Sequence[int], param: str = "prompt") -> tuple[int, ...]:
        """Return token ids from a client as a tuple.

        Raises Refused (400) for an id outside the vocabulary.
        """
        wrong = [i for i in ids if not 0 <= i < self.size]
        if wrong:
            raise invalid(f"token id {str(wrong[0])[:20]} is outside the vocabulary, 0 … {self.size - 1}", param)
        return tuple(ids)

    async def of_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        admitted: AdmittedRequest,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[int, ...]:
        """Return the token ids of a conversation, rendered with the chat template.

        `variables`: the client's variables for the template. Raises Refused (400) if the base has no chat
        template or if rendering fails.
        """
        from veneer.models.text.generate import (
            rendered,
        )  # imported late, because the server starts to listen before it imports torch

        settings = set(inspect.signature(self.base.tokenizer.apply_chat_template).parameters) | {"base", "prompt"}
        reserved = sorted(set(variables) & (settings - {"add_generation_prompt", "continue_final_message"}))
        if reserved:  # clients cannot set the parameters of `apply_chat_template`
            raise invalid(f"{reserved[0]!r} is not a variable of the template", "chat_template_kwargs")
        if tools:
            variables["tools"] = [dict(tool) for tool in tools]
        turns = [_turn(i, message) for i, message in enumerate(messages)]
        base = cast("TextBase", self.base)
        size = sum(len(turn["content"]) for turn in turns)
        self.measure(size, "messages")

        def read() -> tuple[int, ...]:
            text = rendered(base, turns, **variables)
            self.measure(len(text), "messages")
            return self.encode(text, special=False)

        try:
            return await admitted.work(size, read)
        except Refused:
            raise
        except VeneerError as error:
            raise invalid(error.what, "messages", error.fix) from error

    @property
    def template(self) -> str:
        """The chat template; if there are several, all of them."""
        template = self.base.tokenizer.chat_template
        return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template or "")

    @property
    def takes_tools(self) -> bool:
        return self.template_mentions("tools")

    def template_mentions(self, name: str) -> bool:
        """Return whether the chat template uses a variable or a key of this name."""
        return re.search(rf"\b{name}\b", self.template) is not None

    def fits(self, ids: Sequence[int], param: str = "prompt") -> int:
        """Return how many tokens the context leaves for a completion.

        Raises Refused (400) if the prompt is empty or fills the context.
        """
        if not ids:
            raise invalid("the prompt has no tokens", param, "write something")
        left = self.context - len(ids)
        if left < 1:
            message = f"this base's context has {self.context} tokens, but the prompt has {len(ids)}"
            raise Refused(message, status=400, code="context_exceeded", param=param, fix="shorten the prompt")
        return left

    # -- decoding ------------------------------------------------------------------------------------------------------

    async def decode(self, ids: Sequence[int], admitted: AdmittedRequest) -> str:
        read = self.base.tokenizer.decode
        settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(await admitted.work(len(ids), lambda: read(list(ids), **settings)))

    def special(self, token: int) -> bool:
        return token in self._special

    def _piece(self, token: int) -> tuple[str, tuple[int, ...]]:
        tokenizer = self.base.tokenizer
        text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        raw = str(tokenizer.convert_ids_to_tokens(token) or "")
        if "�" not in text:
            return text, tuple(text.encode("utf-8", "replace"))
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", raw):  # SentencePiece's bytes
            return text, (int(byte[1], 16),)
        table = _byte_level()
        if raw and all(c in table for c in raw):  # characters of byte-level BPE's alphabet
            return text, tuple(table[c] for c in raw)
        return text, tuple(text.encode("utf-8", "replace"))


_PROBES = (
    "",
    " Hello  there,\n\tworld! ",
    "ﬁne — naïve 東京 🙂 e\u0301",
    "<s>[INST] x </s><|im_end|>\n<|endoftext|>a",
    "01234 __a",
)


def _ids(reader: Any, text: str, special: bool) -> list[int]:
    """Return a text's token ids, encoded as a batch of one.

    Only batches are encoded without the GIL. A long text would otherwise hold the GIL for 50 ms and delay the
    engine. `encode_batch_fast` also skips offsets.
    """
    ids: list[int] = reader.encode_batch_fast([text], add_special_tokens=special)[0].ids
    return ids


def _reader(tokenizer: Any) -> Any:
    """Return a copy of a fast tokenizer, without padding and truncation.

    Many threads can use the copy at once. Returns None for a slow tokenizer, or if the copy's results differ
    from the tokenizer's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not tokenizer.is_fast:
        return None
    copy = type(backend).from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    for text in _PROBES:
        for special in (False, True):
            if _ids(copy, text, special) != list(
                tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            ):
                return None
    return copy


def _clean(text: str) -> str:
    """Replace lone surrogates, which have no UTF-8 encoding and make tokenizers fail."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _turn(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a single text."""
    turn = {key: value for key, value in message.items() if value is not None}
    content = turn.get("content", "")
    if isinstance(content, list):
        content = "".join(_part(i, part) for part in content)
    turn["content"] = _clean(content)
    return turn


def _part(i: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("text", "refusal") and isinstance(part.get(kind), str):
        return str(part[kind])
    if kind in ("text", "refusal"):
        raise invalid(f"messages.{i}.content: a part of type {kind!r} has no text under {kind!r}", "messages")
    message = f"a part of type {str(kind)[:40]!r}, but this base supports only text"
    raise invalid(f"messages.{i}.content: {message}", "messages")


@cache
def _byte_level() -> dict[str, int]:
    """Return GPT-2's byte alphabet as character -> byte.

    Printable bytes are represented by themselves, other bytes by the characters 256, 257, …
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + n): b for n, b in enumerate(rest)}}
