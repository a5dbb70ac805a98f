"""Tinker's routes of saved weights: runs, their checkpoints, and downloads."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tarfile
import time
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from veneer.jobs.http.tinker import Call, TinkerRoutes, tinker_router
from veneer.jobs.tinker.checkpoints import SavedWeights, parse_path
from veneer.jobs.tinker.service import NotFound, TrainingRun
from veneer.library.store import CHUNK
from veneer.serve.http.bodies import Strict
from veneer.serve.http.downloads import file_response
from veneer.serve.request import Refused

FILES = "/api/v1/files"
"""The prefix of signed URLs, under which files of exported weights need no key."""
_SIGNED = 3600.0
_SECRET = secrets.token_bytes(32)
_LIMIT, _OFFSET = Query(20, ge=1, le=1000), Query(0, ge=0)
_CHECKPOINT = "/training_runs/{id}/checkpoints/{kind}/{name}"


class PathBody(Strict):
    tinker_path: str


class TtlBody(Strict):
    ttl_seconds: int | None = Field(default=None, ge=3600, le=10 * 366 * 86400)


def weights_routes(state: TinkerRoutes) -> APIRouter:
    router, current_call = tinker_router(), Depends(state.call)

    def find(call: Call, id: str, checkpoint_id: str) -> tuple[TrainingRun, SavedWeights]:
        run = call.service.run(call.tenant, id)
        checkpoint = run.checkpoints.find(checkpoint_id)
        if checkpoint is None:
            raise NotFound(f"{id} has no checkpoint {checkpoint_id[:100]!r}", where="checkpoint_id")
        return run, checkpoint

    @router.post("/weights_info", summary="Get what a client needs to continue from a checkpoint")
    def info(body: PathBody, call: Call = current_call) -> Any:
        run, _ = find(call, *parse_path(body.tinker_path))
        return {
            "base_model": call.model_name(run.base_name),
            "is_lora": True,
            "lora_rank": run.lora.rank,
            "train_unembed": run.lora.unembed,
            "train_mlp": run.lora.mlp,
            "train_attn": run.lora.attention,
            "optimizer_config": {"type": "adamw"},
        }

    @router.get("/training_runs", summary="List the caller's training runs, newest first")
    def runs(limit: int = _LIMIT, offset: int = _OFFSET, call: Call = current_call) -> Any:
        matches = call.service.runs_of(call.tenant)
        cursor = {"offset": offset, "limit": limit, "total_count": len(matches)}
        return {"training_runs": [_run_json(run, call) for run in matches[offset : offset + limit]], "cursor": cursor}

    @router.get("/training_runs/{id}", summary="Get a training run")
    def one(id: str, call: Call = current_call) -> Any:
        return _run_json(call.service.run(call.tenant, id), call)

    @router.get("/training_runs/{id}/checkpoints", summary="List a run's checkpoints, oldest first")
    def checkpoints(id: str, call: Call = current_call) -> Any:
        return {"checkpoints": [each.to_json() for each in call.service.run(call.tenant, id).checkpoints.all()]}

    @router.get("/checkpoints", summary="List the caller's checkpoints, newest first")
    def every(limit: int = _LIMIT, offset: int = _OFFSET, call: Call = current_call) -> Any:
        saved = [each for run in call.service.runs_of(call.tenant) for each in run.checkpoints.all()]
        saved.sort(key=lambda each: each.made, reverse=True)
        cursor = {"offset": offset, "limit": limit, "total_count": len(saved)}
        return {"checkpoints": [each.to_json() for each in saved[offset : offset + limit]], "cursor": cursor}

    @router.get(f"{_CHECKPOINT}/archive", summary="Download a checkpoint as a tar of PEFT files")
    def archive(id: str, kind: str, name: str, call: Call = current_call) -> Response:
        _, checkpoint = find(call, id, f"{kind}/{name}")
        hold = call.http.quotas.take(call.tenant, descriptors=1)
        tar, named = _Tar(state.library.resolve(checkpoint.reference)), f'attachment; filename="{name}.tar"'
        return file_response(tar, tar.size, named, media_type="application/x-tar", after=hold.release)  # type: ignore[arg-type]

    @router.get(f"{_CHECKPOINT}/external_weights_urls", summary="Get a URL for each file of a checkpoint")
    def urls(request: HttpRequest, id: str, kind: str, name: str, call: Call = current_call) -> Any:
        _, checkpoint = find(call, id, f"{kind}/{name}")
        ends, base = int(time.time() + _SIGNED), str(request.base_url).rstrip("/")
        signed = f"{base}{FILES}/{checkpoint.reference}/{ends}/{_sign(checkpoint.reference, ends)}"
        files = [path for path in sorted(state.library.resolve(checkpoint.reference).iterdir()) if path.is_file()]
        urls = {path.name: f"{signed}/{path.name}" for path in files}
        return {"urls": urls, "expires": datetime.fromtimestamp(ends, UTC).isoformat()}

    @router.put(f"{_CHECKPOINT}/ttl", summary="Set a checkpoint's time to live")
    def ttl(id: str, kind: str, name: str, body: TtlBody, call: Call = current_call) -> None:
        run, checkpoint = find(call, id, f"{kind}/{name}")
        run.checkpoints.set_ttl(checkpoint.id, body.ttl_seconds)

    @router.delete(_CHECKPOINT, summary="Delete a checkpoint")
    def remove(id: str, kind: str, name: str, call: Call = current_call) -> None:
        run, checkpoint = find(call, id, f"{kind}/{name}")
        call.service.remove(run, checkpoint.id)

    return router


def signed_routes(state: TinkerRoutes) -> APIRouter:
    """Return the routes of signed URLs, which need no key."""
    router = tinker_router("public")

    @router.get("/files/{reference:path}/{ends}/{signature}/{name}", summary="Download a file by its signed URL")
    def file(reference: str, ends: int, signature: str, name: str) -> Response:
        right = hmac.compare_digest(signature.encode(), _sign(reference, ends).encode())
        if not right or ends < time.time():
            raise Refused("this URL is not valid, or not any more", status=403, code="forbidden")
        folder = state.library.resolve(reference)
        if name not in {path.name for path in folder.iterdir()}:
            raise Refused("there is no such file", status=404, code="not_found")
        return FileResponse(folder / name)

    return router


def _sign(reference: str, ends: int) -> str:
    return hmac.new(_SECRET, f"{reference} {ends}".encode(), hashlib.sha256).hexdigest()


def _run_json(run: TrainingRun, call: Call) -> dict[str, Any]:
    saved = run.checkpoints.all()

    def newest(kind: str) -> dict[str, Any] | None:
        return next((each.to_json() for each in reversed(saved) if each.id.startswith(f"{kind}/")), None)

    return {
        "training_run_id": run.id,
        "base_model": call.model_name(run.base_name),
        "model_owner": call.tenant or "veneer",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora.rank,
        "last_request_time": datetime.fromtimestamp(run.used, UTC).isoformat(),
        "last_checkpoint": newest("weights"),
        "last_sampler_checkpoint": newest("sampler_weights"),
        "user_metadata": run.metadata,
    }


class _Tar:
    """A folder as a tar archive, generated while it is read. `size`: its bytes."""

    def __init__(self, folder: Path) -> None:
        self._files = [(path, path.stat()) for path in sorted(folder.iterdir())]
        blocks = sum(1 + -(-stat.st_size // tarfile.BLOCKSIZE) for _, stat in self._files) + 2
        self.size = -(-blocks * tarfile.BLOCKSIZE // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        self._parts = self._chunks()

    def read(self, size: int) -> bytes:
        """Return the next part, of any size (`size` is ignored); b"" at the end."""
        return next(self._parts, b"")

    def close(self) -> None:
        self._parts.close()

    def _chunks(self) -> Generator[bytes, None, None]:
        sent = 0
        for path, stat in self._files:
            info = tarfile.TarInfo(path.name)
            info.size, info.mtime, info.mode = stat.st_size, int(stat.st_mtime), 0o644
            yield (head := info.tobuf(tarfile.GNU_FORMAT))
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
            if stat.st_size % tarfile.BLOCKSIZE:
                yield bytes(-stat.st_size % tarfile.BLOCKSIZE)
            sent += len(head) + stat.st_size + -stat.st_size % tarfile.BLOCKSIZE
        yield bytes(self.size - sent)
