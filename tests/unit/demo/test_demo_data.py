"""The carried data is what its generator writes, and its test rows are new to both trainings."""

import json
from itertools import islice

import pytest

from finetune.demo.data import DATA, MODEL, demo_requests, demo_splits, jsonl
from finetune.demo.pretraining import conversations, drills
from finetune.demo.tools import TOOLS
from finetune.demo.words import POOLS, made_up_word

MOST_BYTES = 12_000_000


def requests_of(split: str) -> set[str]:
    return {row["messages"][0]["content"] for row in demo_splits()[split]}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_carried_files_are_what_the_generator_writes(split):
    assert (DATA / f"{split}.jsonl").read_text(encoding="utf-8") == jsonl(demo_splits()[split])


def test_no_request_stands_in_two_splits():
    train, validation, test = (requests_of(split) for split in ("train", "validation", "test"))

    assert not train & validation
    assert not train & test
    assert not validation & test


def test_every_answer_is_a_call_of_a_known_tool_with_its_arguments():
    arguments = {tool.name: set(tool.arguments) for tool in TOOLS}

    for rows in demo_splits().values():
        for row in rows:
            call = json.loads(row["messages"][1]["content"])
            assert set(call) == {"tool", "arguments"}
            assert set(call["arguments"]) == arguments[call["tool"]]


def test_every_argument_can_be_copied_from_the_request():
    for row in demo_splits()["test"]:
        request, call = (message["content"] for message in row["messages"])
        assert all(str(value) in request for value in json.loads(call)["arguments"].values())


def test_every_tool_is_in_every_split():
    for split in ("train", "validation", "test"):
        calls = [json.loads(row["messages"][1]["content"])["tool"] for row in demo_splits()[split]]
        assert set(calls) == {tool.name for tool in TOOLS}


def test_pretraining_never_shows_a_request_or_a_tool_of_the_demo():
    seen = list(islice(conversations(7), 5_000))
    names = {tool.name for tool in TOOLS}

    assert not {row[-2]["content"] for row in seen} & demo_requests()
    assert not any(name in row[-1]["content"] for row in seen for name in names)


def test_pretraining_text_depends_on_its_seed_alone():
    assert list(islice(conversations(3), 200)) == list(islice(conversations(3), 200))
    assert list(islice(conversations(3), 200)) != list(islice(conversations(4), 200))


def test_drills_answer_with_words_of_the_request():
    for user, assistant in islice(drills(1), 200):
        words = assistant["content"].strip('"[]').replace('","', " ").split()
        assert all(word in user["content"] for word in words)


def test_a_made_up_word_is_no_real_one():
    import random

    real = {word.lower() for pool in POOLS.values() for word in pool.split()}
    rng = random.Random(0)

    assert sum(made_up_word(rng) in real for _ in range(500)) < 10


def test_the_carried_model_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}

    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert sum(files.values()) < MOST_BYTES
