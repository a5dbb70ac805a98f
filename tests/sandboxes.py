"""The sandbox available on this machine, for tests that need one."""

from __future__ import annotations

import pytest

from veneer.errors import ResourceError
from veneer.train.rewards.limited import working_sandbox
from veneer.train.rewards.sandbox import Sandbox


def sandbox_or_skip() -> Sandbox:
    """Return the sandbox. Skip the test, with the reason, if bubblewrap or kernel support is missing."""
    try:
        return working_sandbox()
    except ResourceError as error:
        pytest.skip(error.what)
