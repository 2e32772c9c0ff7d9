"""Files on the Hugging Face Hub of which only some bytes are fetched, by range requests.

Through huggingface-hub's session, so its endpoint, tokens and proxies hold; nothing is cached.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from edgekv.errors import DownloadError
from edgekv.models.hub_errors import STRANGER_HINT
from edgekv.models.listing import TIMEOUT_S, Listing

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FIRST_BYTES = 128 << 10  # most headers of safetensors files are shorter
_NUM_RETRIES = 2  # of a request that failed for what may pass
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18})")


class RemoteFile(io.RawIOBase):
    """A file to be read from its beginning on, of which `fetched` has come. Owned by one thread.

    A request asks for as much again as came before it: nobody knows where a header ends before
    having read it.

    Raises:
        DownloadError: What came is not what was asked for; others see `hub_errors.typed_errors`.
    """

    def __init__(self, listing: Listing, name: str) -> None:
        self._listing, self._name = listing, name
        self._position = 0
        start, self.num_bytes = fetch_range(listing, name, 0, FIRST_BYTES)
        self.fetched = bytearray(start)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is, and seeking fetches nothing."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, which is returned."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill `buffer` as far as the file goes, and say how far that was."""
        view = memoryview(buffer).cast("B")
        here, end = len(self.fetched), min(self._position + len(view), self.num_bytes)
        if end > here:
            more, _ = fetch_range(self._listing, self._name, here, max(end, 2 * here))
            self.fetched += more
        part = self.fetched[self._position : end]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)


def fetch_range(listing: Listing, name: str, start: int, end: int) -> tuple[bytes, int]:
    """The bytes `[start, end)` of a file, as far as it goes, and how many all of it has.

    Raises:
        DownloadError: Something else came; others see `hub_errors.typed_errors`.
    """
    with _response(listing, name, {"Range": f"bytes={start}-{end - 1}"}) as response:
        place = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if place is None:
            _fail(listing, name, f"was answered by {response.status_code}, not by a part of it")
        num_bytes = int(place[2])
        if (listed := listing.sizes[name]) not in (None, num_bytes):
            _fail(listing, name, f"has {num_bytes:,} bytes, not {listed:,}")
        if response.status_code == 416 and start >= num_bytes:  # there is no such part
            return b"", num_bytes
        end = min(end, num_bytes)
        body = _read(response, end - start)
    if place[1] != str(start) or len(body) < end - start:
        _fail(listing, name, f"came with other bytes than {start:,} to {end:,}")
    return body, num_bytes


def fetch_whole(listing: Listing, name: str, bytes_max: int) -> bytes:
    """A small file, or the first `bytes_max` bytes of one that is not; see `fetch_range`."""
    with _response(listing, name, {}) as response:
        body = _read(response, bytes_max)
    if len(body) < bytes_max and (listed := listing.sizes[name]) not in (None, len(body)):
        _fail(listing, name, f"came with {len(body):,} bytes, not {listed:,}")
    return body


@contextmanager
def _response(listing: Listing, name: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a GET, whose body has not been read; HTTP's errors are raised."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it has no `__all__`
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    with http_stream_backoff(
        "GET",
        hf_hub_url(listing.repo, name, revision=listing.commit),
        headers=build_hf_headers() | {"Accept-Encoding": "identity"} | headers,
        timeout=TIMEOUT_S,
        max_retries=_NUM_RETRIES,
    ) as response:
        if response.status_code != 416:
            hf_raise_for_status(response)
        yield response


def _read(response: Any, bytes_max: int) -> bytes:
    """The body, or its beginning: who ignores what was asked for may send a whole model."""
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) >= bytes_max:
            break
    return bytes(body[:bytes_max])


def _fail(listing: Listing, name: str, what: str) -> NoReturn:
    raise DownloadError(f"{name} of {listing.repo} {what}", hint=STRANGER_HINT)
