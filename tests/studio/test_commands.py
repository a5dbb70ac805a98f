"""Every command that a page shows runs and succeeds."""

from __future__ import annotations

import html
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.cli.run import run
from tests.forks import Forked
from tests.formats.image_adapters import random_adapter
from tests.serve.http.toy import free_port, wait_for
from tests.serve.saved_adapters import saved
from tests.serve.whole import is_ready
from tests.studio.conftest import ROOT, StudioServer
from tests.studio.page_socket import PageSocket, has_label, open_page, page_html
from tests.studio.recorded_jobs import parcel_rows, recorded_job
from tests.studio.test_train import OTHER
from tests.tiny_image_base import tiny_image_base
from veneer.formats import convert
from veneer.formats.topology import families
from veneer.jobs.store import JobStore
from veneer.library.library import open_library
from veneer.models.text.base import load_text


def commands_in(text: str) -> list[str]:
    attributes = re.findall(r'data-copy="(veneer [^"]*)"', text)
    return list(dict.fromkeys(html.unescape(each.replace("&amp;", "&")) for each in attributes))


def commands_of(url: str) -> list[str]:
    return commands_in(page_html(httpx.get(url)))


class Shell:
    """A terminal on the server's machine. `ran`: commands that have run."""

    def __init__(self, capsys: Any) -> None:
        self.capsys, self.ran = capsys, set[str]()

    def run(self, command: str, code: int = 0) -> str:
        """Run a command that must exit with `code`. Return its output."""
        self.ran.add(command)
        return run(self.capsys, *shlex.split(command)[1:], code=code).out

    def run_new(self, page: PageSocket, count: int = 1) -> list[str]:
        """Wait until the page shows at least `count` new commands, then run and return them."""
        while len(commands := [c for c in commands_in("".join(page.values("html"))) if c not in self.ran]) < count:
            page.until("update")
        for each in commands:
            self.run(each)
        return commands

    def skip(self, page: PageSocket) -> None:
        """Mark the commands on the page as run, without running them."""
        self.ran |= {*commands_in("".join(page.values("html")))}


