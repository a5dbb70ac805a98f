"""A training run on an image base, from configuration to a saved and proven adapter.

    result = train_image(config)                 result.adapter is the file (or, for peft, the folder)

load the base → pictures → preflight → missing class pictures → latents and prompts cached → encoders freed → attach →
memory measured → settings with their sources → largest batch first → loop → save → reload and compare predictions →
report. A dry run does the same without a file, and leaves the sheet of what the model would see in a temporary folder.

    output/
      NAME.safetensors, veneer.json                 the adapter (layout peft: PEFT's folder)
      report.html, log.jsonl, pictures.png          how it came to be, and what the model saw
      samples/                                      sheets drawn on the way
      cache/                                        latents, prompts, class pictures; may be deleted
      checkpoints/                                  to resume from; may be deleted after
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer.core.adapter import Adapter, Card
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.models.image.base import ImageBase, load_image, release
from veneer.models.image.fast import fast_denoiser
from veneer.models.image.memory import fetched, measured_activations, offloading, park, recomputing
from veneer.models.image.predict import cut_of
from veneer.models.sources import find_base
from veneer.train import checkpoint, loop
from veneer.train.check_run import CACHE
from veneer.train.checkpoint import Progress, seed_all
from veneer.train.config.image import ImageTrainConfig
from veneer.train.devices import Devices, joined
from veneer.train.ema import Ema
from veneer.train.estimate import free_memory
from veneer.train.events import Checked, Event, Listener, Note, Resolved, Sampled, silent
from veneer.train.image.batches import PlannedRow, hold_out, plan_image_steps, validation_rows
from veneer.train.image.contact_sheet import contact_sheet
from veneer.train.image.decode import SUFFIXES
from veneer.train.image.encode import Encoders, ImageLoss
from veneer.train.image.facts import training_facts
from veneer.train.image.pictures import pictures_digest, read_pictures
from veneer.train.image.preflight import ImageData, image_preflight, parts_of, with_memory
from veneer.train.image.samples import (
    class_folder,
    draw_class_pictures,
    draw_samples,
    sheet_of,
    thumbnail,
    training_layers,
)
from veneer.train.image.save import output_of, prove, save_image_adapter, with_layout, write_image_report
from veneer.train.image.views import plan_rows
from veneer.train.loop import Score, Step
from veneer.train.planning import was_predicted
from veneer.train.preflight import Report
from veneer.train.running import NAME, Outcome, Running, due, newest_checkpoint, resolved, watched

__all__ = ["ImageResult", "train_image"]


@dataclass
class ImageResult(Outcome):
    """What a run on pictures came to. `loss`, `validation`: mean squared error. `hashes`: of the file, as A1111 and
    CivitAI show them. `samples`: the sheets. `sheet`: what the model saw."""

    pictures: int = 0
    pictures_per_second: float = 0.0
    hashes: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    sheet: str = ""


def train_image(
    config: ImageTrainConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Listener | None = None,
    base: ImageBase | None = None,
    sources: Mapping[str, Any] | None = None,
) -> ImageResult:
    """Trains one adapter as `config` says and returns what came out.

    `resume` goes on from the newest checkpoint in the output folder, on the CPU bit for bit as if the run had never
    stopped. `dry_run` stops after preflight and the largest batch. `force`: a run that does not fit is tried with a
    warning. `on_event` hears everything that happens; without it the run is shown in the terminal (stderr). `base`: one
    that is loaded already; its encoders are then not freed. `sources`: setting -> where it came from (`load_config`).

    In processes that torchrun or the like started, each takes a device and a share of every step (train.devices); only
    the first is heard, draws samples, and writes the adapter.

    Random generators, the base's modules and weights are as before afterwards, after any error too. Raises DataError
    for pictures that cannot be used, PreflightError before step one for what would go wrong, TrainingError for a loss
    that is not finite, Interrupted on Ctrl-C with the state saved, and what the base and checkpoints raise."""
    folder = Path(config.output.directory)
    with (
        joined(config.base.device) as devices,
        watched(folder, on_event if devices.first else silent, "pictures") as (tell, early),
    ):
        own = base is None
        if own and devices.count > 1 and devices.local == 0:  # one process of a machine fetches what is not there yet
            find_base(config.base.name, say=lambda line: tell(Note(line)))
        devices.gather(None)
        base = base or load_image(
            config.base.name, dtype=config.base.dtype, device=devices.device, quantise=config.base.quantise,
            say=lambda line: tell(Note(line)))  # fmt: skip
        for note in base.notes:
            tell(Note(note))
        newest = newest_checkpoint(folder, resume, tell)
        setup = _Setup(config, base, folder, newest, resume, dry_run, force, sources, tell, devices)
        setup.read()
        setup.check()
        devices.gather(None)  # nobody writes before everybody has looked
        setup.draw_missing()
        setup.encode(free=own)
        with setup.attached() as attachment:
            run = _ImageRun(setup, attachment, early)
            return run.dry() if dry_run else run.train()


class _Setup:
    """Everything before the loop, step by step; what it finds stays on it."""

    data: ImageData
    report: Report
    encoders: Encoders
    steps: list[Step]
    ends: list[int]
    planned: list[PlannedRow]
    held: list[PlannedRow]
    settings: Resolved
    loss: ImageLoss

    def __init__(
        self, config: ImageTrainConfig, base: ImageBase, folder: Path, newest: Path | None, resume: bool, dry: bool,
        force: bool, sources: Mapping[str, Any] | None, tell: Listener, devices: Devices,
    ) -> None:  # fmt: skip
        self.config, self.base, self.folder, self.newest, self.force = config, base, folder, newest, force
        self.resume, self.dry_run, self.sources, self.tell, self.devices = resume, dry, sources, tell, devices
        self.cache = Path(config.data.cache) if config.data.cache else folder / CACHE
        self.recompute, self.because, self.sheet, self.freed = False, "", "", ""
        self.parked: list[str] = []

    def read(self) -> None:
        """Pictures, those held out, the rows of an epoch, and how many class pictures are missing."""
        config, base = self.config, self.base
        settings = config.data
        missing = 0
        if settings.class_count:
            place = class_folder(config, base, self.cache)
            found = [p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and not p.stem.endswith(".mask")]
            there = len(found)
            missing = max(0, settings.class_count - there)
            settings = settings.model_copy(update={"class_folder": str(place) if there else None})
        pictures, about = read_pictures(settings)
        held = read_pictures(settings, "validation")[0]
        if settings.validation is None:
            pictures, held = hold_out(pictures, settings.split, config.seed)
        plan = plan_rows(pictures, settings, size=base.size, unit=base.unit)
        held_plan = plan_rows(held, settings, size=base.size, unit=base.unit) if held else None
        self.data = ImageData(pictures, held, about, plan, held_plan, missing)
        self.encoders = Encoders(base, config, None if self.dry_run else self.cache)
        self.steps, self.ends, self.planned = plan_image_steps(
            plan.rows, config, self.encoders.batch, self.devices.count
        )
        self.held = validation_rows(held_plan.rows, settings, config.evaluation.rows) if held_plan else []

    def check(self) -> None:
        """The preflight; what stops the run is raised here, before anything is drawn or cached."""
        samples = self.config.samples
        texts = {
            "captions": [p.caption for p in (*self.data.learned, *self.data.held)],
            "sample prompts": [*samples.prompts, samples.negative],
            "class prompts": [self.config.data.class_prompt or ""] if self.data.missing_classes else [],
        }
        # A prompt is read for its length alone, so that a dry run and a wrong setting cost no forward passes.
        cut = {w: {c: rest for c in dict.fromkeys(said) if (rest := cut_of(self.base, c))} for w, said in texts.items()}
        previous = None
        if self.newest is not None:
            previous = checkpoint.read_state(self.newest).get("about", {}).get("recipe")
        self.report = image_preflight(
            self.base, self.config, self.data, cut=cut, resume=self.resume, previous=previous, sources=self.sources,
            micros=[len(step.micros) for step in self.steps], devices=self.devices.count,
        )  # fmt: skip
        if self.report.stops:
            self.say()
            if self.dry_run and self.devices.first:
                self.draw_sheet(self.tell)
            self.report.raise_if_stopped()

    def draw_missing(self) -> None:
        """Class pictures that are missing, by the base alone; then everything is read again with them."""
        missing = self.data.missing_classes
        if not missing or self.dry_run:
            return
        place = class_folder(self.config, self.base, self.cache)
        began = time.perf_counter()
        if self.devices.first:
            draw_class_pictures(self.base, self.config, place, missing)
        self.devices.gather(None)
        self.tell(Note(f"drew {missing} class pictures into {place} in {time.perf_counter() - began:.0f} s"))
        report = self.report
        self.read()
        self.report = report

    def encode(self, *, free: bool) -> None:
        """The caches filled, and with `free` what made them dropped."""
        if self.dry_run:
            return
        began = time.perf_counter()
        rows = [*self.planned, *self.held]
        if self.devices.count > 1:  # each encodes a share and reads the rest
            self.encoders.fill(rows[self.devices.rank :: self.devices.count])
            self.devices.gather(None)
        views, captions = self.encoders.fill(rows)
        latents, texts = self.encoders.latents, self.encoders.texts
        damaged = latents.damaged + texts.damaged
        text = f"{views} views of pictures and {captions} captions ready: {latents.made + texts.made} encoded, "
        text += f"{latents.found + texts.found} from {self.cache}, {time.perf_counter() - began:.1f} s"
        self.tell(Note(text + (f"; {damaged} damaged entries were made anew" if damaged else "")))
        self._release(free)

    def draw_sheet(self, tell: Listener) -> None:
        """The sheet of what the model sees; only now, so that a run which was stopped leaves no folder in use."""
        place = Path(tempfile.mkdtemp(prefix="veneer-")) if self.dry_run else self.folder
        self.sheet = str(place / "pictures.png")
        count = contact_sheet(self.data.plan.rows, self.config.data, seed=self.config.seed, path=self.sheet)
        tell(Note(f"{count} of the pictures as the model sees them: {self.sheet}"))

    def _release(self, free: bool) -> None:
        base, config = self.base, self.config
        if not config.memory.free_encoders or not free:
            return
        names = [n for n in base.parts if n.startswith("text_encoder") or n == "vae"]
        names = [n for n in names if base.parts[n] is not None]
        if config.adapter.text_encoders:
            self.freed = "text encoders learn"
        elif config.samples.prompts and (base.device.type == "cpu" or base.quantised):
            self.freed = "samples draw with them"
        elif config.samples.prompts:
            self.parked = names
            self.tell(Note(f"{', '.join(names)} wait on the CPU between sheets: {park(base, names) / 1e6:,.0f} MB"))
            return
        if self.freed:
            self.tell(Note(f"text encoders and VAE stay in memory: {self.freed}"))
            return
        before = sum(p.numel() * p.element_size() for n in names for p in base.parts[n].parameters())
        release(base, *names)
        self.tell(Note(f"freed {', '.join(names)}: {before / 1e6:,.0f} MB"))

    @contextmanager
    def attached(self) -> Iterator[Attachment]:
        """The fresh adapter on the base, selected and trainable; memory measured and settled; all undone at the end."""
        config, base = self.config, self.base
        with ExitStack() as undo:
            attachment = undo.enter_context(attach(base.model))
            seed_all(config.seed)
            created = self._created()
            self.report = with_layout(self.report, created, base, config)
            attachment.add(NAME, created, trainable=True)
            attachment.use(NAME)
            undo.enter_context(training_layers(base, True))
            if not config.memory.offload_blocks:  # the fast paths hold on to weights
                self.tell(Note(undo.enter_context(fast_denoiser(base.denoiser)).summary()))
            self.loss = ImageLoss(base, config, self.encoders, bare=attachment.using)
            self._settle_memory(attachment)
            self.say()
            self.report.raise_if_stopped()
            undo.enter_context(recomputing(base) if self.recompute else nullcontext())
            if config.memory.offload_blocks:
                moved = undo.enter_context(offloading(base, config.memory.offload_blocks))
                self.tell(Note(f"{moved / 1e9:.2f} GB of frozen weights wait on the CPU for their turn"))
            yield attachment

    def _created(self) -> Adapter:
        """One adapter over the denoiser and the text encoders asked for, under canonical names."""
        pairs = {}
        targets: list[str] = []
        spec = self.config.adapter.spec()
        for name, (module, own) in parts_of(self.base, self.config).items():
            made = create(module, own, seed=self.config.seed)
            pairs.update({f"{name}.{key}": pair for key, pair in made.pairs.items()})
            targets += [f"{name}: {t}" for t in made.card.targets]
        card = Card(kind="image", rank=spec.rank, alpha=spec.alpha, targets=targets)
        return Adapter(pairs, card=card, rslora=spec.rslora, dropout=spec.dropout)

    def _settle_memory(self, attachment: Attachment) -> None:
        """Measures what one picture of the largest shape keeps, and decides whether activations are recomputed."""
        config, base = self.config, self.base
        largest = max((m for s in self.steps for m in s.micros), key=lambda m: m.size or 0)
        one = self.encoders.batch(largest.make().rows[:1])
        frozen = list(base.model.parameters())
        before = checkpoint.rng_state()
        mode = config.memory.activation_checkpointing

        def measure(recompute: bool) -> int:
            with recomputing(base) if recompute else nullcontext(), loop.memory_errors(largest):
                return measured_activations(lambda: self.loss(one), frozen)

        needs_offload = config.memory.offload_blocks > 0
        if mode == "on" or needs_offload:
            self.recompute, self.because = True, "memory.offload_blocks needs it" if needs_offload else ""
            kept = measure(True)
        else:
            kept = measure(False)
            free = free_memory(base.device)
            if config.memory.limit_gb is not None:
                free = min(free, int(config.memory.limit_gb * 1e9))
            need = kept * largest.tokens + 16 * int(self.report.numbers.get("trainable", 0))
            self.because = f"about {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; on above 90%"
            if mode == "auto" and need > 0.9 * free:
                self.recompute, kept = True, measure(True)
        checkpoint.rng_restore(before)
        self.report = with_memory(
            self.report, config, base.device, measured=kept, pictures=largest.tokens, recompute=self.recompute,
            force=self.force,
        )  # fmt: skip

    def say(self) -> None:
        """The settings and the preflight's findings, to whoever listens."""
        self.settings = resolved(self.config, self.sources, self._settled())
        self.tell(self.settings)
        self.tell(Checked(self.report.text(), self.report.to_dict(), self.report.markup()))

    def _settled(self) -> Iterator[tuple[str, Any, str]]:
        """What was `auto` or left open, as it is now, with the reason."""
        config, base, data = self.config, self.base, self.data
        if config.base.dtype == "auto":
            yield "base.dtype", str(base.dtype).removeprefix("torch."), base.dtype_reason
        if config.base.device == "auto":
            yield "base.device", str(base.device), "a GPU if there is one"
        if config.data.resolution is None:
            yield "data.resolution", base.size, "the base's size"
        if config.data.split is None and config.data.validation is None:
            yield "data.split", len(data.held), "a tenth from 20 pictures on, at most 50; none below"
        if config.loss.timesteps == "auto":
            kind = "logit-normal" if base.prediction == "flow" else "uniform"
            yield "loss.timesteps", kind, f"the base predicts {base.prediction}"
        if config.schedule.epochs is None and config.schedule.steps is None:
            yield "schedule.steps", config.steps, "1000 when neither epochs nor steps are given"
        if config.memory.activation_checkpointing == "auto" and self.because:
            yield "memory.activation_checkpointing", "on" if self.recompute else "off", self.because
        if self.freed:
            yield "memory.free_encoders", False, self.freed


