"""/v1/adapters over a real library: list, add, show, change, remove, download, inspect, and ownership."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.formats.image_adapters import random_adapter
from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyTenancy, ToyText, live
from veneer.core.adapter import Adapter, Card, Pair
from veneer.formats import convert, peft
from veneer.formats.read import read
from veneer.formats.topology import families
from veneer.library.library import Library, open_library
from veneer.library.upload_stage import UploadStage
from veneer.serve.http.surfaces.adapters import adapter_bodies, adapter_routes
from veneer.serve.principal import Principal
from veneer.serve.request import Refused

PICTURE = b"\xff\xd8\xff picture"


@dataclass
class Tenants(ToyTenancy):
    """Keys `acme` and `globex` see their own namespace and `shared`; `key` sees everything but cannot change
    anything."""

    noted: list[tuple[Any, ...]] = field(default_factory=list)
    let: list[str] = field(default_factory=list)

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        if key in ("acme", "globex"):
            return Principal("tenant", key, lambda name: name.startswith((f"{key}/", "shared")))
        if key in ("admin", "key"):
            return Principal("operator" if key == "admin" else "key")
        raise Refused("this key is not known", status=401, code="unauthorized")

    def log_change(self, actor: str, action: str, subject: str, before: object = None, after: object = None) -> None:
        self.noted.append((actor, action, subject))

    def grant_namespace(self, tenant: str) -> None:
        self.let.append(tenant)


@dataclass
class Served:
    server: Live
    library: Library
    tenancy: Tenants

    def ask(self, method: str, path: str, key: str = "admin", **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        if "content" in options:
            headers["content-type"] = "application/octet-stream"
        return self.server.client.request(method, path, headers=headers, **options)

    def told(self, method: str, path: str, key: str = "admin", **options: Any) -> Any:
        answer = self.ask(method, path, key, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, tenancy, staging = tmp_path_factory.mktemp("library"), Tenants(), UploadStage(1 << 20)
    with open_library(folder) as library:
        more = {"routers": [adapter_routes(library, staging, tenancy)], "large": adapter_bodies(staging)}
        with live(ToyEngine(ToyText()), ToyCatalog(), tenancy, **more) as server:
            yield Served(server, library, tenancy)
    staging.close()


def text_folder(folder: Path, seed: int, **card: Any) -> Path:
    pair = Pair(torch.full((2, 3), float(seed)), torch.ones(4, 2), 1.0)
    name = "model.layers.0.self_attn.q_proj"
    peft.write_folder(Adapter({name: pair}, card=Card(base="org/toy", rank=2, alpha=2.0, **card)), folder)
    return folder


def zipped(folder: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"run/{path.name}")
    return out.getvalue()


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a kohya file with a small image adapter and a thumbnail."""
    path = tmp_path_factory.mktemp("files") / "style.safetensors"
    family = families()["sdxl"]
    adapter = random_adapter(family, lambda m: m.startswith("unet."))
    thumbnail = f"data:image/jpeg;base64,{base64.b64encode(PICTURE).decode()}"
    adapter.card = Card(kind="image", trigger_words=["zelda"], extra={"thumbnail": thumbnail})
    convert.write(adapter, path, "kohya", family="sdxl")
    return path


