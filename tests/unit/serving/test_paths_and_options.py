"""What may be loaded from where, and the options of `ft serve`."""

import importlib.util
from pathlib import Path

import pytest

from finetune.cli.serve import gathered_keys, named_paths, root_of_loading
from finetune.core.errors import UsageError
from finetune.serving.adapters import path_below
from finetune.serving.errors import ApiError
from finetune.serving.settings import ServerSettings
from finetune.workflows.serve import access_warnings, serve


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "mine").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "in").symlink_to(tmp_path / "root" / "mine")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root" / "circle")
    return tmp_path / "root"


ELSEWHERE = [
    "../elsewhere",
    "out",
    "/etc",
    "mine/../../elsewhere",
    "a\0b",
    "~root",
    "..\\x",
    "circle",
    "n" * 5000,
    "no",
]


@pytest.mark.parametrize("given", ELSEWHERE)
def test_a_path_that_leads_elsewhere_is_refused(root: Path, given: str) -> None:
    with pytest.raises(ApiError) as refused:
        path_below(root, given)
    assert refused.value.status == 400
    assert str(root) not in refused.value.message


def test_a_path_inside_is_found_also_through_a_link_inside(root: Path) -> None:
    assert path_below(root, "mine") == path_below(root, "in") == (root / "mine").resolve()


def test_a_root_that_is_a_link_itself_works(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert path_below(tmp_path / "alias", "mine") == (root / "mine").resolve()


def test_keys_come_from_options_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_API_KEY", "two")
    file = tmp_path / "keys"
    file.write_text("# mine\nthree\n\none\n")
    assert gathered_keys(["one"], file) == ("one", "two", "three")
    file.write_text("\n")
    with pytest.raises(UsageError, match="holds no key"):
        gathered_keys([], file)


@pytest.mark.parametrize("key", ["", "a b", "ключ", "a\n"])
def test_a_key_that_no_header_carries_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(UsageError) as refused:
        gathered_keys([key], None)
    assert not key.strip() or key not in str(refused.value)


def test_adapters_are_pairs_of_a_name_and_a_path() -> None:
    assert named_paths(["a=x", "b=y=z"]) == {"a": Path("x"), "b": Path("y=z")}


def test_loading_needs_both_options(tmp_path: Path) -> None:
    assert root_of_loading(False, None) is None
    assert root_of_loading(True, tmp_path) == tmp_path
    with pytest.raises(UsageError, match="not a directory"):
        root_of_loading(True, tmp_path / "none")


def test_settings_never_show_keys() -> None:
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))


def test_an_open_door_is_warned_about() -> None:
    assert access_warnings(ServerSettings(host="0.0.0.0"))
    assert not access_warnings(ServerSettings(host="0.0.0.0", api_keys=("k",)))
    assert not access_warnings(ServerSettings())


def test_without_the_extra_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    with pytest.raises(UsageError, match=r"needs uvicorn: pip install 'finetune\[serve\]'"):
        serve("demo")
