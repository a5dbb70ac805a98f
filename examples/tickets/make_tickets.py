"""Write the support tickets: train.jsonl and test.jsonl, next to this file.

    python examples/tickets/make_tickets.py [--rows 1500] [--seed 7] [--output FOLDER]

A ticket consists of an issue (which determines team and product area), cues (which determine the priority)
and filler sentences. All sentences come from templates.toml, where each belongs to either `train` or `test`,
so held-out tickets share no sentence with training tickets. The same arguments give the same bytes.

Requires only Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HELD_OUT = 0.2
SHARES = {  # level of the issue -> weight of each priority
    "normal": {"urgent": 5, "high": 4, "normal": 7, "low": 4},
    "high": {"urgent": 2, "high": 3},
    "low": {"high": 1, "low": 3},
}
DETAIL = {"hardware": "device", "software": "software", "security": "software", "billing": "money"}
DETAIL |= {"logistics": "order", "success": "question"}
RAISING = ("deadline", "many", "again")


@dataclass
class Ticket:
    text: str
    team: str
    priority: str
    area: str
    templates: list[str] = field(default_factory=list)  # ids of the ticket's sentences

    def row(self, system: str) -> dict[str, Any]:
        """Return the training row: three messages; the last is the answer as compact JSON."""
        answer = {"team": self.team, "priority": self.priority, "product_area": self.area}
        return {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": self.text},
                {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
            ]
        }


def priority_of(level: str, cues: list[str]) -> str:
    """Return the priority according to the policy in README.md. Tone has no influence."""
    if "critical" in cues:
        return "urgent"
    if level == "high" or any(cue in RAISING for cue in cues):
        return "high"
    return "low" if level == "low" or "wait" in cues else "normal"


class Writer:
    """Writes tickets of one side ("train" or "test"), with its own random generator."""

    def __init__(self, spec: dict[str, Any], side: str, rng: random.Random) -> None:
        self.spec, self.side, self.rng = spec, side, rng
        self.decks: dict[str, list[int]] = {}

    def ticket(self, number: int, issue: dict[str, Any], want: str) -> Ticket:
        rng = self.rng
        self.used: list[str] = []
        self.slots: dict[str, str] = {}
        cues = self.cues_for(issue, want)
        priority = priority_of(issue["level"], cues)
        core = self.take(f"issue{number}", issue)
        told = [self.cue(name, issue) for name in cues]
        length = rng.choices(["line", "note", "letter"], [40, 42, 18])[0]
        text = {"line": self.line, "note": self.note, "letter": self.letter}[length](core, told, issue["team"])
        return Ticket(text, issue["team"], priority, issue["area"], sorted(set(self.used)))

    # -- content

    def cues_for(self, issue: dict[str, Any], want: str) -> list[str]:
        """Return the names of cues that give an issue the priority `want`."""
        rng, level = self.rng, issue["level"]
        if want == "urgent":
            return ["critical"] + rng.choices([[], ["again"], ["many"]], [6, 1, 1])[0]
        if want == "high" and level != "high":
            names = RAISING[:1] if level == "low" else RAISING
            return rng.sample(names, 2 if len(names) > 1 and rng.random() < 0.2 else 1)
        if want == "low":
            return ["wait"] if level == "normal" or rng.random() < 0.2 else []
        return ["single"] if rng.random() < 0.4 else []

    def cue(self, name: str, issue: dict[str, Any]) -> str:
        if name == "critical":
            return self.take(f"{name}.{issue['area']}", self.spec["cues"][name][issue["area"]])
        if name == "many" and issue["team"] in ("billing", "logistics"):
            name = "bulk"
        return self.take(name, self.spec["cues"][name])

    def around(self, name: str) -> str:
        node = self.spec["around"]
        for part in name.split("."):
            node = node[part]
        return self.take(name, node)

    def take(self, name: str, node: dict[str, Any]) -> str:
        """Return the next sentence from the shuffled list `node`; each is used once before any is repeated."""
        sentences: list[str] = node[self.side]
        deck = self.decks.get(name) or self.rng.sample(range(len(sentences)), len(sentences))
        index, self.decks[name] = deck[0], deck[1:]
        self.used.append(f"{name}/{self.side}/{index}")
        return self.fill(sentences[index])

    def fill(self, sentence: str) -> str:
        def slot(match: re.Match[str]) -> str:
            name = match[1]
            if name not in self.slots or name in ("person", "version"):
                self.slots[name] = self.rng.choice(self.spec["slots"][name])
            return self.slots[name]

        text = re.sub(r"\[([^\]]*\|[^\]]*)\]", lambda m: self.rng.choice(m[1].split("|")), sentence)
        text = re.sub(r"\{(\w+)\}", slot, text)
        return text[0].upper() + text[1:] if sentence.startswith("{") else text

    # -- wording

    def line(self, core: str, told: list[str], team: str) -> str:
        text = " ".join([core, *told])
        if self.rng.random() < 0.15:
            text = f"{self.around('noise')} {text}"
        if self.rng.random() < 0.4:
            text = text.lower().rstrip(".")
        return self.mistype(text)

    def note(self, core: str, told: list[str], team: str) -> str:
        rng = self.rng
        body = [core, *told]
        if rng.random() < 0.45:
            body.insert(rng.randint(1, len(body)), self.around(f"detail.{DETAIL[team]}"))
        if rng.random() < 0.25:
            body.append(self.around("aside"))
        if rng.random() < 0.12:
            body.append(self.around("noise"))
        parts = [self.around("greeting"), " ".join(body), self.around("closing"), self.name()]
        keep = [rng.random() < 0.7, True, rng.random() < 0.5, rng.random() < 0.4]
        joint = rng.choice(["\n", " ", "\n\n"])
        return self.mistype(joint.join(part for part, kept in zip(parts, keep, strict=True) if kept))

    def letter(self, core: str, told: list[str], team: str) -> str:
        rng = self.rng
        first = [self.around("opener")] if rng.random() < 0.7 else []
        detail = [self.around(f"detail.{DETAIL[team]}") for _ in range(rng.randint(1, 2))]
        matter = [core, *detail, *told]
        if told and rng.random() < 0.3:
            matter = [*told, core, *detail]
        last = [self.around("aside")]
        if rng.random() < 0.3:
            last.append(self.around("noise"))
        head = [self.around("subject")] if rng.random() < 0.3 else []
        paragraphs = [*head, self.around("greeting"), " ".join(first), " ".join(matter), " ".join(dict.fromkeys(last))]
        sign = f"{self.name()}\n{rng.choice(self.spec['slots']['job'])}"
        return self.mistype("\n\n".join([*(p for p in paragraphs if p), f"{self.around('closing')}\n{sign}"]))

    def name(self) -> str:
        person, surname = (self.rng.choice(self.spec["slots"][k]) for k in ("person", "surname"))
        return person if self.rng.random() < 0.4 else f"{person} {surname}"

    def mistype(self, text: str) -> str:
        """Misspell one to three words of about every fourth text: swap, double or omit a letter."""
        rng = self.rng
        if rng.random() > 0.25:
            return text
        words = list(re.finditer(r"[a-z]{5,}", text))
        for match in sorted(rng.sample(words, min(len(words), rng.randint(1, 3))), key=lambda m: -m.start()):
            i = rng.randrange(match.start() + 1, match.end() - 2)
            pair = text[i : i + 2]
            text = text[:i] + rng.choice([pair[::-1], pair[0] + pair, pair[1]]) + text[i + 2 :]
        return text


def priorities_of(issue: dict[str, Any]) -> list[str]:
    """Return the priorities for an issue, each repeated according to its weight.

    An invoice or a parcel is urgent only if it stops a whole site."""
    shares = dict(SHARES[issue["level"]])
    if issue["team"] in ("billing", "logistics") and issue["area"] != "subscription":
        del shares["urgent"]
    return [name for name, share in shares.items() for _ in range(share)]


def make(rows: int = 1500, seed: int = 7) -> tuple[list[Ticket], list[Ticket], str]:
    """Return (train tickets, test tickets, system prompt).

    Deterministic in (rows, seed, templates.toml)."""
    spec = tomllib.loads((HERE / "templates.toml").read_text(encoding="utf-8"))
    issues = spec["issue"]
    weights = [0.6 if issue["team"] == "success" else 1.0 for issue in issues]
    sides = []
    for side, count in (("train", rows - round(rows * HELD_OUT)), ("test", round(rows * HELD_OUT))):
        rng = random.Random(f"{seed}/{side}")
        writer = Writer(spec, side, rng)
        tickets: list[Ticket] = []
        seen: set[str] = set()
        plan: list[int] = []
        decks: dict[tuple[str, ...], list[str]] = {}
        while len(tickets) < count:
            if not plan:
                plan = [i for i, w in enumerate(weights) for _ in range(round(w * 5))]
                rng.shuffle(plan)
            number = plan.pop()
            wanted = priorities_of(issues[number])
            deck = decks.setdefault(tuple(wanted), []) or rng.sample(wanted, len(wanted))
            decks[tuple(wanted)] = deck[1:]
            ticket = writer.ticket(number, issues[number], deck[0])
            if ticket.text.lower() not in seen:
                seen.add(ticket.text.lower())
                tickets.append(ticket)
        sides.append(tickets)
    return sides[0], sides[1], spec["system"]


def jsonl(tickets: list[Ticket], system: str) -> str:
    return "".join(json.dumps(t.row(system), ensure_ascii=False) + "\n" for t in tickets)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the support tickets of the quickstart.")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    train, test, system = make(args.rows, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, tickets in (("train", train), ("test", test)):
        path = args.output / f"{name}.jsonl"
        path.write_text(jsonl(tickets, system), encoding="utf-8", newline="\n")
        print(f"{len(tickets):5d} tickets  {path}")


if __name__ == "__main__":
    main()
