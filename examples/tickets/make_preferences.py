"""Write preferences-train.jsonl and preferences-test.jsonl: pairs of replies.

    python examples/tickets/make_preferences.py [--check]

The chosen reply is short and polite. The rejected reply is long, curt, or both, so that neither the length
nor one polite word is enough to recognize the chosen reply. Tickets come from train.jsonl and test.jsonl, and
the content of a reply follows from the ticket's routing. No reply sentence occurs in both files. The output is
deterministic. `--check` compares the files with the output and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SYSTEM = "Reply to this customer of Tarnhill."
SIDES = {"train": 240, "test": 80}

POLITE = {
    "train": [
        "Thank you for writing to us.",
        "Thank you for telling us about this.",
        "We are sorry for the trouble.",
        "Thanks for letting us know, and we apologize.",
        "We appreciate that you got in touch.",
    ],
    "test": [
        "Many thanks for your message.",
        "Please accept our apologies for this.",
        "Thank you, it is kind of you to report it.",
    ],
}
ACTS = {
    "train": {
        "hardware": ["A technician will look at the {product} {when}.", "We will have the {product} repaired {when}."],
        "software": ["Our developers will look into the {product} {when}.", "We will find this fault {when}."],
        "billing": ["Our billing team will check your account {when}.", "We will correct the invoice {when}."],
        "logistics": ["We will trace your parcel {when}.", "Our warehouse will settle the delivery {when}."],
        "security": ["Our security team will call you {when}.", "We will review who had access {when}."],
        "success": ["A colleague will answer your question {when}.", "We will send you the details {when}."],
    },
    "test": {
        "hardware": ["Someone will come and see to the {product} {when}."],
        "software": ["We will get the {product} working again {when}."],
        "billing": ["We will put the charge right {when}."],
        "logistics": ["You will hear where your order is {when}."],
        "security": ["We will secure your site {when}."],
        "success": ["You will have our advice on the {product} {when}."],
    },
}
WHEN = {"urgent": "at once", "high": "today", "normal": "tomorrow", "low": "this week"}
CURT = {
    "train": [
        "Read the manual before you write to us.",
        "This is not our problem.",
        "You must have used it the wrong way.",
        "We have more important things to do.",
        "Wait until it is your turn.",
        "Nobody else complains.",
    ],
    "test": ["Stop bothering the support desk.", "Whatever it is, you broke it.", "Next time look it up yourself."],
}
RAMBLING = {
    "train": [
        "Tarnhill was founded many years ago with the aim of making buildings smarter, and since then our devices have "
        "been installed in offices, schools and laboratories in a great number of countries.",
        "As you may know, our portfolio comprises gateways, panels, sensors, locks and software, all of which are "
        "developed in close cooperation with partners and tested over long periods before they are released.",
        "There are, generally speaking, many different reasons why something of this kind can happen, and it is not "
        "always possible to say in advance which of them applies in a given case.",
        "It may be of interest to you that we publish a newsletter in which new functions, events and stories from "
        "other customers are presented at length every month.",
        "In addition, we would like to point out that our terms and conditions, our data protection notice and our "
        "service descriptions are available on our website in several languages.",
        "Furthermore, before anything else can be considered, a number of internal steps have to be gone through, "
        "which involve several departments and the order of which is laid down in our process handbook.",
    ],
    "test": [
        "Our company regards itself as a pioneer of connected buildings, and it has received a number of awards for "
        "the design of its products, which are described in detail in our annual brochure.",
        "In principle a request such as yours passes through various stages, each of which has its own criteria, and "
        "an overview of these stages can be found in the appendix to the framework agreement.",
        "On another note, our regional roadshow will visit several cities in the spring, where all product lines will "
        "be demonstrated and lectures will be given by experts from the industry.",
    ],
}


def pairs(side: str) -> list[dict[str, Any]]:
    """Return the rows of "train" or "test", in the order of their tickets."""
    lines = (HERE / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
    rng = random.Random(f"preferences {side}")
    rows = []
    for line in sorted(rng.sample(lines, SIDES[side]), key=lines.index):
        _, asked, answer = json.loads(line)["messages"]
        prompt = [{"role": "system", "content": SYSTEM}, asked]
        chosen, rejected = replies(side, json.loads(answer["content"]), rng)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def replies(side: str, route: dict[str, str], rng: random.Random) -> tuple[str, str]:
    """Return (chosen reply, rejected reply) for a ticket with this routing."""
    product, when = route["product_area"].replace("_", " "), WHEN[route["priority"]]
    act = rng.choice(ACTS[side][route["team"]]).format(product=product, when=when)
    polite, curt = rng.choice(POLITE[side]), rng.choice(CURT[side])
    long = rng.sample(RAMBLING[side], 3)
    kind = rng.choice(["long", "curt", "both"])
    parts = {"long": [polite, *long, act], "curt": [curt, act], "both": [curt, *long, act]}[kind]
    return f"{polite} {act}", " ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the preferences.")
    parser.add_argument("--check", action="store_true", help="compare with what is there, write nothing")
    check = parser.parse_args(argv).check
    for side in SIDES:
        path = HERE / f"preferences-{side}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs(side))
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not what this script writes: run it without --check")


if __name__ == "__main__":
    main()
