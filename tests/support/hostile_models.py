"""Models that were made to hurt: each function takes a whole model directory and breaks or booby-traps one part."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Break = Callable[[Path], object]

TRAP = "trap.txt"  # what hostile code writes beside the model's directory, if it ever runs


class _Bomb:
    """Unpickling it runs a program."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.target)!r}, 'w').write('ran')",)


def pickled(target: Path) -> bytes:
    """A pickle that writes `target` when it is opened."""
    return pickle.dumps({"model.norm.weight": _Bomb(target)})


def write_pickled(file: Path, target: Path, *, zipped: bool = True) -> None:
    """A file as `torch.save` writes them, whose opening writes `target`."""
    if not zipped:
        file.write_bytes(pickled(target))
        return
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(target))
        archive.writestr("archive/version", "3\n")


def only_pickled(name: str, *, zipped: bool = True) -> Break:
    def apply(model: Path) -> None:
        (model / "model.safetensors").unlink()
        write_pickled(model / name, model.parent / TRAP, zipped=zipped)

    return apply


def own_code(file: str) -> Break:
    """`auto_map` in one of the files, and the Python that it names."""

    def apply(model: Path) -> None:
        known = json.loads((model / file).read_text())
        known["auto_map"] = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
        (model / file).write_text(json.dumps(known))
        (model / "evil.py").write_text(f"open({str(model.parent / TRAP)!r}, 'w').write('ran')\n")

    return apply


def header(text: bytes, *, data: bytes = b"", length: int | None = None) -> Break:
    """A safetensors file of this header, the claimed length of it, and this data."""

    def apply(model: Path) -> None:
        claimed = len(text) if length is None else length
        (model / "model.safetensors").write_bytes(claimed.to_bytes(8, "little") + text + data)

    return apply


def edited_header(edit: Callable[[dict[str, Any]], None]) -> Break:
    """The model's own safetensors file with another header."""

    def apply(model: Path) -> None:
        file = model / "model.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        edit(entries)
        text = json.dumps(entries).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return apply


def edited_json(file: str, edit: Callable[[dict[str, Any]], Any]) -> Break:
    """One of the model's JSON files, changed by `edit`, which may also return something else to put in its place."""

    def apply(model: Path) -> None:
        content = json.loads((model / file).read_text())
        changed = edit(content)
        (model / file).write_text(json.dumps(content if changed is None else changed))

    return apply


def with_values(file: str, **values: Any) -> Break:
    return edited_json(file, lambda content: content.update(values))


def with_text(file: str, text: str | bytes) -> Break:
    def apply(model: Path) -> None:
        (model / file).write_bytes(text if isinstance(text, bytes) else text.encode())

    return apply


def without(file: str) -> Break:
    return lambda model: (model / file).unlink()


def indexed(weight_map: dict[str, Any], *, move: str | None = None) -> Break:
    """An index in place of the single file, which becomes `move` (relative to the model) or stays."""

    def apply(model: Path) -> None:
        if move is not None:
            (model / "model.safetensors").rename(model / move)
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (model / "model.safetensors.index.json").write_text(text)

    return apply


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def _first(entries: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for name, entry in entries.items() if name != "__metadata__")
    return found


def _overlap(entries: dict[str, Any]) -> None:
    by_size: dict[int, list[str]] = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            by_size.setdefault(end - begin, []).append(name)
    one, other, *_ = next(names for names in by_size.values() if len(names) > 1)
    entries[one]["data_offsets"] = entries[other]["data_offsets"]


PICKLED: dict[str, Break] = {
    "bin": only_pickled("pytorch_model.bin"),
    "old bin": only_pickled("pytorch_model.bin", zipped=False),
    "pt": only_pickled("model.pt"),
    "pth": only_pickled("consolidated.00.pth"),
    "pickle called safetensors": lambda model: write_pickled(model / "model.safetensors", model.parent / TRAP),
    "index of bins": lambda model: (
        only_pickled("pytorch_model-00001-of-00001.bin")(model),
        indexed({"model.norm.weight": "pytorch_model-00001-of-00001.bin"})(model),
    )[0],
}

