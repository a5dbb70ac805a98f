"""Convert other tools' safetensors metadata to a card, and a card to metadata.

Writes modelspec 1.0.1, the `ss_` keys that A1111, Forge and ComfyUI's managers read, and the card as JSON
under `veneer.card`. `files.hashes.sealed` then adds the hashes. Equal cards give equal metadata: no timestamp
is written unless the card has one. Values of `modelspec.` and `ss_` keys are strings; lists are
comma-separated.

Trigger words occur under many keys. Explicit trigger words come first. A tag that occurs in every caption, or
the name of a data set's folder (`10_sks dog`), is a guess, and is used only if no explicit trigger words
exist. This module works on strings, not tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

from veneer.core.adapter import Card
from veneer.errors import AdapterError

SAI, BFL = "https://github.com/Stability-AI/generative-models", "https://github.com/black-forest-labs/flux"
MODELSPEC_ARCHITECTURES: dict[str, tuple[str, str, str]] = {
    "sd15": ("stable-diffusion-v1", "diffusers", "sd_v1"),
    "sd2": ("stable-diffusion-v2-512", "diffusers", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", SAI, "sdxl_base_v1-0"),
    "sd3": ("stable-diffusion-3", "diffusers", "sd3"),
    "sd3-large": ("stable-diffusion-3-5-large", "diffusers", "sd3.5-large"),
    "flux1": ("flux-1-dev", BFL, "flux1"),
    "flux2": ("Flux.2-dev", "https://github.com/black-forest-labs/flux2", "flux2"),
    "qwen-image": ("Qwen-Image", "https://github.com/QwenLM/Qwen-Image", "qwen_image"),
    "z-image": ("Z-Image", "https://github.com/Tongyi-MAI/Z-Image", "zimage"),
}
"""Family -> (architecture without `/lora`, implementation, base model version).

The values of modelspec.architecture, modelspec.implementation and ss_base_model_version, as sd-scripts and
musubi-tuner write them."""

# (prefix, family). Metadata text is lowercased and reduced to letters and digits; the first match wins.
_FAMILIES = [
    ("stablediffusionv1", "sd15"), ("sdv1", "sd15"), ("sd15", "sd15"), ("sd1", "sd15"),
    ("stablediffusionv2", "sd2"), ("sdv2", "sd2"), ("sd2", "sd2"), ("stablediffusionxl", "sdxl"), ("sdxl", "sdxl"),
    ("stablediffusion35large", "sd3-large"), ("sd35large", "sd3-large"), ("35large", "sd3-large"),
    ("stablediffusion3", "sd3"), ("stablediffusionv3", "sd3"), ("sd3", "sd3"), ("35medium", "sd3"), ("3medium", "sd3"),
    ("flux2", "flux2"), ("flux1", "flux1"), ("fluxkontext", "flux1"), ("qwenimage", "qwen-image"),
    ("zimage", "z-image"),
]  # fmt: skip

# Keys that contain explicit trigger words, as a JSON list or comma-separated.
_TRIGGER_KEYS = (
    *("modelspec.trigger_phrase", "trained_words", "ss_trained_words", "trainedWords", "trigger_words", "trigger_word"),
    *("ss_trigger_words", "trigger_phrase", "ss_activation_tags", "activation text", "instance_prompt"),
)
_BULKY = {"ss_tag_frequency", "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info"}
_TEXTS = ("title", "author", "description", "usage_hint", "tags", "prediction_type", "thumbnail")
_MAX_JSON = 32 << 20


def json_value(metadata: Mapping[str, str], key: str) -> Any:
    """Return the parsed value of a JSON key, or None if missing or invalid.

    NaN is accepted, because sd-scripts' statistics can contain NaN."""
    text = metadata.get(key, "")
    if not text or len(text) > _MAX_JSON:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def family_in_metadata(metadata: Mapping[str, str]) -> str | None:
    """Return the family that the metadata claims, or None.

    The claim can be wrong; callers check it against the tensors."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        text = re.sub(r"[^a-z0-9]", "", metadata.get(key, "").lower())
        for start, family in _FAMILIES:
            if text.startswith(start):
                return family
    return {"True": "sd2", "False": None}.get(metadata.get("ss_v2", ""))


def trigger_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return {trigger word or phrase: metadata key that contains it}, best first.

    The key of a guess ends in `?`."""
    out: dict[str, str] = {}
    for key in _TRIGGER_KEYS:
        for word in _words(metadata, key):
            out.setdefault(word, key)
    datasets = json_value(metadata, "ss_datasets")
    for entry in datasets if isinstance(datasets, list) else []:
        subsets = entry.get("subsets") if isinstance(entry, dict) else None
        for subset in subsets if isinstance(subsets, list) else []:
            tokens = subset.get("class_tokens") if isinstance(subset, dict) and not subset.get("is_reg") else None
            if isinstance(tokens, str) and tokens.strip():
                out.setdefault(tokens.strip(), "ss_datasets")
    folders = json_value(metadata, "ss_dataset_dirs")
    folders = folders if isinstance(folders, dict) else {}
    tags = json_value(metadata, "ss_tag_frequency")
    for folder, counts in (tags if isinstance(tags, dict) else {}).items():
        if not isinstance(counts, dict) or not all(isinstance(n, int | float) for n in counts.values()):
            continue
        properties = folders.get(folder)
        images = properties.get("img_count") if isinstance(properties, dict) else None
        if len(counts) == 1:
            images = next(iter(counts.values()))  # A single tag is in every caption (ai-toolkit writes the count 1).
        for tag, n in counts.items():
            if images and n >= images and tag.strip():
                out.setdefault(tag.strip(), "ss_tag_frequency" if len(counts) == 1 else "ss_tag_frequency?")
    for folder in [*folders, *(tags if isinstance(tags, dict) else {})]:
        match = re.fullmatch(r"\d+_(.+)", folder)
        if match and match[1].strip():
            out.setdefault(match[1].strip(), "ss_dataset_dirs?")
    return out


