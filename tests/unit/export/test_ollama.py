"""Modelfiles: Go's template renders what the Jinja template renders, and answers stop where they end."""

import re
from pathlib import Path

import pytest
from tests.support import go_template
from tests.support.tiny_tokenizer import tiny_backend

from finetune.data.rows import Message
from finetune.data.templates import Template, choose_template
from finetune.data.tokenizer import TextTokenizer, TokenizerSettings
from finetune.export.ollama import MOST_CONTEXT, modelfile, next_steps, recognised

BOS, EOS = "<s>", "</s>"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
DEFAULT = "You are a helpful assistant."
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + DEFAULT + "<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KNOWN = {
    "ChatML": "chatml",
    "Llama 2": "llama2",
    "Llama 3": "llama3",
    "Mistral": "mistral",
    "Mistral v3": MISTRAL_V3,
    "Alpaca": "alpaca",
    "Gemma": GEMMA,
    "Phi-3": PHI3,
    "plain": "plain",
}
CONVERSATIONS = [
    [Message("user", "Hi")],
    [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "More")],
    [Message("system", "Be brief."), Message("user", "Hi")],
    [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "More")],
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    special = ["<|end|>", "<start_of_turn>", "<end_of_turn>"]
    backend = tiny_backend()
    backend.add_special_tokens(special)
    return TextTokenizer(backend, TokenizerSettings(bos_token=BOS, eos_token=EOS, pad_token="<pad>"))


def written(template: Template | None, context: int = 4096) -> tuple[str, str | None]:
    return modelfile("model.gguf", template, bos=BOS, eos=EOS, context=context)


def go_source(text: str) -> str:
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("family", KNOWN)
def test_gos_template_renders_what_training_saw(family: str, tokenizer: TextTokenizer) -> None:
    template = choose_template(KNOWN[family], tokenizer)
    text, name = written(template)
    assert name == family
    for conversation in CONVERSATIONS:
        if family == "Mistral v3" and conversation[0].role == "system":
            continue  # it has no place for one
        ours = template.render_prompt(conversation).removeprefix(BOS)
        theirs = go_template.render(go_source(text), [(turn.role, str(turn.content)) for turn in conversation])
        assert theirs == ours


def test_a_system_text_of_the_template_itself_is_written(tokenizer: TextTokenizer) -> None:
    text, name = written(choose_template(WITH_DEFAULT, tokenizer))
    assert name == "ChatML"
    assert f'SYSTEM """{DEFAULT}"""' in text


def test_an_unknown_template_is_left_to_the_gguf_file(tokenizer: TextTokenizer) -> None:
    odd = "{% for m in messages %}{{ '## ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template = choose_template(odd, tokenizer)
    assert recognised(template, bos=BOS, eos=EOS) is None
    text, name = written(template)
    assert name is None
    assert "TEMPLATE" not in text
    assert text.startswith("FROM ./model.gguf\n")
    assert f'PARAMETER stop "{EOS}"' in text


def test_stops_and_context_are_those_of_the_model(tokenizer: TextTokenizer) -> None:
    text, _ = written(choose_template(PHI3, tokenizer), context=10**6)
    assert 'PARAMETER stop "<|end|>"' in text
    assert f"PARAMETER num_ctx {MOST_CONTEXT}" in text
    assert "PARAMETER num_ctx 512" in written(None, context=512)[0]


def test_the_next_steps_name_the_files() -> None:
    steps = next_steps("out/My-Model.gguf", is_adapter=False)
    assert "ollama create my-model -f out/My-Model.Modelfile" in "\n".join(steps)
    assert "--lora a.gguf" in next_steps("a.gguf", is_adapter=True)[0]
    assert Path("out/My-Model.gguf").name in steps[0]
