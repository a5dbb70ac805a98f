"""Reading cards: gains, previews, samples and prompts; unexpected content is tolerated."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import pytest

from veneer.library.describe_files import (
    AdapterDescription,
    card_picture,
    card_prompt,
    card_sample,
    content_of,
    gain_of,
)


def test_gain_is_the_relative_change_of_the_loss() -> None:
    gain = gain_of({"metrics": {"validation_loss_before": 2.5, "validation_loss": 1.5}})
    assert gain.share == pytest.approx(1.5 / 2.5 - 1)
    assert str(gain) == "held-out loss 2.5 → 1.5 (−40 %)"
    below = gain_of({"metrics": {"validation_loss_before": -0.5, "validation_loss": -0.7}})
    assert below.share is None
    assert str(below) == "held-out loss -0.5 → -0.7"
    for before, after in ((-0.25, -0.75), (0.5, 0.0)):
        metrics = {"validation_loss_before": before, "validation_loss": after, "measured": {"reward_failed": 0.0}}
        rewarded = gain_of({"metrics": metrics})
        assert rewarded.share is None
        assert str(rewarded) == f"held-out reward {-before:.4g} → {abs(after):.4g}"


@pytest.mark.parametrize(
    "metrics",
    [None, [], {}, {"validation_loss": 1.0}, {"validation_loss_before": 1.0, "validation_loss": "low"},
     {"validation_loss_before": True, "validation_loss": 1}, {"validation_loss_before": 10**400, "validation_loss": 1},
     {"validation_loss_before": float("nan"), "validation_loss": 1.0}],
)  # fmt: skip
def test_cards_without_both_losses_have_no_gain(metrics: Any) -> None:
    assert gain_of({"metrics": metrics}) is None
    assert AdapterDescription(card={"metrics": metrics, "rank": "8"}).figures() == {"rank": 0, "gain": None}


def test_previews_are_images_of_allowed_types() -> None:
    data = random.Random(1).randbytes(300)
    text = base64.b64encode(data).decode()

    def preview(thumbnail: Any) -> Any:
        return card_picture({"extra": {"thumbnail": thumbnail}})

    assert preview(f"data:image/jpeg;base64,{text}") == ("image/jpeg", data)
    assert preview(f"data:image/png;base64,{text}") == ("image/png", data)
    for other in (
        f"data:image/svg+xml;base64,{text}",
        f"data:text/html;base64,{text}",
        "https://there/x.png",
        None,
        7,
        f"data:image/png;base64,{text}!",
        "data:image/png;base64,A",
    ):
        assert preview(other) is None
    assert card_picture({"extra": []}) is None


def test_an_incomplete_sample_is_ignored() -> None:
    whole = {"prompt": "p", "base": "b", "adapter": "a"}
    assert card_sample({"extra": {"sample": {**whole, "more": 1}}}) == whole
    for sample in (None, [], {}, {"prompt": "p", "base": "b"}, {**whole, "base": 3}):
        assert card_sample({"extra": {"sample": sample}}) is None


def test_a_card_prompt_is_messages_or_a_text() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    assert card_prompt({"extra": {"sample": {"prompt": "Where?", "messages": messages}}}) == messages
    assert card_prompt({"extra": {"sample": {"prompt": "Where?", "base": "b"}}}) == messages[1:]
    for sample in (None, [], {}, {"prompt": 3}, {"messages": [{"role": "user"}]}, {"messages": [3]}):
        assert card_prompt({"extra": {"sample": sample}}) == []
    assert card_prompt({"extra": []}) == []


def test_search_ignores_thumbnails() -> None:
    words = AdapterDescription(card={"extra": {"thumbnail": "data:image/png;base64,QUJD"}, "base": "org/B"}).columns(0)
    assert words["words"].split() == ["org/b"]


def test_the_library_keeps_the_tensors_of_mlx_lm_folders(tmp_path: Path) -> None:
    """If both tensor files exist, the library keeps PEFT's and drops mlx-lm's."""
    for name in ("adapter_config.json", "adapters.safetensors", "0000100_adapters.safetensors"):
        (tmp_path / name).write_text("{}")
    found = content_of(tmp_path)
    assert set(found.files) == {"adapter_config.json", "adapters.safetensors"}
    assert found.left_out == ["0000100_adapters.safetensors"]
    (tmp_path / "adapter_model.safetensors").write_text("{}")
    assert content_of(tmp_path).left_out == ["0000100_adapters.safetensors", "adapters.safetensors"]
