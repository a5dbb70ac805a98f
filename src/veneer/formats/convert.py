"""Write an adapter in another tool's layout, exactly or not at all.

| to        | written                                    | names                   | cannot hold                   |
| peft      | folder, for one denoiser or text model     | the model's own names   | what formats/peft.py refuses  |
| kohya     | one .safetensors, lora_down, lora_up,      | formats/kohya.py        | embeddings, whole new weights |
|           | alpha; LyCORIS' names for the other forms  |                         |                               |
| comfyui   | one .safetensors, lora_A, lora_B, alpha    | formats/kohya.py        | gains, DoRA of the outputs    |
| diffusers | one .safetensors, scales in metadata       | the canonical names     | formats/diffusers.py          |
| vllm      | PEFT folder of one rank, scale 1           | the model's own names   | DoRA, deltas, full copies     |
| gguf      | one llama.cpp LoRA                         | llama.cpp's             | the same as vllm              |

The parts of a fused projection are joined at the same rank if they share A, otherwise block-diagonally; an
unchanged part becomes zero rows. Before the file is written, the encoded adapter is read back and compared
with the source by ΔW (formats/comparison.py), and its names are looked up with the rules of the target's
loader (formats/loaders.py). One AdapterError lists every module that the layout cannot express, with the
reason and the closest alternative.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from veneer.core.adapter import Adapter, Pair, alpha_of
from veneer.core.merge import dtype_of
from veneer.errors import AdapterError, bullets
from veneer.files.atomic import Staged, as_veneer_errors
from veneer.files.gguf import read_gguf_file
from veneer.files.hashes import Hashes, hashes, sealed
from veneer.files.safetensors import write_tensors
from veneer.formats import peft
from veneer.formats.comparison import Refusals, differences, relative_error
from veneer.formats.diffusers import diffusers_tensors
from veneer.formats.fused import trimmed
from veneer.formats.gguf import read_gguf, write_gguf
from veneer.formats.kohya import kohya_tensors
from veneer.formats.loaders import unreachable
from veneer.formats.metadata import family_in_metadata, metadata_of, pack_configs
from veneer.formats.module_tensors import ModuleChanges, changes_by_module
from veneer.formats.names import choose_family, component_of
from veneer.formats.read import read_state_dict
from veneer.formats.server_export import MERGE, folded, refuse_unservable, vllm_notes
from veneer.formats.tensors import check_finite
from veneer.formats.topology import Family, families

TARGETS = ("peft", "kohya", "diffusers", "comfyui", "gguf", "vllm")

_FOLDERS = ("peft", "vllm")
_PIPELINES = ("kohya", "diffusers", "comfyui")


def target_of(out: str | Path, like: str = "") -> str:
    """Return the layout for a new file or folder.

    A folder gets peft, and a .gguf file gets gguf. A .safetensors file gets the layout of the source adapter
    (`like`) if that is a file layout, else kohya, which most tools can read."""
    ending = Path(out).suffix
    if ending == ".safetensors":
        return like if like in _PIPELINES else "kohya"
    return "gguf" if ending == ".gguf" else "peft"


@dataclass(frozen=True)
class EncodedAdapter:
    """An adapter encoded in a layout, in memory.

    `config`: PEFT's configuration; {} for other layouts. `notes`: messages for the user."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class WriteReport:
    """The result of writing an adapter.

    `digest`: the digest of the adapter as read back. `files`: name -> "sha256:…". `hashes`: the hashes of a
    single file that A1111 and CivitAI show; None for a folder. `ranks`: rank -> number of modules."""

    path: Path
    to: str
    family: str | None
    digest: str
    files: dict[str, str]
    hashes: Hashes | None
    ranks: dict[int, int]
    notes: list[str]


