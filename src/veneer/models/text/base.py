"""Load a text base: model, tokenizer, and settings determined while loading.

`load_text` chooses device and dtype according to the rules in models/device.py and records the reason. It
freezes every weight, and determines the token that ends a turn, so that training, generation and evaluation
all use the same token.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veneer.errors import AdapterError, BaseError, ConfigError, lacks_memory
from veneer.files.weights import StoredTensor, stored_dtype, tensor_table
from veneer.models.config import check_config, read_config_json
from veneer.models.device import check_memory, choose_device, choose_dtype, limit_threads
from veneer.models.fingerprint import fingerprint
from veneer.models.loading import check_loaded, device_map_to, errors_only, loading, uncollected
from veneer.models.quantize import check_kind, load_quantized, original_weight, quantized_bytes, saved_kind
from veneer.models.sharded_weights import ShardReader
from veneer.models.sources import find_base, is_image_base, short_name
from veneer.models.text.meta_model import meta_text_model
from veneer.ops.quantization_formats import KINDS
from veneer.ops.quantized import Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class TextBase:
    """A frozen language model and its tokenizer.

    `dtype_reason`: a sentence that explains the dtype. `end_of_turn_id`: the token that the chat template
    puts after an assistant message (without a template, the tokenizer's eos); in a training example, it is
    the last token that counts in the loss. `stop_ids`: all tokens that end a completion. `pad_id`: the token
    that pads shorter rows; always masked. `context`: maximum number of tokens in a sequence. `notes`:
    messages for the user about loading, one sentence each.
    """

    name: str
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    directory: Path
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    dtype_reason: str
    end_of_turn_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    context: int = 0
    notes: tuple[str, ...] = ()
    quantized: str = ""
    """Format of 4-bit or 8-bit linear weights: nf4, fp4, int8, gguf, or "" for none."""
    unread: ShardReader | None = None
    """Reader of the weights if `model` is on the meta device.

    `shard` uses this reader to read the shards of each process."""

    @property
    def family(self) -> str:
        """The architecture's name in transformers: llama, qwen3, …"""
        return str(self.model.config.model_type)

    @property
    def short_name(self) -> str:
        return short_name(self.name)

    def original(self, name: str) -> torch.Tensor:
        """Read the unquantized weight of a quantized base from the base's files.

        The weight is in 16 or 32 bits. Raises BaseError in the same cases as `original_weight`."""
        return original_weight(self.directory, self._stored, name)

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        return {t.name: t for t in tensor_table(self.directory)}

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)


