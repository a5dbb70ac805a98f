"""Requests and events of the image engine, like `serve.request` for text.

HTTP route -> PictureRequest -> PictureEngine
        -> Queued, PictureStep …, FinishedPicture -> HTTP route
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterError, BaseError, MismatchError, VeneerError
from veneer.formats.strengths import Strength
from veneer.models.image.generate import ImageRow, MixPlan, PictureSettings
from veneer.serve.request import BASE, DigestMix, Refused, Usage
from veneer.serve.transient import internal_error, is_transient

if TYPE_CHECKING:
    from veneer.imaging.adapters import Use
    from veneer.imaging.generate import RecordedPicture

_numbers = itertools.count()


@dataclass(eq=False)
class PictureRequest:
    """A request for one image.

    `settings`: sizes and numbers (only the scheduler can be unset), `image`, `mask`, `references` and control
    images. `factors`: digest -> how the adapter's strength varies by block and step, relative to its strength
    in the mix; roles have been replaced (`PictureEngine.in_campaign`). `labels`: digest -> the client's name
    for the adapter, used only in the infotext. `inputs`: description of the input images, for the record. The
    other fields are as in `Request`.
    """

    prompt: str
    settings: PictureSettings
    negative: str = ""
    seed: int = 0
    mix: DigestMix = BASE
    factors: Mapping[str, Strength] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=lambda: {"image": None, "mask": None, "controls": []})
    tenant: str = ""
    weight: float = 1.0
    id: str = field(default_factory=lambda: f"p{next(_numbers)}")

    def uses(self) -> tuple[Use, ...]:
        """Return (digest, strength) of each adapter; the strength contains the adapter's factors.

        Raises ConfigError if a factor makes a strength invalid.
        """
        return tuple((d, replace(self.factors.get(d, Strength()), strength=strength)) for d, strength in self.mix)

    def row(self, plan: MixPlan) -> ImageRow:
        controls = tuple(control.picture for control in self.settings.controls)
        s = self.settings
        return ImageRow(self.prompt, self.negative, self.seed, plan, s.image, s.mask, controls, s.references)

    def kind(self) -> tuple[Any, ...]:
        """Return the batching key: images with equal keys can share a batch."""
        s = self.settings
        numbers = (s.width, s.height, s.steps, s.guidance, s.true_guidance, s.scheduler, s.denoise)
        controls = tuple((id(c.model), c.weight, c.begin, c.end) for c in s.controls)
        return (*numbers, s.image is None, s.mask is None, len(s.references), controls)


@dataclass(frozen=True)
class Queued:
    """The request is queued."""


@dataclass(frozen=True)
class PictureStep:
    done: int
    total: int


@dataclass(frozen=True)
class FinishedPicture:
    """The finished image.

    `usage`: `prompt` is the number of prompt tokens, `completion` the number of latent positions, and
    `decode` the seconds that the whole batch took. `batch`: number of images in the batch. `notes`: warnings,
    such as truncated text.
    """

    picture: RecordedPicture
    usage: Usage
    batch: int
    notes: tuple[str, ...] = ()


PictureEvent = Queued | PictureStep | FinishedPicture


def picture_error(error: BaseException) -> Refused:
    """Return the error that a client gets for an exception.

    A non-finite image is the request's fault (400), because a retry would not help.
    """
    if isinstance(error, Refused):
        return error
    if is_transient(error) or not isinstance(error, VeneerError):
        return internal_error("the picture", error)
    if isinstance(error, AdapterError | MismatchError):
        return Refused(error.what, status=400, code="adapter_unusable", fix=error.fix)
    where = None if isinstance(error, BaseError) else error.where
    return Refused(error.what, status=400, code="invalid_request", where=where, fix=error.fix)
