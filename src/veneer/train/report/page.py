"""The report of an adapter: one HTML file with light and dark colors, without scripts or external files.

    page = Page(title=…, records=read_log(…), …)
    write_atomically(folder / "report.html", render_page(page).encode())

Curves are inline SVG. The template is `report.html.j2`, rendered with autoescaping. This module depends only
on records and numbers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import shown
from veneer.train.checkpoint import write_atomically
from veneer.train.events import TOKEN_ACCURACY, loss_text, mean_rewards
from veneer.train.report.log import short

if TYPE_CHECKING:
    from jinja2 import Environment

_Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    kind: "line", "faint" (a thin, pale line) or "dots" (a line with a mark at each point)."""

    name: str
    points: Sequence[_Point]
    kind: str = "line"
    colour: str = "a"


@dataclass
class Page:
    """The content of a report.

    `base`: name of the base. `weights`: path of the adapter's tensors. `cards`: headline numbers as (label,
    value, note). `records`: the run's log. `settings`: key -> value. `sources`: key -> origin of the value.
    `checks`: a preflight report as JSON values. `details`: (label, value). `usage`: (title, commands).
    `unit`: what is counted, tokens or pictures. `loss`: title of the loss chart. `sheets`: (title, image as
    a data URL), in the order of the run."""

    title: str = ""
    subtitle: str = ""
    base: str = ""
    weights: Path | None = None
    cards: list[tuple[str, str, str]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    details: list[tuple[str, str]] = field(default_factory=list)
    usage: list[tuple[str, str]] = field(default_factory=list)
    unit: str = "tokens"
    loss: str = "Loss, nats per trained token"
    sheets: list[tuple[str, str]] = field(default_factory=list)


def write_sweep_page(
    path: Path, title: str, rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[_Point]]
) -> None:
    """Write one page about several runs, atomically.

    rows: the `name` and the values of each run, best first. curves: name -> (step, validation loss) points."""
    from markupsafe import Markup

    best = rows[0]["name"]
    series = [Series(name, points, "faint", "b") for name, points in curves.items() if name != best and points]
    series += [Series(best, curves[best], "dots")] if curves.get(best) else []
    heads = [*dict.fromkeys(key for row in rows for key in row if key != "name")]
    drawn = Markup(chart(series, label="validation loss"))
    template = escaping("veneer.train.report").get_template("sweep.html.j2")
    write_atomically(path, template.render(title=title, rows=rows, chart=drawn, heads=heads).encode())


def palette() -> str:
    """Return the colors and fonts of all pages, as CSS variables.

    Each color has a light and a dark value."""
    return (files("veneer.train.report") / "tokens.css").read_text(encoding="utf-8")


def escaping(package: str, folder: str = ".") -> Environment:
    """Return a Jinja environment with autoescaping for the templates in a folder of a package.

    Characters that reorder or hide text are removed from all texts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    return Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: shown(x, lines=True) if isinstance(x, str) and not isinstance(x, Markup) else x,
    )


def render_page(page: Page) -> str:
    """Return the page as HTML with all texts escaped."""
    from markupsafe import Markup

    steps = [r for r in page.records if r.get("event") == "stepped"]
    scores = [r for r in page.records if r.get("event") == "evaluated"]
    notes = [r["text"] for r in page.records if r.get("event") == "note"]
    charts = [(title, Markup(svg), legend) for title, svg, legend in _charts(steps, scores, page)]
    table, sections = _score_table(scores), _sections(page)
    template = escaping("veneer.train.report").get_template("report.html.j2")
    return template.render(page=page, charts=charts, scores=table, notes=notes, sections=sections)


def _score_table(scores: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[Mapping[str, Any], list[str]]]]:
    """Return (metric names of the evaluations, [(record, formatted values)]).

    The metrics are loss and perplexity, or rewards."""
    rewards = [mean_rewards(r.get("extra", {})) for r in scores]
    if any(each is not None for each in rewards):
        heads = list(dict.fromkeys(name for each in rewards for name in each or ()))
        cells = [[f"{each[name]:.3f}" if each and name in each else "" for name in heads] for each in rewards]
        return heads, list(zip(scores, cells, strict=True))
    likely = any(r["perplexity"] is not None for r in scores)
    cells = [[loss_text(r["loss"]), *([f"{r['perplexity']:.3f}"] if likely else [])] for r in scores]
    return ["loss", *["perplexity"] * likely], list(zip(scores, cells, strict=True))


def _charts(
    steps: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], page: Page
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return (title, SVG, legend) of each chart.

    If the run has rewards, the first chart shows the mean reward, otherwise the loss."""
    out = []
    for i, (title, lines, marked) in enumerate(_curves(steps, scores, page) if steps else ()):
        from_zero = i > 0 and title not in ("Learning rate", "Loss")
        svg = chart(lines, wide=i == 0, marked=marked, label=title, from_zero=from_zero)
        legend = [(s.name, s.colour + "-faint" * (s.kind == "faint")) for s in lines] if len(lines) > 1 else []
        out.append((title, svg, legend))
    return out


