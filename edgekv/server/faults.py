"""edgekv's errors as what a server says of them."""

from edgekv.errors import (
    CapacityError,
    ConfigError,
    EdgeKVError,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    RequestError,
    RequestTimeout,
    RuntimeClosed,
    SessionBusy,
    TooManySessions,
)
from edgekv.server.fields import Fault

RETRY_AFTER_S = 2


def fault_of(error: EdgeKVError) -> Fault:
    """Whose fault an error is, and what clients know it by."""
    message = str(error) + (f" ({error.hint})" if error.hint else "")
    match error:
        case PromptTooLong(num_tokens=int(num), tokens_max=int(most)):
            # The beginning and both phrases are what clients look for before they compact.
            return Fault(
                "context",
                f"prompt is too long: {num} tokens > {most} maximum (context_length_exceeded: this "
                f"model's maximum context length is {most} tokens): {error}",
                param="messages",
                code="context_length_exceeded",
            )
        case PromptTooLong():
            return Fault("context", message, code="context_length_exceeded")
        case RequestError() | ConfigError():
            return Fault("invalid", message)
        case QueueFull() | TooManySessions() | SessionBusy():
            return Fault("overloaded", message, retry_after_s=RETRY_AFTER_S)
        case CapacityError():
            return Fault("overloaded", message, retry_after_s=RETRY_AFTER_S)
        case RequestTimeout() | RuntimeClosed() | EngineFailed():
            return Fault("unavailable", message)
    return Fault("internal", message)
