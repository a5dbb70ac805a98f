"""Runs on pairs of pictures with tiny editing bases.

Results depend on the source picture, and invalid pairs are refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.image_twins import levels
from tests.tiny_image_base import LENGTH, qwen_edit_pipeline, small_references, tiny_image_base
from tests.train.tiny_pictures import drawings, image_values, run
from veneer.core.attach import attach
from veneer.errors import PreflightError
from veneer.formats.read import read
from veneer.models.image.base import ImageBase, load_image
from veneer.models.image.generate import ImageRow, MixPlan, PictureSettings, generate_images
from veneer.models.image.predict import encode_pictures
from veneer.plan.image import ImageLoad, image_counts
from veneer.plan.tables import base_config
from veneer.train.config.load import ImageTrainConfig, config_from
from veneer.train.events import Event, Note
from veneer.train.image.augmentation import plan_rows, sample_row, source_view
from veneer.train.image.batches import PlannedRow
from veneer.train.image.checks import check_pictures
from veneer.train.image.encode import Encoders
from veneer.train.image.pictures import read_pictures

pytestmark = [pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")]


@pytest.fixture(scope="module")
def pairs(shared: Path) -> Path:
    """Write six drawings, with their negatives as source pictures. Return the folder."""
    folder = drawings(shared / "pairs")
    for path in folder.glob("?.png"):
        negative = Image.fromarray(255 - np.asarray(Image.open(path)))
        negative.save(path.with_suffix(".before.png"))
    return folder


@pytest.fixture(scope="module")
def kontext(shared: Path) -> ImageBase:
    return load_image(str(tiny_image_base(shared, "kontext")))


def settings_of(pairs: Path, **sections: Any) -> dict[str, Any]:
    return {"data": {"pictures": str(pairs)}, "adapter": {"dropout": 0.0}, **sections}


@pytest.mark.parametrize("family", ["kontext", "qwen-edit", "qwen-edit-plus"])
def test_diffusers_edits_equally_with_the_trained_file(
    family: str, shared: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    small_references(monkeypatch)
    seen: list[Event] = []
    start, prompt = pairs / "0.before.png", "sks, a red house"
    result = run(
        shared,
        tmp_path / "out",
        family,
        on_event=seen.append,
        **settings_of(pairs),
        optimizer={"learning_rate": 0.05},
        schedule={"steps": 3},
        evaluation={"every": 3},
        samples={"prompts": [prompt, "a cat"], "before": [str(start)], "steps": 2, "every": 3, "size": 32},
    )
    said = "\n".join(e.text for e in seen if isinstance(e, Note))
    assert "read back and compared: predictions equal" in said
    assert (result.pictures, result.validation is not None, len(result.samples)) == (12, True, 2)
    with Image.open(result.samples[-1]) as sheet:
        wide = sheet.width
    assert wide > 2 * 128  # the sheet shows the source picture next to the sample
    crop_view = tiny_image_base(shared, family)
    if family == "kontext":
        pipe = diffusers.FluxKontextPipeline.from_pretrained(crop_view)
        pipe.set_progress_bar_config(disable=True)
        given = {"max_area": 32 * 32, "_auto_resize": False, "max_sequence_length": LENGTH}
    else:
        pipe, given = qwen_edit_pipeline(crop_view), {"true_cfg_scale": 4.0, "negative_prompt": ""}
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name=Path(result.adapter).name)
    edited = Image.open(start).convert("RGB").resize((32, 32))
    generator = torch.Generator().manual_seed(4)
    theirs = pipe(
        image=edited, prompt=prompt, height=32, width=32, num_inference_steps=2, generator=generator, **given
    ).images[0]
    base = load_image(str(crop_view))
    plan = MixPlan((("it", 1.0),), ((0.0, (("it", 1.0),)),))
    shown = (edited,)
    rows = [ImageRow(prompt, seed=4, plan=plan, references=shown), ImageRow(prompt, seed=4, references=shown)]
    with attach(base.model) as attachment:
        attachment.add("it", read(Path(result.adapter)).adapter)
        settings = PictureSettings(32, 32, steps=2)
        ours, bare = (m.image for m in generate_images(base, rows, settings, attachment=attachment))
    assert levels(ours, theirs) <= 1
    assert levels(ours, bare) > 5


def test_latents_of_pairs_are_cached_once(shared: Path, pairs: Path, kontext: ImageBase, tmp_path: Path) -> None:
    config, base = _config(shared, pairs, tmp_path), kontext
    pictures = read_pictures(config.data)[0][:2]
    rows = plan_rows(pictures, config.data, size=base.size, unit=base.unit).rows
    planned = [
        PlannedRow(r.picture, *sample_row(r, config.data, seed=0, epoch=0), 1.0, (0, 0, i)) for i, r in enumerate(rows)
    ]
    encoders = Encoders(base, config, tmp_path / "cache")
    encoders.fill(planned)
    assert (encoders.latents.misses, encoders.latents.hits) == (4, 0)
    again = Encoders(base, config, tmp_path / "cache")
    batch = again.batch(planned[:1])
    assert (again.latents.misses, again.latents.hits) == (0, 2)
    view, before = planned[0].view, planned[0].picture.sources[0]
    assert source_view(view, before).width == view.width
    assert [x.shape for x in batch.sources] == [batch.latents.shape]


def test_prompts_are_cached_with_their_picture(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_references(monkeypatch)
    pairs = drawings(tmp_path / "pairs", 2)
    for path in pairs.glob("?.png"):
        path.with_suffix(".txt").write_text("make it red")
        Image.open(path).rotate(180).save(path.with_suffix(".before.png"))
    config = _config(shared, pairs, tmp_path, "qwen-edit")
    base = load_image(str(tiny_image_base(shared, "qwen-edit")))
    rows = plan_rows(read_pictures(config.data)[0], config.data, size=32, unit=base.unit).rows
    planned = [
        PlannedRow(r.picture, *sample_row(r, config.data, seed=0, epoch=0), 1.0, (0, 0, i)) for i, r in enumerate(rows)
    ]
    captions = [row.caption for row in planned]
    assert len(set(captions)) == 1
    encoders = Encoders(base, config, tmp_path / "cache")
    assert encoders.fill(planned) == (2, 2)
    again = Encoders(base, config, tmp_path / "cache")
    text = again.text(captions, planned)
    assert (again.texts.misses, again.texts.hits) == (0, 2)
    one, other = text.unpadded()
    assert one.shape != other.shape or not torch.equal(one, other)
    Image.open(pairs / "1.before.png").rotate(180).save(pairs / "1.before.png")
    moved = [replace(row, picture=p) for row, p in zip(planned, read_pictures(config.data)[0], strict=True)]
    again.text(captions, moved)
    assert (again.texts.misses, again.texts.hits) == (1, 2)
    base.part("processor").pictures.do_convert_rgb = False
    other = Encoders(base, config, tmp_path / "cache")
    other.text(captions, moved)
    assert (other.texts.misses, other.texts.hits) == (2, 0), "read otherwise"


def test_a_reference_of_another_shape_is_shown_whole(shared: Path, tmp_path: Path) -> None:
    pairs = drawings(tmp_path / "pairs", 2)
    for path in pairs.glob("?.png"):
        Image.open(path).resize((64, 32)).save(path.with_suffix(".before.png"))
    config, base = _config(shared, pairs, tmp_path), load_image(str(tiny_image_base(shared, "kontext")))
    pictures, summary = read_pictures(config.data)
    plan = plan_rows(pictures, config.data, size=base.size, unit=base.unit)
    said = [f.text for f in check_pictures(pictures, summary, plan, config.data) if f.check == "pairs"]
    assert "2 source images with proportions unlike the result's, not cropped: " in said[-1]
    view, caption = sample_row(plan.rows[0], config.data, seed=0, epoch=0)
    batch = Encoders(base, config, None).batch([PlannedRow(plan.rows[0].picture, view, caption, 1.0, (0, 0, 0))])
    (found,) = batch.sources
    width, height = (base.vae_scale * side for side in (found.shape[3], found.shape[2]))
    assert (width // height, width * height <= 1.5 * base.size**2) == (2, True)
    with Image.open(pairs / "0.before.png") as whole:
        array = np.asarray(whole.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(found, encode_pictures(base, pixels.flip(-1) if view.flip else pixels), atol=1e-5)


def _config(shared: Path, pairs: Path, tmp_path: Path, family: str = "kontext", **sections: Any) -> ImageTrainConfig:
    config, _ = config_from(image_values(shared, tmp_path / "out", family, **settings_of(pairs, **sections)))
    return config


def test_bad_pairs_and_bases_stop_the_run(shared: Path, pairs: Path, kontext: ImageBase, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bases = {"kontext": kontext, "flux1": load_image(str(tiny_image_base(shared, "flux1")))}

    def bad(family: str, **sections: Any) -> str:
        with pytest.raises(PreflightError) as error:
            run(shared, out, family, base=bases[family], **sections)
        assert not out.exists()
        return str(error.value)

    captions = drawings(shared / "captions")
    said = bad("kontext", data={"pictures": str(captions)})
    assert "tiny-kontext edits pictures, and" in said
    assert f"{captions} has captions only, without source images" in said
    assert "data.before: FOLDER" in said
    said = bad("kontext", data={"pictures": str(pairs), "before": "off"})
    assert "has captions only" in said
    said = bad("flux1", **settings_of(pairs))
    for words in ("1 source image for each picture, and", "does not edit pictures", "data.before: off"):
        assert words in said
    said = bad("kontext", **settings_of(pairs), samples={"prompts": ["sks"]})
    assert "sample prompts are instructions, and have no picture to edit" in said
    lost = {"prompts": ["sks"], "before": [str(pairs / "none.png")]}
    assert "none.png cannot be edited: cannot be read" in bad("kontext", **settings_of(pairs), samples=lost)
    torn = tmp_path / "torn.png"
    torn.write_bytes((pairs / "0.png").read_bytes()[:60])
    lost["before"] = [str(torn)]
    assert f"{torn} cannot be edited: " in bad("kontext", **settings_of(pairs), samples=lost)
    given = {"prompts": ["sks"], "before": [str(pairs / "0.png")]}
    assert "samples.before requires training pictures with source images" in bad("flux1", samples=given)
    said = bad("kontext", data={"pictures": str(pairs), "validation": str(captions), "split": None})
    assert "held-out pictures must have as many source images as the training pictures (1): " in said
    odd = given | {"size": kontext.unit + 1}
    assert "samples cannot be generated: the width is" in bad("kontext", **settings_of(pairs), samples=odd)
    drawn = {"class_count": 2, "class_prompt": "a house"}
    said = bad("kontext", data={"pictures": str(pairs), **drawn})
    assert "generated class pictures have no source images" in said


def test_plan_counts_tokens_of_source_images() -> None:
    config = base_config("flux.1-dev")
    alone, pair = (image_counts(config, ImageLoad(1, 512, 512, targets="attention+ff", before=n)) for n in (0, 1))
    wide = image_counts(config, ImageLoad(1, 512, 1024, targets="attention+ff"))
    assert (pair.parameters, pair.trainable) == (alone.parameters, alone.trainable)
    assert pair.saved == wide.saved > 1.5 * alone.saved  # the same activations as one picture of double width
    assert pair.forward == wide.forward > 1.5 * alone.forward


@pytest.mark.parametrize("family", ["flux2", pytest.param("klein", marks=pytest.mark.slow)])
def test_flux2_learns_and_draws_from_several_references(family: str, shared: Path, pairs: Path, tmp_path: Path) -> None:
    starts = [tmp_path / "scenes", tmp_path / "products"]
    for folder in starts:
        drawings(folder)
    captions = drawings(tmp_path / "after")
    seen: list[Event] = []
    result = run(
        shared,
        tmp_path / "out",
        family,
        on_event=seen.append,
        adapter={"dropout": 0.0, "targets": "all-linear"},
        data={"pictures": str(captions), "before": [str(folder) for folder in starts]},
        schedule={"steps": 1},
        optimizer={"learning_rate": 0.05},
        samples={"prompts": ["sks"], "before": [[str(s / "0.png") for s in starts]], "steps": 1, "size": 64},
    )
    assert result.validation != result.validation_before
    said = "\n".join(e.text for e in seen if isinstance(e, Note))
    assert "read back and compared: predictions equal" in said
    with Image.open(result.samples[-1]) as sheet:
        assert sheet.width > 3 * 128  # the sheet shows both source pictures next to the sample
