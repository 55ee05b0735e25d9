"""GGUF files in llama.cpp: log-probabilities of transformers, tokens of the tokenizer, prompts of the template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.gguf_files import NASTY, copy_tokenizer, make_model_for, write_gguf
from tests.support.tiny_models import CONFIGS, WINDOW, WINDOWED, make_model
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from finetune.core.errors import ModelError
from finetune.data.rows import Message
from finetune.data.templates import choose_template
from finetune.data.tokenizer import TextTokenizer
from finetune.export.gguf.architectures import read_shape
from finetune.export.llamacpp import LlamaCpp, serve

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is needed to run what was written")

# float32 on both sides, in another order of additions.
SILU = 1e-4
# llama.cpp looks GELU up in a table of half-precision values.
GELU = 5e-3
GELU_KINDS = {"gemma", "gemma2", "gemma3", "gpt2"}
REAL = {
    "llama": "tokenizers/llama2",
    "mistral": "tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3",
    "qwen2": "tokenizers/qwen3",
    "qwen3": "tokenizers/qwen3",
    "phi3": "tokenizers/llama2",
    "gpt2": "tokenizers/gpt2_117M",
}
# Texts of which llama.cpp makes other tokens than the tokenizer, whatever a file says. It composes no accents (NFC),
# and takes `</s>` for a special token wherever a vocabulary has it.
OTHER_TOKENS = {
    "tokenizers/qwen3": {"e\u0301 a\u0300\u0302 \u0301alone", "<s>[INST] hi [/INST]</s>"},
}


def logprobs(model: Path, ids: list[int]) -> np.ndarray:
    """transformers' log-probabilities after each of the ids [T, V]."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(loaded(torch.tensor([ids])).logits[0], -1).numpy()


def furthest(server: LlamaCpp, ids: list[int], expected: np.ndarray, *, top: int | None = None) -> float:
    """The largest difference at several places, over the tokens that llama.cpp names."""
    worst = 0.0
    for length in (1, 2, 5, 9, 17, len(ids)):
        found = server.next_logprobs(ids[:length], expected.shape[1], top=top)
        seen = np.isfinite(found)
        assert seen.sum() >= min(top or expected.shape[1], expected.shape[1])
        worst = max(worst, float(np.abs(found - expected[length - 1])[seen].max()))
    return worst


def ids_for(vocabulary: int, count: int = 24) -> list[int]:
    return np.random.default_rng(0).integers(3, vocabulary, count).tolist()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "llama-tied"])
def test_llama_cpp_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind)
    write_gguf(model, tmp_path / "model.gguf")
    ids = ids_for(259)
    with serve(tmp_path / "model.gguf") as server:
        assert furthest(server, ids, logprobs(model, ids)) < (GELU if kind in GELU_KINDS else SILU)


@pytest.mark.parametrize("kind", ["gemma2-windowed", "gemma3"])
def test_layers_with_a_window_stay_so(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind)
    write_gguf(model, tmp_path / "model.gguf")
    ids = ids_for(259, 3 * WINDOW)
    with serve(tmp_path / "model.gguf") as server:
        assert furthest(server, ids, logprobs(model, ids)) < GELU
    assert kind in WINDOWED


_SMALL: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4 + [1.2] * 4, "long_factor": [1.0] * 4 + [3.0] * 4}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def llama(**options: Any) -> LlamaConfig:
    return LlamaConfig(**_SMALL, max_position_embeddings=256, **options)


SCALED: dict[str, Any] = {
    "llama3": lambda: llama(rope_parameters={**_LLAMA3, "rope_theta": 1e4}),
    "linear": lambda: llama(rope_parameters={**_LINEAR, "rope_theta": 1e4}),
    "yarn": lambda: llama(rope_parameters={**_YARN, "rope_theta": 1e4}),
    "biases": lambda: llama(attention_bias=True),
    "longrope": lambda: Phi3Config(
        **_SMALL,
        max_position_embeddings=4096,
        original_max_position_embeddings=2048,
        pad_token_id=0,
        rope_parameters={**_LONG, "rope_theta": 1e4, "original_max_position_embeddings": 2048},
    ),
}


