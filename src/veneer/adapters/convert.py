"""Convert an adapter from any layout to another tool's layout.

The command, server downloads and the Studio use this module, which reads and writes through `formats`. Some
layouts need a few numbers from the base's configuration; no layout needs the base's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from veneer.errors import ConfigError
from veneer.formats.convert import write
from veneer.formats.read import ReadOptions, read

if TYPE_CHECKING:
    from veneer.formats.convert import WriteReport
    from veneer.formats.reading import Reading

_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gemma4_text": "gemma4"}
"""transformers' model_type -> llama.cpp's architecture, where the names differ."""


@dataclass(frozen=True)
class ConvertedAdapter:
    """The result of a conversion: the adapter as read, and a report of the output."""

    reading: Reading
    written: WriteReport


def convert_adapter(
    path: Path,
    output: str | Path,
    to: str,
    *,
    family: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    allow_partial: bool = False,
    log: Callable[[str], None] | None = None,
    **how: Unpack[ReadOptions],
) -> ConvertedAdapter:
    """Write the adapter at `path` to `output` in layout `to`, exactly or not at all.

    to: one of formats.convert.TARGETS.
    family: the image model's family, or gguf's architecture, if it cannot be detected.
    base: for gguf, the name of the base, whose architecture and head size it needs.
    allow_partial: convert only what can be read.

    Raises AdapterError, and ConfigError if the output is the adapter itself."""
    if Path(output).exists() and Path(output).samefile(path):
        raise ConfigError(
            "the output is the adapter itself, which is not written over", where=str(output), fix="another -o"
        )
    reading = read(path, allow_partial=allow_partial, family=family if to != "gguf" else None, **how)
    head_dim = None
    if to == "gguf" and base is not None:
        architecture, head_dim = _of_base(base, log)
        family = family or architecture
    if to != "gguf":
        family = family or reading.family
    written = write(reading.adapter, output, to, family=family, dtype=dtype, head_dim=head_dim)
    return ConvertedAdapter(reading, written)


def _of_base(name: str, log: Callable[[str], None] | None) -> tuple[str, int | None]:
    """Return a base's llama.cpp architecture and rows per head; None if layers differ."""
    from veneer.models.config import layer_heads
    from veneer.models.sources import find_base
    from veneer.models.text.base import read_base_config

    config = read_base_config(find_base(name, say=log)).get_text_config()
    sizes = {size for _, _, size in layer_heads(config)}
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    return architecture, sizes.pop() if len(sizes) == 1 else None
