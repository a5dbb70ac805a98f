"""The public functions of `import veneer`, which do the same as the commands.

    base = load_base("smollm2-135m")
    run = train_text("examples/tickets/config.yaml", "adapter.rank=8", base=base)
    train_together(["a.yaml", "b.yaml"], base=base)          # the runs share each forward pass of the base
    generate(base, ["Where is my parcel?"], adapters=[run.adapter])
    evaluate(base, "examples/tickets/test.jsonl", {"base": [], "tickets": [run.adapter]})
    merge(base, [run.adapter], "merged")
    mix(["support:0.6", "polite:0.4"], "runs/both")
    with open_library() as library: library.add(run.adapter, "support")
    train_image("examples/images/config.yaml", "preset=style")
    with open_jobs() as jobs: submit(jobs, "support.yaml", name="support", tenant="acme")
    image(load_image_base("catalogue-sdxl"), ["a fox"], adapters=["runs/style:0.8"])[0].save("fox.png")

To name an adapter, give its folder or its name in the library, optionally with a strength: "runs/a:0.5".
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.adapters.merge import merge
from veneer.adapters.mix import mix_adapters as mix
from veneer.adapters.use import AdapterSpec, attach_adapters, load_adapter, parse_spec
from veneer.formats import peft
from veneer.library.library import open_library
from veneer.models.image.base import load_image as load_image_base
from veneer.models.text.base import TextBase
from veneer.models.text.base import load_text as load_base
from veneer.models.text.generate import complete

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.errors import VeneerError
    from veneer.formats.strengths import Strength
    from veneer.imaging.generate import RecordedPicture
    from veneer.jobs.store import Job, JobStore
    from veneer.models.image.base import ImageBase
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.config.load import RunConfig
    from veneer.train.config.text import TrainConfig
    from veneer.train.events import Event, Listener
    from veneer.train.image.save import ImageResult
    from veneer.train.text.evaluate import Scores
    from veneer.train.text.save import RunResult

    _ImageSpec = str | os.PathLike[str] | tuple[str | os.PathLike[str], float | Strength]

__all__ = [
    "evaluate",
    "generate",
    "image",
    "load_adapter",
    "load_base",
    "load_image_base",
    "merge",
    "mix",
    "open_jobs",
    "open_library",
    "save_adapter",
    "submit",
    "train_image",
    "train_text",
    "train_together",
]


def train_text(
    config: TrainConfig | Mapping[str, Any] | str | os.PathLike[str],
    *overrides: str,
    base: TextBase | None = None,
    resume: bool = False,
    allow_other_machine: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Listener | None = None,
) -> RunResult:
    """Train one text adapter, as `veneer train` does, and return the run's result.

    `result.adapter` is the path of the adapter's folder.

    config: a TrainConfig, a mapping with the same fields, or the path of a YAML file.
    overrides: settings as "section.key=value".
    base: a base that is already loaded; by default, the base that the configuration names is loaded.
    resume, allow_other_machine, dry_run, force: the options of `veneer train`.
    on_event: called with each event of the run (train.events); by default the run's progress is printed to
        the terminal.

    Raises ConfigError, DataError or PreflightError before the first step. On Ctrl-C, saves the state and
    raises Interrupted."""
    from veneer.errors import ConfigError
    from veneer.serve.engine.live import live_sampler
    from veneer.train.config.text import TrainConfig
    from veneer.train.text.task import run_text

    chosen, sources = _config(config, overrides)
    if not isinstance(chosen, TrainConfig):
        raise ConfigError("this configuration is for pictures (it has data.pictures)", fix="veneer.train_image")
    return run_text(
        chosen,
        resume=resume,
        allow_other_machine=allow_other_machine,
        dry_run=dry_run,
        force=force,
        on_event=on_event,
        base=base,
        sources=sources,
        sampler=live_sampler,
    )


def train_together(
    configs: Sequence[TrainConfig | Mapping[str, Any] | str | os.PathLike[str]],
    *overrides: str,
    base: TextBase | None = None,
    resume: bool = False,
    allow_other_machine: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Callable[[int, Event], None] | None = None,
) -> list[RunResult | VeneerError]:
    """Train one adapter per configuration, with one shared forward pass per step.

    Does the same as `veneer train a.yaml b.yaml`. Returns one result per configuration, equal to the result
    of `train_text` for that configuration. If a run fails, the error is returned as its result, and the other
    runs continue.

    on_event: called as on_event(index, event), with the run's index in `configs`.

    The other parameters are those of `train_text`. Raises ConfigError if the configurations do not share a
    base. On Ctrl-C, saves the state of every run and raises Interrupted."""
    from veneer.train.report.log import ConsoleView
    from veneer.train.text.together import run_texts

    loaded = [_config(config, overrides) for config in configs]
    chosen = [config for config, _ in loaded]
    names = [
        os.fspath(given) if isinstance(given, str | os.PathLike) else own.output.directory
        for given, own in zip(configs, chosen, strict=True)
    ]
    listeners: list[Listener] = [
        ConsoleView(name=name) if on_event is None else functools.partial(on_event, place)
        for place, name in enumerate(names)
    ]
    return run_texts(
        chosen,
        names=names,
        resume=resume,
        allow_other_machine=allow_other_machine,
        dry_run=dry_run,
        force=force,
        listeners=listeners,
        base=base,
        sources=[sources for _, sources in loaded],
    )


def train_image(
    config: ImageTrainConfig | Mapping[str, Any] | str | os.PathLike[str],
    *overrides: str,
    base: ImageBase | None = None,
    resume: bool = False,
    allow_other_machine: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Listener | None = None,
) -> ImageResult:
    """Train one image adapter, as `veneer train` does, and return the run's result.

    `result.adapter` is the path of the adapter's file (a folder for the peft format). The parameters are
    those of `train_text`, but the configuration has `data.pictures` (docs/reference/image-config.md). If the
    caller passes a `base`, training does not free that base's text encoders and VAE."""
    from veneer.errors import ConfigError
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.image.run import run_images

    chosen, sources = _config(config, overrides)
    if not isinstance(chosen, ImageTrainConfig):
        raise ConfigError("this configuration is for text (it has no data.pictures)", fix="veneer.train_text")
    return run_images(
        chosen,
        resume=resume,
        allow_other_machine=allow_other_machine,
        dry_run=dry_run,
        force=force,
        on_event=on_event,
        base=base,
        sources=sources,
    )


