"""vLLM's own code reads veneer's cache events and rendered prompts, and knows the flags that veneer translates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conformance.test_routers import replayed
from tests.serve.http.toy import free_port, wait_for
from tests.serve.test_vllm import PYTHON
from tests.serve.whole import Whole
from veneer.cli import vllm_flags
from veneer.serve.engine.cache import CacheEvent
from veneer.serve.engine.kv_events import KvEvents

pytestmark = pytest.mark.peers


def in_vllm(code: str, given: Any) -> Any:
    """Run code in vLLM's environment: it reads `given`, and the JSON on its last line is returned."""
    program = "import json, sys\ngiven = json.load(sys.stdin)\n" + textwrap.dedent(code)
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ""}
    ran = subprocess.run([str(PYTHON), "-c", program], input=json.dumps(given), capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


def test_vllm_decodes_cache_events() -> None:
    replay = f"tcp://127.0.0.1:{free_port()}"
    publisher = KvEvents(f"tcp://127.0.0.1:{free_port()}", "base", port=8000, replay=replay)
    try:
        keys = [bytes([n]) * 32 for n in (1, 2)]
        publisher.put(CacheEvent("stored", keys, None, [5, 6, 7, 8], "support"))
        publisher.put(CacheEvent("stored", keys[1:], keys[0], [7, 8], "base"))
        publisher.put(CacheEvent("removed", keys[:1]))
        publisher.put(CacheEvent("cleared"))
        wait_for(lambda: any(b"AllBlocksCleared" in message for *_, message in replayed(replay)))
        messages = [message.hex() for *_, message in replayed(replay)]
    finally:
        publisher.stop()
    decoded = in_vllm(
        """
        import msgspec
        from vllm.distributed.kv_events import KVEventBatch
        batches = [msgspec.msgpack.decode(bytes.fromhex(each), type=KVEventBatch) for each in given]
        assert all(batch.data_parallel_rank == 0 for batch in batches)
        events = [event for batch in batches for event in batch.events]
        print(json.dumps([(type(e).__name__, msgspec.to_builtins(e)) for e in events]))
        """,
        messages,
    )
    assert [kind for kind, _ in decoded] == ["BlockStored", "BlockStored", "BlockRemoved", "AllBlocksCleared"]
    first, second = decoded[0][1], decoded[1][1]
    assert (first["token_ids"], first["block_size"], first["lora_name"]) == ([5, 6, 7, 8], 2, "support")
    assert (first["parent_block_hash"], second["parent_block_hash"]) == (None, first["block_hashes"][0])
    assert second["lora_name"] is None
    assert decoded[2][1]["block_hashes"] == first["block_hashes"][:1]


def test_vllm_accepts_rendered_prompts(whole: Whole) -> None:
    text = {"model": "plain", "prompt": ["Hello", "Bye"], "max_tokens": 3, "stop": ["x"], "seed": 4, "logprobs": 2}
    rendered = whole.http.post("/v1/completions/render", json=text).json()
    chat = {"model": "plain", "messages": [{"role": "user", "content": "Hi"}]}
    rendered.append(whole.http.post("/v1/chat/completions/render", json=chat).json())
    read = in_vllm(
        """
        from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
        requests = [GenerateRequest.model_validate(each) for each in given]
        print(json.dumps([(r.token_ids, r.model, r.sampling_params.max_tokens, r.sampling_params.stop,
                           r.sampling_params.seed) for r in requests]))
        """,
        rendered,
    )
    assert [each[0] for each in read] == [each["token_ids"] for each in rendered]
    assert read[0][1:] == ["plain", 3, ["x"], 4]


def test_every_flag_is_one_of_vllms() -> None:
    """vLLM has these flags, with as many values as the table says."""
    source = Path(vllm_flags.__file__).read_text(encoding="utf-8")
    flags = sorted(set(re.findall(r'[" ](--?[a-z][a-z-]+(?:=N)?)(?=[" ])', source[source.index("_TRANSLATED") :])))
    known = in_vllm(
        """
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        parser = make_arg_parser(FlexibleArgumentParser())
        print(json.dumps({name: action.nargs for action in parser._actions for name in action.option_strings}))
        """,
        [],
    )
    own = {"--base", "--max-batch", "--adapter", "--allow-folder", "--config", "--cache-memory", "--adapter-memory"}
    own |= {"--api-keys", "--quantize", "--engine"}
    assert {flag.removesuffix("=N") for flag in flags} - own <= known.keys()
    assert all(known[flag.removesuffix("=N")] != 0 for flag in flags if flag.endswith("=N"))
    for flag in ("--enable-lora", "--enforce-eager", "--enable-prefix-caching"):
        assert known[flag] == 0
