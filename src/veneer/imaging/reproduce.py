"""Reproduce a picture from its metadata.

Exactly from veneer's record, closely from A1111's text.

    wanted = read_recipe("out.png")         the requests, with hashes of base, adapters and inputs
    with Mixer(base) as mixer:
        made = remake(mixer, wanted)        rejects another base, another adapter, another input picture

The whole batch is generated again, because other shapes can round differently; its other pictures are
dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.adapters import use as using
from veneer.errors import AdapterError, DataError, MismatchError
from veneer.formats.strengths import Strength
from veneer.imaging.adapters import AdapterSource, ImagePipeline, parse_use
from veneer.imaging.controls import ControlSpec, hashed_picture
from veneer.imaging.generate import RECORDED, ImageRequest, Options, RecordedPicture, library_versions, make, model_hash
from veneer.imaging.infotext import Infotext, lora_hashes, lora_tags, read_picture, sampler_of

if TYPE_CHECKING:
    from veneer.models.image.base import ImageBase

_KNOWN = {
    "Steps", "Sampler", "Schedule type", "CFG scale", "Distilled CFG Scale", "Seed", "Size", "Model hash",
    "Base fingerprint", "Model", "Denoising strength", "Lora hashes", "Version",
}  # fmt: skip


@dataclass
class PictureRecipe:
    """How a picture was generated, from its PNG.

    `fingerprint` of the base, `digests` (adapter -> veneer's digest), `files` (adapter -> its file's hash, or
    a prefix) and `inputs` (path -> sha256) must match. `model`: the infotext's fields that identify the base,
    for the comparison. `exact`: read from veneer's record. `asks[index]`: the request of this picture."""

    path: str
    base: str
    asks: list[ImageRequest]
    index: int
    options: Options
    exact: bool
    fingerprint: str = ""
    model: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    dtype: str = "auto"
    notes: list[str] = field(default_factory=list)
    text: Infotext | None = None


def read_recipe(path: str | Path) -> PictureRecipe:
    """Read how a picture was generated from its metadata.

    Raises DataError for a picture without metadata, or with damaged metadata."""
    text, record = read_picture(path)
    if record is not None and "grid" in record:
        raise DataError("this is a sheet of several pictures", where=str(path), fix="give one picture's PNG")
    if record is not None:
        try:
            return _of_record(str(path), record)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the picture's veneer record is damaged: {error!r}", where=str(path)) from error
    if text is None:
        raise DataError(
            "the picture does not say how it was made", where=str(path), fix="one that veneer or A1111 wrote"
        )
    return _of_text(str(path), text)


def _of_record(path: str, record: dict[str, Any]) -> PictureRecipe:
    if record["version"] != 1:
        raise DataError(f"a record of version {record['version']}", where=path, fix="a newer veneer reads it")
    settings = record["settings"]
    asks = [
        ImageRequest(
            r["prompt"], r["negative"], int(r["seed"]), tuple(_use(name, text) for name, text in r["adapters"])
        )
        for r in record["rows"]
    ]
    references = record.get("references", [])
    pictures = [record["image"], record["mask"], *record["controls"], *references]
    if any(p is not None and not p["path"] for p in pictures):
        raise DataError("it was made from a picture in memory, which was not saved", where=path)
    controls = tuple(
        ControlSpec(c["kind"], c["path"], c["weight"], c["model"], c["begin"], c["end"]) for c in record["controls"]
    )
    options = Options(
        batch_size=len(asks),
        image=record["image"] and record["image"]["path"],
        mask=record["mask"] and record["mask"]["path"],
        controls=controls,
        references=[said["path"] for said in references],
        **{key: settings[key] for key in RECORDED},
    )
    asks[record["index"]]  # raises for an invalid index
    return PictureRecipe(
        path,
        record["base"]["name"],
        asks,
        int(record["index"]),
        options,
        True,
        fingerprint=record["base"]["fingerprint"],
        digests={name: said["digest"] for name, said in record["adapters"].items()},
        inputs={p["path"]: p["sha256"] for p in pictures if p is not None},
        dtype=record["base"]["dtype"],
        notes=_other_versions(record["made_by"]),
    )


def _use(name: str, text: str) -> tuple[str, Strength]:
    return name, parse_use(f"x:{text}")[1]


def _other_versions(made_by: dict[str, str]) -> list[str]:
    here = library_versions()
    other = [f"{name} {had} (here {here.get(name)})" for name, had in made_by.items() if here.get(name) != had]
    return [f"made with {', '.join(other)}: the last bits may differ"] if other else []


