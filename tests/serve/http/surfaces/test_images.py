"""The image routes, called over a socket by OpenAI's client and by plain HTTP requests."""

from __future__ import annotations

import base64
import io
import json
import struct
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.image_twins import infotext_of, levels, random_adapter
from tests.serve.http.test_app import samples
from tests.serve.http.toy import served, wait_for
from tests.serve.pictures_here import Names, Shelf, picture_app, shelf_of
from tests.tiny_image_base import SIZE, tiny_control, tiny_image_base
from veneer.core.adapter import Adapter, Pair
from veneer.formats.convert import write
from veneer.formats.strengths import CAMPAIGN
from veneer.imaging.adapters import AdapterSource, ImagePipeline, parse_use
from veneer.imaging.generate import ImageRequest, Options, generate
from veneer.imaging.infotext import read_record
from veneer.models.image.base import ImageBase, load_image
from veneer.serve.access import NoWait, OpenAccess, ResolvedModel
from veneer.serve.pictures import engine as pictures
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.settings import HttpSettings

OPERATOR = Principal("operator")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ImageBase:
    return load_image(str(tiny_image_base(tmp_path_factory.getbasetemp(), "flux1")))


@pytest.fixture(scope="module")
def shelf(base: ImageBase) -> Shelf:
    return shelf_of(base)


@pytest.fixture(scope="module")
def engine(base: ImageBase, shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PictureEngine]:
    control = str(tiny_control(tmp_path_factory.getbasetemp(), "flux1"))
    with pytest.MonkeyPatch.context() as patch, PictureEngine(base, shelf.read, window=0.01) as opened:
        patch.setattr(pictures, "control_model_of", lambda base, spec: control)
        yield opened


