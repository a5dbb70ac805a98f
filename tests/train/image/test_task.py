"""Image runs on tiny bases: output, interruption at any step, and errors for invalid input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_image_base import tiny_image_base
from tests.train.stopping import interrupt_at
from tests.train.tiny_pictures import drawings, image_values, run
from veneer.core.attach import attach
from veneer.errors import CheckpointError, ConfigError, Interrupted, PreflightError
from veneer.files.hashes import verify_hashes
from veneer.files.safetensors import read_tensors
from veneer.formats.card import read_card
from veneer.formats.read import read
from veneer.models.image.base import ImageBase, load_image
from veneer.models.image.generate import ImageRow, PictureSettings, default_settings, generate_images
from veneer.models.image.predict import truncated_end
from veneer.ops.quantized import Quantized
from veneer.train.config.load import config_from
from veneer.train.devices import ALONE
from veneer.train.events import Checked, Evaluated, Event, Note, Probed, Resolved, Sampled, Stepped
from veneer.train.image.save import ImageResult
from veneer.train.image.task import PICTURES, ImageRun, attach_images
from veneer.train.preflight import Report
from veneer.train.report.log import read_log
from veneer.train.run import Run

STEM = "diffusion_pytorch_model"
ROOT = Path(__file__).resolve().parents[3]
Whole = tuple[Path, ImageResult, list[Event]]


@pytest.fixture(scope="module")
def whole(shared: Path) -> Whole:
    """Return one uninterrupted run with a moving average and sample sheets; many tests share it."""
    seen: list[Event] = []
    result = run(shared, shared / "whole", on_event=seen.append, **WITH_ALL)
    return shared / "whole", result, seen


WITH_ALL: dict[str, Any] = {
    "ema": {"decay": 0.6},
    "samples": {"prompts": ["sks, a red house", "a cat"], "seeds": [0, 1], "every": 3, "steps": 2},
}


def _bytes(folder: Path) -> bytes:
    """Return the tensors of the only safetensors file in a run's folder, as bytes.

    Excludes the metadata, which contains the time and the file's name."""
    return b"".join(
        f"{n}|{t.dtype}|{tuple(t.shape)}".encode() + t.contiguous().view(torch.uint8).numpy().tobytes()
        for n, t in sorted(read_tensors(next(folder.glob("*.safetensors")))[0].items())
    )


def test_run_emits_events_in_order(whole: Whole) -> None:
    folder, result, seen = whole
    kinds = [type(e) for e in seen]
    order = [Resolved, Checked, Probed, Evaluated, Stepped]
    assert sorted(kinds.index(k) for k in order) == [kinds.index(k) for k in order]
    assert (result.steps, result.pictures, result.kept_step > 0) == (6, 24, True)
    assert [e.step for e in seen if isinstance(e, Stepped)] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in seen if isinstance(e, Evaluated)] == [0, 3, 6]
    assert [e.step for e in seen if isinstance(e, Sampled)] == [0, 3, 6]
    assert all(e.perplexity is None and len(e.extra) == 4 for e in seen if isinstance(e, Evaluated))
    assert Path(result.adapter) == folder / "whole.safetensors"
    json.dumps(result.to_dict(), allow_nan=False)


def test_every_setting_says_where_it_came_from(whole: Whole) -> None:
    resolved = next(e for e in whole[2] if isinstance(e, Resolved))
    assert set(resolved.settings) == set(resolved.sources)
    assert (resolved.settings["loss.timesteps"], resolved.settings["data.resolution"]) == ("logit-normal", 32)
    assert "GB free" in resolved.sources["memory.activation_checkpointing"]
    assert "samples need the encoders" in resolved.sources["memory.free_encoders"]