class _ImageRun:
    """A run that is ready to begin: the adapter is attached and trainable, the preflight has passed."""

    def __init__(self, setup: _Setup, attachment: Attachment, early: list[Event]) -> None:
        self.setup, self.attachment = setup, attachment
        self.config, self.base = setup.config, setup.base
        parameters = attachment.parameters(NAME)
        decay = self.config.ema.decay
        self.ema = Ema(parameters, decay) if decay is not None else None
        every = self.config.samples.every
        steps = len(setup.steps)
        self.sample_at = due(every, setup.ends, steps, start=True) if every is not None else set()
        if self.config.samples.prompts:
            self.sample_at |= {steps}
        self.log: Listener = setup.tell
        self.first_picture: Any = None
        text_rate = self.config.optimizer.text_learning_rate
        self.running = Running(
            self.config, setup.folder, parameters, setup.steps, setup.ends, setup.loss, self._identity(), setup.tell,
            early, evaluate=self._score if setup.held else None, extra=self.ema.averages if self.ema else {},
            after=self._after, begin=self._begin, devices=setup.devices,
            rates={f"{name}.": text_rate for name in self.config.adapter.text_encoders},
        )  # fmt: skip

    def dry(self) -> ImageResult:
        self.running.probe()
        if self.setup.devices.first:
            self.setup.draw_sheet(self.setup.tell)
        steps = self.running.steps
        return ImageResult(
            steps=len(steps), pictures=sum(s.tokens for s in steps), peak_memory_bytes=loop.peak_memory_bytes(),
            dry_run=True, preflight=self.setup.report.to_dict(), sheet=self.setup.sheet,
        )  # fmt: skip

    def train(self) -> ImageResult:
        return self.running.train(self.setup.newest, self._finish)

    def _identity(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, beside the settings, which the preflight compares."""
        data, base = self.setup.data, self.base
        return {
            "base": {"fingerprint": base.fingerprint, "dtype": str(base.dtype), "quantised": base.quantised},
            "data": {"pictures": pictures_digest(data.learned), "held-out pictures": pictures_digest(data.held)},
            "seed": self.config.seed,
            "steps": len(self.setup.steps),
        }

    def _score(self, interrupted: Callable[[], bool]) -> Score | None:
        with training_layers(self.base, False), self.ema.acting() if self.ema else nullcontext():
            return self.setup.loss.score(self.setup.held, interrupted, self.setup.devices)

    def _begin(self, progress: Progress, tell: Listener) -> None:
        """Before the first step: what the model sees, and (not when resumed) what the base draws."""
        self.log = tell
        if self.setup.devices.first:
            self.setup.draw_sheet(tell)
        if progress.step == 0 and 0 in self.sample_at:
            self._sample(0)

    def _after(self, step: int) -> None:
        if self.ema is not None:
            self.ema.update(step)
        if step in self.sample_at:
            self._sample(step)

    def _sample(self, step: int) -> None:
        if not self.setup.devices.first:
            return
        began = time.perf_counter()
        with fetched(self.base, self.setup.parked), self.ema.acting() if self.ema and step else nullcontext():
            cells = draw_samples(self.base, self.attachment, self.config)
        self.first_picture = cells[0][0]
        name = f"samples/step-{step:08d}.png"
        title = "the base, before training" if step == 0 else f"after step {step}"
        sheet_of(cells, self.config, self.setup.folder / name, title)
        self.log(Sampled(step, name, time.perf_counter() - began))

    def _finish(self, progress: Progress, tell: Listener) -> ImageResult:
        """Puts the state that is kept in place (of the average, where there is one), saves and proves it, reports."""
        setup, config = self.setup, self.config
        kept, validation = self.running.put_kept(progress, tell)
        if self.ema is not None:
            self.ema.put()
            tell(Note(f"saved is the moving average (decay {self.ema.decay:g}), which is what was scored"))
        result = ImageResult(
            adapter=str(output_of(config)), steps=progress.step, pictures=progress.tokens,
            pictures_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
            peak_memory_bytes=loop.peak_memory_bytes(), loss=progress.loss, validation=validation,
            validation_before=progress.first_loss, kept_step=kept, stopped=progress.stopped,
            preflight=setup.report.to_dict(), sheet=setup.sheet,
        )  # fmt: skip
        if setup.devices.first:
            self._keep(result, kept, progress, tell)
        return setup.devices.gather(result)[0]

    def _keep(self, result: ImageResult, kept: int, progress: Progress, tell: Listener) -> None:
        """The file, proven, and the report; what they are goes into `result`."""
        setup, base, config = self.setup, self.base, self.config
        with training_layers(base, False):
            picture = self._thumbnail(kept, progress.step, tell)
            trained = self.attachment.adapter(NAME)
            card = replace(
                trained.card, base=base.name, base_fingerprint=base.fingerprint, kind="image",
                data_digest=pictures_digest(setup.data.learned), recipe=config.recipe(), metrics=_metrics(result),
            )  # fmt: skip
            facts = training_facts(
                config, base, setup.data, setup.loss, setup.steps, setup.ends, kept=kept, recompute=setup.recompute,
                seconds=progress.seconds,
            )  # fmt: skip
            written = save_image_adapter(replace(trained, card=card), base, config, setup.data, facts, picture)
            result.digest = written.digest
            if written.hashes is not None:
                result.hashes = {"AutoV2": written.hashes.autov2, "AutoV3": written.hashes.autov3}
            for note in written.notes:
                tell(Note(note))
            if predicted := was_predicted(setup.report.numbers, result.peak_memory_bytes, progress.seconds):
                tell(Note(predicted))
            row = setup.planned[0]
            batch = setup.encoders.batch([row])
            text = setup.encoders.text([row.caption])
            tell(Note(prove(self.attachment, output_of(config), base, text, batch.latents, batch.sizes, config)))
        result.samples = [str(p) for p in sorted((setup.folder / "samples").glob("step-*.png"))]
        result.report = write_image_report(setup.folder, result, setup.settings, base, config, progress.seconds)

    def _thumbnail(self, kept: int, last: int, tell: Listener) -> str:
        if not self.config.samples.prompts:
            tell(Note("the file has no thumbnail: with samples.prompts the first of them is drawn for it"))
            return ""
        if kept != last or self.first_picture is None:  # another state than that of the last sheet, or a resumed end
            first = self.config.samples.model_copy(
                update={"prompts": self.config.samples.prompts[:1], "seeds": self.config.samples.seeds[:1]}
            )
            config = self.config.model_copy(update={"samples": first})
            with fetched(self.base, self.setup.parked):
                self.first_picture = draw_samples(self.base, self.attachment, config)[0][0]
        return thumbnail(self.first_picture)


def _metrics(result: ImageResult) -> dict[str, Any]:
    kept = {
        "training_loss": result.loss, "validation_loss": result.validation,
        "validation_loss_before": result.validation_before, "kept_step": result.kept_step, "steps": result.steps,
        "pictures": result.pictures, "pictures_per_second": round(result.pictures_per_second, 3),
        "peak_memory_bytes": result.peak_memory_bytes,
    }  # fmt: skip
    return {key: value for key, value in kept.items() if value is not None}
