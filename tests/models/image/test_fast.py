"""`fast_denoiser` changes only speed: outputs, gradients and the base stay the same."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.core import Attachment, LoraSpec, attach, create
from veneer.models.image.base import load_image
from veneer.models.image.fast import fast_denoiser
from veneer.models.image.predict import embed_prompts, predict
from veneer.models.patching import widen_products
from veneer.ops.dispatch import override_ops

TARGETS = (r"re:.*(attn|ff).*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|to_qkv_mlp_proj|linear_in|linear_out)",)


SMALL = {"in_channels": 8, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}
BLOCKS = {"patch_size": 1, "num_layers": 1, "num_single_layers": 2}


def flux() -> nn.Module:
    own = {"pooled_projection_dim": 10, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)}
    return diffusers.FluxTransformer2DModel(**SMALL, **BLOCKS, **own)


def flux2() -> nn.Module:
    own = {"timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2)}
    return diffusers.Flux2Transformer2DModel(**SMALL, **BLOCKS, **own)


def qwen_image() -> nn.Module:
    own = {"patch_size": 2, "out_channels": 2, "num_layers": 2, "axes_dims_rope": (2, 2, 4)}
    return diffusers.QwenImageTransformer2DModel(**SMALL, **own)


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    )


def call(model: Any, mask: Tensor | None = None) -> Tensor:
    g = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    t = torch.tensor([0.3, 0.8]).to(dtype)
    if isinstance(model, diffusers.UNet2DConditionModel):
        added = {"text_embeds": r(2, 10), "time_ids": torch.ones(2, 6).to(dtype)}
        return model(r(2, 4, 8, 8), t * 999, r(2, 5, 12), added_cond_kwargs=added, return_dict=False)[0]
    given: dict[str, Any] = {"hidden_states": r(2, 9, 8), "encoder_hidden_states": r(2, 5, 12), "timestep": t}
    if isinstance(model, diffusers.QwenImageTransformer2DModel):
        given |= {"img_shapes": [[(1, 3, 3)]] * 2, "encoder_hidden_states_mask": mask}
    else:
        axes = 3 if isinstance(model, diffusers.FluxTransformer2DModel) else 4
        ids, text = torch.zeros(9, axes), torch.zeros(5, axes)
        ids[:, 1:3] = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
        if axes == 4:
            text[:, 3] = torch.arange(5)
        else:
            given["pooled_projections"] = r(2, 10)
        given |= {"img_ids": ids, "txt_ids": text, "guidance": t}
    return model(**given, return_dict=False)[0]


def attached(model: nn.Module, **spec: Any) -> Attachment:
    attachment = attach(model.requires_grad_(False).train())
    for seed, name in enumerate("ab"):
        g = torch.Generator().manual_seed(seed)
        made = create(model, LoraSpec(rank=2, targets=TARGETS, **spec), seed=seed)
        attachment.add(name, made.mapped(lambda t, g=g: t + 0.1 * torch.randn(t.shape, generator=g)), trainable=True)
    attachment.use("a")
    return attachment


def step(attachment: Attachment) -> list[Tensor]:
    out = call(attachment.model)
    acting = [p for name in "ab" for p in attachment.parameters(name).values()]
    grads = torch.autograd.grad(out.float().square().mean(), acting, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


def same(got: list[Tensor], want: list[Tensor], tolerance: float) -> bool:
    apart = [(a - b).double().norm() / b.double().norm().clamp_min(1e-6) for a, b in zip(got, want, strict=True)]
    return max(apart) < tolerance


MODELS = pytest.mark.parametrize("make", [flux, flux2, qwen_image, sdxl])


@MODELS
def test_outputs_and_gradients_are_unchanged(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    with attached(model) as attachment:
        want = step(attachment)
        with fast_denoiser(model) as how:
            assert how.swapped == counted(model)
            assert how.skipped == {}
            assert same(step(attachment), want, 1e-3)
            with torch.no_grad():
                assert same([call(model)], want[:1], 1e-4)
            for mix in ((), ("a", "b"), (("a", -0.5),)):
                attachment.use(*mix)
                fast_out = call(model).detach()
                with attachment.using(*mix):
                    assert same([fast_out], [plain(model, attachment)], 1e-4)


def counted(model: nn.Module) -> dict[str, int]:
    kinds = Counter(type(m).__name__ for m in model.modules())
    swapped = "Attention CrossAttnUpBlock2D Dropout Flux2Attention Flux2FeedForward Flux2ParallelSelfAttention"
    swapped = f"{swapped} FluxAttention GEGLU GELU ResnetBlock2D UpBlock2D".split()
    found = {k: kinds[k] for k in swapped if k in kinds}
    assert len(found) == (6 if "GEGLU" in found else 4 if "Flux2Attention" in found else 3), found
    return found


def plain(model: nn.Module, attachment: Attachment) -> Tensor:
    """Return the output without the forward methods that were set on instances."""
    put = {m: m.__dict__.pop("forward") for m in model.modules() if "forward" in m.__dict__}
    assert put
    try:
        return call(model).detach()
    finally:
        for m, forward in put.items():
            m.forward = forward


@MODELS
def test_bf16_gradients_are_as_exact_as_diffusers(make: Callable[[], nn.Module]) -> None:
    """Compares the median error of five random models.

    Some models have large bfloat16 errors in any implementation."""

    def error(values: list[Tensor], exact: list[Tensor]) -> float:
        joined, true = (torch.cat([t.float().flatten() for t in v[1:]]) for v in (values, exact))
        return float((joined - true).norm() / true.norm())

    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = make()
        with attached(model) as attachment:
            exact = step(attachment)
        model.bfloat16()
        with attached(model) as attachment:
            usual = step(attachment)
            with fast_denoiser(model):
                got = step(attachment)
        ratios.append(error(got, exact) / (error(usual, exact) + 1e-3))
    assert statistics.median(ratios) < 1.2, ratios


@MODELS
def test_all_patches_are_removed_afterwards(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().requires_grad_(False)
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    out = call(model)
    with pytest.raises(ZeroDivisionError), fast_denoiser(model):
        _ = 1 / 0
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == attributes
    assert torch.equal(call(model), out)


def test_unusual_modules_keep_diffusers_code() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(0)
    model = sdxl().requires_grad_(False)
    model.set_attn_processor(AttnProcessor())
    with fast_denoiser(model) as how:
        assert set(how.swapped) == {"CrossAttnUpBlock2D", "Dropout", "GEGLU", "ResnetBlock2D", "UpBlock2D"}
        assert "its processor is AttnProcessor" in how.summary()


def test_pairs_that_cannot_be_fused_run_separately() -> None:
    torch.manual_seed(0)
    model = flux()
    with attached(model, dora=True) as attachment:
        want = step(attachment)
        with fast_denoiser(model):
            assert same(step(attachment), want, 1e-3)


def test_texts_of_different_lengths_stay_masked() -> None:
    """Qwen-Image's masked text tokens have no effect on the fast path either."""
    torch.manual_seed(0)
    model = qwen_image().requires_grad_(False)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    want = call(model, mask)
    with fast_denoiser(model) as how:
        assert how.swapped["Attention"] == 2
        assert same([call(model, mask)], [want], 1e-5)
        assert not same([call(model)], [want], 1e-3)