def _of_text(path: str, text: Infotext) -> PictureRecipe:
    """Read A1111's or Forge's text, for any base."""
    fields = text.fields
    prompt, tags = lora_tags(text.prompt)
    known = lora_hashes(fields)
    uses = tuple(
        (name, Strength(unet, blocks=(("text", te / unet),) if te != unet else ())) for name, te, unet in tags if unet
    )
    notes = ["A1111's noise and samplers are its own: the same words, another picture"]
    left = sorted(set(fields) - _KNOWN)
    if left:
        notes.append("not taken over: " + ", ".join(f"{name}: {fields[name]}" for name in left))
    if re.search(r"\([^()]+:[\d.]+\)", prompt + text.negative):
        notes.append("emphasis as in (word:1.2) is read as plain text")
    if dropped := [name for name, te, unet in tags if te and not unet]:
        raise DataError(f"{dropped[0]!r} acts on the text encoder alone", where=path, fix="use the picture's own words")
    if unhashed := [name for name, _, _ in tags if name not in known]:
        notes.append(f"no hash was kept of {', '.join(unhashed)}: whatever has that name is used")
    if "Denoising strength" in fields:
        notes.append("it was made from another picture, which its text does not hold: give it with --image")
    distilled = "Distilled CFG Scale" in fields
    width, height = text.size or (None, None)
    try:
        options = Options(
            width=width,
            height=height,
            steps=int(fields["Steps"]) if "Steps" in fields else None,
            guidance=_number(fields.get("Distilled CFG Scale" if distilled else "CFG scale")),
            true_guidance=(_number(fields.get("CFG scale")) or 1.0) if distilled else 1.0,
            scheduler=sampler_of(fields, flow=distilled),
            batch_size=1,
        )
        seed = int(fields.get("Seed", 0))
    except ValueError as error:
        raise DataError(f"its infotext has an invalid number: {error}", where=path) from error
    if "Sampler" in fields and options.scheduler is None:
        notes.append(f"sampler {fields['Sampler']!r} is not known here: the base's own is used")
    ask = ImageRequest(prompt, text.negative, seed, uses)
    return PictureRecipe(
        path,
        "",
        [ask],
        0,
        options,
        False,
        model={key: fields[key] for key in ("Model hash", "Base fingerprint") if key in fields},
        files=known,
        notes=notes,
        text=text,
    )


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def remake(
    mixer: ImagePipeline,
    wanted: PictureRecipe,
    *,
    changes: Callable[[ImageRequest, Options], tuple[ImageRequest, Options]] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> RecordedPicture:
    """Generate the picture again.

    `changes`: changes the request and the options; the picture is then generated in a batch of one. Raises
    MismatchError if the base, an adapter or an input picture differs from the original; AdapterError if an
    adapter is found neither by name nor, in the library, by digest."""
    _same_base(mixer.base, wanted)
    for path, sha in wanted.inputs.items():
        if (found := hashed_picture(path)[1]) != sha:
            where = f"sha256 {found[:12]}, then {sha[:12]}"
            raise MismatchError(f"{path} is not the picture that was used then", where=where)
    renamed = {name: _same_adapter(mixer, name, wanted) for ask in wanted.asks for name, _ in ask.uses}
    asks = [replace(ask, uses=tuple((renamed[name], s) for name, s in ask.uses)) for ask in wanted.asks]
    for note in wanted.notes:
        mixer.say(f"note: {note}")
    if changes is None:
        return make(mixer, asks, wanted.options, on_step=on_step)[wanted.index]
    ask, options = changes(asks[wanted.index], wanted.options)
    return make(mixer, [ask], replace(options, batch_size=1), on_step=on_step)[0]


def _same_base(base: ImageBase, wanted: PictureRecipe) -> None:
    if wanted.model and model_hash(base) not in wanted.model.items():
        said = " and ".join(f"the {key[0].lower()}{key[1:]} {value}" for key, value in wanted.model.items())
        wanted.notes.append(f"its model had {said}, which {base.name} does not show")
    theirs, ours = wanted.fingerprint, base.fingerprint
    if theirs and theirs != ours:
        raise MismatchError(
            f"it was made on another base\n  then: {theirs} ({wanted.base})\n  now:  {ours} ({base.name})",
            where=wanted.path,
            fix="give its own with --base",
        )


def _same_adapter(mixer: ImagePipeline, name: str, wanted: PictureRecipe) -> str:
    """Return the name under which the same adapter is attached."""
    digest = wanted.digests.get(name, "")
    if not wanted.exact and not Path(name).exists() and (file := Path(f"{name}.safetensors")).exists():
        wanted.files[str(file)] = wanted.files.get(name, "")
        name = str(file)  # A1111 names a file without its extension
    try:
        source = mixer.add(name)
    except AdapterError as missing:
        if not digest:
            raise
        try:
            using.adapter_path(digest)
        except AdapterError:
            raise missing from None
        return mixer.add(digest).name
    stated = wanted.files.get(name, "").lower()
    if (digest and source.digest != digest) or (stated and not _has_hash(source, stated)):
        raise MismatchError(
            f"adapter {name!r} is not the one that was used then\n  then: {digest or stated}\n"
            f"  now:  {source.digest if digest else f'{source.autov3} (sha256 {source.sha256[:12]})'}",
            where=source.path,
            fix="put the one of then in its place, or add it to the library, where it is found by its digest",
        )
    return name


def _has_hash(source: AdapterSource, stated: str) -> bool:
    return any(
        own and (own.startswith(stated) or stated.startswith(own))
        for own in (source.short, source.autov3, source.sha256)
    )
