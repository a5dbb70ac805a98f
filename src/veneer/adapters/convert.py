"""An adapter of any layout, written in another tool's: what the command, a server's downloads and pages do.

Reads and writes by `formats`; of a base it needs a few numbers, which some layouts depend on. Knows no weights of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from veneer.errors import ConfigError
from veneer.formats.convert import write
from veneer.formats.read import ReadOptions, read

if TYPE_CHECKING:
    from veneer.formats.convert import WriteReport
    from veneer.formats.reading import Reading

_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gemma4_text": "gemma4"}
"""transformers' model_type -> llama.cpp's name, where they differ."""


@dataclass(frozen=True)
class ConvertedAdapter:
    """`reading`: of what was given. `words`: learned words that were left out."""

    reading: Reading
    written: WriteReport
    words: list[str]


def convert_adapter(
    place: Path,
    output: str | Path,
    to: str,
    *,
    family: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    allow_partial: bool = False,
    without_words: bool = False,
    say: Callable[[str], None] | None = None,
    **how: Unpack[ReadOptions],
) -> ConvertedAdapter:
    """Writes the adapter at `place` to `output` as `to`, one of formats.convert.TARGETS, has it: exactly, or not at
    all.

    family: of the image model, or gguf's architecture, where it cannot be told. base: for gguf and tgi the base's name,
    of which they need the size of a head and the number of layers. allow_partial: what can be read. without_words:
    leave learned words out, which few layouts hold. Raises AdapterError, and ConfigError where the output is the
    adapter itself."""
    if Path(output).exists() and Path(output).samefile(place):
        raise ConfigError(
            "the output is the adapter itself, which is not written over", where=str(output), fix="another -o"
        )
    reading = read(place, allow_partial=allow_partial, family=family if to != "gguf" else None, **how)
    words = [word for own in reading.adapter.new_tokens.values() for word in own] if without_words else []
    adapter = replace(reading.adapter, new_tokens={}) if words else reading.adapter
    head_dim = layers = None
    if to in ("gguf", "tgi") and base is not None:
        architecture, head_dim, layers = _of_base(base, say)
        family = family or architecture
    if to != "gguf":
        family = family or reading.family
    written = write(adapter, output, to, family=family, dtype=dtype, head_dim=head_dim, layers=layers)
    return ConvertedAdapter(reading, written, words)


def _of_base(name: str, say: Callable[[str], None] | None) -> tuple[str, int | None, int]:
    """Return a base's llama.cpp architecture, rows per attention head (None if layers differ), and layer count."""
    from veneer.models.config import layer_heads
    from veneer.models.sources import find_base
    from veneer.models.text.base import read_base_config

    config = read_base_config(find_base(name, say=say)).get_text_config()
    sizes = {size for _, _, size in layer_heads(config)}
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    return architecture, sizes.pop() if len(sizes) == 1 else None, int(config.num_hidden_layers)
