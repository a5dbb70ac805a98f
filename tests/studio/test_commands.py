"""Every command that a page shows is run as it stands there, and succeeds."""

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
from tests.serve.test_whole_kill import is_ready
from tests.studio.conftest import ROOT, Served
from tests.studio.lessons import parcel_rows, told_lesson
from tests.studio.test_train import OTHER
from tests.studio.windows import Window, opened, page_html
from tests.tiny_image_base import tiny_image_base
from veneer.formats import convert
from veneer.formats.topology import families
from veneer.jobs.store import Job, JobStore
from veneer.library.library import open_library
from veneer.models.text.base import load_text


def commands_in(text: str) -> list[str]:
    found = re.findall(r'data-copy="(veneer [^"]*)"', text)
    return list(dict.fromkeys(html.unescape(each.replace("&amp;", "&")) for each in found))


class Shell:
    """A terminal on the machine of the server, in its folder."""

    def __init__(self, capsys: Any) -> None:
        self.capsys, self.ran = capsys, set[str]()

    def run(self, command: str, code: int = 0) -> str:
        """What a command prints that ends with `code`."""
        _, *words = shlex.split(command)
        done = run(self.capsys, *words)
        assert done.code == code, f"{command}\n{done.err}"
        self.ran.add(command)
        return done.out

    def run_new(self, window: Window, count: int = 1) -> list[str]:
        """Run the commands on a page that were not run before, as soon as there are `count` of them."""
        while len(found := [c for c in commands_in("".join(window.values("html"))) if c not in self.ran]) < count:
            window.until("update")
        for each in found:
            self.run(each)
        return found


