"""Reproduce an image exactly from the record in its PNG.

    recipe = read_recipe("out.png")              the requests, with hashes of base, adapters and inputs
    with ImagePipeline(base) as pipeline:
        picture = reproduce(pipeline, recipe)    raises if the base, an adapter or an input image differs

The image's whole batch is generated again, because rounding can depend on the batch size. The other images
of the batch are discarded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.adapters import use as using
from veneer.errors import AdapterError, DataError, MismatchError
from veneer.imaging.adapters import ImagePipeline, parse_use
from veneer.imaging.controls import ControlSpec, hashed_picture
from veneer.imaging.generate import RECORDED, ImageRequest, Options, RecordedPicture, generate, library_versions
from veneer.imaging.infotext import read_record


@dataclass(frozen=True)
class PictureRecipe:
    """How an image was generated.

    `requests[index]` is the request for this image. To reproduce the image, the `fingerprint` of the base,
    the `digests` of the adapters (name -> digest) and the `inputs` (path -> sha256) must match."""

    path: str
    base: str
    fingerprint: str
    dtype: str
    requests: tuple[ImageRequest, ...]
    index: int
    options: Options
    digests: dict[str, str]
    inputs: dict[str, str]
    made_by: dict[str, str]


def read_recipe(path: str | Path) -> PictureRecipe:
    """Return how an image was generated.

    Raises DataError if the image has no valid record."""
    record = read_record(path)
    if record is None:
        raise DataError(
            "this picture has no record of how it was made", where=str(path), fix="use a PNG that veneer wrote"
        )
    if "grid" in record:
        raise DataError("this is a sheet of several pictures", where=str(path), fix="give one picture's PNG")
    try:
        return _recipe(str(path), record)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the picture's veneer record is damaged: {error!r}", where=str(path)) from error


def _recipe(path: str, record: dict[str, Any]) -> PictureRecipe:
    if record["version"] != 1:
        raise DataError(f"a record of version {record['version']}", where=path, fix="update veneer")
    references = record.get("references", [])
    inputs = [p for p in (record["image"], record["mask"], *record["controls"], *references) if p is not None]
    if not all(p["path"] for p in inputs):
        raise DataError("it was made from a picture in memory, which was not saved", where=path)
    requests = tuple(
        ImageRequest(
            row["prompt"],
            row["negative"],
            int(row["seed"]),
            tuple((name, parse_use(f"x:{strength}")[1]) for name, strength in row["adapters"]),
        )
        for row in record["rows"]
    )
    index = int(record["index"])
    requests[index]  # raises IndexError for an invalid index
    options = Options(
        batch_size=len(requests),
        image=record["image"] and record["image"]["path"],
        mask=record["mask"] and record["mask"]["path"],
        controls=tuple(
            ControlSpec(c["kind"], c["path"], c["weight"], c["model"], c["begin"], c["end"]) for c in record["controls"]
        ),
        references=[picture["path"] for picture in references],
        **{key: record["settings"][key] for key in RECORDED},
    )
    return PictureRecipe(
        path,
        record["base"]["name"],
        record["base"]["fingerprint"],
        record["base"]["dtype"],
        requests,
        index,
        options,
        digests={name: source["digest"] for name, source in record["adapters"].items()},
        inputs={picture["path"]: picture["sha256"] for picture in inputs},
        made_by=dict(record["made_by"]),
    )


def reproduce(
    pipeline: ImagePipeline,
    recipe: PictureRecipe,
    *,
    changes: Callable[[ImageRequest, Options], tuple[ImageRequest, Options]] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> RecordedPicture:
    """Generate the image again.

    changes: function that changes the request and the options; the image is then generated in a batch of one.

    Raises MismatchError if the base, an adapter or an input image differs from the original, and AdapterError
    if an adapter is found neither by its name nor, in the library, by its digest."""
    base = pipeline.base
    if recipe.fingerprint != base.fingerprint:
        message = f"this picture was made on another base\n  then: {recipe.fingerprint} ({recipe.base})\n"
        message += f"  now:  {base.fingerprint} ({base.name})"
        raise MismatchError(message, where=recipe.path, fix="give the original base with --base")
    for path, sha in recipe.inputs.items():
        if (file_sha := hashed_picture(path)[1]) != sha:
            where = f"sha256 {file_sha[:12]}, then {sha[:12]}"
            raise MismatchError(f"{path} is not the picture that was used originally", where=where)
    names = {name: _attach(pipeline, name, digest) for name, digest in recipe.digests.items()}
    requests = [replace(r, uses=tuple((names[name], s) for name, s in r.uses)) for r in recipe.requests]
    here = library_versions()
    differences = [
        f"{name} {version} (here {here.get(name)})"
        for name, version in recipe.made_by.items()
        if here.get(name) != version
    ]
    if differences:
        pipeline.say(f"note: made with {', '.join(differences)}: the last bits can differ")
    if changes is None:
        return generate(pipeline, requests, recipe.options, on_step=on_step)[recipe.index]
    request, options = changes(requests[recipe.index], recipe.options)
    return generate(pipeline, [request], replace(options, batch_size=1), on_step=on_step)[0]


def _attach(pipeline: ImagePipeline, name: str, digest: str) -> str:
    """Attach the adapter and return the name under which it is attached.

    Looks for `name`, then for the digest in the library. Raises MismatchError if the adapter called `name` has
    another digest, and AdapterError if there is no such adapter."""
    try:
        source = pipeline.add(name)
    except AdapterError as missing:
        try:
            using.adapter_path(digest)
        except AdapterError:
            raise missing from None
        source = pipeline.add(digest)
    if source.digest != digest:
        message = (
            f"adapter {name!r} differs from the adapter used originally\n  then: {digest}\n  now:  {source.digest}"
        )
        fix = "restore the original file, or add it to the library"
        raise MismatchError(message, where=source.path, fix=fix)
    return source.name