def encode(
    adapter: Adapter,
    to: str,
    *,
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
    head_dim: int | None = None,
) -> EncodedAdapter:
    """Encode `adapter` in the layout `to`, and check the result by reading it back.

    to: one of TARGETS.
    family: the image model's family, a name in `topology.families()`; by default, found from modules, widths
        and card. For gguf, llama.cpp's name of the architecture.
    metadata: overrides the card's metadata, in the layouts kohya, comfyui and diffusers.
    dtype: all tensors are first rounded to this dtype.
    head_dim: the base's rows per head, needed by gguf for Llama's q and k.

    Raises one AdapterError that lists every module that `to` cannot express, with the reason and the closest
    alternative."""
    source, notes = _prepared(adapter, to, dtype)
    if to == "gguf":
        with TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.gguf"
            return _advise(source, to, None, lambda: _gguf(source, path, family, head_dim, "adapter", notes)).encoded
    return _advise(source, to, family, lambda: _encoded(source, to, family, metadata or {}, "adapter", notes)).encoded


def write(
    adapter: Adapter,
    out: str | Path,
    to: str,
    *,
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
    head_dim: int | None = None,
) -> WriteReport:
    """Write `adapter` to `out` in the layout `to`.

    `out` is a folder for peft and vllm, and a file for other layouts. See `encode` for the other arguments.
    Writes atomically; equal adapters give equal bytes. Raises the errors of `encode`, and ResourceError for a
    full disk."""
    path = Path(out)
    source, notes = _prepared(adapter, to, dtype)
    _check_name(path, to)
    name = path.name if to in _FOLDERS else path.stem
    if to == "gguf":
        staged = Staged.next_to(path, ".gguf")
        try:
            at = staged.temporary
            done = _advise(source, to, None, lambda: _gguf(source, at, family, head_dim, name, notes))
            with as_veneer_errors(path):
                staged.commit()
        finally:
            staged.discard()
    else:
        done = _advise(source, to, family, lambda: _encoded(source, to, family, metadata or {}, name, notes))
        if to in _FOLDERS:
            folder = peft.write_folder(done.written, path, digest=_folder_digest(source, done))
            files, notes = folder.files, [*done.encoded.notes, *folder.notes]
            return WriteReport(path, to, done.family, folder.digest, files, None, _ranks(done), notes)
        write_tensors(path, done.encoded.tensors, done.encoded.metadata)
    file_hashes = hashes(path)
    files = {path.name: f"sha256:{file_hashes.sha256}"}
    return WriteReport(
        path, to, done.family, done.read_back.digest(), files, file_hashes, _ranks(done), done.encoded.notes
    )


def layout_ending(to: str) -> str:
    """Return the file extension of a layout; "" for a folder."""
    return "" if to in _FOLDERS else ".gguf" if to == "gguf" else ".safetensors"


def _check_name(path: Path, to: str) -> None:
    """Raise AdapterError for a wrong file extension, or for a folder instead of a file.

    Readers choose a format by the extension."""
    ending = layout_ending(to)
    if ending and path.suffix != ending:
        raise AdapterError(f"{to} is one file, called …{ending}", where=str(path), fix=f"{path.name}{ending}")
    if ending and path.is_dir():
        raise AdapterError(f"{to} is one file, but there is a folder of this name", where=str(path))
    if not ending and path.suffix in (".gguf", ".safetensors"):
        raise AdapterError(f"{to} is a folder, but this is a file's name", where=str(path), fix=path.stem)


@dataclass(frozen=True)
class _EncodingResult:
    """The result of encoding an adapter.

    `written`: the adapter in the form that was written. `read_back`: the adapter after reading back. `pairs`:
    the pairs as the layout stores them."""

    encoded: EncodedAdapter
    written: Adapter
    read_back: Adapter
    family: str | None
    pairs: list[Pair]


def _ranks(done: _EncodingResult) -> dict[int, int]:
    return dict(sorted(Counter(p.rank for p in done.pairs).items()))


