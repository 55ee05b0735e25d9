"""The common workload: two base models with random weights and one set of conversations, made from a seed.

nano30: 29.5 M parameters, 8,192 tokens in the vocabulary. smol135: 134.5 M, the shape of SmolLM2-135M (49,152
tokens). Random weights are right for speed and memory and say nothing about quality.

Conversations come from a JSONL file of chats where one is given; else they are made of this project's generated
requests, as long as real tool-use conversations are (median 330 tokens, one in thirty above 1,024).
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROWS = 1_000
SHAPES: dict[str, dict[str, int]] = {
    "nano30": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "smol135": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_ROLES = {"human": "user", "gpt": "assistant"}

Message = dict[str, str]
Conversation = list[Message]


def make_workload(directory: Path, data: Path | None) -> None:
    """Write `nano30`, `smol135` and `chat.jsonl` into `directory`, unless they are there already."""
    if (directory / "chat.jsonl").is_file():
        return
    conversations = _unique(_read(data) if data else _generated())
    random.Random(0).shuffle(conversations)
    tokenizer = _tokenizer(conversations)
    for name, shape in SHAPES.items():
        _write_model(directory / name, shape, tokenizer)
    write_rows(directory / "chat.jsonl", [{"messages": conversation} for conversation in conversations])


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def only_last_answer(conversation: Conversation) -> Conversation:
    """Everything before the last answer as one prompt: all sides then train on the same tokens."""
    last = max(number for number, message in enumerate(conversation) if message["role"] == "assistant")
    prompt = "\n".join(message["content"] for message in conversation[:last])
    return [{"role": "user", "content": prompt}, conversation[last]]


def _read(path: Path) -> Iterator[Conversation]:
    """Chats as `messages` or `conversations`, with `role`/`content` or `from`/`value`."""
    for row in read_rows(path):
        turns = row.get("messages") or row["conversations"]
        yield [
            {
                "role": _ROLES.get(turn.get("from", ""), turn.get("role") or turn.get("from")),
                "content": turn.get("content") or turn.get("value") or "",
            }
            for turn in turns
        ]


def _generated() -> Iterator[Conversation]:
    """Requests and calls of the demo's generator, one after the other, until a row is as long as it was drawn."""
    from finetune.demo.data import DATA

    pairs = [row["messages"] for row in read_rows(DATA / "train.jsonl")]
    lengths = random.Random(1)
    for _ in range(ROWS):
        characters = lengths.lognormvariate(7.1, 0.75)
        row: Conversation = []
        while sum(len(message["content"]) for message in row) < characters:
            row += lengths.choice(pairs)
        yield row


def _unique(conversations: Iterator[Conversation]) -> list[Conversation]:
    """Each conversation once, and only those that have an answer."""
    answered = (row for row in conversations if any(message["role"] == "assistant" for message in row))
    return list({json.dumps(row): row for row in answered}.values())[:ROWS]


def _tokenizer(conversations: Sequence[Conversation]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        show_progress=False,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((message["content"] for row in conversations for message in row), trainer)
    pad, bos, eos = _SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _write_model(directory: Path, shape: dict[str, int], tokenizer: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **shape,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
