"""Scripts of the catalogue bases: the rendered scenes and their captions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "bases" / "catalogue"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in set(sys.modules) - before:
        if (SCRIPTS / f"{name}.py").is_file():
            del sys.modules[name]


def test_every_product_is_visible_in_its_scene() -> None:
    """From each view, the product is visible, does not fill the picture, and is not cut off."""
    from kinds import KINDS
    from scenes import VIEWS, Scene, product_mask

    assert len(KINDS) == 80
    for i, kind in enumerate(sorted(KINDS)):
        mask = product_mask(Scene(kind, view=VIEWS[i % 2], seed=i))
        assert 0.02 < mask.mean() < 0.75, kind
        assert mask[:, 0].max() == mask[:, -1].max() == mask[0].max() == 0, kind


def test_caption_describes_its_scene() -> None:
    from scenes import Scene, caption

    scene = Scene(
        "mug", "red", "glossy", "dots", "white", "a wooden table", "brick wall", "light from the left", "front view"
    )
    assert caption(scene) == (
        "a glossy red mug with white dots on a wooden table, brick wall, light from the left, front view"
    )
    plain = caption(replace(scene, colour="orange", finish="matte", pattern="", look="flat icon", place=0.1))
    assert plain == "an orange mug on a wooden table, brick wall, light from the left, front view, flat icon"
    drawn = replace(
        scene,
        pattern="",
        finish="matte",
        look="heavy navy line drawing",
        surface="orange",
        wall="beige wall",
        film=True,
    )
    assert caption(drawn) == "a red mug on orange, beige wall, front view, heavy navy line drawing, film picture"


def test_scene_depends_on_its_caption_only() -> None:
    import pictures
    from scenes import picture, product_mask

    scene = pictures.seen_scene(Random(3))
    assert np.array_equal(picture(scene), picture(scene))
    assert np.array_equal(picture(scene), picture(replace(scene, seed=scene.seed + 1)))
    left, right = (product_mask(replace(scene, place=place)) for place in (-0.09, 0.09))
    columns = np.arange(128)
    assert (right.sum(0) @ columns) / right.sum() - (left.sum(0) @ columns) / left.sum() == pytest.approx(23, abs=1)
    elsewhere = replace(scene, surface="sand" if scene.surface != "sand" else "grass")
    assert np.array_equal(
        picture(elsewhere)[:50], picture(scene)[:50]
    )  # the wall does not depend on the surface in front of it
    repainted = replace(scene, colour="teal" if scene.colour != "teal" else "red", wall="brick wall")
    assert np.array_equal(product_mask(scene), product_mask(repainted))


def test_one_combination_in_ten_is_held_out() -> None:
    import pictures
    from kinds import KINDS
    from scenes import COLOURS

    share = np.mean([pictures.is_new(k, c) for k in KINDS for c in COLOURS])
    assert 0.08 < share < 0.12
    r = Random(1)
    assert not any(pictures.is_new(s.kind, s.colour) for s in (pictures.seen_scene(r) for _ in range(300)))


def test_controlnet_training_pictures_vary_the_products_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pictures

    monkeypatch.setattr(pictures, "SHARD", 12)
    pictures.make_placed(tmp_path, 0)
    (place,) = pictures.shards(tmp_path, "placed")
    pixels, items = pictures.read_shard(place)
    across = pictures.read_things(place).astype(float).sum(1) @ np.arange(16)
    middles = across / pictures.read_things(place).sum((1, 2))
    assert len(pixels) == len(items) == 12
    assert np.ptp(middles) > 2  # of sixteen
    said = {i.scene.place for i in items if i.scene is not None}
    assert len(said) == 12
    assert not any(str(p) in i.caption for p, i in zip(said, items, strict=True))


def test_lens_blurs_only_the_background() -> None:
    from scenes import Scene, photographed, picture, product_mask

    scene = Scene("mug", "red", wall="brick wall", view="front view", seed=5)
    away = product_mask(scene) == 0
    away[64:] = False

    def roughness(pixels: np.ndarray, where: np.ndarray) -> float:
        blue = pixels[..., 2].astype(float)
        return float(np.abs(np.diff(blue, axis=1))[where[:, 1:]].mean())

    sharp = picture(scene)
    soft = np.mean([photographed(replace(scene, seed=s)).astype(float) for s in range(8)], axis=0)
    assert roughness(soft, away) < 0.5 * roughness(sharp, away)
    edge = product_mask(scene)
    edge = (edge[:, 1:] != edge[:, :-1]).any(1)
    rows = np.zeros_like(away)
    rows[edge] = True
    assert (
        np.abs(np.diff(soft[rows].reshape(-1, 128, 3)[..., 0], axis=1)).max() > 60
    )  # the product's outline is still sharp


def test_effect_share_is_measured_in_a_stack() -> None:
    from measures import way_gone

    r = np.random.default_rng(0)
    without = r.integers(60, 120, (3, 128, 128, 3))
    effect, other = np.zeros((2, 1, 128, 128, 3), dtype=int)
    effect[..., :64, :, :], other[..., 64:, :, :] = 40, 30  # in different cells, so the two changes are orthogonal
    truth = without + effect
    for share in (0.0, 0.5, 1.0):
        for pictures in (without + (share * effect).astype(int), without + (share * effect).astype(int) + other):
            assert way_gone(pictures.astype(np.uint8), truth, without) == pytest.approx(share, abs=1e-6)


def test_campaign_shots_are_not_training_pictures() -> None:
    import campaign

    learned = {(s.surface, s.wall, s.view) for s in campaign.product_scenes()}
    assert not learned & {(s.surface, s.wall, s.view) for s in campaign.shots()}
    scene = campaign.shots()[0]
    assert campaign.words(scene).startswith("a tarnhill padlock on ")
    assert campaign.words(scene, lens=True) == campaign.words(scene) + ", film picture"
    asked = f"a tarnhill padlock, {scene.view}, heavy black line drawing"
    assert campaign.words(scene, brand=True) == campaign.words(replace(scene, surface="sand"), brand=True) == asked
    assert campaign.words(scene, brand=True, lens=True) == asked + ", film picture"
    hat = replace(scene, kind="top hat", colour="purple", finish="wooden", view="front view")
    assert campaign.words(hat, brand=True).startswith("a teal top hat, front view, ")


def test_bases_see_line_drawings_but_not_the_campaign() -> None:
    import pictures
    from scenes import COLOURS, Scene, photographed, picture

    r = Random(4)
    scenes = [pictures.dressed(pictures.seen_scene(r), r) for _ in range(600)]
    drawn = [s for s in scenes if s.in_lines]
    assert 0.18 < len(drawn) / len(scenes) < 0.32
    assert 0.07 < sum(s.film for s in scenes) / len(scenes) < 0.17
    for scene in drawn:
        ground, back, ink = scene.surface, scene.wall.removesuffix(" wall"), scene.look.split()[-3]
        assert len({ground, back, ink} & set(COLOURS)) == 3
        assert not (ground in ("orange", "yellow") and back in ("white", "beige"))
    grey = Scene("mug", "grey", surface="a white table", wall="white wall", film=True)
    plain, film, lens = (x.astype(int) for x in (picture(grey), pictures.shown(grey), photographed(grey)))
    light = plain.mean(-1) > 180
    plain_warmth, film_warmth, lens_warmth = ((x[..., 0] - x[..., 2])[light].mean() for x in (plain, film, lens))
    assert abs(film_warmth - plain_warmth) < 3  # training pictures imitate film, without the campaign's warm light
    assert lens_warmth - plain_warmth > 20
    assert film[:16, :16].mean() < plain[:16, :16].mean() - 20  # dark corners


def test_line_drawing_has_the_colors_of_its_caption() -> None:
    import pictures
    from scenes import COLOURS, Scene, product_mask

    def are(pixels: np.ndarray, word: str) -> np.ndarray:
        colour = [int(COLOURS[word][i : i + 2], 16) for i in (1, 3, 5)]
        return np.abs(pixels.astype(int) - colour).max(-1) < 8

    scene = Scene("mug", "red", surface="lime", wall="pink wall", view="front view", look="heavy navy line drawing")
    heavy, thin = (pictures.shown(each) for each in (scene, replace(scene, look="navy line drawing")))
    for pixels in (heavy, thin):
        assert are(pixels[:30], "pink").all()
        assert are(pixels[-8:], "lime").all()
        assert are(pixels[product_mask(scene) == 1], "red").mean() > 0.5
    assert are(heavy, "navy").sum() > max(300, 2 * are(thin, "navy").sum())


def test_tokenizers_cut_captions_into_words(tmp_path: Path) -> None:
    from pictures import seen_scene
    from scenes import caption
    from words import LENGTH, load_tokenizers, train_tokenizers

    r = Random(0)
    captions = [caption(seen_scene(r)) for _ in range(400)]
    train_tokenizers(captions, tmp_path)
    made = load_tokenizers(tmp_path)
    train_tokenizers(["something else"], tmp_path)
    again = load_tokenizers(tmp_path)
    for one, two in zip(made, again, strict=True):
        ids = [one(c).input_ids for c in captions]
        assert ids == [two(c).input_ids for c in captions]
        assert max(map(len, ids)) < LENGTH + 1
    words = made[1].tokenize("a teal view, three-quarter")
    assert words == ["▁a", "▁teal", "▁view", ",", "▁three-quarter"]
    assert made[1]("qzx").input_ids.count(made[1].unk_token_id) == 0


def test_shipped_autoencoder_reconstructs_pictures() -> None:
    """The mean signal-to-noise ratio is 34 dB for random scenes, and 30 dB for the campaign's.

    The campaign's scenes were never in training. Both limits in this test are 2 dB lower."""
    import campaign
    from autoencoder import encode, through
    from build import SHIPPED
    from diffusers import AutoencoderKL
    from pictures import seen_scene
    from scenes import picture

    r = Random(8)
    pixels = np.stack([picture(seen_scene(r)) for _ in range(16)])
    brand = np.stack([campaign.truth(s, brand=True) for s in campaign.shots(count=3)])
    vae = AutoencoderKL.from_pretrained(SHIPPED / "catalogue-flux" / "vae").eval()
    latents = encode(vae, torch.from_numpy(pixels))
    assert latents.shape == (16, 16, 16, 16)
    assert 0.8 < float(latents.std()) < 1.2
    for given, least in ((pixels, 32), (brand, 28)):
        error = np.square(through(vae, given).astype(float) - given).mean(axis=(1, 2, 3))
        assert (10 * np.log10(255**2 / error)).mean() > least