def test_output_folder_has_every_file(whole: Whole, base: ImageBase) -> None:
    folder, result, _ = whole
    card = read_card(folder)
    assert card.digest == result.digest == read(Path(result.adapter)).adapter.digest()
    assert card.card.base_fingerprint == base.fingerprint
    assert card.card.trigger_words == ["sks"]
    assert card.card.recipe["ema"] == {"decay": 0.6}
    assert str(folder.parent) not in json.dumps(card.card.recipe)
    assert len([r for r in read_log(folder / "log.jsonl") if r["event"] == "stepped"]) == 6
    page = (folder / "report.html").read_text()
    assert page.count('<img class="sheet"') == 4  # training pictures, the base, step 3, step 6
    for piece in (
        result.digest,
        "Loss, mean squared error",
        "Pictures per second",
        "load_lora_weights",
        "After step 3",
    ):
        assert piece in page
    assert "perplexity" not in page
    assert (folder / "pictures.png").is_file()
    assert [Path(p).name for p in result.samples] == [f"step-{n:08d}.png" for n in (0, 3, 6)]


def test_file_has_the_metadata_that_readers_expect(whole: Whole) -> None:
    path = Path(whole[1].adapter)
    metadata = read_tensors(path)[1]
    assert json.loads(metadata["ss_tag_frequency"]) == {
        "1_drawings": {
            "sks": 4,
            "a blue house": metadata_count(metadata, "a blue house"),
            "a red house": metadata_count(metadata, "a red house"),
            "flat": 4,
        }
    }
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_steps"]) == ("4", "4", "6")
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert all(check.holds is not False for check in verify_hashes(path))


def metadata_count(metadata: dict[str, str], tag: str) -> int:
    """Return a tag's count in the metadata.

    A hash selects the four of six pictures that are trained on, so the count is not known in advance."""
    return int(json.loads(metadata["ss_tag_frequency"])["1_drawings"][tag])


