"""Which pictures make a step, what each counts, and that how a step is cut cannot change what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_image_base import tiny_image_base
from tests.train.tiny_pictures import drawings, image_values, run
from veneer.formats.read import read
from veneer.models.image import ImageBase, load_image
from veneer.train.config import config_from
from veneer.train.image_batches import PlannedRow, hold_out, plan_image_steps, validation_rows
from veneer.train.image_encode import Encoders, ImageLoss
from veneer.train.image_loss import draw, generator, noised
from veneer.train.picture_views import plan_rows
from veneer.train.pictures import read_pictures


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="module")
def base(shared: Path) -> ImageBase:
    return load_image(str(tiny_image_base(shared, "flux1")))


def _config(shared: Path, **sections: Any) -> Any:
    return config_from(image_values(shared, shared / "out", **sections))[0]


def _steps(config: Any, make: Any = lambda rows: rows) -> tuple[Any, list[int], list[PlannedRow]]:
    pictures, _ = read_pictures(config.data)
    return plan_image_steps(plan_rows(pictures, config.data, size=32, unit=8).rows, config, make)


def test_every_picture_once_an_epoch_and_another_order_in_each(shared: Path) -> None:
    config = _config(shared, schedule={"steps": None, "epochs": 3}, batching={"rows": 4})
    steps, ends, planned = _steps(config)
    assert [len(s.rows) for s in steps] == [4, 2] * 3
    assert ends == [2, 4, 6]
    assert [s.epoch for s in steps] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    epochs = [[r.picture.name for r in planned[i : i + 6]] for i in (0, 6, 12)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert epochs[0] != epochs[1]
    assert len({row.key for row in planned}) == len(planned)


def test_a_micro_batch_has_one_shape_and_cutting_changes_no_row(shared: Path) -> None:
    whole = _steps(_config(shared, batching={"rows": 5}))
    for micro_rows in (1, 2):
        cut = _steps(_config(shared, batching={"rows": 5, "micro_rows": micro_rows}))
        assert cut[2] == whole[2]
        for a, b in zip(cut[0], whole[0], strict=True):
            assert sorted(a.rows) == sorted(b.rows)
            for micro in a.micros:
                assert len({(r.view.height, r.view.width) for r in micro.make()}) == 1
                assert micro.tokens <= micro_rows


def test_each_step_has_as_many_class_pictures_and_the_loss_is_dreambooths(shared: Path, base: ImageBase) -> None:
    """mean over instances + λ·Σ class / instances, by hand from the rows' own losses."""
    classes = drawings(shared / "classes", 3)
    data = {"class_folder": str(classes), "class_prompt": "a cat", "class_weight": 0.5, "split": 0}
    config = _config(shared, data=data, batching={"rows": 4})
    encoders = Encoders(base, config, None)
    steps, _, planned = _steps(config, encoders.batch)
    loss = ImageLoss(base, config, encoders)
    for number, step in enumerate(steps, 1):
        rows = [r for r in planned if r.key[1] == number]
        instances = [r for r in rows if not r.picture.is_class]
        assert len(rows) == 2 * len(instances)
        with torch.no_grad():
            total = sum(float(loss(m.make())) for m in step.micros) / step.trained
            each = {r.key: float(loss(encoders.batch([r]))) / r.weight for r in rows}
        by_hand = sum(each[r.key] for r in instances) / len(instances)
        by_hand += 0.5 * sum(each[r.key] for r in rows if r.picture.is_class) / len(instances)
        assert total == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("family", ["flux1", "sdxl"])
def test_k_micro_batches_are_one_batch(family: str, shared: Path, tmp_path: Path) -> None:
    """The same parameters after four steps, but for the order of float32 sums."""
    adapters = []
    for name, micro_rows in (("one", 1), ("two", 2), ("all", None)):
        result = run(
            shared, tmp_path / name, family, adapter={"dropout": 0.0}, schedule={"steps": 4},
            batching={"rows": 4, "micro_rows": micro_rows}, optimizer={"name": "sgd", "learning_rate": 1.0},
            evaluation={"every": 100, "at_start": False},
        )  # fmt: skip
        adapters.append(read(Path(result.adapter)).adapter)
    for name, pair in adapters[0].pairs.items():
        for other in adapters[1:]:
            torch.testing.assert_close(pair.B, other.pairs[name].B, rtol=1e-3, atol=2e-6)
            torch.testing.assert_close(pair.A, other.pairs[name].A, rtol=1e-3, atol=2e-6)
    assert any(pair.B.abs().max() > 1e-3 for pair in adapters[0].pairs.values())