def _prepared(adapter: Adapter, to: str, dtype: str | None) -> tuple[Adapter, list[str]]:
    """Return the adapter to write, and notes on rounding.

    The returned adapter is on the CPU, has no origins, and is rounded to `dtype`."""
    if to not in TARGETS:
        raise AdapterError(f"there is no layout {to!r}", fix=", ".join(TARGETS))
    source, notes = _rounded(adapter.collapsed().mapped(lambda t: t.detach().cpu()), dtype)
    if next(source.tensors(), None) is None:
        raise AdapterError("the adapter is empty")
    check_finite(dict(source.tensors()))
    return source, notes


def _advise(source: Adapter, to: str, family: str | None, build: Callable[[], _EncodingResult]) -> _EncodingResult:
    """Return the result of `build`.

    If `build` raises an AdapterError without a workaround, this function adds the layouts that would work to
    the error."""
    try:
        return build()
    except AdapterError as error:
        if error.fix is None:
            error = AdapterError(error.what, where=error.where, fix=_other_layouts(source, to, family))
        raise error from None


def _other_layouts(source: Adapter, to: str, family: str | None) -> str:
    """Return, as a workaround, the other layouts that can hold the whole adapter.

    Tries each layout."""
    layouts = []
    for layout in ("peft", *_PIPELINES, "vllm"):
        try:
            if layout != to:
                _encoded(source, layout, family, {}, "adapter", [])
                layouts.append(layout)
        except AdapterError:
            continue
    return (
        f"--to {' or '.join([', '.join(layouts[:-1]), layouts[-1]] if layouts[1:] else layouts)}"
        if layouts
        else f"no other layout can express it; {MERGE}"
    )


def _encoded(
    source: Adapter, to: str, family: str | None, metadata: Mapping[str, str], name: str, notes: list[str]
) -> _EncodingResult:
    if to in _PIPELINES:
        return _for_pipelines(source, to, _family(source, family, to), metadata, name, notes)
    if to == "peft":
        refused: Refusals = defaultdict(list)
        written = _as_one_model(source, refused)
        _raise_refused(refused, to, source)
    else:
        written = folded(_servable(source, to))
        notes = [*notes, *vllm_notes(written)]
    config, tensors = peft.encode_folder(written, base_name=written.card.base, task_type="auto")
    read_back = peft.interpret(config, tensors).adapter
    _compare(written if to == "peft" else source, read_back, to)
    _check_reachable(source, tensors, to)
    return _EncodingResult(
        EncodedAdapter(tensors, {"format": "pt"}, config, notes), written, read_back, None, list(written.pairs.values())
    )


def _folder_digest(source: Adapter, done: _EncodingResult) -> str | None:
    """Return the written folder's digest under canonical module names.

    Return None if a reader would keep the folder's own names."""
    part = component_of(next(iter(changes_by_module(source)), ""))
    names = dict.fromkeys(changes_by_module(done.read_back))
    choice = choose_family(names)
    if not part or any(choice.lookup(name) is None for name in names):
        return None
    return done.read_back.renamed(lambda name: f"{part}.{name}").digest()


def _servable(source: Adapter, to: str) -> Adapter:
    """Return the adapter unchanged if the server for layout `to` supports every change.

    Otherwise, raise one AdapterError that lists everything the server does not support."""
    refused: Refusals = defaultdict(list)
    refuse_unservable(source, changes_by_module(source), {"vllm": "vLLM", "gguf": "llama.cpp"}[to], refused)
    _raise_refused(refused, to, source)
    return source


