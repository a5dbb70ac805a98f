"""Saved adapters of image runs: all layouts, text encoders, other readers, and images from diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_image_base import tiny_image_base
from tests.train.tiny_pictures import drawings, run
from veneer.core.attach import attach
from veneer.errors import AdapterError
from veneer.files.safetensors import read_tensors
from veneer.formats import convert, peft
from veneer.formats.read import read
from veneer.models.image.base import load_image, pipeline
from veneer.models.image.memory import blocks_of, fetched, measured_activations, offloading, park, recomputing
from veneer.train.checkpoint import latest
from veneer.train.events import Event, Note
from veneer.train.image import save as image_save


def _notes(seen: list[Event]) -> str:
    return "\n".join(e.text for e in seen if isinstance(e, Note))


def _draw(pipe: Any, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        prompt="sks, a red house",
        height=32,
        width=32,
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator().manual_seed(3),
        **more,
    )
    return np.asarray(made.images[0])


STRONG: dict[str, Any] = {
    "adapter": {"dropout": 0.0}, "optimizer": {"learning_rate": 0.05}, "schedule": {"steps": 3},
    "evaluation": {"every": 100, "at_start": False},
}  # fmt: skip


_CLIPS = ["text_encoder", "text_encoder_2"]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # raised by diffusers' Euler scheduler with numpy 2
@pytest.mark.parametrize(
    ("family", "encoders", "targets", "layout"),
    [
        pytest.param("flux1", [], "attention+ff", "diffusers", marks=pytest.mark.peers),
        pytest.param("sdxl", _CLIPS, "attention+ff", "diffusers", marks=pytest.mark.peers),
        pytest.param("sd15", ["text_encoder"], "attention+ff", "diffusers", marks=pytest.mark.peers),
        ("sd3", _CLIPS, "all-linear", "diffusers"),
        ("z-image", [], "all-linear", "diffusers"),
        pytest.param("z-image", [], "all-linear", "kohya", marks=pytest.mark.slow),
        pytest.param("flux2", [], "all-linear", "diffusers", marks=pytest.mark.slow),
        ("klein", [], "attention+ff", "kohya"),  # diffusers ignores modulation layers in kohya files
        ("qwen-image", [], "all-linear", "diffusers"),
        pytest.param("qwen-image", [], "all-linear", "kohya", marks=pytest.mark.slow),
    ],
)
def test_diffusers_generates_the_same_picture_from_the_file(
    family: str, encoders: list[str], targets: str, layout: str, shared: Path, tmp_path: Path
) -> None:
    """Covers each family's default layout. formats/test_convert_round.py covers the names that diffusers
    writes."""
    import diffusers

    result = run(
        shared,
        tmp_path / "out",
        family,
        **{**STRONG, "adapter": {"dropout": 0.0, "text_encoders": encoders, "targets": targets}},
        output={"directory": str(tmp_path / "out"), "layout": layout},
    )
    more = {"max_sequence_length": 24} if family in ("flux1", "sd3") else {}
    theirs = diffusers.DiffusionPipeline.from_pretrained(tiny_image_base(shared, family), safety_checker=None)
    plain = _draw(theirs, **more)
    theirs.load_lora_weights(str(tmp_path / "out"), weight_name=Path(result.adapter).name)
    own = load_image(str(tiny_image_base(shared, family)))
    with attach(own.model) as attachment:
        attachment.add("a", read(Path(result.adapter)).adapter)
        attachment.use("a")
        ours = _draw(pipeline(own), **more)
    assert np.abs(ours - plain).max() > 0.02, "the adapter changes the picture"
    np.testing.assert_allclose(_draw(theirs, **more), ours, atol=2e-4)


@pytest.mark.parametrize(
    ("layout", "family", "encoders"),
    [("kohya", "sdxl", ["text_encoder", "text_encoder_2"]), ("kohya", "flux1", []), ("peft", "flux1", [])],
)
def test_layouts_hold_the_adapter(layout: str, family: str, encoders: list[str], shared: Path, tmp_path: Path) -> None:
    """The saved file has the same ΔW as the trained tensors in the last checkpoint."""
    seen: list[Event] = []
    result = run(
        shared,
        tmp_path / "out",
        family,
        on_event=seen.append,
        **{**STRONG, "adapter": {"dropout": 0.0, "text_encoders": encoders}},
        output={"directory": str(tmp_path / "out"), "layout": layout},
    )
    assert "read back and compared: predictions equal" in _notes(seen)
    newest = latest(tmp_path / "out" / "checkpoints")
    trained, _ = read_tensors(newest / "adapter.safetensors")
    back = read(Path(result.adapter)).adapter
    assert {f"{n}.A" for n in back.pairs} == {n for n in trained if n.endswith(".A")}
    assert any(n.startswith("text_encoder.") for n in back.pairs) == bool(encoders)
    for name, pair in back.pairs.items():
        delta = pair.scale * (pair.B.double().flatten(1) @ pair.A.double().flatten(1))
        wanted = trained[f"{name}.B"].double().flatten(1) @ trained[f"{name}.A"].double().flatten(1)
        torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-7)
    if layout == "peft":
        assert json.loads((tmp_path / "out" / peft.CONFIG_FILE).read_text())["r"] == 4


def test_the_files_metadata_counts_each_folder_of_pictures(shared: Path, tmp_path: Path) -> None:
    """The counts are in sd-scripts' dataset_dirs, reg_dataset_dirs and tag_frequency, under the original
    folder names. Covers kohya's folders and class pictures."""
    for place, count in (("train/3_sks house", 2), ("train/1_sks", 1), ("classes", 5)):
        drawings(tmp_path / place, count)
    for name in ("0.png", "0.txt", "1.png", "1.txt"):  # the training folders contain the same two pictures
        (tmp_path / "classes" / name).unlink()
    data = {"pictures": str(tmp_path / "train"), "class_folder": str(tmp_path / "classes"), "split": 0}
    result = run(shared, tmp_path / "out", data=data, schedule={"steps": 2}, evaluation={"every": 100})
    facts = read_tensors(Path(result.adapter))[1]
    dirs = {"3_sks house": {"n_repeats": 3, "img_count": 2}, "1_sks": {"n_repeats": 1, "img_count": 1}}
    assert json.loads(facts["ss_dataset_dirs"]) == dirs
    assert json.loads(facts["ss_reg_dataset_dirs"]) == {"classes": {"n_repeats": 1, "img_count": 3}}
    assert set(json.loads(facts["ss_tag_frequency"])) == set(dirs)
    assert (facts["ss_num_epochs"], facts["ss_num_batches_per_epoch"]) == ("1", "2")
    assert float(facts["ss_training_started_at"]) < float(facts["ss_training_finished_at"])


