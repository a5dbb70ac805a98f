"""Settings of `veneer serve`, in the spelling that users write."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.serve.config import ServerConfig, server_config
from veneer.serve.settings import Preload, bytes_of, keys_of, parse_preload, size_text
from veneer.train.config.load import parse_yaml


def test_preloaded_adapters_are_parsed() -> None:
    assert parse_preload("support") == Preload("support", "support")
    for source in ("acme/support@3", "sha256:12345678"):
        assert parse_preload(f"support={source}") == Preload("support", source)


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    for text in ("", "=x", "a="):
        with pytest.raises(ConfigError):
            parse_preload(text)
    assert bytes_of("1.5G", "") == 3 << 29
    assert bytes_of("512MB", "") == 512 << 20
    with pytest.raises(ConfigError, match="not a size"):
        bytes_of("much", "--cache-memory")
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-0123456789abcdef\n")
    assert keys_of(file) == ["sk-0123456789abcdef"]
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="16 characters"):
        keys_of(file)


@pytest.mark.parametrize("size", [1, 1000, 1 << 10, 32 << 20, 1536 << 20, 1 << 30, 16 << 30, 1 << 50])
def test_written_sizes_are_read_back(size: int) -> None:
    assert bytes_of(size_text(size), "") == size


def test_sizes_are_written_as_people_write_them() -> None:
    assert [size_text(size) for size in (1000, 32 << 20, 1 << 30)] == ["1000", "32M", "1G"]


def test_the_documented_configuration_file_holds_the_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
    values, _ = parse_yaml(page.partition("```yaml\n")[2].partition("```")[0], "serve.md")
    documented, default = server_config(values, Path("serve.md")), ServerConfig()
    assert set(values) == set(ServerConfig.model_fields)
    for key in ("mix_disk", "ledger_room"):
        assert documented.bytes(key) == default.bytes(key)
        values.pop(key)
    assert documented.model_dump(include=set(values)) == default.model_dump(include=set(values))


def test_a_configuration_file_is_read(tmp_path: Path) -> None:
    config = server_config({"queue": 4, "mix_disk": "2G", "ledger_folder": "bills"}, tmp_path / "server.yaml")
    assert (config.queue, config.bytes("mix_disk"), config.ledger_folder) == (4, 2 << 30, tmp_path / "bills")
