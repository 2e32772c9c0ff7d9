"""Options of policy, swap and store: checked at the door."""

from pathlib import Path
from typing import Any

import pytest

from edgekv.config import (
    PredictionOptions,
    RuntimeConfig,
    SamplingParams,
    StoreOptions,
    SwapOptions,
)
from edgekv.errors import ConfigError


def test_defaults_are_allowed() -> None:
    config = RuntimeConfig()
    assert (config.policy, config.swap.mode, config.store.folder) == ("fair", "reuse", None)


def test_folders_are_paths() -> None:
    assert StoreOptions(folder="/tmp/kv").folder == Path("/tmp/kv")  # type: ignore[arg-type]
    assert StoreOptions(folder=Path("~/kv")).folder == Path.home() / "kv"


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (StoreOptions, "disk_bytes", -1),
        (StoreOptions, "disk_bytes", 1.5),
        (StoreOptions, "disk_bytes", True),
        (StoreOptions, "free_reserve_bytes", -1),
        (StoreOptions, "folder", ""),
        (StoreOptions, "folder", 3),
        (StoreOptions, "folder", "/tmp/a\0b"),
        (StoreOptions, "folder", "/tmp/\ud800"),
        (SwapOptions, "mode", "fast"),
        (SwapOptions, "mode", "naive"),
        (PredictionOptions, "predictor", "\0"),
        (PredictionOptions, "predictor", ""),
        (PredictionOptions, "aux", "a\0b"),
        (PredictionOptions, "aux", Path("x")),
        (SamplingParams, "ignore_eos", "yes"),
        (SwapOptions, "mode", ["reuse"]),
        (SwapOptions, "group_bytes", 0),
        (SwapOptions, "staging_bytes", -1),
        (SwapOptions, "num_readers", 0),
        (SwapOptions, "num_writers", 65),
        (RuntimeConfig, "policy", "lottery"),
        (RuntimeConfig, "policy", None),
        (RuntimeConfig, "chat_template", 5),
        (RuntimeConfig, "swap", None),
        (RuntimeConfig, "store", {}),
    ],
)
def test_what_is_not_allowed_is_named(kind: type[Any], field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        kind(**{field: value})
    assert field in caught.value.hint
    assert repr(value) in str(caught.value)
