"""A server without keys on localhost, with a tenants' database: routes, shadows, feedback and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.serve.http.toy import wait_for
from tests.serve.tenancy.conftest import set_price
from tests.serve.whole import make_shop, served
from veneer.library.database import reading
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Store


def test_an_open_server_has_all_features_without_a_key(tmp_path: Path) -> None:
    shop, where = make_shop(tmp_path, ["plain", "rs"]), str(tmp_path / "tenants.sqlite")
    store = Store(where)
    with served(shop, tenants=where, open=True) as server:

        def ask(model: str, key: str = "", **more: Any) -> Any:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, **more}
            return server.http.post("/v1/chat/completions", json=body, headers=headers)

        assert ask("support").status_code == 404
        set_price(store, 1_000_000, 1_000_000, 1_000_000)
        routes.set_route(store, "support", [("plain", 1)], shadow="rs", actor="me")
        first, second = ask("support").json(), ask("support", "sk-what-a-client-has-to-be-given").json()
        tokens = [a["usage"]["prompt_tokens"] + a["usage"]["completion_tokens"] for a in (first, second)]

        def compared() -> bool:
            with reading(store.engine) as c:
                return len(routes.shadow_log(c)) == 2

        wait_for(compared)
        assert server.built.service.tenancy.ledger.flush()  # type: ignore[attr-defined]
        with reading(store.engine) as c:
            (plain,) = usage(c, by=("tenant",), adapter="plain@1")
        assert (plain["tenant"], plain["cost"]) == ("", sum(tokens))

        said = {"id": first["id"], "corrected": "Hello."}
        assert server.http.post("/v1/feedback", json=said).status_code == 400, "nothing is kept unless somebody says so"
        manage.change_settings(store, "", {"feedback_days": 30.0}, actor="me")
        third = ask("support", temperature=1.0, seed=7, n=2).json()
        for said in ({"corrected": "Hello."}, {"choice": 1, "rejected": [{"choice": 0}]}):
            assert server.http.post("/v1/feedback", json={"id": third["id"], **said}).status_code == 200
        (row,) = server.http.get("/v1/feedback/rows?kind=supervised").text.splitlines()
        assert "Hello." in row

        manage.add_tenant(store, "acme", adapters=["plain"], actor="me")
        row_of, key = manage.make_tenant_key(store, "acme", actor="me")
        assert ask("rs").status_code == 200
        assert ask("rs", key).status_code == 404, "a tenant's key is a tenant's"
        manage.revoke_key(store, row_of.id, actor="me")
        assert ask("plain", key).status_code == 401, "and one that is revoked is not nobody's"
    store.close()
