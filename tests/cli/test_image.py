"""`veneer image` and `veneer image grid`: files, notes on stderr, JSON, reproduction, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.run import run
from tests.edits import edit_json
from tests.image_twins import infotext_of, levels, parse_as_a1111, random_adapter
from tests.tiny_image_base import SIZE, tiny_control, tiny_image_base
from veneer import api
from veneer.formats.convert import write
from veneer.imaging.infotext import read_record
from veneer.models.image.base import ImageBase, load_image


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_image_base(tmp_path_factory.getbasetemp(), "sdxl")


@pytest.fixture(scope="module")
def base(place: Path) -> ImageBase:
    return load_image(str(place))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, base: ImageBase) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for seed, name in enumerate(("brand", "look"), 1):
        write(random_adapter(base.model, seed), folder / f"{name}.safetensors", to="kohya", family="sdxl")
    return folder


@pytest.fixture
def folder(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for file in written.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def image(capsys: Any, place: Path | None, *more: str, code: int = 0) -> Any:
    return run(capsys, "image", *(["--base", str(place)] if place else []), *more, code=code)


def test_command_equals_the_python_call(capsys: Any, place: Path, base: ImageBase, folder: Path) -> None:
    adapters = ["brand.safetensors:0.8@down=0.5,steps=0-0.6", "look.safetensors:0.5"]
    options = [x for a in adapters for x in ("-a", a)]
    ran = image(capsys, place, "a cat", *options, "--steps", "3", "--seed", "5", "-g", "4", "-n", "blue", "-o", "a.png")
    assert ran.out == ""
    assert "float32" in ran.err
    assert "a.png: seed 5" in ran.err
    assert f"adapter {adapters[0].replace(':', ' at strength ')}" in ran.err
    (ours,) = api.image(base, "a cat", adapters=adapters, steps=3, seed=5, guidance=4.0, negative="blue")
    with Image.open("a.png") as made:
        assert levels(made, ours.image) == 0
    image(capsys, None, "--from", "a.png", "-o", "b.png")  # without --base, the picture's base is used
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()
    other = image(capsys, None, "--from", "a.png", "--seed", "6", "--guidance", "2", "--json")
    record = json.loads(other.out)["pictures"][0]
    assert record["file"] == "a-again.png"
    assert record["seed"] == 6
    assert "CFG scale: 2" in record["infotext"]


def test_campaign_roles_set_strengths(capsys: Any, place: Path, base: ImageBase, folder: Path) -> None:
    roles = ["-a", "brand.safetensors:0.8@campaign=brand", "-a", "look.safetensors@campaign=lens"]
    ran = image(capsys, place, "a cat", *roles, "--steps", "2", "--seed", "5", "--json", "-o", "a.png")
    record = read_record("a.png")
    assert record == json.loads(ran.out)["pictures"][0]["record"]
    adapters = [f"{name}:{strength}" for name, strength in record["rows"][0]["adapters"]]
    assert "campaign" not in str(adapters)
    for name, strength in zip(("brand", "look"), adapters, strict=True):
        assert f"note: {name} is the campaign's" in ran.err
        assert strength.partition("@")[2] in ran.err
    (typed,) = api.image(base, "a cat", adapters=adapters, steps=2, seed=5)
    (asked,) = api.image(base, "a cat", adapters=roles[1::2], steps=2, seed=5)
    with Image.open("a.png") as made:
        assert levels(made, typed.image) == levels(made, asked.image) == 0


def test_several_pictures_are_numbered(capsys: Any, place: Path, folder: Path) -> None:
    ran = image(capsys, place, "a cat", "a dog", "--count", "2", "--seed", "7", "--steps", "1", "--json", "-o", "x.png")
    told = json.loads(ran.out)["pictures"]
    assert [t["file"] for t in told] == [f"x-{i}.png" for i in range(1, 5)]
    assert [t["seed"] for t in told] == [7, 8, 7, 8]
    for t in told:
        assert read_record(t["file"]) == t["record"]
        assert t["infotext"].startswith("a cat" if t["file"] < "x-3" else "a dog")


def test_each_picture_of_a_batch_has_its_mix(
    capsys: Any, place: Path, base: ImageBase, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of a batch equal pictures generated separately.

    Each PNG records its own mix, from which the picture can be reproduced."""
    from veneer.imaging import generate as making

    rows: list[dict[str, Any]] = [
        {"prompt": "a cat", "adapters": ["brand.safetensors:0.8"], "seed": 5},
        {"prompt": "a dog", "adapters": ["look.safetensors:0.5@text=0", "brand.safetensors:-0.25"], "negative": "red"},
        {"prompt": "a tree", "adapters": []},
        {"prompt": "a house"},
    ]
    Path("b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    real, calls = making.generate_images, []
    monkeypatch.setattr(making, "generate_images", lambda *a, **k: calls.append(len(a[1])) or real(*a, **k))
    image(capsys, place, "--batch", "b.jsonl", "-a", "look.safetensors", "--seed", "9", "--steps", "2", "-o", "x.png")
    assert calls == [4]
    tags = ["brand:0.8", "look:0:0.5> <lora:brand:-0.25", "", "look:1"]
    given = [["brand.safetensors:0.8"], rows[1]["adapters"], [], ["look.safetensors"]]
    for i, row in enumerate(rows):
        info = parse_as_a1111(infotext_of(f"x-{i + 1}.png"))
        assert info["Prompt"] == row["prompt"] + (f" <lora:{tags[i]}>" if tags[i] else "")
        assert info["Negative prompt"] == row.get("negative", "")
        assert info["Seed"] == str(row.get("seed", 9))
        assert len(read_record(f"x-{i + 1}.png")["rows"]) == 4, "one batch"
        (alone,) = api.image(
            base, row["prompt"], adapters=given[i], negative=info["Negative prompt"], seed=row.get("seed", 9), steps=2
        )
        with Image.open(f"x-{i + 1}.png") as made:
            assert levels(made, alone.image) <= 1
    image(capsys, None, "--from", "x-2.png", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("x-2.png").read_bytes()
    many = image(capsys, place, "--batch", "b.jsonl", "--count", "2", "--steps", "1", "--json", "-o", "y.png")
    assert [p["seed"] for p in json.loads(many.out)["pictures"]] == [5, 6, 0, 1, 0, 1, 0, 1]


def test_input_image_control_and_long_prompt_are_reported(capsys: Any, place: Path, folder: Path) -> None:
    control = tiny_control(folder, "sdxl")
    Image.effect_noise((64, 64), 90).convert("RGB").save("in.png")
    options = ["-i", "in.png", "--denoise", "0.5", "--steps", "4", "-c", f"canny@{control}=in.png:0.6", "-o", "a.png"]
    ran = image(capsys, place, "a cat in the house " * 9, *options)
    assert "picture was resized from 64×64 to 32×32" in ran.err
    assert "edges detected" in ran.err
    assert "does not read the end of the prompt" in ran.err
    record = read_record("a.png")
    assert record["settings"]["denoise"] == 0.5
    assert record["controls"][0]["weight"] == 0.6
    with Image.open("a.png") as made:
        assert made.size == (SIZE, SIZE)


def test_grid_writes_a_sheet(capsys: Any, place: Path, folder: Path) -> None:
    ask = ["image", "grid", "strength", "a cat", "--base", str(place), "-a", "brand.safetensors", "--steps", "2"]
    ran = run(capsys, *ask, "--strengths", "0,0.5,1", "--seeds", "1-2", "--json", "-o", "s.png")
    told = json.loads(ran.out)
    assert told["rows"] == ["seed 1", "seed 2"]
    assert told["columns"] == ["strength 0", "strength 0.5", "strength 1"]
    assert len(told["infotexts"]) == 6
    with Image.open("s.png") as sheet:
        assert sheet.width > 3 * 128
        assert sheet.height > 2 * 128
    assert "a sheet of several" in image(capsys, None, "--from", "s.png", code=2).err


def test_prompt_can_be_the_word_grid(capsys: Any, place: Path, folder: Path) -> None:
    run(capsys, "image", "--base", str(place), "--steps", "1", "-o", "a.png", "--", "grid")
    assert infotext_of("a.png").startswith("grid\nSteps")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "there is no prompt"),
        (["a", "-o", "a.jpg"], "not a .png file"),
        (["a", "-o", "no/a.png"], "no folder"),
        (["a", "--size", "big"], "--size"),
        (["a", "--size", "30x32"], "multiples of 4"),
        (["a", "-a", "brnd.safetensors"], "did you mean brand.safetensors"),
        (["a", "-a", "brand.safetensors@dwon=1"], "did you mean down"),
        (["a", "-a", "brand.safetensors@steps=1-3"], "not a range of steps"),
        (["a", "-a", "brand.safetensors@campaign=lense"], "did you mean lens"),
        (["a", "-a", "brand.safetensors@campaign=lens,mid=1"], "sets blocks and steps"),
        (["a", *(["-a", "x@campaign=lens"] * 2)], "the campaign's lens occurs twice"),
        (["a", "-c", "pose=x.png"], "needs a ControlNet"),
        (["a", "-c", "edges=none.png"], "no such picture"),
        (["a", "--scheduler", "eulr"], "did you mean euler"),
        (["a", "--count", "0"], "--count 0"),
        (["a", "--count", "1000000000"], "at most 100,000"),
        (["a", "--size", "100000"], "width is 100000"),
        (["a", "--batch-size", "0"], "batch_size is 0"),
        (["a", "--seed", "-1"], "seed -1"),
        (["a", "--seed", str(2**64)], "an integer from 0"),
        (["a", "--size", "32x0"], "height is 0"),
        (["a", "-i", "none.png"], "no such picture"),
        (["a", "--mask", "none.png"], "a mask needs the picture"),
        (["--from", "none.png", "--batch-size", "2"], "makes one picture"),
        (["--steps", "2", "grid", "strength", "a"], "veneer image grid strength"),
        (["--from", "none.png"], "no such picture"),
        (["--from", "none.png", "--batch", "b.jsonl"], "makes one picture"),
        (["--batch", "b.jsonl"], "no such batch file"),
        (["a", "--batch", "b.jsonl"], "--batch and a prompt cannot be combined: 'a'"),
        (["a", "b", "--from", "none.png"], "makes one picture"),
    ],
)
def test_invalid_options_are_refused(capsys: Any, place: Path, folder: Path, options: list[str], says: str) -> None:
    ran = image(capsys, place, *options, code=2)
    assert says in ran.err
    assert "Traceback" not in ran.err
    assert not list(folder.glob("*.png"))


