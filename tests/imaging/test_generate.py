"""Generated pictures with metadata: A1111 can parse it, and adapters with equal names stay distinct."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.image_twins import levels, parse_as_a1111
from tests.tiny_image_base import SIZE, tiny_image_base
from veneer import api
from veneer.errors import ConfigError, DataError
from veneer.imaging.adapters import ImagePipeline, parse_use
from veneer.imaging.generate import ImageRequest, Options, RecordedPicture, generate, image_requests
from veneer.models.image.base import ImageBase, load_image


def one(base: ImageBase, ask: ImageRequest, say: Any = None, **options: Any) -> RecordedPicture:
    with ImagePipeline(base, say=say) as mixer:
        return generate(mixer, [ask], Options(**({"steps": 2} | options)))[0]


def their_adapters(found: dict[str, str]) -> dict[str, str]:
    """Return the hash of each adapter that the prompt names as <lora:NAME:…>.

    Follows infotext_pasted and parse_prompt of A1111's extensions-builtin/Lora."""
    listed = [part.strip().split(":", 1) for part in found["Lora hashes"].split(",")]
    hashes = {name.strip(): digest.strip() for name, digest in listed}
    return {name: hashes[name] for name in re.findall(r"<lora:([^:]+):", found["Prompt"])}


def test_a1111_reads_metadata_and_finds_every_adapter(
    base: ImageBase, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, source in (("a/x", "brand"), ("b/x", "look"), ("red, blue", "brand")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(files / f"{source}.safetensors", f"{name}.safetensors")
    specs = ["a/x.safetensors:0.8", "b/x.safetensors:-0.5@text=0.5", "red, blue.safetensors:0.3@unet=2"]
    ask = ImageRequest('a "cat", red:\nsecond line', "blue: 1, 2", 5, tuple(map(parse_use, specs)))
    made = one(base, ask, scheduler="euler-a", guidance=4.5)
    found = parse_as_a1111(made.text)
    tags = "<lora:x:0.8> <lora:x-2:-0.25:-0.5> <lora:red_ blue:0.3:0.6>"
    assert found["Prompt"] == f'a "cat", red:\nsecond line {tags}'
    assert found["Negative prompt"] == "blue: 1, 2"
    assert (found["Steps"], found["Sampler"], found["CFG scale"], found["Seed"]) == ("2", "Euler a", "4.5", "5")
    assert found["Size"] == "32x32"
    with ImagePipeline(base) as mixer:
        own = [mixer.add(spec.rpartition(":")[0]).autov3 for spec in specs]
    assert list(their_adapters(found).items()) == list(zip(["x", "x-2", "red_ blue"], own, strict=True))


def test_adapter_can_be_a_path(base: ImageBase, files: Path) -> None:
    adapters = [files / "brand.safetensors", (files / "look.safetensors", 0.5)]
    (made,) = api.image(base, "a cat", adapters=adapters, steps=2)
    named = one(base, ImageRequest("a cat", uses=(parse_use("brand.safetensors"), parse_use("look.safetensors:0.5"))))
    assert levels(made.image, named.image) == 0
    assert json.loads(json.dumps(made.record)) == made.record


def test_prompts_can_have_separate_seeds(base: ImageBase) -> None:
    both = api.image(base, ["a cat", "a dog"], seed=[3, 7], steps=2, batch_size=1)
    apart = [one(base, ImageRequest(prompt, seed=seed)) for prompt, seed in (("a cat", 3), ("a dog", 7))]
    assert [levels(a.image, b.image) for a, b in zip(both, apart, strict=True)] == [0, 0]
    with pytest.raises(ConfigError, match="2 prompts with 1 seed"):
        api.image(base, ["a cat", "a dog"], seed=[3], steps=2)


def test_seed_can_be_any_integer_type() -> None:
    assert [ask.seed for ask in image_requests(["a", "b"], (), seed=np.array([3, 7]), count=2)] == [3, 4, 7, 8]  # type: ignore[arg-type]
    assert {type(ask.seed) for ask in image_requests(["a"], (), seed=np.int64(5))} == {int}  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -1, 100_001])