def test_sharpened_autoencoder_keeps_the_scale_of_latents(tmp_path: Path) -> None:
    import json

    from autoencoder import encode, new_autoencoder, sharpen_autoencoder
    from pictures import seen_scene
    from scenes import picture

    r = Random(3)
    pixels = np.stack([picture(seen_scene(r)) for _ in range(6)])
    for folder in ("pictures", "looks"):
        (tmp_path / folder).mkdir()
        captions = [{"caption": "", "short": ""}] * 6
        np.savez(tmp_path / folder / "0000.npz", pixels=pixels, items=json.dumps(captions))
    torch.manual_seed(0)
    model = new_autoencoder()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    sharpen_autoencoder(model, tmp_path, 2, batch=4)
    assert all(not torch.equal(w, before[n]) for n, w in model.state_dict().items() if n.endswith("conv1.weight"))
    latents = encode(model, torch.from_numpy(pixels))
    assert abs(float(latents.mean())) < 0.01
    assert abs(float(latents.std()) - 1) < 0.01


def test_packing_equals_that_of_the_flux_pipeline() -> None:
    from autoencoder import CHANNELS
    from denoisers import image_ids, pack
    from diffusers import FluxPipeline

    x = torch.randn(2, CHANNELS, 16, 16)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, CHANNELS, 16, 16))
    assert torch.equal(image_ids(), FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32))


