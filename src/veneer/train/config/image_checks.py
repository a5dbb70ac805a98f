"""What a configuration for pictures cannot mean, and which of its keys hold paths. Knows the schema alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from veneer.train.config.image import ImageTrainConfig

__all__ = ["IMAGE_PATHS", "image_checks"]

IMAGE_PATHS = frozenset({"data.pictures", "data.validation", "data.class_folder", "data.masks", "data.cache"})


def image_checks(config: ImageTrainConfig, given: Mapping[str, object]) -> list[tuple[bool, str]]:
    """(wrong, what to say) for each combination that cannot be meant."""
    data, loss, samples, memory = config.data, config.loss, config.samples, config.memory
    flow_only = [key for key in ("logit_mean", "logit_std") if f"loss.{key}" in given]
    return [
        (not data.folders, "`data.pictures` is an empty list: name at least one folder"),
        (
            isinstance(data.split, float) and data.split >= 1,
            f"`data.split: {data.split}` is a share and must be below 1; a whole number counts pictures",
        ),
        (
            data.validation is not None and bool(data.split),
            "`data.validation` and `data.split` both hold pictures out: keep one",
        ),
        (
            config.evaluation.patience is not None and data.validation is None and data.split == 0,
            "`evaluation.patience` needs held-out pictures: give `data.validation` or `data.split`",
        ),
        (
            data.class_count > 0 and data.class_prompt is None,
            f"`data.class_count: {data.class_count}` needs `data.class_prompt`, what the class pictures show "
            "(as: a photo of a dog)",
        ),
        (
            data.class_prompt is not None and data.class_folder is None and not data.class_count,
            "`data.class_prompt` needs class pictures: `data.class_folder`, or `data.class_count` for the base to draw",
        ),
        (
            loss.timesteps == "uniform" and bool(flow_only),
            f"`loss.{flow_only[0] if flow_only else ''}` is only used with `timesteps: logit-normal`",
        ),
        (
            "loss.pyramid_discount" in given and not loss.pyramid_iterations,
            "`loss.pyramid_discount` needs `loss.pyramid_iterations`",
        ),
        (
            isinstance(loss.shift, float) and loss.shift <= 0,
            f"`loss.shift: {loss.shift}` should be above 0, or resolution",
        ),
        (
            samples.every is not None and not samples.prompts,
            "`samples.every` needs `samples.prompts`: what to draw",
        ),
        (bool(samples.prompts) and not samples.seeds, "`samples.seeds` is empty: give at least one"),
        (
            config.output.layout == "peft" and bool(config.adapter.text_encoders),
            "`output.layout: peft` holds the denoiser alone; with `adapter.text_encoders` use diffusers or kohya",
        ),
        (
            memory.offload_blocks > 0 and memory.activation_checkpointing == "off",
            "`memory.offload_blocks` needs `memory.activation_checkpointing`: a block's weights leave after its "
            "forward pass and come again for its backward pass",
        ),
        (
            config.base.quantise is not None and memory.offload_blocks > 0,
            "`base.quantise` and `memory.offload_blocks` exclude each other: quantised weights stay where they are",
        ),
        (
            config.output.name is not None and ("/" in config.output.name or "\\" in config.output.name),
            f"`output.name: {config.output.name}` is a file's name, without folders",
        ),
        (
            "optimizer.text_learning_rate" in given and not config.adapter.text_encoders,
            "`optimizer.text_learning_rate` needs `adapter.text_encoders`: which of them get pairs",
        ),
        (
            "adapter.text_targets" in given and not config.adapter.text_encoders,
            "`adapter.text_targets` needs `adapter.text_encoders`: which of them get pairs",
        ),
        *((True, f"`{key}` needs {what}: without, it does nothing") for key, what in _idle(config, given)),
    ]


def _idle(config: ImageTrainConfig, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Keys that somebody wrote (a preset is nobody) and that do nothing, with what each needs."""
    data = config.data
    classes = data.class_folder is not None or data.class_count > 0
    needs = {
        "data.class_weight": (classes, "class pictures (`data.class_folder` or `data.class_count`)"),
        "data.class_steps": (data.class_count > 0, "`data.class_count`"),
        "data.keep_tags": (data.shuffle_tags, "`data.shuffle_tags`"),
        "data.crops": (data.crop == "random", "`data.crop: random`"),
        "data.mask_floor": (data.masks != "off", "`data.masks` other than off"),
        "data.bucket_ratio": (data.buckets, "`data.buckets`"),
    }
    for key, (used, what) in needs.items():
        if key in given and getattr(given[key], "kind", "") != "preset" and not used:
            yield key, what