@pytest.fixture(scope="module")
def names(base: ImageBase, shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Names:
    folder = tmp_path_factory.getbasetemp()
    other = load_image(str(tiny_image_base(folder, "sdxl")))
    write(random_adapter(other.model, 1), folder / "sdxl-look.safetensors", to="kohya", family="sdxl")
    return Names(base, shelf, {"sdxl-look": str(folder / "sdxl-look.safetensors")})


@pytest.fixture(scope="module")
def url(engine: PictureEngine, names: Names) -> Iterator[str]:
    with served(picture_app(engine, names, settings=HttpSettings(max_body=1 << 20, max_pixels=1 << 20))) as at:
        yield at


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as opened:
        yield opened


FEW: dict[str, Any] = {"num_inference_steps": 2, "seed": 7}


def picture(b64: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def b64(image: Image.Image) -> str:
    return base64.b64encode(file_of(image)).decode()


def noise(width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def left_open() -> Image.Image:
    """Return a mask in OpenAI's convention: transparent where the image should be edited."""
    mask = Image.new("RGBA", (SIZE, SIZE), "black")
    mask.paste((0, 0, 0, 0), (0, 0, SIZE // 2, SIZE))
    return mask


def one(client: openai.OpenAI, **more: Any) -> Image.Image:
    return picture(client.images.generate(prompt="a red cat", model="tiny", extra_body=FEW | more).data[0].b64_json)


# -- generations -------------------------------------------------------------------------------------------------------


def test_openai_client_gets_images_with_metadata(client: openai.OpenAI, shelf: Shelf, tmp_path: Path) -> None:
    found = client.images.generate(
        prompt="a red cat", model="brand", n=2, size=f"{SIZE}x{2 * SIZE}", quality="low", extra_body={"seed": 7}
    )
    assert (found.size, found.output_format, found.background, found.quality) == ("32x64", "png", "opaque", "low")
    assert abs(found.created - time.time()) < 60
    first, second = (picture(data.b64_json) for data in found.data)
    assert first.size == (SIZE, 2 * SIZE)
    assert levels(first, second) > 0
    assert [data.seed for data in found.data] == [7, 8]
    kept = tmp_path / "found.png"
    kept.write_bytes(base64.b64decode(found.data[1].b64_json))
    record = read_record(kept)
    text = infotext_of(kept)
    assert text.startswith("a red cat <lora:brand:1>\nSteps: 14, "), "low: half of 28"
    assert ", Seed: 8, Size: 32x64, " in text
    assert record["rows"][0]["adapters"] == [[shelf.digest["brand"], "1"]]
    assert record["base"]["name"] == "tiny-flux1", "no path of the server"
    usage = found.usage
    assert usage.output_tokens == 2 * (SIZE // 8) * (2 * SIZE // 8)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens == usage.input_tokens_details.text_tokens > 3


def test_every_way_to_name_an_adapter_works(client: openai.OpenAI) -> None:
    named = picture(client.images.generate(prompt="a red cat", model="brand", extra_body=FEW).data[0].b64_json)
    others = [
        picture(client.images.generate(prompt="a red cat", model="tiny:brand", extra_body=FEW).data[0].b64_json),
        one(client, mix=[{"adapter": "brand"}]),
        one(client, mix=["brand:1"]),
        one(client, mix=["brand:0.4", "brand:0.6"]),
    ]
    assert [levels(named, other) for other in others] == [0] * 4
    plain = one(client)
    assert levels(plain, one(client, mix=[])) == 0
    assert levels(plain, named) > 8
    both = one(client, mix=[{"adapter": "brand", "strength": 0.5}, {"adapter": "dora", "strength": -0.5}])
    assert min(levels(both, plain), levels(both, named)) > 3
    assert "<lora:brand:0.5>" in both.info["parameters"]
    assert "<lora:dora:-0.5>" in both.info["parameters"]
    assert levels(plain, one(client)) == 0, "the base is as it was"


def test_a_stream_shows_progress_and_the_picture(client: openai.OpenAI) -> None:
    more = {"num_inference_steps": 6, "seed": 7}
    with client.images.generate(prompt="a red cat", model="brand", stream=True, n=2, extra_body=more) as stream:
        events: list[Any] = list(stream)
    mine = [event for event in events if event.index == 0]
    steps = [event.step for event in mine if event.type == "image_generation.progress"]
    assert steps == list(range(1, 7))
    done = mine[-1]
    assert done.type == "image_generation.completed"
    assert (done.size, done.usage.output_tokens, done.seed) == ("32x32", 16, 7)
    assert sum(event.type == "image_generation.completed" for event in events) == 2
    whole = client.images.generate(prompt="a red cat", model="brand", extra_body=more)
    assert levels(picture(done.b64_json), picture(whole.data[0].b64_json)) <= 1, "two in a batch, and alone"


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_jpeg_and_webp_contain_the_infotext(client: openai.OpenAI, kind: Any) -> None:
    found = client.images.generate(
        prompt="a red cat", output_format=kind, output_compression=60, response_format="url", extra_body=FEW
    )
    head, _, rest = found.data[0].url.partition(",")
    assert head == f"data:image/{kind};base64"
    made = io.BytesIO(base64.b64decode(rest))
    assert Image.open(made).format == kind.upper()
    comment = Image.open(made).getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0" + "a red cat\nSteps: ".encode("utf-16-be"))


def test_negative_prompt_changes_the_image_with_true_cfg(client: openai.OpenAI) -> None:
    plain, guided = one(client, true_cfg_scale=4.0), one(client, true_cfg_scale=4.0, negative_prompt="a blue dog")
    assert levels(plain, guided) > 0
    assert "Negative prompt: a blue dog" in guided.info["parameters"]


def test_a_shortened_prompt_is_reported(client: openai.OpenAI) -> None:
    found = client.images.generate(prompt="a red cat " * 30, extra_body=FEW)
    assert "does not read the end" in found.data[0].notes[0]


# -- edits and controls ------------------------------------------------------------------------------------------------


def test_an_edit_changes_only_transparent_mask_areas(client: openai.OpenAI, url: str) -> None:
    given, mask = noise(), left_open()
    more = FEW | {"mix": ["brand:0.5", "look:0.5"]}
    found = client.images.edit(
        image=("in.png", file_of(given)), mask=("mask.png", file_of(mask)), prompt="a red cat", extra_body=more
    )
    made = picture(found.data[0].b64_json)
    assert np.array_equal(np.asarray(made)[:, SIZE // 2 :], np.asarray(given)[:, SIZE // 2 :])
    assert levels(made.crop((0, 0, SIZE // 2, SIZE)), given.crop((0, 0, SIZE // 2, SIZE))) > 8
    assert "Denoising strength: 1" in made.info["parameters"]
    assert found.usage.input_tokens_details.image_tokens == 16
    body = more | {"prompt": "a red cat", "images": [{"image_url": f"data:image/png;base64,{b64(given)}"}]}
    as_json = httpx.post(f"{url}/v1/images/edits", json=body | {"mask": b64(mask)}).json()
    assert levels(picture(as_json["data"][0]["b64_json"]), made) == 0
    white = mask.getchannel("A").point(lambda a: 255 - a)
    by_white = httpx.post(f"{url}/v1/images/edits", json=body | {"mask": b64(white)}).json()
    assert levels(picture(by_white["data"][0]["b64_json"]), made) == 0, "without transparency, white is open"


def test_an_edit_without_a_mask_starts_from_the_picture(client: openai.OpenAI) -> None:
    with client.images.edit(
        image=[("in.jpg", file_of(noise(2 * SIZE, SIZE), "JPEG"))],
        prompt="a cat",
        stream=True,
        input_fidelity="low",
        extra_body={"denoise": 0.5, "seed": 1},
    ) as stream:
        events: list[Any] = list(stream)
    assert [event.type for event in events[:-1]] == ["image_edit.progress"] * 14, "half of 28 steps"
    assert events[-1].type == "image_edit.completed"
    assert events[-1].size == "48x24", "in the picture's proportion"
    assert "resized from 64×32" in events[-1].notes[0]


def test_controls_come_in_json_and_in_forms(client: openai.OpenAI, url: str) -> None:
    lines = noise()
    control = {"type": "edges", "strength": 0.8}
    held = one(client, control=[control | {"image": b64(lines)}])
    assert levels(held, one(client)) > 0
    fields = {"prompt": "a red cat", "num_inference_steps": "2", "seed": "7"}
    fields["control"] = json.dumps(control | {"image": b64(lines)})
    form = httpx.post(f"{url}/v1/images/generations", files={key: (None, value) for key, value in fields.items()})
    assert levels(picture(form.json()["data"][0]["b64_json"]), held) == 0
    assert "ControlNet 0" in held.info["parameters"]


@pytest.mark.parametrize("family", ["kontext", pytest.param("klein", marks=pytest.mark.slow)])
def test_an_editing_base_edits_like_veneer_image(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Equal seeds give equal pixels."""
    base = load_image(str(tiny_image_base(tmp_path_factory.getbasetemp(), family)))
    shelf = Shelf(brand=random_adapter(base.model, 1))
    guidance = {"guidance_scale": 1.0}
    given = [noise(2 * SIZE, 2 * SIZE), noise(4 * SIZE, 4 * SIZE)][: base.references]
    with (
        PictureEngine(base, shelf.read, window=0.3) as engine,
        served(picture_app(engine, Names(base, shelf))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        size, more = f"{2 * SIZE}x{2 * SIZE}", FEW | guidance
        files = [("in.png", file_of(image)) for image in given]
        found = client.images.edit(
            model="brand", image=files, prompt="make it red", n=2, size=size, input_fidelity="high", extra_body=more
        )

        def post(route: str, body: dict[str, Any]) -> httpx.Response:
            return httpx.post(f"{url}/v1/images/{route}", json=body, timeout=120)

        body = more | {"prompt": "make it red", "image": [b64(image) for image in given], "size": size}
        streamed = post("edits", body | {"n": 2, "stream": True}).text
        drawn = post("generations", more | {"prompt": "make it red", "size": size}).json()
        refused = [
            post("edits", body | wrong).json()["error"]["message"]
            for wrong in (
                {"denoise": 0.5},
                {"image": body["image"][:1] * 11},
                {"mask": b64(left_open())},
                {"image": b64(noise(90, 2))},
                {"control": [{"type": "canny", "image": b64(noise())}]},
                {"mask": b64(left_open()), "image": body["image"][:1] * 2},
                {"mask": b64(left_open()), "image": body["image"][:1], "input_fidelity": "high"},
            )
        ]
    with ImagePipeline(base) as mixer:
        mixer.attachment.add("brand", shelf.adapters[shelf.digest["brand"]])
        mixer.sources["brand"] = AdapterSource("brand", "", "", "", "", "")
        asks = [ImageRequest("make it red", seed=seed, uses=(parse_use("brand"),)) for seed in (7, 8)]
        made = generate(mixer, asks, Options(2 * SIZE, 2 * SIZE, 2, 1.0, references=given))
        alone = generate(mixer, [ImageRequest("make it red", seed=7)], Options(2 * SIZE, 2 * SIZE, 2, 1.0))[0]
    for ours, data in zip(made, found.data, strict=True):
        assert levels(ours.image, picture(data.b64_json)) == 0
    assert levels(picture(found.data[0].b64_json), picture(found.data[1].b64_json)) > 0
    assert levels(alone.image, picture(drawn["data"][0]["b64_json"])) == 0
    assert found.usage.input_tokens_details.image_tokens >= 64 * len(given)
    for index in (0, 1):  # both images report progress, whether or not they were batched
        assert any(f'"index": {index}' in line and ".progress" in line for line in streamed.split("\n\n"))
    assert "runs all steps" in refused[0]
    assert f"11 images: {base.row.label} accepts at most {base.references}" in refused[1]
    assert family == "klein" or "accepts no mask" in refused[2]
    assert "the image has 90×2 pixels" in refused[3]
    assert "controls cannot be combined" in refused[4]
    assert "leave the mask out" in refused[5] if family == "klein" else "accepts no mask" in refused[5]
    assert "denoise sets how close" in refused[6] if family == "klein" else "accepts no mask" in refused[6]
    assert (family == "klein") != ("edits images" in str(drawn["data"][0].get("notes")))


# -- factors per block and per step ------------------------------------------------------------------------------------

FACTORS: list[tuple[str, dict[str, Any]]] = [
    ("brand:0.8@double=0.3,single.0=0,text=2", {"strength": 0.8, "blocks": {"double": 0.3, "single.0": 0, "text": 2}}),
    ("brand:1@steps=0-0.5", {"steps": [[0, 0.5]]}),
    ("brand@double.0-1=0,steps=0-0.3:0.2+0.3-1", {"blocks": {"double.0-1": 0}, "steps": [[0, 0.3, 0.2], [0.3, 1]]}),
]


@pytest.fixture(scope="module")
def by_hand(base: ImageBase, shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Image.Image]:
    """Return a function that generates the image of `one` as `veneer image` does, on a separate base."""
    folder = tmp_path_factory.mktemp("by-hand")
    for name in ("brand", "look"):
        write(shelf.adapters[shelf.digest[name]], folder / f"{name}.safetensors", to="kohya", family="flux1")
    own = load_image(str(base.directory))

    def drawn(spec: str) -> Image.Image:
        with ImagePipeline(own) as mixer:
            uses = (parse_use(f"{folder}/{spec.replace('brand', 'brand.safetensors')}"),)
            return generate(mixer, [ImageRequest("a red cat", seed=7, uses=uses)], Options(steps=6))[0].image

    return drawn


@pytest.mark.parametrize(("spec", "part"), FACTORS, ids=[spec for spec, _ in FACTORS])
def test_factors_by_block_and_step_equal_veneer_image(client, url, by_hand, spec, part):
    few = {"num_inference_steps": 6}
    plain = one(client, mix=["brand"], **few)
    found = one(client, mix=[{"adapter": "brand"} | part], **few)
    assert levels(found, by_hand(spec)) == 0 < levels(found, plain)
    assert levels(one(client, mix=[spec], **few), found) == 0
    fields = {"prompt": "a red cat", **few, "seed": "7"}
    for mix in ({"mix": json.dumps([{"adapter": "brand"} | part])}, {"mix": spec}):
        form = httpx.post(f"{url}/v1/images/generations", files={k: (None, str(v)) for k, v in (fields | mix).items()})
        assert levels(picture(form.json()["data"][0]["b64_json"]), found) == 0
    assert json.loads(found.info["veneer"])["rows"][0]["adapters"][0][1] == str(parse_use(spec)[1])


def test_a_campaign_role_sets_its_strengths(client: openai.OpenAI, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"product": "double=1,single=0.3", "brand": "", "lens": "double=0.3,steps=0.4-1"}
    monkeypatch.setitem(CAMPAIGN, "flow", table)
    parts = {"product": {"adapter": "brand", "strength": 0.8}, "lens": {"adapter": "look"}}
    mixes: list[Any] = [
        [part | {"campaign": role} for role, part in parts.items()],
        ["brand:0.8@campaign=product", "look@campaign=lens"],
        [f"brand:0.8@{table['product']}", f"look@{table['lens']}"],
    ]
    asked, written, typed = (one(client, mix=mix) for mix in mixes)
    assert levels(asked, one(client, mix=["brand:0.8", "look"])) > 0
    assert asked.info["veneer"] == written.info["veneer"] == typed.info["veneer"]
    assert asked.tobytes() == written.tobytes() == typed.tobytes()
    found = client.images.generate(prompt="a red cat", extra_body=FEW | {"mix": mixes[0]}).data[0]
    assert f"look is the campaign's lens: {table['lens']}" in found.notes
    form = {"prompt": "a red cat", "num_inference_steps": "2", "seed": "7", "mix": json.dumps(mixes[0])}
    sent = httpx.post(f"{url}/v1/images/generations", files={k: (None, v) for k, v in form.items()})
    assert picture(sent.json()["data"][0]["b64_json"]).tobytes() == typed.tobytes()


def test_different_factors_share_a_batch(base: ImageBase, shelf: Shelf, names: Names) -> None:
    mixes: list[Any] = [[spec] for spec, _ in FACTORS] + [["brand:0.8@double=0.3", "look@steps=0.5-1"]]
    with (
        PictureEngine(load_image(str(base.directory)), shelf.read, window=0.2) as engine,
        served(picture_app(engine, names)) as at,
        ThreadPoolExecutor(4) as pool,
        httpx.Client(timeout=60) as http,
    ):

        def drawn(mix: Any, steps: int = 6) -> tuple[Image.Image, int]:
            body = FEW | {"prompt": "a red cat", "num_inference_steps": steps, "mix": mix}
            answer = http.post(f"{at}/v1/images/generations", json=body).json()
            return picture(answer["data"][0]["b64_json"]), engine.stats().steps

        together = list(pool.map(drawn, mixes))
        assert {steps for _, steps in together} == {6}, "one batch"
        for mix, (shared, _) in zip(mixes, together, strict=True):
            assert levels(drawn(mix)[0], shared) <= 1
        many = [[{"adapter": "brand", "blocks": {"single": 0.5, "double": i}}] for i in range(20)]
        first, *_, last = pool.map(lambda mix: drawn(mix, 1), many)
        assert levels(first[0], last[0]) > 0
        assert len(engine.attachment.adapters) < 64, "unused mixes are removed"
    assert not engine.attachment.adapters


def test_options_without_effect_are_reported_in_notes(client: openai.OpenAI) -> None:
    body = FEW | {"mix": [{"adapter": "brand", "blocks": {"proj_out": 0}, "steps": [[0, 0.5]]}]}
    notes = client.images.generate(prompt="<lora:brand:1> a cat", extra_body=body).data[0].notes
    for said in ("plain text", "brand changes nothing in 'proj_out'", "brand: the part on the text encoder"):
        assert any(said in note for note in notes), notes
    alone = FEW | {"mix": [{"adapter": "tiny", "blocks": {"double": 2}}, "tiny@steps=0-0.5", "tiny@campaign=lens"]}
    notes = client.images.generate(prompt="a cat", extra_body=alone).data[0].notes
    assert "tiny is the base: its role has no effect" in notes
    assert notes.count("tiny is the base: its blocks and steps have no effect") == 2
    late = FEW | {"num_inference_steps": 3, "mix": ["brand@steps=0.7-1"]}
    notes = client.images.generate(prompt="a cat", extra_body=late).data[0].notes
    assert "brand: steps=0.7-1 contains no step of 3 steps, so the adapter has no effect" in notes


def test_the_openapi_description_has_the_body_schemas(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    for path, key in (("generations", "mix"), ("edits", "mask")):
        content = paths[f"/v1/images/{path}"]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}
        schema = content["application/json"]["schema"]
        assert key in schema["properties"]
        assert "$ref" not in json.dumps(schema)
        part = next(kind for kind in schema["properties"]["mix"]["anyOf"] if "items" in kind)["items"]
        assert set(part["properties"]) == {"adapter", "strength", "blocks", "steps", "campaign"}


# -- refusals ----------------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> str:
    """Return a small PNG whose header claims a large size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return base64.b64encode(data + b"\0\0\0\0IDAT").decode()


WRONG_FACTORS: list[tuple[dict[str, Any], str]] = [
    ({"blocks": {"douple": 1}}, "'douple' names no block of this base: did you mean double"),
    ({"blocks": {"double.0-999999999": 1}}, "names no block"),
    ({"blocks": {"double=0,single": 1}}, "match pattern"),
    ({"blocks": {"a" * 129: 1}}, "at most 128"),
    ({"blocks": {"double": 1e9}}, "less than or equal to 10000"),
    ({"blocks": {"double": 101}, "strength": 100}, "is 10100"),
    ({"blocks": {"double": "much"}}, "valid number"),
    ({"blocks": {f"single.{i}": i / 100 for i in range(65)}}, "at most 64"),
    ({"blocks": 0.5}, "mix.0.blocks"),
    ({"steps": [[0.5]]}, "at least 2"),
    ({"steps": [[0, 0.5, 1, 1]]}, "at most 3"),
    ({"steps": [[0.6, 0.2]]}, "0.6-0.2 is not a range of steps"),
    ({"steps": [[0, 0.6], [0.5, 1]]}, "overlap at 0.5"),
    ({"steps": "0-0.6"}, "valid list"),
    ({"steps": [[0, 1]] * 65}, "at most 64"),
    ({"stpes": [[0, 1]]}, "did you mean 'steps'"),
    ({"campaign": "lense"}, "did you mean lens?"),
    ({"campaign": ""}, "at least 1"),
    ({"campaign": "lens", "steps": [[0, 1]]}, "sets blocks and steps"),
]

GENERATE: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "nobody"}, 404, "model_not_found", "nobody"),
    ({"mix": [{"adapter": "nobody"}]}, 404, "model_not_found", "nobody"),
    ({"model": "sdxl-look"}, 400, "adapter_unusable", "an SDXL adapter"),
    ({"model": "brand", "mix": ["look"]}, 400, "invalid_request", "model, mix"),
    ({"mix": [{"adapter": "brand", "path": "/etc"}]}, 400, "invalid_request", "unknown key 'mix.0.path'"),
    ({"mix": {"brand": 1}}, 400, "invalid_request", "unknown key 'mix.0.brand'"),
    ({"mix": [{"adapter": "brand", "strenght": 1}]}, 400, "invalid_request", "did you mean 'strength'"),
    *(({"mix": [{"adapter": "brand"} | wrong]}, 400, "invalid_request", said) for wrong, said in WRONG_FACTORS),
    ({"mix": [{"strength": 1}]}, 400, "invalid_request", "mix.0.adapter"),
    ({"mix": ["brand@double=x"]}, 400, "invalid_request", "'x' is not a strength"),
    ({"mix": ["brand@double=0.5,steps=0.6-0.2"]}, 400, "invalid_request", "0.6-0.2 is not a range of steps"),
    ({"mix": ["brand@/etc/passwd=1"]}, 400, "invalid_request", "mix.0.blocks"),
    ({"mix": ["brand@double=0", "tiny:brand:0.5"]}, 400, "invalid_request", "named twice with different blocks, steps"),
    ({"mix": ["brand@campaign=lens", "look@campaign=lens"]}, 400, "invalid_request", "occurs twice: brand, look"),
    ({"mix": 7}, 400, "invalid_request", "mix must be a valid list"),
    ({"guidence_scale": 1}, 400, "invalid_request", "did you mean 'guidance_scale'"),
    ({"prompt": ""}, 400, "invalid_request", "prompt"),
    ({"n": 11}, 400, "invalid_request", "at most 10"),
    ({"size": "33x32"}, 400, "invalid_request", "multiples of"),
    ({"size": "big"}, 400, "invalid_request", "size"),
    ({"size": "99999x99999"}, 400, "invalid_request", "pixels"),
    ({"num_inference_steps": 151}, 400, "invalid_request", "at most 150"),
    ({"negative_prompt": "a dog"}, 400, "invalid_request", "no effect"),
    ({"background": "transparent"}, 400, "invalid_request", "opaque"),
    ({"moderation": "auto"}, 400, "invalid_request", "moderation"),
    ({"output_compression": 50}, 400, "invalid_request", "PNG"),
    ({"partial_images": 1}, 400, "invalid_request", "partial_images"),
    ({"scheduler": "eulr"}, 400, "invalid_request", "eulr"),
    ({"control": {"type": "pose", "image": b64(noise())}}, 400, "invalid_request", "canny, depth, edges"),
    ({"control": {"type": "edges", "image": b64(noise(64, 32))}, "size": "32x32"}, 400, "invalid_request", "aspect"),
    ({"control": {"type": "edges", "image": "bm90aGluZw=="}}, 400, "invalid_request", "not a picture"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code", "said"), GENERATE, ids=[case[3] for case in GENERATE])
def test_invalid_requests_have_openais_error_form(client, body, status, code, said):
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(prompt="a red cat", extra_body=body)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert said in caught.value.message
    if code != "adapter_unusable":  # the adapter_unusable error names the adapter's path
        assert tempfile.gettempdir() not in caught.value.message  # the base's folder is inside the temporary folder
    assert caught.value.type == "invalid_request_error"


EDIT: list[tuple[dict[str, Any], str]] = [
    ({}, "no image to edit"),
    ({"image": [b64(noise()), b64(noise())]}, "2 images"),
    ({"image": "https://example.org/a.png"}, "not fetched"),
    ({"image": "file:///etc/passwd"}, "not base64"),
    ({"image": base64.b64encode(b"<svg/>").decode()}, "not a picture"),
    ({"image": b64(noise())[:200]}, "not a picture"),
    ({"image": bomb(3000, 3000)}, "at most 1048576 pixels"),
    ({"image": bomb(60000, 60000)}, "more pixels than veneer opens: 178,956,970: at most 1048576 pixels"),
    ({"image": b64(noise()), "mask": b64(Image.new("RGBA", (SIZE, SIZE), "black"))}, "selects nothing"),
    ({"image": b64(noise()), "mask": b64(left_open().resize((SIZE, 2 * SIZE)))}, "another aspect ratio"),
    ({"image": b64(noise()), "denoise": 2}, "denoise"),
    ({"image": b64(noise()), "input_fidelity": "high"}, "denoise sets how close"),
    ({"image": b64(noise()), "input_fidelity": "hgih"}, "input_fidelity"),
    ({"image": b64(noise()), "size": "64x32"}, "another aspect ratio"),
]


@pytest.mark.parametrize(("body", "said"), EDIT, ids=[case[1] for case in EDIT])
def test_invalid_picture_files_are_refused(url: str, body: dict[str, Any], said: str) -> None:
    found = httpx.post(f"{url}/v1/images/edits", json={"prompt": "a cat"} | body)
    assert found.status_code == 400
    assert said in found.json()["error"]["message"]


def test_bodies_are_limited_and_must_match_their_type(url: str) -> None:
    at = f"{url}/v1/images/edits"
    large = httpx.post(at, json={"prompt": "a" * (1 << 20)})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    upload = httpx.post(at, data={"prompt": "a"}, files={"image": ("a.png", b"0" * (1 << 20))})
    assert upload.status_code == 413
    for kind, content in (("application/json", b"[]"), ("application/json", b"{"), ("multipart/form-data", b"x")):
        assert httpx.post(at, content=content, headers={"content-type": kind}).status_code == 400
    odd_bodies = (b'{"prompt": "\\ud800"}', b'{"prompt": "a", "\\ud800": 1}', b'{"prompt": "a", "seed": NaN}')
    for odd in (*odd_bodies, b"[" * 100000):
        found = httpx.post(f"{url}/v1/images/generations", content=odd, headers={"content-type": "application/json"})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_request")
    nothing = {"n": None, "mix": None, "control": None, "size": None, "quality": None, "model": None}
    assert httpx.post(f"{url}/v1/images/generations", json=FEW | nothing | {"prompt": "a"}).status_code == 200
    unused = httpx.post(at, data={"prompt": "a"}, files={"image": ("a", file_of(noise())), "sketch": ("b", b"0")})
    assert "unknown key 'sketch'" in unused.json()["error"]["message"]


def test_an_error_in_a_stream_is_an_event(client: openai.OpenAI, url: str, shelf: Shelf) -> None:
    pairs = shelf.adapters[shelf.digest["brand"]].pairs
    name = next(name for name in pairs if name.startswith("transformer"))
    over = Adapter({name: Pair(pairs[name].A * 1e20, pairs[name].B * 1e20, 1.0)})
    shelf.digest["over"] = over.digest()
    shelf.adapters[over.digest()] = over
    body = FEW | {"prompt": "a", "stream": True, "model": "over"}
    events = httpx.post(f"{url}/v1/images/generations", json=body).text.strip().split("\n\n")
    kind, data = events[-1].split("\n")
    assert kind == "event: error"
    told = json.loads(data.removeprefix("data: "))["error"]
    assert (told["code"], told["type"]) == ("invalid_request", "invalid_request_error")
    assert "NaN or infinite" in told["message"]
    stream = client.images.generate(prompt="a", model="over", stream=True, extra_body=FEW)
    with stream, pytest.raises(openai.APIError, match="NaN or infinite"):
        list(stream)
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="nobody", stream=True)


# -- tenants and disconnects -------------------------------------------------------------------------------------------


def test_a_client_that_disconnects_cancels_its_request(url: str, engine: PictureEngine) -> None:
    def idle() -> None:
        wait_for(lambda: not engine.stats().running and not engine.stats().waiting)

    body = {"prompt": "a", "num_inference_steps": 150, "size": f"{2 * SIZE}x{2 * SIZE}"}
    before = engine.stats().steps
    with httpx.stream("POST", f"{url}/v1/images/generations", json=body | {"stream": True}) as stream:
        next(stream.iter_lines())
    idle()
    after_stream = engine.stats().steps
    assert after_stream < before + 100
    with pytest.raises(httpx.ReadTimeout):  # a fast processor takes 0.2 s for 150 steps
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=0.05)
    idle()
    assert engine.stats().steps < after_stream + 140


class Tenants(OpenAccess):
    """A tenancy with keys, a tenant over its limit, and a list of bills."""

    def __init__(self) -> None:
        self.bills: list[tuple[str, int, int, Usage]] = []

    async def authenticate(self, key: str | None, user: str | None = None) -> Principal:
        if key not in ("acme", "poor"):
            raise Refused("this key is not known", status=401, code="unauthorized")
        return Principal("tenant", key, lambda name: name != "look")

    @asynccontextmanager
    async def admitted(
        self, caller: Principal, served: ResolvedModel, *, request: str, prompt_tokens: int, max_tokens: int
    ) -> AsyncIterator[Any]:
        if caller.tenant == "poor":
            raise Refused("no budget", status=429, code="rate_limited", retry_after=7.0)

        class Bill:
            @staticmethod
            def used(usage: Usage) -> NoWait:
                self.bills.append((caller.tenant, prompt_tokens, max_tokens, usage))
                return NoWait()

        yield Bill()


def test_images_respect_tenant_access_limits_and_billing(base: ImageBase, engine: PictureEngine, names: Names) -> None:
    tenants = Tenants()
    with served(picture_app(engine, names, tenants)) as at:

        def ask(key: str, **body: Any) -> httpx.Response:
            body = FEW | {"prompt": "a cat"} | body
            return httpx.post(f"{at}/v1/images/generations", json=body, headers={"authorization": f"Bearer {key}"})

        unknown, limited = ask("other"), ask("poor")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (limited.status_code, limited.headers["retry-after"]) == (429, "7")
        assert ask("acme", mix=["look"]).status_code == 404
        assert not tenants.bills
        assert ask("acme", n=2).status_code == 200
        ((tenant, prompt, most, usage),) = tenants.bills
        assert (tenant, usage.prompt, usage.completion) == ("acme", prompt, most) == ("acme", usage.prompt, 32)
        assert usage.decode > 0
    assert OPERATOR.sees("look")


def test_metrics_count_pictures_by_adapter(engine: PictureEngine, names: Names) -> None:
    """Each picture counts once, as a completion does; refused requests are not counted."""
    with served(picture_app(engine, names)) as at:

        def ask(**body: Any) -> int:
            body = FEW | {"prompt": "a cat"} | body
            return httpx.post(f"{at}/v1/images/generations", json=body).status_code

        assert [ask(n=2), ask(model="look"), ask(mix=[])] == [200] * 3
        assert ask(mix=["nobody"]) == 404
        found = samples(httpx.get(f"{at}/metrics").text)
    assert found["veneer:adapter_requests_total", "look,stop"] == 1
    assert found["veneer:adapter_requests_total", f"{names.base},stop"] == 3
    assert found["vllm:e2e_request_latency_seconds_count", ""] == 4
    assert found["vllm:num_requests_running", ""] == found["vllm:num_requests_waiting", ""] == 0
    assert found["veneer:engine_steps_total", ""] == engine.stats().steps > 0
