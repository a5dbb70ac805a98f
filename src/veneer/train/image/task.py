"""Train an adapter on captioned images, from the image folder to a verified adapter.

load the base → read images → preflight → generate missing class images → cache latents and prompts → free the
encoders → attach the adapter → measure memory → report the settings with their sources → try the largest
batch → train → save → reload and compare predictions → write the report. A dry run performs the steps before
training without writing to the output folder, and leaves the contact sheet in a temporary folder.

    output/
      NAME.safetensors, veneer.json                 the adapter (layout peft: PEFT's folder)
      report.html, log.jsonl, pictures.png          report and log of the run, and the contact sheet
      samples/                                      sample sheets generated during training
      cache/                                        latents, prompts, class images; can be deleted
      checkpoints/                                  for resuming; can be deleted after the run
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.core.adapter import Adapter, Card
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.errors import counted
from veneer.models.image.base import ImageBase, release
from veneer.models.image.fast import fast_denoiser
from veneer.models.image.memory import fetched, measured_activations, offloading, park, recomputing
from veneer.models.image.predict import truncated_end
from veneer.train import checkpoint
from veneer.train.checkpoint import Progress, seed_all
from veneer.train.config.image import ImageTrainConfig
from veneer.train.events import Listener, Note, Sampled
from veneer.train.image.augmentation import plan_rows
from veneer.train.image.batches import plan_image_steps, planned_rows, validation_rows
from veneer.train.image.checks import check_pictures
from veneer.train.image.contact_sheet import contact_sheet
from veneer.train.image.decode import SUFFIXES
from veneer.train.image.encode import Encoders, ImageLoss, time_distribution
from veneer.train.image.pictures import pictures_digest, read_split_pictures
from veneer.train.image.preflight import ImageData, adapter_components
from veneer.train.image.samples import (
    class_folder,
    generate_class_pictures,
    generate_samples,
    training_layers,
    write_sample_sheet,
)
from veneer.train.image.save import (
    ImageResult,
    image_report,
    layout_findings,
    output_path,
    prove_image_adapter,
    save_image_adapter,
    tag_frequency,
    training_facts,
)
from veneer.train.inspect import inspect_run
from veneer.train.loop import EvalResult, Learner, memory_errors, peak_memory_bytes, sender
from veneer.train.optim import Ema
from veneer.train.preflight import CACHE, Finding, Report, available_memory, memory_finding, recomputes, used_memory
from veneer.train.run import NAME, Run, Task, carry_out, due, newest_checkpoint, raise_if_stopped, recipe_of
from veneer.train.save import Outcome

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class _Memory:
    """Decisions about memory.

    because: why activations are recomputed, or why not. encoders_stay: why the encoders remain in memory.
    parked: components that are moved to the CPU."""

    recompute: bool = False
    because: str = ""
    encoders_stay: str = ""
    parked: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageRun:
    """A run on an image base.

    owns_base: whether only this run uses the base, so that its encoders can be freed. kind: the kind of
    training data."""

    run: Run
    config: ImageTrainConfig
    base: ImageBase
    owns_base: bool
    kind: ImageKind

    @property
    def cache(self) -> Path:
        return Path(self.config.data.cache) if self.config.data.cache else self.run.folder / CACHE


@dataclass(frozen=True)
class ImageKind:
    """The functions that differ between a run on images and a slider (train.image.slider).

    read: reads the data
    texts: returns all texts for the base's encoders, by purpose
    findings: returns findings about the data
    last_findings: returns findings that need forward passes; called only if nothing else stops the run
    loss: returns the loss to minimize"""

    read: Callable[[ImageRun], ImageData]
    texts: Callable[[ImageRun, ImageData], dict[str, Iterable[str]]]
    findings: Callable[[ImageRun, ImageData], Iterable[Finding]]
    last_findings: Callable[[ImageRun, ImageData], Iterable[Finding]]
    loss: Callable[[ImageRun, ImageData, Attachment], ImageLoss]


def train_images(image: ImageRun) -> ImageResult:
    """Read and check the data, attach the adapter, train, and return the result."""
    run = image.run
    newest = newest_checkpoint(run)
    data = image.kind.read(image)
    report = _check(image, data, recipe_of(newest))
    raise_if_stopped(run, report)
    with attach_images(image, data, report) as task:
        return carry_out(run, task, report, newest)


def image_prompts(image: ImageRun, data: ImageData) -> dict[str, Iterable[str]]:
    samples = image.config.samples
    return {
        "captions": [p.caption for p in (*data.training, *data.held_out)],
        "sample prompts": [*samples.prompts, samples.negative],
        "class prompts": [image.config.data.class_prompt or ""] if data.missing_class_pictures else [],
    }


def read_image_data(image: ImageRun) -> ImageData:
    """Read images, held-out images, rows and steps, and count the missing class images."""
    config, base, run = image.config, image.base, image.run
    settings = config.data
    missing = 0
    if settings.class_count:
        folder = class_folder(config, base, image.cache)
        class_files = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.stem.endswith(".mask")]
        missing = max(0, settings.class_count - len(class_files))
        settings = settings.model_copy(update={"class_folder": str(folder) if class_files else None})
    pictures, held_out, summary = read_split_pictures(settings, config.seed)
    plan = plan_rows(pictures, settings, size=base.size, unit=base.unit)
    scored = []
    if held_out:
        rows = plan_rows(held_out, settings, size=base.size, unit=base.unit).rows
        scored = validation_rows(rows, settings, config.evaluation.rows)
    encoders = Encoders(base, config, None if run.dry_run else image.cache)
    steps = plan_image_steps(plan.rows, config, encoders.batch, run.devices.count)
    tags = tag_frequency(p for p in pictures if not p.is_class)
    return ImageData(pictures, held_out, summary, plan, encoders, steps, scored, missing, tags)


def _check(image: ImageRun, data: ImageData, previous: Mapping[str, Any] | None) -> Report:
    run, config, base = image.run, image.config, image.base
    texts = image.kind.texts(image, data)
    # Only the length of the texts is checked, so a dry run or a wrong setting needs no forward pass.
    if base.reads_references and data.summary.sources:  # prompts with source images are not truncated
        texts |= {"captions": [], "sample prompts": []}
    cut = {
        w: {c: unread for c in dict.fromkeys(prompts) if (unread := truncated_end(base, c))}
        for w, prompts in texts.items()
    }
    data_findings = image.kind.findings(image, data)
    options: dict[str, Any] = {"resume": run.resume, "previous": previous, "devices": run.devices.count}
    report = inspect_run(config, base, data, data_findings=data_findings, cut=cut, **options)
    if not report.stops:
        report.add(*image.kind.last_findings(image, data))
    if report.stops:
        run.emit_checks(report, _resolved_settings(image, data, _Memory()))
        if run.dry_run and run.devices.first:
            _write_contact_sheet(run, config, data, run.emit)
    return report


@contextmanager
def attach_images(image: ImageRun, data: ImageData, report: Report) -> Iterator[Task[ImageResult]]:
    """Generate missing class images, fill the caches, free the encoders, and attach the adapter.

    After that, memory is measured, and settings that depend on memory are decided. Changes to the base are
    undone at the end."""
    run, config, base = image.run, image.config, image.base
    memory = _Memory()
    if not run.dry_run:
        data = _with_class_pictures(image, data)
        _fill_caches(image, data)
        memory = _free_encoders(image)
    with ExitStack() as undo:
        attachment = undo.enter_context(attach(base.model))
        seed_all(config.seed)
        created = _create_adapter(base, config)
        report.add(*layout_findings(created, base, config))
        attachment.add(NAME, created, trainable=True)
        del created  # the attachment has a copy
        attachment.use(NAME)
        undo.enter_context(training_layers(base, True))
        if config.memory.offload_blocks:  # offload before measuring free memory, so that the run can use freed memory
            moved = undo.enter_context(offloading(base, config.memory.offload_blocks))
            run.note(f"{moved / 1e9:.2f} GB of frozen weights stay on the CPU until needed")
        else:  # fast paths hold references to weights, so they cannot be used with offloading
            run.note(undo.enter_context(fast_denoiser(base.denoiser)).summary())
        loss = image.kind.loss(image, data, attachment)
        memory = _measure_memory(image, data, loss, report, memory)
        run.emit_checks(report, _resolved_settings(image, data, memory))
        report.raise_if_stopped()
        undo.enter_context(recomputing(base) if memory.recompute else nullcontext())
        yield ImageTask(image, data, attachment, loss, memory).task()


def _with_class_pictures(image: ImageRun, data: ImageData) -> ImageData:
    """Generate missing class images with the base, then read the data again."""
    if not data.missing_class_pictures:
        return data
    run, folder = image.run, class_folder(image.config, image.base, image.cache)
    began = time.perf_counter()
    if run.devices.first:
        generate_class_pictures(image.base, image.config, folder, data.missing_class_pictures)
    run.devices.gather(None)
    seconds = time.perf_counter() - began
    run.note(f"generated {counted(data.missing_class_pictures, 'class picture')} into {folder} in {seconds:.0f} s")
    return image.kind.read(image)


def _fill_caches(image: ImageRun, data: ImageData) -> None:
    """Fill the caches of latents and text embeddings."""
    run, began, devices = image.run, time.perf_counter(), image.run.devices
    if devices.count > 1:  # each process encodes a share, and then reads the rest from the cache
        data.encoders.fill(islice(chain(planned_rows(data.steps), data.scored), devices.rank, None, devices.count))
        devices.gather(None)
    views, captions = data.encoders.fill(chain(planned_rows(data.steps), data.scored))
    latents, texts = data.encoders.latents, data.encoders.texts
    damaged = latents.damaged + texts.damaged
    text = f"{counted(views, 'view')} of pictures and {counted(captions, 'caption')} ready: "
    text += f"{latents.misses + texts.misses} encoded, "
    text += f"{latents.hits + texts.hits} from {image.cache}, {time.perf_counter() - began:.1f} s"
    run.note(text + (f"; {damaged} damaged entries were recomputed" if damaged else ""))


def _free_encoders(image: ImageRun) -> _Memory:
    """Free the components that filled the caches, or move them to the CPU.

    If the components must stay in memory, the result has the reason."""
    run, base, config = image.run, image.base, image.config
    if not config.memory.free_encoders or not image.owns_base:
        return _Memory()
    names = [n for n in base.parts if n.startswith("text_encoder") or n == "vae"]
    names = [n for n in names if base.parts[n] is not None]
    reason = ""
    if config.adapter.text_encoders:
        reason = "the text encoders are trained"
    elif config.samples.prompts and (base.device.type == "cpu" or base.quantized):
        reason = "samples need the encoders"
    elif config.samples.prompts:
        run.note(f"{', '.join(names)} stay on the CPU between sample sheets: {park(base, names) / 1e6:,.0f} MB")
        return _Memory(parked=tuple(names))
    if reason:
        run.note(f"text encoders and VAE stay in memory: {reason}")
        return _Memory(encoders_stay=reason)
    freed_bytes = sum(p.numel() * p.element_size() for n in names for p in base.parts[n].parameters())
    release(base, *names)
    run.note(f"freed {', '.join(names)}: {freed_bytes / 1e6:,.0f} MB")
    return _Memory()


def _create_adapter(base: ImageBase, config: ImageTrainConfig) -> Adapter:
    """Create one adapter for the denoiser and the configured text encoders.

    Its module names are canonical."""
    combined = Adapter()
    targets: list[str] = []
    spec = config.adapter.spec()
    for name, (module, part_spec) in adapter_components(base, config).items():
        part = create(module, part_spec, seed=config.seed)
        combined.pairs |= {f"{name}.{key}": pair for key, pair in part.pairs.items()}
        combined.deltas |= {f"{name}.{key}": delta for key, delta in part.deltas.items()}
        targets += [f"{name}: {t}" for t in part.card.targets]
    card = Card(kind="image", rank=spec.rank, alpha=spec.alpha, targets=targets)
    return replace(combined, card=card, rslora=spec.rslora, dropout=spec.dropout)


def _measure_memory(image: ImageRun, data: ImageData, loss: ImageLoss, report: Report, memory: _Memory) -> _Memory:
    """Measure the activations of one image of the largest shape, and decide whether to recompute them.

    Adds a finding about memory to the report."""
    config, base = image.config, image.base
    largest = max((m for s in data.steps for m in s.micros), key=lambda m: m.size or 0)
    batch = data.encoders.batch(largest.make().rows[:1])
    frozen = list(base.model.parameters())
    rng_state = checkpoint.rng_state()
    mode = config.memory.activation_checkpointing

    def measure(recompute: bool) -> int:
        with recomputing(base) if recompute else nullcontext(), memory_errors(largest):
            return measured_activations(lambda: loss(batch), frozen)

    free = available_memory(config, base.device)
    # float32 weight, gradient, two moments, and optionally a moving average, in bytes per parameter
    trained = (20 if config.ema.decay else 16) * int(report.numbers.get("trainable", 0))
    offloads = config.memory.offload_blocks > 0
    recompute, because = mode == "on" or offloads, "memory.offload_blocks needs it" if offloads else ""
    if not recompute:
        bytes_per_picture = measure(False)
        need = bytes_per_picture * largest.tokens + trained
        recompute, because = recomputes(mode, need, free)
    if recompute:
        bytes_per_picture = measure(True)
    checkpoint.rng_restore(rng_state)
    need = trained + bytes_per_picture * largest.tokens
    report.numbers.update(memory_needed=need, memory_free=free, activations_of_one_picture=bytes_per_picture)
    report.numbers["predicted_peak_bytes"] = max(peak_memory_bytes(base.device), used_memory(base.device) + need)
    text, fix = "all activations kept", "memory.activation_checkpointing=on, batching.micro_rows=1"
    if recompute:
        text, fix = "with activations recomputed", "batching.micro_rows=1"
    text, fix = f"{text}, at most {counted(largest.tokens, 'picture')} at once", f"{fix}, or a lower data.resolution"
    report.add(memory_finding(need, free, text, fix=fix, force=image.run.force))
    return replace(memory, recompute=recompute, because=because)


def _resolved_settings(image: ImageRun, data: ImageData, memory: _Memory) -> Iterator[tuple[str, Any, str]]:
    """Yield each setting that was `auto` or unset, with its value and the reason."""
    config, base = image.config, image.base
    if config.base.dtype == "auto":
        yield "base.dtype", str(base.dtype).removeprefix("torch."), base.dtype_reason
    if config.base.device == "auto":
        yield "base.device", str(base.device), "a GPU if there is one"
    if config.data.resolution is None:
        yield "data.resolution", base.size, "the base's size"
    if config.data.split is None and config.data.validation is None:
        yield "data.split", len(data.held_out), "a tenth of the pictures, at most 50; none if there are fewer than 20"
    times = time_distribution(base, config)
    if config.loss.timesteps == "auto":
        yield "loss.timesteps", times.kind, f"the base predicts {base.prediction}"
    if config.loss.shift == "auto" and base.prediction == "flow":
        yield "loss.shift", times.shift, "the scheduler's constant shift; 1 if its shift depends on the image size"
    if config.schedule.epochs is None and config.schedule.steps is None:
        yield "schedule.steps", config.steps, "1000 if neither epochs nor steps are set"
    if config.memory.activation_checkpointing == "auto" and memory.because:
        yield "memory.activation_checkpointing", "on" if memory.recompute else "off", memory.because
    if memory.encoders_stay:
        yield "memory.free_encoders", False, memory.encoders_stay


def _write_contact_sheet(run: Run, config: ImageTrainConfig, data: ImageData, emit: Listener) -> str:
    """Write the contact sheet, and return its path.

    A dry run writes to a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="veneer-")) if run.dry_run else run.folder
    path = str(folder / "pictures.png")
    count = contact_sheet(data.plan.rows, config.data, seed=config.seed, path=path)
    emit(Note(f"{count} of the pictures as the model sees them: {path}"))
    return path


