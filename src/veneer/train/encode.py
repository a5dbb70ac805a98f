"""Rows to tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Example:
    """One row as tokens. trained[i]: token i is a target, predicted from the tokens before it in its own row.

    `row` is the row's place in the file order it was read in. The two lists have the same length; trained[0] is False."""

    input_ids: list[int]
    trained: list[bool]
    row: int
