# ruff: noqa: RUF001 - letters that look like others are what some of these texts are about
"""GGUF files of tiny models, real tokenizers for them, and texts on which tokenizers tend to differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer
from finetune.export.gguf.architectures import read_shape
from finetune.export.gguf.quantize import find_scheme
from finetune.export.gguf.template import opens_with_special, template_facts
from finetune.export.gguf.tensors import plan_tensors
from finetune.export.gguf.tokenizer import read_vocabulary
from finetune.export.gguf.writer import ModelFile, write_model

NASTY = (
    "Hello world",
    "",
    " ",
    "  leading two",
    "trailing  ",
    "a\nb\n\nc\n\n\nd",
    "\t\ttabs\t x",
    "\r\nwindows\r\n\r\nlines",
    "naïve café résumé",
    "e\u0301 a\u0300\u0302 \u0301alone",
    "北京大学在中国。東京タワー",
    "한국어 텍스트",
    "Привет, мир! ПРИВЕТ",
    "العربية مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 😀😃 🇩🇪",
    "zero\u200bwidth\u200d\ufeff bom",
    "\x00\x01\x02\x7f\x1b[31m",
    "<|endoftext|> <|im_start|>user\nhi<|im_end|>",
    "<s>[INST] hi [/INST]</s>",
    "<unk> <pad> <0x0A> ▁ ▁▁a",
    "<|im_start |> </ s> <s <|",
    "def f(x):\n    return x**2 # comment\n",
    "if(a&&b||!c){d[i]+=1;}",
    "3.14159 12345678 1,000,000 0x1F ½ ²",
    "It's we'll THEY'RE I'D 'tis don't",
    "camelCase HTTPServer snake_case",
    "   \n   \n",
    "a" * 50,
    "....!!!!???---===",
    "ﬁ ﬂ ｆｕｌｌ ＷＩＤＥ",
    "\u00a0nbsp\u3000ideographic",
    "ÀÉÎÕÜ ßẞ İı",
    "x\u2028y\u2029z",
    "http://example.com/?q=1&r=%20",
    "𝕳𝖊𝖑𝖑𝖔 𠜎𠜱",
    "ก็ ที่ น้ำ",
    "\ud7ff\ue000\ufffd\uffff",
)


def write_gguf(model: Path, file: Path, *, scheme: str = "f32", template: Template | None = None) -> ModelFile:
    """A model directory as GGUF, without a check."""
    shape, tokenizer = read_shape(model), TextTokenizer.open(model)
    plan = plan_tensors(model, shape)
    vocabulary = read_vocabulary(model, tokenizer, plan.vocabulary, opens_special=opens_with_special(template))
    facts = template_facts(template, tokenizer)
    content = ModelFile(file.stem, shape, plan, find_scheme(scheme), tokenizer, vocabulary, facts)
    write_model(file, content)
    return content


def make_model_for(directory: Path, config: Any, *, seed: int = 0) -> Path:
    """Random weights of a transformers configuration, in a directory that has its tokenizer already."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that are all one or zero hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def copy_tokenizer(source: Path, directory: Path) -> Path:
    """A real tokenizer's files; SentencePiece's alone become what its publishers ship beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        return sentencepiece_tokenizer(source, directory)
    if (source / "tokenizer.model").is_file():
        return sentencepiece_tokenizer(source / "tokenizer.model", directory)
    for file in source.iterdir():
        if file.is_file() and file.name not in {"config.json", "adapter_config.json"}:
            shutil.copyfile(file, directory / file.name)
    return directory


def sentencepiece_tokenizer(model: Path, directory: Path) -> Path:
    """tokenizer.json as the publishers of Llama 2 and Mistral convert it: merges by score, a space before a text."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    numbers = range(pieces.get_piece_size())
    vocabulary = {pieces.id_to_piece(number): number for number in numbers}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_merges(vocabulary, pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [number for number in numbers if pieces.is_control(number) or pieces.is_unknown(number)]
    tokenizer.add_special_tokens([AddedToken(pieces.id_to_piece(n), special=True, normalized=False) for n in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    shutil.copyfile(model, directory / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _merges(vocabulary: dict[str, int], pieces: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first."""
    found = []
    for piece, number in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(pieces.get_score(number), pair) for pair in known]
    found.sort(key=lambda entry: entry[0], reverse=True)
    return [pair for _, pair in found]
