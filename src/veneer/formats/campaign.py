"""The recipe `campaign`: how a product, a brand and a photographer's lens act on one picture together.

Who stacks them says which adapter plays which role (`lock:0.8@campaign=product`). What a role means stands here alone:
for bases that predict so, what would be written behind the `@` by hand (`strengths`), blocks, steps or both; "" acts in
the plain sum. `strengths.in_campaign` reads it for a base.
"""

from __future__ import annotations

from collections.abc import Mapping

CAMPAIGN_ROLES = ("product", "brand", "lens")

CAMPAIGN: Mapping[str, Mapping[str, str]] = {
    "flow": {"product": "", "brand": "double=0.5,single=0.7", "lens": "steps=0.4-1"},
    "noise": {"product": "", "brand": "", "lens": "steps=0.4-1"},
}
"""What bases predict -> role -> its factors. The lens waits until what is drawn is decided. On a flow the brand gives
way, most of all in the blocks that have text and picture in streams of their own, where that is decided.
benchmarks/image_campaign.py measures it beside other ways (docs/image-proof.md)."""