def test_layers_with_a_window_keep_positions_of_their_own(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "gemma3")
    config = CONFIGS["gemma3"]()
    config.rope_parameters["sliding_attention"]["rope_theta"] = (
        300.0  # llama.cpp takes 10,000 where a file says nothing
    )
    make_model_for(model, config)
    write_gguf(model, tmp_path / "model.gguf")
    ids = ids_for(259)
    with serve(tmp_path / "model.gguf") as server:
        assert furthest(server, ids, logprobs(model, ids)) < GELU


@pytest.mark.parametrize("name", SCALED)
def test_stretched_positions_and_biases_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")  # for its tokenizer
    make_model_for(model, SCALED[name]())
    write_gguf(model, tmp_path / "model.gguf")
    ids = ids_for(259, 64)
    with serve(tmp_path / "model.gguf") as server:
        assert furthest(server, ids, logprobs(model, ids)) < SILU


@pytest.mark.parametrize("kind", REAL)
def test_real_vocabularies_give_the_same_tokens_and_probabilities(kind: str, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    folder = copy_tokenizer(shared / REAL[kind], tmp_path / "model")
    tokenizer = TextTokenizer.open(folder)
    config = CONFIGS[kind]()
    config.vocab_size = tokenizer.vocab_size + 5  # rows without a token, as many models have
    write_gguf(make_model_for(folder, config), tmp_path / "model.gguf")
    ids = [int(token) for token in tokenizer.encode("Naïve café, 北京: set a timer for 12 minutes, please!")[0]][:24]
    with serve(tmp_path / "model.gguf") as server:
        # Only the likeliest: two thousand of 150,000 tokens are quick to ask for.
        assert furthest(server, ids, logprobs(folder, ids), top=2000) < (GELU if kind in GELU_KINDS else SILU)
        other = {text for text in NASTY if server.tokenize(text) != tokenizer.encode(text)[0].tolist()}
        assert other <= OTHER_TOKENS.get(REAL[kind], set())
        assert server.tokenize("Hello", add_special=True) == list(tokenizer.prompt_ids("Hello"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gguf") / "model", "llama-tied")


CONVERSATIONS = {
    "one request": [Message("user", "Hi there")],
    "three turns": [Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Naïve café?")],
    "a system text": [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Yo."),
        Message("user", "B"),
    ],
}


def rendered(server: LlamaCpp, conversation: list[Message]) -> str:
    return server.render([{"role": turn.role, "content": turn.content} for turn in conversation])


# It forgets the header of the answer that comes next, which prompts get all the same.
HEADLESS = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"


@pytest.mark.parametrize(
    "name", ["chatml", "llama2", "llama3", "mistral", "alpaca", "qwen3", "qwen2.5", "llama3.1", HEADLESS]
)
def test_llama_cpp_renders_conversations_as_training_did(name: str, tiny: Path, shared: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.open(tiny)
    real = {
        "qwen3": "tokenizers/qwen3/chat_template.jinja",
        "qwen2.5": "templates/chujiezheng/qwen2.5-instruct.jinja",
        "llama3.1": "templates/trl/llama3_1.jinja",  # it shows the day
    }
    template = choose_template(str(shared / real[name]) if name in real else name, tokenizer)
    write_gguf(tiny, tmp_path / "model.gguf", template=template)
    bos = tokenizer.settings.bos_token or ""
    with serve(tmp_path / "model.gguf") as server:
        for label, conversation in CONVERSATIONS.items():
            ours = template.render_prompt(conversation)
            assert rendered(server, conversation).removeprefix(bos) == ours.removeprefix(bos), label


def test_padding_and_special_tokens_are_named(tiny: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    content = write_gguf(tiny, tmp_path / "model.gguf")
    assert content.vocabulary.tokens[-1] == f"[PAD{len(content.vocabulary.tokens) - 1}]"
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "padding")] == [1, 2, 0]
    assert fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_act": "relu"}, "activation is relu"), ({"model_type": "gpt_neox"}, "architecture gpt_neox")],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    change: dict[str, Any], words: str, tiny: Path, tmp_path: Path
) -> None:
    config = {**json.loads((tiny / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        read_shape(tmp_path)
