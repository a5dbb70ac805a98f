"""Convert an adapter from any supported layout to another tool's layout.

Used by the command line, the server's downloads and the Studio. `formats` reads and writes the files. Some
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


@dataclass(frozen=True)
class ConvertedAdapter:
    """The result of a conversion: the input adapter as read, and a report on the written adapter."""

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
    family: the image model's family or the GGUF architecture, if it cannot be detected.
    base: for gguf, the name of the base; the conversion reads the base's architecture and head size.
    allow_partial: if part of the adapter cannot be read, convert the rest instead of raising.

    Raises AdapterError if the conversion fails, and ConfigError if `output` is the input adapter."""
    if Path(output).exists() and Path(output).samefile(path):
        raise ConfigError(
            "the output is the input adapter, which is never overwritten", where=str(output), fix="another -o"
        )
    reading = read(path, allow_partial=allow_partial, family=family if to != "gguf" else None, **how)
    head_dim = None
    if to == "gguf" and base is not None:
        architecture, head_dim = _base_architecture(base, log)
        family = family or architecture
    if to != "gguf":
        family = family or reading.family
    written = write(reading.adapter, output, to, family=family, dtype=dtype, head_dim=head_dim)
    return ConvertedAdapter(reading, written)


def _base_architecture(name: str, log: Callable[[str], None] | None) -> tuple[str, int | None]:
    """Return a base's llama.cpp architecture and head size.

    The head size is None if the layers have different head sizes."""
    from veneer.models.config import LLAMA_CPP_ARCHITECTURES, layer_heads
    from veneer.models.sources import find_base
    from veneer.models.text.base import read_base_config

    config = read_base_config(find_base(name, say=log)).get_text_config()
    sizes = {size for _, _, size in layer_heads(config)}
    architecture = LLAMA_CPP_ARCHITECTURES.get(config.model_type, config.model_type)
    return architecture, sizes.pop() if len(sizes) == 1 else None
