"""Run llama.cpp through llama-cpp-python in an environment of its own (`make test-peers` builds it).

VENEER_LLAMA_PYTHON names another interpreter with llama-cpp-python 0.3.36, whose llama.cpp the tests were
written against."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from tests.test_readme import ROOT

PYTHON = Path(os.environ.get("VENEER_LLAMA_PYTHON") or ROOT / ".venv-llama" / "bin" / "python")

_SCRIPT = """
import ctypes, json, os, sys
import llama_cpp as L, numpy as np

@L.llama_log_callback
def quiet(level, text, data):
    pass
L.llama_log_set(quiet, ctypes.c_void_p(0))
L.llama_backend_init()
job = json.load(sys.stdin)
out = {}
if "chunks" in job:
    lib = ctypes.CDLL(os.path.join(os.path.dirname(L.__file__), "lib", "libggml-base.so"))
    quantize = lib.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    x = np.load(job["chunks"])
    for kind, (number, block, size) in job["types"].items():
        coded = np.zeros((len(x), x.shape[1] // block * size), np.uint8)
        assert quantize(number, x.ctypes.data, coded.ctypes.data, 0, *x.shape, None) == coded.nbytes
        np.save(f"{job['chunks']}.{kind}.npy", coded)
if "quantized" in job:
    p = L.llama_model_quantize_default_params()
    p.ftype = job["ftype"]
    assert L.llama_model_quantize(job["file"].encode(), job["quantized"].encode(), p) == 0
if "texts" in job or "prompts" in job:
    model = L.llama_model_load_from_file(job["file"].encode(), L.llama_model_default_params())
    assert model, "llama.cpp does not read the file"
    vocabulary = L.llama_model_get_vocab(model)
    out["tokens"], out["answers"], out["logits"] = [], [], []
    for text in job.get("texts", []):
        raw = text.encode()
        ids = (L.llama_token * (len(raw) + 8))()
        out["tokens"].append(list(ids[: L.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), True, True)]))
    p = L.llama_context_default_params()
    p.n_ctx, p.type_k, p.type_v, p.flash_attn_type = 512, 0, 0, 0  # exact: a float32 cache
    for prompt in job.get("prompts", []):
        context, answer, feed = L.llama_init_from_model(model, p), [], prompt
        while len(answer) < job["count"]:
            ids = (L.llama_token * len(feed))(*feed)  # the batch refers to it
            assert L.llama_decode(context, L.llama_batch_get_one(ids, len(feed))) == 0
            size = L.llama_vocab_n_tokens(vocabulary)
            logits = np.ctypeslib.as_array(L.llama_get_logits_ith(context, -1), (size,))
            if not answer:
                out["logits"].append(logits.tolist())
            feed = [int(logits.argmax())]
            answer += feed
            if L.llama_vocab_is_eog(vocabulary, feed[0]):
                break
        out["answers"].append(answer)
        L.llama_free(context)
json.dump(out, sys.stdout)
"""


def llama_cpp(**job: Any) -> dict[str, Any]:
    """Run a job in llama.cpp and return its results.

    file, quantized, ftype: quantize a model file
    file, texts: tokenize -> tokens
    file, prompts, count: greedy tokens -> answers, and the logits after each prompt"""
    ran = subprocess.run([PYTHON, "-c", _SCRIPT], input=json.dumps(job), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(json.loads(ran.stdout))


def ggml_blocks(rows: np.ndarray, kinds: tuple[str, ...], folder: Path) -> dict[str, np.ndarray]:
    """Return rows as quantized by ggml's `ggml_quantize_chunk`, for each type."""
    import gguf

    types = {k: (int(t := gguf.GGMLQuantizationType[k]), *map(int, gguf.GGML_QUANT_SIZES[t])) for k in kinds}
    file = folder / "rows.npy"
    np.save(file, np.ascontiguousarray(rows, np.float32))
    llama_cpp(chunks=str(file), types=types)
    return {kind: np.load(f"{file}.{kind}.npy") for kind in kinds}
