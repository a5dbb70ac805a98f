"""Sliders: the paper's loss formula, effects proportional to strength, runs without pictures, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny_image_base import tiny_image_base
from tests.train.stopping import interrupt_at
from tests.train.text.tiny_runs import merged
from tests.train.tiny_pictures import drawings
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.errors import BaseError, ConfigError, Interrupted, PreflightError, TargetError
from veneer.formats.read import read
from veneer.models.image.base import ImageBase, load_image
from veneer.models.image.predict import alphas_cumprod, embed_prompts, predict
from veneer.plan.tables import device_named
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.load import config_from, load_config
from veneer.train.events import Checked, Event, Note, Resolved
from veneer.train.image.batches import PlannedRow
from veneer.train.image.encode import Encoders
from veneer.train.image.loss import noised, sample_noise
from veneer.train.image.preflight import adapter_components
from veneer.train.image.run import run_images
from veneer.train.image.save import ImageResult
from veneer.train.image.slider import SignedBatch, SliderLoss
from veneer.train.planning import plan_of_config
from veneer.train.run import NAME

ROOT = Path(__file__).resolve().parents[3]
WORDS = {"positive": "a red house", "negative": "a blue house", "target": "a house"}


def settings(folder: Path, output: Path, family: str, **sections: Any) -> tuple[ImageTrainConfig, Any]:
    values: dict[str, Any] = {
        "base": str(tiny_image_base(folder, family)),
        "output": str(output),
        "adapter": {"rank": 4, "alpha": 4.0},
        "slider": {**WORDS, "scenes": 4},
        "optimizer": {"learning_rate": 3e-3},
        "batching": {"rows": 2},
        "schedule": {"steps": 4},
        "samples": {"steps": 2},
        "checkpoint": {"every": 2},
        "data": {"cache": str(folder / f"cache-{family}")},
    }
    config, sources = config_from(merged(values, sections))
    return config, sources


def run(folder: Path, output: Path, family: str, *, on_event: Any = None, **given: Any) -> ImageResult:
    options = {key: given.pop(key) for key in ("resume", "dry_run", "base") if key in given}
    config, sources = settings(folder, output, family, **given)
    return run_images(config, on_event=on_event or (lambda event: None), sources=sources, **options)


def attached(base: ImageBase, config: ImageTrainConfig, attachment: Attachment, amount: float = 0.1) -> None:
    """Attach an adapter with nonzero B, as after training."""
    name = base.row.denoiser
    module, spec = adapter_components(base, config)[name]
    g = torch.Generator().manual_seed(5)
    made = create(module, spec, seed=0).mapped(lambda t: t + amount * torch.randn(t.shape, generator=g))
    attachment.add(NAME, made.renamed(lambda n: f"{name}.{n}"), trainable=True)


@pytest.mark.parametrize("preserve", [(), ("tall", "flat")])
@pytest.mark.parametrize("family", ["flux1", "sdxl"])
def test_slider_loss_equals_the_papers_formula(shared: Path, family: str, preserve: tuple[str, ...]) -> None:
    """The loss of each row is eq. 8 of arXiv 2311.12092, with one preserved prompt p per row:

    ‖ε_θ(x_t, c) − ε(x_t, c) ∓ η·(ε(x_t, (c₊, p)) − ε(x_t, (c₋, p)))‖²"""
    config, _ = settings(shared, shared / "unused", family, slider={"guidance": 2.5, "preserve": list(preserve)})
    base = load_image(config.base.name)
    view: Any = None
    rows = [PlannedRow(view, view, "", 1.0, (0, 1, i)) for i in range(6 if preserve else 1)]
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(len(rows), base.part("vae").config.latent_channels, 4, 4, generator=g)
    sizes, used = torch.tensor([[32.0, 32, 0, 0, 32, 32]]), set()
    alphas = None if base.prediction == "flow" else alphas_cumprod(base).cpu()
    with attach(base.model) as attachment:
        attached(base, config, attachment)
        loss = SliderLoss(
            base, config, Encoders(base, config, None), adapter_off=attachment.using, attachment=attachment
        )
        for i, row in enumerate(rows):
            noise, time = sample_noise(latents.shape[1:], [row.key], base.prediction, loss.times, loss.noise)
            x = noised(latents[i : i + 1], noise, time, base.prediction, alphas)[0]
            own = predicted_noise(base, attachment, (), x, time, "a house", sizes)
            steps = []
            for p in preserve or ("",):
                ends = [f"{end}, {p}".rstrip(", ") for end in ("a red house", "a blue house")]
                more, less = (predicted_noise(base, attachment, (), x, time, prompt, sizes) for prompt in ends)
                steps.append(more - less)
            for sign in (1.0, -1.0):
                found = loss(SignedBatch(latents[i : i + 1], None, sizes, torch.ones(1), [row], sign=sign)).detach()
                now = predicted_noise(base, attachment, ((NAME, sign),), x, time, "a house", sizes)
                by_p = [(now - own - sign * 2.5 * step).square().mean() for step in steps]
                nearest = min(range(len(by_p)), key=lambda n: abs(float(by_p[n] - found)))
                torch.testing.assert_close(found, by_p[nearest], rtol=1e-4, atol=1e-8)
                used.add(nearest)
    assert len(used) == max(1, len(preserve))


@torch.no_grad()
def predicted_noise(
    base: ImageBase, attachment: Attachment, mix: Any, x: Tensor, time: Tensor, prompt: str, sizes: Tensor
) -> Tensor:
    """Return the denoiser's ε for one row, with the mix active and the guidance used for generation."""
    guidance = 3.5 if base.denoiser.config.get("guidance_embeds") else None
    with attachment.using(*mix):
        text = embed_prompts(base, [prompt])
        given = sizes[:1] if base.row.time_ids else None
        return predict(base, x, time, text, sizes=given, guidance=guidance)