def test_count_has_a_limit(count: int) -> None:
    with pytest.raises(ConfigError, match="at least 1, at most 100,000"):
        image_requests(["a cat"], (), count=count)


@pytest.mark.parametrize("seed", [1.0, None, "5", [1.5], ["1"], float("nan"), [None]])
def test_invalid_seed_is_named(seed: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"seed {seed!r}")):
        image_requests(["a cat"], (), seed=seed)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": "a \ud83d cat"}, r"the prompt is 'a \\ud83d cat'"),
        ({"prompt": "a cat", "negative": "\udcff"}, r"the negative prompt is '\\udcff'"),
        ({"prompt": b"a cat"}, "the prompt is b'a cat'"),
        ({"prompt": None}, "the prompt is None"),
        ({"prompt": "a cat", "seed": 1.5}, "seed 1.5"),
    ],
)
def test_invalid_request_is_refused_at_once(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ImageRequest(**given)


INVALID = {
    "steps": (2.5, "5", 10**9),
    "width": (32.5, 10**6),
    "height": (float("nan"),),
    "batch_size": (0,),
    "guidance": ("3", float("nan")),
    "true_guidance": (0.5,),
    "denoise": ("all",),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in INVALID.items() for value in values])
def test_error_names_the_invalid_option(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key} is {value!r}")):
        Options(**{key: value})


def test_size_beyond_every_base_is_refused() -> None:
    assert Options(width=4096, height=4096)
    with pytest.raises(ConfigError, match="60000×60000 exceeds the maximum"):
        Options(width=60_000, height=60_000)


def test_note_on_a_long_prompt_is_short(base: ImageBase) -> None:
    said: list[str] = []
    made = one(base, ImageRequest("a cat " * 1000), said.append, steps=1)
    (note,) = (line for line in said if "does not read the end" in line)
    assert len(note) < 300
    assert note.endswith(f"({len(made.cut):,} characters)")


def test_transparent_mask_areas_are_black(base: ImageBase, tmp_path: Path) -> None:
    given = Image.effect_noise((SIZE, SIZE), 90).convert("RGB")
    plain = Image.new("L", (SIZE, SIZE))
    plain.paste(255, (0, 0, SIZE // 2, SIZE))
    clear = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, SIZE // 2, SIZE))
    ask = ImageRequest("a cat", seed=1)
    pictures = [one(base, ask, image=given, mask=mask, denoise=1.0).image for mask in (plain, clear)]
    assert levels(*pictures) == 0, "what is transparent is kept"
    plain.paste(0, (0, 0, SIZE, SIZE))
    plain.save(tmp_path / "mask.png")
    with pytest.raises(DataError, match="the mask is all black"):
        one(base, ask, image=given, mask=tmp_path / "mask.png")


def test_size_follows_the_input_picture(base: ImageBase) -> None:
    said: list[str] = []
    made = one(base, ImageRequest("a cat"), said.append, image=Image.effect_noise((80, 40), 90), denoise=1.0)
    assert made.image.size == (48, 24)
    assert said == ["note: the picture was resized from 80×40 to 48×24"]
    small = one(base, ImageRequest("a cat"), image=Image.effect_noise((8, 8), 90), denoise=1.0)
    assert small.image.size == (SIZE, SIZE), "a small picture is no wish for a small one"
    assert one(base, ImageRequest("a cat"), image=Image.effect_noise((24, 20), 90), denoise=1.0).image.size == (24, 20)


def test_edit_base_without_a_reference_is_noted_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load_image(str(tiny_image_base(tmp_path_factory.getbasetemp(), "kontext")))
    told: list[str] = []
    with ImagePipeline(base, say=told.append) as mixer:
        for seed in range(2):
            generate(mixer, [ImageRequest("a fox", seed=seed)], Options(steps=1))
        assert len(told) == 1
        assert "is an edit base, but got only a prompt" in told[0]
        assert "--reference photo.png" in told[0]
        generate(mixer, [ImageRequest("a fox")], Options(steps=1, references=[Image.new("RGB", (SIZE, SIZE))]))
    assert len(told) == 1
