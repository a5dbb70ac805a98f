"""The compose file names only files and services that exist, and contains no secret. Docker is not run.

Allowed keys are those of the Compose Specification: https://github.com/compose-spec/compose-spec (05-services.md,
07-volumes.md, 09-secrets.md).
"""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_readme import parse
from veneer.serve.tenancy.keys import admin_hash

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "compose"
SERVICE: dict[str, type | tuple[type, ...]] = {
    "image": str, "build": dict, "restart": str, "env_file": (str, list), "environment": dict, "secrets": list,
    "volumes": list, "healthcheck": dict, "command": list, "entrypoint": list, "depends_on": dict, "deploy": dict,
    "ports": list, "profiles": list,
}  # fmt: skip
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_every_key_is_in_the_specification(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} == {"name", "services", "volumes", "secrets"}
    for name, service in compose["services"].items():
        for key, value in service.items():
            assert key in SERVICE, f"{name}: {key}"
            assert isinstance(value, SERVICE[key]), f"{name}: {key}"
        assert service.get("restart", "unless-stopped") == "unless-stopped"
        assert set(service.get("healthcheck", {})) <= {"test", "interval", "timeout", "retries"}


def test_services_volumes_and_secrets_exist(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for other, when in service.get("depends_on", {}).items():
            assert when["condition"] in CONDITIONS
            assert other in services
            if when["condition"] == "service_healthy":
                assert "healthcheck" in services[other], other
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (FOLDER / source).is_file() if source.startswith(".") else source in compose["volumes"]
    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = prometheus["scrape_configs"]
    assert job["authorization"]["credentials_file"].removeprefix("/run/secrets/") in services["prometheus"]["secrets"]
    assert {name for each in job["dns_sd_configs"] for name in each["names"]} <= set(services)


def test_commands_have_options_that_exist(compose: dict[str, Any]) -> None:
    for name, command in {"engine": "serve", "door": "serve", "worker": "worker"}.items():
        assert parse(shlex.join(["veneer", *compose["services"][name]["command"]])) == [command]


def test_the_script_writes_every_secret_and_the_file_none(compose: dict[str, Any], tmp_path: Path) -> None:
    for file in ("compose.yaml", "secrets.sh"):
        shutil.copy(FOLDER / file, tmp_path)
    said = subprocess.run(["sh", tmp_path / "secrets.sh"], check=True, capture_output=True, text=True).stdout
    admin = said.split()[-1]

    variables: dict[str, str] = {}
    for service in compose["services"].values():
        names = service.get("env_file", [])
        for name in [names] if isinstance(names, str) else names:
            path = tmp_path / name
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            variables |= dict(line.split("=", 1) for line in path.read_text().splitlines())
    for secret in compose["secrets"].values():
        content = (tmp_path / secret["file"]).read_text().strip()
        assert content
        assert content == "veneer" or content not in (FOLDER / "compose.yaml").read_text()
    assert admin_hash(variables["VENEER_ADMIN_KEY_HASH"]) == admin_hash(admin)
    assert variables["VENEER_UPSTREAM_KEY"] == (tmp_path / "secrets" / "engine_keys").read_text().strip()
    password = (tmp_path / "secrets" / "postgres").read_text()
    assert variables["VENEER_TENANTS"] == f"postgresql://veneer:{password}@postgres/veneer"
    assert variables["AWS_SECRET_ACCESS_KEY"] == (tmp_path / "secrets" / "s3_password").read_text()

    assert (tmp_path / "secrets" / "admin_key").read_text() == admin

    again = subprocess.run(["sh", tmp_path / "secrets.sh"], capture_output=True, text=True)
    assert again.returncode != 0  # secrets in use are not replaced
    assert (tmp_path / "secrets" / "postgres").read_text() == password


def test_engines_get_neither_tenants_nor_the_operators_key(compose: dict[str, Any]) -> None:
    assert compose["services"]["engine"]["env_file"] == "secrets/library.env"
    library = (FOLDER / "secrets.sh").read_text().split("library.env <<END")[1].split("END")[0]
    assert set(re.findall(r"^(\w+)=", library, flags=re.M)).isdisjoint({"VENEER_TENANTS", "VENEER_ADMIN_KEY_HASH"})
