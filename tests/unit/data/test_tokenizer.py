"""Tokenizers read from directories: special tokens, templates, and faults that are named."""

import json

import pytest
from tests.support.tiny_tokenizer import BYTES, tiny_backend

from finetune.core.errors import ModelError
from finetune.data.tokenizer import TextTokenizer


def directory(tmp_path, config=None, **files):
    tiny_backend().save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **(config or {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return tmp_path


def test_special_tokens_are_read_as_text_or_as_objects(tmp_path):
    tokenizer = TextTokenizer.open(directory(tmp_path))

    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    assert tokenizer.pad_id == tokenizer.eos_id
    assert "<|im_end|>" in tokenizer.special_tokens
    assert tokenizer.vocab_size == 261


def test_ids_of_the_model_name_tokens_that_the_tokenizer_does_not(tmp_path):
    model = directory(tmp_path, {"eos_token": "</s>"}, config__json=json.dumps({"pad_token_id": 258}))

    assert TextTokenizer.open(model).pad_id == 258


@pytest.mark.parametrize(
    ("config", "files", "template"),
    [
        ({"chat_template": "A"}, {}, "A"),
        ({"chat_template": [{"name": "default", "template": "B"}, {"name": "tools", "template": "C"}]}, {}, "B"),
        ({"chat_template": "A"}, {"chat_template__jinja": "D"}, "D"),
        ({}, {"chat_template__json": '{"chat_template": "E"}'}, "E"),
        ({}, {}, None),
    ],
)
def test_the_chat_template_is_found_wherever_it_is_kept(tmp_path, config, files, template):
    assert TextTokenizer.open(directory(tmp_path, config, **files)).chat_template == template


def test_text_and_ranges_survive_a_round_trip(tmp_path):
    tokenizer = TextTokenizer.open(directory(tmp_path))
    text = "caf\u00e9 <|im_end|>\n \U0001f642"
    ids, offsets = tokenizer.encode(text)

    assert tokenizer.decode(ids, skip_special=False) == text
    assert [text[start:end] for start, end in offsets][:4] == ["c", "a", "f", "\u00e9"]
    assert offsets[-1].tolist() == [len(text) - 1, len(text)]
    assert [pair[0].tolist() for pair in tokenizer.encode_batch([text])] == [ids.tolist()]


def test_a_limit_stored_in_the_file_does_not_cut_rows(tmp_path):
    backend = tiny_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))

    assert len(TextTokenizer.open(tmp_path).encode("longer than four")[0]) == 16


def test_the_old_layout_of_gpt2_is_read(tmp_path):
    vocabulary = {character: number for number, character in enumerate([*BYTES, "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = TextTokenizer.open(tmp_path)

    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 256)
    assert tokenizer.decode(tokenizer.encode("Hi<|endoftext|>")[0]) == "Hi"


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["none", "cut", "empty"])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")

    with pytest.raises(ModelError, match="no tokenizer could be read"):
        TextTokenizer.open(tmp_path)


def test_a_damaged_configuration_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not valid JSON"):
        TextTokenizer.open(directory(tmp_path, tokenizer_config__json="{"))