def test_the_loss_is_the_squared_error_of_the_denoiser_itself(shared: Path, base: ImageBase) -> None:
    """By hand from the transformer, fed as diffusers' FLUX script feeds it."""
    from diffusers import FluxPipeline

    config = _config(shared)
    encoders = Encoders(base, config, None)
    _, _, planned = _steps(config)
    row = planned[0]
    batch = encoders.batch([row])
    loss = ImageLoss(base, config, encoders)
    noise, sigma = draw(batch.latents.shape[1:], [row.key], "flow", loss.times, loss.noise)
    noisy, target = noised(batch.latents, noise, sigma, "flow")
    n, c, h, w = noisy.shape
    text = encoders.text([row.caption])
    with torch.no_grad():
        out = base.denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy, n, c, h, w), timestep=sigma,
            guidance=torch.tensor([1.0]), pooled_projections=text.pooled, encoder_hidden_states=text.embeds,
            txt_ids=torch.zeros(text.embeds.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", torch.float32), return_dict=False,
        )[0]  # fmt: skip
        predicted = FluxPipeline._unpack_latents(out, h * 4, w * 4, 4)
        wanted = (predicted.double() - target.double()).square().mean()
        assert float(loss(batch)) == pytest.approx(float(wanted), rel=1e-5)


def test_a_mask_confines_the_loss_to_what_is_white(shared: Path, tmp_path: Path, base: ImageBase) -> None:
    from PIL import Image

    folder = drawings(tmp_path / "masked", 2)
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (0, 0, 20, 40))
    mask.save(folder / "0.mask.png")
    config = _config(shared, data={"pictures": str(folder), "split": 0})
    encoders = Encoders(base, config, None)
    _, _, planned = _steps(config)
    masked = next(r for r in planned if r.picture.name == "0.png")
    batch = encoders.batch([masked])
    assert batch.masks is not None
    loss = ImageLoss(base, config, encoders)
    half = batch.masks.shape[-1] // 2
    assert batch.masks[..., :half].min() == 1
    assert batch.masks[..., half:].max() == 0
    noise, sigma = draw(batch.latents.shape[1:], [masked.key], "flow", loss.times, loss.noise)
    with torch.no_grad():
        own = loss._rows(batch, noise, sigma)
        batch.masks = None
        whole = loss._rows(batch, noise, sigma)
    assert own != whole


def test_held_out_pictures_are_chosen_by_content_and_scored_alike_in_every_run(shared: Path, base: ImageBase) -> None:
    config = _config(shared)
    pictures, _ = read_pictures(config.data)
    learned, held = hold_out(pictures, 2, 0)
    again = hold_out(list(reversed(pictures)), 2, 0)
    assert {p.name for p in held} == {p.name for p in again[1]}
    assert (len(learned), len(held)) == (4, 2)
    assert hold_out(pictures, None, 0)[1] == []
    assert len(hold_out(pictures, 0.5, 0)[1]) == 3
    assert len(hold_out(pictures, 99, 0)[1]) == 5  # one is left to learn from
    rows = validation_rows(plan_rows(held, config.data, size=32, unit=8).rows, config.data, None)
    scores = []
    for other in (config, _config(shared, seed=5, loss={"logit_std": 2.0, "shift": 3.0}, batching={"micro_rows": 1})):
        score = ImageLoss(base, other, Encoders(base, other, None)).score(rows)
        assert score is not None
        scores.append(score)
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
    assert set(scores[0].extra) == {f"loss at {t}" for t in ("0.125", "0.375", "0.625", "0.875")}
    assert scores[0].loss == pytest.approx(sum(scores[0].extra.values()) / 4)
    # By hand: the mean over pictures and times of the squared error at their own noise.
    loss = ImageLoss(base, config, Encoders(base, config, None))
    errors = []
    with torch.no_grad():
        for row in rows:
            batch = loss.encoders.batch([row])
            for k, sigma in enumerate((0.125, 0.375, 0.625, 0.875)):
                noise = torch.randn(batch.latents.shape[1:], generator=generator("validation", *row.key, k))[None]
                errors.append(float(loss._rows(batch, noise, torch.tensor([sigma]))))
    assert scores[0].loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)