def test_only_an_operator_sees_the_path_of_a_base(served: Served, tmp_path: Path) -> None:
    pair = Pair(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    card = Card(base="/srv/bases/toy-of-here", rank=2, alpha=2.0)
    peft.write_folder(Adapter({"model.layers.0.self_attn.q_proj": pair}, card=card), tmp_path)
    where = "/v1/adapters?name=acme/placed&filename=run.zip"
    assert served.told("POST", where, "acme", content=zipped(tmp_path))["base"] == "toy-of-here"
    for key, base in (("acme", "toy-of-here"), ("key", "toy-of-here"), ("admin", "/srv/bases/toy-of-here")):
        found = served.told("GET", "/v1/adapters?name=acme/placed", key)
        shown = served.told("GET", "/v1/adapters/acme/placed", key)
        assert ([a["base"] for a in found["data"]], found["facets"]["base"], shown["base"]) == ([base], {base: 1}, base)
        assert served.told("GET", f"/v1/adapters?base={base}", key)["total"] == 1
        assert key == "admin" or "/srv" not in str((found, shown))
    assert served.ask("DELETE", "/v1/adapters/acme/placed@1", "acme").status_code == 200


def test_an_adapter_is_added_found_shown_changed_and_removed(served: Served, tmp_path: Path) -> None:
    metrics = {"validation_loss_before": 2.0, "validation_loss": 1.0}
    sample = {"prompt": "p", "base": "b", "adapter": "a"}
    body = zipped(text_folder(tmp_path, 1, metrics=metrics, extra={"sample": sample}))
    where = "/v1/adapters?name=acme/support&filename=run.zip&tag=x&alias=prod"
    made = served.told("POST", where, "acme", content=body)
    assert (made["id"], made["aliases"], made["tags"], made["new"]) == ("acme/support@1", ["prod"], ["x"], True)
    assert made["gain"] == {"before": 2.0, "after": 1.0, "share": -0.5}
    assert made["sample"] == sample
    assert served.tenancy.let[-1] == "acme"
    assert served.tenancy.noted[-1] == ("acme", "adapter.add", "acme/support@1")
    found = served.told("GET", "/v1/adapters?q=support&base=toy&rank=2&order=gain", "acme")
    assert ([a["id"] for a in found["data"]], found["total"], found["facets"]["tag"]) == ([made["id"]], 1, {"x": 1})
    shown = served.told("GET", "/v1/adapters/acme/support@prod", "acme")
    assert shown["digest"] == read(tmp_path).adapter.digest()
    change = {"add_aliases": ["next"], "remove_aliases": ["prod"], "add_tags": ["y"], "remove_tags": ["x"]}
    after = served.told("PATCH", "/v1/adapters/acme/support", "acme", json=change)
    assert (after["aliases"], after["tags"]) == (["next"], ["y"])
    kept = served.ask("DELETE", "/v1/adapters/acme/support@1", "acme")
    assert kept.status_code == 400
    assert "with_aliases=true" in kept.text
    gone = served.told("DELETE", "/v1/adapters/acme/support@1?with_aliases=true", "acme")
    assert gone["removed"] == ["acme/support@next", "acme/support@1"]
    assert served.ask("GET", "/v1/adapters/acme/support", "acme").status_code == 404


def test_a_tenant_finds_and_changes_only_its_adapters(served: Served, tmp_path: Path) -> None:
    for n, name in enumerate(("acme/a", "globex/b", "shared")):
        folder = text_folder(tmp_path / str(n), 10 + n, recipe={"data": "/srv/rows.jsonl"})
        served.library.add(folder, name, source="/x")
    listed = served.told("GET", "/v1/adapters", "acme")
    assert [a["name"] for a in listed["data"]] == ["acme/a", "shared"]
    assert (listed["total"], sum(listed["facets"]["base"].values())) == (2, 2)
    mine, shared = listed["data"]
    assert "card" in mine
    assert not {"card", "source"} & set(shared)
    assert "/srv" not in json.dumps(shared)
    digest = served.library.find("globex/b").digest
    missing = [
        served.ask(m, f"/v1/adapters/{r}", "acme", json={} if m == "PATCH" else None)
        for m in ("GET", "PATCH", "DELETE")
        for r in ("globex/b", digest, "globex/nothing", "shared/none")
    ]
    missing += [served.ask("GET", f"/v1/adapter_{what}/globex/b", "acme") for what in ("previews", "files")]
    assert {a.status_code for a in missing} == {404}
    assert not any("fix" in a.text or "@" in a.text for a in missing)
    refused = [
        served.ask("PATCH", "/v1/adapters/shared", "acme", json={"add_tags": ["z"]}),
        served.ask("DELETE", "/v1/adapters/shared", "acme"),
        served.ask("GET", "/v1/adapter_files/shared", "acme"),
        *(served.ask("POST", f"/v1/adapters?name={n}", "acme", content=b"x") for n in ("mine", "globex/x", "acmex/x")),
        served.ask("POST", "/v1/adapters?name=acme/x", "key", content=b"x"),
    ]
    assert {a.status_code for a in refused} == {403}
    listed = served.told("GET", "/v1/adapters?order=name", "key")["data"]
    assert [a["name"] for a in listed] == ["acme/a", "globex/b", "shared"]
    assert served.ask("GET", "/v1/adapters", "nobody").status_code == 401


def test_downloads_hold_the_same_adapter_in_every_layout(served: Served, picture_file: Path, tmp_path: Path) -> None:
    made = served.told("POST", "/v1/adapters?name=style&filename=style.safetensors", content=picture_file.read_bytes())
    assert (made["kind"], made["trigger_words"]) == ("image", ["zelda"])
    assert served.ask("GET", "/v1/adapter_files/style@1").content == picture_file.read_bytes()
    for to in ("kohya", "comfyui", "diffusers", "peft"):
        answer = served.ask("GET", f"/v1/adapter_files/style?to={to}")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-disposition"].startswith(f'attachment; filename="style-1-{to}.')
        path = tmp_path / f"{to}.safetensors"
        path.write_bytes(answer.content)
        if to == "peft":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(tmp_path / "peft")
            (path,) = (tmp_path / "peft").iterdir()
        assert read(path, family="sdxl").adapter.digest() == made["digest"], to
    picture = served.ask("GET", made["preview"])
    assert (picture.content, picture.headers["content-type"]) == (PICTURE, "image/jpeg")
    for to in ("gguf", "vllm"):
        answer = served.ask("GET", f"/v1/adapter_files/style?to={to}")
        assert answer.status_code == 400
        assert str(tmp_path.anchor) + "tmp" not in answer.text


def test_an_inspected_file_is_reported_and_converted(served: Served, picture_file: Path, tmp_path: Path) -> None:
    where = "/v1/adapter_inspections?filename=../st%20yle.safetensors"
    found = served.told("POST", where, "acme", content=picture_file.read_bytes())
    report = found["report"]
    assert (report["verdict"]["use"], report["family"], report["adapter"]) == (True, "sdxl", "st_yle.safetensors")
    assert report["coverage"]["unused"] == []
    assert report["trigger_words"] == ["zelda"]
    converted = f"/v1/adapter_inspections/{found['id']}/file?to=comfyui"
    for key in ("globex", "admin"):
        assert served.ask("GET", converted, key).status_code == 404
    (tmp_path / "c.safetensors").write_bytes(served.ask("GET", converted, "acme").content)
    assert read(tmp_path / "c.safetensors").adapter.digest() == report["digest"]


def test_unsupported_files_are_refused_with_a_reason(served: Served) -> None:
    unknown = save({"nothing.known": torch.ones(2)})
    for path, content, status, says in (
        ("/v1/adapter_inspections?filename=a.pt", b"\x80\x04.", 400, "pickles run whatever code"),
        ("/v1/adapter_inspections?filename=a.safetensors", b"\x80\x04.", 400, "the file is a pickle"),
        ("/v1/adapter_inspections?filename=a.safetensors", unknown, 400, "unknown layout"),
        ("/v1/adapters?name=acme/x", b"", 400, "empty"),
        ("/v1/adapters?name=acme/X%20Y", unknown, 400, "name"),
        ("/v1/adapters?name=acme/x&filename=a.zip", b"PK", 400, "zip"),
        ("/v1/adapters?name=acme/x", b"x" * (1 << 20) + b"x", 413, "1,048,576"),
    ):
        answer = served.ask("POST", path, "acme", content=content)
        assert answer.status_code == status, (path, answer.text)
        assert says in answer.text
        assert "/cache/staged" not in answer.text
        assert "from-pickle" not in answer.text
    assert served.told("GET", "/v1/adapters?name=acme/x")["total"] == 0
