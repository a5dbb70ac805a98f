"""The form that trains on uploaded rows: what a tenant brings is previewed and trained, and nothing else can be."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.studio.conftest import Served
from tests.studio.windows import Window, opened
from veneer.jobs.store import JobStore
from veneer.library.library import open_library
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.tenants import Tenants

ROWS = "question,label,note\n" + "".join(f"Where is parcel {n}?,Shelf {n % 7}.,x\n" for n in range(40))
PAIRS = "".join(
    json.dumps({"prompt": f"Door {n}?", "chosen": f"It is {n}.", "rejected": "No idea."}) + "\n" for n in range(30)
)


class Shop:
    """A server that trains, with two tenants and their keys."""

    def __init__(self, served: Served, keys: dict[str, str], jobs: JobStore) -> None:
        self.served, self.keys, self.jobs = served, keys, jobs

    def upload(self, who: str, name: str, text: str) -> str:
        """The id of a file that a tenant uploaded as the page does."""
        form = {"files": {"file": (name, text)}, "data": {"purpose": "fine-tune"}}
        cookies = {"cookie": f"veneer_studio={self.keys[who]}"}
        answer = httpx.post(f"{self.served.address}/studio/api/v1/files", headers=cookies, timeout=30, **form)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def train(self, who: str, file: str = "") -> str:
        return f"{self.served.address}/studio/train?file={file}"


@pytest.fixture(scope="module")
def shop(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    tenants = Tenants(str(folder / "tenants.sqlite"), watch=False)
    keys = {"operator": "operator-of-the-test"}
    for name in ("acme", "globex"):
        manage.add_tenant(tenants.store, name, adapters=[f"{name}/*"], who="test")
        keys[name] = manage.make_tenant_key(tenants.store, name, who="test")[1]
    tenants.close()
    options = ("--tenants", str(folder / "tenants.sqlite"), "--admin-key", keys["operator"], "--train")
    with Served(folder, tiny[0], folder / "library", *options) as served, open_library(served.library) as library:
        yield Shop(served, keys, JobStore(library))


def test_a_tenant_trains_on_columns_it_mapped(shop: Shop) -> None:
    file = shop.upload("acme", "parcels.csv", ROWS)
    with opened(shop.train("acme", file), shop.keys["acme"]) as window:
        assert "Choose the format, and the column of each part." in str(window.elements)
        window.fill("Answer (completion)", "label")
        heard = window.until("40 rows, read as prompt-completion", "Where is parcel 3?", "<mark>Shelf 3.</mark>")
        assert "/" not in heard.partition("40 rows")[2].partition("prompt-completion")[0]
        window.fill("Name of the adapter", "Parcels")
        window.fill("Epochs", 2)
        window.fill("Rank", 4)
        window.fill("Learning rate", 0.001)
        window.press("Train")
        window.until("is queued")
    (job,) = shop.jobs.jobs("acme", limit=1)[0]
    assert "parcels" in job.name
    assert job.config["data"]["columns"] == {"completion": "label"}
    assert job.config["adapter"]["rank"] == 4
    assert job.config["optimizer"]["learning_rate"] == 0.001
    assert job.config["schedule"]["epochs"] == 2
    assert Path(job.config["data"]["train"]).read_text() == ROWS
    shop.jobs.cancel("acme", job.id)


def test_preferences_are_trained_with_dpo(shop: Shop) -> None:
    file = shop.upload("acme", "doors.jsonl", PAIRS)
    with opened(shop.train("acme", file), shop.keys["acme"]) as window:
        assert "<mark>It is 3.</mark>" in html.unescape(str(window.elements))
        assert "not: No idea." in str(window.elements)
        window.press("Train")
        window.until("is queued")
    (job,) = shop.jobs.jobs("acme", limit=1)[0]
    assert job.config["preference"]["loss"] == "dpo"
    assert job.config["data"]["format"] == "preference"
    shop.jobs.cancel("acme", job.id)


def test_pasted_rows_become_an_uploaded_file(shop: Shop) -> None:
    with opened(shop.train("acme"), shop.keys["acme"]) as window:
        window.fill("Rows to paste", json.dumps([{"prompt": "Door?", "completion": "Left."}]))
        window.press("Use these rows")
        window.until("1 row, read as prompt-completion", "<mark>Left.</mark>")
    key = {"authorization": f"Bearer {shop.keys['acme']}"}
    newest = httpx.get(f"{shop.served.address}/v1/files", headers=key).json()["data"][0]
    assert newest["filename"].startswith("pasted-")


def test_a_bad_row_is_named_and_not_trained_on(shop: Shop) -> None:
    file = shop.upload("acme", "bad.jsonl", PAIRS.replace("Door 3?", "") + '{"prompt": 1')
    with opened(shop.train("acme", file), shop.keys["acme"]) as window:
        page = str(window.elements)
        assert "bad.jsonl:31: not valid JSON" in page
        assert str(shop.served.home) not in page
        assert "/tmp" not in page


def pressed(window: Window, *words: str) -> None:
    window.press("Train")
    window.until(*words)


def test_a_tenant_trains_on_its_own_uploads_only(shop: Shop, tiny: tuple[Path, Path]) -> None:
    other = shop.upload("globex", "secret.jsonl", PAIRS.replace("It is", "globex-secret"))
    own = shop.upload("acme", "own.jsonl", PAIRS)
    here = shop.served.home / "server.jsonl"
    here.write_text(PAIRS.replace("It is", "server-secret"))
    before = [job.id for job in shop.jobs.jobs(None)[0]]
    for file in (other, str(here), f"../{here.name}", "hub:imdb@train", str(tiny[0] / "config.json")):
        with opened(shop.train("acme", file), shop.keys["acme"]) as window:
            assert "-secret" not in str(window.elements)
            window.fill("Rows", file)
            window.press("Train")
            assert "-secret" not in window.until("No such File object")
    with opened(shop.train("acme", own), shop.keys["acme"]) as window:
        window.fill("Rows", other)  # after the preview of its own file
        pressed(window, "No such File object")
    with opened(shop.train("acme", own), shop.keys["acme"]) as window:
        pressed(window, "is queued")
    new, *others = shop.jobs.jobs(None)[0]
    assert [job.id for job in others] == before
    assert "-secret" not in Path(new.config["data"]["train"]).read_text()
    shop.jobs.cancel("acme", new.id)


@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        ("Name of the adapter", {"rewards": [{"kind": "python", "file": "x.py"}]}, ""),
        ("Name of the adapter", "../../x, reward python ./evil.py, judge https://evil.example", ""),
        ("Format", "python", ""),
        ("Epochs", "rewards=[{kind: python}]", "form.method.dpo.hyperparameters.n_epochs"),
        ("Rank", {"rank": 4}, "form.rank"),
        ("Learning rate", "1e308", "form.learning_rate"),
    ],
)
def test_a_tenants_events_bring_no_other_keys(shop: Shop, label: str, value: object, words: str) -> None:
    file = shop.upload("acme", "own.jsonl", PAIRS)
    with opened(shop.train("acme", file), shop.keys["acme"]) as window:
        window.fill(label, value)
        pressed(window, words or "is queued")
    if words:
        return
    (job,) = shop.jobs.jobs("acme", limit=1)[0]
    assert set(job.config) <= {"base", "data", "batching", "schedule", "checkpoint", "seed", "preference", "optimizer"}
    assert set(job.config["data"]) == {"train", "max_length", "split", "format", "columns"}
    assert Path(job.config["data"]["train"]).read_text() == PAIRS
    shop.jobs.cancel("acme", job.id)


def test_a_tenant_has_no_form_for_files_of_the_server(shop: Shop) -> None:
    with opened(shop.train("acme"), shop.keys["acme"]) as window:
        assert not [e for e in window.elements.values() if e.get("props", {}).get("label") == "File of rows"]
    with opened(shop.train("operator"), shop.keys["operator"]) as window:
        assert [e for e in window.elements.values() if e.get("props", {}).get("label") == "File of rows"]
        assert [e for e in window.elements.values() if e.get("props", {}).get("label") == "Learning rate"]
