"""vLLM's and SGLang's own tests of loading and unloading adapters; tokenization; the version."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.serve.http.toy import Live


def say(server: Live, model: str, prompt: str = "Hi", **more: Any) -> Any:
    return server.post("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 50, **more})


def load(server: Live, name: str, path: str, **more: Any) -> Any:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})


def cards(server: Live) -> dict[str, Any]:
    return {card["id"]: card for card in server.get("/v1/models").json()["data"]}


def test_lineage(server: Live) -> None:
    card = cards(server)["sql"]
    assert (card["root"], card["parent"], card["object"], card["max_model_len"]) == ("lib/sql", "toy", "model", 512)
    assert cards(server)["toy"]["parent"] is None
    answer = load(server, "cat", "lib/cat")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'cat' added successfully.")
    assert (cards(server)["cat"]["root"], cards(server)["cat"]["parent"]) == ("lib/cat", "toy")
    assert say(server, "cat").json()["choices"][0]["text"] == "[c4*1] Hi"


def test_a_loaded_name_changes_only_with_load_inplace(server: Live) -> None:
    load(server, "pet", "lib/cat")
    answer = load(server, "pet", "lib/dog")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "InvalidUserInput"
    assert say(server, "pet").json()["choices"][0]["text"] == "[c4*1] Hi"
    assert load(server, "pet", "lib/dog", load_inplace=True).status_code == 200
    assert say(server, "pet").json()["choices"][0]["text"] == "[d0*1] Hi"


def test_a_path_without_an_adapter_is_not_found(server: Live) -> None:
    answer = load(server, "x", "/etc/passwd")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "NotFoundError", 404)


def test_an_adapter_that_cannot_be_served(server: Live) -> None:
    """vLLM returns 500 here, but the client's request is at fault, so veneer returns 400."""
    answer = load(server, "x", "corrupt")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError")
    assert "not JSON" in answer.json()["error"]["message"]
    assert "x" not in cards(server)


def test_missing_fields(server: Live) -> None:
    for body in ({}, {"lora_name": "x"}, {"lora_path": "lib/cat"}, {"lora_name": "", "lora_path": "lib/cat"}):
        answer = server.post("/v1/load_lora_adapter", body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "Both 'lora_name' and 'lora_path' must be provided."
        assert answer.json()["error"]["type"] == "InvalidUserInput"
    assert server.post("/v1/unload_lora_adapter", {}).status_code == 400


def test_unload(server: Live) -> None:
    answer = server.post("/v1/unload_lora_adapter", {"lora_name": "nobody", "lora_int_id": None})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
    load(server, "cat", "lib/cat")
    answer = server.post("/v1/unload_lora_adapter", {"lora_name": "cat"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'cat' removed successfully.")
    assert say(server, "cat").status_code == 404
    assert "cat" not in cards(server)


def test_many_adapters_at_once(server: Live) -> None:
    names = [f"many-{n}" for n in range(10)]
    for n, name in enumerate(names):
        server.catalog.sources[f"lib/{name}"] = f"m{n}"

    def both(name: str) -> list[str]:
        load(server, name, f"lib/{name}")
        return [say(server, name).json()["choices"][0]["text"] for _ in range(3)]

    with ThreadPoolExecutor(10) as pool:
        said = list(pool.map(both, names))
    assert said == [[f"[m{n}*1] Hi"] * 3 for n in range(10)]


def test_sglang_update_script(server: Live) -> None:
    """Load twice, generate, unload, generate, unload again; statuses and bodies are SGLang's."""

    def step(route: str, body: Any, status: int) -> Any:
        answer = server.post(route, body)
        assert answer.status_code == status, answer.text
        return answer.json()

    cat = {"lora_name": "cat", "lora_path": "lib/cat", "pinned": False}
    found = step("/load_lora_adapter", cat, 200)
    assert found["success"] is True
    assert found["error_message"] is None
    assert found["loaded_adapters"] == {"sql": "lib/sql", "polite": "lib/polite", "cat": "lib/cat"}
    assert step("/load_lora_adapter", cat, 400)["success"] is False
    assert say(server, "toy:cat").json()["choices"][0]["text"] == "[c4*1] Hi"
    assert say(server, "toy", lora_path="cat").json()["choices"][0]["text"] == "[c4*1] Hi"
    assert "cat" not in step("/unload_lora_adapter", {"lora_name": "cat"}, 200)["loaded_adapters"]
    assert say(server, "toy", lora_path="cat").status_code == 404
    assert step("/unload_lora_adapter", {"lora_name": "cat"}, 400)["error_message"]
    assert step("/load_lora_adapter", {"lora_name": "x"}, 400)["success"] is False


def test_tokenize_and_detokenize(server: Live) -> None:
    tokenizer = server.engine.text.tokenizer
    ids = tokenizer.encode("Hi 🎉", add_special_tokens=False)
    found = server.post("/tokenize", {"model": "sql", "prompt": "Hi 🎉", "return_token_strs": True}).json()
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 512)
    assert len(found["token_strs"]) == len(ids)
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert tokenizer.decode(chat["tokens"]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False})
    assert tokenizer.decode(chat.json()["tokens"]) == "<|im_start|>user\nHi<|im_end|>\n"
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "Hi 🎉"}
    assert server.post("/tokenize", {"prompt": "x", "model": "nobody"}).status_code == 404
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "y"}]}).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**6]}).status_code == 400


def test_version(server: Live) -> None:
    import veneer

    assert server.get("/version").json() == {"version": veneer.__version__}