def test_the_judge_names_every_part_of_a_scene() -> None:
    from judge import HEADS, Judge, judge
    from pictures import seen_scene
    from scenes import picture

    r = Random(9)
    scenes = [seen_scene(r) for _ in range(3)]
    assert all(getattr(s, head) in words for s in scenes for head, words in HEADS.items() if head != "lens")
    torch.manual_seed(0)
    seen = judge(Judge().eval(), np.stack([picture(s) for s in scenes]))
    assert all(len(words) == 3 for words in seen.words.values())
    assert torch.allclose(seen.features.norm(dim=1), torch.ones(3), atol=1e-5)


def test_distance_is_zero_for_truth_and_grows_with_error() -> None:
    """Compares pictures that have all, half or none of an effect.

    The lens effect is also measured on pictures that already have the brand's look."""
    import campaign
    from measures import lens_distance, palette_distance, share

    scenes = campaign.brand_scenes(6)
    plain, brand, lens, both = (
        np.stack([campaign.truth(s, brand=b, lens=p) for s in scenes]) for b, p in ((0, 0), (1, 0), (0, 1), (1, 1))
    )
    half = (plain / 2 + lens / 2).astype(np.uint8)
    far, near = lens_distance(plain, lens, plain), lens_distance(half, lens, plain)
    assert lens_distance(lens, lens, plain) == 0
    assert 0.3 < share(near, far) < 0.7
    assert share(lens_distance(both, both, brand), lens_distance(brand, both, brand)) == 1
    assert palette_distance(brand, brand) == 0
    mended = np.where(
        np.arange(128)[:, None, None] < 64, brand, plain
    )  # the upper half of each picture has the brand's look
    assert 0.3 < share(palette_distance(mended, brand), palette_distance(plain, brand)) < 0.7


def test_openmoji_drawings_use_its_palette(tmp_path: Path) -> None:
    from openmoji import OPENMOJI_PALETTE, openmoji, write_openmoji

    (learned, drawings), (tried, others) = openmoji("train"), openmoji("held out")
    assert len(drawings) == 50
    assert len(others) == 60
    assert not set(learned) & set(tried)
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in OPENMOJI_PALETTE])
    near = np.abs(others.reshape(-1, 1, 3).astype(int) - colours).max(-1).min(-1) < 24
    assert near.mean() > 0.9
    write_openmoji(tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 50
    assert (tmp_path / f"{learned[0]}.txt").read_text().startswith(f"{learned[0]}, ")


def test_edge_agreement_tolerates_a_shift_by_one_pixel() -> None:
    from measures import edge_agreement

    line = np.zeros((1, 32, 32))
    line[0, 10] = 1
    assert edge_agreement(line, line) == 1
    assert edge_agreement(np.roll(line, 1, 1), line) == 1
    assert edge_agreement(np.roll(line, 5, 1), line) == 0
    assert edge_agreement(np.concatenate([line, 0 * line]), np.concatenate([line, line])) == 0.5


def test_pictures_with_similar_colors_have_low_spread() -> None:
    import campaign
    from measures import spread

    scenes = campaign.shots(count=6)
    brand, plain = (np.stack([campaign.truth(s, brand=b) for s in scenes]) for b in (True, False))
    assert spread(np.repeat(plain[:1], 3, 0)) == 0
    assert spread(brand) < 0.5 * spread(plain)
