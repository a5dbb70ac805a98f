"""Preflight checks of images: conversions, crops, duplicates and small sizes.

    findings = check_pictures(pictures, summary, plan, settings)
    findings += check_held_out(pictures, held_out)

Findings have the same levels as findings about text: `stop` ends the run, `warn` is a warning, and `ok`
reports a passed check. A finding that counts images also names some of them. The only files read from disk are
masks, to find masks that are empty within the crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from veneer.errors import counted, first_few
from veneer.train.config.image import ImageDataSection
from veneer.train.image.augmentation import PicturePlan, crop_view, prepare
from veneer.train.image.folder import has_word
from veneer.train.image.near_duplicates import near_duplicates
from veneer.train.image.pictures import PictureSummary, TrainingPicture
from veneer.train.preflight import Finding, about_some, share

_NAMED = 5
_CROP_WARNING = 0.25  # warn about an image if more than this share of its area is cropped away
_BAD_NOTES = ("a color profile that cannot be used", "EXIF that cannot be read")


def check_pictures(
    pictures: Sequence[TrainingPicture], summary: PictureSummary, plan: PicturePlan, settings: ImageDataSection
) -> list[Finding]:
    """Return all findings about the images of a run, in display order."""
    return [
        *_files(pictures, summary, plan, settings),
        *_captions(pictures, summary, settings),
        *_buckets(pictures, plan, settings),
        *_masks(pictures, plan, settings),
        *_pairs(pictures, summary),
        *_check_near_duplicates(pictures),
    ]


def check_held_out(train: Sequence[TrainingPicture], held_out: Sequence[TrainingPicture]) -> list[Finding]:
    """Return findings about held-out images that are equal or similar to training images."""
    trained = [p for p in train if not p.is_class]
    pairs, total = _near_duplicate_pairs(held_out, trained), len(held_out)
    if not pairs:
        return [Finding("ok", "held out", f"{counted(total, 'held-out picture')}, none of them trained on")]
    names = [f"{held_out[i].name} is {trained[j].name}" for i, j in pairs]
    text = "held-out pictures are, or look like, training pictures"
    fix = "keep each picture in only one of the two sets: the loss on training pictures does not show overfitting"
    return [*about_some("held out", len({i for i, _ in pairs}), total, text, names, fix, stops=True)]


def _files(
    pictures: Sequence[TrainingPicture], summary: PictureSummary, plan: PicturePlan, settings: ImageDataSection
) -> Iterator[Finding]:
    classes = sum(p.is_class for p in pictures)
    text = counted(len(pictures) - classes, "picture")
    if classes:
        text += f" and {counted(classes, 'class picture')} (weight {settings.class_weight:g})"
    yield Finding("ok", "pictures", f"{text}: {counted(len(plan.rows), 'row')} an epoch")
    broken, text = len(summary.broken), "files cannot be read and are left out"
    total = summary.captions.total() + broken
    yield from about_some("broken", broken, total, text, summary.broken, "repair or remove them")
    if summary.ignored:
        kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(summary.ignored.items()))
        yield Finding("warn", "ignored", f"files that are neither pictures, captions nor masks: {kinds}")
    for note, count in sorted(summary.notes.items()):
        yield Finding("warn" if note.startswith(_BAD_NOTES) else "ok", "decoding", f"{count:,} {note}")


def _captions(
    pictures: Sequence[TrainingPicture], summary: PictureSummary, settings: ImageDataSection
) -> Iterator[Finding]:
    sources = ", ".join(f"{count:,} from {source}" for source, count in summary.captions.most_common())
    yield Finding("ok", "captions", sources)
    if settings.trigger is not None:
        changes = ", ".join(f"{change} in {count:,}" for change, count in summary.triggers.most_common())
        yield Finding("ok", "trigger", f"`{settings.trigger}`: {changes}")
        if named := [p.name for p in pictures if p.is_class and has_word(p.caption, settings.trigger)]:
            text = f"{counted(len(named), 'class caption')} with the trigger: {first_few(named, _NAMED)}"
            fix = "remove the trigger from these captions: class pictures keep the class unchanged"
            yield Finding("warn", "trigger", text, fix)
    classes = {p.caption.lower() for p in pictures if p.is_class} | {(settings.class_prompt or "").lower()}
    if shared := [p.name for p in pictures if not p.is_class and p.caption and p.caption.lower() in classes]:
        text = f"{counted(len(shared), 'picture')} with the caption of a class picture: {first_few(shared, _NAMED)}"
        yield Finding("warn", "captions", text, "set data.trigger, or name the subject in each caption")
    if empty := [p.name for p in pictures if not p.caption]:
        text = f"{counted(len(empty), 'empty caption')}: {first_few(empty, _NAMED)}"
        yield Finding("warn", "captions", text, "write captions for them, or set a trigger")


def _buckets(pictures: Sequence[TrainingPicture], plan: PicturePlan, settings: ImageDataSection) -> Iterator[Finding]:
    sizes = [f"{w} x {h}: {count:,}" for (w, h), count in plan.sizes.items()]
    text = f"{first_few(sizes, 12)} (width x height: rows; sides in steps of {plan.step} pixels)"
    yield Finding("ok", "buckets", text)
    total = len(pictures)
    action = {"keep": "used at their own size", "upscale": "enlarged", "drop": "left out"}[settings.small]
    text = f"pictures are smaller than a bucket and {action}"
    fix = "" if settings.small == "upscale" else "set data.small: upscale to enlarge them, or use larger files"
    yield from about_some("small", len(plan.small), total, text, plan.small, fix)
    if settings.small == "keep":
        text = f"pictures are smaller than the step of {plan.step} pixels and are left out"
        yield from about_some("small", len(plan.dropped), total, text, plan.dropped)
    cuts = {row.picture.name: crop_view(row.picture.size, row.bucket).cut for row in plan.rows}
    cropped = sorted((name for name, cut in cuts.items() if cut > _CROP_WARNING), key=lambda n: -cuts[n])
    names = [f"{name} ({cuts[name]:.0%})" for name in cropped]
    fix = "crop them by hand, or increase bucket_ratio" if settings.buckets else "set data.buckets: true to crop less"
    yield from about_some("crops", len(names), len(cuts), "pictures lose more than a quarter to the crop", names, fix)


def _masks(pictures: Sequence[TrainingPicture], plan: PicturePlan, settings: ImageDataSection) -> Iterator[Finding]:
    total = sum(p.mask is not None or p.alpha for p in pictures)
    if not total:
        if settings.masks not in ("auto", "off"):
            requirement = "has transparency" if settings.masks == "alpha" else f"has a mask in {settings.masks}"
            yield Finding("stop", "masks", f"data.masks is `{settings.masks}`, but no picture {requirement}")
        return
    floor = f"; black has the weight {settings.mask_floor:g}" if settings.mask_floor else ""
    yield Finding("ok", "masks", f"{share(total, len(pictures))} pictures have a loss mask{floor}")
    empty = []
    for row in {(r.picture.key, r.bucket): r for r in plan.rows if r.picture.mask or r.picture.alpha}.values():
        mask = prepare(row.picture, crop_view(row.picture.size, row.bucket), settings).mask
        if mask is not None and not bool((mask > settings.mask_floor).any()):
            empty.append(row.picture.name)
    text, fix = "masks are black in the entire crop, so nothing is trained there", "make the areas to train on white"
    yield from about_some("masks", len(empty), len(plan.rows), text, empty, fix, stops=True)


def _pairs(pictures: Sequence[TrainingPicture], summary: PictureSummary) -> Iterator[Finding]:
    if not summary.sources:
        return
    yield Finding("ok", "pairs", f"{counted(summary.sources, 'source image')} per picture; captions are instructions")
    if summary.unlike:
        text = f"{counted(len(summary.unlike), 'source image')} with proportions unlike the result's, not cropped: "
        fix = "if both show the same scene, crop them to the same proportions, so that positions match"
        yield Finding("warn", "pairs", text + first_few(summary.unlike, _NAMED), fix)
    unchanged = [p.name for p in pictures if any(b.digest == p.digest for b in p.sources)]
    text = "pictures are the same file as one of their source images"
    fix = "remove them, unless the instruction is to change nothing"
    yield from about_some("pairs", len(unchanged), len(pictures), text, unchanged, fix)


def _check_near_duplicates(pictures: Sequence[TrainingPicture]) -> Iterator[Finding]:
    pairs = _near_duplicate_pairs(pictures)
    if not pairs:
        yield Finding("ok", "near-duplicates", "no two pictures look the same")
        return
    count = len({i for pair in pairs for i in pair})
    names = [f"{pictures[i].name} and {pictures[j].name}" for i, j in pairs]
    text = f"pictures look like another picture, in {counted(len(pairs), 'pair')}"
    fix = "remove one picture of each pair, unless it should count twice"
    yield from about_some("near-duplicates", count, len(pictures), text, names, fix)
    crossing = {i if pictures[j].is_class else j for i, j in pairs if pictures[i].is_class != pictures[j].is_class}
    names, instances = [pictures[i].name for i in sorted(crossing)], sum(not p.is_class for p in pictures)
    text = "pictures look like a class picture, so prior preservation counteracts training on them"
    fix = "set data.class_folder to a folder with other subjects of the class"
    yield from about_some("class pictures", len(names), instances, text, names, fix, stops=True)


def _near_duplicate_pairs(
    pictures: Sequence[TrainingPicture], class_pictures: Sequence[TrainingPicture] | None = None
) -> list[tuple[int, int]]:
    """Return the pairs of near-duplicate images.

    If all images have source images, a pair is returned only if its two source images are near-duplicates
    too."""

    def alike(side: Callable[[TrainingPicture], TrainingPicture]) -> list[tuple[int, int]]:
        first, second = ([side(p).perceptual_hash for p in group] for group in (pictures, class_pictures or ()))
        return near_duplicates(first, None if class_pictures is None else second)

    pairs = alike(lambda p: p)
    if pairs and all(p.sources for p in (*pictures, *(class_pictures or ()))):
        sources = set(alike(lambda p: p.sources[0]))
        pairs = [pair for pair in pairs if pair in sources]
    return pairs
