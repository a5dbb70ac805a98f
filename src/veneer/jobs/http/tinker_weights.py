"""Tinker's routes of saved weights: runs, their checkpoints, and downloads."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from veneer.jobs.http.tinker import Call, TinkerRoutes, tinker_router
from veneer.jobs.tinker.checkpoints import SavedWeights, parse_path
from veneer.jobs.tinker.service import TrainingRun, not_found
from veneer.serve.http.bodies import Strict
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
            raise not_found(f"{id} has no checkpoint {checkpoint_id[:100]!r}", "checkpoint_id")
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