def _config(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str]
) -> tuple[RunConfig, Mapping[str, Any] | None]:
    from veneer.train.config.load import config_from, load_config

    if isinstance(config, Mapping):
        return config_from(config, overrides)
    if isinstance(config, str | os.PathLike):
        return load_config(config, overrides)
    return config_from(config.model_dump(), overrides) if overrides else (config, None)


def evaluate(
    base: TextBase,
    data: str | os.PathLike[str] | Sequence[str],
    mixes: Mapping[str, Sequence[AdapterSpec]] | None = None,
    *,
    limit: int | None = None,
    **settings: Any,
) -> dict[str, Scores]:
    """Score the base and mixes of adapters on held-out rows, as `veneer eval` does.

    data: one or more files in a training data format.
    mixes: name -> the adapters of a mix; by default {"base": []}.
    limit: use only the first `limit` rows.
    settings: max_new_tokens, batch_size, generate and on_progress, as in `train.text.evaluate.score_mixes`.
    """
    from veneer.serve.engine.offline import answering
    from veneer.train.text.evaluate import score_mixes
    from veneer.train.text.rows import read_rows

    files = [os.fspath(data)] if isinstance(data, str | os.PathLike) else list(data)
    rows, _ = read_rows(files, limit=limit)
    named = {"base": ()} if mixes is None else mixes
    specs = {name: [parse_spec(a) for a in mix] for name, mix in named.items()}
    return score_mixes(base, rows, specs, **{"answering": answering, **settings})


@contextmanager
def open_jobs(location: str | os.PathLike[str] | None = None, index: str | None = None) -> Iterator[JobStore]:
    """Open a library's queue of training jobs for the duration of a `with` block.

    `veneer jobs` uses the same queue, and `submit` adds a run to it. The methods `jobs`, `get`, `events`,
    `checkpoints`, `pause`, `resume` and `cancel` take the tenant as the first argument (jobs.store).

    location, index: as in `open_library`; by default the library in the veneer home."""
    from veneer.jobs.store import JobStore

    with open_library(location, index) as library:  # type: ignore[arg-type]
        yield JobStore(library)


