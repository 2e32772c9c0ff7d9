"""The name of a store covers every byte of a model, and is quick the second time."""

import functools
import json
import os
import pathlib
import random
from collections.abc import Callable

import pytest
import xxhash

from edgekv.models import fingerprint, remembered
from edgekv.models.fingerprint import is_of_this_release, weights_fingerprint

SIZE = 9 << 20  # three chunks
LONG_AGO_NS = 10**18

Fingerprint = Callable[..., str]


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "kv" / "fingerprints.json"


@pytest.fixture
def kv_fingerprint(cache: pathlib.Path) -> Fingerprint:
    return functools.partial(fingerprint.kv_fingerprint, memory=cache)


@pytest.fixture
def weights(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    settle(path)
    return path


def settle(path: pathlib.Path) -> None:
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def flip(path: pathlib.Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def num_hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were hashed, call by call."""
    hashed: list[int] = []
    real = xxhash.xxh3_128

    class Counting:
        def __init__(self, start: bytes = b"") -> None:
            self._digest = real(start)

        def update(self, data: bytes | memoryview) -> None:
            hashed.append(len(data))
            self._digest.update(data)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr(fingerprint.xxhash, "xxh3_128", Counting)
    return hashed


@pytest.mark.parametrize("place", [0, 1 << 20, (4 << 20) - 1, 5_000_001, SIZE - 1])
def test_every_byte_counts(weights: pathlib.Path, place: int, kv_fingerprint: Fingerprint) -> None:
    before = kv_fingerprint(weights)
    flip(weights, place)
    assert kv_fingerprint(weights) != before
    flip(weights, place)
    assert kv_fingerprint(weights) == before


def test_samples_do_not_see_every_byte(weights: pathlib.Path) -> None:
    """Which is why KV does not go by them."""
    places = range(2 << 20, 3 << 20, 997)
    before = weights_fingerprint(weights)
    unseen = 0
    for place in places[:20]:
        flip(weights, place)
        unseen += weights_fingerprint(weights) == before
        flip(weights, place)
    assert unseen > 0


def test_what_predictors_were_fitted_to_is_named_as_before(weights: pathlib.Path) -> None:
    """The value is the first release's of these bytes."""
    assert weights_fingerprint(weights) == "2a40c1a8baf44f346a6b834f0c5e585a"


def test_it_is_over_what_stands_beside(weights: pathlib.Path, kv_fingerprint: Fingerprint) -> None:
    names = {kv_fingerprint(weights), kv_fingerprint(weights, "a"), kv_fingerprint(weights, True)}
    assert len(names) == 3
    assert all(is_of_this_release(name) and 32 <= len(name) <= 64 for name in names)
    assert not is_of_this_release(weights_fingerprint(weights))


def test_a_file_is_read_once(
    weights: pathlib.Path, num_hashed: list[int], kv_fingerprint: Fingerprint
) -> None:
    first = kv_fingerprint(weights)
    assert sum(num_hashed) >= SIZE
    num_hashed.clear()
    assert kv_fingerprint(weights) == first
    assert sum(num_hashed) < 100


@pytest.mark.parametrize("change", ["size", "time", "inode", "content alone"])
def test_a_file_that_is_another_is_read_again(
    weights: pathlib.Path, change: str, kv_fingerprint: Fingerprint
) -> None:
    before = kv_fingerprint(weights)
    content = bytearray(weights.read_bytes())
    content[3_000_000] ^= 1
    if change == "size":
        weights.write_bytes(content + b"!")
        settle(weights)
    elif change == "time":
        weights.write_bytes(content)
        os.utime(weights, ns=(LONG_AGO_NS, LONG_AGO_NS + 1))
    elif change == "content alone":  # as by a copy that keeps times
        weights.write_bytes(content)
        settle(weights)
    else:
        other = weights.with_name("other")
        other.write_bytes(content)
        settle(other)
        other.replace(weights)
    assert kv_fingerprint(weights) != before


def test_a_file_that_has_just_changed_is_not_trusted(
    weights: pathlib.Path, cache: pathlib.Path, kv_fingerprint: Fingerprint
) -> None:
    """It might change again within a tick of its clock."""
    os.utime(weights)
    kv_fingerprint(weights)
    assert not cache.exists()


@pytest.mark.parametrize(
    "junk", [b"", b"{", b"[1]", b'{"a": 1}', b'{"a": [1, 2, 3, 4, "short"]}', b"\xff" * 50]
)
def test_a_memory_that_makes_no_sense(
    weights: pathlib.Path, cache: pathlib.Path, junk: bytes, kv_fingerprint: Fingerprint
) -> None:
    expected = kv_fingerprint(weights)
    cache.write_bytes(junk)
    assert kv_fingerprint(weights) == expected
    (stamp,) = json.loads(cache.read_bytes()).values()
    assert stamp[:4] == [SIZE, LONG_AGO_NS, weights.stat().st_ctime_ns, weights.stat().st_ino]


def test_a_place_where_nothing_can_be_remembered(
    weights: pathlib.Path, tmp_path: pathlib.Path, kv_fingerprint: Fingerprint
) -> None:
    expected = kv_fingerprint(weights)
    (tmp_path / "file").write_text("no folder")
    nowhere = tmp_path / "file" / "fingerprints.json"
    assert fingerprint.kv_fingerprint(weights, memory=nowhere) == expected


def test_it_remembers_so_many_and_the_newest(
    weights: pathlib.Path,
    cache: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    kv_fingerprint: Fingerprint,
) -> None:
    monkeypatch.setattr(remembered, "NUM_MAX", 2)
    for number in range(3):
        path = weights.with_name(f"{number}.gguf")
        path.write_bytes(b"weights")
        settle(path)
        kv_fingerprint(path)
    assert [pathlib.Path(place).name for place in json.loads(cache.read_bytes())] == [
        "1.gguf",
        "2.gguf",
    ]
