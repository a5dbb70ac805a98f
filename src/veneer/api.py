"""The functions of `import veneer`: what the commands do, as calls. Each is a few lines over the rooms below.

    base = load_base("smollm2-135m")
    run = train("examples/tickets/config.yaml", "adapter.rank=8", base=base)
    generate(base, ["Where is my parcel?"], adapters=[run.adapter])
    evaluate(base, "examples/tickets/test.jsonl", adapters=[run.adapter])
    merge(base, [run.adapter], "merged")

An adapter is named by its folder or by its name in the veneer home, with a strength behind a colon: "runs/a:0.5".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer import using
from veneer.formats import peft
from veneer.models.generate import generate as complete_all
from veneer.models.text import TextBase
from veneer.models.text import load_text as load_base

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

__all__ = ["generate", "load_adapter", "load_base", "save_adapter"]

Named = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
"""An adapter by folder or name: "runs/a", "runs/a:0.5", Path("runs/a") or ("runs/a", 0.5)."""


def load_adapter(base: TextBase, name: str | os.PathLike[str], *, allow_other_base: bool = False) -> Adapter:
    """Read an adapter and make sure that it belongs to `base`; `attach(base.model).add(…)` puts it on.

    Raises MismatchError if it belongs to another base, AdapterError if anything is missing, extra or misshapen."""
    return using.load_adapter(base, os.fspath(name), allow_other_base=allow_other_base)


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], base: TextBase) -> Path:
    """Write an adapter as PEFT's two files and a card that names `base`. Whole or not at all. Returns the folder."""
    card = replace(adapter.card, base=base.name, base_fingerprint=base.fingerprint)
    peft.write(replace(adapter, card=card), folder, base_name=base.name, base=base.model)
    return Path(folder)


def generate(
    base: TextBase,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    adapters: Sequence[Named] = (),
    system: str | None = None,
    raw: bool = False,
    **settings: Any,
) -> list[str]:
    """Answers to `prompts`, with `adapters` acting together for the length of the call.

    A text is what a user says, and goes through the base's chat template (with `raw`, or on a base without a template,
    it is a text to go on from); a list of messages is taken as it is. `system`: put before each text.
    `settings`: max_new_tokens, temperature, top_p, seed, batch_size, on_token (models.generate.complete)."""
    with _acting(base, adapters):
        return complete_all(base, [_messages(base, p, system, raw) for p in prompts], **settings)


def _messages(
    base: TextBase, prompt: str | Sequence[Mapping[str, str]], system: str | None, raw: bool
) -> str | Sequence[Mapping[str, str]]:
    if not isinstance(prompt, str) or raw or not base.has_chat_template:
        return prompt
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


@contextmanager
def _acting(base: TextBase, adapters: Sequence[Named]) -> Iterator[None]:
    if not adapters:
        yield
        return
    specs = [(os.fspath(a[0]), a[1]) if isinstance(a, tuple) else os.fspath(a) for a in adapters]
    with using.attach_adapters(base, specs):
        yield