def _gguf(
    source: Adapter, path: Path, architecture: str | None, head_dim: int | None, name: str, notes: list[str]
) -> _EncodingResult:
    """Write a GGUF file at `path`, read it back, and compare it with the source."""
    written = folded(_servable(source, "gguf"))
    if architecture is None:
        raise AdapterError(
            "the names in a GGUF file depend on the base's architecture", fix="--base, or --family llama, qwen3, …"
        )
    notes = [*notes, *write_gguf(written, path, architecture=architecture, head_dim=head_dim, name=name)]
    read_back = read_gguf(path, head_dim=head_dim).adapter
    _compare(source, read_back, "gguf")
    file = read_gguf_file(path)
    tensors = {key: file.tensor(key) for key in sorted(file.entries)}
    fields = {key: str(value) for key, value in sorted(file.fields.items())}
    encoded = EncodedAdapter(tensors, fields, {}, notes)
    return _EncodingResult(encoded, written, read_back, architecture, list(written.pairs.values()))


def _rounded(adapter: Adapter, dtype: str | None) -> tuple[Adapter, list[str]]:
    """Return the adapter rounded to `dtype`, and a note with the rounding error."""
    if dtype is None:
        return adapter, []
    target = dtype_of(dtype)
    out = adapter.mapped(lambda t: t.to(target) if t.is_floating_point() else t)
    worst = max((relative_error(p, out.pairs[n]) for n, p in adapter.pairs.items()), default=0.0)
    return out, [f"rounded to {dtype}: ΔW moves by up to {worst:.2g} of its norm"] if worst else []


def _raise_refused(refused: Refusals, to: str, source: Adapter) -> None:
    """Raise one AdapterError with every refused module, grouped by reason.

    The names of the modules are left out if a reason applies to all modules."""
    if not refused:
        return
    lines = []
    everything = {*changes_by_module(source), *source.token_rows}
    for reason, modules in refused.items():
        names = sorted(set(modules))
        if set(names) == everything and len(names) > 3:
            lines.append(f"  - {reason} (all {len(names)})")
            continue
        lines.append(f"  - {reason} ({len(names)}):")
        lines += [f"      {name}" for name in names]
    count = len({m for modules in refused.values() for m in modules})
    raise AdapterError(f"{to} cannot hold this adapter exactly; {count} module(s) are in the way:\n" + "\n".join(lines))


def _compare(source: Adapter, read_back: Adapter, to: str) -> None:
    if problems := differences(source, read_back):
        listing = bullets(problems, None)
        raise AdapterError(
            f"written as {to}, the adapter would not come back the same; nothing was written:\n{listing}"
        )


def _check_reachable(source: Adapter, tensors: Mapping[str, Tensor], to: str, family: Family | None = None) -> None:
    modules = {*changes_by_module(source), *source.token_rows}
    owners = {n.rpartition(".")[0] if n in source.pairs and source.pairs[n].kind == "experts" else n for n in modules}
    if problems := unreachable(owners, tensors, to, family):
        raise AdapterError(
            f"as {to}, the adapter would not be loaded completely; nothing was written:\n{bullets(problems, None)}"
        )


def _as_one_model(adapter: Adapter, refused: Refusals) -> Adapter:
    """Return the adapter with the component's prefix removed from module names.

    Modules that a PEFT folder cannot hold are added to `refused`: modules of several models, of a pipeline's
    text encoder, or with a magnitude along the inputs."""
    for module, pair in adapter.pairs.items():
        if pair.magnitude is not None and pair.magnitude.ndim > 1:
            refused["PEFT has no magnitude along the inputs; merge it into the base"].append(module)
    modules = [*changes_by_module(adapter), *adapter.token_rows]
    parts = {component_of(m) for m in modules}
    for module in modules:
        if len(parts) > 1:
            refused["a PEFT folder holds an adapter for one model, but this adapter changes several"].append(module)
        elif component_of(module).startswith("text_encoder"):
            refused["a PEFT folder does not say which text encoder it is for"].append(module)
    part = parts.pop()
    return adapter.renamed(lambda name: name.removeprefix(f"{part}.")) if part else adapter


