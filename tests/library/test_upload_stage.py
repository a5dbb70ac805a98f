"""Uploads stay visible to their tenant for an hour.

Only an adapter's files are unpacked, and no path leaves the upload's folder.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.library.upload_stage import StagedAdapter, UploadStage
from veneer.models.home import veneer_home


@pytest.fixture
def staging() -> Iterator[UploadStage]:
    made = UploadStage(1000)
    yield made
    made.close()


def sent(staging: UploadStage, name: str, data: bytes, tenant: str = "acme") -> StagedAdapter:
    incoming = staging.begin(tenant, name)
    try:
        incoming.write(data)
        return staging.keep(incoming)
    except BaseException:
        staging.drop(incoming)
        raise


def packed(*files: tuple[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return out.getvalue()


def on_disk() -> list[Path]:
    return [p for p in (veneer_home() / "cache" / "staged").rglob("*") if p.is_file()]


def test_an_uploaded_file_belongs_to_its_tenant_for_an_hour(staging: UploadStage) -> None:
    now = [1000.0]
    staging.clock = lambda: now[0]
    staged = sent(staging, "a.safetensors", b"bytes")
    assert staged.path.read_bytes() == b"bytes"
    assert staging.get("acme", staged.id) == staged
    for tenant, id in (("globex", staged.id), ("", staged.id), ("acme", "other")):
        assert staging.get(tenant, id) is None
    now[0] += 3601
    assert staging.get("acme", staged.id) is None
    sent(staging, "b.safetensors", b"b")
    assert not staged.path.exists()


def test_only_the_tenants_oldest_file_is_evicted(staging: UploadStage) -> None:
    others = sent(staging, "o.gguf", b"o" * 900, "globex")
    kept = [sent(staging, f"{n}.gguf", b"x" * 900) for n in range(3)]
    assert [each.path.exists() for each in (others, *kept)] == [True, False, True, True]


def test_too_large_uploads_are_refused_while_received(staging: UploadStage) -> None:
    incoming = staging.begin("acme", "a.safetensors")
    incoming.write(b"x" * 1000)
    with pytest.raises(ConfigError, match="more than 1,000 bytes"):
        incoming.write(b"x")
    staging.drop(incoming)
    with pytest.raises(ConfigError, match="empty"):
        sent(staging, "a.safetensors", b"")
    assert on_disk() == []


@pytest.mark.parametrize(
    ("name", "plain"),
    [("../../etc/x.safetensors", "x.safetensors"), ("C:\\a\\b.gguf", "b.gguf"), ("ü \u202e<b>.gguf", "b_.gguf"),
     (".hidden.gguf", "hidden.gguf"), ("x" * 300 + ".gguf", "x" * 95 + ".gguf")],
)  # fmt: skip
def test_file_names_are_sanitized(staging: UploadStage, name: str, plain: str) -> None:
    staged = sent(staging, name, b"x")
    assert (staged.name, staged.path.name) == (plain, plain)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt", "adapter", "a.exe", ""])
def test_unsupported_file_suffixes_are_refused(staging: UploadStage, name: str) -> None:
    with pytest.raises(ConfigError, match="not the name of") as caught:
        staging.begin("acme", name)
    assert ("pickles run whatever code" in caught.value.what) == (name.rpartition(".")[2] in ("pt", "bin", "ckpt"))


def test_an_archive_is_unpacked_only_into_its_folder(staging: UploadStage) -> None:
    files = {"../../adapter_config.json": b"{}", "/etc/adapter_model.safetensors": b"w", "run/evil.py": b"x"}
    staged = sent(staging, "a.zip", packed(*files.items(), ("run/README.md/", b"")))
    kept = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w"}
    assert {p.name: p.read_bytes() for p in staged.path.iterdir()} == kept
    assert {p.parent for p in on_disk()} == {staged.path}


def test_invalid_archives_are_refused_and_leave_no_files(staging: UploadStage) -> None:
    config = ("a/adapter_config.json", b"{}")
    comment = packed(config)[:-2] + (5).to_bytes(2, "little") + b"PK\5\6!"
    long = packed(*((f"f{n}", b"") for n in range(9)))
    at = long.rfind(b"PK\5\6")
    lies = long[: at + 12] + (2 << 20).to_bytes(4, "little") + long[at + 16 :]
    for data, why in (
        (packed(("x.txt", b"x")), "no adapter_config.json"),
        (packed(config, ("b/adapter_config.json", b"{}")), "several files called"),
        (packed(config, ("a/README.md", b"x" * 5000)), "more than 1,000 bytes"),
        (packed(config, how=zipfile.ZIP_LZMA), "compression is not supported"),
        (packed(config)[:60], "not a zip archive"),
        (b"not a zip", "not a zip archive"),
        (lies, "not a zip archive"),
        (comment[:-30], "not a zip archive"),
    ):
        with pytest.raises(ConfigError, match=why):
            sent(staging, "a.zip", data)
    assert on_disk() == []


def test_threads_upload_at_the_same_time(staging: UploadStage) -> None:
    """Each thread finds its upload, and no upload fails because of another."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as pool:
            made = [*pool.map(lambda n: sent(staging, "a.safetensors", b"x", tenant=f"t{n}"), range(600))]
    finally:
        sys.setswitchinterval(switch)
    assert [staging.get(f"t{n}", each.id) for n, each in enumerate(made)] == made
    assert all(each.path.read_bytes() == b"x" for each in made)
    assert len({each.path.parent.parent for each in made}) == 1
