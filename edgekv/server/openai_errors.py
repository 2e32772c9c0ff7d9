"""Why a request is not answered, as OpenAI's APIs say it."""

from typing import Any

from edgekv.server.fields import Fault, FaultKind

_TYPES: dict[FaultKind, str] = {
    "overloaded": "rate_limit_exceeded",
    "internal": "server_error",
    "unavailable": "server_error",
}
# Words that clients branch on; a fault's own code goes before them.
_CODES: dict[FaultKind, str] = {
    "context": "context_length_exceeded",
    "unauthorized": "invalid_api_key",
    "overloaded": "rate_limit_exceeded",
}


def openai_error(fault: Fault) -> dict[str, Any]:
    """The body of an answer with the fault's status, or an event of a stream that began."""
    error = {
        "message": fault.message,
        "type": _TYPES.get(fault.kind, "invalid_request_error"),
        "param": fault.param or None,
        "code": fault.code or _CODES.get(fault.kind),
    }
    return {"error": error}
