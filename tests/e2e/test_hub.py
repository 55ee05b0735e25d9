"""Models of the hub with the real client, against a server on loopback: pulled, checked, tuned, and what goes wrong."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from huggingface_hub import constants
from tests.support.ft import Ran
from tests.support.hostile_models import (
    CONFIGS,
    OWN_CODE,
    PICKLED,
    TEMPLATES,
    TOKENIZERS,
    TRAP,
    WEIGHTS,
    Break,
    with_values,
)
from tests.support.hub_server import Hub, Repository, serve
from tests.support.in_process import ft_here
from tests.support.model_files import shard_model, write_model
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_tokenizer import tiny_backend

from finetune.models.source import DEMO_DIRECTORY

NAME = "some-org/tiny"
TOKEN = "hf_secretsecretsecretsecretsecret"
Run = Callable[..., Ran]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**own, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}


@pytest.fixture
def started(environment: dict[str, str]) -> Run:
    """`ft` in a process of its own with that hub and a cache of its own; keywords change the environment."""

    def call(*arguments: object, **changes: str) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "finetune", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**environment, **changes},
            timeout=120,
            check=False,
        )
        return quiet(Ran(done.returncode, done.stdout, done.stderr))

    return call


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """The same in this process, where the client reads its environment again for each command."""

    def call(*arguments: object, **changes: str) -> Ran:
        try:
            with patch.dict(os.environ, {**environment, **changes}, clear=True):
                importlib.reload(constants)
                return quiet(ft_here(*arguments))
        finally:
            importlib.reload(constants)

    return call


def quiet(ran: Ran) -> Ran:
    """What says nothing that nobody should read."""
    said = ran.out + ran.err
    assert "Traceback" not in said, said
    assert TOKEN not in said
    return ran


@pytest.fixture
def tiny(hub: Hub, tmp_path: Path) -> Repository:
    """A model in two shards, and files that no model needs."""
    directory = write_model(tmp_path / "origin")
    shard_model(directory)
    tiny_backend().save(str(directory / "tokenizer.json"))
    repository = Repository.of(directory)
    repository.files |= {"pytorch_model.bin": b"pickle", "evil.py": b"raise SystemExit", "README.md": b"# Tiny"}
    hub.repositories[NAME] = repository
    return repository


def refused(ran: Ran) -> str:
    assert ran.code == 1, ran
    assert not ran.out
    return ran.err


def test_a_model_is_pulled_whole_and_checked(started: Run, run: Run, hub: Hub, tiny: Repository) -> None:
    pulled = started("models", "pull", NAME, "--json").json
    assert pulled["revision"] == tiny.commit
    files = {path.name: path.read_bytes() for path in Path(pulled["path"]).iterdir()}
    assert files == {name: content for name, content in tiny.files.items() if not name.endswith((".bin", ".py"))}
    assert pulled["downloaded"] == pulled["bytes"] == sum(map(len, files.values()))
    listed = run("models", "list", "--json").json["models"]
    assert [model["problem"] for model in listed if model["name"] == NAME] == [None]
    assert f"Bearer {TOKEN}" in hub.tokens


def test_what_is_there_is_not_downloaded_again(run: Run, hub: Hub, tiny: Repository) -> None:
    assert run("models", "pull", NAME).code == 0
    hub.requests.clear()
    again = run("models", "pull", NAME)
    assert "nothing to download" in again.out
    assert hub.fetched() == []


def test_a_dropped_connection_is_taken_up_where_it_ended(run: Run, hub: Hub, tiny: Repository) -> None:
    shard = next(name for name in tiny.files if name.startswith("model-00001"))
    tiny.cut = Counter({shard: 1})
    assert run("models", "pull", NAME).code == 0
    ranges = [start for method, path, start in hub.requests if method == "GET" and path.endswith(shard)]
    assert len(ranges) == 2
    assert ranges[0] is None


def test_a_pull_that_was_killed_goes_on_with_the_files_that_lack(
    run: Run, hub: Hub, environment: dict[str, str]
) -> None:
    hub.repositories[NAME] = repository = Repository.of(DEMO_DIRECTORY)
    repository.pause = 0.5
    command = [sys.executable, "-m", "finetune", "models", "pull", NAME]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while "model.safetensors" not in hub.fetched() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    repository.pause = 0.0
    assert "Run `ft models pull" in run("models", "info", NAME).err
    hub.requests.clear()
    assert run("models", "pull", NAME).code == 0
    assert hub.fetched() == ["model.safetensors"]
    assert run("models", "info", NAME).code == 0


def test_a_corrupt_file_is_fetched_again_once(run: Run, hub: Hub, tiny: Repository) -> None:
    tiny.corrupt = Counter({"config.json": 0, "tokenizer.json": 1, "model-00002-of-00002.safetensors": 1})
    pulled = run("models", "pull", NAME, "--json").json
    for name in ("tokenizer.json", "model-00002-of-00002.safetensors"):
        assert (Path(pulled["path"]) / name).read_bytes() == tiny.files[name]
    assert Counter(hub.fetched())["tokenizer.json"] == 2


def test_a_file_that_stays_corrupt_is_removed(run: Run, tiny: Repository, tmp_path: Path) -> None:
    tiny.corrupt = Counter({"model-00001-of-00002.safetensors": 9})
    said = refused(run("models", "pull", NAME))
    assert "model-00001-of-00002.safetensors of some-org/tiny arrived twice with other content" in said
    assert not list((tmp_path / "hf").rglob("model-00001*"))
    tiny.corrupt.clear()
    assert run("models", "pull", NAME).code == 0


def test_a_gated_model_is_explained(run: Run, hub: Hub, tiny: Repository) -> None:
    tiny.gated = True
    said = refused(run("models", "pull", NAME))
    assert f"{NAME} is gated" in said
    assert f"Accept them at {hub.address}/{NAME}" in said


def test_a_missing_model_is_explained(run: Run, hub: Hub) -> None:
    said = refused(run("models", "pull", "some-org/missing"))
    assert f"There is no model some-org/missing at {hub.address}, or it is private" in said


def test_a_missing_revision_is_explained(run: Run, tiny: Repository) -> None:
    assert f"{NAME} has no revision v9" in refused(run("models", "pull", NAME, "--revision", "v9"))


def test_no_network_is_explained_without_the_password_of_a_proxy(started: Run) -> None:
    said = refused(started("models", "pull", NAME, HF_ENDPOINT="http://me:hidden@127.0.0.1:9"))
    assert f"http://127.0.0.1:9 cannot be reached for {NAME}" in said
    assert "hidden" not in said


def test_offline_mode_is_kept(started: Run, hub: Hub, tiny: Repository) -> None:
    said = refused(started("models", "pull", NAME, HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE forbids the hub" in said
    assert hub.requests == []


def test_a_disk_that_is_too_small_is_seen_before_the_download(run: Run, hub: Hub, tiny: Repository) -> None:
    tiny.sizes["model-00001-of-00002.safetensors"] = 10**16
    said = refused(run("models", "pull", NAME))
    assert "needs 10,000,000,000.0 MB more in" in said
    assert "Make room, or set HF_HOME" in said
    assert hub.fetched() == []


def test_pickled_weights_are_not_downloaded(run: Run, hub: Hub, tiny: Repository) -> None:
    tiny.files = {name: content for name, content in tiny.files.items() if "safetensors" not in name}
    assert "has its weights only as pytorch_model.bin" in refused(run("models", "pull", NAME))
    assert hub.fetched() == []


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused_before_its_weights(
    run: Run, hub: Hub, tiny: Repository, file: str
) -> None:
    known = json.loads(tiny.files.get(file, b"{}"))
    tiny.files[file] = json.dumps({**known, "auto_map": {"AutoModel": "evil.Model"}}).encode()
    assert f"auto_map in {file}" in refused(run("models", "pull", NAME))
    assert not [name for name in hub.fetched() if name.startswith("model-")]


@pytest.fixture
def broken(hub: Hub, tmp_path: Path) -> Callable[[Break], Repository]:
    """A repository with a model that was spoiled before it was uploaded, so that all of its hashes are right."""

    def upload(spoil: Break) -> Repository:
        directory = write_tiny_model(tmp_path / "spoiled" / "model")
        spoil(directory)
        hub.repositories[NAME] = Repository.of(directory)
        return hub.repositories[NAME]

    return upload


def require_bad_model(said: str, tmp_path: Path) -> None:
    assert "models--some-org--tiny" in said or NAME in said, said
    assert "fault in finetune" not in said
    assert not list(tmp_path.rglob(TRAP))


# A directory is no file of a repository; what a tokenizer knows beyond the model, or does not know, shows in rows.
NOT_AT_PULL = {"a directory", "no vocabulary", "more tokens than embeddings"}


@pytest.mark.parametrize("name", sorted(TOKENIZERS.keys() - NOT_AT_PULL))
def test_a_tokenizer_that_is_none_is_refused_before_the_weights(
    run: Run, hub: Hub, broken: Callable[[Break], Repository], tmp_path: Path, name: str
) -> None:
    broken(TOKENIZERS[name])
    said = refused(run("models", "pull", NAME))
    require_bad_model(said, tmp_path)
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize(
    "name", ["not JSON", "a list", "no architecture", "architecture number", "negative vocabulary"]
)
def test_a_description_of_no_model_is_refused_before_the_weights(
    run: Run, hub: Hub, broken: Callable[[Break], Repository], tmp_path: Path, name: str
) -> None:
    broken(CONFIGS[name])
    require_bad_model(refused(run("models", "pull", NAME)), tmp_path)
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize("cases", [PICKLED, OWN_CODE], ids=["pickled", "own code"])
def test_a_model_that_is_a_program_is_refused(
    run: Run, hub: Hub, broken: Callable[[Break], Repository], tmp_path: Path, cases: dict[str, Break]
) -> None:
    for spoil in cases.values():
        shutil.rmtree(tmp_path / "spoiled", ignore_errors=True)
        broken(spoil)
        require_bad_model(refused(run("models", "pull", NAME)), tmp_path)


@pytest.mark.parametrize(
    "name", ["header of 2^63 bytes", "no tensors", "offsets beyond the file", "truncated data", "index to the parent"]
)
def test_weights_that_are_none_are_refused_by_their_name(
    run: Run, broken: Callable[[Break], Repository], tmp_path: Path, name: str
) -> None:
    broken(WEIGHTS[name])
    require_bad_model(refused(run("models", "pull", NAME)), tmp_path)


@pytest.mark.parametrize("name", ["nested loops", "globals", "10^9 characters by joining"])
def test_a_template_that_would_run_long_or_reach_out_is_refused_when_it_is_used(
    run: Run, broken: Callable[[Break], Repository], tmp_path: Path, name: str
) -> None:
    broken(with_values("tokenizer_config.json", chat_template=TEMPLATES[name]))
    assert run("models", "pull", NAME).code == 0  # with --template it is a model like others
    said = refused(run("generate", "--model", NAME, "--prompt", "Hi", "--backend", "mlx"))
    assert "`tokenizer`" in said
    assert "fault in finetune" not in said


def test_a_repository_of_something_else_is_refused(run: Run, hub: Hub) -> None:
    hub.repositories[NAME] = Repository({"model.gguf": b"GGUF"})
    assert f"{NAME} has no config.json" in refused(run("models", "pull", NAME))


@pytest.mark.parametrize("name", ["demo", "/tmp", "a/b/c", "../x"])
def test_what_is_no_name_of_the_hub_is_refused(run: Run, hub: Hub, name: str) -> None:
    ran = run("models", "pull", name)
    assert ran.code == 2
    assert "is not the name of a model on the hub" in ran.err
    assert hub.requests == []


def test_a_run_pulls_its_base_and_goes_on_without_the_hub(started: Run, run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["demo-org/demo"] = repository = Repository.of(DEMO_DIRECTORY)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "One?", "completion": "Two."}\n' * 8, encoding="utf-8")
    options = ("--model", "demo-org/demo", "--data", data, "--set", "training.max_steps=2", "--set")
    first = started("train", *options, f"output.output_dir={tmp_path / 'one'}")
    assert first.code == 0, first.err
    assert f"Downloading demo-org/demo ({repository.commit[:12]}) from {hub.address}" in first.err + first.out
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert record["model"]["revision"] == repository.commit
    assert f"revision: {repository.commit}" in (tmp_path / "one" / "config.yml").read_text()
    hub.requests.clear()
    again = run("train", "--config", tmp_path / "one" / "config.yml", "--set", f"output.output_dir={tmp_path / 'two'}")
    assert again.code == 0, again.err
    assert hub.requests == []
    elsewhere = ("--set", f"model.name={DEMO_DIRECTORY}", "--set", "model.revision=null")
    moved = run("train", "--resume", tmp_path / "one", *elsewhere, HF_HUB_OFFLINE="1")
    assert moved.code == 0, moved.err  # the same files, so the same steps
    answer = run("generate", "--model", tmp_path / "two", "--prompt", "One?", HF_HUB_OFFLINE="1")
    assert answer.code == 0, answer.err


ROWS = b'{"prompt": "One?", "completion": "Two."}\n' * 8
DATA = "some-org/rows"


@pytest.fixture
def rows(hub: Hub) -> Repository:
    files = {"README.md": b"# Rows", "data/train-0.jsonl": ROWS, "data/train-1.jsonl": ROWS, "data/test-0.jsonl": ROWS}
    hub.repositories[DATA] = repository = Repository(files)
    return repository


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (f"hf://datasets/{DATA}", ["train-0.jsonl", "train-1.jsonl"]),
        (DATA, ["train-0.jsonl", "train-1.jsonl"]),
        (f"{DATA}@main/data/test-0.jsonl", ["test-0.jsonl"]),
        (f"hf://datasets/{DATA}/data", ["test-0.jsonl", "train-0.jsonl", "train-1.jsonl"]),
    ],
)
def test_an_address_means_files_of_a_data_set(run: Run, rows: Repository, address: str, expected: list[str]) -> None:
    files = [Path(file) for file in run("dataset", "pull", address, "--json").json["files"]]
    assert [file.name for file in files] == expected
    assert all(file.read_bytes() == ROWS for file in files)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"hf://datasets/{DATA}/nothing", f"{DATA} has no data file nothing. It has: README.md, data/test-0.jsonl"),
        ("hf://models/x/y", "hf://models/x/y is not a data set on the hub. Write hf://datasets/owner/name"),
        ("some-org/nowhere", "There is no data set some-org/nowhere at "),
    ],
)
def test_an_address_that_means_nothing_is_explained(run: Run, rows: Repository, address: str, said: str) -> None:
    assert said in refused(run("dataset", "pull", address))


def test_commands_that_do_not_pull_say_how(run: Run, hub: Hub, tmp_path: Path) -> None:
    address, config = f"hf://datasets/{DATA}", tmp_path / "run.yml"
    config.write_text(f"model: {{name: demo}}\ndata: {{train_file: '{address}'}}\n", encoding="utf-8")
    for command in (("dataset", "info", address), ("train", "validate", config)):
        assert f"run `ft dataset pull {address}`" in refused(run(*command))
    config.write_text(f"model: {{name: {NAME}}}\ndata: {{train_file: x.jsonl}}\n", encoding="utf-8")
    assert f"Run `ft models pull {NAME}` once" in refused(run("train", "validate", config))
    assert hub.requests == []


def test_a_run_takes_its_rows_from_the_hub(run: Run, rows: Repository, tmp_path: Path) -> None:
    options = ("--model", "demo", "--data", f"hf://datasets/{DATA}", "--set", "training.max_steps=1")
    ran = run("train", *options, "--set", f"output.output_dir={tmp_path / 'run'}")
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [Path(file["path"]).name for file in record["data"]["files"]] == ["train-0.jsonl", "train-1.jsonl"]
    assert rows.commit in record["data"]["files"][0]["path"]
