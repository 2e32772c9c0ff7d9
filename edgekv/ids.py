"""Identifiers: opaque, cheap to compare, never reused within a process."""

import itertools
from typing import NewType

RequestId = NewType("RequestId", int)
SessionId = NewType("SessionId", int)

_request_ids = itertools.count(1)
_session_ids = itertools.count(1)


def new_request_id() -> RequestId:
    """A request id that no other request of this process has (itertools.count is atomic)."""
    return RequestId(next(_request_ids))


def new_session_id() -> SessionId:
    """A session id that no other session of this process has."""
    return SessionId(next(_session_ids))
