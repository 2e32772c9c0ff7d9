"""Every error that edgekv raises on purpose, and whose fault it is.

    EdgeKVError
    ├── ConfigError        exit code 2, as of the next; 1 of all others
    ├── RequestError       PromptEmpty, PromptTooLong, ChatTemplateError, GrammarError
    ├── ModelError         ModelNotFound, DownloadError, UnsupportedModel, CheckpointCorrupt,
    │                      TokenizerError, LogitsNotFinite, PredictorNotFound, PredictorCorrupt,
    │                      PredictorMismatch
    ├── CapacityError      PoolTooSmall, TooManySessions, QueueFull
    ├── StoreError         StoreBusy, StoreUnusable, StoreFull, StoreStale, RecordCorrupt, NotKept
    ├── RequestCancelled   RequestTimeout
    ├── RuntimeClosed      ForkedProcess, DaemonGone
    ├── ServeError         AppsUnusable, SocketUnusable
    └── AnswerInvalid, SessionBusy, EngineFailed

An error's message says what happened with its figures; its `hint` says what to do about it.
"""

from pathlib import Path
from typing import ClassVar

# Of a model that edgekv fetched; what is a user's own comes from where it came.
FETCH_AGAIN = "edgekv pull --force MODEL fetches it again"
_SHOWN_CHARS_MAX = 200


class EdgeKVError(Exception):
    """Base of all errors raised on purpose; `str(error)` is one line, `hint` another."""

    exit_code: ClassVar[int] = 1
    usual_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.usual_hint


class ConfigError(EdgeKVError):
    """An option has a value that is not allowed."""

    exit_code = 2

    @classmethod
    def of(cls, field: str, value: object, allowed: str) -> "ConfigError":
        """Name the field, the value and what is allowed."""
        return cls(f"{field} is {_shown(value)}", hint=f"{field} must be {allowed}")


class RequestError(EdgeKVError):
    """This request cannot be served as asked; the session is as it was before."""

    exit_code = 2


class PromptEmpty(RequestError):
    """There is nothing to answer."""


class PromptTooLong(RequestError):
    """The prompt exceeds the model's context or what the pool can ever hold."""

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        num_tokens: int | None = None,
        tokens_max: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.num_tokens = num_tokens  # of the prompt, if that was counted
        self.tokens_max = tokens_max


class ChatTemplateError(RequestError):
    """The model's chat template is malformed or refused these messages."""


class GrammarError(RequestError):
    """What the answer must look like cannot be compiled or satisfied; of a schema it says where."""


class ModelError(EdgeKVError):
    """The model cannot be had, or is not what it says it is."""


class ModelNotFound(ModelError):
    """No model has this name and no file or folder stands at this path."""


class DownloadError(ModelError):
    """The network, the index or the disk did not deliver."""


class UnsupportedModel(ModelError):
    """A valid checkpoint of a kind that edgekv does not run."""


class CheckpointCorrupt(ModelError):
    """A file is truncated, malformed, or lacks or misshapes a tensor."""

    usual_hint = f"the file is damaged or incomplete: {FETCH_AGAIN}"


class LogitsNotFinite(ModelError):
    """The model computed something that is no number; this request ends, and its KV is forgotten.

    The session is as it was before, and others go on.
    """

    usual_hint = (
        f"if it happens with any prompt the weights are damaged, {FETCH_AGAIN}; "
        "else they overflow in this precision"
    )


class TokenizerError(ModelError):
    """The tokenizer is missing, malformed or of an unknown kind."""


class PredictorNotFound(ModelError):
    """No KV predictor for this model has this name, and no file stands at this path."""


class PredictorCorrupt(ModelError):
    """A KV predictor's file is truncated, malformed or of a version that is not known."""

    usual_hint = "fit it again with edgekv fit"


class PredictorMismatch(ModelError):
    """A KV predictor was fitted to another base, auxiliary or tokenizer."""


class CapacityError(EdgeKVError):
    """A limit is reached; nothing was lost."""


class PoolTooSmall(CapacityError):
    """The KV pool can never hold what was asked for."""


class TooManySessions(CapacityError):
    """The limit of open sessions is reached, of an app or of all."""


class QueueFull(CapacityError):
    """The limit of waiting requests is reached, of an app or of all."""


class StoreError(EdgeKVError):
    """KV cannot be kept on SSD or read back; answers are the same, recomputed."""


class StoreBusy(StoreError):
    """Another process owns this store."""


class StoreUnusable(StoreError):
    """The folder is not writable, of a newer version, or not a store."""

    usual_hint = "choose another store folder, or give this user access to it"


class StoreFull(StoreError):
    """The disk budget or the volume's free-space reserve is reached; nothing was written."""


class StoreStale(StoreError):
    """The session was cut or removed while its KV was on its way; nothing was kept or read."""


class RecordCorrupt(StoreError):
    """Bytes on disk are not those that were written: torn, damaged, foreign or out of date."""

    usual_hint = "the KV is recomputed; if this happens again, the drive may be failing"

    def __init__(self, path: Path, difference: str) -> None:
        super().__init__(f"{path}: a record differs in {difference}")
        self.path = path
        self.difference = difference  # what differs first


class NotKept(StoreError):
    """What was said last in some sessions could not be saved, and is gone with the process."""

    usual_hint = "free some space, or give this user access to the store's folder"


class RequestCancelled(EdgeKVError):
    """The caller took the request back; tokens already produced stay valid."""


class RequestTimeout(RequestCancelled):
    """The request did not end within its timeout."""


class AnswerInvalid(EdgeKVError):
    """An answer is not of the type that was asked for: it was cut, or the type refuses it.

    `text` is what there is of it. It was said all the same: it stands in the conversation.
    """

    def __init__(self, message: str, *, hint: str = "", text: str = "") -> None:
        super().__init__(message, hint=hint)
        self.text = text


class SessionBusy(EdgeKVError):
    """A session answers one request at a time."""


class RuntimeClosed(EdgeKVError):
    """The runtime, or this session or app of it, was closed."""

    usual_hint = "open a new one"


class ForkedProcess(RuntimeClosed):
    """A forked process has neither its parent's threads nor, with them, its runtime."""

    usual_hint = "start processes by 'spawn', and open a runtime there"


class DaemonGone(RuntimeClosed):
    """No daemon listens where it should, or it ended before it had answered."""

    usual_hint = "edgekv serve begins one"


class ServeError(EdgeKVError):
    """The daemon cannot begin, what it reads cannot be used, or it refuses who asks."""


class AppsUnusable(ServeError):
    """The file of apps and keys is damaged, somebody else's, or not writable; it stays as it is."""


class SocketUnusable(ServeError):
    """No Unix socket can be made at this path, or somebody listens there already."""

    usual_hint = "choose another path with --uds, in a folder of this user's own"


class EngineFailed(EdgeKVError):
    """The engine thread stopped: a bug in edgekv, the cause chained, or a rank that is gone."""


def _shown(value: object) -> str:
    """A value of a caller's as a part of one line, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - theirs, not ours: an int of 5,000 digits has no repr either
        return f"of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…"