@pytest.fixture
def shell(
    studio: StudioServer, tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Shell:
    monkeypatch.setenv("VENEER_HOME", str(studio.home))
    monkeypatch.setenv("VENEER_LIBRARY", str(tiny[1]))
    monkeypatch.setenv("VENEER_TENANTS", str(studio.home / "tenants.sqlite"))
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


@pytest.fixture
def prompted(studio: StudioServer, tiny: tuple[Path, Path], tmp_path: Path) -> Iterator[str]:
    """Yield the reference of an adapter whose card has a prompt."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "It's where?"}]
    saved(load_text(str(tiny[0])), tmp_path / "prompted", 7, extra={"sample": {"messages": messages}})
    with open_library(tiny[1]) as library:
        reference = library.add(tmp_path / "prompted", "prompted").version.reference
    wait_for(lambda: httpx.get(f"{studio.address}/studio/compare?c={reference}").status_code == 200)
    yield reference
    with open_library(tiny[1]) as library:
        for version in library.search(name="prompted", all_versions=True):
            library.remove(version.reference, with_aliases=True)


def test_library_commands_run(studio: StudioServer, shell: Shell) -> None:
    for link in ("", "?q=tone", "?q=tone&rank=4&order=gain"):
        for command in commands_of(f"{studio.address}/studio/{link}"):
            assert "tone" in shell.run(command)
    assert len(shell.ran) == 3


def test_adapter_commands_run(studio: StudioServer, prompted: str, shell: Shell) -> None:
    with open_page(f"{studio.address}/studio/adapter?ref={prompted}") as page:
        assert [each.split()[1] for each in shell.run_new(page, 2)] == ["generate", "library"]
        for kind, word in (("alias", "spare"), ("tag", "parcels")):
            page.fill(f"New {kind}", word)
            assert shell.run_new(page) == [f"veneer library {kind} {prompted} {word}"]
        page.press("Remove…")
        assert shell.run_new(page) == [f"veneer library remove {prompted} --with-aliases"]


def test_compare_commands_run(studio: StudioServer, prompted: str, shell: Shell) -> None:
    link = f"compare?c={prompted}&c=support%401%3A0.5%2B{prompted}%3A0.5&m=3"
    with open_page(f"{studio.address}/studio/{link}") as page:
        assert [shlex.split(each)[2] for each in shell.run_new(page, 3)] == 3 * ["It's where?"]
        page.press("Ask")
        page.until("token")
        page.emit(lambda e: e.get("props", {}).get("position") == 2, "corrected", [0, "By noon."])
        assert [each.split()[1] for each in shell.run_new(page)] == ["data"]
        page.press("Save mix as adapter")
        page.until("veneer library mix")
        shell.skip(page)  # do not run this command: the mix still has no name
        page.emit(has_label("Name"), "changed", "softer")
        (mix,) = shell.run_new(page)
    shell.run(f"veneer library remove {shlex.split(mix)[3]}@1")


def test_run_commands_run(studio: StudioServer, tiny: tuple[Path, Path], tmp_path: Path, shell: Shell) -> None:
    with open_library(tiny[1]) as library:
        job = recorded_job(JobStore(library), tiny[0], parcel_rows(tmp_path), studio.home).id
        with open_page(f"{studio.address}/studio/run?job={job}") as page:
            page.act("use", step="2")
            page.until("veneer jobs keep")
            page.press("Stop…")
            page.until("veneer jobs cancel")
            commands = {each.split()[2]: each for each in commands_in("".join(page.values("html")))}
    assert commands.keys() == {"keep", "cancel", "watch"}
    for action, code in (("keep", 0), ("cancel", 0), ("watch", 2)):  # `watch` fails because the job was cancelled
        shell.run(commands[action], code)


def test_train_commands_run(studio: StudioServer, tiny: tuple[Path, Path], tmp_path: Path, shell: Shell) -> None:
    with open_page(f"{studio.address}/studio/train") as page:
        page.fill(OTHER, f"data.train={parcel_rows(tmp_path)}\nschedule.steps=40\noutput=runs/planned")
        commands = shell.run_new(page, 2)
    assert [each.split()[1:3] for each in commands] == [["jobs", "submit"], ["data", "show"]]
    with open_library(tiny[1]) as library:
        store = JobStore(library)
        (job,) = [each for each in store.jobs(None, limit=20)[0] if each.name == "planned"]
        assert job.config["checkpoint"] == {"adapters": True, "every": 5}
        store.cancel(None, job.id)


def test_caption_command_runs(studio: StudioServer, tmp_path: Path, shell: Shell) -> None:
    (folder := tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 32), "red").save(folder / "0.png")
    (folder / "0.txt").write_text("a red cat")
    base = tiny_image_base(tmp_path, "flux1")
    settings = (f"base={base}", f"data.pictures={folder}", "adapter.rank=2", "schedule.steps=4", "data.resolution=32")
    with open_page(f"{studio.address}/studio/train") as page:
        page.fill(OTHER, "\n".join(settings))
        received = page.until("a red cat")
        page.act("caption", id=re.findall(r'data-act=\\"caption\\" data-id=\\"([^"\\]+)', received)[-1])
        page.until("Caption")
        shell.skip(page)
        page.emit(has_label("Caption"), "changed", "a cat, it's green")
        shell.run_new(page)
    assert (folder / "0.txt").read_text().strip() == "a cat, it's green"


def test_live_commands_run(studio: StudioServer, shell: Shell) -> None:
    base, url = studio.base.name, f"{studio.address}/studio/live"
    with open_page(f"{url}?ref=support%401") as page:
        route = f"veneer tenant route set support {base}=90 support@1=10"
        assert {route, "veneer tenant usage --by tenant,adapter"} <= {*shell.run_new(page, 2)}
    shell.run(f"veneer tenant route set support {base}=50 support@1=50")
    wait_for(lambda: "history support" in page_html(httpx.get(url)))
    with open_page(url) as page:
        shell.run_new(page)
        for button, command in (("Roll back", "rollback"), ("Remove", "remove")):
            page.press(button)
            page.until(f"veneer tenant route {command}")
            assert shell.run_new(page) == [f"veneer tenant route {command} support"]


def test_doctor_commands_run(studio: StudioServer, shell: Shell) -> None:
    file = Path("style.safetensors")
    convert.write(random_adapter(families()["sdxl"], lambda m: m.startswith("unet.")), file, "kohya", family="sdxl")
    (first,) = commands_of(f"{studio.address}/studio/doctor")
    shell.run(first.replace("FILE", str(file)))
    url = f"{studio.address}/studio/api/v1/adapter_inspections?filename={file}"
    headers = {"content-type": "application/octet-stream"}
    uploaded = httpx.post(url, content=file.read_bytes(), headers=headers, timeout=60)
    with open_page(f"{studio.address}/studio/doctor?file={uploaded.json()['id']}") as page:
        assert shell.run_new(page) == ["veneer library add style.safetensors style"]
    shell.run("veneer library remove style@1")


def test_commands_of_an_image_base_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    base, shell = tiny_image_base(tmp_path, "flux1"), Shell(capsys)
    (home := tmp_path / "home").mkdir()
    with StudioServer(home, base, tmp_path / "library", "--open") as server:
        monkeypatch.setenv("VENEER_HOME", str(home))
        monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
        monkeypatch.chdir(tmp_path)
        assert commands_of(f"{server.address}/studio/compare") == [], "there is no prompt yet"
        with open_page(f"{server.address}/studio/compare?p=a%20fox&steps=1") as page:
            (image,) = shell.run_new(page)
        assert image.startswith("veneer image 'a fox' --base /")
        assert (tmp_path / "image.png").is_file()
        (serve,) = commands_of(f"{server.address}/studio/live")
    command = ["-c", "from veneer.cli.main import main; main()", *shlex.split(serve)[1:], "--port", str(free_port())]
    process = Forked(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, log=tmp_path / "log", cwd=tmp_path)
    try:
        wait_for(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{command[-1]}"), 60)
        assert process.poll() is None, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
