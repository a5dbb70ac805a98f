"""The pictures of a step and their weights.

Dividing a step into micro-batches does not change the step's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.image_twins import latent_shape
from tests.tiny_image_base import tiny_image_base
from tests.train.tiny_pictures import drawings, image_values
from veneer.errors import DataError
from veneer.models.image.base import ImageBase, load_image, pipeline
from veneer.models.image.schedulers import make_scheduler
from veneer.train.config.load import config_from
from veneer.train.image.augmentation import plan_rows
from veneer.train.image.batches import PlannedRow, plan_image_steps, planned_rows, validation_rows
from veneer.train.image.encode import Encoders, ImageLoss, time_distribution
from veneer.train.image.loss import generator, noised, sample_noise, shifted
from veneer.train.image.pictures import read_pictures, split_pictures


def _config(shared: Path, **sections: Any) -> Any:
    return config_from(image_values(shared, shared / "out", **sections))[0]


def _steps(config: Any, make: Any = lambda rows: rows) -> tuple[Any, list[int], list[PlannedRow]]:
    pictures, _ = read_pictures(config.data)
    steps = plan_image_steps(plan_rows(pictures, config.data, size=32, unit=8).rows, config, make)
    return steps, steps.ends, list(planned_rows(steps))


def test_each_epoch_has_every_picture_in_another_order(shared: Path) -> None:
    config = _config(shared, schedule={"steps": None, "epochs": 3}, batching={"rows": 4})
    steps, ends, planned = _steps(config)
    assert [len(s.rows) for s in steps] == [4, 2] * 3
    assert ends == [2, 4, 6]
    assert [s.epoch for s in steps] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    epochs = [[r.picture.name for r in planned[i : i + 6]] for i in (0, 6, 12)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert epochs[0] != epochs[1]
    assert len({row.key for row in planned}) == len(planned)


def test_micro_batches_have_one_shape_and_equal_rows(shared: Path) -> None:
    whole = _steps(_config(shared, batching={"rows": 5}))
    for micro_rows in (1, 2):
        cut = _steps(_config(shared, batching={"rows": 5, "micro_rows": micro_rows}))
        assert cut[2] == whole[2]
        for a, b in zip(cut[0], whole[0], strict=True):
            assert sorted(a.rows) == sorted(b.rows)
            for micro in a.micros:
                assert len({(r.view.height, r.view.width) for r in micro.make()}) == 1
                assert micro.tokens <= micro_rows


def test_loss_with_class_pictures_equals_dreambooths(shared: Path, base: ImageBase) -> None:
    """The reference, computed by hand from each row's loss, is mean over instances + λ·Σ class / instances."""
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