def _words(metadata: Mapping[str, str], key: str) -> list[str]:
    value = json_value(metadata, key)
    texts = value if isinstance(value, list) else [value if isinstance(value, str) else metadata.get(key, "")]
    return [w.strip() for t in texts if isinstance(t, str) for w in t.split(",") if w.strip()]


def card_from_metadata(metadata: Mapping[str, str]) -> Card:
    """Return a card from any tool's metadata.

    `veneer.card` has priority; other keys fill its empty fields. `extra` contains title, author, description,
    tags and other properties under modelspec's names. `recipe` contains the training settings under
    sd-scripts' names without `ss_`, except large ones (tags, data sets, buckets)."""
    card = Card(kind="image")
    for name in _TEXTS:
        if metadata.get(f"modelspec.{name}"):
            card.extra[name] = metadata[f"modelspec.{name}"]
    if not card.extra.get("title") and metadata.get("ss_output_name"):
        card.extra["title"] = metadata["ss_output_name"]
    for name, key in (("architecture", "modelspec.architecture"), ("base_version", "ss_base_model_version")):
        if metadata.get(key):
            card.extra[name] = metadata[key]
    if "software" in metadata:
        card.extra["software"] = metadata["software"]
    card.base = _text_unless_none(metadata.get("ss_sd_model_name", ""))
    card.licence = metadata.get("modelspec.license", "")
    card.created = metadata.get("modelspec.date", "") or _iso_time(metadata.get("ss_training_finished_at", ""))
    card.parents = [p.strip() for p in metadata.get("modelspec.merged_from", "").split(",") if p.strip()]
    card.rank = int(_number(metadata.get("ss_network_dim", "")))
    card.alpha = _number(metadata.get("ss_network_alpha", ""))
    words, card_values = trigger_words(metadata), json_value(metadata, "veneer.card")
    if isinstance(card_values, dict):  # a veneer card lists its trigger words, so do not guess
        words = {word: key for word, key in words.items() if key in _TRIGGER_KEYS}
    sure = [w for w, key in words.items() if not key.endswith("?")]
    card.trigger_words = sure or list(words)
    card.recipe = {
        key.removeprefix("ss_"): value
        for key, value in sorted(metadata.items())
        if key.startswith("ss_") and key not in _BULKY and _text_unless_none(value)
    }
    if isinstance(card_values, dict):
        names = [f.name for f in fields(Card) if card_values.get(f.name) and _alike(card, f.name, card_values)]
        card = replace(card, **{name: card_values[name] for name in names})
    return card


