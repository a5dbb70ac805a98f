"""Undocumented parts of diffusers that veneer uses."""

from __future__ import annotations

from veneer.compat import Internals

DIFFUSERS = Internals(
    "diffusers",
    ">=0.36,<0.43",
    (
        "diffusers.loaders.single_file.load_single_file_sub_model",
        "diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES",
        "diffusers.loaders.single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS",
        "diffusers.loaders.single_file_utils.convert_ldm_clip_checkpoint",
        "diffusers.loaders.single_file_utils.convert_open_clip_checkpoint",
        "diffusers.loaders.single_file_utils.convert_sd3_t5_checkpoint_to_diffusers",
        "diffusers.loaders.single_file_utils.infer_diffusers_model_type",
        "diffusers.models.attention_processor.AttnProcessor2_0",
        "diffusers.models.controlnets",
        "diffusers.models.transformers.transformer_flux.FluxAttnProcessor",
        "diffusers.models.transformers.transformer_flux2.Flux2AttnProcessor",
        "diffusers.models.transformers.transformer_flux2.Flux2ParallelSelfAttnProcessor",
        "diffusers.models.transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0",
        "diffusers.pipelines.flux2.pipeline_flux2.format_input",
        "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit",
        "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus",
    ),
)