@uncollected()
def load_text(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: str | None = None,
    say: Callable[[str], None] | None = None,
    parts: int = 1,
) -> TextBase:
    """Find and load a base in eval mode, with all weights frozen.

    `dtype`: auto, float32, bfloat16 or float16. `device`: auto, cpu, cuda, cuda:1. `quantize`: nf4, fp4
    or int8 quantizes the linear weights while loading; keep leaves the weights of a GGUF file in their
    quantized blocks; None uses the precision of the files and dequantizes GGUF. A bitsandbytes checkpoint
    keeps its quantization. `say`: called with a message before each slow step. `parts`: number of processes
    to shard the base over. Above 1, the weights are not read yet (`unread`). If the shards cannot be read
    separately, all weights are loaded on the CPU, and a note gives the reason. Raises BaseError (not found,
    incomplete, not a causal language model, weights that do not match the config), ConfigError (an unknown
    dtype, device or quantization), ResourceError (not enough memory)."""
    path, table, config, tokenizer = _read_parts(name, say)
    where = choose_device(device)
    limit_threads()
    quantized = _choose_quantization(quantize, path, config)
    kind, reason = choose_dtype(dtype, where, "BF16" if quantized else stored_dtype(table))
    unread: ShardReader | None = None
    why = ""
    if parts > 1:
        model, unread, why = _unread_model(path, config, kind, table, quantized, saved=quantize is None)
        where = where if unread else torch.device("cpu")
    check_memory(path, _bytes(table, kind, quantized) // (parts if unread else 1), kind, where)
    digest = fingerprint(path, config, table)
    if unread is None:
        model, notes = _load_model(path, config, kind, table, quantized, where, saved=quantize is None)
        notes = (*notes, f"each process reads all of the weights: {why}") if why else notes
        model.to(where)  # type: ignore[arg-type]
    else:
        unexpected = unread.stored.keys() - model.state_dict().keys()
        notes = check_loaded(Path(), {"unexpected_keys": unexpected})
    model.eval()
    model.requires_grad_(False)
    _check_vocabulary(path, model, tokenizer)
    turn, stops, more = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    return TextBase(
        name=name,
        model=model,
        tokenizer=tokenizer,
        directory=path,
        fingerprint=digest,
        dtype=kind,
        device=where,
        dtype_reason=reason,
        end_of_turn_id=turn,
        stop_ids=stops,
        pad_id=int(pad),
        context=_context(model.config),
        notes=(*notes, *more),
        quantized=quantized,
        unread=unread,
    )


def _read_parts(name: str, say: Callable[[str], None] | None) -> tuple[Path, list[StoredTensor], PreTrainedConfig, Any]:
    """Return the path, tensor table, config and tokenizer of a language model.

    Raises BaseError for an image base, and for files that cannot be found or read."""
    path = find_base(name, say=say)
    if is_image_base(path):
        fix = "a language model's folder or hub id; `veneer image` and data.pictures of `veneer train` take image bases"
        raise BaseError("this is an image base, but a language model is required", where=str(path), fix=fix)
    return path, tensor_table(path), read_base_config(path), read_tokenizer(path)


def text_without_weights(name: str, *, say: Callable[[str], None] | None = None) -> TextBase:
    """Load a base without its weights, on the meta device.

    The result has the config, tokenizer, names, shapes and fingerprint. These suffice to check adapters for a
    base that runs elsewhere. Raises BaseError in the same cases as `load_text`."""
    from transformers import AutoModelForCausalLM

    path, table, config, tokenizer = _read_parts(name, say)
    with loading(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    turn, stops, _ = _end_tokens(model, tokenizer)
    digest, meta, reason = fingerprint(path, config, table), torch.device("meta"), "nothing is computed here"
    base = TextBase(name, model, tokenizer, path, digest, torch.float32, meta, reason, turn, stops)
    base.context = _context(model.config)
    return base


# -- reading ---------------------------------------------------------------------------------------------------------


def read_base_config(path: Path) -> PreTrainedConfig:
    """Read the config of a base directory or GGUF file.

    Raises ConfigError for an invalid value, and BaseError if transformers cannot read the config."""
    from transformers import AutoConfig

    config: Any
    if (file := path / "config.json").is_file():
        read_config_json(file)
    with errors_only():
        try:
            if path.is_file():
                from veneer.models.text.gguf import fast_headers

                with fast_headers():
                    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            else:
                config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise _unreadable("config", path, error) from error
    if path.is_file():
        check_config(config.to_dict(), str(path))
    if getattr(config, "is_encoder_decoder", False):
        message = f"{config.model_type} is an encoder-decoder model; veneer adapts causal language models"
        raise BaseError(message, where=str(path))
    return config


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a base directory or GGUF file.

    Raises BaseError if the tokenizer is missing or cannot be read."""
    from transformers import AutoTokenizer

    tokenizer: Any
    with errors_only():
        try:
            if path.is_file():
                from veneer.models.text.gguf import read_gguf_tokenizer

                tokenizer = read_gguf_tokenizer(path)
            else:
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise _unreadable("tokenizer", path, error) from error
    return tokenizer


def _choose_quantization(quantize: str | None, path: Path, config: PreTrainedConfig) -> str:
    """Return the format of linear weights: nf4, fp4, int8, gguf, or "" if not quantized.

    Raises ConfigError for an unknown format, for `keep` if the weights are not quantized, and for quantizing
    weights that are already quantized."""
    saved = "" if path.is_file() else saved_kind(config.to_dict(), str(path))
    if quantize == "keep":
        if not saved and not path.is_file():
            message = "the weights of this base are not quantized, so there is nothing to keep"
            fix = "nf4 instead of keep quantizes them to 4 bits while loading"
            raise ConfigError(message, where=str(path), fix=fix)
        return saved or "gguf"
    if quantize is None:
        return saved
    check_kind(quantize)
    if saved or path.is_file():
        message = (
            f"the weights are quantized already ({saved or 'GGUF'}); quantizing them again would lose more precision"
        )
        raise ConfigError(message, where=str(path), fix="quantize=keep, or the 16-bit weights of this base")
    return quantize


def _bytes(table: list[StoredTensor], dtype: torch.dtype, quantized: str) -> int:
    """Return the estimated bytes of the weights.

    Embeddings and heads count as unquantized."""
    if quantized in KINDS and all(t.dtype not in ("U8", "I8") for t in table):
        full = ("embed", "lm_head", "wte", "wpe", "output")
        return sum(
            t.elements * dtype.itemsize
            if len(t.shape) < 2 or any(f in t.name for f in full)
            else quantized_bytes(t.shape, quantized)
            for t in table
        )
    return sum(t.size if quantized else t.elements * dtype.itemsize for t in table)


def _load_model(
    path: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    table: list[StoredTensor],
    quantized: str,
    device: torch.device,
    saved: bool,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    from transformers import AutoModelForCausalLM

    with loading():
        try:
            if path.is_file():
                from veneer.models.text.gguf import load_gguf

                if quantized == "gguf":
                    note = "the weights keep the quantized blocks of their GGUF file"
                    return load_gguf(path, dtype, keep=True), (note,)
                return load_gguf(path, dtype), ("the weights come from a GGUF file, dequantized",)
            if quantized:
                model, info = load_quantized(path, config, table, "" if saved else quantized, dtype, device)
                return model, (*check_loaded(path, info), _size_note(model, quantized))
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                device_map=device_map_to(device),
            )
        except Exception as error:
            if lacks_memory(error):
                raise
            raise _unreadable("model", path, error) from error
    return model, check_loaded(path, info)


def _unread_model(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype, table: list[StoredTensor], quantized: str, saved: bool
) -> tuple[Any, ShardReader | None, str]:
    """Return (model on the meta device, reader of its weights, "").

    Returns (None, None, reason) if the entire base must be loaded."""
    from transformers import GenerationConfig

    if path.is_file() or (quantized and saved):
        return None, None, f"they are quantized in their files ({quantized or 'GGUF'})"
    model = meta_text_model(config, dtype=dtype, quantize=quantized)
    reader = ShardReader.for_model(model, table, quantized, dtype)
    if isinstance(reader, str):
        return None, None, reader
    if (path / "generation_config.json").is_file():
        with errors_only(), suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, reader, ""


def _size_note(model: PreTrainedModel, quantized: str) -> str:
    weights = [p for p in model.parameters() if isinstance(p, Quantized)]
    count, size = sum(p.numel() for p in weights), sum(p.bytes for p in weights)
    return f"{count:,} weights are {quantized}: {size / 1e6:,.0f} MB, {8 * size / max(count, 1):.3f} bits each"


def _unreadable(part: str, path: Path, error: Exception) -> BaseError:
    message = " ".join(str(error).split())[:300] or type(error).__name__
    fix = None
    if "does not recognize this architecture" in message or "is not supported" in message:
        fix = "try a newer transformers: pip install -U transformers"
    elif "trust_remote_code" in message:
        message = "the model requires its own code, which veneer does not run"
        fix = "use a base of a known architecture"
    elif isinstance(error, AdapterError):  # This error was raised by veneer's GGUF reader.
        message, fix = error.what, error.fix
    elif path.suffix == ".gguf" and isinstance(error, struct.error | IndexError | OverflowError | ValueError):
        message, fix = "its header is inconsistent; the file is truncated or damaged", "download or copy the file again"
    elif part == "tokenizer":
        fix = "put tokenizer.json and tokenizer_config.json of this base next to its config"
    return BaseError(f"cannot read the {part} of this base: {message}", where=str(path), fix=fix)


def _check_vocabulary(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        message = f"the tokenizer has {len(tokenizer):,} tokens, but the model's embedding has only {rows:,} rows"
        raise BaseError(message, where=str(path), fix="use the tokenizer and model of the same base")


# -- stop tokens -----------------------------------------------------------------------------------------------------


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token after an assistant message, or None if there is none.

    Renders a conversation and reads the token after the assistant message: <|im_end|>, <|eot_id|>,
    <end_of_turn>, …"""
    if not tokenizer.chat_template:
        return None
    answer = "veneer answers"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # A template can raise any error.
        return None
    _, separator, ending = text.rpartition(answer)
    ids = tokenizer.encode(ending.lstrip(), add_special_tokens=False) if separator else []
    return int(ids[0]) if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int | None, tuple[int, ...], tuple[str, ...]]:
    """Return (token that ends a turn, all stop tokens, notes about missing tokens)."""
    turn, notes = end_of_turn(tokenizer), list[str]()
    if turn is None and tokenizer.chat_template:
        notes.append("the chat template puts no special token after an answer: an answer ends with the eos token")
    turn = tokenizer.eos_token_id if turn is None else turn
    stops = _stop_ids(model, tokenizer, turn)
    if not stops:
        notes.append(
            "neither the tokenizer nor the config names a token that ends a text, so generation runs to the token limit"
        )
    return turn, stops, tuple(notes)


def _context(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn: int | None) -> tuple[int, ...]:
    """Return all stop tokens: `turn`, the tokenizer's eos and the configs' eos."""
    ids: list[int] = []
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    named = [getattr(config, "eos_token_id", None) for config in configs]
    for source in (turn, tokenizer.eos_token_id, *named):
        for token in source if isinstance(source, list | tuple) else [source]:
            if token is not None and int(token) not in ids:
                ids.append(int(token))
    rows = model.get_input_embeddings().weight.shape[0]
    return tuple(t for t in ids if 0 <= t < rows)