def _alike(card: Card, name: str, values: Mapping[str, Any]) -> bool:
    like, value = getattr(card, name), values[name]
    if isinstance(like, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(like, list):
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    return type(value) is type(like)


def _text_unless_none(text: str) -> str:
    return "" if text in ("None", "none", "") else text


def _number(text: str) -> float:
    """Return the text as a finite positive number; 0 for `Dynamic`, `None` etc."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < 1 << 31 else 0.0


def _iso_time(text: str) -> str:
    """Convert seconds since 1970 to an ISO 8601 time in UTC."""
    seconds = int(_number(text))
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat() if seconds else ""


def metadata_of(card: Card, *, family: str | None = None, name: str = "adapter") -> dict[str, str]:
    """Return a card's metadata for all tools, without hashes (see `sealed`).

    name: the file's name, which A1111 shows.

    `card.extra` provides title, author, description, tags, usage_hint, thumbnail (a data URL),
    prediction_type, architecture, and `tag_frequency`, {folder: {tag: count}}. `card.created` provides the
    date, in ISO 8601. The modelspec keys require an architecture: they are left out if neither the family
    (MODELSPEC_ARCHITECTURES) nor the card provides one. Rank 0 means that ranks differ between modules."""
    extra = {k: v for k, v in card.extra.items() if isinstance(v, str) and v}
    words = ", ".join(card.trigger_words)
    out = {"format": "pt", "ss_output_name": name}
    architecture_names = MODELSPEC_ARCHITECTURES.get(family or "")
    architecture = extra.get("architecture") or (f"{architecture_names[0]}/lora" if architecture_names else "")
    if architecture_names:
        out |= {"ss_base_model_version": architecture_names[2], "ss_v2": str(family == "sd2")}
    out["ss_network_module"] = "networks.lora"
    out["ss_network_dim"] = str(card.rank) if card.rank else "Dynamic"
    out["ss_network_alpha"] = f"{card.alpha:g}" if card.alpha else "Dynamic"
    if card.base:
        out["ss_sd_model_name"] = card.base
    if isinstance(tags := card.extra.get("tag_frequency"), dict) and tags:
        out["ss_tag_frequency"] = json.dumps(tags, ensure_ascii=False)
    elif card.trigger_words:
        out["ss_tag_frequency"] = json.dumps({f"1_{words}": dict.fromkeys(card.trigger_words, 1)}, ensure_ascii=False)
    if architecture:
        spec = {"sai_model_spec": "1.0.1", "architecture": architecture, "title": extra.get("title") or name}
        spec["implementation"] = architecture_names[1] if architecture_names else "diffusers"
        spec |= {key: extra[key] for key in _TEXTS if key in extra}
        spec |= {"date": card.created, "license": card.licence, "trigger_phrase": words}
        spec |= {"merged_from": ", ".join(card.parents)}
        if family in ("sd15", "sdxl"):
            spec.setdefault("prediction_type", "epsilon")
        out |= {f"modelspec.{key}": value for key, value in spec.items() if value}
    try:
        body = {k: v for k, v in card.to_dict().items() if v}
        body["extra"] = {
            k: v for k, v in card.extra.items() if k not in ("tag_frequency", "thumbnail")
        }  # written above
        body = {k: v for k, v in body.items() if v}
        out["veneer.card"] = json.dumps(body, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the card holds a value that JSON cannot represent: {error}", where=name) from None
    return dict(sorted(out.items()))


def training_metadata(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a run's training settings under sd-scripts' metadata names.

    values: settings by name without `ss_`; None becomes `None`, as in sd-scripts."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)

    return {f"ss_{key}": text(value) for key, value in sorted(values.items())}


def pack_configs(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return diffusers' `lora_adapter_metadata`: PEFT settings of all components as JSON.

    Example: {"unet.r": 16, "unet.lora_alpha": 8}"""
    flat = {f"{component}.{key}": value for component, config in configs.items() for key, value in config.items()}
    return json.dumps(flat, indent=2, sort_keys=True, allow_nan=False)


def unpack_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the PEFT settings by component from `lora_adapter_metadata`, or {} if missing.

    Raises AdapterError for a value that is not a JSON object with `component.setting` keys."""
    if not metadata.get("lora_adapter_metadata"):
        return {}
    flat = json_value(metadata, "lora_adapter_metadata")
    if not isinstance(flat, dict) or not all("." in key.strip(".") for key in flat):
        raise AdapterError("lora_adapter_metadata is not a JSON object with component.setting keys", where="metadata")
    out: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, setting = key.partition(".")
        out.setdefault(component, {})[setting] = value
    return out
