"""The three configurations of HAProxy differ only in how they find engines and where they log."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.deploy.charts import rendered

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
LOCAL = re.compile(r"log |option httplog|monitor-uri |server |server-template |bind ")
FINDING = re.compile(r" (init-addr|resolvers|hash-key) \S+")


def configurations() -> dict[str, str]:
    maps = [each for each in rendered(DEPLOY / "helm" / "veneer") if "haproxy.cfg" in each.get("data", {})]
    (chart,) = (each["data"]["haproxy.cfg"] for each in maps)
    files = {name: (DEPLOY / name / "haproxy.cfg").read_text(encoding="utf-8") for name in ("routers", "compose")}
    return {**files, "helm": chart}


def directives(text: str) -> dict[str, set[str]]:
    """Return section -> directives that must be equal in all files. `default-server` lines add up."""
    found: dict[str, set[str]] = defaultdict(set)
    section = ""
    for raw in text.splitlines():
        line = re.sub(r"\s+", " ", raw.partition("#")[0].strip())
        if line and not raw.startswith(" "):
            section = line
        elif line.startswith("default-server "):
            found[section].update(re.findall(r" (check|\S+ \S+)", FINDING.sub("", line.removeprefix("default-server"))))
        elif line and not LOCAL.match(line) and not section.startswith("resolvers "):
            found[section].add(line)
    return dict(found)


@pytest.mark.parametrize("place", ["compose", "helm"])
def test_routers_have_the_options_of_the_file_to_copy(place: str) -> None:
    texts = configurations()
    wanted = directives(texts["routers"])
    assert {"option abortonclose", "retries 2"} <= wanted["defaults"]
    assert {"check", "inter 1s", "on-error mark-down"} <= wanted["backend engines"]
    assert directives(texts[place]) == wanted


@pytest.mark.fleet
def test_haproxy_accepts_each_configuration(tmp_path: Path) -> None:
    haproxy = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    assert haproxy, "there is no haproxy: install haproxy"
    for place, text in configurations().items():
        (file := tmp_path / f"{place}.cfg").write_text(text)
        checked = subprocess.run([haproxy, "-c", "-f", str(file)], capture_output=True, text=True)
        assert checked.returncode == 0, f"{place}: {checked.stderr}"
        assert "WARNING" not in checked.stderr, checked.stderr
