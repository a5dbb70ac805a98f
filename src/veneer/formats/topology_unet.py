"""The U-Nets of SD 1, SD 2 and SDXL: diffusers' names and the original (LDM, sgm) ones, from a few counts.

    input_blocks.0.0                conv_in
    input_blocks.{3i+j+1}.0 / .1    down_blocks.i.resnets.j / attentions.j        j = 0, 1
    input_blocks.{3i+3}.0.op        down_blocks.i.downsamplers.0.conv
    middle_block.0 / .1 / .2        mid_block.resnets.0 / attentions.0 / resnets.1
    output_blocks.{3i+j}.0 / .1     up_blocks.i.resnets.j / attentions.j          j = 0, 1, 2
    output_blocks.{3i+2}.n.conv     up_blocks.i.upsamplers.0.conv                 n = 2, or 1 without attentions

Knows names alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from veneer.formats.topology_rows import Row

__all__ = ["unet"]

_RESNET = (
    ("norm1", "norm", "in_layers.0"),
    ("conv1", "conv", "in_layers.2"),
    ("time_emb_proj", "linear", "emb_layers.1"),
    ("norm2", "norm", "out_layers.0"),
    ("conv2", "conv", "out_layers.3"),
)


def unet(depths: Sequence[int], widths: Sequence[int], proj: str, extra: bool, layers: int = 2) -> Iterator[Row]:
    """diffusers' UNet2DConditionModel. `depths`: transformer blocks of each attention, level by level on the way down
    (0: a level without attention; the way up mirrors it, the middle has the last that is not 0). `widths`: the levels'
    channels in any unit. `proj`: the kind of proj_in and proj_out. `extra`: SDXL's second embedding."""
    levels = len(depths)
    yield Row("unet.conv_in", "conv", "input_blocks.0.0")
    yield Row("unet.time_embedding.linear_1", "linear", "time_embed.0")
    yield Row("unet.time_embedding.linear_2", "linear", "time_embed.2")
    if extra:
        yield Row("unet.add_embedding.linear_1", "linear", "label_emb.0.0")
        yield Row("unet.add_embedding.linear_2", "linear", "label_emb.0.2")
    for i, depth in enumerate(depths):
        block = f"unet.down_blocks.{i}"
        for j in range(layers):
            at = f"input_blocks.{(layers + 1) * i + j + 1}"
            yield from _resnet(f"{block}.resnets.{j}", f"{at}.0", j == 0 and i > 0 and widths[i] != widths[i - 1])
            yield from _attention(f"{block}.attentions.{j}", f"{at}.1", depth, proj)
        if i < levels - 1:
            down = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
            yield Row(f"{block}.downsamplers.0.conv", "conv", down)
    yield from _resnet("unet.mid_block.resnets.0", "middle_block.0", False)
    yield from _attention("unet.mid_block.attentions.0", "middle_block.1", [d for d in depths if d][-1], proj)
    yield from _resnet("unet.mid_block.resnets.1", "middle_block.2", False)
    for i, depth in enumerate(reversed(depths)):
        block = f"unet.up_blocks.{i}"
        for j in range(layers + 1):
            at = f"output_blocks.{(layers + 1) * i + j}"
            yield from _resnet(f"{block}.resnets.{j}", f"{at}.0", True)
            yield from _attention(f"{block}.attentions.{j}", f"{at}.1", depth, proj)
        if i < levels - 1:
            up = f"output_blocks.{(layers + 1) * i + layers}.{2 if depth else 1}.conv"
            yield Row(f"{block}.upsamplers.0.conv", "conv", up)
    yield Row("unet.conv_norm_out", "norm", "out.0")
    yield Row("unet.conv_out", "conv", "out.2")


def _resnet(name: str, original: str, shortcut: bool) -> Iterator[Row]:
    for part, kind, its in _RESNET:
        yield Row(f"{name}.{part}", kind, f"{original}.{its}")
    if shortcut:
        yield Row(f"{name}.conv_shortcut", "conv", f"{original}.skip_connection")


def _attention(name: str, original: str, depth: int, proj: str) -> Iterator[Row]:
    """The inside of a Transformer2DModel has the same names in both."""
    if not depth:
        return
    inside = [("norm", "norm"), ("proj_in", proj), ("proj_out", proj)]
    for k in range(depth):
        block = f"transformer_blocks.{k}"
        inside += [(f"{block}.norm{n}", "norm") for n in (1, 2, 3)]
        inside += [(f"{block}.attn{n}.{p}", "linear") for n in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")]
        inside += [(f"{block}.ff.net.0.proj", "linear"), (f"{block}.ff.net.2", "linear")]
    for part, kind in inside:
        yield Row(f"{name}.{part}", kind, f"{original}.{part}")
