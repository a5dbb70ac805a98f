"""Greedy generation equals transformers' `generate`; sampling, streaming and stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from tests import families
from tests.attached import attached
from tests.tiny_base import VOCAB_SIZE, tiny_base_dir, tiny_model, tiny_tokenizer
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import BaseError, ConfigError, DataError
from veneer.models.text.base import TextBase
from veneer.models.text.generate import complete, encode_prompt
from veneer.models.text.incremental_decoding import Pieces

PROMPTS = [
    "The printer",
    "a",
    "I was charged twice for the same invoice; please",
    "How do I reset my password? The link",
]
TOKENIZER = tiny_tokenizer()


def base_of(model: Any, **changes: Any) -> TextBase:
    """Return a text base for a model in memory; `changes` can add stop tokens."""
    fields: dict[str, Any] = {"stop_ids": (), "pad_id": 2, "context": 256} | changes
    return TextBase("tiny", model, TOKENIZER, Path(), "", torch.float32, torch.device("cpu"), "", **fields)


@pytest.fixture(scope="module")
def base() -> TextBase:
    return base_of(tiny_model())


def one_by_one(base: TextBase, n: int) -> list[list[int]]:
    """Return the reference: for each token, the argmax of a full forward pass.

    Each prompt runs separately, without padding."""
    out = []
    for prompt in PROMPTS:
        ids = encode_prompt(base, prompt)
        start = len(ids)
        for _ in range(n):
            logits = base.model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        out.append(ids[start:])
    return out


# -- greedy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_padded_batch_equals_separate_prompts(family: str) -> None:
    build: Callable[..., Any] = families.FAMILIES[family]
    base = base_of(build(vocab_size=VOCAB_SIZE))
    with torch.no_grad():
        expected = one_by_one(base, 6)
    for batch_size in (1, 3, 8):
        done = complete(base, PROMPTS, max_new_tokens=6, batch_size=batch_size)
        assert [list(c.ids) for c in done] == expected
        assert [c.finish for c in done] == ["length"] * len(PROMPTS)


def generate(base: TextBase, prompts: Any, **settings: Any) -> list[str]:
    return [completion.text for completion in complete(base, prompts, **settings)]


def test_texts_equal_transformers_generate(base: TextBase) -> None:
    ids = torch.tensor([encode_prompt(base, PROMPTS[2])])
    theirs = base.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=2, eos_token_id=None
    )
    (ours,) = complete(replace(base, stop_ids=()), [PROMPTS[2]], max_new_tokens=20)
    assert list(ours.ids) == theirs[0, ids.shape[1] :].tolist()[: len(ours.ids)]
    assert ours.text == TOKENIZER.decode(ours.ids, skip_special_tokens=True)


def test_generation_config_is_ignored_and_restored(base: TextBase) -> None:
    expected = generate(base, PROMPTS, max_new_tokens=8)
    model, kept = base.model, base.model.generation_config
    spoilt = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, num_beams=3, top_k=3)
    try:
        model.generation_config = spoilt
        assert generate(base, PROMPTS, max_new_tokens=8) == expected
        assert model.generation_config is spoilt
    finally:
        model.generation_config = kept


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored_even_after_an_error(base: TextBase, training: bool) -> None:
    def stop(_i: int, _piece: str) -> None:
        assert not base.model.training
        raise KeyboardInterrupt

    base.model.train(training)
    try:
        generate(base, ["x"], max_new_tokens=2)
        assert base.model.training is training
        with pytest.raises(KeyboardInterrupt):
            generate(base, ["x"], max_new_tokens=2, on_token=stop)
        assert base.model.training is training
    finally:
        base.model.eval()


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_generation_stops_at_every_stop_token(base: TextBase) -> None:
    free = complete(base, PROMPTS, max_new_tokens=12)
    stops = {free[0].ids[3], free[2].ids[5]}
    done = complete(replace(base, stop_ids=tuple(stops)), PROMPTS, max_new_tokens=12)
    for before, after in zip(free, done, strict=True):
        first = next((k for k, token in enumerate(before.ids) if token in stops), None)
        if first is None:
            assert after == before
        else:
            assert after.ids == before.ids[: first + 1]
            assert after.text == TOKENIZER.decode(before.ids[:first], skip_special_tokens=True)
            assert after.finish == "stop"
    assert done[0].finish == "stop"


def test_the_end_of_the_context_ends_a_text(base: TextBase) -> None:
    short = replace(base, context=30)
    lengths = [len(encode_prompt(base, p)) for p in PROMPTS]
    assert max(lengths) < 30
    done = complete(short, PROMPTS, max_new_tokens=25)
    assert [len(c.ids) for c in done] == [min(25, 30 - n) for n in lengths]
    whole = complete(base, PROMPTS, max_new_tokens=25)
    assert all(a.ids == b.ids[: len(a.ids)] for a, b in zip(done, whole, strict=True))


# -- sampling ----------------------------------------------------------------------------------------------------------


def _first_tokens(base: TextBase, n: int, **how: Any) -> torch.Tensor:
    done = complete(base, [PROMPTS[0]] * n, max_new_tokens=1, batch_size=n, **how)
    return torch.tensor([c.ids[0] for c in done])


def _chi_square(drawn: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """Return Pearson's statistic and its degrees of freedom.

    Tokens with fewer than 5 expected samples are pooled."""
    expected = p * len(drawn)
    counts = torch.bincount(drawn, minlength=len(p)).double()
    often = expected >= 5
    e = torch.cat([expected[often], expected[~often].sum()[None]]).clamp_min(1e-9)
    c = torch.cat([counts[often], counts[~often].sum()[None]])
    if e[-1] < 1:
        assert c[-1] < 20
        e, c = e[:-1], c[:-1]
    return float(((c - e) ** 2 / e).sum()), len(e) - 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_come_from_the_softmax_at_the_temperature(base: TextBase, temperature: float) -> None:
    with torch.no_grad():
        logits = base.model(torch.tensor([encode_prompt(base, PROMPTS[0])])).logits[0, -1].double()
    statistic, freedom = _chi_square(
        _first_tokens(base, 4000, temperature=temperature), (logits / temperature).softmax(0)
    )
    assert freedom > 3
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of the chi-square distribution


def test_top_k_and_top_p_truncate_the_distribution(base: TextBase) -> None:
    with torch.no_grad():
        logits = base.model(torch.tensor([encode_prompt(base, PROMPTS[0])])).logits[0, -1].double()
    p = logits.softmax(0)
    best = p.argsort(descending=True)
    kept = best[:5]
    cut = torch.zeros_like(p)
    cut[kept] = p[kept] / p[kept].sum()
    drawn = _first_tokens(base, 2000, temperature=1.0, top_k=5)
    assert set(drawn.tolist()) <= set(kept.tolist())
    statistic, freedom = _chi_square(drawn, cut)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5

    nucleus = best[
        : int((p[best].cumsum(0) < 0.4).sum()) + 1
    ]  # the smallest set of most likely tokens with probability at least 0.4
    drawn = _first_tokens(base, 2000, temperature=1.0, top_p=0.4)
    assert set(drawn.tolist()) <= set(nucleus.tolist())


def test_samples_depend_on_seed_and_index_only(base: TextBase) -> None:
    how: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 10}
    first = generate(base, PROMPTS, seed=3, batch_size=8, **how)
    torch.manual_seed(99)
    assert generate(base, PROMPTS, seed=3, batch_size=1, **how) == first
    assert generate(base, PROMPTS, seed=3, batch_size=3, **how) == first
    assert generate(base, PROMPTS, seed=4, batch_size=8, **how) != first
    assert len(set(generate(base, [PROMPTS[0]] * 4, seed=3, **how))) > 1


# -- streaming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_streamed_pieces_make_up_each_text(base: TextBase, temperature: float) -> None:
    free = complete(base, PROMPTS, max_new_tokens=30, temperature=temperature)
    some = replace(base, stop_ids=(free[1].ids[4], free[3].ids[9]))
    told: dict[int, list[str]] = {i: [] for i in range(len(PROMPTS))}
    texts = generate(
        some, PROMPTS, max_new_tokens=30, temperature=temperature, batch_size=3, on_token=lambda i, p: told[i].append(p)
    )
    assert {i: "".join(pieces) for i, pieces in told.items()} == dict(enumerate(texts))
    assert max(len(pieces) for pieces in told.values()) > 5


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30))
@settings(max_examples=100, deadline=None)
def test_pieces_of_any_tokens_join_to_their_text(ids: list[int]) -> None:
    pieces = Pieces(TOKENIZER)
    told = [pieces.add(token) for token in ids]
    assert "".join([*told, pieces.rest()]) == TOKENIZER.decode(ids, skip_special_tokens=True)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_only_messages_use_the_chat_template(base: TextBase) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    framed = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(encode_prompt(base, messages)) == framed
    assert TOKENIZER.decode(encode_prompt(base, "hi")) == "hi"
    assert generate(base, [messages], max_new_tokens=4) == generate(base, [framed], max_new_tokens=4)


def test_messages_need_a_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    bare = replace(base_of(None), tokenizer=tokenizer)
    with pytest.raises(BaseError, match="no chat template"):
        encode_prompt(bare, [{"role": "user", "content": "hi"}])
    tokenizer.chat_template = "{{ raise_exception('only users speak here') }}"
    with pytest.raises(DataError, match="only users speak here"):
        encode_prompt(bare, [{"role": "system", "content": "hi"}])


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}],
        *[{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"batch_size": 0}],
    ],
)
def test_settings_out_of_range_are_named(base: TextBase, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generate(base, ["x"], **wrong)


def test_empty_overlong_and_misplaced_prompts_are_refused(base: TextBase) -> None:
    with pytest.raises(DataError, match="prompt 2 of 2 is empty"):
        generate(base, ["x", ""])
    with pytest.raises(DataError, match=r"prompt 1 of 1 has [\d,]+ tokens; this base takes 256"):
        generate(base, ["word " * 300])
    with pytest.raises(ConfigError, match="list"):
        generate(base, "x")  # type: ignore[arg-type]
    assert generate(base, []) == []


# -- with adapters -----------------------------------------------------------------------------------------------------


def test_active_mix_changes_the_text(tmp_path: Path) -> None:
    base = base_of(tiny_model())
    plain = generate(base, PROMPTS, max_new_tokens=8)
    adapter = create(base.model, LoraSpec(rank=4, alpha=8), seed=0)
    for pair in adapter.pairs.values():
        pair.B.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    with attached(base.model, adapter, 0.7) as attachment:
        mixed = generate(base, PROMPTS, max_new_tokens=8)
        merged = tiny_model()
        merged.load_state_dict(attachment.merged(("a", 0.7)), strict=False)
        attachment.use()
        assert generate(base, PROMPTS, max_new_tokens=8) == plain
    assert mixed != plain
    assert mixed == generate(base_of(merged), PROMPTS, max_new_tokens=8)


@pytest.mark.gpu
def test_texts_and_samples_on_cuda_match_the_cpu(tmp_path: Path) -> None:
    from veneer.models.text.base import load_text

    folder = str(tiny_base_dir(tmp_path))
    cpu, cuda = load_text(folder, device="cpu"), load_text(folder)
    assert cuda.device.type == "cuda"
    assert cuda.fingerprint == cpu.fingerprint
    for temperature in (0.0, 1.0):
        how: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature}
        assert generate(cuda, PROMPTS, **how) == generate(cpu, PROMPTS, **how)
    assert load_text(folder, dtype="bfloat16").model.dtype == torch.bfloat16