def _curves(
    steps: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], page: Page
) -> Iterator[tuple[str, list[Series], _Point | None]]:
    """Yield (title, lines, point to mark with a ring or None) for each chart."""
    rewards = [means for r in steps if (means := mean_rewards(r.get("extra", {}))) is not None]
    main = {"reward": _MEASURED["reward"]} if rewards else {"loss": page.loss}
    main |= {f"reward_{name}": f"Reward: {name}" for means in rewards for name in means if name != "reward"}
    for name, title in main.items():
        training, validation = _points(name, steps), _points(name, scores)
        weights = [r["learned_tokens"] for r in steps] if name == "loss" else [1.0] * len(training)
        lines = [Series("training, each step", training, "faint")]
        lines.append(Series("training, smoothed", smooth(training, weights)))
        lines += [Series("validation", validation, "dots", "b")] * bool(validation)
        best = _points(name, [r for r in scores if r.get("best")][-1:])
        yield title, lines, best[0] if best else None
    if rewards:
        yield "Loss", [Series("Loss", _points("loss", steps))], None
    sampled = any("drawn_tokens" in r.get("extra", {}) for r in steps)
    for title, value in (
        ("Learning rate", lambda r: r["learning_rate"]),
        ("Gradient norm, before clipping", lambda r: r["gradient_norm"]),
        (f"{'Sampled ' * sampled}{page.unit} per second".capitalize(), _speed),
        ("Peak memory, GB", lambda r: r["memory_bytes"] * 1e-9),
    ):
        yield title, [Series(title, [(float(r["step"]), float(value(r))) for r in steps])], None
    for name, title in _MEASURED.items():
        points = _points(name, steps)
        if points and not (rewards and name == "reward"):
            yield title, [Series(title, smooth(points, [1.0] * len(points)))], None


def _points(name: str, records: Sequence[Mapping[str, Any]]) -> list[_Point]:
    """Return (step, value) for each record that has the metric."""
    values = [(r["step"], r["loss"] if name == "loss" else r.get("extra", {}).get(name)) for r in records]
    return [(float(step), float(value)) for step, value in values if value is not None]


_MEASURED = {
    TOKEN_ACCURACY: "Share of tokens that were the most likely token",
    "reward_margin": "Reward margin of chosen over rejected",
    "reward_accuracy": "Share of pairs ranked correctly",
    "logp_chosen": "Log-probability of chosen answers, nats",
    "logp_rejected": "Log-probability of rejected answers, nats",
    "reward": "Reward, mean over the sampled completions",
    "reward_failed": "Answers that could not be scored",
    "gap_mean": "Sampler-trainer mismatch: mean difference of log-probabilities, nats",
    "gap_max": "Sampler-trainer mismatch: largest difference, nats",
    "gap_kl": "Sampler-trainer mismatch: estimate of the KL, nats per token",
    "drift": "Drift since sampling: mean difference of log-probabilities, nats",
    "answer_tokens": "Tokens per answer",
    "cut_share": "Share of answers cut at the token limit",
    "constant_share": "Share of groups with equal rewards",
    "kl": "Divergence from the reference, nats per token",
    "teacher_kl": "Divergence from the teacher, nats per token",
    "clipped": "Share of tokens outside the clip range",
}
"""Metrics of a text run's steps -> chart titles. The loss is not included."""


