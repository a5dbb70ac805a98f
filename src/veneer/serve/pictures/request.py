"""What is asked of an engine that draws and what it answers: the words of `request`, for pictures.

surface -> PictureRequest -> PictureEngine -> Queued, PictureStep, PartialPicture …, FinishedPicture -> surface
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterError, BaseError, MismatchError, VeneerError
from veneer.formats.strengths import Strength
from veneer.models.image.generate import ImageRow, MixPlan, PictureSettings
from veneer.serve.outage import fault, is_outage
from veneer.serve.request import BASE, DigestMix, Refused, Usage

if TYPE_CHECKING:
    from veneer.imaging.adapters import Use
    from veneer.imaging.make import RecordedPicture

_numbers = itertools.count()


@dataclass(eq=False)
class PictureRequest:
    """One picture. `settings`: sizes and numbers, all stated but the scheduler, and its own `image`, `mask`,
    `references` and controls' pictures. `factors`: by digest, how an adapter's strength differs by block and step, at
    strength 1, without roles (`PictureEngine.in_campaign`). `labels`: what the client called the adapters, by digest,
    for the infotext alone; `inputs`: what the record is to say of the pictures that went in. `previews`: how often to
    show it on its way; the rest is as in `Request`."""

    prompt: str
    settings: PictureSettings
    negative: str = ""
    seed: int = 0
    mix: DigestMix = BASE
    factors: Mapping[str, Strength] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=lambda: {"image": None, "mask": None, "controls": []})
    previews: int = 0
    tenant: str = ""
    weight: float = 1.0
    id: str = field(default_factory=lambda: f"p{next(_numbers)}")

    def uses(self) -> tuple[Use, ...]:
        """The adapters by digest. Raises ConfigError where a factor makes a strength that there is not."""
        return tuple((d, replace(self.factors.get(d, Strength()), strength=strength)) for d, strength in self.mix)

    def row(self, plan: MixPlan) -> ImageRow:
        controls = tuple(control.picture for control in self.settings.controls)
        s = self.settings
        return ImageRow(self.prompt, self.negative, self.seed, plan, s.image, s.mask, controls, s.references)

    def kind(self) -> tuple[Any, ...]:
        """Equal where pictures can be drawn in one batch."""
        s = self.settings
        numbers = (s.width, s.height, s.steps, s.guidance, s.true_guidance, s.scheduler, s.denoise)
        controls = tuple((id(c.model), c.weight, c.begin, c.end) for c in s.controls)
        return (*numbers, s.image is None, s.mask is None, len(s.references), controls)


@dataclass(frozen=True)
class Queued:
    """`ahead`: pictures that wait or are being drawn."""

    ahead: int


@dataclass(frozen=True)
class PictureStep:
    done: int
    of: int


@dataclass(frozen=True)
class PartialPicture:
    """The picture as far as it is; `index` counts a picture's previews."""

    index: int
    image: Any


@dataclass(frozen=True)
class FinishedPicture:
    """The picture. Of `usage`, `prompt` is its prompts' tokens, `completion` the places of its latents that the
    denoiser works on, `decode` the seconds of its batch, of which it was one of `batch`. `notes`: what was cut."""

    made: RecordedPicture
    usage: Usage
    batch: int
    notes: tuple[str, ...] = ()


PictureEvent = Queued | PictureStep | PartialPicture | FinishedPicture


def picture_error(error: BaseException) -> Refused:
    """As an answer to the client. A picture that is not finite comes from what was asked for: not worth a retry."""
    if isinstance(error, Refused):
        return error
    if is_outage(error) or not isinstance(error, VeneerError):
        return fault("the picture", error)
    if isinstance(error, AdapterError | MismatchError):
        return Refused(error.what, status=400, code="adapter_unusable", fix=error.fix)
    where = None if isinstance(error, BaseError) else error.where
    return Refused(error.what, status=400, code="invalid_request", where=where, fix=error.fix)