def test_run_restores_base_and_random_state(shared: Path, tmp_path: Path) -> None:
    own = load_image(str(tiny_image_base(shared, "flux1")))
    parts = {n: p for n, p in own.parts.items() if isinstance(p, torch.nn.Module)}
    before = {f"{n}.{k}": t.clone() for n, p in parts.items() for k, t in p.state_dict().items()}
    modes = {n: m.training for n, m in own.model.named_modules()}
    random_before = torch.get_rng_state()
    run(shared, tmp_path / "out", base=own, memory={"activation_checkpointing": "on"}, schedule={"steps": 2})
    assert torch.equal(torch.get_rng_state(), random_before)
    after = {f"{n}.{k}": t for n, p in parts.items() for k, t in own.parts[n].state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert {n: m.training for n, m in own.model.named_modules()} == modes
    assert not any(p.requires_grad for p in own.model.parameters())
    assert not own.denoiser.is_gradient_checkpointing
    attach(own.model).detach()  # `attach` raises if an adapter is still attached


@pytest.mark.parametrize(
    ("family", "share"),
    [("flux1", 0.95), pytest.param("sdxl", 0.99, marks=pytest.mark.slow)],  # test_kinds trains sdxl too
)
def test_loss_falls_in_training(family: str, share: float, shared: Path, tmp_path: Path) -> None:
    """The base is random, so forty steps must lower the validation loss, which is measured with the same noise
    and timesteps before and after."""
    result = run(
        shared,
        tmp_path / "out",
        family,
        adapter={"rank": 8, "alpha": 8.0, "dropout": 0.0},
        schedule={"steps": 40},
        optimizer={"learning_rate": 2e-2},
        evaluation={"every": 40},
    )
    assert result.validation < share * result.validation_before


@pytest.mark.parametrize("family", ["sd15", "schnell", "sd3", "klein", "flux2", "z-image", "qwen-image"])
def test_every_family_trains_through_the_same_loop(family: str, shared: Path, tmp_path: Path) -> None:
    """Trains every linear module of the denoiser. Other tests cover flux1 and sdxl."""
    seen: list[Event] = []
    result = run(
        shared,
        tmp_path / "out",
        family,
        on_event=seen.append,
        adapter={"targets": "all-linear"},
        schedule={"steps": 1},
        data={"resolution": 32},
        optimizer={"learning_rate": 0.05},
        samples={"prompts": ["sks"], "steps": 1, "size": 32},
    )
    assert result.validation != result.validation_before
    assert any("read back and compared: predictions equal" in e.text for e in seen if isinstance(e, Note))
    assert len(result.samples) == 1


def test_ctrl_c_saves_and_resuming_ends_in_the_same_bits(whole: Whole, shared: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="after step 4 of 6"):
        run(shared, tmp_path / "whole", on_event=interrupt_at(4), **WITH_ALL)
    run(shared, tmp_path / "whole", resume=True, **WITH_ALL)
    assert _bytes(tmp_path / "whole") == _bytes(whole[0])


def test_sd3_without_t5_reads_77_tokens(shared: Path, tmp_path: Path) -> None:
    import shutil

    place = Path(shutil.copytree(tiny_image_base(shared, "sd3"), tmp_path / "two-encoders"))
    index = json.loads((place / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(place / name)
        index[name] = [None, None]
    (place / "model_index.json").write_text(json.dumps(index))
    base = load_image(str(place))
    result = run(
        shared,
        tmp_path / "out",
        "sd3",
        base=base,
        schedule={"steps": 1},
        optimizer={"learning_rate": 0.05},
        adapter={"text_encoders": ["text_encoder", "text_encoder_2"]},
        samples={"prompts": ["sks"], "steps": 1},
    )
    assert result.validation != result.validation_before
    assert len(result.samples) == 1
    long = "a red house " * 40
    assert truncated_end(base, long)
    with pytest.raises(PreflightError, match="it has: text_encoder, text_encoder_2"):
        run(shared, tmp_path / "no", "sd3", base=base, adapter={"text_encoders": ["text_encoder_3"]})


@pytest.mark.parametrize(
    "family", ["flux2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sd3", "z-image", "klein", "qwen-image"))]
)
def test_training_on_nf4_equals_training_on_its_values(family: str, shared: Path, tmp_path: Path) -> None:
    """The text encoders are quantized to 4 bits too. The run computes in 16 bits and trains every linear module."""
    for name in ("codes", "values"):
        base = load_image(str(tiny_image_base(shared, family)), dtype="bfloat16", quantize="nf4")
        held = [
            (m, key)
            for m in base.parts.values()
            if isinstance(m, torch.nn.Module)
            for m in m.modules()
            for key, w in m._parameters.items()
            if isinstance(w, Quantized)
        ]
        assert len(held) > 10
        for module, key in held if name == "values" else []:
            weight: Any = module._parameters[key]
            module._parameters[key] = torch.nn.Parameter(weight.dense().clone(), requires_grad=False)
        result = run(
            shared,
            tmp_path / name,
            family,
            base=base,
            adapter={"targets": "all-linear"},
            schedule={"steps": 2},
            optimizer={"learning_rate": 0.05},
        )
        assert result.validation != result.validation_before
    assert _bytes(tmp_path / "codes") == _bytes(tmp_path / "values")


@pytest.mark.parametrize(
    ("family", "guidance"),
    [
        ("qwen-image", None),
        *(pytest.param(f, g, marks=pytest.mark.slow) for f, g in (("flux2", None), ("z-image", 0.0))),
    ],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    family: str, guidance: float | None, shared: Path, tmp_path: Path
) -> None:
    """Covers dropout, empty captions and captions of two lengths. The sample sheets are equal too."""
    folder = drawings(tmp_path / "drawings")
    (folder / "0.txt").write_text("a blue cat with a hat in the red house, in the style of a flat tree")
    more: dict[str, Any] = {
        "data": {"pictures": str(folder), "caption_dropout": 0.4, "cache": str(tmp_path / "cache")},
        "schedule": {"steps": 3},
        "samples": {"prompts": ["a cat"], "every": 1, "steps": 2, "size": 32},
    }
    if guidance is not None:
        more["samples"]["guidance"] = guidance
    run(shared, tmp_path / "whole" / "run", family, **more)
    with pytest.raises(Interrupted, match="after step 2 of 3"):
        run(shared, tmp_path / "parts" / "run", family, on_event=interrupt_at(2), **more)
    run(shared, tmp_path / "parts" / "run", family, resume=True, **more)
    assert _bytes(tmp_path / "parts" / "run") == _bytes(tmp_path / "whole" / "run")
    places = (tmp_path / one / "run" / "samples" for one in ("whole", "parts"))
    whole, parts = ([p.read_bytes() for p in sorted(place.glob("*.png"))] for place in places)
    assert len(set(whole)) == 4
    assert whole == parts


def test_resuming_with_other_settings_or_pictures_is_refused(whole: Whole, shared: Path, tmp_path: Path) -> None:
    import shutil

    output = tmp_path / "whole"
    shutil.copytree(whole[0], output)
    with pytest.raises(PreflightError, match=r"loss\.guidance: 1\.0 in the checkpoint, 2\.0 now"):
        run(shared, output, resume=True, **WITH_ALL, loss={"guidance": 2.0})
    other = tmp_path / "drawings"
    shutil.copytree(shared / "drawings", other)
    (other / "0.txt").write_text("another caption")
    with pytest.raises(CheckpointError, match="pictures"):
        run(shared, output, resume=True, **WITH_ALL, data={"pictures": str(other)})


def test_dry_run_writes_only_a_temporary_sheet(shared: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    cache = tmp_path / "cache"
    result = run(shared, tmp_path / "dry", dry_run=True, on_event=seen.append, data={"cache": str(cache)})
    assert not (tmp_path / "dry").exists()
    assert not cache.exists()
    assert (result.dry_run, result.steps, result.preflight["ok"]) == (True, 6, True)
    assert any(isinstance(e, Probed) for e in seen)
    assert not any(isinstance(e, Stepped) for e in seen)
    assert Path(result.sheet).is_file()
    Path(result.sheet).unlink()
    Path(result.sheet).parent.rmdir()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"adapter": {"text_encoders": ["text_encoder_9"]}}, "it has: text_encoder, text_encoder_2"),
        ({"adapter": {"targets": ["no_such_proj"]}}, "(adapter.targets)"),
        ({"adapter": {"text_encoders": ["text_encoder"], "text_targets": "nothing_here"}}, "(adapter.text_targets)"),
        ({"loss": {"snr_gamma": 5.0}}, "predicts a flow: loss.snr_gamma is only for noise"),
        ({"loss": {"guidance": 2.0, "keep_guidance": 3.0}}, "loss.keep_guidance 3 is above loss.guidance 2"),
        ({"memory": {"offload_blocks": 1}}, "this run is on the CPU"),
        ({"memory": {"limit_gb": 1e-6}}, "does not fit"),
    ],
)
def test_invalid_settings_stop_the_run_before_training(
    sections: dict[str, Any], says: str, shared: Path, tmp_path: Path, base: ImageBase
) -> None:
    with pytest.raises(PreflightError) as error:
        run(shared, tmp_path / "out", base=base, **sections)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists(), "the same command can be run again"


