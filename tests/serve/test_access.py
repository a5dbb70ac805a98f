"""Plain API keys that all have the same permissions."""

from __future__ import annotations

import asyncio

import pytest

from veneer.serve.access import KeyAccess
from veneer.serve.request import Refused
from veneer.serve.tenancy.keys import hash_key


def test_keys() -> None:
    keys = KeyAccess(["sk-0123456789abcdef"], "admin-0123456789abcdef")
    assert asyncio.run(keys.authenticate("sk-0123456789abcdef")).kind == "key"
    assert asyncio.run(keys.authenticate("admin-0123456789abcdef")).kind == "operator"
    for wrong in (None, "", "sk-", "ключ"):
        with pytest.raises(Refused, match="no valid API key"):
            asyncio.run(keys.authenticate(wrong))


def test_a_front_doors_key_must_be_in_the_file_of_keys() -> None:
    door = "door-0123456789abcdef"
    assert asyncio.run(KeyAccess([door], None, door).authenticate(door)).kind == "door"
    with pytest.raises(Refused, match="no valid API key"):
        asyncio.run(KeyAccess(["sk-0123456789abcdef"], None, door).authenticate(door))


def test_the_hash_of_an_admin_key_is_enough() -> None:
    key = "admin-0123456789abcdef"
    keys = KeyAccess([], f"sha256:{hash_key(key)}")
    assert asyncio.run(keys.authenticate(key)).kind == "operator"
    for wrong in (f"sha256:{hash_key(key)}", hash_key(key), key[:-1]):
        with pytest.raises(Refused) as refused:
            asyncio.run(keys.authenticate(wrong))
        assert refused.value.status == 401
