"""Exports for llama.cpp and Ollama, read back by the gguf package, transformers and llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from tests import families
from tests.llama_cpp import PYTHON, llama_cpp
from tests.tiny_base import VOCAB_SIZE, tiny_base_dir, tiny_tokenizer
from veneer.adapters.export import exported
from veneer.adapters.ollama import chat_turns
from veneer.adapters.use import attach_adapters
from veneer.api import generate, load_base, save_adapter
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import BaseError, ConfigError
from veneer.files.gguf import read_gguf_file
from veneer.formats.read import read
from veneer.models.text.base import TextBase
from veneer.models.text.gguf_write import TYPES

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
"""Shapes with rows that fill superblocks."""
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}


def make_adapter(base: TextBase, folder: Path) -> str:
    """Save a random adapter with a visible effect."""
    adapter = create(base.model, LoraSpec(rank=4), seed=0)
    g = torch.Generator().manual_seed(1)
    pairs = {m: replace(p, B=torch.randn(p.B.shape, generator=g) * 0.05) for m, p in adapter.pairs.items()}
    save_adapter(replace(adapter, pairs=pairs), folder, base)
    return str(folder)


def make_base(folder: Path, model: PreTrainedModel | None = None, **shape: Any) -> TextBase:
    if model is None:
        return load_base(str(tiny_base_dir(folder, **shape)), dtype="float32")
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return load_base(str(folder / "base"), dtype="float32")


def write(base: TextBase, adapter: str, path: Path, kind: str = "f16", target: str = "gguf") -> dict[str, Any]:
    with exported(base, [adapter], path, target=target, kind=kind) as export:
        assert not path.exists()  # nothing appears before the caller has measured the result
    return export.to_dict()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextBase, str, Path]:
    folder = tmp_path_factory.mktemp("export")
    base = make_base(folder, **WIDE, **SIZES)
    adapter = make_adapter(base, folder / "support")
    for kind in TYPES:
        write(base, adapter, folder / f"{kind}.gguf", kind)
    return base, adapter, folder


IDS = torch.randint(3, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))


def logits_with(base: TextBase, adapter: str) -> torch.Tensor:
    with attach_adapters(base, [adapter]), torch.no_grad():
        return torch.as_tensor(base.model(IDS).logits)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def test_transformers_reads_the_merged_weights(wide: tuple[TextBase, str, Path]) -> None:
    base, adapter, folder = wide
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="f16.gguf", dtype=torch.float32)
    weights, pairs = base.model.state_dict(), read(adapter).adapter.pairs
    for name, got in theirs.state_dict().items():
        want, pair = weights[name].double(), pairs.get(name.removesuffix(".weight"))
        if pair is not None:
            want = want + pair.scale * pair.B.double() @ pair.A.double()
        exact = got.ndim == 1  # norms stay in float32
        assert ((got - want).abs() <= (0 if exact else want.abs() / 2**11 + 2**-24)).all(), name


def test_more_bits_are_closer(wide: tuple[TextBase, str, Path]) -> None:
    base, adapter, folder = wide
    want, errors = logits_with(base, adapter), []
    for kind in TYPES:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{kind}.gguf", dtype=torch.float32)
        with torch.no_grad():
            errors.append(distance(model(IDS).logits, want))
    assert errors == sorted(errors)
    assert errors[0] < 0.01


def test_header_has_the_tokenizer_and_shape(wide: tuple[TextBase, str, Path]) -> None:
    base, _, folder = wide
    fields = {k: f.contents() for k, f in gguf.GGUFReader(folder / "q4_k_m.gguf").fields.items()}
    tokenizer = tiny_tokenizer()
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert fields["llama.attention.head_count_kv"] == 4
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(VOCAB_SIZE)))
    assert [fields["tokenizer.ggml.token_type"][i] for i in range(4)] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id == base.end_of_turn_id
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_base_stays_as_it_was_and_errors_leave_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    adapter = make_adapter(base, tmp_path / "a")
    before, there = base.model(IDS).logits, sorted(tmp_path.iterdir())
    with pytest.raises(KeyError), exported(base, [adapter], tmp_path / "x.gguf", target="gguf", kind="f16"):
        raise KeyError
    assert sorted(tmp_path.iterdir()) == there
    assert torch.equal(base.model(IDS).logits, before)
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        write(base, adapter, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_unknown_families_and_tokenizers_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, families.qwen3_moe(vocab_size=VOCAB_SIZE))
    with pytest.raises(BaseError, match="qwen3_moe"):
        write(base, make_adapter(base, tmp_path / "a"), tmp_path / "x.gguf")
    base = make_base(tmp_path / "other")
    from tokenizers import Regex, pre_tokenizers

    base.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("x+"), "isolated")
    with pytest.raises(BaseError, match="splits words"):
        write(base, make_adapter(base, tmp_path / "b"), tmp_path / "x.gguf")


# -- Ollama ----------------------------------------------------------------------------------------------------------

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "(first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, LLAMA3, GEMMA, MISTRAL], ids=["chatml", "llama3", "gemma", "mistral"])
def test_turns_render_like_the_chat_template(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    turns = chat_turns(tokenizer)
    talk = [("user", "Hi {there}"), ("assistant", "Yes?"), ("user", "Bye"), ("assistant", "Bye"), ("user", "…")]
    talks = [talk[:1], talk[:3], talk]
    assert (turns.system is None) == (template == MISTRAL)
    if turns.system:
        talks += [[("system", "Be brief.\nAlways."), *each] for each in talks]
    for each in talks:
        messages = [{"role": role, "content": content} for role, content in each]
        want = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert turns.render(each) == want


def test_gemmas_go_template_puts_the_system_message_first() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GEMMA.replace("{{ bos_token }}", "")
    assert chat_turns(tokenizer).to_go() == (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}<start_of_turn>user\n'
        "{{ if eq $i 1 }}{{ $.System }}\n\n{{ end }}{{ .Content }}<end_of_turn>\n{{ end }}"
        '{{ if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ end }}'
        "{{ end }}<start_of_turn>model\n"
    )


def test_ollama_gets_a_folder_with_a_modelfile(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    adapter = make_adapter(base, tmp_path / "a")
    options: dict[str, Any] = {"target": "ollama", "kind": "q8_0", "system": "Route it.\n"}
    with exported(base, [adapter], tmp_path / "o", **options) as export, torch.no_grad():
        got = export.load().model(IDS).logits
    assert distance(got, logits_with(base, adapter)) < 0.05
    assert sorted(f.name for f in (tmp_path / "o").iterdir()) == ["Modelfile", "model.gguf"]
    text = (tmp_path / "o" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ if not .System }}<|im_start|>system\n')
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert text.endswith('SYSTEM """Route it.\n"""\n')
    base.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ConfigError, match="does more than put text around"):
        write(base, adapter, tmp_path / "p", target="ollama")


# -- llama.cpp -------------------------------------------------------------------------------------------------------

needs_llama = pytest.mark.skipif(not PYTHON.exists(), reason="llama-cpp-python is not installed: make test-peers")
GEMMA_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: families.llama3(vocab_size=VOCAB_SIZE),
    "llama with scaled rotary embeddings": lambda: families.llama3(
        vocab_size=VOCAB_SIZE,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: families.mistral(vocab_size=VOCAB_SIZE, sliding_window=None),
    "qwen2": lambda: families.build(Qwen2Config(**families.COMMON | {"vocab_size": VOCAB_SIZE})),
    "qwen3": lambda: families.FAMILIES["qwen3"](vocab_size=VOCAB_SIZE),
    "gemma3": lambda: families.gemma3(vocab_size=VOCAB_SIZE, num_hidden_layers=6, layer_types=GEMMA_LAYERS),
}  # fmt: skip


@needs_llama
@pytest.mark.peers
@pytest.mark.parametrize("family", MODELS)
def test_llama_cpp_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, MODELS[family]())
    adapter = make_adapter(base, tmp_path / "a")
    write(base, adapter, tmp_path / "x.gguf")
    prompt = IDS[0].tolist()
    got = torch.tensor(llama_cpp(file=str(tmp_path / "x.gguf"), prompts=[prompt], count=1)["logits"][0])
    want = logits_with(base, adapter)[0, -1]
    torch.testing.assert_close(got, want, atol=0.02 * float(want.std()), rtol=0.01)


TEXTS = [
    "Hello there 1234!",
    "naïve 🙂 漢字\n\n\tx  y",
    "<s>user\nI'll go</s> again",
    " leading",
    "a" * 40,
    "3.14 = π?",
]


def pieces_tokenizer(prepend: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of SentencePiece's kind: with a space before each text, like Mistral's, or without."""
    raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    change = normalizers.Replace(" ", "▁")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), change]) if prepend else change
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    raw.train_from_iterator(["there is a text", "hello there, hello again", "the user goes again"], trainer)
    state = json.loads(raw.to_str())
    old = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    words = [*old[:3], *bytes_, *old[3:]][:VOCAB_SIZE]
    state["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    state["model"]["merges"] = [m for m in state["model"]["merges"] if "".join(m) in state["model"]["vocab"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@needs_llama
@pytest.mark.peers
@pytest.mark.parametrize("prepend", [True, False], ids=["mistral", "gemma"])
def test_llama_cpp_splits_texts_into_the_same_pieces(prepend: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path)
    base.tokenizer, base.end_of_turn_id = pieces_tokenizer(prepend), 2
    write(base, make_adapter(base, tmp_path / "a"), tmp_path / "x.gguf")
    tokens = llama_cpp(file=str(tmp_path / "x.gguf"), texts=TEXTS)["tokens"]
    assert tokens == [base.tokenizer(text).input_ids for text in TEXTS]


@needs_llama
@pytest.mark.peers
@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "q5_k_m", "q4_k_m"])
@pytest.mark.parametrize("shape", [WIDE | SIZES, {}, {"tie_word_embeddings": False} | WIDE | SIZES], ids=str)
def test_file_equals_that_of_llama_quantize(kind: str, shape: dict[str, Any], tmp_path: Path) -> None:
    """The narrow shape has rows that do not fill superblocks."""
    base = make_base(tmp_path, **shape)
    adapter = make_adapter(base, tmp_path / "a")
    for each in ("f16", kind):
        write(base, adapter, tmp_path / f"{each}.gguf", each)
    theirs = str(tmp_path / "theirs.gguf")
    llama_cpp(file=str(tmp_path / "f16.gguf"), quantized=theirs, ftype=TYPES[kind][1])
    ours, other = read_gguf_file(tmp_path / f"{kind}.gguf"), read_gguf_file(theirs)
    assert {n: e.kind for n, e in ours.entries.items()} == {n: e.kind for n, e in other.entries.items()}
    assert all(np.array_equal(ours.raw(n), other.raw(n)) for n in ours.entries)
    assert ours.types == other.types
    assert all(np.array_equal(ours.fields[k], other.fields[k]) for k in ours.fields)


