"""`veneer generate`: complete prompts, or chat, with a base and any adapters."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AllowOtherBase, ChosenDevice, LoadedDtype, Quantize, chosen_base, say_loaded
from veneer.cli.output import print_json, say, unwrapped
from veneer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase
    from veneer.models.text.generate import Completion, Prompt

app = typer.Typer(add_completion=False)

_FALLBACK = "smollm2-135m"
_CHAT_HELP = "/reset starts over, /undo removes the last turn, /quit or Ctrl-D ends the chat, Ctrl-C stops an answer"


@app.command(epilog='Example: veneer generate "Where is my parcel?" --adapter runs/support --adapter runs/polite:0.5')
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts; `-` or no prompt reads stdin.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model. Default: the first adapter's base, otherwise smollm2-135m."),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="NAME_OR_PATH[:strength]; repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Start an interactive conversation.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message before every prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Maximum tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy decoding.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling: cumulative probability of candidate tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 8,
    dtype: LoadedDtype = "auto",
    quantize: Quantize = None,
    device: ChosenDevice = "auto",
    allow_other_base: AllowOtherBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, without streaming.")] = False,
) -> None:
    """Generate text with a base and any number of adapters, each with its strength."""
    specs = adapter or []
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    if chat and (prompts or as_json or raw):
        raise ConfigError("--chat cannot be combined with prompts, --raw or --json", fix="type the prompts in the chat")
    texts = [] if chat else _all_prompts(prompts or [])

    from veneer.adapters.use import attach_adapters, parse_spec
    from veneer.models.text.base import load_text

    names = [parse_spec(spec)[0] for spec in specs]
    name = chosen_base(base, names, "" if specs else _FALLBACK)
    if not name:
        raise ConfigError(f"adapter {names[0]!r} names no base", fix="add --base NAME")
    loaded = load_text(name, dtype=dtype, device=device, quantize=quantize, say=say)
    say_loaded(loaded)
    with attach_adapters(loaded, specs, allow_other_base=allow_other_base) as attachment:
        for adapter_name, strength in map(parse_spec, specs):
            say(f"adapter {adapter_name} at strength {strength:g}")
        if chat:
            _chat(loaded, system, settings)
            return
        framed = [_model_input(loaded, text, system, raw) for text in texts]
        if as_json:
            _print_json(loaded, attachment, specs, texts, framed, {**settings, "batch_size": batch_size})
        elif len(framed) == 1:
            _streamed(loaded, framed, settings)
        else:
            from veneer.models.text.generate import complete

            for text, done in zip(texts, complete(loaded, framed, batch_size=batch_size, **settings), strict=True):
                print(f"> {text}\n{done.text}\n", flush=True)
                _report_cut(done)


# -- prompts -----------------------------------------------------------------------------------------------------------


def _all_prompts(prompts: list[str]) -> list[str]:
    """Return the prompts from the command line, followed by the prompt from stdin."""
    texts = [p for p in prompts if p != "-"]
    if "-" in prompts or (not texts and not sys.stdin.isatty()):
        piped = sys.stdin.read().strip()
        texts += [piped] if piped else []
    if not texts:
        raise DataError("there is no prompt", fix='veneer generate "…", a pipe, or --chat')
    return texts


def _model_input(base: TextBase, prompt: str, system: str | None, raw: bool) -> Prompt:
    """Return the model's input: messages if the base has a chat template, else text.

    With `raw`, the input is always text. Raises ConfigError if `system` is given and the input is text."""
    if raw or not base.has_chat_template:
        if system is not None:
            why = "with --raw" if raw else f"because {base.name} has no chat template"
            raise ConfigError(f"--system cannot be used {why}", fix="put the text into the prompt")
        return prompt
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


# -- answers -----------------------------------------------------------------------------------------------------------


def _streamed(base: TextBase, framed: list[Prompt], settings: dict[str, Any]) -> Completion:
    """Generate one answer and print each token as it arrives."""
    from veneer.models.text.generate import complete

    out = sys.stdout if sys.stdout.isatty() else unwrapped(sys.stdout)  # in a pipe, do not wrap the text
    done = complete(base, framed, on_token=lambda _i, piece: print(piece, end="", flush=True, file=out), **settings)[0]
    print(flush=True)
    _report_cut(done)
    return done


def _report_cut(done: Completion) -> None:
    if done.finish == "length":
        say(f"(stopped at {len(done.ids)} tokens; --max-new-tokens allows more)")


def _print_json(
    base: TextBase, attachment: Any, specs: list[str], texts: list[str], framed: list[Prompt], settings: dict[str, Any]
) -> None:
    from veneer.adapters.use import parse_spec
    from veneer.models.text.generate import complete

    start = time.perf_counter()
    done = complete(base, framed, **settings)
    seconds = time.perf_counter() - start
    mix = [parse_spec(spec) for spec in specs]
    tokens = sum(len(c.ids) for c in done)
    results = [
        {"prompt": t, "text": c.text, "finish": c.finish, "prompt_tokens": c.prompt_tokens, "tokens": len(c.ids)}
        for t, c in zip(texts, done, strict=True)
    ]
    record = {
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "adapters": [{"name": n, "strength": s, "digest": attachment.adapters[n].digest()} for n, s in mix],
        "settings": settings,
        "results": results,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2),
    }
    print_json(record)


def _chat(base: TextBase, system: str | None, settings: dict[str, Any]) -> None:
    """Run a conversation until the user ends it. Ctrl-C discards the current answer."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    turns: list[dict[str, str]] = []
    say(_CHAT_HELP)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            turns.clear()
        elif text == "/undo":
            del turns[-2:]
        elif text.startswith("/"):
            say(_CHAT_HELP)
        elif text:
            _answer(base, opening, turns, text, settings)


def _answer(
    base: TextBase, opening: list[dict[str, str]], turns: list[dict[str, str]], text: str, settings: dict[str, Any]
) -> None:
    """Generate an answer to the message `text`, and add both messages to `turns`.

    If the context would overflow, drops the oldest exchanges and prints how many were dropped."""
    from veneer.models.text.generate import encode_prompt

    question = {"role": "user", "content": text}
    dropped = 0
    limit = base.context - min(settings["max_new_tokens"], base.context // 4)
    while turns and len(encode_prompt(base, [*opening, *turns, question])) > limit:
        del turns[:2]
        dropped += 1
    if dropped:
        say(f"(the context is full: the oldest {dropped} exchange{'s were' if dropped > 1 else ' was'} dropped)")
    try:
        done = _streamed(base, [[*opening, *turns, question]], settings)
    except KeyboardInterrupt:
        print(" […]")
        return
    except DataError as error:
        say(str(error))
        return
    turns += [question, {"role": "assistant", "content": done.text}]