OWN_CODE: dict[str, Break] = {
    "auto_map in config.json": own_code("config.json"),
    "auto_map in tokenizer_config.json": own_code("tokenizer_config.json"),
    "auto_map in text_config": edited_json(
        "config.json", lambda config: {**config, "text_config": {"auto_map": {"AutoModel": "evil.Model"}}}
    ),
    "model_file": with_values("config.json", model_file="evil.py"),
}

WEIGHTS: dict[str, Break] = {
    "header of 2^63 bytes": header(b"{}", length=2**63),
    "header of 2^64 - 1 bytes": header(b"{}", length=2**64 - 1),
    "empty file": with_text("model.safetensors", b""),
    "seven bytes": with_text("model.safetensors", b"\0" * 7),
    "no tensors": header(b"{}"),
    "not JSON": header(b"\x80\x04not json"),
    "a list": header(b"[]"),
    "deep header": header(nested(20_000_000).encode()),
    "header above the limit": header(b" " * 100_000_001),
    "offsets beyond the file": edited_header(lambda entries: _first(entries).update(data_offsets=[0, 10**15])),
    "negative offsets": edited_header(lambda entries: _first(entries).update(data_offsets=[-4, 0])),
    "offsets as text": edited_header(lambda entries: _first(entries).update(data_offsets=["0", "4"])),
    "overlapping tensors": edited_header(_overlap),
    "unknown dtype": edited_header(lambda entries: _first(entries).update(dtype="F31")),
    "dtype of another size": edited_header(lambda entries: _first(entries).update(dtype="I8")),
    "huge shape": edited_header(lambda entries: _first(entries).update(shape=[2**62, 2**62])),
    "negative shape": edited_header(lambda entries: _first(entries).update(shape=[-1, -1])),
    "infinite shape": edited_header(lambda entries: _first(entries).update(shape=[float("inf")])),
    "entry that is a number": edited_header(lambda entries: entries.update({"model.norm.weight": 7})),
    "truncated data": lambda model: with_text("model.safetensors", (model / "model.safetensors").read_bytes()[:-1000])(
        model
    ),
    "missing tensor": edited_header(lambda entries: entries.pop("model.norm.weight")),
    "another name": edited_header(lambda entries: entries.update(x=entries.pop("model.norm.weight"))),
    "index to the parent": indexed({"model.norm.weight": "../model.safetensors"}, move="../model.safetensors"),
    "index to an absolute path": lambda model: indexed(
        {"model.norm.weight": str(model.parent / "outside.safetensors")}, move="../outside.safetensors"
    )(model),
    "index with NUL": indexed({"model.norm.weight": "model\0.safetensors"}),
    "index to the directory": indexed({"model.norm.weight": "."}),
    "index to the parent directory": indexed({"model.norm.weight": ".."}),
    "index to nothing": indexed({"model.norm.weight": ""}),
    "index of numbers": indexed({"model.norm.weight": 3}),
    "index of tensors that are not there": indexed({"ghost.weight": "model.safetensors"}),
    "tensors in two files": lambda model: shutil.copy(
        model / "model.safetensors", model / "model-00002-of-00002.safetensors"
    ),
    "index of too much depth": with_text("model.safetensors.index.json", nested(200_000)),
    "index that is a list": with_text("model.safetensors.index.json", "[]"),
    "index not UTF-8": with_text("model.safetensors.index.json", b"\xff\xfe\x00"),
}