@needs_llama
@pytest.mark.peers
@pytest.mark.network
def test_llama_cpp_answers_like_veneer(tmp_path: Path) -> None:
    base = load_base("smollm2-135m", dtype="float32")
    adapter = create(base.model, LoraSpec(rank=4), seed=0)
    g = torch.Generator().manual_seed(1)
    pairs = {m: replace(p, B=torch.randn(p.B.shape, generator=g) * 0.003) for m, p in adapter.pairs.items()}
    save_adapter(replace(adapter, pairs=pairs), tmp_path / "a", base)
    with exported(base, [tmp_path / "a"], tmp_path / "x.gguf", target="gguf", kind="f16") as export:
        loaded = export.load()
    questions = ["What is the capital of France?", "Where is my parcel 12345?", "naïve 🙂\n\n  x"]
    prompts = [
        str(
            base.tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
            )
        )
        for q in questions
    ]
    ids = [base.tokenizer(p).input_ids for p in prompts]
    ran = llama_cpp(file=str(tmp_path / "x.gguf"), texts=prompts, prompts=ids, count=24)
    assert ran["tokens"] == ids
    answers = [base.tokenizer.decode(each, skip_special_tokens=True) for each in ran["answers"]]
    assert answers == generate(loaded, questions, max_new_tokens=24)
    assert answers[:2] == generate(base, questions[:2], adapters=[tmp_path / "a"], max_new_tokens=24)
    assert answers != generate(base, questions, max_new_tokens=24)
