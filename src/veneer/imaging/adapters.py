"""Adapters on an image base, with strengths by block, component and step.

    with ImagePipeline(base) as pipeline:
        plan = pipeline.plan(["brand:0.8@down=0.5,steps=0-0.6", "product:0.6"])
        plan = pipeline.plan(["acme@campaign=brand", "lock@campaign=product"])

An adapter is read and attached once, even if it is named several times. An adapter with block factors is
divided into parts that share its tensors (`Adapter.divided`). A plan is therefore only a list of names and
strengths, and applying a plan does not change any tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from veneer.adapters import use as using
from veneer.core.attach import Attachment, attach
from veneer.core.targets import base_modules
from veneer.errors import ConfigError, counted
from veneer.files.hashes import hashes, short_hash
from veneer.formats.folder import tensor_file
from veneer.formats.strengths import (
    Strength,
    check_roles,
    factors_by_module,
    in_campaign,
    parse_strength,
    split_factors,
)
from veneer.models.image.base import load_control
from veneer.models.image.generate import MixPlan

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter, NamedMix
    from veneer.models.image.base import ImageBase

Use = tuple[str, Strength]
"""An adapter's name or path, and its strength."""


@dataclass(frozen=True)
class AdapterSource:
    """The origin of an attached adapter: its digest and the hashes of its file.

    sha256, autov3, short (A1111's, `files.hashes.short_hash`): hashes by which model managers identify the
    file; "" if unknown. display_name: the display name, if it differs from `name`."""

    name: str
    path: str
    digest: str
    sha256: str
    autov3: str
    short: str
    display_name: str = ""

    @property
    def label(self) -> str:
        """Return the short display name (`label_of`)."""
        return label_of(self.display_name or self.name)


_GENERIC_NAMES = ("adapter", "adapter_model", "pytorch_lora_weights")


def label_of(name: str) -> str:
    """Return a short display name: the file or folder without extension, or the library name.

    If the file has a generic name (`_GENERIC_NAMES`), the folder's name is used. The separators of infotext
    (`:,<>`) become `_`."""
    at = Path(name)
    short = at.stem if at.suffix in (".safetensors", ".gguf") else at.name
    if short in _GENERIC_NAMES and at.parent.name:
        return label_of(str(at.parent))
    return re.sub(r"[:,<>]", "_", short.partition("@")[0]) or name


def parse_use(spec: str | tuple[str, float | Strength]) -> Use:
    """Parse an adapter's name, strength and factors, and return (name, strength).

    The form is "NAME[:strength][@BLOCK=factor,…,steps=FROM-TO]" or "NAME[:strength][@campaign=ROLE]". Raises
    ConfigError for any other text."""
    if isinstance(spec, tuple):
        name, strength = spec
        return name, strength if isinstance(strength, Strength) else Strength(using.parse_spec((name, strength))[1])
    head, options = split_factors(spec)
    if not options or Path(using.parse_spec(spec)[0]).expanduser().exists():
        name, number = using.parse_spec(spec)
        return name, Strength(number)
    name, number = using.parse_spec(head)
    try:
        return name, parse_strength(options, number)
    except ConfigError as error:
        raise ConfigError(error.what, where=spec, fix=error.fix) from error


