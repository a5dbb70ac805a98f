"""More than 50 invalid loads during traffic are refused with a reason and affect no other request."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import llama3
from tests.formats import hostile
from tests.serve.forward.test_runner import trained
from tests.serve.whole import KINDS, Shop, asking, prompt, served
from tests.tiny_base import VOCAB_SIZE
from veneer.core.adapter import Card
from veneer.formats import peft

TENSORS, CONFIG = peft.TENSOR_FILE, peft.CONFIG_FILE


def spoiled(shop: Shop) -> list[str]:
    """Return sources of invalid loads: hostile files, damaged folders, and names outside the allowed folder."""
    folder = shop.adapters
    sources = [str(path.relative_to(folder)) for path in hostile.write(folder / "hostile")]

    def like_plain(name: str) -> Path:
        shutil.copytree(folder / "plain", folder / name)
        sources.append(name)
        return folder / name

    for name in [n for n in hostile.FILES if n.endswith(".safetensors")][::3]:
        shutil.copy(folder / "hostile" / name, like_plain(f"in-{name.partition('.')[0]}") / TENSORS)
    half = like_plain("half") / TENSORS
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (like_plain("no-tensors") / TENSORS).unlink()
    (like_plain("no-config") / CONFIG).unlink()
    (like_plain("config-not-json") / CONFIG).write_text("{")
    (like_plain("config-a-list") / CONFIG).write_text("[1]")
    changes: dict[str, Any] = {"rank-zero": {"r": 0}, "rank-wrong": {"r": 9}, "alpha-nan": {"lora_alpha": "x"}}
    changes |= {"ia3": {"peft_type": "IA3"}, "no-targets": {"target_modules": ["nothing"]}}
    for name, change in changes.items():
        config = like_plain(name) / CONFIG
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    for name, value in {"nan": float("nan"), "infinite": float("inf")}.items():
        tensors = load_file(path := like_plain(name) / TENSORS)
        next(iter(tensors.values()))[0, 0] = value
        save_file(tensors, path)
    tensors = load_file(path := like_plain("fewer-tensors") / TENSORS)
    save_file(dict(list(tensors.items())[1:]), path)
    pickled = like_plain("a-pickle")
    torch.save(load_file(pickled / TENSORS), pickled / "adapter_model.bin")
    (pickled / TENSORS).write_bytes((pickled / "adapter_model.bin").read_bytes())
    (like_plain("a-link-out") / "more.safetensors").symlink_to("/etc/hostname")
    other = llama3(vocab_size=VOCAB_SIZE, hidden_size=48, num_hidden_layers=3)
    for name, mark in {"other-shapes": "", "other-base": "sha256:" + "0" * 64}.items():
        adapter = trained(other if not mark else shop.base.model, 5)
        adapter.card = Card(base="other", base_fingerprint=mark)
        peft.write_folder(adapter, folder / name)
        sources.append(name)
    shop.library.add(folder / "other-base", "others")
    outside = ["", "nothing", "nothing@3", "plain@9", "sha256:" + "0" * 64, "../tiny", "/etc", "/etc/passwd", "a\0b"]
    return [*sources, *outside, "others", str(shop.base_dir), "x" * 5000, "https://example.com/adapter", "plain/../rs"]


def test_invalid_loads_affect_no_other_request(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # if a pickle were executed, it would write its marker here
    bad = spoiled(shop)
    assert len(bad) > 50
    good = [("tiny", prompt(9)), *((name, prompt(15, k)) for k, name in enumerate(KINDS))]
    right = [shop.wanted([] if name == "tiny" else [(name, 1.0)], ids, 10) for name, ids in good]
    done = threading.Event()
    with served(shop, adapter_bytes=200_000) as whole:

        def traffic() -> int:
            rounds = 0
            while rounds < 3 or not done.is_set():
                got = whole.together([asking(name, ids, 10) for name, ids in good])  # raises if any request failed
                assert all(a.same(b) for a, b in zip(got, right, strict=True))
                rounds += 1
            return rounds

        def load(source: str) -> tuple[str, int, Any]:
            answer = whole.load("bad", source)
            return source, answer.status_code, answer.json()

        with ThreadPoolExecutor(3) as pool:
            clients = [pool.submit(traffic) for _ in range(2)]
            try:
                answers = list(map(load, bad))
                with ThreadPoolExecutor(8) as many:  # repeat some loads concurrently
                    answers += many.map(load, bad[::4])
            finally:
                done.set()
            assert all(client.result() >= 3 for client in clients)
        for source, status, body in answers:
            assert 400 <= status < 500, (source, status, body)
            assert body["error"]["type"], (source, body)
            told = json.dumps(body).replace(source, "")  # exclude the client's own text
            assert str(shop.folder) not in told, source  # clients must not see the server's paths
        assert [card.id for card in whole.client.models.list()] == ["tiny", *sorted(KINDS)]
        whole.idle()
        resident = set(whole.engine.residents.resident())
        assert resident <= {shop.library.find(name).digest for name in KINDS}
        assert whole.engine.residents.stats().waiting == 0
    assert not list(tmp_path.rglob(hostile.MARK))


def test_invalid_requests_fail_alone(shop: Shop) -> None:
    """The library has an adapter with a damaged file; requests for other adapters succeed."""
    broken = shop.make("soon-broken", 80)
    shop.library.add(shop.adapters / "soon-broken", "soon-broken")
    file = shop.library.resolve("soon-broken") / TENSORS
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-100])
    ids = prompt(12)
    right = shop.wanted([("plain", 1.0)], ids, 10)
    with served(shop) as whole:
        for _ in range(3):
            for words in ({"model": "soon-broken"}, {"mix": ["plain", "soon-broken:0.5"]}):
                answer = whole.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3, **words})
                assert answer.status_code == 503, answer.text  # 503: the library is at fault, not the client
                assert answer.json()["error"]["code"] == "adapter_unusable"
                assert answer.json()["error"]["message"].startswith("damaged: ")
                assert str(shop.folder) not in answer.text
            assert whole.ask("plain", ids, 10).same(right)
        assert broken not in whole.engine.residents.resident()
        whole.idle()
