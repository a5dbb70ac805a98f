"""The form for uploaded rows: a tenant previews and trains on its own uploads and nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.studio.conftest import OPERATOR, StudioServer, tenant_keys
from tests.studio.page_socket import PageSocket, has_label, open_page
from veneer.jobs.store import Job, JobStore
from veneer.library.library import open_library

ROWS = "question,label,note\n" + "".join(f"Where is parcel {n}?,Shelf {n % 7}.,x\n" for n in range(40))
PAIRS = "".join(
    json.dumps({"prompt": f"Door {n}?", "chosen": f"It is {n}.", "rejected": "No idea."}) + "\n" for n in range(30)
)


class Shop:
    """A server that trains, with the keys of two tenants."""

    def __init__(self, server: StudioServer, keys: dict[str, str], jobs: JobStore) -> None:
        self.server, self.keys, self.jobs = server, keys, jobs

    def upload(self, tenant: str, name: str, text: str) -> str:
        """Upload a file as the page does. Return the file's id."""
        cookies = {"cookie": f"veneer_studio={self.keys[tenant]}"}
        files, data = {"file": (name, text)}, {"purpose": "fine-tune"}
        url = f"{self.server.address}/studio/api/v1/files"
        answer = httpx.post(url, headers=cookies, timeout=30, files=files, data=data)
        return str(answer.raise_for_status().json()["id"])

    def form(self, file: str = "", key: str = "acme"):
        return open_page(f"{self.server.address}/studio/train?file={file}", self.keys[key])

    def newest(self) -> Job:
        """Cancel acme's newest job. Return the record from before the cancellation."""
        (job,) = self.jobs.jobs("acme", limit=1)[0]
        self.jobs.cancel("acme", job.id)
        return job


@pytest.fixture(scope="module")
def shop(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    keys = tenant_keys(folder / "tenants.sqlite")
    options = ("--tenants", str(folder / "tenants.sqlite"), "--admin-key", OPERATOR, "--train")
    with StudioServer(folder, tiny[0], folder / "library", *options) as server, open_library(server.library) as library:
        yield Shop(server, keys, JobStore(library))


def train(page: PageSocket, *words: str) -> str:
    page.press("Train")
    return page.until(*words)


def test_tenant_trains_on_columns_it_mapped(shop: Shop) -> None:
    with shop.form(shop.upload("acme", "parcels.csv", ROWS)) as page:
        assert "Choose the question and answer columns." in str(page.elements)
        page.fill("Answer column", "label")
        received = page.until("40 rows, read as prompt-completion", "Where is parcel 3?", "<mark>Shelf 3.</mark>")
        assert "/" not in received.partition("40 rows")[2].partition("prompt-completion")[0]
        for label, value in {"Adapter name": "Parcels", "Epochs": 2, "Rank": 4, "Learning rate": 0.001}.items():
            page.fill(label, value)
        train(page, "is queued")
    job = shop.newest()
    assert "parcels" in job.name
    assert job.config["data"]["columns"] == {"completion": "label"}
    assert job.config["adapter"]["rank"] == 4
    assert job.config["optimizer"]["learning_rate"] == 0.001
    assert job.config["schedule"]["epochs"] == 2
    assert Path(job.config["data"]["train"]).read_text() == ROWS


def test_preferences_are_trained_with_dpo(shop: Shop) -> None:
    with shop.form(shop.upload("acme", "doors.jsonl", PAIRS)) as page:
        assert "<mark>It is 3.</mark>" in html.unescape(str(page.elements))
        assert "rejected: No idea." in str(page.elements)
        train(page, "is queued")
    job = shop.newest()
    assert job.config["preference"]["loss"] == "dpo"
    assert job.config["data"]["format"] == "preference"


def test_unusable_row_is_named_without_server_paths(shop: Shop) -> None:
    file = shop.upload("acme", "bad.jsonl", PAIRS.replace("Door 3?", "") + '{"prompt": 1')
    with shop.form(file) as page:
        text = str(page.elements)
    assert "bad.jsonl:31: not valid JSON" in text
    assert str(shop.server.home) not in text
    assert "/tmp" not in text


def test_tenant_trains_on_its_own_uploads_only(shop: Shop, tiny: tuple[Path, Path]) -> None:
    foreign_file = shop.upload("globex", "secret.jsonl", PAIRS.replace("It is", "globex-secret"))
    own_file = shop.upload("acme", "own.jsonl", PAIRS)
    local = shop.server.home / "server.jsonl"
    local.write_text(PAIRS.replace("It is", "server-secret"))
    earlier = [job.id for job in shop.jobs.jobs(None)[0]]
    for file in (foreign_file, str(local), f"../{local.name}", "hub:imdb@train", str(tiny[0] / "config.json")):
        with shop.form(file) as page:
            assert "-secret" not in str(page.elements)
            page.fill("Uploaded file", file)
            assert "-secret" not in train(page, "No such File object")
    with shop.form(own_file) as page:
        page.fill("Uploaded file", foreign_file)  # replace the file after the preview of the tenant's own file
        train(page, "No such File object")
    with shop.form(own_file) as page:
        train(page, "is queued")
    new, *rest = shop.jobs.jobs(None)[0]
    assert [job.id for job in rest] == earlier
    assert "-secret" not in Path(shop.newest().config["data"]["train"]).read_text()
    assert new.tenant == "acme"


@pytest.mark.parametrize(
    ("label", "value", "error"),
    [
        ("Adapter name", {"rewards": [{"kind": "python", "file": "x.py"}]}, ""),
        ("Adapter name", "../../x, reward python ./evil.py, judge https://evil.example", ""),
        ("Epochs", "rewards=[{kind: python}]", "form.method.dpo.hyperparameters.n_epochs"),
        ("Rank", {"rank": 4}, "form.rank"),
        ("Learning rate", "1e308", "form.learning_rate"),
    ],
)
def test_tenant_events_add_no_other_keys(shop: Shop, label: str, value: object, error: str) -> None:
    with shop.form(shop.upload("acme", "own.jsonl", PAIRS)) as page:
        page.fill(label, value)
        train(page, error or "is queued")
    if not error:
        job = shop.newest()
        sections = {"base", "data", "batching", "schedule", "checkpoint", "seed", "preference", "optimizer"}
        assert set(job.config) <= sections
        assert set(job.config["data"]) == {"train", "max_length", "split", "format", "columns"}
        assert Path(job.config["data"]["train"]).read_text() == PAIRS


def test_only_the_operator_sees_the_form_for_server_files(shop: Shop) -> None:
    for key, count in (("acme", 0), ("operator", 1)):
        with shop.form(key=key) as page:
            assert sum(map(has_label("Data file"), page.elements.values())) == count