def test_blocks_are_offloaded_before_memory_is_measured(shared: Path, tmp_path: Path, base: ImageBase) -> None:
    config, _ = config_from(image_values(shared, tmp_path / "out", memory={"offload_blocks": 1}))
    seen: list[Event] = []
    own = Run(config, tmp_path / "out", ALONE, seen.append, [], dry_run=True)
    image = ImageRun(own, config, base, owns_base=False, kind=PICTURES)
    with attach_images(image, PICTURES.read(image), Report()):
        notes = [e.text if isinstance(e, Note) else type(e).__name__ for e in seen]
    assert notes.index("Checked") > next(i for i, note in enumerate(notes) if "stay on the CPU" in note)


def test_output_inside_the_picture_folder_is_refused(shared: Path, tmp_path: Path, base: ImageBase) -> None:
    folder = drawings(tmp_path / "drawings")
    with pytest.raises(PreflightError, match="in the picture folder"):
        run(shared, folder / "runs" / "one", base=base, data={"pictures": str(folder)})
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (
            {"timesteps": "logit-normal", "shift": "resolution"},
            r"noise: loss\.timesteps and loss\.shift are only for flow",
        ),
        ({"guidance": 3.5}, r"does not take guidance as an input, so loss\.guidance would have no effect"),
        ({"keep_guidance": 3.0}, r"does not take guidance as an input, so loss\.keep_guidance would have no effect"),
    ],
)
def test_noise_prediction_base_refuses_flow_settings(
    loss: dict[str, Any], says: str, shared: Path, tmp_path: Path
) -> None:
    with pytest.raises(PreflightError, match=says):
        run(shared, tmp_path / "out", "sdxl", loss=loss)


