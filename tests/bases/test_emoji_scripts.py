"""The scripts that make the emoji bases: what they say of themselves, on a few synthetic drawings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

SCRIPTS = Path(__file__).resolve().parents[2] / "bases" / "emoji"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in set(sys.modules) - before:
        if (SCRIPTS / f"{name}.py").is_file():
            del sys.modules[name]


CAPTIONS = ["face, noto", "red heart", "face with tears of joy, fluent style", "pizza"] * 4


def test_one_name_in_ten_is_held_out_whatever_its_style() -> None:
    from drawings import is_held_out

    names = [f"thing {i}" for i in range(5000)]
    share = sum(map(is_held_out, names)) / len(names)
    assert 0.08 < share < 0.12
    assert [is_held_out(n) for n in names] == [is_held_out(n) for n in names]


def test_a_drawing_is_on_white_and_of_the_size_asked_for() -> None:
    from drawings import draw

    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="4" height="8" fill="#f00"/></svg>'
    picture = draw(svg, 16)
    assert picture.shape == (16, 16, 3)
    assert (picture[:, :8] == [255, 0, 0]).all()
    assert (picture[:, 8:] == 255).all()


def test_lines_go_around_shapes_and_change_nothing_else() -> None:
    """A line is 1.6 of 64 pixels and fits on the picture; a shape that has a line of its own keeps it."""
    from drawings import draw, lined

    box = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{}</svg>'
    red = box.format('<rect width="32" height="32" fill="#f00"/>')
    with_lines = draw(lined(red)).astype(int)
    black = 1 - with_lines.max(axis=-1).mean() / 255
    assert 0.08 < black < 0.11  # a frame: 4 x 61 x 1.6 of 4,096 pixels are 9.5%
    assert with_lines[32, 32].tolist() == draw(red)[32, 32].tolist() == [255, 0, 0]
    assert with_lines[1, 32].max() < 100  # at the edge of the picture too, none of it cut off
    blue = box.format('<circle cx="16" cy="16" r="8" fill="#fff" stroke="#00f" stroke-width="2"/>')
    assert (draw(lined(blue)).max(axis=-1) < 100).sum() == 0


def test_edges_are_white_lines_on_black_where_colours_meet() -> None:
    from edges import edges

    picture = np.full((1, 32, 32, 3), 255, dtype=np.uint8)
    picture[:, :, 16:] = 0
    lines = edges(picture)
    assert lines.shape == (1, 3, 32, 32)
    assert set(lines.unique().tolist()) == {-1.0, 1.0}
    columns = (lines[0, 0] > 0).any(dim=0).nonzero().flatten()
    assert len(columns) > 0
    assert all(14 <= c <= 17 for c in columns.tolist())
    same = edges(torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.equal(same, lines)


def test_tokenizers_read_and_give_back_what_they_were_made_from(tmp_path: Path) -> None:
    from words import LENGTH, clip_tokenizer, t5_tokenizer

    for made in (clip_tokenizer(CAPTIONS), t5_tokenizer(CAPTIONS)):
        made.save_pretrained(tmp_path)
        read = type(made).from_pretrained(tmp_path)
        assert read.model_max_length == LENGTH
        for text in CAPTIONS[:2]:
            ids = read(text).input_ids
            assert ids == made(text).input_ids
            assert ids[-1] == read.eos_token_id
        assert read(CAPTIONS[0]).input_ids != read(CAPTIONS[1]).input_ids


def test_packing_is_the_pipelines(tmp_path: Path) -> None:
    from denoisers import image_ids, pack
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 16, 16)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 16, 16))
    assert torch.equal(image_ids(), FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32))


def test_short_attention_is_attention() -> None:
    from denoisers import short_attention
    from torch.nn import functional as F

    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with short_attention():
        assert torch.allclose(F.scaled_dot_product_attention(q, k, v), want, atol=1e-6)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), causal)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), want)


@pytest.mark.parametrize("muon", [False, True])
def test_an_interrupted_stage_ends_as_if_it_had_not_been(muon: bool, tmp_path: Path) -> None:
    from steps import optimise

    def run(state: Path, stops: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 4))

        def loss(step: int, generator: torch.Generator) -> Tensor:
            if step == stops:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=generator)
            return (model(x.view(8, 1, 2, 2)) - x).square().mean()

        settings: dict[str, Any] = {"steps": 12, "learning_rate": 0.1, "warmup": 2, "save_every": 4, "state": state}
        settings["muon"] = muon
        try:
            optimise({"model": model}, loss, **settings)
        except KeyboardInterrupt:
            assert stops is not None
        return model.state_dict()

    whole = run(tmp_path / "whole.pt", None)
    run(tmp_path / "cut.pt", 9)
    again = run(tmp_path / "cut.pt", None)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_muon_moves_matrices_and_kernels_as_far_in_every_direction(tmp_path: Path) -> None:
    """A step along a gradient G = U·diag(s)·Vᵀ is near 0.2·√(longer side)·rate·U·Vᵀ whatever s is (arXiv 2502.16982;
    five iterations bring singular values of 0.01 … 1 to about 0.7 … 1.2). Kernels as (out, the rest), whatever their
    memory format; a vector by AdamW, its sign times the rate."""
    from steps import optimise

    torch.manual_seed(0)
    model = nn.ModuleDict({"kernel": nn.Conv2d(3, 8, 3), "matrix": nn.Linear(8, 24)})
    model["kernel"].to(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    turns, gradients = {}, {}
    for name in ("kernel.weight", "matrix.weight"):
        out, rest = before[name].flatten(1).shape
        u, v = (torch.linalg.qr(torch.randn(n, 8))[0] for n in (out, rest))
        turns[name] = u @ v.T
        gradients[name] = (u * torch.logspace(0, -2, 8) @ v.T).view_as(before[name])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        weights = dict(model.named_parameters())
        return sum((weights[n] * g).sum() for n, g in gradients.items()) + weights["matrix.bias"].sum()  # type: ignore

    rate = 0.1
    optimise({"m": model}, loss, steps=1, learning_rate=rate, warmup=1, weight_decay=1e-9, muon=True,
             state=tmp_path / "s.pt")  # fmt: skip
    kept = torch.load(tmp_path / "s.pt", weights_only=True)["weights"]
    for name, turn in turns.items():
        change = (before[name] - kept[f"m.{name}"]).flatten(1) / (rate * 0.2 * max(turn.shape) ** 0.5)
        sizes = torch.linalg.svdvals(change)[:8]
        assert ((sizes > 0.6) & (sizes < 1.3)).all(), (name, sizes)
        assert torch.nn.functional.cosine_similarity(change.flatten(), turn.flatten(), dim=0) > 0.97, name
    assert torch.allclose(before["matrix.bias"] - kept["m.matrix.bias"], torch.tensor(rate), rtol=1e-3)


def test_tokenizers_are_kept_with_what_was_trained_with_them(tmp_path: Path) -> None:
    from words import kept_tokenizers

    made = kept_tokenizers(CAPTIONS, tmp_path)
    again = kept_tokenizers(["something else"], tmp_path)
    for one, two in zip(made, again, strict=True):
        assert all(one(c).input_ids == two(c).input_ids for c in CAPTIONS)


def test_the_judge_ranks_the_name_it_was_taught(tmp_path: Path) -> None:
    from judge import STYLES, Judge, judge

    torch.manual_seed(0)
    model = Judge(["red", "blue"]).eval()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x = torch.stack([torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])])[:, :, None, None].expand(2, 3, 64, 64)
    for _ in range(15):
        scores, _, features, body = model(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores, torch.tensor([0, 1])).backward()
        optimizer.step()
    verdict = judge(model, x, ["red", "blue"])
    assert verdict.rank.tolist() == [0, 0]
    assert judge(model, x, ["blue", "red"]).rank.tolist() == [1, 1]
    assert verdict.style.shape == (2, len(STYLES))
    assert all(torch.allclose(each.norm(dim=1), torch.ones(2), atol=1e-5) for each in (features, body))


@pytest.mark.parametrize(("base", "least"), [("emoji-flux", -1.0), ("emoji-sdxl", 0.0)])
def test_a_sheet_gives_each_pipeline_its_lines_as_the_controlnet_learned_them(
    base: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX' takes a tensor as it is, for an autoencoder of -1 … 1; SDXL's ControlNet reads 0 … 1."""
    import contact

    given: dict[str, Any] = {}

    class Pipeline:
        def __init__(self, **parts: Any) -> None:
            self.components = parts

        def set_progress_bar_config(self, **options: Any) -> None:
            pass

        def __call__(self, prompts: list[str], **options: Any) -> Any:
            given.update(options)
            return type("Out", (), {"images": torch.zeros(len(prompts), 3, 64, 64)})

    class Control:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            return None

    for name in ("FluxControlNetPipeline", "ControlledSDXL"):
        monkeypatch.setattr(contact, name, Pipeline)
    for name in ("FluxControlNetModel", "ControlNetModel"):
        monkeypatch.setattr(contact, name, Control)
    lines = torch.full((1, 3, 64, 64), -1.0)
    lines[:, :, 20] = 1.0
    contact.controlled(Pipeline(), base, ["grinning face"], lines, 1.0)
    told = given["control_image" if base == "emoji-flux" else "image"]
    assert sorted(told.unique().tolist()) == [least, 1.0]
