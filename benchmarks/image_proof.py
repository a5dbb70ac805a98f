"""Do image adapters work? Style, content, subject, stack and composition, each beside the base, in figures and sheets.

    python benchmarks/image_proof.py WORK [--base emoji-flux] [--quick] [--json] [--sheets docs/images]

WORK is the folder of `bases/emoji/build.py` (its drawings and its judge, which never saw a generated picture). Two
adapters are trained: OpenMoji's look from 50 drawings, and an invented character from ten (with prior preservation, and
once without). Then, over names that were not among the 50 and three seeds:

    pixel       mean squared error to the real OpenMoji drawing, colours in -1 … 1
    histogram   share of pixels that would have to change colour class (8 × 8 × 8) to have its colours
    features    1 - cosine between the judge's features of both, those that it reads thing and style from
    thing       1 - cosine between those that it reads the thing alone from
    style       probability that the judge gives to OpenMoji
    top 1, 5    share of pictures whose thing the judge names first, or among its first five, of 1,606
    lines       share of pixels that are nearly black
    edges       F1 of the picture's Canny edges against the control picture's, one pixel of tolerance
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bases" / "emoji"), str(ROOT / "benchmarks"), str(ROOT / "examples")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _character import FACES, HELD_OUT, svg  # noqa: E402
from _report import bar, lines_of, report, row  # noqa: E402
from drawings import draw, lined, load_drawings  # noqa: E402
from edges import edges  # noqa: E402
from fidelity import image_of, sheet  # noqa: E402
from image_quickstart import (  # noqa: E402
    BASE_STYLE,
    GUIDED,
    HERE,
    openmoji,
    table_of_names,
    use_of,
    write_pictures,
)
from judge import STYLES, judge, load_judge  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import veneer  # noqa: E402
from veneer.adapters.mix import mix_adapters  # noqa: E402

STRENGTHS = (0.0, 0.5, 1.0)
STYLE, CONTENT = ("pixel", "histogram", "features"), ("top 1", "top 5")
PLAIN, FLAT, LINED = "noto style", "fluent style", "outlined fluent style"
"""What the base is asked without lines; what the character's drawings look like to it; the same with lines."""
PARTS = ("style", "subject", "stack", "composition")
Mix = Sequence[str | tuple[str, float]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("work", type=Path)
    options.add_argument("--base", default="emoji-flux")
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of what is measured")
    options.add_argument(
        "--plain", action="store_true", help="emoji-flux's style without loss.keep_guidance, used as emoji-sdxl's is"
    )
    options.add_argument("--quick", action="store_true", help="12 names, one seed, a few steps: does it run")
    options.add_argument("--json", action="store_true")
    options.add_argument("--sheets", type=Path, help="write the pictures there")
    options.add_argument("--runs", type=Path, help="keep the trained adapters there, and use those that are there")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Proof(given, given.runs or Path(folder)).result()
    print(json.dumps(result) if given.json else "\n".join(lines_of(result)))


class Proof:
    """One base, its adapters, and what is measured of them."""

    def __init__(self, given: argparse.Namespace, runs: Path) -> None:
        self.given, self.runs, self.began = given, runs, time.perf_counter()
        self.judge = load_judge(given.work)
        self.base = veneer.load_image_base(given.base)
        self.use = GUIDED if given.plain else use_of(self.base)
        self.apart = (0.6, 0.25) if self.use.steps else (0.55, 0.55)
        self.seeds = (1,) if given.quick else (1, 2, 3)
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        names = table_of_names()
        known = [n for _, n in names["held out"]]
        everything = {n: f for f, n in names["held out"] + names["new to the base"]}
        self.file = everything
        new = [n for _, n in names["new to the base"]]
        self.known, self.new = (known[:6], new[:6]) if given.quick else (known, new)
        self.real = {n: tensor(openmoji(everything[n])) for n in self.known + self.new}

    def result(self) -> dict[str, Any]:
        only = self.given.only
        style = self.trained("style", self.style_pictures)
        if "style" in only:
            self.style_and_content(style)
        if set(only) != {"style"}:
            subject = self.trained("subject", self.subject_pictures, prior=True)
        if "subject" in only:
            self.subject(subject, self.trained("subject-without-prior", self.subject_pictures))
        if "stack" in only:
            self.stack(style, subject)
        if "composition" in only:
            self.composition(style, subject)
        return report(self.rows, self.bars, {"base": self.given.base, "seeds": len(self.seeds)})

    # -- training ------------------------------------------------------------------------------------------------------

    def style_pictures(self, folder: Path) -> None:
        write_pictures(folder, table_of_names()["train"])

    def subject_pictures(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for face in FACES:
            if face not in HELD_OUT:
                Image.fromarray(draw(svg(face))).save(folder / f"{face}.png")
                (folder / f"{face}.txt").write_text(f"{face} zibbo cat, {FLAT}\n", encoding="utf-8")

    def trained(self, name: str, pictures: Any, prior: bool = False) -> str:
        """The style is trained as the quickstart trains it, by its own configuration. The subject at much noise, where
        a thing is decided and its look is not; the class that is kept is asked for with the lines a style may bring."""
        out, quick = self.runs / self.given.base / name, self.given.quick
        if not (out / "adapter").is_dir():
            pictures(out / "pictures")
            config: Any = HERE / "config.yaml"
            if name != "style":
                config = {
                    "data": {"flip": False}, "adapter": {"rank": 16}, "optimizer": {"learning_rate": 1e-3},
                    "batching": {"rows": 32}, "schedule": {"steps": 300},
                }  # fmt: skip
                if self.base.prediction == "flow":  # where noise is predicted, times are drawn evenly
                    config["loss"] = {"logit_mean": 1.0}
            asked = self.use.training if name == "style" else ()
            if prior:
                config["data"] |= {"class_prompt": f"cat face, {LINED}", "class_count": 8 if quick else 64}
            places = [f"base={self.given.base}", f"data.pictures={out / 'pictures'}", f"output={out / 'adapter'}"]
            started = time.perf_counter()
            veneer.train_image(
                config, *places, *asked, *(["schedule.steps=4"] if quick else []),
                base=veneer.load_image_base(self.given.base), on_event=lambda event: None,
            )  # fmt: skip
            self.rows.append(row(f"training {name}", "seconds", time.perf_counter() - started, "s"))
        return str(out / "adapter")

    # -- what is measured ----------------------------------------------------------------------------------------------

    def pictures(self, prompts: Sequence[str], mix: Mix, **options: Any) -> Tensor:
        """(seeds · prompts, 3, 64, 64): all prompts with the first seed, then with the next."""
        made = []
        for seed in self.seeds:
            drawn = veneer.image(
                self.base, list(prompts), adapters=list(mix), seed=seed * 1000, batch_size=32, **options
            )
            made += [tensor(each.image) for each in drawn]
        return torch.stack(made)

    def compared(self, pictures: Tensor, names: list[str]) -> dict[str, float]:
        """The figures of the list above, for pictures that should be OpenMoji's drawings of `names`."""
        named = names * len(self.seeds)
        real = torch.stack([self.real[n] for n in named])
        verdict, wanted = judge(self.judge, pictures, named), judge(self.judge, real, named)
        return {
            "pixel": float((pictures - real).square().mean()),
            "histogram": float(torch.stack([histogram(p, r) for p, r in zip(pictures, real, strict=True)]).mean()),
            "features": float(1 - (verdict.body * wanted.body).sum(1).mean()),
            "thing": float(1 - (verdict.features * wanted.features).sum(1).mean()),
            "style": float(verdict.style[:, STYLES.index("openmoji")].mean()),
            "top 1": float((verdict.rank == 0).float().mean()),
            "top 5": float((verdict.rank < 5).float().mean()),
        }

    def style_and_content(self, style: str) -> None:
        for group, names in (("known to the base", self.known), ("new to the base", self.new)):
            found = {}
            prompts = [f"{n}, {BASE_STYLE} style" for n in names]
            kept = {}
            plain = self.pictures([f"{n}, {PLAIN}" for n in names], [], **self.use.drawing)
            self.add(f"{group}, base without lines", self.compared(plain, names))
            for strength in STRENGTHS:
                mix = [f"{style}:{strength:g}{self.use.steps}"] if strength else []
                kept[strength] = self.pictures(prompts, mix, **self.use.drawing)
                found[strength] = self.compared(kept[strength], names)
                self.add(f"{group}, adapter at {strength:g}" if strength else f"{group}, base", found[strength])
            if names is self.known and self.use.steps:
                self.in_all_steps(style, group, names, prompts)
            real = torch.stack([self.real[n] for n in names] * len(self.seeds))
            self.add(f"{group}, OpenMoji itself", self.compared(real, names))
            for metric in STYLE:
                falls = all(found[a][metric] > found[b][metric] for a, b in pairwise(STRENGTHS))
                self.bars.append(bar(f"{group}: {metric} falls with strength", 1, float(falls)))
            for metric in CONTENT:
                kept_share = found[1.0][metric] - found[0.0][metric]
                self.bars.append(bar(f"{group}: {metric} against the base", -0.05, kept_share))
            shown = names[:: max(1, len(names) // 10)][:10]
            at = [names.index(n) for n in shown]
            rows = {PLAIN: plain[at]}
            rows |= {(f"{BASE_STYLE} style" if not s else f"adapter at {s:g}"): p[at] for s, p in kept.items()}
            rows["OpenMoji"] = torch.stack([self.real[n] for n in shown])
            self.sheet(f"style-{group.split()[0]}{'-plain' if self.given.plain else ''}", rows, shown)

    def in_all_steps(self, style: str, group: str, names: list[str], prompts: list[str]) -> None:
        """The same adapter from the first step on: more of the look, where things lie and how large they are too."""
        for strength in STRENGTHS[1:]:
            pictures = self.pictures(prompts, [(style, strength)])
            self.add(f"{group}, adapter at {strength:g} in all steps", self.compared(pictures, names))

    def subject(self, subject: str, without: str) -> None:
        faces = list(HELD_OUT)
        real = torch.stack([tensor(Image.fromarray(draw(svg(f)))) for f in faces] * len(self.seeds))
        theirs = self.features(real)
        prompts = [f"{face} zibbo cat, {FLAT}" for face in faces]
        rows = {}
        for label, mix in (("base", []), ("subject", [(subject, 1.0)]), ("without prior", [(without, 1.0)])):
            pictures = self.pictures(prompts, mix)
            likeness = float((self.features(pictures) * theirs).sum(1).mean())
            error = float((pictures - real).square().mean())
            self.add(f"subject in new prompts, {label}", {"likeness": likeness, "pixel": error, "teal": teal(pictures)})
            rows[label] = pictures[: len(faces)]
        rows["the drawing"] = real[: len(faces)]
        self.sheet("subject", rows, [f"{face} zibbo cat" for face in faces])
        base_like, own_like = (self.value(f"subject in new prompts, {x}", "likeness") for x in ("base", "subject"))
        self.bars.append(bar("subject: likeness above the base's", 0.1, own_like - base_like))

        cats = ["cat face", "grinning cat", "weary cat", "cat with tears of joy", "kissing cat", "pouting cat"]
        prompts = [f"{c}, {s} style" for c in cats for s in ("noto", "twemoji", "fluent")]
        base = self.pictures(prompts, [])
        for label, name in (("with prior", subject), ("without prior", without)):
            pictures = self.pictures(prompts, [(name, 1.0)])
            kept = float((self.features(pictures) * self.features(base)).sum(1).mean())
            self.add(f"the class, {label}", {"likeness to base": kept, "teal": teal(pictures)})
        self.add("the class, base", {"teal": teal(base)})
        kept = [self.value(f"the class, {x}", "likeness to base") for x in ("with prior", "without prior")]
        self.bars.append(bar("subject: prior preservation keeps the class nearer", 0, kept[0] - kept[1]))

    def stack(self, style: str, subject: str) -> None:
        prompts = [f"{face} zibbo cat, {LINED}" for face in FACES]
        reference = self.features(torch.stack([tensor(Image.fromarray(draw(svg(f)))) for f in FACES])).mean(0)
        with_lines = torch.stack([tensor(Image.fromarray(draw(lined(svg(f))))) for f in FACES])
        end, start = self.apart
        in_time = f"subject to {end:g} of the steps, style from {start:g}"
        mixes: dict[str, Mix] = {
            "base": [], "style alone": [f"{style}:1{self.use.steps}"], "subject alone": [(subject, 1.0)],
            "both, plain sum": [(style, 1.0), (subject, 1.0)], "both, subject at 0.6": [(style, 1.0), (subject, 0.6)],
            f"both, {in_time}": [f"{style}:1@steps={start:g}-1", f"{subject}:1@steps=0-{end:g}"],
        }  # fmt: skip
        for method in ("orthogonal", "ties"):
            out = self.runs / self.given.base / f"both-{method}.safetensors"
            if not out.exists():
                mix_adapters([(style, 1.0), (subject, 1.0)], out, method=method, rank=32)
            mixes[f"both, {method}"] = [(str(out), 1.0)]
        found, rows = {}, {}
        drawn = {label: self.pictures(prompts, mix, **self.use.drawing) for label, mix in mixes.items()}
        drawn["the drawing with lines"] = with_lines
        for label, pictures in drawn.items():
            verdict = judge(self.judge, pictures, ["cat face"] * len(pictures))
            found[label] = {
                "style": float(verdict.style[:, STYLES.index("openmoji")].mean()),
                "lines": float((pictures.amax(1) < -0.6).float().mean()),
                "likeness": float((verdict.features @ F.normalize(reference, dim=0)).mean()),
                "teal": teal(pictures),
            }
            self.add(f"stack, {label}", found[label])
            rows[label] = pictures[:8]
        # Nobody's style is judged by a cat of this colour: OpenMoji has none. So the lines are counted, as a share of
        # those that the drawing has with lines; of the likeness, what the subject has alone above the base.
        effects = {
            "lines": (0.0, found["the drawing with lines"]["lines"]),
            "likeness": (found["base"]["likeness"], found["subject alone"]["likeness"]),
        }
        for label in mixes:
            for metric, (none, all_of_it) in effects.items() if label.startswith("both") else ():
                share = (found[label][metric] - none) / (all_of_it - none)
                self.add(f"stack, {label}", {f"{metric} kept": share})
                if in_time in label:
                    self.bars.append(bar(f"stack: share of {metric} kept, {in_time}", 0.5, share))
        self.sheet("stack", rows, [f"{face} zibbo cat" for face in FACES][:8])

    def composition(self, style: str, subject: str) -> None:
        drawings = load_drawings(self.given.work)
        names = (self.known[:6] if self.given.quick else self.known[:40]) + self.new[: 6 if self.given.quick else 20]
        where = {(n, s): i for i, (n, s) in enumerate(zip(drawings.names, drawings.styles, strict=True))}
        names = [n for n in names if (n, "noto") in where]
        lines = edges(np.stack([drawings.pixels[where[n, "noto"]] for n in names]))
        both: Mix = [f"{style}:1{self.use.steps}", (subject, 0.5)]
        rows = {"control": lines[:10]}
        seeds, self.seeds = self.seeds, self.seeds[:1]
        for label, mix, controlled in (
            ("base, no control", [], False), ("base", [], True), ("two adapters, no control", both, False),
            ("two adapters", both, True),
        ):  # fmt: skip
            pictures = []
            look = f"{BASE_STYLE} style" if mix else PLAIN
            for name, line in zip(names, lines, strict=True):
                path = self.runs / "control.png"
                image_of(line).save(path)
                controls = [f"edges={path}:1"] if controlled else []
                pictures.append(self.pictures([f"{name}, {look}"], mix, controls=controls, **self.use.drawing)[0])
            got = torch.stack(pictures)
            agreement = sum(f1(edges(p[None])[0], line) for p, line in zip(got, lines, strict=True)) / len(names)
            self.add(f"composition, {label}", {"edges": agreement})
            rows[label] = got[:10]
        self.seeds = seeds
        # The most that there is to have: the drawing itself, drawn by the base's autoencoder.
        drawn = torch.from_numpy(np.stack([drawings.pixels[where[n, "noto"]] for n in names]))
        through = self.through_autoencoder(drawn.permute(0, 3, 1, 2).float() / 127.5 - 1)
        most = sum(f1(edges(p[None])[0], line) for p, line in zip(through, lines, strict=True)) / len(names)
        self.add("composition, the drawing through the autoencoder", {"edges": most})
        for label in ("base", "two adapters"):
            without, got_with = (self.value(f"composition, {label}{x}", "edges") for x in (", no control", ""))
            share = (got_with - without) / (most - without)
            self.bars.append(bar(f"composition: of what is missing without control it brings, {label}", 0.4, share))
        self.sheet("composition", rows, names[:10])

    # -- helpers -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def through_autoencoder(self, pictures: Tensor) -> Tensor:
        vae = self.base.parts["vae"]
        latents = vae.encode(pictures.to(vae.dtype)).latent_dist.mode()
        return vae.decode(latents).sample.float().clamp(-1, 1)

    def features(self, pictures: Tensor) -> Tensor:
        return judge(self.judge, pictures, ["cat face"] * len(pictures)).features

    def add(self, name: str, values: dict[str, float]) -> None:
        self.rows += [row(name, metric, value, "s" if metric == "seconds" else "") for metric, value in values.items()]
        print(f"{time.perf_counter() - self.began:6.0f} s  {name}  {values}", file=sys.stderr)

    def value(self, name: str, metric: str) -> float:
        return next(float(r["value"]) for r in self.rows if r["name"] == name and r["metric"] == metric)

    def sheet(self, name: str, rows: dict[str, Tensor], columns: Sequence[str]) -> None:
        if self.given.sheets:
            sheet(list(rows.items()), list(columns), self.given.sheets / f"{self.given.base}-{name}.png", least=96)


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def histogram(one: Tensor, two: Tensor) -> Tensor:
    def counts(x: Tensor) -> Tensor:
        bins = ((x + 1) * 4).long().clamp(0, 7)
        return torch.bincount((bins[0] * 64 + bins[1] * 8 + bins[2]).flatten(), minlength=512) / x[0].numel()

    return (counts(one) - counts(two)).abs().sum() / 2


def teal(pictures: Tensor) -> float:
    """Share of pixels near the character's colour."""
    colour = torch.tensor([0x11, 0xAA, 0xAA]).view(1, 3, 1, 1) / 127.5 - 1
    return float(((pictures - colour).abs().amax(dim=1) < 0.35).float().mean())


def f1(one: Tensor, two: Tensor) -> float:
    """Harmonic mean of the shares of lines that have one of the other within a pixel."""
    a, b = (x[:1] > 0 for x in (one, two))
    near_a, near_b = (F.max_pool2d(x[None].float(), 3, 1, 1)[0] > 0 for x in (a, b))
    precision = float((a & near_b).sum() / a.sum().clamp(min=1))
    recall = float((b & near_a).sum() / b.sum().clamp(min=1))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


if __name__ == "__main__":
    main()
