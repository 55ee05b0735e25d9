"""Adapters that come and go while the server runs, from one directory and nowhere else."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune.core.errors import FinetuneError
from finetune.generation.prompts import Prompter
from finetune.serving.catalogue import Catalogue, ServedModel
from finetune.serving.errors import invalid
from finetune.serving.worker import Worker


@dataclass(frozen=True, slots=True)
class OpenedAdapter:
    """An adapter's files were looked at: where its weights are, and how its prompts are made."""

    directory: Path
    prompter: Prompter


# Looks at a directory below the allowed root (the second argument). Raises FinetuneError where it cannot be served.
OpenAdapter = Callable[[Path, Path], OpenedAdapter]


def path_below(root: Path, given: str) -> Path:
    """The directory that a client names. Raises ApiError (400) for everything that is not below `root`.

    Links are followed before the comparison, so that none leads out.
    """
    pure = PurePosixPath(given)
    if "\0" in given or "\\" in given or pure.is_absolute() or ".." in pure.parts or given.startswith("~"):
        raise invalid("lora_path must be relative to the server's adapter directory, without `..`.", "lora_path")
    try:
        path = (root / pure).resolve()
        inside, there = path.is_relative_to(root.resolve()), path.is_dir()
    except (OSError, RuntimeError, ValueError):  # names that are too long, links in a circle
        inside, there = True, False
    if not inside:
        raise invalid("lora_path leads out of the server's adapter directory.", "lora_path")
    if not there:
        raise _not_there(given)
    return path


def _not_there(given: str) -> Exception:
    return invalid(f"There is no adapter {given!r} in the server's adapter directory.", "lora_path")


class Adapters:
    """Loads and unloads, one at a time. `root` None: clients may do neither."""

    def __init__(self, catalogue: Catalogue, worker: Worker, open_adapter: OpenAdapter, root: Path | None) -> None:
        self._catalogue = catalogue
        self._worker = worker
        self._open = open_adapter
        self._root = root
        self._numbers = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()

    @property
    def can_change(self) -> bool:
        """Whether clients may load and unload."""
        return self._root is not None

    async def load(self, name: str, given: str) -> ServedModel:
        """Put an adapter into memory and serve it. Raises ApiError (400)."""
        assert self._root is not None
        async with self._one_at_a_time:
            if name in self._catalogue.names:
                raise invalid(f"The name {name!r} is taken. Unload it first, or choose another.", "lora_name")
            path = path_below(self._root, given)
            # The engine's name is new each time: answers of an adapter that was just unloaded may still be decoding.
            engine_name = f"{name}#{next(self._numbers)}"
            try:
                opened = await asyncio.to_thread(self._open, path, self._root.resolve())
                loading = self._worker.call(lambda session: session.load_adapter(engine_name, opened.directory))
                await asyncio.wrap_future(loading)
            except FinetuneError as error:
                reason = str(error).replace(str(self._root.resolve()), "").replace(str(self._root), "")
                raise invalid(f"The adapter cannot be loaded: {reason}", "lora_path") from None
            model = ServedModel(name, opened.prompter, given, engine_name, self._catalogue.base.id)
            self._catalogue.add(model)
            return model

    async def unload(self, name: str) -> None:
        """Stop serving an adapter now; its weights go when its last answer has ended. Raises ApiError (400, 404)."""
        async with self._one_at_a_time:
            adapter = self._catalogue.remove(name).adapter
            assert adapter is not None
            self._worker.call(lambda session: session.unload_adapter(adapter), when_idle=adapter)
