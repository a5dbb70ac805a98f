"""Folders of pictures to training pictures: what lies there and belongs together, every file decoded once, its caption
with the trigger, its mask, its weight, what is wrong.

    pictures, about = read_pictures(settings)                    training pictures and class pictures
    pictures, about = read_pictures(settings, "validation")      those of `settings.validation`

A caption comes from, first that is there: a `.txt` or `.caption` file beside the picture, a row of metadata.jsonl (or
.csv, .parquet; Hugging Face's imagefolder), the words of a kohya folder `N_words` (each picture N times an epoch), the
configured prompt. What belongs to nothing is an error that names the nearest picture.

For editing a picture has others before it: `NAME.before.png` beside it, a file of its name in a `before` folder or in
each of the configured ones, or the `before` of its row of metadata, whose columns may then be before, instruction and
after. Either every picture has as many of them, or none has any. A control picture has its picture's proportion.

A picture's `key` is a hash of its bytes, its mask's bytes and its caption, and of those before it: where the file
stands does not matter.
Reads everything once, so that what cannot be used is known before step one. Knows neither buckets nor tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Literal

from veneer.errors import DataError, bullets, nearest
from veneer.train.config.image import ImageDataSection
from veneer.train.image.before_kinds import unlike_kind
from veneer.train.image.decode import SUFFIXES, UnreadablePicture, decode_picture, mask_of, read_bytes
from veneer.train.image.near_duplicates import PerceptualHash, perceptual_hash
from veneer.train.records import read_data_files

_PLACEHOLDER = "[trigger]"
_SAME_SHAPE = 0.01  # how far a mask's aspect ratio may be from its picture's
CAPTION_SUFFIXES = (".txt", ".caption")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "prompt", "instruction")
FILE_COLUMNS = ("file_name", "after")
"""Columns of metadata; the first of each that is there counts."""
_BEFORE = "before"
# pictures that no allowed decoder reads: named as broken, not passed over
_UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ico", ".exr", ".cr2", ".nef", ".arw", ".dng")
_OWN = ("caption files", "metadata")
_NOT_CAPTIONS = ("readme", "license", "licence", "notice", "attribution", "copying", "classes")
_KOHYA = re.compile(r"(\d+)_(.+)")
_MOST_REPEATS = 1000


@dataclass(frozen=True)
class TrainingPicture:
    """A picture as it is learned.

    `name`: its path in its folder. `caption`: with the trigger. `size`: (width, height) in pixels, upright.
    `digest`: sha256 of the file. `mask`: a mask file; `alpha`: its own transparency is the mask. `transparent`: some of
    it shows the background. `repeats`: times an epoch. `weight`: of its loss. `is_class`: one of the class pictures.
    `notes`: what decoding converted. `before`: the pictures that an edit starts from, without captions."""

    path: Path
    name: str
    caption: str
    size: tuple[int, int]
    digest: str
    perceptual_hash: PerceptualHash
    mask: Path | None = None
    mask_digest: str = ""
    alpha: bool = False
    transparent: bool = False
    repeats: int = 1
    weight: float = 1.0
    is_class: bool = False
    notes: tuple[str, ...] = ()
    before: tuple[TrainingPicture, ...] = ()

    @cached_property
    def key(self) -> str:
        """sha256 of all content that is learned from."""
        parts = [self.digest, self.caption, self.mask_digest, self.alpha, self.weight, self.is_class]
        parts += [picture.digest for picture in self.before]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class AboutPictures:
    """What was read. `captions`: source -> pictures. `trigger`: added, replaced, already there -> pictures.
    `broken`: `name: reason` of files left out. `notes`: what decoding converted -> pictures. `repeats`: kohya folder ->
    times. `ignored`: ending -> files of no kind that is read. `unused`: metadata columns that nothing uses.
    `several_lines`: caption files whose lines were joined. `shared`: caption files that belong to several pictures.
    `class_triggers`: class pictures whose caption holds the trigger. `before`: pictures before each; `resized_before`:
    those of another size than theirs; `own_shape`: those of another proportion, `name: sizes`."""

    pictures: int = 0
    class_pictures: int = 0
    captions: Counter[str] = field(default_factory=Counter)
    trigger: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    broken: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    masks: int = 0
    resized_masks: int = 0
    alpha_masks: int = 0
    repeats: dict[str, int] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)
    several_lines: int = 0
    shared: int = 0
    class_triggers: list[str] = field(default_factory=list)
    before: int = 0
    resized_before: int = 0
    own_shape: list[str] = field(default_factory=list)


def read_pictures(
    settings: ImageDataSection,
    which: Literal["train", "validation"] = "train",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[TrainingPicture], AboutPictures]:
    """The pictures of the settings' folders, sorted by name within each; with "train" the class pictures follow.

    `progress` is called with (files read, files in all): a photograph of 12 megapixels takes about a fifth of a second.

    Raises DataError for a folder that is missing or holds no picture; a caption, mask or metadata row without a
    picture; pictures without a caption (when there is no trigger to stand alone); a mask of another shape; pairs that
    lack one of the two, have two proportions, or do not begin with a picture of `settings.before_kind`; and files that
    cannot be read unless `settings.broken` is `drop`. Each lists all it found, up to 20."""
    folders = settings.folders if which == "train" else (settings.validation,) if settings.validation else ()
    about = AboutPictures()
    pictures: list[TrainingPicture] = []
    elsewhere = settings.model_copy(update={"before": "off" if settings.before == "off" else "auto"})
    own = settings if which == "train" else elsewhere
    found = [(f, _list_folder(f, own, about, settings.prompt, settings.masks), False) for f in folders]
    if which == "train" and settings.class_folder is not None:
        masks = "auto" if settings.masks not in ("off", "alpha") else settings.masks
        classes = _list_folder(settings.class_folder, elsewhere, about, settings.class_prompt, masks)
        found.append((settings.class_folder, classes, True))
    about.before = _each_before({folder: files for folder, files, _ in found})
    total, done = sum(len(files) for _, files, _ in found), count(1)

    def tick() -> None:
        n = next(done)
        if progress is not None:
            progress(n, total)

    for folder, files, is_class in found:
        read = _read(files, folder, settings, about, tick, is_class=is_class)
        pictures += read
        about.class_pictures += len(read) if is_class else 0
        about.pictures += 0 if is_class else len(read)
    if folders and not about.pictures:
        raise DataError("no picture is left to train on", where=", ".join(folders), fix=bullets(about.broken))
    return pictures, about


def count_pictures(settings: ImageDataSection) -> tuple[int, int]:
    """(pictures in the settings' folders, how many are before each), by their names alone. Raises DataError as
    `read_pictures` does of what lies in a folder."""
    about = AboutPictures()
    files = {f: _list_folder(f, settings, about, settings.prompt, settings.masks) for f in settings.folders}
    return sum(map(len, files.values())), _each_before(files)


@dataclass(frozen=True)
class OwnCaption:
    """A picture of a folder, its name there, and the caption of its own: None without one."""

    path: Path
    name: str
    caption: str | None


def own_captions(folder: str) -> list[OwnCaption]:
    """The pictures of a folder, sorted by name, with what caption files and metadata say of each. Raises DataError for
    a folder that `read_pictures` would refuse before it opens a picture."""
    found = _list_folder(folder, ImageDataSection(pictures=folder, masks="off"), AboutPictures(), None, "off")
    return [OwnCaption(f.path, f.name, f.caption if f.source in _OWN else None) for f in found]


def pictures_digest(pictures: Iterable[TrainingPicture]) -> str:
    """sha256 over the pictures' keys and repeats, in order; the same wherever the folder is."""
    h = hashlib.sha256()
    for picture in pictures:
        h.update(f"{picture.key}|{picture.repeats}\n".encode())
    return "sha256:" + h.hexdigest()


def with_trigger(caption: str, trigger: str | None) -> tuple[str, str]:
    """(caption with the trigger, what was done: "replaced", "already there", "added" or "" without a trigger).

    `[trigger]` is replaced wherever it stands; a caption that lacks the word gets it in front, as a tag of its own.
    ValueError for a placeholder with nothing to put there."""
    if trigger is None:
        if _PLACEHOLDER in caption:
            raise ValueError(f"holds {_PLACEHOLDER}, and data.trigger is not set")
        return caption, ""
    if _PLACEHOLDER in caption:
        return caption.replace(_PLACEHOLDER, trigger), "replaced"
    if _has_word(caption, trigger):
        return caption, "already there"
    return f"{trigger}, {caption}" if caption else trigger, "added"


def _has_word(caption: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


def _read(
    files: Sequence[_PictureFile],
    folder: str,
    settings: ImageDataSection,
    about: AboutPictures,
    tick: Callable[[], None],
    *,
    is_class: bool,
) -> list[TrainingPicture]:
    trigger = None if is_class else settings.trigger
    captions = _captions(files, folder, trigger, is_class=is_class)
    if is_class and settings.trigger:
        about.class_triggers += [
            f.name for f, (c, _) in zip(files, captions, strict=True) if _has_word(c, settings.trigger)
        ]
    pictures, broken, wrong_masks = [], [], []
    unlike: list[str] = []  # pairs of two proportions
    others: list[str] = []  # before pictures of another kind
    for found, (caption, did) in zip(files, captions, strict=True):
        tick()
        try:
            picture = _open(found, caption, settings, is_class=is_class)
            before = tuple(_open_before(path, picture, settings, others) for path in found.before)
        except UnreadablePicture as error:
            broken.append(f"{found.name}: {error}")
            continue
        picture = replace(picture, before=before)
        odd = [f"{b.name}: {why}" for b in before if (why := _other_shape(b.size, picture))]
        unlike += odd if settings.before_kind != "picture" else []
        about.own_shape += odd
        about.resized_before += sum(b.size != picture.size for b in before)
        try:
            about.resized_masks += picture.mask is not None and _mask_differs(picture, settings)
        except UnreadablePicture as error:
            wrong_masks.append(f"{picture.mask}: {error}")
        about.notes.update(picture.notes)
        about.captions[found.source] += 1
        about.trigger.update([did] if did else [])
        about.masks += picture.mask is not None
        about.alpha_masks += picture.alpha
        about.empty += not caption
        pictures.append(picture)
    if wrong_masks:
        raise DataError(
            f"{len(wrong_masks)} mask(s) cannot be used:\n{bullets(wrong_masks)}",
            where=folder,
            fix="draw them at their picture's size, white where it is learned, or set data.masks: off",
        )
    if unlike:
        raise DataError(
            f"{len(unlike)} pair(s) are of unlike sizes:\n{bullets(unlike)}",
            where=folder,
            fix=f"crop both to one proportion: {settings.before_kind} pictures lie where their picture does",
        )
    if others:
        raise DataError(
            f"{len(others)} picture(s) are not what data.before_kind: {settings.before_kind} says:\n{bullets(others)}",
            where=folder,
            fix="replace them, or set data.before_kind: picture, which takes any",
        )
    if broken and settings.broken == "refuse":
        raise DataError(
            f"{len(broken)} of {len(files)} pictures cannot be used:\n{bullets(broken)}",
            where=folder,
            fix="repair or remove them, or leave them out with data.broken=drop",
        )
    about.broken += broken
    return pictures


def _captions(
    found: Sequence[_PictureFile], folder: str, trigger: str | None, *, is_class: bool
) -> list[tuple[str, str]]:
    """Every picture's caption with the trigger, and what was done for that; DataError for those that have none, or a
    placeholder for nothing."""
    captions, bad = [], []
    missing = [f.name for f in found if f.caption is None] if trigger is None else []
    for f in found:
        try:
            captions.append(with_trigger(f.caption or "", trigger))
        except ValueError as error:
            bad.append(f"{f.name}: {error}" if not is_class else f"{f.name}: holds {_PLACEHOLDER}: the class has none")
    if missing:
        key = "class_prompt" if is_class else "prompt"
        raise DataError(
            f"{len(missing)} of {len(found)} pictures have no caption:\n{bullets(missing)}",
            where=folder,
            fix=f"write NAME.txt beside each, or a metadata.jsonl, or set data.{key} for all that have none; "
            f"a vision-language model writes them: veneer data caption {shlex.quote(folder)} --model MODEL",
        )
    if bad:
        raise DataError(f"{len(bad)} caption(s) cannot be used:\n{bullets(bad)}", where=folder, fix="correct them")
    return captions


def _open(found: _PictureFile, caption: str, settings: ImageDataSection, *, is_class: bool) -> TrainingPicture:
    data, digest = read_bytes(found.path)
    opened = decode_picture(data, settings)
    mask, mask_digest = found.mask, ""
    if mask is not None:
        try:
            mask_digest = read_bytes(mask)[1]
        except UnreadablePicture:
            mask_digest = "unreadable"  # told by _mask_differs, with the mask's own name
    return TrainingPicture(
        found.path,
        found.name,
        caption,
        opened.size,
        digest,
        perceptual_hash(opened.colour),
        mask,
        mask_digest,
        alpha=settings.masks == "alpha" and opened.alpha is not None,
        transparent=opened.alpha is not None,
        repeats=found.repeats,
        weight=settings.class_weight if is_class else 1.0,
        is_class=is_class,
        notes=opened.notes,
    )


def _mask_differs(picture: TrainingPicture, settings: ImageDataSection) -> bool:
    """Whether the mask has another size than its picture; UnreadablePicture when it has another shape."""
    assert picture.mask is not None
    size = mask_of(read_bytes(picture.mask)[0], settings).size
    if why := _other_shape(size, picture):
        raise UnreadablePicture(why)
    return size != picture.size


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (width, height) have one proportion, within a hundredth."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= _SAME_SHAPE * size[0] * other[1]


def _other_shape(size: tuple[int, int], picture: TrainingPicture) -> str:
    """What is said of a file of `size` that has another proportion than its picture; else nothing."""
    (width, height), (w, h) = picture.size, size
    return "" if same_shape(size, picture.size) else f"{w} x {h} pixels, but {picture.name} has {width} x {height}"


def _open_before(path: Path, after: TrainingPicture, settings: ImageDataSection, others: list[str]) -> TrainingPicture:
    """A picture that an edit starts from; what is not of the settings' kind goes into `others`."""
    name = os.path.relpath(path, after.path.parents[len(Path(after.name).parts) - 1])
    try:
        data, digest = read_bytes(path)
        opened = decode_picture(data, settings)
    except UnreadablePicture as error:
        raise UnreadablePicture(f"what is before it, {name}, {error}") from None
    if why := unlike_kind(opened.colour, settings.before_kind):
        others.append(f"{name}: {why}")
    transparent = opened.alpha is not None
    return TrainingPicture(
        path, name, "", opened.size, digest, perceptual_hash(opened.colour), transparent=transparent, notes=opened.notes
    )


# --- what lies in a folder --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PictureFile:
    """A picture file and what belongs to it. `source`: where its caption is from; `caption`: None without one.
    `before`: the pictures that an edit starts from."""

    path: Path
    name: str
    caption: str | None
    source: str
    mask: Path | None
    repeats: int
    before: tuple[Path, ...] = ()


def _list_folder(
    folder: str, settings: ImageDataSection, about: AboutPictures, prompt: str | None, masks: str
) -> list[_PictureFile]:
    """The pictures in `folder` and below it, sorted by name; what else there is goes into `about`. `prompt`, `masks` as
    the settings of those names. Raises DataError."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        _missing(root)
    pictures, captions, beside, starts, ignored = _walk(root, settings)
    about.ignored += ignored
    rows, named = _metadata(root, pictures, settings, about)
    shown = {path for paths in named.values() for path in paths}
    pictures = [p for p in pictures if p not in shown or p in rows]
    if not pictures:
        others = ", ".join(f"{n} {suffix}" for suffix, n in sorted(ignored.items())) or "nothing"
        raise DataError(
            "there is no picture in this folder",
            where=str(root),
            fix=f"pictures end in {', '.join(SUFFIXES)}; the folder holds {others}",
        )
    captioned = _caption_files(root, pictures, captions, about)
    covers = _mask_files(root, pictures, beside, masks)
    before = _before_files(root, pictures, starts, named, settings)
    out = []
    for path in pictures:
        name = path.relative_to(root).as_posix()
        repeats, words = _kohya(path, root, about)
        sources = {
            "caption files": captioned.get(path), "metadata": rows.get(path), "folder names": words,
            "the prompt": prompt,
        }  # fmt: skip
        source = next((source for source, caption in sources.items() if caption is not None), "nothing")
        own = tuple(before.get(path, ()))
        out.append(_PictureFile(path, name, sources.get(source), source, covers.get(path), repeats, own))
    return out


def _each_before(folders: Mapping[str, Sequence[_PictureFile]]) -> int:
    """How many pictures are before each. DataError where some have fewer than others."""
    files = [file for own in folders.values() for file in own]
    most = max((len(file.before) for file in files), default=0)
    fewer = [f"{f.name}: {len(f.before) or 'nothing'}" if most > 1 else f.name for f in files if len(f.before) < most]
    if fewer:
        short = [folder for folder, own in folders.items() if any(len(file.before) < most for file in own)]
        what = "no picture before them" if most == 1 else f"fewer than {most} pictures before them"
        raise DataError(
            f"{len(fewer)} of {len(files)} pictures have {what}:\n{bullets(fewer)}",
            where=", ".join(short),
            fix="give each its own (NAME.before.png beside it, or its name in the before folder), remove those that "
            "have none, or set data.before: off to learn from captions alone",
        )
    return most


def _missing(root: Path) -> None:
    if root.is_file():
        raise DataError(
            "this is a file, and a folder of pictures is needed", where=str(root), fix=f"give its folder, {root.parent}"
        )
    beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    near = nearest(root.name, beside, 1)
    raise DataError(
        "the folder of pictures does not exist" + ("" if root.parent.is_dir() else f" (nor does {root.parent})"),
        where=str(root),
        fix=f"did you mean {root.parent / near[0]}?" if near else "give a folder that holds pictures",
    )


def _walk(
    root: Path, settings: ImageDataSection
) -> tuple[list[Path], list[Path], list[Path], list[Path], Counter[str]]:
    """(pictures, caption files, masks beside them, what is before them, ending -> files of no kind that is read).
    Hidden files are passed over."""
    pictures, captions, masks, before, ignored = [], [], [], [], Counter[str]()
    apart = [settings.class_folder, settings.validation, settings.cache, str(root / "masks")]
    apart += [] if settings.masks in ("auto", "off", "alpha") else [settings.masks]
    apart += settings.before_folders or [str(root / _BEFORE)]
    others = {Path(folder).expanduser().resolve() for folder in apart if folder} - {root.resolve()}
    for place, folders, files in os.walk(root):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")) and (here / f).resolve() not in others)
        ignored["link to a folder"] += sum((here / f).is_symlink() for f in folders)
        for name in sorted(files):
            path = here / name
            suffix = path.suffix.lower()
            if name.startswith(".") or name in _METADATA or name.lower() == "thumbs.db":
                continue
            if suffix in SUFFIXES and Path(path.stem).suffix.lower() == ".mask":
                masks.append(path)
            elif suffix in SUFFIXES and Path(path.stem).suffix.lower() == f".{_BEFORE}":
                before.append(path)
                ignored["before pictures"] += settings.before != "auto"
            elif suffix in SUFFIXES or suffix in _UNREAD:
                pictures.append(path)
            elif suffix in CAPTION_SUFFIXES and path.stem.lower() not in _NOT_CAPTIONS:
                captions.append(path)
            else:
                ignored[suffix or name] += 1
    return pictures, captions, masks, before, +ignored


def _by_name(pictures: Iterable[Path]) -> dict[Path, list[Path]]:
    """Path without its ending, and with it -> the pictures that go by it."""
    names: dict[Path, list[Path]] = {}
    for path in pictures:
        names.setdefault(path.with_suffix(""), []).append(path)
        names.setdefault(path, []).append(path)
    return names


def _caption_files(root: Path, pictures: list[Path], captions: list[Path], about: AboutPictures) -> dict[Path, str]:
    """picture -> caption. All lines of a file are one caption, white space drawn together."""
    names = _by_name(pictures)
    captioned: dict[Path, tuple[str, Path]] = {}
    bad: list[str] = []
    for file in captions:
        owners = names.get(file.with_suffix(""))
        if not owners:
            bad.append(f"{file.relative_to(root)}: no picture of this name{_nearest(file, pictures, root)}")
            continue
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error.strerror)
            bad.append(f"{file.relative_to(root)}: {why}")
            continue
        about.several_lines += sum(bool(line.strip()) for line in text.splitlines()) > 1
        about.shared += len(owners) > 1
        for owner in owners:
            text = " ".join(text.split())
            if owner in captioned and captioned[owner][0] != text:
                other = captioned[owner][1].name
                bad.append(f"{file.relative_to(root)}: {owner.name} has another caption in {other}")
            captioned[owner] = (text, file)
    if bad:
        raise DataError(
            f"{len(bad)} caption file(s) cannot be used:\n{bullets(bad)}",
            where=str(root),
            fix="name a caption as its picture (cat.txt beside cat.png), or move it elsewhere",
        )
    return {path: text for path, (text, _) in captioned.items()}


def _nearest(file: Path, pictures: Iterable[Path], root: Path) -> str:
    """The nearest picture by name, in the same folder before others."""
    beside = {p.name: p for p in pictures if p.parent == file.parent}
    stem = Path(file.stem).stem if Path(file.stem).suffix.lower() in (".mask", f".{_BEFORE}") else file.stem
    near = nearest(stem, {Path(n).stem for n in beside}, 1)
    if near:
        name = next(n for n in sorted(beside) if Path(n).stem == near[0])
        return f"; the nearest is {name}"
    elsewhere = {p.stem: p for p in pictures}
    near = nearest(stem, elsewhere, 1)
    return f"; the nearest is {elsewhere[near[0]].relative_to(root)}" if near else ""


def _metadata(
    root: Path, pictures: list[Path], settings: ImageDataSection, about: AboutPictures
) -> tuple[dict[Path, str], dict[Path, list[Path]]]:
    """(picture -> caption, picture -> those before it), of every metadata file in the tree; `file_name` (or `after`)
    and `before` are relative to the file's own folder."""
    known = set(pictures)
    rows: dict[Path, str] = {}
    before: dict[Path, list[Path]] = {}
    bad: list[str] = []
    for folder in sorted({root, *(p.parent for p in pictures)}):
        for file in (folder / name for name in _METADATA):
            if not file.is_file():
                continue
            records, _ = read_data_files([str(file)])
            columns = list(dict.fromkeys(c for record in records for c in record.values))
            column = settings.caption_column or next((c for c in CAPTION_COLUMNS if c in columns), None)
            which = next((c for c in FILE_COLUMNS if c in columns), None)
            if column not in columns or which is None:
                missing = " or ".join(FILE_COLUMNS) if which is None else column or " or ".join(CAPTION_COLUMNS)
                raise DataError(
                    f"the metadata has no column {missing}; the columns are {', '.join(columns)}",
                    where=str(file),
                    fix="name the picture's so" if which is None else "name the caption's with data.caption_column",
                )
            used = (column, which, _BEFORE) if settings.before == "auto" else (column, which)
            about.unused += [c for c in columns if c not in used and c not in about.unused]
            for record in records:
                name, caption = record.values.get(which), record.values.get(column)
                problem = _row_problem(name, caption, column, folder, known, rows, root, which)
                given = record.values.get(_BEFORE)
                starts = given if isinstance(given, list) else [] if given is None else [given]
                problem = problem or next((p for s in starts if (p := _start_problem(s, folder, root))), "")
                if problem:
                    bad.append(f"{record.where}: {problem}")
                    continue
                rows[folder / str(name)] = " ".join(str(caption).split())
                if starts:
                    before[folder / str(name)] = [folder / start for start in starts]
    if bad:
        raise DataError(f"{len(bad)} metadata row(s) cannot be used:\n{bullets(bad)}", where=str(root))
    return rows, before


def _start_problem(name: object, folder: Path, root: Path) -> str:
    """What is wrong with a `before` of a row."""
    if not isinstance(name, str) or not name:
        return f"`{_BEFORE}` should be a picture's path, found {type(name).__name__}"
    path = folder / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"`{_BEFORE}`: `{name}` leaves the folder"
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        beside = [p for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES] if path.parent.is_dir() else []
        return f"`{_BEFORE}`: there is no picture `{name}`" + _nearest(path, beside, root)
    return ""


def _row_problem(
    name: object, caption: object, column: str, folder: Path, known: set[Path], rows: Mapping[Path, str], root: Path,
    which: str,
) -> str:  # fmt: skip
    if not isinstance(name, str) or not name:
        return f"no {which}"
    if not isinstance(caption, str):
        return f"`{column}` should be text, found {type(caption).__name__}"
    path = folder / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"{which} `{name}` leaves the folder"
    if path not in known:
        return f"there is no picture `{name}`" + _nearest(path, known, root)
    return f"`{name}` has a row already" if path in rows else ""


def _mask_files(root: Path, pictures: list[Path], beside: list[Path], masks: str) -> dict[Path, Path]:
    """picture -> mask file. NAME.mask.png stands beside its picture; a mask folder mirrors the pictures' paths, or
    holds their names alone."""
    if masks in ("off", "alpha"):
        return {}
    names = _by_name(pictures)
    covers: dict[Path, Path] = {}
    bad: list[str] = []
    for mask in beside:
        owners = names.get(mask.with_suffix("").with_suffix(""))
        if not owners:
            bad.append(f"{mask.relative_to(root)}: no picture of this name{_nearest(mask, pictures, root)}")
        for owner in owners or ():
            covers[owner] = mask
    folder = root / "masks" if masks == "auto" else Path(masks).expanduser()
    if masks != "auto" and not folder.is_dir():
        raise DataError("the folder of masks does not exist", where=str(folder), fix="correct data.masks")
    by_stem: dict[str, list[Path]] = {}
    for path in pictures:
        by_stem.setdefault(path.stem, []).append(path)
    for mask in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if mask.suffix.lower() not in SUFFIXES or mask.name.startswith("."):
            continue
        relative = mask.relative_to(folder)
        stem = mask.stem.removesuffix(".mask")
        owners = names.get(root / relative.with_name(stem)) or (
            by_stem.get(stem, []) if len(relative.parts) == 1 else []
        )
        if not owners:
            bad.append(f"{mask}: no picture of this name{_nearest(root / relative.with_name(stem), pictures, root)}")
        elif len({o.parent for o in owners}) > 1:
            bad.append(
                f"{mask}: pictures of this name are in {len(owners)} folders; repeat the folders among the masks"
            )
        else:
            for owner in owners:
                covers.setdefault(owner, mask)
    if bad:
        raise DataError(
            f"{len(bad)} mask(s) cannot be used:\n{bullets(bad)}",
            where=str(root),
            fix="name a mask as its picture (cat.mask.png or masks/cat.png for cat.png), or set data.masks: off",
        )
    return covers


def _before_files(
    root: Path, pictures: list[Path], beside: list[Path], named: Mapping[Path, list[Path]], settings: ImageDataSection
) -> dict[Path, list[Path]]:
    """picture -> those before it, one of each source: its row of metadata, NAME.before.png beside it, and a file of its
    name in each folder, which mirrors the pictures' paths. All that lies there has to belong to a picture."""
    if settings.before == "off":
        return {}
    auto = settings.before == "auto"
    found = {path: list(paths) for path, paths in named.items() if auto}
    folders = [root / _BEFORE] if auto else [Path(folder).expanduser() for folder in settings.before_folders]
    names = _by_name(pictures)
    bad: list[str] = []
    for file in beside if auto else ():
        owners = names.get(file.with_suffix("").with_suffix("")) or []
        if not owners:
            bad.append(f"{file.relative_to(root)}: no picture of this name{_nearest(file, pictures, root)}")
        for owner in owners:
            found.setdefault(owner, []).append(file)
    used = {path for paths in named.values() for path in paths}
    for folder in folders:
        if not auto and not folder.is_dir():
            raise DataError(
                "the folder of before pictures does not exist", where=str(folder), fix="correct data.before"
            )
        for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if file.suffix.lower() not in SUFFIXES or file.name.startswith(".") or file in used:
                continue
            mirrored = root / file.relative_to(folder)
            owners = names.get(mirrored.with_suffix("")) or []
            if not owners:
                where = file.relative_to(root) if file.is_relative_to(root) else file
                bad.append(f"{where}: no picture of this name{_nearest(mirrored, pictures, root)}")
            for owner in owners:
                found.setdefault(owner, []).append(file)
    if bad:
        raise DataError(
            f"{len(bad)} before picture(s) have no picture after them:\n{bullets(bad)}",
            where=str(root),
            fix="name both alike (before/cat.png or cat.before.png for cat.png), or set data.before: off",
        )
    return found


def _kohya(path: Path, root: Path, about: AboutPictures) -> tuple[int, str | None]:
    """(repeats, words) of the nearest folder named `N_words`, the root included."""
    for folder in path.parents:
        match = _KOHYA.fullmatch(folder.name)
        if match:
            repeats = int(match[1])
            if not 0 < repeats < _MOST_REPEATS:
                raise DataError(
                    f"a folder named N_words repeats each picture N times (as kohya's), here {repeats:,} times",
                    where=str(folder),
                    fix="rename the folder",
                )
            about.repeats[folder.name] = repeats
            return repeats, match[2].strip()
        if folder == root:
            break
    return 1, None
