"""Write Ollama's Modelfile for an exported GGUF file.

Ollama renders messages with a Go template, not with the base's Jinja template. This module finds the text
around each role's messages by rendering a sample conversation, and writes a Go template with the same text.
Source: parser/parser.go and template/template.go of Ollama.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError
from veneer.models.text.base import TextBase
from veneer.models.text.gguf_write import adds_bos

_SYSTEM, _USER, _ANSWER, _NEXT = "the-system-text", "the-first-question", "the-answer", "the-next-question"


@dataclass(frozen=True)
class Turns:
    """The text before and after the messages of each role.

    default: text at the beginning of a conversation without a system message (if `joined`, of each conversation).
    system: text around a system message, or None if the template accepts none. If `joined`, the message is
        part of the first user turn, and the second text separates the two.
    begin: text that begins an answer."""

    default: str
    system: tuple[str, str] | None
    joined: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    begin: str

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the prompt for (role, content) pairs."""
        has_system = messages[0][0] == "system"
        out = "" if has_system and not self.joined else self.default
        for i, (role, content) in enumerate(messages):
            before, after = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}[role]
            if self.joined and role == "system":
                continue
            if self.joined and has_system and i == 1:
                before += messages[0][1] + (self.system or ("", ""))[1]
            out += before + content + after
        return out + self.begin

    def to_go(self) -> str:
        """Return the same as Ollama's Go template."""
        joined = "{{ if eq $i 1 }}{{ $.System }}" + (self.system or ("", ""))[1] + "{{ end }}"
        turns = {
            "user": self.user[0] + (joined if self.joined else "") + "{{ .Content }}" + self.user[1],
            "assistant": "{{ .Content }}".join(self.assistant),
        }
        if self.system and not self.joined:
            turns["system"] = "{{ .Content }}".join(self.system)
        choices = [f'{{{{ if eq .Role "{role}" }}}}{text}{{{{ end }}}}' for role, text in turns.items()]
        always = not self.default or self.joined
        start = self.default if always else f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}"
        return f"{start}{{{{ range $i, $_ := .Messages }}}}{''.join(choices)}{{{{ end }}}}{self.begin}"


def chat_turns(tokenizer: Any) -> Turns:
    """Return the text that a chat template puts around messages.

    The token that llama.cpp puts before every prompt is left out. Raises ConfigError if the template is
    missing or does more than put text around messages."""
    fix = "write a TEMPLATE for this base by hand (docs.ollama.com/template) and export with --for gguf"
    if not tokenizer.chat_template:
        raise ConfigError("the base has no chat template, which Ollama needs", fix=fix)
    first = tokenizer.bos_token if adds_bos(tokenizer) else ""

    def rendered(*messages: tuple[str, str], begin: bool = False) -> str:
        listed = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=begin)
        return str(text).removeprefix(first)

    user, answer, following, system = ("user", _USER), ("assistant", _ANSWER), ("user", _NEXT), ("system", _SYSTEM)
    try:
        head, _, after_user = rendered(user).partition(_USER)
        begin = rendered(user, begin=True).removeprefix(head + _USER + after_user)
        after_answer = rendered(user, answer).partition(_ANSWER)[2]
        middle, _, rest = rendered(user, answer, following).partition(_USER)[2].partition(_ANSWER)
        before_user = rest.partition(_NEXT)[0].removeprefix(after_answer)
        turns = Turns(
            head.removesuffix(before_user),
            None,
            False,
            (before_user, after_user),
            (middle.removeprefix(after_user), after_answer),
            begin,
        )
        conversations = [[user], [user, answer, following]]
        same = all(turns.render(c) == rendered(*c, begin=True) for c in conversations)
    except Exception as error:  # a template can raise anything
        raise ConfigError(f"the base's chat template cannot be rendered: {error}", fix=fix) from error
    parts = [turns.default, *turns.user, *turns.assistant, begin]
    if not same or any(mark in part for part in parts for mark in ("{{", "}}", _USER, _ANSWER)):
        raise ConfigError("the base's chat template does more than put text around messages", fix=fix)
    for joined in (False, True):
        try:
            start, _, between = rendered(system, user).partition(_USER)[0].partition(_SYSTEM)
            around = (start, between) if joined else (start, between.removesuffix(before_user))
            candidate = Turns(turns.default, around, joined, turns.user, turns.assistant, begin)
            conversations = [[system, user], [system, user, answer, following]]
            if all(candidate.render(c) == rendered(*c, begin=True) for c in conversations):
                return candidate
        except Exception:  # the template refuses system messages
            break
    return turns


def modelfile(base: TextBase, file: str, system: str = "") -> tuple[str, list[str]]:
    """Return the text of a Modelfile for the GGUF file `file` next to it, and notes.

    system: a system message for conversations without one. Raises the errors of `chat_turns`, and
    ConfigError for text that a Modelfile cannot contain."""
    turns = chat_turns(base.tokenizer)
    notes = [] if turns.system else ["the chat template accepts no system message; Ollama leaves out system messages"]
    if system and not turns.system:
        problem = "the adapter has a system message, but the base's chat template accepts none"
        raise ConfigError(problem, fix="export with --for gguf")
    lines = [f"FROM ./{file}", f'TEMPLATE """{_text(turns.to_go())}"""']
    stops = [base.tokenizer.convert_ids_to_tokens(i) for i in base.stop_ids]
    lines += [f'PARAMETER stop "{_text(stop)}"' for stop in dict.fromkeys(stops)]
    settings = getattr(base.model, "generation_config", None)
    if settings is not None and settings.do_sample:
        lines += [
            f"PARAMETER {name} {value:g}"
            for name in ("temperature", "top_p", "top_k")
            if (value := getattr(settings, name)) is not None
        ]
    if system:
        lines.append(f'SYSTEM """{_text(system)}"""')
    return "\n".join(lines) + "\n", notes


def _text(text: str) -> str:
    """Return a text if Ollama's parser reads it back unchanged; it drops characters that are not printable."""
    lost = sorted({c for c in text if not c.isprintable() and c not in "\n\t"})
    if '"""' in text or lost:
        what = f"the characters {', '.join(map(ascii, lost))}" if lost else 'three quotation marks (""")'
        raise ConfigError(f"a Modelfile cannot contain {what}: {text[:60]!r}", fix="export with --for gguf")
    return text
