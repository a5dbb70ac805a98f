"""Render a row as its training text, and mark the trained characters.

    text             "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n"
    trained_spans    [(53, 68)]

With a chat template, the trained part of an assistant turn starts where the generation prompt ends (the text
that inference shows the model) and ends after the end-of-turn marker. The position is found by rendering the
conversation up to the turn, so templates do not need `{% generation %}`. A row is refused if that rendering
is not a prefix of the rendering of the whole conversation.

Without a template (`chat_template: none`, or a base without a template), prompt and completion are
concatenated, instruction rows use the Alpaca prompt, and the end-of-text token follows. This module does not
depend on token ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BaseError, ConfigError
from veneer.models.text.chat_messages import template_turn
from veneer.train.text.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_MARK = "\ue000\ue001\ue002"  # private-use characters, which no text contains; common prefixes and suffixes end here


@dataclass
class Rendered:
    """A rendered row.

    trained_spans: character ranges [start, end) to train on
    chat: whether a template rendered the row; a template writes all special tokens itself
    append_eos: whether to append the end-of-text token, as a target
    changed_turns: number of turns that the template renders differently when later turns follow (for example,
        because the template removes earlier thinking); these turns are trained as they are in `text`"""

    text: str
    trained_spans: list[tuple[int, int]] = field(default_factory=list)
    chat: bool = False
    append_eos: bool = False
    changed_turns: int = 0


class Renderer:
    """Renders rows with the chat template of a tokenizer.

    chat_template: auto, none, or the path of a .jinja file. `template` is None if rows are plain text.
    `end_marker` is the text that ends an assistant turn (`<|im_end|>`), or "" if the template writes none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.template, self.source = _template(tokenizer, chat_template)
        added = {str(t): t.special for t in tokenizer.added_tokens_decoder.values()}
        added |= dict.fromkeys(map(str, tokenizer.all_special_tokens), True)
        self._control = _any_of(name for name, special in added.items() if special)
        self._special = tokenizer.special_tokens_map
        self._tail = self._turn_tail() if self.template else ""
        match = _any_of(added).search(self._tail)
        self.end_marker = self._tail[: match.end()] if match else self._tail.rstrip()

    def has_control(self, text: str) -> bool:
        """Return whether the text contains a special token of the base."""
        return self._control.search(text) is not None

    def render(self, row: Row, train_on: str) -> Rendered:
        """Return the rendered row.

        Raises ValueError, with the reason, if the row cannot be rendered unambiguously."""
        if row.format == "text":
            return Rendered(row.text, [(0, len(row.text))], append_eos=True)
        if self.template is None:
            prompt = self.plain_prompt(row)
            text = prompt + str(row.messages[-1]["content"])
            answered = text[len(prompt) :].strip() != ""
            start = 0 if train_on == "all" else len(prompt)
            return Rendered(text, [(start, len(text))] if answered else [], append_eos=answered)
        return self._chat(row, train_on)

    def prompt(self, row: Row) -> str:
        """Return the text that the model reads at inference before the last assistant turn.

        In training, the same text must precede the turn."""
        if row.format == "text":
            return row.text
        if self.template is None:
            return self.plain_prompt(row)
        return self._text(row.messages[: row.last_assistant()], row, generate=True)

    def plain_prompt(self, row: Row) -> str:
        """Return a row's prompt for a base without a chat template.

        Raises BaseError for conversations, which need a template."""
        if row.instruction is not None:
            system, instruction, inp, _ = row.instruction
            text = (_ALPACA_INPUT if inp else _ALPACA).format(instruction=instruction, input=inp)
            return f"{system}\n\n{text}" if system else text
        if row.format == "prompt-completion":
            return str(row.messages[0]["content"])
        why = "data.chat_template is none" if self.source == "none" else "this base has none"
        message = f"rows in `{row.format}` format need a chat template, and {why}"
        fix = "use the instruct variant of the base, set data.chat_template to a .jinja file, or give "
        fix += "prompt and completion columns"
        raise BaseError(message, where=row.where, fix=fix)

    def _chat(self, row: Row, train_on: str) -> Rendered:
        if row.tools and not re.search(r"\btools\b", self.template or ""):
            raise ValueError("the row has `tools`, but the chat template does not support them")
        if any("tool_calls" in m for m in row.messages) and "tool_calls" not in (self.template or ""):
            raise ValueError("a message has `tool_calls`, but the chat template would leave them out")
        text = self._text(row.messages, row)
        out = Rendered(text, chat=True)
        if train_on == "all":
            out.trained_spans = [(0, len(text))]
            unlearned = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("weight") == 0]
            for start, end in self._turns(row, text, unlearned, out):
                at, last = out.trained_spans.pop()
                out.trained_spans += [(at, start), (end, last)]
            return out
        out.trained_spans = self._turns(row, text, _learned_turns(row, train_on), out)
        return out

    def _turns(self, row: Row, text: str, turns: Sequence[int], out: Rendered) -> list[tuple[int, int]]:
        """Return the character range of each assistant turn in `text`.

        A range includes the end-of-turn marker."""
        ranges = []
        for k in turns:
            prefix = self._text(row.messages[:k], row, generate=True) if k else ""
            if k and not text.startswith(prefix):
                why = f"the chat template renders the text before message {k} differently if later turns follow, "
                why += "so the prompts of training and inference would differ; use train_on: last, or "
                raise ValueError(why + "end the row with that turn")
            start = len(prefix) if k else self._content(row, text, 0)[0]
            end = len(text)
            if k + 1 < len(row.messages):
                upto = self._text(row.messages[: k + 1], row)
                if text.startswith(upto) and len(upto) > start:
                    end = len(upto)
                else:  # the template changed the turn, or added text after it, because it was the last turn
                    end = self._content(row, text, k)[1]
                    following = text[end:]
                    space = len(following) - len(following.lstrip())
                    if not self.end_marker or not following[space:].startswith(self.end_marker):
                        why = f"the chat template writes no end-of-turn marker after message {k}"
                        raise ValueError(f"{why}; use train_on: last")
                    end += space + len(self.end_marker)
                    out.changed_turns += upto[start:end] != text[start:end]
            if self._tail and text[start:end].endswith(self._tail):
                # The model does not generate the line break after the marker.
                end -= len(self._tail) - len(self.end_marker)
            ranges.append((start, end))
        return ranges

    def _content(self, row: Row, text: str, k: int) -> tuple[int, int]:
        """Return the character range of the content of message k in `text`.

        To find the range, replaces the content and compares the two renderings."""
        changed = [dict(m) for m in row.messages]
        changed[k]["content"] = _MARK
        changed_text = self._text(changed, row)
        if _MARK not in changed_text:
            raise ValueError(f"the chat template leaves out the content of message {k}")
        start = _common(text, changed_text)
        end = len(text) - _common(text[start:][::-1], changed_text[start:][::-1])
        return start, end

    def _text(self, messages: Sequence[dict[str, Any]], row: Row, *, generate: bool = False) -> str:
        """Return the same text as the tokenizer's `apply_chat_template`, in half the time."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                [[template_turn(m) for m in messages]],
                tools=list(row.tools) or None,
                chat_template=self.template,
                add_generation_prompt=generate,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"the chat template raises an error: {error}") from None
        return str(text)

    def _turn_tail(self) -> str:
        """Return the text that the template writes after a final assistant turn.

        For example, `<|im_end|>` and a line break."""
        row = Row("messages", ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}))
        try:
            return self._text(row.messages, row).rpartition(_MARK)[2]
        except ValueError as error:
            text = f"{self.source} cannot render a plain question and answer: {error}"
            raise BaseError(text, fix="set data.chat_template to another .jinja file, or to none") from None


def _learned_turns(row: Row, train_on: str) -> list[int]:
    """Return the indices of the assistant turns to train on.

    Empty turns and turns with weight 0 are not trained on."""
    turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
    if train_on == "last":
        turns = turns[-1:]
    elif train_on == "completion":
        users = [i for i, m in enumerate(row.messages) if m["role"] == "user"]
        turns = [i for i in turns if not users or i > users[-1]]
    spoken = (i for i in turns if str(row.messages[i]["content"]).strip() or row.messages[i].get("tool_calls"))
    return [i for i in spoken if row.messages[i].get("weight") != 0]


def _template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> tuple[str | None, str]:
    """Return (template text or None, its source)."""
    if chat_template == "none":
        return None, "none"
    if chat_template == "auto":
        if not tokenizer.chat_template:
            return None, "the base has no chat template"
        return str(tokenizer.get_chat_template()), "the tokenizer's chat template"
    path = Path(chat_template)
    try:
        return path.read_text(encoding="utf-8"), f"the chat template {path.name}"
    except (OSError, UnicodeDecodeError) as error:
        text = f"data.chat_template cannot be read: {error}"
        raise ConfigError(text, where=chat_template, fix="give a .jinja file, auto or none") from None


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _common(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts."""
    n = min(len(a), len(b))
    low = 0
    while low < n and a[low] == b[low]:
        low += 1
    return low
