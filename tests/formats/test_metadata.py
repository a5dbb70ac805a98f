"""Metadata of other tools, veneer's own metadata, and file hashes."""

from __future__ import annotations

import hashlib
import json

import pytest
import safetensors.torch
import torch

from veneer.core.adapter import Card
from veneer.errors import AdapterError
from veneer.files.hashes import hashes, sealed, short_hash, verify_hashes
from veneer.files.safetensors import read_tensors, write_tensors
from veneer.formats.metadata import (
    MODELSPEC_ARCHITECTURES,
    card_from_metadata,
    family_in_metadata,
    metadata_of,
    pack_configs,
    trigger_words,
    unpack_configs,
)

CARD = Card("stabilityai/stable-diffusion-xl-base-1.0", kind="image", rank=16, alpha=8.0, metrics={"loss": 0.25})
CARD.trigger_words, CARD.parents, CARD.licence = ["sks dog", "naïve"], ["one", "two"], "openrail++"
CARD.created = "2026-11-24T10:00:00+00:00"
CARD.extra = {"title": "A dog", "author": "Ann", "description": "a “dog”", "tags": "dog, pet"}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Return more than 1 MiB of tensors, because the legacy hash covers only bytes after the first MiB.

    Because of the dtypes, a file does not store the tensors in the order of their names."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(300, 500, generator=generator).half(),
        "b": torch.randn(1000, 300, generator=generator),
        "c": torch.tensor(1.0),
    }


