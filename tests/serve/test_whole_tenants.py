"""A server with tenants and the real engine: tenants learn nothing about each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import Shop, Whole, prompt, served
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store


def asked(whole: Whole, key: str, model: str, ids: list[int], **more: Any) -> tuple[int, int]:
    """Request a short completion. Return (status, number of cached prompt tokens)."""
    body = {"model": model, "prompt": ids, "max_tokens": 2, **more}
    answer = httpx.post(
        f"{whole.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60
    )
    return answer.status_code, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_cache_hits_reveal_nothing_between_tenants(shop: Shop, tmp_path: Path) -> None:
    """The operator can let tenants share cached prefixes per adapter. `cache_salt` also separates requests of the
    same tenant."""
    place = str(tmp_path / "tenants.sqlite")
    store = Store(place)
    keys = {name: new_tenant(store, name, ["*"]) for name in ("acme", "globex")}
    ids, most = prompt(97), 96
    with served(shop, tenants=place) as whole:
        for model in ("tiny", "plain", "rs"):
            assert asked(whole, keys["acme"], model, ids) == (200, 0)
            assert asked(whole, keys["globex"], model, ids) == (200, 0), "B repeats A's prompt"
            assert asked(whole, keys["acme"], model, ids) == (200, most), "and A its own"
            assert asked(whole, keys["acme"], model, ids, cache_salt="x") == (200, 0)
            assert asked(whole, keys["acme"], model, ids, cache_salt="x") == (200, most)
            assert asked(whole, keys["globex"], model, ids, cache_salt="x") == (200, 0)

        manage.change_settings(store, "", {"shared_cache": ["plain", "tiny"]}, actor="me")
        for model in ("plain", "tiny", "plain@1"):
            asked(whole, keys["acme"], model, ids)
            assert asked(whole, keys["globex"], model, ids) == (200, most)
            assert asked(whole, keys["globex"], model, ids, cache_salt=f"y {model}") == (200, 0)
        both = {"mix": ["plain", "rs"]}
        assert asked(whole, keys["acme"], "", ids, **both) == (200, 0)
        assert asked(whole, keys["globex"], "", ids, **both) == (200, 0), "not all of the mix is shared"
        manage.change_settings(store, "", {"shared_cache": ["tiny"]}, actor="me")
        assert asked(whole, keys["globex"], "plain", ids) == (200, most), "its own, from before"
        assert asked(whole, keys["acme"], "plain", prompt(100, 2)) == (200, 0)
        assert asked(whole, keys["globex"], "plain", prompt(100, 2)) == (200, 0)
    store.close()