def test_distilled_base_gives_a_warning(shared: Path, tmp_path: Path) -> None:
    """Uses FLUX.2 klein with `is_distilled` in its index. Sample sheets are generated without guidance."""
    import shutil

    folder = Path(shutil.copytree(tiny_image_base(shared, "klein"), tmp_path / "klein"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    base = load_image(str(folder))
    assert default_settings(base) == (4, 0.0)
    result = run(shared, tmp_path / "out", "klein", base=base, dry_run=True)
    Path(result.sheet).unlink()
    said = next(f for f in result.preflight["findings"] if f["check"] == "distilled")
    assert said["level"] == "warn"
    assert "training undoes the distillation" in said["text"]
    assert "FLUX.2 klein-base" in said["fix"]
    with pytest.raises(ConfigError, match="is distilled and takes no guidance"):
        generate_images(base, [ImageRow("a cat")], PictureSettings(guidance=4.0))
    with pytest.raises(ConfigError, match="a negative prompt has no effect") as error:
        generate_images(base, [ImageRow("a cat", "a dog")])
    assert "does not use negative prompts" in str(error.value)


def test_a_stopped_dry_run_still_writes_its_sheet(shared: Path, tmp_path: Path, base: ImageBase) -> None:
    seen: list[Event] = []
    with pytest.raises(PreflightError, match="no picture has transparency"):
        run(shared, tmp_path / "out", base=base, dry_run=True, on_event=seen.append, data={"masks": "alpha"})
    said = next(e.text for e in seen if isinstance(e, Note) and "as the model sees them" in e.text)
    sheet = Path(said.partition(": ")[2])
    assert sheet.is_file()
    sheet.unlink()


def test_preflight_reports_truncated_texts_and_unreadable_pictures(shared: Path, tmp_path: Path) -> None:
    """A caption, a sample prompt and the class prompt are each longer than the encoders' limit of 24 tokens."""
    folder = drawings(tmp_path / "drawings")
    long = "a red house, " + " ".join(["in the style of a flat tree"] * 8)
    (folder / "0.txt").write_text(long + " caption")
    (folder / "1.txt").write_text("a cat")
    (folder / "bad.png").write_bytes(b"no")
    result = run(
        shared,
        tmp_path / "out",
        dry_run=True,
        preset="subject",
        samples={"prompts": [long + " sample"]},
        data={"pictures": str(folder), "broken": "drop", "trigger": None, "class_prompt": "a cat", "prompt": "a dog"},
    )
    Path(result.sheet).unlink()
    said = {f"{f['level']} {f['check']} {f['text']}" for f in result.preflight["findings"]}

    def one(start: str) -> str:
        return next(text for text in said if text.startswith(start))

    for what in ("captions", "sample prompts"):
        text = one(f"warn {what} 1 {what[:-1]} longer than the base reads")
        assert "a red house, in the style" in text
        assert len(text) < 250
    assert "bad.png: not a picture" in one("warn broken 1 of 7")


def test_encoders_are_freed_after_caching(shared: Path, tmp_path: Path, base: ImageBase) -> None:
    texts: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            texts.append(event.text)

    first = run(shared, tmp_path / "one", on_event=listen, schedule={"steps": 2})
    assert any(t.startswith("freed text_encoder, text_encoder_2, vae") or t.startswith("freed vae") for t in texts)
    second = run(shared, tmp_path / "two", base=base, schedule={"steps": 2})
    assert base.parts["vae"] is not None
    assert first.digest == second.digest
