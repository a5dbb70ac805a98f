"""The `campaign` recipe: roles of product, brand and lens adapters in a picture.

The caller assigns roles (`lock:0.8@campaign=product`). A role expands to the factors that a user would write
after the `@` (`strengths`): blocks, steps or both, by the base's prediction type; "" means the plain sum.
`strengths.in_campaign` applies the table to a base.
"""

from __future__ import annotations

from collections.abc import Mapping

CAMPAIGN_ROLES = ("product", "brand", "lens")

CAMPAIGN: Mapping[str, Mapping[str, str]] = {
    "flow": {"product": "", "brand": "double=0.5,single=0.7", "lens": "steps=0.4-1"},
    "noise": {"product": "", "brand": "", "lens": "steps=0.4-1"},
}
"""Prediction type -> role -> its factors.

The lens starts after the content of the picture is determined. On flow bases the brand is weaker, most of all
in the double-stream blocks, which determine the content. benchmarks/image_campaign.py compares this recipe
with others (docs/image-proof.md)."""
