"""No file, variable or override makes loading fail with anything but a ConfigError."""

import contextlib
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from finetune.config.load import load_config
from finetune.config.options import options, sections
from finetune.core.errors import ConfigError

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
words = st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([option.name for option in options().values()]) | st.text(max_size=8)
bodies = st.dictionaries(names, values, max_size=5) | values
documents = st.dictionaries(st.sampled_from(list(sections())) | st.text(max_size=8), bodies, max_size=5)
quick = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def never_a_fault(path: Path, **layers: object) -> None:
    with contextlib.suppress(ConfigError):
        load_config(path, **{"environ": {}, **layers})  # type: ignore[arg-type]


@quick
@given(document=documents)
def test_any_mapping_loads_or_is_explained(tmp_path: Path, document: dict[str, object]) -> None:
    path = tmp_path / "any.yml"
    with path.open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(document, stream)

    never_a_fault(path)


@quick
@given(content=st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>%@`'\"#, \n\t0.e", max_size=60).map(str.encode))
def test_any_bytes_load_or_are_explained(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yml"
    path.write_bytes(content)

    never_a_fault(path)


@quick
@given(
    texts=st.lists(st.text(max_size=30) | st.sampled_from(list(options())).map(lambda key: f"{key}=[1, x"), max_size=4)
)
def test_any_override_is_taken_or_explained(tmp_path: Path, texts: list[str]) -> None:
    variables = {f"FT_{text.upper()}": text for text in texts}

    never_a_fault(tmp_path / "none.yml", overrides=texts, environ=variables)