def _family(adapter: Adapter, name: str | None, to: str) -> Family:
    """Return the family `name`, or find the family from modules, widths and card."""
    supported = families()
    if name is not None:
        if name not in supported:
            raise AdapterError(f"there is no family {name!r}", fix=", ".join(supported))
        return supported[name]
    modules = [*changes_by_module(adapter), *adapter.token_rows]
    if not any(component_of(m) for m in modules):
        raise AdapterError(
            f"{to} is for adapters of image models, and no module here begins with unet, transformer or text_encoder"
        )
    claim = family_in_metadata(
        {key: str(adapter.card.extra.get(metadata_key, "")) for key, metadata_key in _CLAIMS.items()}
    )
    choice = choose_family({m: _shape(adapter, m) for m in modules}, claim)
    if choice.family is None and choice.nearest:
        raise AdapterError(choice.reasons[-1], fix=f"--family {choice.nearest[0]}, if the base is of this family")
    if choice.family is None:
        raise AdapterError("no known image model has any of these modules", where=", ".join(modules[:3]))
    return choice.family


_CLAIMS = {"modelspec.architecture": "architecture", "ss_base_model_version": "base_version"}


def _shape(adapter: Adapter, module: str) -> tuple[int, int] | None:
    pair = adapter.pairs.get(module)
    return None if pair is None else (pair.B.shape[0], pair.A.shape[1])


def _for_pipelines(
    source: Adapter, to: str, family: Family, metadata: Mapping[str, str], name: str, notes: list[str]
) -> _EncodingResult:
    """Return the encoding for kohya, comfyui or diffusers: one safetensors file.

    The file's metadata contains the card."""
    refused: Refusals = defaultdict(list)
    leaves = changes_by_module(source)
    for module in source.token_rows:
        refused["token rows cannot be stored in such a file; merge them into the base"].append(module)
    extra: dict[str, str] = {}
    if to == "diffusers":
        leaves = _own_ranks(leaves, family)
        tensors, configs = diffusers_tensors(leaves, family, refused)
        if configs:
            extra["lora_adapter_metadata"] = pack_configs(configs)
        pairs = [changes.pair for changes in leaves.values() if changes.pair is not None]
    else:
        tensors, pairs, more = kohya_tensors(leaves, family, to, refused)
        notes = [*notes, *more]
        # Joined parts look like sd-scripts' split_qkv, where alpha refers to the rank of one part. Here alpha
        # refers to the whole rank.
        extra["ss_network_args"] = '{"split_qkv": "False"}'
    _raise_refused(refused, to, source)
    card = replace(source.card, kind=source.card.kind or "image")
    ranks = {p.rank for p in pairs}
    alphas = {alpha_of(p.scale, p.rank) for p in pairs}
    card = replace(card, rank=ranks.pop() if len(ranks) == 1 else 0, alpha=alphas.pop() if len(alphas) == 1 else 0.0)
    described = metadata_of(card, family=family.name, name=name) | extra
    if any(d.form in ("hadamard", "kronecker", "gain") for d in source.deltas.values()):
        described["ss_network_module"] = "lycoris.kohya"
    described = sealed(tensors, described | dict(metadata))
    read_back = read_state_dict(tensors, described, where=to).adapter
    _compare(source, read_back, to)
    _check_reachable(source, tensors, to, family)
    return _EncodingResult(EncodedAdapter(tensors, described, {}, notes), source, read_back, family.name, pairs)


def _own_ranks(leaves: Mapping[str, ModuleChanges], family: Family) -> dict[str, ModuleChanges]:
    """Return the changes, with parts of fused pairs at their original ranks.

    ΔW does not change; each part of a block-diagonal pair drops the rows of A that belong to other parts."""
    parts = {p.module for targets in family.originals.values() for p in targets if p.part is not None}
    own = {m: changes.pair for m, changes in leaves.items() if m in parts and changes.pair is not None}
    return {**leaves, **{m: replace(leaves[m], pair=trimmed(pair)) for m, pair in own.items()}}
