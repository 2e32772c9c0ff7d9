"""What a rank is told, and what of it is garbled."""

import json

import pytest

from edgekv.errors import ConfigError
from edgekv.ranks import launched as module
from edgekv.ranks.launched import VARIABLE, Launched, launched, read

PLACE = Launched(
    rank=1,
    size=2,
    backend="ring",
    control="10.0.0.1:32323",
    token="secret",
    hosts=("10.0.0.1", "10.0.0.2"),
    mlx_files={"MLX_HOSTFILE": '[["10.0.0.1:5"], ["10.0.0.2:5"]]'},
    line=0,
)


@pytest.fixture(autouse=True)
def _read_anew():
    launched.cache_clear()
    yield
    launched.cache_clear()


def test_what_is_written_is_read():
    assert read(PLACE.variable()) == PLACE
    assert PLACE.control_address == ("10.0.0.1", 32323)
    assert PLACE.name(1) == "rank 1 (10.0.0.2)"


def test_it_is_read_once_and_no_child_takes_itself_for_a_rank(monkeypatch):
    monkeypatch.setenv(VARIABLE, PLACE.variable())
    assert launched() == PLACE
    assert VARIABLE not in module.os.environ
    assert launched() == PLACE


def test_who_was_not_launched_is_no_rank(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert launched() is None


def test_the_token_is_not_shown():
    assert "secret" not in repr(PLACE)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "{}", '{"rank": 0}'])
def test_garbled_text_is_an_error_that_names_the_variable(text):
    with pytest.raises(ConfigError, match=VARIABLE):
        read(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 2),
        ("rank", -1),
        ("rank", "1"),
        ("rank", True),
        ("size", 0),
        ("size", 65),
        ("hosts", ["10.0.0.1"]),
        ("hosts", [1, 2]),
        ("hosts", "10.0.0.1"),
        ("backend", None),
        ("control", "10.0.0.1"),
        ("control", ":5"),
        ("control", "10.0.0.1:0"),
        ("control", "10.0.0.1:65536"),
        ("control", "10.0.0.1:x"),
        ("mlx_files", {"MLX_HOSTFILE": 3}),
        ("mlx_environ", []),
        ("line", "0"),
        ("port", 3),
    ],
)
def test_a_garbled_field_is_named(field, value):
    fields = json.loads(PLACE.variable()) | {field: value}
    with pytest.raises(ConfigError, match=field):
        read(json.dumps(fields))
