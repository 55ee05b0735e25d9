"""llama.cpp itself, as the wheel `xllamacpp` carries it: its K-quants, and its server to check what was written.

The server runs in a process of its own (`python -m finetune.export.llamacpp`), because llama.cpp ends the process
that gives it a file it cannot use. It listens on loopback, behind a key that only this process knows, and ends when
its standard input closes.
"""

import ctypes
import json
import os
import secrets
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.core.errors import FinetuneError, ModelError, UsageError
from finetune.core.types import FloatArray

PACKAGE = "xllamacpp"
_READY = "listening "
_ANSWER_SECONDS = 600.0
_LOG_LINES = 3


def is_installed() -> bool:
    """Whether the wheel is there; nothing is loaded."""
    return find_spec(PACKAGE) is not None


def require_installed(what_for: str) -> None:
    """Raises UsageError where the wheel is missing. `what_for` begins the sentence."""
    if not is_installed():
        raise UsageError(
            f"{what_for} needs llama.cpp's own code, and {PACKAGE} is not installed. "
            "Run `pip install 'finetune[llamacpp]'`."
        )


def quantize_rows(rows: FloatArray, type_number: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Rows [N, columns] in a type of ggml, [N, row_bytes]: what `llama-quantize` computes without an importance matrix.

    The caller checks that the type's block divides the columns.
    """
    values = np.ascontiguousarray(rows, np.float32)
    packed = np.empty((values.shape[0], row_bytes), np.uint8)
    pointer = values.ctypes.data_as(ctypes.c_void_p)
    shape = (ctypes.c_int64(0), ctypes.c_int64(values.shape[0]), ctypes.c_int64(values.shape[1]))
    written = _library().ggml_quantize_chunk(
        ctypes.c_int(type_number), pointer, packed.ctypes.data_as(ctypes.c_void_p), *shape, None
    )
    if written != packed.nbytes:
        raise FinetuneError(
            f"llama.cpp wrote {written:,} bytes of type {type_number} where {packed.nbytes:,} belong. "
            f"Install the version of {PACKAGE} that this one was tested with, or choose q8_0."
        )
    return packed


@cache
def _library() -> Any:
    require_installed("This quantisation")
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for place in places for file in sorted(Path(place).glob(f"{PACKAGE}*")) if file.suffix in _LIBRARIES]
    for file in files:
        library = ctypes.CDLL(str(file))
        if hasattr(library, "ggml_quantize_chunk"):
            library.ggml_quantize_chunk.restype = ctypes.c_size_t
            return library
    raise FinetuneError(
        f"{PACKAGE} on this system does not offer llama.cpp's quantisation. Choose q8_0, or write f16 and run "
        "`llama-quantize` on it."
    )


_LIBRARIES = {".so", ".pyd", ".dylib"}


class LlamaCpp:
    """A running llama.cpp server with one model."""

    def __init__(self, address: str, key: str) -> None:
        self._address, self._key = address, key
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def tokenize(self, text: str, *, special: bool = True, add_special: bool = False) -> list[int]:
        """Token ids of a text; `special` recognises special tokens in it, `add_special` adds BOS as the file says."""
        body = {"content": text, "add_special": add_special, "parse_special": special}
        return [int(token) for token in self._post("/tokenize", body)["tokens"]]

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The file's chat template on a conversation, with the header of the answer that comes next."""
        return str(self._post("/apply-template", {"messages": list(messages), **options})["prompt"])

    def next_logprobs(self, ids: Iterable[int], vocabulary: int, *, top: int | None = None) -> FloatArray:
        """log p of the tokens after `ids` [vocabulary], in nats; minus infinity for all but the `top` most likely."""
        body = {
            "prompt": [int(token) for token in ids],
            "n_predict": 1,
            "n_probs": min(top or vocabulary, vocabulary),
            "cache_prompt": True,
            # Whatever is likely, a letter is chosen: half of a character would be withheld with its probabilities,
            # which are those before any choosing.
            "temperature": 0.0,
            "logit_bias": [[self._letter, 1e6]],
        }
        first = self._post("/completion", body)["completion_probabilities"][0]
        found = np.full(vocabulary, -np.inf, np.float32)
        entries = first["top_logprobs"]
        found[[entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        return found

    def complete(self, ids: Sequence[int], *, max_tokens: int, stop: Sequence[str] = ()) -> str:
        """The greedy continuation of `ids` as text, up to EOS, a stop string or `max_tokens`."""
        body = {
            "prompt": [int(token) for token in ids],
            "n_predict": max_tokens,
            "temperature": 0.0,
            "stop": list(stop),
        }
        return str(self._post("/completion", body)["content"])

    @cached_property
    def _letter(self) -> int:
        return self.tokenize("a")[-1]

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(f"{self._address}{path}", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            raise ModelError(f"llama.cpp refused {path}: {text[:500]}") from error
        except OSError as error:
            raise ModelError(f"llama.cpp ended while it was asked for {path} ({error}).") from error


@contextmanager
def serve(
    model: Path, *, lora: Path | None = None, context: int = 2048, threads: int | None = None
) -> Iterator[LlamaCpp]:
    """A server for as long as the block lasts. Raises ModelError with llama.cpp's own words where it cannot load."""
    require_installed("Running a GGUF file")
    key = secrets.token_hex(16)
    task = {
        "model": str(model.resolve()),
        "lora": None if lora is None else str(lora.resolve()),
        "context": context,
        "threads": threads or _threads(),
        "key": key,
    }
    with tempfile.TemporaryFile() as log, _worker(log) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line.startswith(_READY):
            raise ModelError(f"llama.cpp cannot load {model.name}: {_last_words(log)}")
        yield LlamaCpp(line.removeprefix(_READY).strip(), key)


@contextmanager
def _worker(log: Any) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "finetune.export.llamacpp"]
    source = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _threads() -> int:
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdecimal() and int(limit) else os.cpu_count() or 1


def _last_words(log: Any) -> str:
    """What llama.cpp wrote about its failure: its last lines that speak of one."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "fail" in line.lower() or "assert" in line.lower()]
    return "; ".join((telling or lines)[:_LOG_LINES]) or "it ended without a word"


def _serve_until_closed() -> None:
    """The other process: load the model, say where it listens, end with standard input."""
    import xllamacpp

    task = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = task["model"]
    params.n_ctx = task["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = task["threads"]
    params.cpuparams_batch.n_threads = task["threads"]
    params.n_threads_http = 2
    # Keys and values in float32: half precision there would hide differences of the weights.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [task["key"]]
    params.n_gpu_layers = 0
    params.warmup = params.ui = params.fit_params = False
    params.swa_full = True
    params.cache_ram_mib = 0
    if task["lora"] is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(task["lora"], 1.0)]
    server = xllamacpp.Server(params)
    print(f"{_READY}{server.listening_address}", flush=True)  # noqa: T201 - the other end reads it
    sys.stdin.read()
    os._exit(0)  # llama.cpp's threads have nothing to save


if __name__ == "__main__":
    _serve_until_closed()