def test_loss_is_the_denoisers_squared_error(shared: Path, base: ImageBase) -> None:
    """The reference calls the transformer as diffusers' FLUX script does."""
    from diffusers import FluxPipeline

    config = _config(shared)
    encoders = Encoders(base, config, None)
    _, _, planned = _steps(config)
    row = planned[0]
    batch = encoders.batch([row])
    loss = ImageLoss(base, config, encoders)
    noise, sigma = sample_noise(batch.latents.shape[1:], [row.key], "flow", loss.times, loss.noise)
    noisy, target = noised(batch.latents, noise, sigma, "flow")
    n, c, h, w = noisy.shape
    text = encoders.text([row.caption])
    with torch.no_grad():
        out = base.denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy, n, c, h, w),
            timestep=sigma,
            guidance=torch.tensor([1.0]),
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embeds,
            txt_ids=torch.zeros(text.embeds.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        predicted = FluxPipeline._unpack_latents(out, h * 4, w * 4, 4)
        wanted = (predicted.double() - target.double()).square().mean()
        assert float(loss(batch)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sdxl_loss_equals_that_of_diffusers_script(kind: str, shared: Path, tmp_path: Path) -> None:
    """train_text_to_image_lora_sdxl.py is rebuilt here from diffusers' scheduler and functions.

    Covers min-SNR, noise offset, time ids of a cropped and mirrored picture, and masks as a weighted mean.
    """
    import json
    import shutil

    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr
    from PIL import Image

    copied = Path(shutil.copytree(tiny_image_base(shared, "sdxl"), tmp_path / "sdxl"))
    file = copied / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": kind}))
    base = load_image(str(copied))
    folder = drawings(tmp_path / "drawings", 4)
    Image.linear_gradient("L").resize((48, 32)).save(folder / "1.mask.png")
    data = {"pictures": str(folder), "split": 0, "flip": True, "crop": "random", "buckets": False}
    config = _config(shared, data=data, loss={"snr_gamma": 5.0, "noise_offset": 0.1}, batching={"rows": 4})
    encoders = Encoders(base, config, None)
    loss = ImageLoss(base, config, encoders)
    steps, _, planned = _steps(config, encoders.batch)
    scheduler = DDPMScheduler.from_config(base.parts["scheduler"].config)
    rows = [row for row in planned if row.key[1] == 1]
    assert {row.view.flip for row in rows} == {True, False}
    assert any(row.view.left for row in rows)
    by_hand = 0.0
    for row in rows:
        batch = encoders.batch([row])
        noise, t = sample_noise(batch.latents.shape[1:], [row.key], base.prediction, loss.times, loss.noise)
        view, (width, height) = row.view, row.picture.size
        left = view.resized[0] - view.width - view.left if view.flip else view.left
        ids = torch.tensor([[height, width, view.top, left, view.height, view.width]])
        text = encoders.text([row.caption])
        with torch.no_grad():
            out = base.denoiser(
                scheduler.add_noise(batch.latents, noise, t),
                t,
                text.embeds,
                added_cond_kwargs={"text_embeds": text.pooled, "time_ids": ids},
            ).sample
        target = noise if kind == "epsilon" else scheduler.get_velocity(batch.latents, noise, t)
        error = (out - target).double().square()
        weights = torch.ones_like(error) if batch.masks is None else batch.masks.double().expand_as(error)
        snr = compute_snr(scheduler, t).double()
        least = snr.clamp(max=5.0) / (snr if kind == "epsilon" else snr + 1)
        by_hand += float(least * (error * weights).sum() / weights.sum())
    with torch.no_grad():
        got = sum(float(loss(m.make())) for m in steps[0].micros) / steps[0].trained
    assert got == pytest.approx(by_hand / len(rows), rel=1e-4)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl as it was trained", "sd3"])
def test_a_dropped_caption_is_the_pipelines_empty_prompt(family: str, live: bool, shared: Path, tmp_path: Path) -> None:
    """SDXL's pipeline uses zeros as the empty prompt unless its index says otherwise; the other pipelines encode
    an empty text."""
    import shutil

    folder = tiny_image_base(shared, family.partition(" ")[0])
    if family != folder.name.removeprefix("tiny-"):
        folder = Path(shutil.copytree(folder, tmp_path / "sdxl"))
        index = folder / "model_index.json"
        index.write_text(
            index.read_text().replace('"force_zeros_for_empty_prompt": true', '"force_zeros_for_empty_prompt": false')
        )
    base = load_image(str(folder))
    config = _config(shared, adapter={"text_encoders": ["text_encoder"] if live else []})
    more = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 24} if base.family.startswith("sd3") else {}
    given = pipeline(base).encode_prompt(
        prompt="a red house", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **more
    )
    with torch.no_grad():
        text = Encoders(base, config, None).text(["", "a red house"])
    torch.testing.assert_close(text.embeds[0], given[1][0])
    torch.testing.assert_close(text.embeds[1], given[0][0])
    assert bool(text.embeds[0].any()) == (family != "sdxl")
    if len(given) == 4:
        torch.testing.assert_close(text.pooled, torch.cat([given[3], given[2]]))


def test_changed_tokenizer_or_quantization_misses_the_text_cache(shared: Path, tmp_path: Path) -> None:
    """Covers a tokenizer with a shorter maximum, and quantized text encoders."""
    base = load_image(str(tiny_image_base(shared, "flux1")))
    config = _config(shared)

    def cached() -> tuple[int, int]:
        encoders = Encoders(base, config, tmp_path)
        return encoders.text(["a red house"]).embeds.shape[1], encoders.texts.hits

    assert [cached(), cached()] == [(24, 0), (24, 1)]
    base.parts["tokenizer_2"].model_max_length = 12
    assert [cached(), cached()] == [(12, 0), (12, 1)]
    base.quantized = "nf4"
    assert cached() == (12, 0)


@pytest.mark.parametrize("family", ["flux1", "sd3", "klein", "qwen-image", "z-image"])
def test_shift_by_resolution_counts_denoiser_tokens(family: str, shared: Path) -> None:
    base = load_image(str(tiny_image_base(shared, family)))
    times = time_distribution(base, _config(shared, loss={"shift": "resolution"}))
    seen: list[int] = []
    counting = replace(times, shift=lambda tokens: float(seen.append(tokens) or 1.0))
    sample_noise(latent_shape(base, 64, 96), [(0, 0, 0)], "flow", counting)
    assert seen == [64 // base.unit * (96 // base.unit)]


@pytest.mark.parametrize("family", ["flux1", "schnell", "sd3", "qwen-image", "z-image"])
def test_times_are_shifted_as_in_diffusers_scripts(family: str, shared: Path) -> None:
    """The scripts choose one of the scheduler's 1,000 timesteps after the scheduler's fixed shift."""
    base = load_image(str(tiny_image_base(shared, family)))
    scheduler = make_scheduler(base)
    times = time_distribution(base, _config(shared))
    assert not callable(times.shift)
    even = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(shifted(even, times.shift).float(), scheduler.timesteps / 1000, rtol=1e-5, atol=1e-6)
    assert time_distribution(base, _config(shared, loss={"shift": 1.5})).shift == 1.5


def test_held_out_pictures_have_equal_scores_in_every_run(shared: Path, base: ImageBase) -> None:
    config = _config(shared)
    pictures, _ = read_pictures(config.data)
    learned, held = split_pictures(pictures, 2, 0)
    again = split_pictures(list(reversed(pictures)), 2, 0)
    assert {p.name for p in held} == {p.name for p in again[1]}
    assert (len(learned), len(held)) == (4, 2)
    assert split_pictures(pictures, None, 0)[1] == []
    assert len(split_pictures(pictures, 0.5, 0)[1]) == 3
    assert len(split_pictures(pictures, 0.05, 0)[1]) == 1
    with pytest.raises(DataError, match="holds out 6 pictures of 6: nothing is left to train on"):
        split_pictures(pictures, 6, 0)
    rows = validation_rows(plan_rows(held, config.data, size=32, unit=8).rows, config.data, None)
    scores = []
    for other in (
        config,
        _config(shared, seed=5, loss={"timesteps": "uniform", "shift": 3.0}, batching={"micro_rows": 1}),
    ):
        score = ImageLoss(base, other, Encoders(base, other, None)).score(rows)
        scores.append(score)
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
    assert set(scores[0].extra) == {f"loss at {t}" for t in ("0.125", "0.375", "0.625", "0.875")}
    assert scores[0].loss == pytest.approx(sum(scores[0].extra.values()) / 4)
    # by hand: the mean squared error over pictures and timesteps, each pair with its own noise
    loss = ImageLoss(base, config, Encoders(base, config, None))
    errors = []
    with torch.no_grad():
        for row in rows:
            batch = loss.encoders.batch([row])
            for k, sigma in enumerate((0.125, 0.375, 0.625, 0.875)):
                noise = torch.randn(batch.latents.shape[1:], generator=generator("validation", *row.key, k))[None]
                errors.append(float(loss.row_errors(batch, noise, torch.tensor([sigma]))))
    assert scores[0].loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_keep_guidance_keeps_the_bases_guidance(shared: Path, base: ImageBase) -> None:
    """With keep_guidance 4, the base's error is the same as at guidance 1; with guidance 4, the error differs.

    Then an adapter that moves every prediction by a constant is compared with the same adapter at guidance 1.
    """
    config = _config(shared)
    kept, told = (_config(shared, loss={key: 4.0}) for key in ("keep_guidance", "guidance"))
    encoders = Encoders(base, config, None)
    _, _, planned = _steps(config)
    batch = encoders.batch(planned[:2])
    plain = ImageLoss(base, config, encoders)
    noise, sigma = sample_noise(batch.latents.shape[1:], [r.key for r in planned[:2]], "flow", plain.times, plain.noise)
    moves: list[float] = []

    @contextmanager
    def bare() -> Iterator[None]:
        moves.append(moved.pop())
        yield
        moved.append(moves[-1])

    moved = [0.0]
    forward = base.denoiser.forward

    def adapted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (out[0] + sum(moved),)

    base.denoiser.forward = adapted
    try:
        with torch.no_grad():
            want = plain.row_errors(batch, noise, sigma)
            loss = ImageLoss(base, kept, encoders, adapter_off=bare)
            assert torch.allclose(loss.row_errors(batch, noise, sigma), want, rtol=1e-4)
            assert not torch.allclose(ImageLoss(base, told, encoders).row_errors(batch, noise, sigma), want, rtol=1e-3)
            moved[0] = 0.5
            assert torch.allclose(
                loss.row_errors(batch, noise, sigma), plain.row_errors(batch, noise, sigma), rtol=1e-4
            )
        assert loss.guidance == 4.0
        assert moves == [0.0, 0.5]
    finally:
        base.denoiser.forward = forward


def test_partly_kept_guidance_is_linear(shared: Path, base: ImageBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the model is linear in guidance, guidance 4 with keep_guidance 2 equals guidance 3 alone."""
    part, less = (_config(shared, loss=told) for told in ({"guidance": 4.0, "keep_guidance": 2.0}, {"guidance": 3.0}))
    encoders = Encoders(base, part, None)
    batch = encoders.batch(_steps(part)[2][:2])
    loss = ImageLoss(base, part, encoders)
    noise, sigma = sample_noise(batch.latents.shape[1:], [r.key for r in batch.rows], "flow", loss.times, loss.noise)

    def linear(hidden_states: torch.Tensor, guidance: torch.Tensor, **_: Any) -> Any:
        return (hidden_states + guidance.view(-1, 1, 1) * hidden_states.cos(),)

    monkeypatch.setattr(base.denoiser, "forward", linear)
    errors = loss.row_errors(batch, noise, sigma)
    assert torch.allclose(errors, ImageLoss(base, less, encoders).row_errors(batch, noise, sigma), rtol=1e-4)
    assert not torch.allclose(
        errors, ImageLoss(base, _config(shared), encoders).row_errors(batch, noise, sigma), rtol=1e-2
    )
