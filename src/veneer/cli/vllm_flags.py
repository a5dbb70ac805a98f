"""vLLM's flags for `veneer serve`, so that a manifest written for `vllm serve` starts veneer.

A flag is translated, ignored with a note, or refused with the setting to use instead. Facts from
vllm/engine/arg_utils.py, vllm/entrypoints/launchers/cli_args.py, and kserve
pkg/controller/v1alpha2/llmisvc/workload_lora.go, which puts --enable-lora, --max-lora-rank, --max-loras,
--max-cpu-loras and --lora-modules in front of a container's arguments. Arguments after `--` are not changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from veneer.cli.output import say
from veneer.errors import ConfigError

_TRANSLATED = {"--model": "--base", "--max-num-seqs": "--max-batch"}
_IGNORED = {
    "veneer always serves adapters": "--enable-lora",
    "the prefix cache is always on": "--enable-prefix-caching --enable-chunked-prefill",
    "veneer loads as many adapters as fit in --adapter-memory": "--max-loras=N --max-cpu-loras=N",
    "veneer serves every rank": "--max-lora-rank=N",
    "veneer captures no CUDA graphs": "--enforce-eager",
}
_REFUSED = {
    "--cache-memory and --adapter-memory": "--gpu-memory-utilization --kv-cache-memory-bytes",
    "--api-keys FILE: other users of a machine can read a command's arguments": "--api-key",
    "--quantize": "--quantization -q",
    "context, kv_events and kv_replay in the file of --config": "--max-model-len --kv-events-config",
    "a gateway that terminates TLS, such as Envoy": "--ssl-keyfile --ssl-certfile --ssl-ca-certs --enable-ssl-refresh",
    "a base that needs no custom code and includes its chat template": "--trust-remote-code --chat-template",
    "veneer serve --engine vllm … -- FLAGS, which passes flags to vLLM": "--tensor-parallel-size -tp --block-size"
    " --pipeline-parallel-size --data-parallel-size --kv-transfer-config --speculative-config --max-num-batched-tokens",
}
"""Why a flag is not needed, or what to use instead -> flags; =N for a flag with a value."""


def _by_flag(table: dict[str, str]) -> dict[str, tuple[str, int]]:
    """Return flag -> (text, number of values)."""
    return {f.removesuffix("=N"): (text, f.endswith("=N")) for text, flags in table.items() for f in flags.split()}


class ServeCommand(TyperCommand):
    """A command that also understands vLLM's flags. `ctx.args`: what follows `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(from_vllm(args))
        end = words.index("--") if "--" in words else len(words)
        super().parse_args(ctx, words[:end])  # refuses words that belong to no option
        ctx.args = words[end + 1 :]
        return words[end + 1 :]


def from_vllm(arguments: list[str]) -> Iterator[str]:
    """Yield arguments of `veneer serve`, translated from a mixture of its own and vLLM's.

    Raises ConfigError for a flag that veneer does not support, and for several served names.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    left, ignored, refused = arguments[:end], _by_flag(_IGNORED), _by_flag(_REFUSED)
    if left and not left[0].startswith("-"):  # vllm serve MODEL
        left.insert(0, "--model")
    while left:
        word = left.pop(0)
        flag, given, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in refused:
            fix = f"use {refused[flag][0]}"
            raise ConfigError("veneer serve does not have this flag of vLLM", where=flag, fix=fix)
        if flag in ignored:
            why, count = ignored[flag]
            say(f"note: {flag} is ignored: {why}")
            del left[: 0 if given else count]
        elif flag in ("--lora-modules", "--served-model-name"):
            values = [value] if given else []
            while left and not left[0].startswith("-"):
                values.append(left.pop(0))
            if flag == "--lora-modules":
                yield from _adapters(values)
            elif len(values) > 1:
                fix = "keep one; a route can give the base more names, see docs/how-to/tenants.md"
                raise ConfigError("veneer serves the base under one name", where=flag, fix=fix)
            else:
                yield from [flag, *values]
        else:
            yield from [_TRANSLATED[flag], *filter(None, [value])] if flag in _TRANSLATED else [word]
    yield from arguments[end:]


def _adapters(modules: list[str]) -> Iterator[str]:
    """Yield the options for vLLM's name=path, or its JSON with `name` and `path`."""
    for text in (module.strip("'") for module in modules):  # kserve quotes them for a shell
        name, _, path = text.partition("=")
        with suppress(ValueError, KeyError, TypeError):
            name, path = itemgetter("name", "path")(json.loads(text))
        if not name or not path:
            fix = 'name=path, or {"name": …, "path": …}'
            raise ConfigError(f"{text!r} does not name an adapter", where="--lora-modules", fix=fix)
        if name.count("/") > 1:  # kserve gives each adapter a second name, publishers/NAMESPACE/models/NAME
            say(f"note: the name {name} is ignored: a name has at most one /")
            continue
        yield from ["--adapter", f"{name}={path}"]
        if Path(path).is_dir():
            yield from ["--allow-folder", path]