class ImagePipeline:
    """The adapters of one image base; as a context manager, detaches them on exit.

    `sources`: attached adapters by requested name. `say`: called once with each note for the user."""

    def __init__(self, base: ImageBase, *, say: Callable[[str], None] | None = None) -> None:
        self.base = base
        self.modules = [name for name, _ in base_modules(base.model) if name]
        self.attachment = attach(base.model)
        self.sources: dict[str, AdapterSource] = {}
        self._say, self._reported = say, set[str]()
        self._parts: dict[tuple[str, Strength], NamedMix] = {}
        self._controls: dict[str, Any] = {}

    def control(self, name: str) -> Any:
        """Return a ControlNet of the base's family, loaded on first use.

        Raises the errors of `load_control`."""
        if name not in self._controls:
            self._controls[name] = load_control(name, self.base)
        return self._controls[name]

    def add(self, name: str) -> AdapterSource:
        """Read and attach an adapter, unless it is already attached.

        Raises MismatchError for an adapter of another family. Raises AdapterError, listing every name and
        shape that does not fit, for an adapter that does not fit the base."""
        if name not in self.sources:
            path = using.adapter_path(name)
            adapter = using.load_adapter(self.base, name, allow_other_base=True)
            trained_on = adapter.card.base_fingerprint
            if trained_on and trained_on != self.base.fingerprint:
                trained = f" ({adapter.card.base})" if adapter.card.base else ""
                self.say(f"note: {name} was trained on another base of the family{trained}: {trained_on}")
            self.attachment.add(name, adapter)
            file = tensor_file(path)
            file_hashes = hashes(file)
            sha256, autov3, short = file_hashes.sha256, file_hashes.autov3, short_hash(file, file_hashes)
            new = AdapterSource(name, str(path), adapter.digest(), sha256, autov3, short)
            if twin := next((s.name for s in self.sources.values() if s.digest == new.digest), None):
                self.say(f"note: {name} is the same adapter as {twin}: in one mix their strengths add up")
            self.sources[name] = new
        return self.sources[name]

    def resolve_roles(self, uses: Sequence[str | tuple[str, float | Strength]]) -> tuple[Use, ...]:
        """Return the adapters, with campaign roles replaced by blocks and steps.

        Reports each replacement with `say`. Raises ConfigError if two adapters have the same role."""
        parsed = [parse_use(use) for use in uses]
        check_roles(parsed)
        resolved = []
        for name, strength in parsed:
            resolved.append((name, in_campaign(strength, self.base.prediction, self.modules)))
            if strength.campaign:
                self.say(f"note: {role_note(label_of(name), strength, resolved[-1][1])}")
        return tuple(resolved)

    def plan(self, uses: Sequence[str | tuple[str, float | Strength]]) -> MixPlan:
        """Return the mix for encoding the prompt, and the mix for each range of steps.

        Raises the errors of `add`, and ConfigError for a repeated adapter or role, or a block that the base
        does not have."""
        parsed = self.resolve_roles(uses)
        names = [name for name, _ in parsed]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ConfigError(f"adapter {twice[0]!r} is named twice", fix="name it once, with the sum of the strengths")
        return mix_plan([(strength, self._divided(name, strength)) for name, strength in parsed])

    def close(self) -> None:
        self.attachment.detach()

    def __enter__(self) -> ImagePipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def say(self, line: str) -> None:
        if self._say is not None and line not in self._reported:
            self._reported.add(line)
            self._say(line)

    # -- internals -----------------------------------------------------------------------------------------------------

    def _divided(self, name: str, strength: Strength) -> NamedMix:
        """Return the mix of the adapter's attached parts, each with its own factor."""
        shape = strength.by_block
        if (name, shape) not in self._parts:
            self.add(name)
            for note in without_effect(self.attachment.adapters[name], strength, self.modules):
                self.say(f"note: {name}{note}")
            self._parts[name, shape] = add_divided(self.attachment, name, shape, self.modules)
        return self._parts[name, shape]


def add_divided(attachment: Attachment, name: str, shape: Strength, modules: Sequence[str]) -> NamedMix:
    """Divide an attached adapter by its block factors, and attach each part.

    Returns a mix of the parts with the same effect as the adapter with these factors. Without factors, the
    mix contains the adapter itself. Raises ConfigError for a block that the base does not have.

    modules: module names of the base."""
    if not shape.blocks:
        return ((name, 1.0),)
    factor_of = factors_by_module(shape, modules)
    pieces = []
    for factor, part in sorted(attachment.adapters[name].divided(lambda module: factor_of.get(module, 1.0)).items()):
        piece = f"{name}|{shape}|{factor!r}"
        attachment.add(piece, part, finite=True)  # the values of the whole adapter were already checked
        pieces.append((piece, factor))
    return tuple(pieces)


def without_effect(adapter: Adapter, strength: Strength, modules: Sequence[str]) -> list[str]:
    """Return a note for each factor without effect, to append to the adapter's name."""
    modules_of_adapter = {key.rpartition(".")[0] for key in adapter.deltas}
    modules_of_adapter |= {*adapter.pairs, *adapter.modules, *adapter.token_rows}
    notes = []
    if strength.steps and any(key.startswith("text_encoder") for key in modules_of_adapter):
        notes.append(": the part on the text encoder acts in all steps; steps= applies only to the denoiser")
    for block, _ in strength.blocks:
        factor_of = factors_by_module(Strength(1.0, ((block, 0.0),)), modules)
        if all(factor_of.get(key, 1.0) for key in modules_of_adapter):
            notes.append(f" changes nothing in {block!r}: that factor has no effect")
    return notes


def role_note(label: str, requested: Strength, resolved: Strength) -> str:
    """Return a note about the blocks and steps that a role selects (`in_campaign`)."""
    part = str(resolved).partition("@")[2] or "all blocks and steps"
    return f"{label} is the campaign's {requested.campaign}: {part}"


def idle_ranges(uses: Sequence[Use], steps: int) -> list[str]:
    """Return notes about step ranges that contain no step."""
    return [
        f"{label_of(name)}: steps={at} contains no step of {counted(steps, 'step')}, so the adapter has no effect"
        for name, strength in uses
        for at in strength.idle(steps)
    ]


def mix_plan(parts: Sequence[tuple[Strength, NamedMix]]) -> MixPlan:
    """Return the plan for adapters with strengths.

    parts: for each adapter, its strength and the mix of its attached parts (`add_divided`)."""
    phases: list[tuple[float, NamedMix]] = []
    for edge in sorted({0.0, *(edge for strength, _ in parts for edge in strength.edges)}):
        mix = _scaled([(part, strength.strength * strength.factor_at(edge)) for strength, part in parts])
        if not phases or phases[-1][1] != mix:
            phases.append((edge, mix))
    return MixPlan(_scaled([(part, strength.strength) for strength, part in parts]), tuple(phases))


def _scaled(parts: Sequence[tuple[NamedMix, float]]) -> NamedMix:
    return tuple((name, factor * by) for mix, by in parts for name, factor in mix if factor * by)
