"""Load bases through transformers and diffusers, one at a time and without logs.

    with loading():             create, load or convert a model
    with errors_only():         read a config, a tokenizer or a scheduler, but no weights
    with uncollected():         import libraries and load weights with garbage collection paused
    with build_errors(…):       build a model from a user's configuration

`check_loaded` reports stored tensors that do not match the model.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BaseError, ConfigError, VeneerError, bullets, counted, first_few, lacks_memory

if TYPE_CHECKING:
    import torch

_one_load = threading.RLock()
_lock = threading.Lock()
_inside = 0
_restore = ExitStack()

_LIBRARIES = r"(transformers|diffusers|accelerate|huggingface_hub|torch|bitsandbytes|gguf)(\.|$)"


@contextmanager
def loading() -> Iterator[None]:
    """Hold the process-wide lock for loading models, and apply `errors_only`.

    The lock is reentrant. While transformers loads a model, it removes `tie_weights` from all of the model's
    classes. If another thread creates a model in the meantime, that model's weights stay untied. If two loads
    overlap, they remove `tie_weights` permanently (transformers.initialization.no_tie_weights, 5.24)."""
    with _one_load, errors_only():
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection, which takes a quarter of the time of importing transformers."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def build_errors(action: str, *, where: str, fix: str) -> Iterator[None]:
    """Convert exceptions raised while a library builds a model to ConfigError.

    `action`: the start of the message, such as "transformers cannot build a model". Out-of-memory errors and
    veneer's own errors are not converted."""
    try:
        yield
    except Exception as error:  # Each model class parses its own fields and can raise any exception type.
        if lacks_memory(error) or isinstance(error, VeneerError):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{action} from this configuration: {why:.300}", where=where, fix=fix) from error


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence transformers and diffusers, except for errors, inside the with-block.

    Turns off progress bars, log records below the level `error`, and Python warnings raised in these
    libraries. Applies to diffusers only if it is already imported. Other warnings are shown.

    Progress bars and log levels are process-wide. If several blocks run concurrently, the first turns the
    output off and the last restores it. Use this for loading and converting, not for long work in parallel
    with other threads."""
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _switch_off(_restore)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore.close()


def device_map_to(device: torch.device | None) -> dict[str, torch.device] | None:
    """Return the transformers device_map that loads weights directly to `device`.

    With this map, the host holds only a few tensors at a time. Returns None for the CPU."""
    return None if device is None or device.type == "cpu" else {"": device}


def _keep_record(record: logging.LogRecord) -> bool:
    """Return False for bitsandbytes' warning about missing hub kernels.

    veneer does not use these kernels, but PEFT imports bitsandbytes whenever diffusers is imported."""
    return "gemm_4bit_forward" not in str(record.msg)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_keep_record)


def _switch_off(stack: ExitStack) -> None:
    from transformers.utils import logging as theirs

    for each in (theirs, sys.modules.get("diffusers.utils.logging")):
        if each is not None:
            if each.is_progress_bar_enabled():
                stack.callback(each.enable_progress_bar)
            stack.callback(each.set_verbosity, each.get_verbosity())
            each.set_verbosity_error()
            each.disable_progress_bar()
    # At its exit, warnings.catch_warnings would undo changes that other threads made in the meantime.
    filters = list(warnings.filters)
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    stack.callback(_unfilter, next((f for f in warnings.filters if f not in filters), None))


def _unfilter(added: Any) -> None:
    if added in warnings.filters:
        warnings.filters.remove(added)  # type: ignore[attr-defined]


_SCALES = re.compile(r"(.*\.)?(scale_weight|weight_scale(_inv|_2)?|scaled_fp8|comfy_quant)")
"""Matches the names of tensors that are needed to decode quantized weights."""


def check_loaded(path: Path, info: Mapping[str, Any], harmless: re.Pattern[str] | None = None) -> tuple[str, ...]:
    """Return a tuple with a note if some stored tensors are unused, or else ().

    `info`: the loading info of transformers or diffusers (output_loading_info). `harmless`: names of tensors
    that can be ignored; by default, all tensors except scales of weights. Raises BaseError for missing
    tensors, tensors with a wrong shape, and unused tensors that are not harmless."""
    problems = [f"missing: {name}" for name in sorted(info.get("missing_keys", ()))]
    problems += [f"misshapen: {item}" for item in sorted(map(str, info.get("mismatched_keys", ())))]
    if problems:
        message = f"the weights do not match the config ({len(problems)} problems):\n{bullets(problems)}"
        fix = "use the config and weights of the same model; a text base is a causal language model, not an encoder"
        raise BaseError(message, where=str(path), fix=fix)
    unexpected = sorted(info.get("unexpected_keys", ()))
    check_left_out(path, unexpected, harmless)
    if not unexpected:
        return ()
    return (f"{len(unexpected)} stored tensors are not used by the model, {unexpected[0]} among them",)


def check_left_out(path: Path, names: Iterable[str], harmless: re.Pattern[str] | None = None) -> None:
    """Raise BaseError for unused tensors that are not harmless.

    `harmless`: as in `check_loaded`."""
    names = list(names)
    if scales := [name for name in names if _SCALES.fullmatch(name)]:
        message = f"{counted(len(scales), 'scale')} of quantized weights would be ignored: {first_few(scales, 6)}"
        raise BaseError(message, where=str(path), fix="use the 16-bit weights of this base")
    if harmless is not None and (wrong := [name for name in names if not harmless.fullmatch(name)]):
        message = (
            f"{counted(len(wrong), 'stored tensor')} with no matching parameter in the model: {first_few(wrong, 6)}"
        )
        fix = "the weights may belong to another model, or have an unsupported quantization; use the "
        fix += "config and 16-bit weights of the same model"
        raise BaseError(message, where=str(path), fix=fix)