@pytest.mark.parametrize("family", ["flux1", pytest.param("sd15", marks=pytest.mark.slow)])
def test_slider_effect_follows_strength_and_sign(shared: Path, family: str, tmp_path: Path) -> None:
    """The prediction moves along the slider's direction: monotonically in strength, symmetrically near 0."""
    base = load_image(str(tiny_image_base(shared, family)))
    result = run(
        shared,
        tmp_path / "out",
        family,
        base=base,
        slider={"guidance": 2.0, "target": ""},
        schedule={"steps": 20, "name": "constant"},
        optimizer={"learning_rate": 1e-2},
        adapter={"targets": "all-linear"},
    )
    g = torch.Generator().manual_seed(9)
    x = torch.randn(4, base.part("vae").config.latent_channels, 4, 4, generator=g)
    time = torch.tensor([0.6 if base.prediction == "flow" else 600])

    def spoken(mix: Any, prompt: str) -> Tensor:
        return torch.cat(
            [predicted_noise(base, attachment, mix, one[None], time, prompt, torch.zeros(1, 6)) for one in x]
        )

    with attach(base.model) as attachment:
        attachment.add(NAME, read(Path(result.adapter)).adapter)
        direction = spoken((), WORDS["positive"]) - spoken((), WORDS["negative"])
        still = spoken((), "")
        strengths = (-2.0, -1.0, -0.25, 0.25, 1.0, 2.0)
        moved = [spoken(((NAME, s),), "") - still for s in strengths]
        effects = [float((m * direction).sum() / direction.square().sum()) for m in moved]
    assert effects == sorted(effects)
    assert effects[1] < -0.5 < 0.5 < effects[4]
    assert abs(effects[2] + effects[3]) < 0.15 * effects[3]


