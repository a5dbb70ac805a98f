"""A campaign whose true pictures are known: its adapters separately, stacked, and under a ControlNet.

    python benchmarks/image_campaign.py WORK [--base catalogue-sdxl] [--quick] [--json] [--sheets docs/images]

WORK is the folder of `bases/catalogue/build.py` with its judge, which was trained on true renders only. The
three adapters are trained as in `examples/campaign`. A "true picture" is the rendered scene with the wanted
effects. Measured over held-out scenes and three seeds:

    likeness  cosine between the judge's features of a picture and of the true picture of the same scene
    named     share of pictures for which the judge names the requested kind of object
    brand     closeness to the brand's palette: 1 - d(picture, truth) / d(true picture without brand, truth)
    lens      the same for the lens: warmth of lights and shadows, dark corners, grain
    way       in a stack: share of the color change between the true pictures without and with the effect
    found     share of pictures whose true drawing (OpenMoji) is among the five nearest drawings
    edges     F1 between the Canny edges of the picture and of the true picture, with a tolerance of one pixel
    spread    color differences between pictures of one campaign; bases/catalogue/measures.py has all measures

The targets were set before the first run, except for the measure of brand and lens in a stack
(docs/notes/campaign.md).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bases" / "catalogue"), str(ROOT / "benchmarks"), str(ROOT / "examples" / "campaign")]

import campaign  # noqa: E402
import numpy as np  # noqa: E402
from _report import bar, lines_of, report, row  # noqa: E402
from autoencoder import through  # noqa: E402
from edges import edges  # noqa: E402
from judge import HEADS, judge, load_judge  # noqa: E402
from measures import edge_agreement, lens_distance, palette_distance, share, spread, way_gone  # noqa: E402
from openmoji import OPENMOJI_PALETTE, OPENMOJI_WORDS, openmoji, write_openmoji  # noqa: E402
from PIL import Image  # noqa: E402
from scenes import Array, Scene, depth  # noqa: E402
from teach import arrays, guidance_of, learned, stacked, teach  # noqa: E402

import veneer  # noqa: E402
from veneer.adapters.mix import mix_adapters  # noqa: E402
from veneer.imaging.sheet import sheet  # noqa: E402

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PARTS = (*campaign.ROLES, "stack", "composition", "consistency", "openmoji")
ALL = {"brand": True, "lens": True}
Mix = Sequence[str]

BY_BLOCK = {
    "flow": {"product": "double=1,single=0.3", "brand": "double=0.7,single=1", "lens": "double=0.3,single=1"},
    "noise": {"product": "down=1,mid=1,up=0.3", "brand": "down=0.5,mid=0.7,up=1", "lens": "down=0.3,mid=0.3,up=1"},
}
APART = {"product": "steps=0-1", "brand": "steps=0.4-1", "lens": "steps=0.6-1"}
RECIPE = "the recipe"


def brand_share(pictures: Array, truths: Array, plain: Array) -> float:
    return share(palette_distance(pictures, repeated(truths, pictures)), palette_distance(plain, truths))


def lens_share(pictures: Array, truths: Array, plain: Array) -> float:
    return 1 - lens_distance(pictures, truths, plain)


SHARES = {"brand": brand_share, "lens": lens_share}
"""Role -> function that measures its effect; true pictures with the effect give 1, without it 0."""


def said(scene: Scene) -> str:
    """Return the title of a scene's column: the product's position, or the name of the other object."""
    return scene.surface if scene.kind == campaign.PRODUCT else scene.product()


def repeated(truths: Array, pictures: Array) -> Array:
    """Return the true pictures, repeated once for each seed of `pictures`."""
    return np.concatenate([truths] * (len(pictures) // len(truths)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("work", type=Path)
    options.add_argument("--base", default="catalogue-flux", help="catalogue-flux or catalogue-sdxl")
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of what is measured")
    options.add_argument("--quick", action="store_true", help="few scenes, one seed, a few steps: does it run")
    options.add_argument("--json", action="store_true")
    options.add_argument("--sheets", type=Path, help="write the pictures there")
    options.add_argument("--runs", type=Path, help="keep the trained adapters there, and use those that are there")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the trainings")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Proof(given, given.runs or Path(folder)).result()
    print(json.dumps(result) if given.json else "\n".join(lines_of(result)))


class Proof:
    """All measurements of one base and its adapters."""

    def __init__(self, given: argparse.Namespace, runs: Path) -> None:
        self.given, self.runs, self.began = given, runs / Path(given.base).name, time.perf_counter()
        self.judge = load_judge(given.work)
        self.base = veneer.load_image_base(given.base)
        self.guidance = guidance_of(self.base)
        self.seeds = (1,) if given.quick else (1, 2, 3)
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self.kept: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]], Array] = {}
        self.shots = campaign.shots()[: 4 if given.quick else 12]
        r = random.Random(51)
        self.others = [campaign.plain_scene(r) for _ in range(6 if given.quick else 80)]

    @cached_property
    def adapters(self) -> dict[str, str]:
        return {role: self.trained(role) for role in campaign.ROLES}

    def result(self) -> dict[str, Any]:
        for part in self.given.only:
            getattr(self, part)()
        about = {"base": self.given.base, "seeds": len(self.seeds), "scenes": len(self.others)}
        return report(self.rows, self.bars, about)

    def trained(self, role: str) -> str:
        out, data = self.runs / role, self.runs / "data"
        if not (out / "veneer.json").is_file():
            base, started = veneer.load_image_base(self.given.base), time.perf_counter()
            settings = [*self.given.set, *(["schedule.steps=4"] if self.given.quick else [])]
            if role == "openmoji":
                write_openmoji(data / role)
                config = ROOT / "benchmarks" / "openmoji.yaml"
                learned(config, base, data / role, out, *settings, on_event=lambda event: None)
            else:
                teach(role, base, data, out, *settings, on_event=lambda event: None)
            self.add(f"training the {role}", {"seconds": time.perf_counter() - started})
        return str(out)

    # -- separate adapters ---------------------------------------------------------------------------------------------

    def product(self) -> None:
        truths = self.truths(self.shots)
        prompts = self.words()
        rows = {"the base": self.drawn(prompts), "the product": self.drawn(prompts, [self.adapters["product"]])}
        others = [replace(s, kind=campaign.OTHER) for s in self.shots]
        found = {label: self.product_figures(pictures, truths) for label, pictures in rows.items()}
        found["another maker's lock, true pictures"] = self.product_figures(self.truths(others), truths)
        found["itself, true pictures"] = self.product_figures(truths, truths)
        for label, figures in found.items():
            self.add(f"product: {label}", figures)
        far = 1 - found["the base"]["likeness"]
        self.bar(
            "product: share of the way from the base to the truth",
            0.6,
            share(1 - found["the product"]["likeness"], far),
        )
        other = found["another maker's lock, true pictures"]["likeness"]
        self.bar("product: likeness above another maker's", 0.0, found["the product"]["likeness"] - other)
        self.bar("product: named", 0.8, found["the product"]["named"])
        self.sheet("product", {**rows, "the truth": truths}, self.shots)
        # With the product's adapter, other objects must look as they do on the base.
        prompts, kinds = [campaign.words(s) for s in self.others], [s.kind for s in self.others]
        without, with_it = (self.named(self.drawn(prompts, mix), kinds) for mix in ([], [self.adapters["product"]]))
        self.add("product: other things", {"named on the base": without, "named with the adapter": with_it})
        self.bar("product: other things are named as on the base", -0.02, with_it - without)

    def brand(self) -> None:
        self.by_strength("brand")

    def lens(self) -> None:
        self.by_strength("lens")

    def by_strength(self, role: str) -> None:
        """Measure an adapter's effect at each strength, and whether objects are still recognized."""
        truths, plain = self.truths(self.others, **{role: True}), self.truths(self.others)
        prompts = [campaign.words(s, **{role: True}) for s in self.others]
        kinds = [s.kind for s in self.others]
        rows, shares, named = {}, [], []
        for strength in STRENGTHS:
            pictures = self.drawn(prompts, [f"{self.adapters[role]}:{strength:g}"] if strength else [])
            shares.append(SHARES[role](pictures, truths, plain))
            named.append(self.named(pictures, kinds))
            label = f"at {strength:g}" if strength else "the base"
            self.add(f"{role}: {label}", {role: shares[-1], "named": named[-1]})
            rows[label] = pictures
        self.add(f"{role}: true pictures", {role: 1.0, "named": self.named(truths, kinds)})
        self.bar(f"{role}: share of the way", 0.6, shares[-1])
        self.bar(f"{role}: grows with every step of strength", 1, float(all(a < b for a, b in pairwise(shares))))
        self.bar(f"{role}: things are named as on the base", -0.02, named[-1] - named[0])
        asked = [campaign.branded(s) for s in self.others] if role == "brand" else self.others
        self.sheet(role, {**rows, "the truth": truths}, asked)

    # -- stacked adapters ----------------------------------------------------------------------------------------------

    def stack(self) -> None:
        """Measure how much of each adapter's separate effect remains in a stack."""
        alone = {}
        for role, place in self.adapters.items():
            asked = {role: True} if role in SHARES else {}
            alone[role] = self.effects([place], **asked)[role]
        self.add("stack: each alone", alone)
        self.add("stack: the base", self.effects([], **ALL))
        rows, least = {"the base": self.drawn(self.words(**ALL))}, {}
        for method, mix in self.stacks().items():
            rows[method] = self.drawn(self.words(**ALL), mix)
            got = self.effects(mix, **ALL)
            kept = {f"{role} kept": got[role] / alone[role] for role in campaign.ROLES}
            self.add(f"stack: {method}", got | kept)
            least[method] = min(kept.values())
        best = max(least, key=lambda method: least[method])
        self.bar(f"stack: the least that the best method ({best}) keeps of each", 0.7, least[best])
        self.bar("stack: the least that the recipe keeps of each", 0.7, least[RECIPE])
        self.sheet("stack", {**rows, "the truth": self.truths(self.shots, **ALL)}, self.shots)

    def stacks(self) -> dict[str, Mix]:
        """Return mixes to compare; the recipe (formats/strengths.py) should be the best of them."""
        found: dict[str, Mix] = {"plain sum": list(self.adapters.values())}
        for method in ("orthogonal", "ties"):
            out = self.runs / f"{method}.safetensors"
            if not out.exists():
                mix_adapters([(a, 1.0) for a in self.adapters.values()], out, method=method, rank=48)
            found[method] = [str(out)]
        kind = "flow" if self.base.prediction == "flow" else "noise"
        for method, where in (("by block", BY_BLOCK[kind]), ("apart in time", APART)):
            found[method] = [f"{place}@{where[role]}" for role, place in self.adapters.items()]
        return found | {RECIPE: stacked(self.adapters)}

    def effects(self, mix: Mix, **asked: bool) -> dict[str, float]:
        """Measure the effects of `mix` in pictures of the campaign's scenes.

        For the product, the effect is the judge's confidence. For brand and lens, it is the share of the
        color change toward the true picture."""
        made, truths = self.drawn(self.words(**asked), mix), self.truths(self.shots, **asked)
        found = {"product": self.product_figures(made, truths)["sure"]}
        for role in asked:
            without = self.truths(self.shots, **{**asked, role: False})
            found[role] = way_gone(made, repeated(truths, made), repeated(without, made))
        return found

    def composition(self) -> None:
        """Measure how well edges and depth of the true picture control the composition, with one seed.

        Covers the base and the stack."""
        for label, scenes, mix, asked in (
            ("the base", self.others[: len(self.shots)], [], {}),
            ("the stack", self.shots, stacked(self.adapters), ALL),
        ):
            # The prompts do not state positions, so only the control picture determines them.
            shots = [replace(s, place=0.12 if i % 2 else -0.12) for i, s in enumerate(scenes)]
            prompts = [campaign.words(s, **asked) for s in shots]
            truths = self.truths(shots, **asked)
            lines = self.lines(truths)
            pictures = {"no control": self.drawn(prompts, mix, seeds=(1,))}
            seeds = self.seeds_of(prompts, 1)
            for kind in ("edges", "depth"):
                made = []
                for scene, prompt, line, seed in zip(shots, prompts, lines, seeds, strict=True):
                    path = self.runs / "control.png"
                    shown = line * 255 if kind == "edges" else depth(scene)
                    Image.fromarray(shown.astype(np.uint8)).convert("RGB").save(path)
                    options: dict[str, Any] = {"controls": [f"{kind}={path}:1"], "guidance": self.guidance}
                    (one,) = veneer.image(self.base, prompt, adapters=mix, seed=seed, **options)
                    made += arrays([one])
                pictures[kind] = np.stack(made)
            agreed = {kind: edge_agreement(self.lines(each), lines) for kind, each in pictures.items()}
            most = edge_agreement(self.lines(through(self.base.parts["vae"], truths)), lines)
            self.add(f"composition: {label}", agreed | {"most": most})
            for kind in ("edges", "depth"):
                gained = (agreed[kind] - agreed["no control"]) / (most - agreed["no control"])
                self.bar(f"composition: of what is missing, {kind} bring, {label}", 0.5, gained)
            self.sheet(f"composition-{label.split()[-1]}", {**pictures, "the truth": truths}, shots)

    def consistency(self) -> None:
        """Compare twelve pictures of one campaign with the base's pictures for the same prompts."""
        truths = self.truths(self.shots, **ALL)
        found = {}
        stack = stacked(self.adapters)
        for label, pictures in (
            ("the base", self.drawn(self.words(**ALL))),
            ("the base, scenes in their own words", self.drawn(self.words())),
            ("the stack", self.drawn(self.words(**ALL), stack)),
            ("true pictures", truths),
        ):
            sets = np.split(pictures, len(pictures) // len(self.shots))
            lines = [self.lines(each).mean((1, 2)) for each in sets]
            features = [judge(self.judge, each).features for each in sets]
            found[label] = {
                "spread": float(np.mean([spread(each) for each in sets])),
                "product": float(np.mean([1 - float((f @ f.T).mean()) for f in features])),
                "lines": float(np.mean([each.std() / each.mean() for each in lines])),
            }
            self.add(f"consistency: {label}", found[label])
        for measure in ("spread", "product"):
            self.bar(
                f"consistency: {measure} of the stack, of the base's",
                0.7,
                found["the stack"][measure] / found["the base"][measure],
                at_least=False,
            )

    # -- a style by other authors --------------------------------------------------------------------------------------

    def openmoji(self) -> None:
        """Train on OpenMoji's drawings of objects that the base knows only in other styles."""
        place, (names, truths) = self.trained("openmoji"), openmoji("held out")
        shown = 8 if self.given.quick else len(names)
        names, truths = names[:shown], truths[:shown]
        prompts = [f"{name}, {OPENMOJI_WORDS}" for name in names]
        rows, far, found = {}, [], []
        for strength in STRENGTHS:
            pictures = self.drawn(prompts, [f"{place}:{strength:g}"] if strength else [])
            far.append(palette_distance(pictures, repeated(truths, pictures), OPENMOJI_PALETTE))
            found.append(self.found(pictures, truths))
            label = f"at {strength:g}" if strength else "the base"
            self.add(f"openmoji: {label}", {"style": share(far[-1], far[0]), "found": found[-1]})
            rows[label] = pictures
        self.bar("openmoji: share of the way", 0.4, share(far[-1], far[0]))
        self.bar("openmoji: grows with every step of strength", 1, float(all(a > b for a, b in pairwise(far))))
        self.bar("openmoji: things are found as on the base", -0.02, found[-1] - found[0])
        self.sheet("openmoji", {**rows, "OpenMoji": truths}, names)

    def found(self, pictures: Array, truths: Array) -> float:
        """Return the share of pictures whose true drawing is among the five nearest in the judge's features.

        The judge was trained on the catalogue and has seen neither the pictures nor the drawings."""
        near = (judge(self.judge, pictures).features @ judge(self.judge, truths).features.T).topk(5, 1).indices
        return float(np.mean([i % len(truths) in row for i, row in enumerate(near.tolist())]))

    # -- helpers -------------------------------------------------------------------------------------------------------

    def drawn(self, prompts: Sequence[str], mix: Mix = (), *, seeds: Sequence[int] = ()) -> Array:
        """Return generated pictures, (seeds · prompts, 128, 128, 3): all prompts with the first seed first.

        Results are cached, because several parts use the same pictures."""
        key = (tuple(prompts), tuple(mix), tuple(seeds))
        if key not in self.kept:
            options: dict[str, Any] = {"adapters": mix, "batch_size": 16, "guidance": self.guidance}
            made = [
                veneer.image(self.base, prompts, seed=self.seeds_of(prompts, seed), **options)
                for seed in seeds or self.seeds
            ]
            self.kept[key] = np.concatenate([arrays(each) for each in made])
        return self.kept[key]

    def seeds_of(self, prompts: Sequence[str], seed: int) -> list[int]:
        """Return one seed per prompt.

        Seeds differ between scenes, whose prompts can be equal, and are the same for every mix."""
        return [1000 * seed + i for i in range(len(prompts))]

    def words(self, **asked: bool) -> list[str]:
        return [campaign.words(s, **asked) for s in self.shots]

    def truths(self, scenes: Sequence[Scene], **seen: bool) -> Array:
        return np.stack([campaign.truth(s, **seen) for s in scenes])

    def product_figures(self, pictures: Array, truths: Array) -> dict[str, float]:
        seen, true = judge(self.judge, pictures), judge(self.judge, truths)
        wanted = true.features.repeat(len(pictures) // len(truths), 1)
        return {
            "likeness": float((seen.features * wanted).sum(1).mean()),
            "named": float(np.mean([w == campaign.PRODUCT for w in seen.words["kind"]])),
            "sure": float(seen.chances["kind"][:, HEADS["kind"].index(campaign.PRODUCT)].mean()),
        }

    def named(self, pictures: Array, kinds: Sequence[str]) -> float:
        said = judge(self.judge, pictures).words["kind"]
        return float(np.mean([a == b for a, b in zip(said, list(kinds) * (len(said) // len(kinds)), strict=True)]))

    def lines(self, pictures: Array) -> Array:
        found: Array = (edges(pictures)[:, 0] > 0).numpy()
        return found

    def add(self, name: str, values: dict[str, float]) -> None:
        self.rows += [row(name, metric, value, "s" if metric == "seconds" else "") for metric, value in values.items()]
        print(f"{time.perf_counter() - self.began:6.0f} s  {name}  {values}", file=sys.stderr)

    def bar(self, name: str, want: float, got: float, at_least: bool = True) -> None:
        self.bars.append(bar(name, want, got, at_least))

    def sheet(self, name: str, rows: dict[str, Array], shown: Sequence[Scene] | Sequence[str]) -> None:
        """Write a sheet of pictures. `shown`: the scenes, or the titles of the columns."""
        if not self.given.sheets:
            return
        columns = [s if isinstance(s, str) else s.view if name == "stack" else said(s) for s in shown[:8]]
        cells = [[Image.fromarray(p) for p in pictures[: len(columns)]] for pictures in rows.values()]
        path = self.given.sheets / f"{Path(self.given.base).name}-{name}.webp"
        sheet(cells, rows=list(rows), columns=columns).save(path, quality=90, method=6)


if __name__ == "__main__":
    main()
