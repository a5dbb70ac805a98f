"""Preflight checks of pictures: conversions, crops, duplicates and small sizes.

    findings = check_pictures(pictures, about, plan, settings)
    findings += check_held_out(pictures, held_out)

Findings are those of text runs: `stop` ends the run, `warn` is a warning, `ok` reports a passed check. Every
count has names. Reads only masks from the disk (to find masks that are empty in the crop).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from veneer.errors import counted, first_few
from veneer.train.config.image import ImageDataSection
from veneer.train.image.augmentation import PicturePlan, place, prepare
from veneer.train.image.near_duplicates import near_duplicates
from veneer.train.image.training_picture import AboutPictures, TrainingPicture
from veneer.train.preflight import Finding, share

_NAMED = 5
_MUCH = 0.25  # share of a picture outside its bucket that causes a warning
_CONVERTED_BADLY = ("a colour profile that cannot be used", "EXIF that cannot be read", "first frame")


def check_pictures(
    pictures: Sequence[TrainingPicture], about: AboutPictures, plan: PicturePlan, settings: ImageDataSection
) -> list[Finding]:
    """Return all findings about the pictures of a run, in display order."""
    findings: list[Finding] = []
    for check in _CHECKS:
        findings += check(pictures, about, plan, settings)
    return findings


def check_held_out(train: Sequence[TrainingPicture], held_out: Sequence[TrainingPicture]) -> list[Finding]:
    """Return findings about held-out pictures that are, or look like, training ones."""
    learned = [p for p in train if not p.is_class]
    pairs = _looking_alike(held_out, learned)
    if not pairs:
        return [Finding("ok", "held out", f"{counted(len(held_out), 'held-out picture')}, none of them trained on")]
    count = len({i for i, _ in pairs})
    text = f"{share(count, len(held_out))} held-out pictures are, or look like, ones that are trained on: " + _some(
        f"{held_out[i].name} is {learned[j].name}" for i, j in pairs
    )
    fix = "put each on one side only: a loss on pictures that were learned says nothing"
    return [Finding("stop" if count > len(held_out) / 2 else "warn", "held out", text, fix)]


def _read(
    pictures: Sequence[TrainingPicture], about: AboutPictures, plan: PicturePlan, settings: ImageDataSection
) -> Iterator[Finding]:
    text = counted(about.pictures, "picture") + (
        f" and {counted(about.class_pictures, 'class picture')} (weight {settings.class_weight:g})"
        if about.class_pictures
        else ""
    )
    if about.repeats:
        text += ", repeated " + _some(f"{n} times in {folder}" for folder, n in sorted(about.repeats.items()))
    yield Finding("ok", "pictures", f"{text}: {counted(len(plan.rows), 'row')} an epoch")
    if about.broken:
        total = about.pictures + about.class_pictures + len(about.broken)
        text = f"{share(len(about.broken), total)} files cannot be read and are left out: {_some(about.broken)}"
        yield Finding("warn", "broken", text, "repair or remove them")
    if about.ignored:
        kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(about.ignored.items()))
        yield Finding("warn", "ignored", f"files that are neither pictures, captions nor masks: {kinds}")
    for level in ("warn", "ok"):
        notes = {n: c for n, c in about.notes.items() if n.startswith(_CONVERTED_BADLY) == (level == "warn")}
        if notes:
            text = "; ".join(f"{count:,} {note}" for note, count in sorted(notes.items()))
            yield Finding("warn" if level == "warn" else "ok", "decoding", text)


def _captions(
    pictures: Sequence[TrainingPicture], about: AboutPictures, plan: PicturePlan, settings: ImageDataSection
) -> Iterator[Finding]:
    sources = ", ".join(f"{count:,} from {source}" for source, count in about.captions.most_common())
    yield Finding("ok", "captions", sources)
    if settings.trigger is not None:
        did = ", ".join(f"{what} in {count:,}" for what, count in about.trigger.most_common())
        yield Finding("ok", "trigger", f"`{settings.trigger}`: {did}")
    if about.class_triggers:
        text = f"{counted(len(about.class_triggers), 'class caption')} with the trigger: {_some(about.class_triggers)}"
        yield Finding("warn", "trigger", text, "remove it there: class pictures keep the class as it is without it")
    classes = {p.caption.lower() for p in pictures if p.is_class} | {(settings.class_prompt or "").lower()} - {""}
    same = [p.name for p in pictures if not p.is_class and p.caption.lower() in classes]
    if same:
        text = f"{counted(len(same), 'picture')} with a class picture's caption, so both are learned by one name: "
        text += _some(same)
        yield Finding("warn", "captions", text, "set data.trigger, or name in each caption what makes it yours")
    if about.empty:
        names = _some(p.name for p in pictures if not p.caption)
        yield Finding(
            "warn", "captions", f"{counted(about.empty, 'caption')} left empty: {names}", "write them, or set a trigger"
        )
    if about.several_lines:
        text = f"{counted(about.several_lines, 'caption file')} of several lines, which are joined to one caption"
        yield Finding("warn", "captions", text)
    if about.shared:
        text = f"{counted(about.shared, 'caption file')} of several pictures, whose names differ in their ending alone"
        yield Finding("warn", "captions", text)
    if about.unused:
        yield Finding("warn", "captions", f"metadata columns that nothing uses: {', '.join(about.unused)}")
    if settings.shuffle_tags and not any("," in p.caption for p in pictures):
        yield Finding(
            "warn", "captions", "shuffle_tags is set, but no caption has a comma: there is nothing to shuffle"
        )


def _buckets(
    pictures: Sequence[TrainingPicture], about: AboutPictures, plan: PicturePlan, settings: ImageDataSection
) -> Iterator[Finding]:
    sizes = [f"{w} x {h}: {count:,}" for (w, h), count in plan.sizes.items()]
    text = f"{first_few(sizes, 12)} (width x height: rows; sides in steps of {plan.step} pixels)"
    yield Finding("ok", "buckets", text)
    if plan.small:
        what = {"keep": "kept at their own size", "upscale": "enlarged", "drop": "left out"}[settings.small]
        text = f"{share(len(plan.small), len(pictures))} pictures are smaller than a bucket and {what}: "
        fix = "" if settings.small == "upscale" else "data.small: upscale enlarges them, or give larger files"
        yield Finding("warn", "small", text + _some(plan.small), fix)
    if plan.dropped and settings.small == "keep":
        text = f"{counted(len(plan.dropped), 'picture')} smaller than the step of {plan.step} pixels, left out: "
        yield Finding("warn", "small", text + _some(plan.dropped))
    cuts = {row.picture.name: place(row.picture.size, row.bucket).cut for row in plan.rows}
    much = sorted((name for name, cut in cuts.items() if cut > _MUCH), key=lambda n: -cuts[n])
    if much:
        text = f"{share(len(much), len(cuts))} pictures lose more than a quarter to the crop: "
        names = _some(f"{name} ({cuts[name]:.0%})" for name in much)
        fix = "" if settings.buckets and settings.bucket_ratio >= 8 else "crop them by hand, or raise bucket_ratio"
        yield Finding("warn", "crops", text + names, fix if settings.buckets else "data.buckets: true keeps more")


def _masks(
    pictures: Sequence[TrainingPicture], about: AboutPictures, plan: PicturePlan, settings: ImageDataSection
) -> Iterator[Finding]:
    total = about.masks + about.alpha_masks
    if settings.masks == "off":
        return
    if not total:
        if settings.masks != "auto":
            what = "has transparency" if settings.masks == "alpha" else f"has a mask in {settings.masks}"
            yield Finding("stop", "masks", f"data.masks is `{settings.masks}`, but no picture {what}")
        return
    floor = f"; what they leave out counts {settings.mask_floor:g}" if settings.mask_floor else ""
    yield Finding("ok", "masks", f"{share(total, len(pictures))} pictures have a loss mask{floor}")
    if about.resized_masks:
        text = f"{counted(about.resized_masks, 'mask')} of another size than the picture: resized"
        yield Finding("warn", "masks", text)
    empty = []
    for row in {(r.picture.key, r.bucket): r for r in plan.rows if r.picture.mask or r.picture.alpha}.values():
        seen = prepare(row.picture, place(row.picture.size, row.bucket), settings)
        if seen.mask is not None and not bool((seen.mask > settings.mask_floor).any()):
            empty.append(row.picture.name)
    if empty:
        text = f"{counted(len(empty), 'mask')} black all over the crop, so nothing is learned there: {_some(empty)}"
        yield Finding("stop" if len(empty) > len(plan.rows) / 2 else "warn", "masks", text, "white is what is learned")


def _pairs(
    pictures: Sequence[TrainingPicture], about: AboutPictures, plan: PicturePlan, settings: ImageDataSection
) -> Iterator[Finding]:
    if not about.before:
        return
    each = "one picture before it" if about.before == 1 else f"{about.before} pictures before it"
    yield Finding("ok", "pairs", f"each picture has {each}; captions are instructions")
    if resized := about.resized_before - len(about.own_shape):
        text = f"{counted(resized, 'before picture')} of another size than what comes after: resized"
        yield Finding("warn", "pairs", text)
    if about.own_shape:
        text = f"{counted(len(about.own_shape), 'before picture')} of another proportion than what comes after, shown "
        text += f"whole, in a size of its own: {_some(about.own_shape)}"
        fix = "crop both to one proportion where it is the same scene: then both lie in one place"
        yield Finding("warn", "pairs", text, fix)
    same = [p.name for p in pictures if any(b.digest == p.digest for b in p.before)]
    if same:
        text = f"{share(len(same), len(pictures))} pictures are the same file before and after: {_some(same)}"
        yield Finding(
            "warn", "pairs", text, "remove them, unless the instruction is to change nothing: that is what they teach"
        )
    asked = Counter((tuple(b.digest for b in p.before), p.caption) for p in pictures)
    unclear = [p.name for p in pictures if asked[tuple(b.digest for b in p.before), p.caption] > 1]
    if unclear:
        text = f"one picture, one instruction and several results: {_some(unclear)}"
        yield Finding("warn", "pairs", text, "say in each instruction what differs")


def _class_pictures(
    pictures: Sequence[TrainingPicture], about: AboutPictures, plan: PicturePlan, settings: ImageDataSection
) -> Iterator[Finding]:
    """Report class pictures that are the same file as one of the user's pictures.

    `_alike` warns of those that only look like one."""
    own = {picture.digest for picture in pictures if not picture.is_class}
    if both := [picture.name for picture in pictures if picture.is_class and picture.digest in own]:
        text = f"{counted(len(both), 'class picture')} learned as one of your own as well: {_some(both)}"
        fix = "give data.class_folder a folder of other things of the kind"
        yield Finding("stop" if len(both) > len(own) / 2 else "warn", "class pictures", text, fix)


def _alike(
    pictures: Sequence[TrainingPicture], about: AboutPictures, plan: PicturePlan, settings: ImageDataSection
) -> Iterator[Finding]:
    pairs = _looking_alike(pictures)
    if not pairs:
        yield Finding("ok", "near-duplicates", "no two pictures look the same")
        return
    count = len({i for pair in pairs for i in pair})
    named = _some(
        f"{pictures[i].name} and {pictures[j].name}"
        + (" (same file)" if pictures[i].digest == pictures[j].digest else "")
        for i, j in pairs
    )
    text = f"{share(count, len(pictures))} pictures look like another one, in {counted(len(pairs), 'pair')}: {named}"
    fix = "remove one of each, unless it should weigh more: what is there twice is learned twice as hard"
    yield Finding("warn", "near-duplicates", text, fix)
    crossing = [(i, j) for i, j in pairs if pictures[i].is_class != pictures[j].is_class]
    if crossing:
        many = counted(len(crossing), "class picture")
        text = f"{many} like pictures of what is learned: prior preservation undoes it"
        yield Finding("warn", "near-duplicates", text, "take other class pictures")


def _looking_alike(
    pictures: Sequence[TrainingPicture], others: Sequence[TrainingPicture] | None = None
) -> list[tuple[int, int]]:
    """Return the near-duplicates of pictures.

    In pairs, both the source image and the picture must look alike, because one of them can differ by the
    edit only."""

    def of(side: Callable[[TrainingPicture], TrainingPicture]) -> list[tuple[int, int]]:
        left, right = ([side(p).perceptual_hash for p in group] for group in (pictures, others or ()))
        return near_duplicates(left, None if others is None else right)

    found = of(lambda p: p)
    if found and all(p.before for p in (*pictures, *(others or ()))):
        same = set(of(lambda p: p.before[0]))
        found = [pair for pair in found if pair in same]
    return found


_Check = Callable[[Sequence[TrainingPicture], AboutPictures, PicturePlan, ImageDataSection], Iterator[Finding]]
_CHECKS: tuple[_Check, ...] = (_read, _captions, _buckets, _masks, _pairs, _class_pictures, _alike)


def _some(names: Iterable[str]) -> str:
    """Return the first few names and the number of others."""
    names = list(names)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
