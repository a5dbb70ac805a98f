"""Copy the training files of your fine-tuning jobs from OpenAI to a veneer server.

    export OPENAI_API_KEY=sk-…                            and VENEER_API_KEY, if your server needs a key
    python examples/leave_openai.py --to http://127.0.0.1:8000/v1 --list
    python examples/leave_openai.py --to http://127.0.0.1:8000/v1
    python examples/leave_openai.py --to http://127.0.0.1:8000/v1 --train smollm2-135m

The script saves every training file in a folder (`--folder`), checks that veneer can read it, and uploads it
once. `moved.json` in the folder maps OpenAI's ids to the server's ids, so the script can be interrupted and
run again. With `--train BASE`, the script repeats each job on this base, with its method, epochs, batch size,
beta, suffix, seed and metadata. It reports files that OpenAI no longer has, and skips their jobs. Nothing
changes at OpenAI.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import openai

FROM = "https://api.openai.com/v1"


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return 1 if any job could not be copied, otherwise 0."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asked.add_argument("--to", required=True, help="the server's address, with /v1")
    asked.add_argument("--from", dest="source", default=os.environ.get("OPENAI_BASE_URL", FROM), help="where they are")
    asked.add_argument("--folder", type=Path, default=Path("from-openai"), help="where files are kept here")
    asked.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    asked.add_argument("--train", metavar="BASE", help="make each job again, on this base")
    given = asked.parse_args(arguments)
    there = openai.OpenAI(base_url=given.source)
    here = openai.OpenAI(base_url=given.to, api_key=os.environ.get("VENEER_API_KEY", "none"))
    jobs = [job for job in there.fine_tuning.jobs.list() if job.status == "succeeded"]
    for job in jobs:
        print(f"{job.id}  {job.fine_tuned_model}  {job.training_file}  {job.validation_file or ''}".rstrip())
    if given.list:
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    moved = _Moved(given.folder / "moved.json")
    wrong = 0
    for job in jobs:
        try:
            files = [
                move(there, here, moved, given.folder, id) for id in (job.training_file, job.validation_file) if id
            ]
            if given.train and job.id not in moved.known:
                made = here.fine_tuning.jobs.create(
                    model=given.train,
                    training_file=files[0],
                    validation_file=files[1] if files[1:] else None,
                    seed=job.seed,
                    suffix=suffix_of(job),
                    metadata=job.metadata,
                    method=method_of(job),
                )
                moved.note(job.id, made.id)
                print(f"{job.id} -> {made.id}")
        except (Unreadable, openai.APIStatusError) as error:
            wrong += 1
            print(f"{job.id} was not moved: {error}", file=sys.stderr)
    return 1 if wrong else 0


class Unreadable(Exception):
    """A training file that veneer cannot read."""


def move(there: openai.OpenAI, here: openai.OpenAI, moved: _Moved, folder: Path, id: str) -> str:
    """Copy a file unless it was copied before; return its id on the veneer server."""
    if id in moved.known:
        return moved.known[id]
    name = Path(there.files.retrieve(id).filename).name
    kept = folder / id / (name if name.endswith(".jsonl") else f"{name}.jsonl")
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        part = kept.with_suffix(".part")
        part.write_bytes(there.files.content(id).read())
        part.rename(kept)
    look_through(kept)
    with kept.open("rb") as opened:
        made = here.files.create(file=opened, purpose="fine-tune")
    moved.note(id, made.id)
    print(f"{id} -> {made.id}  {kept}")
    return made.id


def look_through(path: Path) -> None:
    """Check the rows of a file.

    Raises Unreadable, with the invalid lines."""
    try:
        from veneer.errors import DataError
        from veneer.train.text.rows import read_rows
    except ImportError:  # if veneer is not installed here, the server checks the rows
        return
    try:
        read_rows(str(path))
    except DataError as error:
        raise Unreadable(str(error)) from error


def suffix_of(job: Any) -> str | None:
    """Return the job's suffix, which is the fourth part of its model's name, or None."""
    parts = (job.fine_tuned_model or "").split(":")
    return parts[3] if len(parts) > 3 and parts[3] else None


def method_of(job: Any) -> dict[str, Any]:
    """Return the job's method and hyperparameters, in the format of a request for a new job.

    The learning rate multiplier is omitted, because it refers to OpenAI's default rate."""
    kind = job.method.type if job.method is not None else "supervised"
    own = getattr(job.method, kind, None)
    numbers = own.hyperparameters if own is not None else job.hyperparameters
    kept = ("n_epochs", "batch_size", "beta")
    given = {key: value for key, value in (numbers.to_dict() if numbers else {}).items() if key in kept and value}
    return {"type": kind, kind: {"hyperparameters": given}}


class _Moved:
    """Mapping of OpenAI's ids to the server's ids, saved after each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}

    def note(self, theirs: str, ours: str) -> None:
        self.known[theirs] = ours
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.known, indent=2) + "\n")
        part.rename(self.path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except openai.OpenAIError as error:  # no key, a wrong key, or no server at this address
        sys.exit(f"stopped: {error}")