class ImageTask:
    """The task of minimizing the denoiser's error on the images.

    If configured, the task also maintains a moving average and writes sample sheets.

    sheet: path of the contact sheet, once written. last_picture: the image from the latest sample sheet that
    is used as the thumbnail."""

    def __init__(
        self, image: ImageRun, data: ImageData, attachment: Attachment, loss: ImageLoss, memory: _Memory
    ) -> None:
        config = image.config
        self.config, self.base = config, image.base
        # The columns of the sample sheets are strengths for a slider, and seeds otherwise.
        self.strengths = config.slider.strengths if config.slider.enabled else ()
        self.run, self.data = image.run, data
        self.attachment, self.loss, self.memory = attachment, loss, memory
        self.parameters = attachment.parameters(NAME)
        self.ema = Ema(self.parameters, config.ema.decay) if config.ema.decay is not None else None
        every, total = config.samples.every, len(data.steps)
        self.sample_at = due(every, data.steps.ends, total, start=True) if every is not None else set()
        if config.samples.prompts:
            self.sample_at |= {total}
        self.emit, self.sheet = image.run.emit, ""
        self.last_picture: Image | None = None

    def task(self) -> Task[ImageResult]:
        data, base = self.data, self.base
        rate = self.config.optimizer.text_learning_rate
        learner = Learner(
            self.parameters,
            self.loss,
            send=sender(base.device),  # the sender's thread only reads latents from the cache
            score=self.score if data.scored else None,
            end_step=self.end_step,
        )
        return Task(
            learner=learner,
            steps=data.steps,
            ends=data.steps.ends,
            result=self.result,
            save=self.save,
            write=self.write,
            prove=self.prove,
            report=lambda result, done: image_report(result, self.run.folder, base, self.config, done.seconds),
            begin=self.begin,
            state={**self.parameters, **(self.ema.averages if self.ema else {})},
            identity={
                "base": {"fingerprint": base.fingerprint, "dtype": str(base.dtype), "quantized": base.quantized},
                "data": {
                    "pictures": pictures_digest(data.training),
                    "held-out pictures": pictures_digest(data.held_out),
                },
            },
            rates={f"{name}.": rate for name in self.config.adapter.text_encoders},
        )

    def begin(self, progress: Progress, emit: Listener) -> None:
        """Write the contact sheet and, unless the run was resumed, samples of the base."""
        self.emit = emit
        if self.run.devices.first:
            self.sheet = _write_contact_sheet(self.run, self.config, self.data, emit)
        if progress.step == 0 and 0 in self.sample_at:
            self._sample(0)

    def end_step(self, number: int) -> None:
        if self.ema is not None:
            self.ema.update(number)
        if number in self.sample_at:
            self._sample(number)

    def score(self, interrupted: Callable[[], bool]) -> EvalResult | None:
        with training_layers(self.base, False), self.ema.using_averages() if self.ema else nullcontext():
            return self.loss.score(self.data.scored, interrupted, self.run.devices)

    def result(self, outcome: Outcome, progress: Progress) -> ImageResult:
        speed = progress.tokens / progress.seconds if progress.seconds else 0.0
        return ImageResult(**vars(outcome), pictures=progress.tokens, sheet=self.sheet, pictures_per_second=speed)

    def save(self, result: ImageResult, progress: Progress, emit: Listener) -> ImageResult:
        """Write the adapter's file, with the moving average of the weights if configured."""
        config, base, data = self.config, self.base, self.data
        if self.ema is not None:
            self.ema.apply()
            text = f"saved the moving average of the weights (decay {self.ema.decay:g}), which the evaluations used"
            emit(Note(text))
        metrics = result.metrics(pictures=result.pictures, pictures_per_second=round(result.pictures_per_second, 3))
        metadata = training_facts(config, base, data, kept_step=result.kept_step, seconds=progress.seconds)
        written = save_image_adapter(self._adapter(metrics), base, config, metadata, self.last_picture, data.tags)
        for note in written.notes:
            emit(Note(note))
        hashes = written.hashes
        short_hashes = {"AutoV2": hashes.autov2, "AutoV3": hashes.autov3} if hashes is not None else {}
        samples = [str(p) for p in sorted((self.run.folder / "samples").glob("step-*.png"))]
        adapter = str(output_path(config))
        return replace(result, adapter=adapter, digest=written.digest, hashes=short_hashes, samples=samples)

    def write(self, folder: Path, progress: Progress) -> None:
        """Write the current adapter to `folder`, named `adapter`, without a thumbnail."""
        output = self.config.output.model_copy(update={"directory": str(folder), "name": "adapter"})
        with self.ema.using_averages() if self.ema else nullcontext():
            adapter = self._adapter(progress.metrics())
        folder.mkdir()
        config = self.config.model_copy(update={"output": output})
        save_image_adapter(adapter, self.base, config, {}, None, self.data.tags)

    def _adapter(self, metrics: dict[str, Any]) -> Adapter:
        """Return the current adapter with its card."""
        with training_layers(self.base, False):
            trained = self.attachment.adapter(NAME)
        card = replace(
            trained.card,
            base=self.base.name,
            base_fingerprint=self.base.fingerprint,
            kind="image",
            data_digest=pictures_digest(self.data.training),
            recipe=self.config.recipe(),
            metrics=metrics,
        )
        return replace(trained, card=card)

    def prove(self) -> str:
        row, encoders = next(planned_rows(self.data.steps)), self.data.encoders
        with training_layers(self.base, False):
            batch = encoders.batch([row])
            text = encoders.text([row.caption], [row])
            return prove_image_adapter(self.attachment, self.base, self.config, text, batch)

    def _sample(self, step: int) -> None:
        if not self.run.devices.first:
            return
        began = time.perf_counter()
        with self.ema.using_averages() if self.ema and step else nullcontext(), fetched(self.base, self.memory.parked):
            cells = generate_samples(self.base, self.attachment, self.config, self.strengths)
        self.last_picture = cells[0][-1 if self.strengths else 0]  # a slider's image at the highest strength
        name = f"samples/step-{step:08d}.png"
        title = "the base, before training" if step == 0 else f"after step {step}"
        write_sample_sheet(cells, self.base, self.config, self.run.folder / name, title, self.strengths)
        self.emit(Sampled(step, name, time.perf_counter() - began))


PICTURES = ImageKind(
    read=read_image_data,
    texts=image_prompts,
    findings=lambda image, data: check_pictures(data.training, data.summary, data.plan, image.config.data),
    last_findings=lambda image, data: (),
    loss=lambda image, data, attachment: ImageLoss(image.base, image.config, data.encoders, attachment.using),
)
"""Training of the denoiser and, if configured, the text encoders on captioned images."""