def submit(
    jobs: JobStore,
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str],
    *overrides: str,
    name: str = "",
    tenant: str = "",
    tenants: str | None = None,
) -> Job:
    """Validate, plan and queue a run, as `veneer jobs submit` does; return the job.

    The returned job is either queued, or failed with an `error`.

    config, overrides: as in `train_text`; a configuration file can also have an `after` section.
    name: the name of the new adapter; by default the name of the output folder.
    tenants: the database with the tenants' limits and routes; by default the database in the veneer home, if
        it exists.

    Raises ConfigError for an invalid configuration or name, or if an action in `after` is impossible."""
    from veneer.jobs.post_training import load_job_config
    from veneer.jobs.validate import submit_job
    from veneer.serve.tenancy.store import tenants_at

    after = None
    if isinstance(config, str | os.PathLike):
        chosen, after = load_job_config(config, overrides)
    else:
        chosen, _ = _config(config, overrides)
    with tenants_at(tenants) as known:
        return submit_job(jobs, chosen, tenant=tenant, name=name, after=after, tenants=known)


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], base: TextBase) -> Path:
    """Write an adapter as a PEFT folder with a card that names `base`.

    Returns the folder's path. The folder appears complete or not at all."""
    card = replace(adapter.card, base=base.name, base_fingerprint=base.fingerprint)
    peft.write_folder(replace(adapter, card=card), os.fspath(folder), base_name=base.name, base=base.model)
    return Path(folder)


def generate(
    base: TextBase,
    prompts: str | Sequence[str | Sequence[Mapping[str, str]]],
    *,
    adapters: str | os.PathLike[str] | Sequence[AdapterSpec] = (),
    system: str | None = None,
    raw: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 8,
    on_token: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Return the base's completions of `prompts`, with `adapters` active as one mix.

    prompts: a string is a user message, formatted with the base's chat template; with `raw`, or if the base
        has no template, the base continues the string itself. A list of messages is used unchanged.
    system: a system message to put before each string prompt.
    temperature: 0 selects the most likely token; above 0, tokens are sampled, and a given `seed` always gives
        the same tokens.
    top_k, top_p: sample from the `top_k` most likely tokens (0: all) within a total probability of `top_p`.
    on_token: called as on_token(index, piece) with each new piece of text.

    Raises ConfigError for a value out of range."""
    texts = [_messages(base, p, system, raw) for p in _as_list(prompts)]
    with _with_adapters(base, _as_list(adapters)):
        found = complete(
            base,
            texts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            batch_size=batch_size,
            on_token=on_token,
        )
    return [completion.text for completion in found]


def image(
    base: ImageBase,
    prompts: str | Sequence[str],
    *,
    adapters: str | os.PathLike[str] | Sequence[_ImageSpec] = (),
    controls: str | Sequence[str] = (),
    negative: str = "",
    seed: int | Sequence[int] = 0,
    count: int = 1,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> list[RecordedPicture]:
    """Generate `count` images per prompt, as `veneer image` does.

    The images of a prompt have the seeds `seed`, `seed` + 1, …. Each result has `image`, `infotext`, `record`
    and `save(path)`. A single prompt, adapter, control or reference can be given without a list.

    adapters: "brand:0.8@down=0.5,steps=0-0.6", "lock@campaign=product" or ("brand", Strength(…)); see
        formats.strengths.
    controls: ControlNets, such as "canny=sketch.png:0.7".
    seed: one for all prompts, or one per prompt.
    say: called with messages, such as which inputs were resized, truncated or ignored, and which blocks and
        steps a `campaign` role selects.
    options: width, height, steps, guidance, true_guidance, scheduler, batch_size, image, mask, denoise,
        references (imaging.generate.Options)."""
    from veneer.imaging.adapters import ImagePipeline, parse_use
    from veneer.imaging.controls import parse_control
    from veneer.imaging.generate import Options, generate, image_requests

    uses = [parse_use((os.fspath(a[0]), a[1]) if isinstance(a, tuple) else os.fspath(a)) for a in _as_list(adapters)]
    asks = image_requests(_as_list(prompts), uses, negative, seed, count)
    options |= {"references": _as_list(options.get("references", ()))}
    with ImagePipeline(base, say=say) as mixer:
        return generate(mixer, asks, Options(controls=tuple(parse_control(c) for c in _as_list(controls)), **options))


def _as_list(given: Any) -> Any:
    """Return a list: a single string or path becomes a list with one item."""
    return [given] if isinstance(given, str | os.PathLike) else given


def _messages(
    base: TextBase, prompt: str | Sequence[Mapping[str, str]], system: str | None, raw: bool
) -> str | Sequence[Mapping[str, str]]:
    if not isinstance(prompt, str) or raw or not base.has_chat_template:
        return prompt
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


@contextmanager
def _with_adapters(base: TextBase, adapters: Sequence[AdapterSpec]) -> Iterator[None]:
    if not adapters:
        yield
        return
    with attach_adapters(base, adapters):
        yield
