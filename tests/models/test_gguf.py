"""GGUF bases: weights, tokenizer, chat template."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.tokenization_utils_base import generate_merges

from tests.attached import attached
from tests.tiny_base import tiny_base_dir, tiny_tokenizer
from tests.tiny_gguf import tiny_gguf
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import BaseError
from veneer.models.text.base import load_text, read_base_config, read_tokenizer
from veneer.models.text.generate import complete
from veneer.models.text.gguf import GgufReader, dequantize, fast_headers, merges_of
from veneer.plan.shape import text_shape
from veneer.plan.tables import base_config

IDS = torch.randint(3, 384, (2, 20), generator=torch.Generator().manual_seed(0))


def test_float32_weights_load_exactly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    base = load_text(str(tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(base.model(IDS).logits, model(IDS).logits)
    assert base.dtype == torch.float32
    assert any("GGUF" in note for note in base.notes)


def test_quantized_weights_are_plain_tensors_near_the_original(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf", quantized=True)
    base = load_text(str(tmp_path / "tiny.gguf"), dtype="float32")
    theirs, ours = model.state_dict(), base.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        largest = theirs[name].abs().max()
        bound = (
            largest / 127 / 2 + largest / 2048
        )  # Q8_0 rounds to 1/127 of the largest of 32 values; the scale is rounded to float16
        assert (tensor - theirs[name]).abs().max() <= bound, name


def test_gguf_base_generates_adapts_and_saves(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", quantized=True)
    base = load_text(str(tmp_path / "tiny.gguf"), dtype="float32")
    assert base.has_chat_template
    assert base.tokenizer.convert_ids_to_tokens(base.end_of_turn_id) == "<|im_end|>"
    text = "naïve 🙂 invoice"
    assert base.tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert complete(base, [[{"role": "user", "content": "hi"}]], max_new_tokens=3)
    with attached(base.model, create(base.model, LoraSpec(rank=2), seed=0), trainable=True) as attachment:
        base.model(IDS).logits.sum().backward()
        assert all(p.grad is not None for p in attachment.parameters("a").values())
    base.model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(IDS).logits, base.model(IDS).logits)


def test_fingerprint_depends_only_on_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tiny_gguf(tmp_path / "tiny.gguf")
    tiny_gguf(tmp_path / "a" / "other-name.gguf")
    tiny_gguf(tmp_path / "q8.gguf", quantized=True)
    plain, moved, q8 = (load_text(str(tmp_path / n)) for n in ["tiny.gguf", "a/other-name.gguf", "q8.gguf"])
    assert plain.fingerprint == moved.fingerprint != q8.fingerprint


def test_directory_with_one_gguf_file_loads_that_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    tiny_gguf(tmp_path / "d" / "x.gguf")
    assert load_text(str(tmp_path / "d")).directory == tmp_path / "d" / "x.gguf"


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file)
    whole = file.read_bytes()
    for keep in (len(whole) - 50, len(whole) // 2, 200, 30):
        file.write_bytes(whole[:keep])
        with pytest.raises(BaseError, match="cut short"):
            load_text(str(file))
        if keep <= 200:  # a plan reads only the header
            with pytest.raises(BaseError, match="truncated or damaged"):
                read_base_config(file)


def test_directory_and_gguf_share_shaping_fields(tmp_path: Path) -> None:
    from veneer.models.fingerprint import shaping_fields

    tiny_gguf(tmp_path / "tiny.gguf")
    one, other = read_base_config(tmp_path / "tiny.gguf"), read_base_config(tiny_base_dir(tmp_path))
    assert shaping_fields(one) == shaping_fields(other)


def test_tokenizer_has_exactly_the_files_tokens(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    tokenizer, original = read_tokenizer(tmp_path / "tiny.gguf"), tiny_tokenizer()
    assert len(tokenizer) == len(original)
    assert tokenizer.get_vocab() == original.get_vocab()
    for text in ("hello there 1234", "naïve 🙂 漢字\n\n\tx", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer(text).input_ids == original(text).input_ids
    for kind in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(tokenizer, kind) == getattr(original, kind, None) or kind in ("bos_token_id", "pad_token_id")


def test_headers_equal_those_of_the_gguf_reader(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", quantized=True)
    ours, theirs = GgufReader(str(tmp_path / "tiny.gguf")), gguf.GGUFReader(str(tmp_path / "tiny.gguf"))
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents()
        assert ours.fields[name].types == field.types
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.name, a.data_offset, a.n_bytes) == (b.name, b.data_offset, b.n_bytes)


def test_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    """For a vocabulary as large as Gemma's, gguf's own reader takes 12 seconds."""
    writer = gguf.GGUFWriter(str(tmp_path / "large.gguf"), "llama")
    writer.add_token_list([f"token {i}" for i in range(262_144)])
    writer.add_token_scores([0.0] * 262_144)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    start = time.process_time()
    fields = GgufReader(str(tmp_path / "large.gguf")).fields
    assert fields["tokenizer.ggml.tokens"].contents(-1) == "token 262143"
    assert time.process_time() - start < 4


def test_plan_needs_only_the_file(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf")
    for name in (tmp_path / "tiny.gguf", tmp_path):
        assert text_shape(base_config(str(name))).parameters == sum(p.numel() for p in model.parameters())


def test_gguf_tokenizer_adds_no_foreign_tokens(tmp_path: Path) -> None:
    """GPT-2's end-of-text token, if added, would exceed the embedding's rows."""
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file)
    written = file.read_bytes()
    assert written.count(b"<|endoftext|>") == 1
    file.write_bytes(written.replace(b"<|endoftext|>", b"<|beginning|>"))
    base = load_text(str(file))
    assert len(base.tokenizer) == len(tiny_tokenizer()) == base.model.get_input_embeddings().weight.shape[0]
    assert base.tokenizer.unk_token == "<|beginning|>"
    assert base.tokenizer("hello there").input_ids == tiny_tokenizer()("hello there").input_ids
    assert complete(base, [[{"role": "user", "content": "hi"}]], max_new_tokens=3)


@pytest.mark.parametrize("ties", [False, True])
def test_merges_equal_those_of_transformers(ties: bool) -> None:
    """Derives the merges of a vocabulary without a merge list, in the same order."""
    g = random.Random(0)
    tokens = [*"abc▁", *{"".join(g.choices("abc▁", k=g.randint(2, 7))) for _ in range(2000)}]
    vocab = {t: i for i, t in enumerate(tokens)}
    scores = {t: float(-(i // 50) if ties else -i) for t, i in vocab.items()}
    found = merges_of(vocab, scores)
    assert len(found) > 1000
    assert found == generate_merges(vocab, scores)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "Q3_K", "IQ4_NL", "F16", "BF16", "F32"])
def test_dequantized_blocks_equal_those_of_gguf(kind: str) -> None:
    of = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[of]
    raw = np.random.default_rng(0).integers(0, 60, (3, 4, max(256 // block, 1) * size), dtype=np.uint8)
    raw = raw if kind not in ("F16", "F32") else raw.view(np.float16 if kind == "F16" else np.float32)
    wanted = gguf.quants.dequantize(raw, of)
    found = dequantize(raw, of)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


def test_skipped_arrays_keep_counts_per_thread(tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_token_list([f"t{i}" for i in range(5000)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_array("llama.some", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = GgufReader(str(file), long_arrays=False).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == 5000
    assert not fields["tokenizer.ggml.scores"].data
    assert fields["llama.some"].contents() == [1, 2, 3]
    before = gguf.GGUFReader
    with fast_headers(), ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(lambda: gguf.GGUFReader(str(file)).fields).result()
        assert isinstance(gguf.GGUFReader(str(file)), GgufReader)
    assert gguf.GGUFReader is before
    assert elsewhere["tokenizer.ggml.tokens"].contents()[4999] == "t4999"
    assert elsewhere["tokenizer.ggml.scores"].contents() == [0.5] * 5000
