"""`ft models pull`, `ft dataset pull`, and what a run does first: have what is on the hub on this machine."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.config.load import LoadedConfig, plain
from finetune.config.schema import DataConfig, DataFile, ModelConfig, RunConfig
from finetune.core.errors import ModelError, UsageError
from finetune.data.hub import fetch_data, is_address, look_up_data, parse_address
from finetune.data.load import training_files
from finetune.data.tokenizer import TextTokenizer
from finetune.hub import cache, client
from finetune.models.hub import fetch_model, look_up_model
from finetune.models.source import is_hub_model, resolve_model

OnNotice = Callable[[str], None]
OnStart = Callable[[client.Repository], None]

_SHARES = 10  # lines that a long download says


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model or a data set that is whole in the cache: every file has the hash that the hub gives."""

    name: str
    revision: str  # the commit
    path: Path  # the model's directory; the only file of a data set, or the directory of several
    files: tuple[Path, ...]
    bytes: int  # of all its files
    downloaded: int  # bytes of those that were not there


def pull_model(
    name: str,
    *,
    revision: str | None = None,
    on_start: OnStart = lambda repository: None,
    on_bytes: client.OnBytes = lambda count: None,
) -> Pulled:
    """Download what is missing of a model, check every file, and see that it can be used.

    Raises UsageError for what is no name of the hub, and ModelError for what the hub, the disk or the model's files
    refuse.
    """
    if not is_hub_model(name):
        raise UsageError(
            f"{name} is not the name of a model on the hub, such as owner/model. There is nothing to pull."
        )
    model = look_up_model(name, revision)
    missing = sum(file.size for file in model.missing())
    on_start(model)
    path = fetch_model(model, on_bytes=on_bytes, check=_check_without_weights)
    resolve_model(name, revision=model.commit)
    files = tuple(path / file.name for file in model.files)
    return Pulled(name, model.commit, path, files, model.bytes, missing)


def _check_without_weights(directory: Path) -> None:
    """Raise ModelError for a description or a tokenizer with which no run could start."""
    resolve_model(str(directory), weights=False)
    TextTokenizer.open(directory)


def pull_data(
    address: str, *, on_start: OnStart = lambda repository: None, on_bytes: client.OnBytes = lambda count: None
) -> Pulled:
    """Download the files that an address (hf://datasets/owner/name[@revision][/path]) means. Raises DataError."""
    data = look_up_data(parse_address(address))
    missing = sum(file.size for file in data.missing())
    on_start(data)
    files = fetch_data(data, on_bytes=on_bytes)
    path = files[0] if len(files) == 1 else files[0].parent
    return Pulled(data.name, data.commit, path, files, data.bytes, missing)


def bring(given: RunConfig | LoadedConfig, on_notice: OnNotice) -> RunConfig | LoadedConfig:
    """Pull what a run needs from the hub and is not whole in the cache; data of the hub become files of the cache."""
    config = plain(given)
    _bring_model(config.model, on_notice)
    data = _bring_data(config.data, on_notice)
    if data == config.data:
        return given
    config = config.model_copy(update={"data": data})
    return replace(given, config=config) if isinstance(given, LoadedConfig) else config


def _bring_model(model: ModelConfig, on_notice: OnNotice) -> None:
    if model.init != "pretrained" or not is_hub_model(model.name) or _is_usable(model):
        return
    progress = _Shares(on_notice)
    pulled = pull_model(model.name, revision=model.revision, on_start=progress.start, on_bytes=progress.add)
    on_notice(f"{pulled.name} is in {pulled.path}; all {len(pulled.files)} files have the hashes that the hub gives.")


def _is_usable(model: ModelConfig) -> bool:
    if cache.find_snapshot(model.name, model.revision) is None:
        return False
    try:
        resolve_model(model.name, revision=model.revision)
    except ModelError:
        return False
    return True


def _bring_data(data: DataConfig, on_notice: OnNotice) -> DataConfig:
    files: list[str | DataFile] = []
    for entry in training_files(data.train_file):
        paths = _local(entry.path, on_notice) if is_address(entry.path) else (entry.path,)
        files += [entry.model_copy(update={"path": path}) for path in paths]
    changed = any(is_address(entry.path) for entry in training_files(data.train_file))
    validation = data.validation_file
    if validation is not None and is_address(validation):
        paths = _local(validation, on_notice)
        if len(paths) > 1:
            raise UsageError(
                f"data.validation_file={validation} means {len(paths)} files. Add the path of one of them."
            )
        validation = paths[0]
    update = {"train_file": tuple(files) if changed else data.train_file, "validation_file": validation}
    return data.model_copy(update=update)


def _local(address: str, on_notice: OnNotice) -> tuple[str, ...]:
    progress = _Shares(on_notice)
    pulled = pull_data(address, on_start=progress.start, on_bytes=progress.add)
    names = ", ".join(path.name for path in pulled.files)
    on_notice(f"{address} is {names} at commit {pulled.revision[:12]}, whole and checked.")
    return tuple(map(str, pulled.files))


class _Shares:
    """Says how a download goes, a tenth at a time; nothing where all is there."""

    def __init__(self, on_notice: OnNotice) -> None:
        self._say = on_notice
        self._total = self._done = self._said = 0

    def start(self, repository: client.Repository) -> None:
        missing = repository.missing()
        self._total = sum(file.size for file in missing)
        if missing:
            self._say(
                f"Downloading {repository.name} ({repository.commit[:12]}) from {client.endpoint()}: "
                f"{client.megabytes(self._total)} in {len(missing)} files."
            )

    def add(self, count: int) -> None:
        self._done += count
        share = _SHARES * self._done // max(1, self._total)
        if self._said < share < _SHARES:
            self._said = share
            self._say(f"{share * 100 // _SHARES} % of {client.megabytes(self._total)}")