@pytest.mark.parametrize("changed", ["dropout", "output_scale_factor", "trained norm", "no time"])
def test_unusual_residual_blocks_stay_correct(changed: str) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    more = {"temb_channels": None if changed == "no time" else 6, "dropout": 0.5 if changed == "dropout" else 0.0}
    factor = 2.0 if changed.startswith("output") else 1.0
    block = ResnetBlock2D(in_channels=8, out_channels=16, groups=4, output_scale_factor=factor, **more)
    block.bfloat16().requires_grad_(False).norm1.requires_grad_(changed == "trained norm")
    x = torch.randn(2, 8, 5, 5).bfloat16().requires_grad_()
    time = None if changed == "no time" else torch.randn(2, 6).bfloat16()
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        out = block(x, time)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    want = run()
    with fast_denoiser(block) as how:
        assert same(run(), want, 2e-2)
        assert ("ResnetBlock2D" in how.skipped) == (changed in ("dropout", "output_scale_factor"))


def test_skip_connections_of_frozen_blocks_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this UNet's up path, 3 of 4 skips of the first level precede any adapter.

    With an adapter on the first convolution, every skip needs a gradient."""
    from veneer.models.image import fast as speed_image

    asked: list[tuple[int, int]] = []
    real = speed_image.frozen_conv

    def counting(x: Tensor, *args: Any, live: int, **kwargs: Any) -> Tensor:
        asked.append((x.shape[1], live))
        return real(x, *args, live=live, **kwargs)

    monkeypatch.setattr(speed_image, "frozen_conv", counting)
    torch.manual_seed(0)
    model = sdxl()
    for targets, expected in ((TARGETS, {(24, 18), (24, 16), (16, 8)}), ((*TARGETS, "conv_in"), set())):
        asked.clear()
        with attach(model.requires_grad_(False).train()) as attachment:
            adapter = create(model, LoraSpec(rank=2, targets=targets), seed=0)
            attachment.add("a", adapter.mapped(lambda t: t + 0.1), trainable=True)
            attachment.use("a")
            attachment.add("b", adapter, trainable=True)
            want = step(attachment)
            with fast_denoiser(model):
                asked.clear()
                assert same(step(attachment), want, 1e-3)
        assert set(asked) == expected


def test_recomputed_blocks_get_all_of_their_gradients() -> None:
    """Between a forward pass and its recomputation, the blocks run without an adapter.

    That run needs no gradient, but the first pass must still get all of its gradients."""
    torch.manual_seed(0)
    model: Any = sdxl()
    targets = (*TARGETS, "conv_in")  # every skip needs a gradient
    with attach(model.requires_grad_(False).train()) as attachment:
        adapter = create(model, LoraSpec(rank=2, targets=targets), seed=0)
        for name in "ab":
            attachment.add(name, adapter.mapped(lambda t: t + 0.1), trainable=True)
        attachment.use("a")
        want = step(attachment)
        model.enable_gradient_checkpointing()
        with fast_denoiser(model):
            out = call(model)
            with attachment.using():
                call(model)
            acting = [p for name in "ab" for p in attachment.parameters(name).values()]
            grads = torch.autograd.grad(out.float().square().mean(), acting, allow_unused=True)
            assert same([out.detach(), *(g for g in grads if g is not None)], want, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_wrong_channels_are_found_among_large_ones(dtype: torch.dtype) -> None:
    """Most channels are wrong, but the few correct channels are 100 times as large."""
    from diffusers.models.activations import GEGLU

    class Other(GEGLU):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = super().forward(hidden_states)
            return torch.cat([out[..., :2], 2.0 * out[..., 2:]], -1)

    Other.__name__ = "GEGLU"
    torch.manual_seed(0)
    block = Other(8, 16).to(dtype).requires_grad_(False)
    block.proj.weight[:2] *= 300.0
    x = torch.randn(2, 5, 8).to(dtype)
    want = block(x)
    with fast_denoiser(block) as how:
        assert how.skipped == {"GEGLU": "its result differs"}
        assert torch.equal(block(x), want)


@pytest.mark.parametrize("name", ["catalogue-flux", "catalogue-sdxl"])
def test_training_in_float32_arithmetic_gives_the_losses_of_bfloat16(name: str) -> None:
    """A few steps of a bfloat16 base, loaded with and without float32 arithmetic."""
    losses: dict[str, list[Tensor]] = {}
    for arithmetic in ("torch", "columns"):
        with override_ops(product=arithmetic):
            base = load_image(name, dtype="bfloat16")
            widened = [m for m in base.parts["vae"].modules() if type(m) is nn.Conv2d and "_conv_forward" in m.__dict__]
            assert bool(widened) == (arithmetic == "columns")
            g = torch.Generator().manual_seed(0)
            latents = torch.randn(
                2, base.denoiser.config.in_channels // base.row.patch**2, 8, 8, generator=g
            ).bfloat16()
            times, given = torch.tensor([0.2, 0.7]), {"guidance": 3.5}
            if name == "catalogue-sdxl":
                times, given = (times * 1000).long(), {"sizes": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)}
            text = embed_prompts(base, ["a red mug", "a blue lamp"])
            with attach(base.denoiser.train()) as attachment, fast_denoiser(base.denoiser):
                adapter = create(base.denoiser, LoraSpec(rank=4), seed=0)
                attachment.add("a", adapter, trainable=True)
                attachment.use("a")
                optimizer = torch.optim.AdamW(list(attachment.parameters("a").values()), lr=1e-3)
                for _ in range(4):
                    loss = predict(base, latents, times, text, **given).float().square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.setdefault(arithmetic, []).append(loss.detach())
    assert losses["torch"][-1] < losses["torch"][0]
    torch.testing.assert_close(losses["columns"], losses["torch"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("make", [flux, sdxl])
def test_products_in_float32_are_used_everywhere(make: Callable[[], nn.Module]) -> None:
    """Outside `fast_denoiser`, as in generation: no product with a weight has bfloat16 factors, with any mix."""
    torch.manual_seed(0)
    model = make().bfloat16()
    with override_ops(product="columns"), attached(model) as attachment:
        assert widen_products(model) == sum(type(m) in (nn.Linear, nn.Conv2d) for m in model.modules())
        assert widen_products(model) == 0
        for mix in ((), ("a",), ("a", ("b", 0.5))):
            attachment.use(*mix)
            with torch.no_grad(), _Products() as products:
                call(model)
            assert {dtype for _, dtype in products.seen} == {torch.float32}, products.seen
            assert len(products.seen) > 20


class _Products(TorchDispatchMode):
    """Records (operation, dtype) of products of matrices and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "mm_out", "addmm_", "convolution", "linear"):
            self.seen.append((name, args[-1].dtype if name == "mm" else args[1].dtype))
        return func(*args, **(kwargs or {}))