@pytest.fixture
def shell(
    studio: Served, tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Shell:
    monkeypatch.setenv("VENEER_HOME", str(studio.home))
    monkeypatch.setenv("VENEER_LIBRARY", str(tiny[1]))
    monkeypatch.setenv("VENEER_TENANTS", str(studio.home / "tenants.sqlite"))
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


@pytest.fixture
def asked(studio: Served, tiny: tuple[Path, Path], tmp_path: Path) -> Iterator[str]:
    """An adapter whose card has a prompt."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "It's where?"}]
    saved(load_text(str(tiny[0])), tmp_path / "asked", 7, extra={"sample": {"messages": messages}})
    with open_library(tiny[1]) as library:
        reference = library.add(tmp_path / "asked", "asked").version.reference
    wait_for(lambda: httpx.get(f"{studio.address}/studio/compare?c={reference}").status_code == 200)
    yield reference
    with open_library(tiny[1]) as library:
        for version in library.search(name="asked", all_versions=True):
            library.remove(version.reference, with_aliases=True)


@pytest.fixture
def lesson(studio: Served, tiny: tuple[Path, Path], tmp_path: Path) -> Iterator[Job]:
    with open_library(tiny[1]) as library:
        store = JobStore(library)
        yield told_lesson(store, tiny[0], parcel_rows(tmp_path), studio.home)


def is_labelled(label: str) -> Any:
    return lambda element: element.get("props", {}).get("label") == label


def test_the_library_s_commands_run(studio: Served, shell: Shell) -> None:
    for link in ("", "?q=tone", "?q=tone&rank=4&order=gain"):
        for command in commands_in(page_html(httpx.get(f"{studio.address}/studio/{link}"))):
            assert "tone" in shell.run(command)
    assert len(shell.ran) == 3


def test_the_commands_of_an_adapter_s_page_run(studio: Served, asked: str, shell: Shell) -> None:
    with opened(f"{studio.address}/studio/adapter?ref={asked}") as window:
        found = shell.run_new(window, 2)
        assert [each.split()[1] for each in found] == ["generate", "library"]
        window.press("Ask both")
        window.until("</section>")
        for label, word in (("Another alias", "spare"), ("Another tag", "parcels")):
            window.tell(is_labelled(label), "changed", word)
            assert shell.run_new(window) == [f"veneer library {label.split()[1]} {asked} {word}"]
        window.press("Remove…")
        assert shell.run_new(window) == [f"veneer library remove {asked} --with-aliases"]


def test_the_commands_of_compare_run(studio: Served, asked: str, shell: Shell) -> None:
    link = f"compare?c={asked}&c=support%401%3A0.5%2B{asked}%3A0.5&m=3"
    with opened(f"{studio.address}/studio/{link}") as window:
        found = shell.run_new(window, 3)
        assert [shlex.split(each)[2] for each in found] == 3 * ["It's where?"]
        window.press("Ask")
        window.until("token")
        window.tell(lambda e: e.get("props", {}).get("place") == 2, "corrected", [0, "By noon."])
        assert [each.split()[1] for each in shell.run_new(window)] == ["data"]
        window.press("Save mix as adapter")
        window.until("veneer library mix")
        shell.ran |= {*commands_in("".join(window.values("html")))}  # of a mix without a name yet
        window.tell(is_labelled("Name"), "changed", "softer")
        (mix,) = shell.run_new(window)
    shell.run(f"veneer library remove {shlex.split(mix)[3]}@1")


def test_the_commands_of_a_run_and_its_steps_run(studio: Served, lesson: Job, shell: Shell) -> None:
    with opened(f"{studio.address}/studio/steps?job={lesson.id}&p=Where%3F") as window:
        assert shell.run_new(window) == [f"veneer jobs show {lesson.id}"]
        window.until("data-act")
        window.act("use", step="2")
        (keep,) = shell.run_new(window)
        assert keep.startswith(f"veneer jobs keep {lesson.id} --step 2")
        window.act("go", step="2")
    with opened(f"{studio.address}/studio/run?job={lesson.id}") as window:
        window.press("Ask")
        while not any(each.startswith("veneer generate") for each in commands_in("".join(window.values("html")))):
            window.until("update")
        window.press("Stop…")
        window.until("veneer jobs cancel")
        found = commands_in("".join(window.values("html")))
        assert sorted(each.split()[2] for each in found if each.split()[1] == "jobs") == ["cancel", "watch"]
        for each in sorted(found):  # a cancelled job is watched to its end at once, which is no success
            shell.run(each, code=2 if " watch " in each else 0)


def test_the_commands_of_train_run(studio: Served, tiny: tuple[Path, Path], tmp_path: Path, shell: Shell) -> None:
    with opened(f"{studio.address}/studio/train") as window:
        rows = parcel_rows(tmp_path)
        window.fill(OTHER, f"data.train={rows}\nschedule.steps=40\noutput=runs/told")
        found = shell.run_new(window, 2)
    assert [each.split()[1:3] for each in found] == [["jobs", "submit"], ["data", "show"]]
    with open_library(tiny[1]) as library:
        store = JobStore(library)
        (job,) = [each for each in store.jobs(None, limit=20)[0] if each.name == "told"]
        assert job.config["checkpoint"] == {"adapters": True, "every": 5}
        store.cancel(None, job.id)


def test_the_command_of_a_caption_runs(studio: Served, tmp_path: Path, shell: Shell) -> None:
    (pictures := tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 32), "red").save(pictures / "0.png")
    (pictures / "0.txt").write_text("a red cat")
    with opened(f"{studio.address}/studio/train") as window:
        base = tiny_image_base(tmp_path, "flux1")
        more = ("adapter.rank=2", "schedule.steps=4", "data.resolution=32")
        window.fill(OTHER, "\n".join((f"base={base}", f"data.pictures={pictures}", *more)))
        sheet = window.until("a red cat")
        shell.ran |= {*commands_in("".join(window.values("html")))}
        window.act("caption", id=re.findall(r'data-act=\\"caption\\" data-id=\\"([^"\\]+)', sheet)[-1])
        window.until("Caption")
        window.tell(is_labelled("Caption"), "changed", "a cat, it's green")
        window.until("green")
        shell.ran |= {each for each in commands_in("".join(window.values("html"))) if "green" not in each}
        shell.run_new(window)
    assert (pictures / "0.txt").read_text().strip() == "a cat, it's green"


def test_the_commands_of_live_run(studio: Served, shell: Shell) -> None:
    base = studio.base.name
    with opened(f"{studio.address}/studio/live?ref=support%401") as window:
        found = shell.run_new(window, 2)
        route = f"veneer tenant route set support {base}=90 support@1=10"
        assert {route, "veneer tenant usage --by tenant,adapter"} <= {*found}
    shell.run(f"veneer tenant route set support {base}=50 support@1=50")
    wait_for(lambda: "history support" in page_html(httpx.get(f"{studio.address}/studio/live")))
    with opened(f"{studio.address}/studio/live") as window:
        shell.run_new(window)
        for button, command in (("Roll back", "rollback"), ("Remove", "remove")):
            window.press(button)
            window.until(f"veneer tenant route {command}")
            (ran,) = shell.run_new(window)
            assert ran == f"veneer tenant route {command} support"


def test_the_commands_of_doctor_run(studio: Served, shell: Shell) -> None:
    file = Path("style.safetensors")
    convert.write(random_adapter(families()["sdxl"], lambda m: m.startswith("unet.")), file, "kohya", family="sdxl")
    (first,) = commands_in(page_html(httpx.get(f"{studio.address}/studio/doctor")))
    shell.run(first.replace("FILE", str(file)))
    at = f"{studio.address}/studio/api/v1/adapter_inspections"
    head = {"content-type": "application/octet-stream"}
    sent = httpx.post(at, params={"filename": str(file)}, content=file.read_bytes(), headers=head, timeout=60)
    with opened(f"{studio.address}/studio/doctor?file={sent.json()['id']}") as window:
        assert shell.run_new(window) == ["veneer library add style.safetensors style"]
    shell.run("veneer library remove style@1")


def test_the_commands_of_a_base_that_draws_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    base = tiny_image_base(tmp_path, "flux1")
    (home := tmp_path / "home").mkdir()
    with Served(home, base, tmp_path / "library", "--open") as served:
        monkeypatch.setenv("VENEER_HOME", str(home))
        monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
        monkeypatch.chdir(tmp_path)
        shell = Shell(capsys)
        assert commands_in(page_html(httpx.get(f"{served.address}/studio/compare"))) == [], "nothing is asked yet"
        with opened(f"{served.address}/studio/compare?p=a%20fox&steps=1") as window:
            (image,) = shell.run_new(window)
        assert image.startswith("veneer image 'a fox' --base /")
        assert (tmp_path / "picture.png").is_file()
        (serve,) = commands_in(page_html(httpx.get(f"{served.address}/studio/live")))
    command = ["-c", "from veneer.cli.main import main; main()", *shlex.split(serve)[1:], "--port", str(free_port())]
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT / "src")}
    process = Forked(command, env=env, log=tmp_path / "log", cwd=tmp_path)
    try:
        wait_for(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{command[-1]}"), 60)
        assert process.poll() is None, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
