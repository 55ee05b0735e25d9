"""Splittings of byte-level BPE that llama.cpp knows by name, and vocabularies like Gemma's: the same tokens in both."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.gguf_files import NASTY, make_model_for, write_gguf
from tests.support.tiny_models import CONFIGS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from finetune.data.tokenizer import TextTokenizer
from finetune.export.gguf.pretokenizers import KNOWN, PROBE, fingerprint
from finetune.export.llamacpp import serve

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is needed to compare tokens")

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + TAIL
)
# llama.cpp's own form of Tekken's splitting has letters alone where Tekken's has letters and marks.
TEKKEN_DIFFERS = {"e\u0301 a\u0300\u0302 \u0301alone", "नमस्ते दुनिया", "ก็ ที่ น้ำ", PROBE}


def bytes_of(*splits: Any) -> Any:
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def by(pattern: str) -> Any:
    return bytes_of(pre_tokenizers.Split(Regex(pattern), "isolated"))


SPLITTINGS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "qwen2": (by(QWEN2), False),
    "llama-bpe": (by(LLAMA3), True),
    "dbrx": (by(LLAMA3), False),
    "tekken": (by(TEKKEN), True),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
        False,
    ),
}


def trained(folder: Path, splitting: Any, *, takes_whole: bool) -> Path:
    """A byte-level vocabulary learned from the texts themselves, so that every way to cut them shows."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitting, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*NASTY, PROBE] * 3, trainer)
    document = json.loads(tokenizer.to_str())
    document["model"]["ignore_merges"] = takes_whole
    (folder / "tokenizer.json").write_text(json.dumps(document))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


def differing(folder: Path, kind: str) -> set[str]:
    """The texts of which llama.cpp makes other tokens."""
    tokenizer = TextTokenizer.open(folder)
    config = CONFIGS[kind]()
    config.vocab_size = tokenizer.vocab_size
    write_gguf(make_model_for(folder, config), folder / "model.gguf")
    with serve(folder / "model.gguf") as server:
        texts = (*NASTY, PROBE)
        return {text for text in texts if server.tokenize(text) != tokenizer.encode(text)[0].tolist()}


@pytest.mark.parametrize("name", SPLITTINGS)
def test_a_known_splitting_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    splitting, takes_whole = SPLITTINGS[name]
    folder = trained(tmp_path / "model", splitting, takes_whole=takes_whole)
    pieces = TextTokenizer.open(folder).split(PROBE)
    assert KNOWN[fingerprint(pieces, takes_whole=takes_whole)] == name
    assert differing(folder, "llama") <= (TEKKEN_DIFFERS if name == "tekken" else set())


def gemma_like(folder: Path) -> Path:
    """SentencePiece's BPE as Gemma has it: no space in front, breaks as tokens, bytes for the rest."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    latin = [text for text in NASTY if text.isascii() and "\0" not in text]  # zero ends a text in C
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(latin * 3, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:4]
    rows = len(document["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "\n\n\n")])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<start_of_turn>", "<end_of_turn>")])
    assert tokenizer.get_vocab_size() > rows
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


def test_tokens_are_written_with_their_kinds(tmp_path: Path) -> None:
    folder = gemma_like(tmp_path / "model")
    config = CONFIGS["gemma"]()
    config.vocab_size = TextTokenizer.open(folder).vocab_size + 2
    vocabulary = write_gguf(make_model_for(folder, config), folder / "model.gguf").vocabulary
    kinds = {text: kind.name for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)}
    expected = {"<0x0A>": "BYTE", "<unk>": "UNKNOWN", "<bos>": "CONTROL", "\n\n": "USER_DEFINED", "▁": "NORMAL"}
    assert {text: kinds[text] for text in expected} == expected
    assert [vocabulary.kinds[-1].name, vocabulary.tokens[-1]] == ["UNUSED", f"[PAD{config.vocab_size - 1}]"]


@pytest.mark.parametrize("kind", ["gemma", "gemma3"])
def test_a_vocabulary_like_gemmas_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    assert differing(gemma_like(tmp_path / "model"), kind) == set()