def _speed(record: Mapping[str, Any]) -> float:
    """Return tokens per second: only sampled tokens, if the step sampled completions."""
    sampled_tokens = record.get("extra", {}).get("drawn_tokens")
    if sampled_tokens is None:
        return float(record["tokens_per_second"])
    return float(sampled_tokens / record["seconds"]) if record["seconds"] else 0.0


def smooth(points: Sequence[_Point], weights: Sequence[float]) -> list[_Point]:
    """Return the weighted mean at each point over a trailing window of 1/50 of the points."""
    window = max(1, len(points) // 50)
    out = []
    for i in range(len(points)):
        first = max(0, i - window + 1)
        total = sum(weights[first : i + 1])
        mean = sum(y * w for (_, y), w in zip(points[first : i + 1], weights[first : i + 1], strict=True))
        out.append((points[i][0], mean / total if total else points[i][1]))
    return out


def chart(
    series: Sequence[Series],
    *,
    wide: bool = True,
    marked: _Point | None = None,
    label: str = "",
    from_zero: bool = False,
) -> str:
    """Return an SVG chart of lines over steps, with axes, a grid, and a ring around the point `marked`.

    The colors come from the page's CSS."""
    width, height, left, bottom, top, right = (900, 300, 58, 28, 12, 14) if wide else (430, 190, 54, 26, 10, 12)
    points = [p for s in series for p in s.points if all(map(math.isfinite, p))]
    if not points:
        return ""
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    y0 = min(0.0, y0) if from_zero else y0
    ticks = nice_ticks(y0, y1, 5 if wide else 4)
    y0, y1 = min(y0, ticks[0]), max(y1, ticks[-1])
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def at(p: _Point) -> _Point:
        x = left + (p[0] - x0) / (x1 - x0) * (width - left - right)
        return x, top + (y1 - p[1]) / (y1 - y0) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">']
    for tick in ticks:
        y = at((x0, tick))[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in nice_ticks(x0, x1, 8 if wide else 4):
        if x0 <= tick <= x1 and tick == int(tick):
            x = at((tick, y0))[0]
            parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{int(tick)}</text>')
    for s in series:
        positions = [at(p) for p in _every_nth(s.points, 2 * width)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in positions)
        faint = " faint" if s.kind == "faint" else ""
        parts.append(f'<path class="line {s.colour}{faint}" d="{path}"/>')
        if s.kind == "dots" or len(positions) == 1:
            for (x, y), (step, value) in zip(positions, _every_nth(s.points, 2 * width), strict=True):
                title = f"<title>step {step:.0f}: {loss_text(value)}</title>"
                parts.append(f'<circle class="dot {s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>')
    if marked is not None:
        x, y = at(marked)
        title = f"<title>best: step {marked[0]:.0f}, {loss_text(marked[1])}</title>"
        parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7">{title}</circle>')
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that cover [low, high].

    The distance between two numbers is 1, 2, 2.5 or 5 times a power of ten."""
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(largest, 1e-3):  # the line is almost flat: use a band around the value
        half = max(largest / 2, 1e-6)
        low, high = low - half, high + half
    span = high - low
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e3:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:,.4g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _every_nth(points: Sequence[_Point], most: int) -> Sequence[_Point]:
    """Thin the points to about `most`, including the last point.

    More points would not be visible, because a chart has fewer pixels in width."""
    if len(points) <= most:
        return points
    every = math.ceil(len(points) / most)
    return [*points[::every], *([points[-1]] if (len(points) - 1) % every else [])]


def _sections(page: Page) -> list[tuple[str, list[tuple[str, str, str, bool]]]]:
    """Return (section, [(key, value, source, is a default)]) in the configuration's order."""
    out: dict[str, list[tuple[str, str, str, bool]]] = {}
    for key, value in page.settings.items():
        section, _, name = key.rpartition(".")
        source = page.sources.get(key, "")
        out.setdefault(section or "run", []).append((name, short(value), source, source.startswith("default")))
    return list(out.items())
