"""The recipe `campaign`: how a product, a brand and a photographer's lens act on one picture together.

Who stacks them says which adapter plays which role (`lock:0.8@campaign=product`). What a role means stands here alone:
for bases that predict so, what would be written behind the `@` by hand (`strengths`), blocks, steps or both; "" acts in
the plain sum. `strengths.in_campaign` reads it for a base.
"""

from __future__ import annotations

from collections.abc import Mapping

CAMPAIGN_ROLES = ("product", "brand", "lens")

CAMPAIGN: Mapping[str, Mapping[str, str]] = {
    "flow": {"product": "steps=0-0.6", "brand": "", "lens": "steps=0.4-1"},
    "noise": {"product": "steps=0-0.6", "brand": "", "lens": "steps=0.4-1"},
}
"""What bases predict -> role -> its factors. Apart in time: what is drawn is decided in the first steps, light and
grain in the last. benchmarks/image_campaign.py
measures it beside the plain sum and other ways (docs/image-proof.md)."""