CONFIGS: dict[str, Break] = {
    "not JSON": with_text("config.json", "model_type: llama"),
    "empty": with_text("config.json", ""),
    "not UTF-8": with_text("config.json", b"\xff\xfe{\x00}\x00"),
    "a list": with_text("config.json", "[]"),
    "null": with_text("config.json", "null"),
    "deep": with_text("config.json", nested(200_000)),
    "deep inside": with_text("config.json", '{"model_type": "llama", "x": ' + nested(200_000) + "}"),
    "no architecture": edited_json("config.json", lambda config: config.pop("model_type") and None),
    "architecture of nowhere": with_values("config.json", model_type="quantum"),
    "architecture with a path": with_values("config.json", model_type="../../evil"),
    "architecture with dots": with_values("config.json", model_type="..evil.os"),
    "architecture number": with_values("config.json", model_type=7),
    "10^12 layers": with_values("config.json", num_hidden_layers=10**12),
    "10^9 layers": with_values("config.json", num_hidden_layers=10**9),
    "10^5 layers": with_values("config.json", num_hidden_layers=10**5),
    "no layers": with_values("config.json", num_hidden_layers=0),
    "minus one layer": with_values("config.json", num_hidden_layers=-1),
    "layers as text": with_values("config.json", num_hidden_layers="two"),
    "layers as NaN": with_values("config.json", num_hidden_layers=float("nan")),
    "half a layer": with_values("config.json", num_hidden_layers=0.5),
    "width of 10^12": with_values("config.json", hidden_size=10**12),
    "width of 10^30": with_values("config.json", hidden_size=10**30),
    "negative width": with_values("config.json", hidden_size=-32),
    "width of zero": with_values("config.json", hidden_size=0),
    "width as text": with_values("config.json", hidden_size="32"),
    "width as list": with_values("config.json", hidden_size=[32]),
    "vocabulary of 10^15": with_values("config.json", vocab_size=10**15),
    "vocabulary of a number too large": with_values("config.json", vocab_size=10**400),
    "negative vocabulary": with_values("config.json", vocab_size=-5),
    "no heads": with_values("config.json", num_attention_heads=0),
    "heads that do not divide": with_values("config.json", num_attention_heads=7),
    "10^12 heads": with_values("config.json", num_attention_heads=10**12, num_key_value_heads=10**12),
    "activation of nowhere": with_values("config.json", hidden_act="__import__('os')"),
    "epsilon as text": with_values("config.json", rms_norm_eps="small"),
    "rope as a list": with_values("config.json", rope_scaling=[1, 2]),
    "rope of nowhere": with_values("config.json", rope_scaling={"rope_type": "warp", "factor": 2}),
    "rope parameters as text": with_values("config.json", rope_parameters="linear"),
    "quantization as text": with_values("config.json", quantization="4"),
    "quantization of 77 bits": with_values("config.json", quantization={"bits": 77, "group_size": 64}),
    "quantization in empty groups": with_values("config.json", quantization={"bits": 4, "group_size": 0}),
    "quantization_config as text": with_values("config.json", quantization_config="4"),
    "number of 5,000 digits": with_text("config.json", '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"),
    "text_config as text": with_values("config.json", text_config="x"),
    "a directory": lambda model: ((model / "config.json").unlink(), (model / "config.json").mkdir())[0],
}

TOKENIZERS: dict[str, Break] = {
    "not JSON": with_text("tokenizer.json", "a b c"),
    "empty": with_text("tokenizer.json", ""),
    "not UTF-8": with_text("tokenizer.json", b"\xff\xfe\x00\x01"),
    "a list": with_text("tokenizer.json", "[]"),
    "an empty object": with_text("tokenizer.json", "{}"),
    "deep": with_text("tokenizer.json", nested(5_000_000)),
    "deep inside": with_text("tokenizer.json", '{"version": "1.0", "model": ' + nested(5_000_000) + "}"),
    "a model of nowhere": edited_json("tokenizer.json", lambda own: own["model"].update(type="Magic")),
    "ids as text": edited_json("tokenizer.json", lambda own: own["model"].update(vocab={"a": "zero"})),
    "negative ids": edited_json("tokenizer.json", lambda own: own["model"].update(vocab={"a": -1})),
    "merges of nowhere": edited_json("tokenizer.json", lambda own: own["model"].update(merges=["x y"])),
    "no vocabulary": edited_json(
        "tokenizer.json", lambda own: (own["model"].update(vocab={}, merges=[]), own.update(added_tokens=[]))[0]
    ),
    "more tokens than embeddings": edited_json(
        "tokenizer.json", lambda own: own["model"]["vocab"].update({"S": 1000, "e": 2**31})
    ),
    "missing": without("tokenizer.json"),
    "a directory": lambda model: ((model / "tokenizer.json").unlink(), (model / "tokenizer.json").mkdir())[0],
    "settings not JSON": with_text("tokenizer_config.json", "x"),
    "settings not UTF-8": with_text("tokenizer_config.json", b"\xff\xfe\x00"),
    "settings deep": with_text("tokenizer_config.json", nested(200_000)),
    "settings deep inside": with_text("tokenizer_config.json", '{"x": ' + nested(200_000) + "}"),
}

LOOPS = (
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
TEMPLATES: dict[str, str] = {
    "nested loops": LOOPS,
    "a text of 10^9 characters": "{{ 'x' * 1000000000 }}",
    "10^9 characters by doubling": (
        "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "10^9 characters by replacing": "{{ ('x' * 30000) | replace('x', 'x' * 30000) }}",
    "10^9 characters by replace, the method": "{{ ('x' * 30000).replace('x', 'x' * 30000) }}",
    "10^9 characters by joining": "{{ (['x' * 30000] * 30000) | join }}",
    "10^9 characters by join, the method": "{{ ('x' * 30000).join(['y'] * 30000) }}",
    "10^9 characters by translation": "{{ ('x' * 30000).translate({120: 'y' * 30000}) }}",
    "10^9 characters by indenting": "{{ ('x\n' * 30000) | indent(30000) }}",
    "10^9 characters by wrapping": "{{ ('x' * 30000) | wordwrap(1, wrapstring='y' * 30000) }}",
    "10^9 characters by formatting": "{{ '%s' * 30000 % ((['x' * 30000] * 30000) | list) }}",
    "10^9 characters by tojson": "{{ messages | tojson(indent=1000000000) }}",
    "10^9 characters by dictsort": "{{ dict(a=1) | tojson(indent=1000000000) }}",
    "10^9 entries of a batch": "{{ [1] | batch(1000000000, 'x') | list | length }}",
    "10^9 entries of slices": "{{ [1] | slice(1000000000) | list | length }}",
    "10^9 entries of a range": "{{ range(1000000000) | list | length }}",
    "a sum of lists": "{{ ([['x'] * 30000] * 30000) | sum(start=[]) | length }}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "recursive loop that branches": (
        "{% for x in [40] recursive %}{% if x %}{{ loop([x - 1, x - 1]) }}{% endif %}{% endfor %}"
    ),
    "power": "{{ 9 ** 999999999 }}",
    "power by steps": (
        "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}"
    ),
    "shift by a width": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format with a star": "{{ '%*d' % (1000000000, 1) }}",
    "format with its own width": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "globals through raise_exception": "{{ raise_exception.__globals__['__builtins__']['open']('trap', 'w') }}",
    "globals through a filter": "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "attr filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "deep parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "deep blocks": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "a long chain": "{{ " + "1 + " * 100_000 + "1 }}",
    "not Jinja": "{% for %}",
    "includes a file": "{% include '/etc/passwd' %}",
    "imports a file": "{% import '/etc/passwd' as x %}{{ x }}",
    "extends a file": "{% extends '/etc/passwd' %}",
    "says no": "{{ raise_exception('only for experts') }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "sleeping by regular expression": "{{ ('a' * 40 ~ '!') | urlize }}{{ ('<' * 500000) | striptags }}",
    "sorting": "{{ (['x' * 1000] * 1000000) | sort | length }}",
}