def test_the_hashes_of_a_file(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    found = hashes(path)
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    assert found.autov2 == found.sha256[:10]
    assert found.autov3 == hashlib.sha256(body).hexdigest()[:12]


def test_a_file_that_is_not_safetensors_has_no_autov3(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x80\x02something")
    assert hashes(path).autov3 == ""
    assert hashes(path).sha256 == hashlib.sha256(b"\x80\x02something").hexdigest()
    with pytest.raises(AdapterError, match="cannot read"):
        hashes(tmp_path / "none")


@pytest.mark.parametrize("ss", [True, False])
def test_the_stored_hashes_are_those_of_sd_scripts(tmp_path, tensors, ss):
    """Compares with sd-scripts, which hashes a file that it writes in memory, with only the ss_ keys."""
    metadata = metadata_of(CARD, family="sdxl", name="dog") if ss else {"modelspec.title": "x"}
    done = sealed(tensors, metadata)
    theirs = safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    body = theirs[8 + int.from_bytes(theirs[:8], "little") :]
    assert done["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert done["modelspec.hash_sha256"] == "0x" + done["sshs_model_hash"]
    assert done["sshs_legacy_hash"] == hashlib.sha256(theirs[0x100000:0x110000]).hexdigest()[:8]
    write_tensors(tmp_path / "x.safetensors", tensors, done)
    assert [(c.key, c.holds) for c in verify_hashes(tmp_path / "x.safetensors")] == [
        ("modelspec.hash_sha256", True),
        ("sshs_model_hash", True),
    ]
    assert read_tensors(tmp_path / "x.safetensors")[1] == done
    assert hashes(tmp_path / "x.safetensors").autov3 == done["sshs_model_hash"][:12]


def test_hashes_of_others_are_verified(tmp_path, tensors):
    """The file is written as sd-scripts writes it."""
    path = tmp_path / "x.safetensors"
    ss = {"ss_output_name": "x", "ss_training_comment": "é", "ss_network_dim": "16"}
    theirs = safetensors.torch.save(tensors, ss)
    body = theirs[8 + int.from_bytes(theirs[:8], "little") :]
    done = {**ss, "modelspec.title": "x", "sshs_model_hash": hashlib.sha256(body).hexdigest()}
    safetensors.torch.save_file(tensors, path, metadata=done)
    assert all(check.holds for check in verify_hashes(path))
    safetensors.torch.save_file({**tensors, "b": tensors["b"] + 1}, path, metadata=done)
    assert [check.holds for check in verify_hashes(path)] == [False]
    safetensors.torch.save_file(tensors, path)
    assert verify_hashes(path) == []


@pytest.mark.parametrize("stated", ["ab" * 32, "ab" * 6, "", "AB" * 32, "red, blue: 1", "ab" * 5])
def test_short_hash_is_that_stated_in_the_header(stated, tmp_path, tensors):
    """A1111's NetworkOnDisk uses the first 12 digits of `metadata.get("sshs_model_hash") or` AutoV3.

    A text that is not a hash must not be used, because it would break the list of hashes."""
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"sshs_model_hash": stated} if stated else None)
    theirs = path.read_bytes()
    body = hashlib.sha256(theirs[8 + int.from_bytes(theirs[:8], "little") :]).hexdigest()
    assert short_hash(path, hashes(path)) == ("ab" * 6 if stated in ("ab" * 32, "ab" * 6) else body[:12])
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert short_hash(tmp_path / "x.gguf", hashes(tmp_path / "x.gguf")) == hashlib.sha256(b"GGUF").hexdigest()[:12]


def test_equal_cards_give_equal_metadata_and_survive():
    one, two = metadata_of(CARD, family="sdxl", name="dog"), metadata_of(CARD, family="sdxl", name="dog")
    assert json.dumps(one) == json.dumps(two)
    card = card_from_metadata(one)
    for field in ("base", "rank", "alpha", "trigger_words", "licence", "created", "parents", "metrics", "kind"):
        assert getattr(card, field) == getattr(CARD, field), field
    assert card.extra | CARD.extra == card.extra
    card = card_from_metadata({k: v for k, v in one.items() if k != "veneer.card"})
    assert (card.rank, card.alpha, card.trigger_words) == (16, 8.0, ["sks dog", "naïve"])
    assert card.extra["title"] == "A dog"
    assert card.recipe["network_module"] == "networks.lora"


def test_metadata_has_the_keys_that_readers_use():
    """A1111 and Forge read ss_output_name, ss_base_model_version, ss_v2 and modelspec.architecture.

    Model managers read the other keys."""
    m = metadata_of(CARD, family="sdxl", name="dog")
    assert m["ss_output_name"] == "dog"
    assert m["ss_base_model_version"].startswith("sdxl_")
    assert m["ss_v2"] == "False"
    assert m["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert m["modelspec.sai_model_spec"] == "1.0.1"
    assert m["modelspec.trigger_phrase"] == "sks dog, naïve"
    assert set(json.loads(m["ss_tag_frequency"])["1_sks dog, naïve"]) == {"sks dog", "naïve"}
    assert (m["ss_network_dim"], m["ss_network_alpha"]) == ("16", "8")
    for key in ("title", "author", "description", "date", "license", "tags", "merged_from", "implementation"):
        assert m[f"modelspec.{key}"]
    assert all(isinstance(v, str) for v in m.values())
    mixed = metadata_of(Card(kind="image"), family=None)
    assert (mixed["ss_network_dim"], mixed["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert not any(k.startswith("modelspec.") for k in mixed)
    assert metadata_of(Card(kind="image"), family="flux1")["modelspec.architecture"] == "flux-1-dev/lora"


@pytest.mark.parametrize("family", MODELSPEC_ARCHITECTURES)
def test_family_written_by_veneer_is_recognized(family):
    m = metadata_of(Card(kind="image"), family=family)
    assert family_in_metadata(m) == family
    assert family_in_metadata({"ss_base_model_version": m["ss_base_model_version"]}) == family


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux1"),
        ({"modelspec.architecture": "flux-1-schnell/lora"}, "flux1"),
        ({"modelspec.architecture": "Flux.2-klein-4b/lora"}, "flux2"),
        ({"modelspec.architecture": "stable-diffusion-3-5-large/lora"}, "sd3-large"),
        ({"modelspec.architecture": "stable-diffusion-3-5-medium/lora"}, "sd3"),
        ({"ss_base_model_version": "sd_1.5"}, "sd15"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_v2": "True"}, "sd2"),
        ({"ss_v2": "False"}, None),
        ({"ss_base_model_version": "hunyuan-image-2.1"}, None),
        ({}, None),
    ],
)
def test_metadata_names_the_family(metadata, family):
    assert family_in_metadata(metadata) == family


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (
            {"modelspec.trigger_phrase": "sks dog, oil"},
            {"sks dog": "modelspec.trigger_phrase", "oil": "modelspec.trigger_phrase"},
        ),
        ({"trained_words": '["ohwx"]'}, {"ohwx": "trained_words"}),
        ({"trained_words": '"ohwx"'}, {"ohwx": "trained_words"}),
        ({"ss_tag_frequency": '{"1_p3rs0n": {"p3rs0n": 1}}'}, {"p3rs0n": "ss_tag_frequency"}),
        (
            {
                "ss_tag_frequency": '{"10_sks dog": {"sks": 20, "grass": 3, "dog": 20}}',
                "ss_dataset_dirs": '{"10_sks dog": {"n_repeats": 10, "img_count": 20}}',
            },
            {"sks": "ss_tag_frequency?", "dog": "ss_tag_frequency?", "sks dog": "ss_dataset_dirs?"},
        ),
        (
            {"ss_datasets": '[{"subsets": [{"class_tokens": "zwx cat"}, {"class_tokens": "cat", "is_reg": true}]}]'},
            {"zwx cat": "ss_datasets"},
        ),
        ({"ss_dataset_dirs": '{"img": {"img_count": 3}}'}, {}),
    ],
)
def test_trigger_words_are_found_in_metadata(metadata, words):
    assert trigger_words(metadata) == words
    card = card_from_metadata(metadata)
    sure = [w for w, key in words.items() if not key.endswith("?")]
    assert card.trigger_words == (sure or list(words))


def test_captions_in_our_files_are_not_trigger_words() -> None:
    """veneer's trainer states whether there is a trigger word, so words of captions do not count.

    A word that another tool added later (`activation text`) does count."""
    tags = {"1_prints": {"a vase": 1, "white wall": 2}}
    ours = metadata_of(Card(kind="image", extra={"tag_frequency": tags}), family="flux1")
    ours["ss_dataset_dirs"] = json.dumps({"1_prints": {"n_repeats": 1, "img_count": 2}})
    assert set(trigger_words(ours)) == {"white wall", "prints"}
    assert card_from_metadata(ours).trigger_words == []
    assert card_from_metadata(ours | {"activation text": "ink"}).trigger_words == ["ink"]


@pytest.mark.parametrize(
    "text",
    ["", "null", "[", "[" * 100_000, "7", '"x"', '[{"subsets": 3}]', '{"a": {"b": "c"}}', '{"a": [1]}', '{"a": NaN}'],
)
@pytest.mark.parametrize("key", ["ss_tag_frequency", "ss_datasets", "ss_dataset_dirs", "veneer.card"])
def test_malformed_metadata_raises_no_error(key, text):
    card_from_metadata({key: text})


def test_embedded_card_with_wrong_types_is_ignored():
    card = card_from_metadata(
        {"veneer.card": '{"rank": "many", "alpha": true, "trigger_words": [1], "base": "b", "more": 1}'}
    )
    assert (card.rank, card.alpha, card.trigger_words, card.base) == (0, 0.0, [], "b")


def test_times_and_numbers_of_sd_scripts():
    card = card_from_metadata(
        {
            "ss_training_finished_at": "1700000000.5", "ss_network_dim": "Dynamic", "ss_network_alpha": "0.5",
            "ss_sd_model_name": "None", "ss_unet_lr": "0.0001", "ss_text_encoder_lr": "None",
        }
    )  # fmt: skip
    assert (card.created, card.rank, card.alpha, card.base) == ("2023-11-14T22:13:20+00:00", 0, 0.5, "")
    assert card.recipe["unet_lr"] == "0.0001"
    assert "text_encoder_lr" not in card.recipe


def test_diffusers_settings_survive_a_round_trip():
    configs = {"unet": {"r": 4, "rank_pattern": {"a.b": 8}}, "text_encoder": {"lora_alpha": 2.0}}
    assert unpack_configs({"lora_adapter_metadata": pack_configs(configs)}) == configs
    assert unpack_configs({}) == {}
    for text in ("[]", "{", '{"r": 1}'):
        with pytest.raises(AdapterError, match="lora_adapter_metadata"):
            unpack_configs({"lora_adapter_metadata": text})


def test_card_that_json_cannot_represent_is_refused():
    with pytest.raises(AdapterError, match="JSON cannot"):
        metadata_of(Card(metrics={"a": float("nan")}))