def test_slider_run_resumes_bit_for_bit(shared: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    whole = run(shared, tmp_path / "whole", "flux1", on_event=seen.append)
    assert (whole.steps, whole.pictures, whole.validation) == (4, 16, None)  # each step: 2 rows, each with both signs
    settled = next(e for e in seen if isinstance(e, Resolved))
    assert settled.settings["slider.positive"] == "a red house"
    with Image.open(whole.samples[-1]) as sheet:  # the prompt is the target; one column per strength
        assert sheet.width > 5 * 32

    with pytest.raises(Interrupted):
        run(shared, tmp_path / "cut", "flux1", on_event=interrupt_at(3))
    seen.clear()
    resumed = run(shared, tmp_path / "cut", "flux1", resume=True, on_event=seen.append)
    assert resumed.digest == whole.digest
    assert not any("drew" in e.text for e in seen if isinstance(e, Note))  # the scenes exist already


def test_dry_run_generates_one_scene_outside_the_output(shared: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    long = {"positive": "a red house " * 20}
    result = run(shared, tmp_path / "dry", "flux1", dry_run=True, on_event=seen.append, slider=long)
    assert result.dry_run
    assert not (tmp_path / "dry").exists()
    assert any("the base generated 1 scene " in e.text for e in seen if isinstance(e, Note))
    assert any("1 slider prompt longer than the base reads" in e.text for e in seen if isinstance(e, Checked))


def test_recomputed_activations_have_the_same_strength(shared: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"samples": {"prompts": []}, "schedule": {"steps": 2}}
    found = [
        run(shared, tmp_path / mode, "flux1", memory={"activation_checkpointing": mode}, **given)
        for mode in ("off", "on")
    ]
    pairs = [read(Path(result.adapter)).adapter.pairs for result in found]
    for name, pair in pairs[0].items():
        torch.testing.assert_close(pairs[1][name].B, pair.B, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"slider": {"positive": None}}, "`slider.positive` is required with `slider.negative`"),
        ({"data": {"pictures": "x"}}, "`data.pictures`: a slider trains without pictures"),
        ({"slider": {"strengths": []}}, "`slider.strengths` is empty"),
        ({"slider": {"strengths": [1, -20000]}}, "a column of the sample sheets is -20000"),
        ({"adapter": {"text_encoders": ["text_encoder"]}}, "a slider, which trains the denoiser only"),
        ({"loss": {"guidance": 2.0}}, "`loss.guidance`: a slider trains without pictures"),
        ({"data": {"resolution": [32, 64]}}, "`data.resolution` must be one number for a slider"),
    ],
)
def test_invalid_slider_is_refused(shared: Path, tmp_path: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(shared, tmp_path, "flux1", **given)
    assert says in str(caught.value)


def test_slider_keys_need_the_prompts(tmp_path: Path) -> None:
    values = {"base": "x", "output": str(tmp_path), "data": {"pictures": "y"}, "slider": {"guidance": 2.0}}
    with pytest.raises(ConfigError, match=r"`slider.guidance` needs `slider.positive` and `slider.negative`"):
        config_from(values)


def test_equal_slider_prompts_are_refused_before_step_one(shared: Path, tmp_path: Path) -> None:
    long = "a house " * 200  # longer than any encoder's limit
    given = {"positive": f"{long} red", "negative": f"{long} blue", "scenes": 1}
    with pytest.raises(PreflightError, match="the same encoding in this base, so there is no direction"):
        run(shared, tmp_path / "out", "flux1", slider=given)


def test_editing_base_is_refused_before_scenes_are_generated(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="edits pictures, and a slider needs a base that generates"):
        run(shared, tmp_path / "out", "kontext")
    assert not list(tmp_path.rglob("scene-*.png"))


def test_unknown_targets_stop_before_scenes_are_generated(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        run(shared, tmp_path / "out", "flux1", adapter={"targets": "nowhere"}, data={"cache": str(tmp_path / "c")})
    assert not (tmp_path / "c" / "scenes").exists()


@pytest.mark.parametrize("name", ["slider", "lokr"])
def test_the_examples_run(name: str, shared: Path, tmp_path: Path) -> None:
    overrides = [f"base={tiny_image_base(shared, 'flux1')}", f"output={tmp_path / name}", "schedule.steps=2"]
    if name == "slider":
        overrides += ["slider.scenes=1", "samples.steps=2", "samples.every=null"]
    else:
        overrides += [f"data.pictures={drawings(tmp_path / 'drawings')}"]
    config, sources = load_config(ROOT / "examples" / "images" / f"{name}.yaml", overrides)
    result = run_images(config, on_event=lambda event: None, sources=sources)
    found = read(Path(result.adapter)).adapter
    assert bool(found.deltas) == (name == "lokr")
    assert bool(result.samples) == (name == "slider")


def test_plan_counts_scenes_signs_and_base_forwards() -> None:
    card = device_named("rtx-4090-24gb")
    file = ROOT / "examples" / "images" / "slider.yaml"
    made = plan_of_config(load_config(file, ["base=flux.1-dev", "base.quantize=nf4", "schedule.steps=10"])[0], card)
    assert (made.job.rows, made.job.total_steps, made.job.batch) == (24, 10, 8)
    assert "in both directions" in dict(made.facts)["note"]
    assert made.seconds is not None
