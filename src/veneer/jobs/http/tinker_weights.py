"""Tinker's routes for saved weights: runs and their checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, Query

from veneer.jobs.http.tinker import Call, TinkerRoutes, tinker_router
from veneer.jobs.tinker.service import TrainingRun
from veneer.serve.http.bodies import Strict

_LIMIT, _OFFSET = Query(20, ge=1, le=1000), Query(0, ge=0)


class PathBody(Strict):
    tinker_path: str


def weights_routes(state: TinkerRoutes) -> APIRouter:
    router, current_call = tinker_router(), Depends(state.call)

    @router.post("/weights_info", summary="Get the settings that a client needs to continue from a checkpoint")
    def info(body: PathBody, call: Call = current_call) -> Any:
        run = call.service.run(call.tenant, call.service.saved(call.tenant, body.tinker_path).run)
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

    @router.delete("/training_runs/{id}/checkpoints/{kind}/{name}", summary="Delete a checkpoint")
    def remove(id: str, kind: str, name: str, call: Call = current_call) -> None:
        call.service.remove(call.tenant, id, f"{kind}/{name}")

    return router


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
