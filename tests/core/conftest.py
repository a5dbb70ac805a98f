"""A network with adapters of every kind attached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.core.test_rows import Net, adapters
from veneer.core import Attachment, attach


@pytest.fixture(scope="module")
def net() -> Iterator[Attachment]:
    torch.manual_seed(0)
    model = Net().requires_grad_(False).eval()
    with attach(model) as attachment:
        for name, adapter in adapters(model).items():
            attachment.add(name, adapter)
        yield attachment