def test_text_encoders_learn_at_their_own_rate(shared: Path, tmp_path: Path) -> None:
    """With SGD without clipping, each update is the learning rate times the gradient. At a rate of 1e-30, the
    parameters do not change."""
    result = run(
        shared,
        tmp_path / "out",
        "sdxl",
        adapter={"text_encoders": ["text_encoder_2"], "dropout": 0.0},
        optimizer={"name": "sgd", "learning_rate": 1.0, "text_learning_rate": 1e-30},
        schedule={"steps": 2},
        evaluation={"every": 100, "at_start": False},
    )
    pairs = read(Path(result.adapter)).adapter.pairs
    size = {
        part: max(float(p.B.abs().max()) for n, p in pairs.items() if n.startswith(part)) for part in ("unet", "text")
    }
    assert 0 < size["text"] < 1e-25 < 1e-4 < size["unet"]
    facts = read_tensors(Path(result.adapter))[1]
    assert (facts["ss_unet_lr"], facts["ss_text_encoder_lr"]) == ("1.0", "1e-30")


def test_rounding_to_the_saved_dtype_is_reported(shared: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    result = run(
        shared,
        tmp_path / "out",
        on_event=seen.append,
        output={"directory": str(tmp_path / "out"), "dtype": "bfloat16", "name": "look", "licence": "CC0-1.0"},
        **STRONG,
    )
    assert Path(result.adapter).name == "look.safetensors"
    tensors, metadata = read_tensors(Path(result.adapter))
    assert {t.dtype for t in tensors.values() if t.ndim == 2} == {torch.bfloat16}
    assert metadata["modelspec.license"] == "CC0-1.0"
    assert "rounded to bfloat16" in _notes(seen)
    assert "equal except for rounding" in _notes(seen)


def test_a_wrong_file_is_detected(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = convert.write

    def wrong(adapter: Any, *args: Any, **options: Any) -> Any:
        pairs = {n: replace(p, B=p.B * 2) for n, p in adapter.pairs.items()}
        return real(replace(adapter, pairs=pairs), *args, **options)

    monkeypatch.setattr(image_save.convert, "write", wrong)
    with pytest.raises(AdapterError, match="adapter's predictions are not equal to"):
        run(shared, tmp_path / "out", **STRONG)


def test_moving_average_is_saved(shared: Path, tmp_path: Path) -> None:
    """The saved tensors equal the moving average in the last checkpoint and differ from the trained tensors."""
    result = run(shared, tmp_path / "out", ema={"decay": 0.9}, **STRONG)
    newest = latest(tmp_path / "out" / "checkpoints")
    state, _ = read_tensors(newest / "adapter.safetensors")
    for name, pair in read(Path(result.adapter)).adapter.pairs.items():
        torch.testing.assert_close(pair.B, state[f"{name}.B@ema"], rtol=0, atol=0)
        assert not torch.equal(pair.B, state[f"{name}.B"])


def test_missing_class_pictures_are_generated_once(shared: Path, tmp_path: Path) -> None:
    data = {"class_prompt": "a cat", "class_count": 3, "cache": str(tmp_path / "cache")}
    short: Any = {"schedule": {"steps": 2}, "samples": {"steps": 1}}
    seen: list[Event] = []
    run(shared, tmp_path / "one", data=data, on_event=seen.append, **short)
    assert "generated 3 class pictures" in _notes(seen)
    folder = next((tmp_path / "cache" / "class").iterdir())
    assert sorted(p.name for p in folder.iterdir()) == [f"class-{i:05d}.png" for i in range(3)]
    first = (folder / "class-00001.png").read_bytes()
    (folder / "class-00001.png").unlink()
    seen.clear()
    result = run(shared, tmp_path / "two", data=data, on_event=seen.append, **short)
    assert "generated 1 class picture into" in _notes(seen)
    assert (folder / "class-00001.png").read_bytes() == first
    assert read_tensors(Path(result.adapter))[1]["ss_num_reg_images"] == "3"
    with Image.open(folder / "class-00000.png") as image:
        assert image.size == (32, 32)


# --- memory -------------------------------------------------------------------------------------------------------


def test_recomputation_saves_memory_and_changes_no_result(shared: Path, tmp_path: Path) -> None:
    deltas, kept = [], []
    for mode in ("on", "off"):
        result = run(
            shared,
            tmp_path / mode,
            memory={"activation_checkpointing": mode},
            adapter={"dropout": 0.0},
            schedule={"steps": 2},
            optimizer={"name": "sgd", "learning_rate": 1.0},
        )
        kept.append(result.preflight["numbers"]["activations_of_one_picture"])
        deltas.append(read(Path(result.adapter)).adapter.pairs)
    assert kept[0] < 0.5 * kept[1]
    for name, pair in deltas[0].items():
        torch.testing.assert_close(pair.B, deltas[1][name].B, rtol=1e-4, atol=1e-7)


def test_measured_activations_equal_autograds_saved_tensors() -> None:
    """A linear layer with a trainable weight saves its input; two layers with the same input save it once; ReLU
    saves its output."""
    x = torch.randn(10, 8)
    a, b = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False)
    weights = [*a.parameters(), *b.parameters()]
    assert measured_activations(lambda: a(x), weights) == x.nbytes
    assert measured_activations(lambda: a(x) + b(x), weights) == x.nbytes
    assert measured_activations(lambda: a(x).relu(), weights) == x.nbytes + 10 * 4 * 4


def test_parked_components_are_fetched_and_parked_again(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_image(str(tiny_image_base(shared, "flux1")))
    went: list[tuple[str, str]] = []
    for name in ("text_encoder", "vae"):
        part = base.parts[name]
        monkeypatch.setattr(part, "to", lambda device, name=name: went.append((name, str(device))))
    base.device = torch.device("cuda:3")  # no tensor is moved: the test only records the requested devices
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    size = sum(p.numel() * 4 for n in ("text_encoder", "vae") for p in base.parts[n].parameters())
    assert park(base, ["text_encoder", "vae"]) == size
    with fetched(base, ["text_encoder", "vae"]):
        went.append(("drawing", ""))
    there, here = ("cpu", "cuda:3")
    assert went == [
        ("text_encoder", there),
        ("vae", there),
        ("text_encoder", here),
        ("vae", here),
        ("drawing", ""),
        ("text_encoder", there),
        ("vae", there),
    ]


@pytest.mark.parametrize("family", ["flux1", "sdxl", "z-image", "klein", "qwen-image"])
def test_offloaded_blocks_give_equal_gradients_and_are_restored(family: str, shared: Path, tmp_path: Path) -> None:
    """With one device, each move is a copy, so the test only checks that the right weights are present when a
    block runs."""
    from tests.train.tiny_pictures import image_values
    from veneer.train.config.load import config_from
    from veneer.train.image.augmentation import plan_rows
    from veneer.train.image.batches import plan_image_steps
    from veneer.train.image.encode import Encoders, ImageLoss
    from veneer.train.image.pictures import read_pictures

    config: Any = config_from(image_values(shared, tmp_path / "out", family))[0]
    base = load_image(str(tiny_image_base(shared, family)))
    pictures, _ = read_pictures(config.data)
    encoders = Encoders(base, config, None)
    steps = plan_image_steps(plan_rows(pictures, config.data, size=32, unit=base.unit).rows, config, encoders.batch)
    from veneer.core.adapter import LoraSpec
    from veneer.core.init import create

    before = {n: (p, p.data_ptr(), p.clone()) for n, p in base.denoiser.named_parameters()}
    blocks = blocks_of(base.denoiser)
    assert len(blocks) >= 2
    gradients = []
    with attach(base.model) as attachment:
        attachment.add("a", create(base.model, LoraSpec(4, 4.0, "re:.*att(n|ention).*to_.*"), seed=0), trainable=True)
        attachment.use("a")
        loss = ImageLoss(base, config, encoders)
        parameters = attachment.parameters("a")
        with torch.no_grad():
            for p in parameters.values():
                p.add_(0.01)
        size = sum(p.nbytes for block in blocks for p in block.parameters() if not p.requires_grad)
        for away in (False, True):
            with recomputing(base):
                if away:
                    with offloading(base, len(blocks)) as moved:
                        assert moved == size
                        loss(steps[0].micros[0].make()).backward()
                else:
                    loss(steps[0].micros[0].make()).backward()
            gradients.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
            for p in parameters.values():
                p.grad = None
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    after = dict(base.denoiser.named_parameters())
    assert all(after[n] is p and torch.equal(after[n], value) for n, (p, _, value) in before.items())
    drawings(shared / "drawings")