def test_output_that_is_a_folder_is_refused(capsys: Any, place: Path, folder: Path) -> None:
    (folder / "a.png").mkdir()
    assert "a.png is a folder" in image(capsys, place, "a", "-o", "a.png", code=2).err


def test_invalid_sheets_are_refused(capsys: Any, place: Path, folder: Path) -> None:
    for options, says in [
        (["strenth", "a"], "no sheet"),
        (["strength", "a"], "needs an adapter"),
        (["strength", "a", "-a", "brand.safetensors", "--strengths", "x"], "not a list of numbers"),
        (["strength", "a", "-a", "brand.safetensors", "--seeds", "1,x"], "not a list of seeds"),
        (["strength", "a", "-a", "brand.safetensors", "--seeds", "1-100000000"], "at most 1000"),
        (["adapter", "a", "-a", "brand.safetensors"], "did you mean adapters?"),
        (["adapters", "a", "-a", "brand.safetensors", "--strengths", "0,1"], "for a strength sheet"),
    ]:
        assert says in run(capsys, "image", "grid", *options, "--base", str(place), code=2).err


def test_base_defaults_to_the_first_adapters_base(capsys: Any, place: Path, base: ImageBase, folder: Path) -> None:
    adapter = random_adapter(base.model, 1)
    adapter.pairs = {n: p for n, p in adapter.pairs.items() if n.startswith("unet.")}
    adapter.card.base, adapter.card.kind = str(place), "image"
    write(adapter, "trained", to="peft", family="sdxl")
    edit_json(Path("trained/adapter_config.json"), base_model_name_or_path=str(place))
    ran = run(capsys, "image", "a cat", "-a", "trained:0.5", "--steps", "1", "-o", "a.png")
    assert f"base {place}: the adapter's own" in ran.err


def test_finished_pictures_survive_an_interruption(
    capsys: Any, place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.imaging import generate as making

    real, calls = making.generate_images, []

    def stopped(*given: Any, **how: Any) -> Any:
        inner = how["on_picture"]

        def on_picture(i: int, picture: Any) -> None:
            if i == 2:
                raise KeyboardInterrupt
            calls.append(i)
            inner(i, picture)

        return real(*given, **(how | {"on_picture": on_picture}))

    monkeypatch.setattr(making, "generate_images", stopped)
    image(capsys, place, "a cat", "--count", "4", "--batch-size", "1", "--steps", "1", "-o", "x.png", code=130)
    assert calls == [0, 1]
    assert sorted(p.name for p in folder.glob("*.png")) == ["x-1.png", "x-2.png"]
