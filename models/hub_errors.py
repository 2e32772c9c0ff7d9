"""What went wrong between here and the Hugging Face Hub, as typed errors.

In the Hub's place a proxy may answer, or the login page of a network.
"""

import contextlib
import errno
import json
from collections.abc import Iterator
from typing import NoReturn

from edgekv.errors import DownloadError, ModelNotFound
from edgekv.models.folder_files import stand_in
from edgekv.models.reference import RepoReference

STRANGER_HINT = (
    "a proxy or the login page of a network may answer in the Hub's place: log in with a browser, "
    "or check HTTPS_PROXY and HF_ENDPOINT"
)
_FOLDER_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)


@contextlib.contextmanager
def typed_errors(wanted: RepoReference, revision: str | None) -> Iterator[None]:
    """Errors of huggingface-hub, of HTTP and of whoever answers in the Hub's place, as ours."""
    from huggingface_hub import errors

    # The HTTP library's base error, whichever library this version of huggingface-hub uses.
    http_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{wanted.repo} is gated: its owner lets in those who accepted its licence",
            hint=f"accept at https://huggingface.co/{wanted.repo}, then `hf auth login` or set "
            "HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{wanted.repo} has no revision {revision}",
            hint="its page lists its branches and tags"
            if revision == wanted.revision
            else f"edgekv pull {wanted} takes the newest",
        ) from error
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise ModelNotFound(
            f"{wanted}: no such file or folder here, and no such model on Hugging Face",
            hint="check the spelling; for a private model `hf auth login` or set HF_TOKEN",
        ) from error
    except (http_error, OSError, RuntimeError) as error:  # RuntimeError: from hf_xet
        _fail_transfer(wanted, error)
    except ValueError as error:  # no JSON
        fail_stranger(wanted, error)


def _fail_transfer(wanted: RepoReference, error: Exception) -> NoReturn:
    from huggingface_hub import constants, errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DownloadError(
            f"{wanted} cannot be downloaded: the disk is full",
            hint="free some space, or set HF_HOME to a folder on another disk",
        ) from error
    if isinstance(error, OSError) and error.errno in _FOLDER_ERRORS:
        raise DownloadError(
            f"{wanted} cannot be downloaded into {constants.HF_HUB_CACHE}: {error.strerror}",
            hint="set HF_HOME to a folder that can be written",
        ) from error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        raise DownloadError(
            f"{wanted} cannot be downloaded: {constants.ENDPOINT} lets nobody in who may not "
            f"({status})",
            hint="`hf auth login` or set HF_TOKEN, of an account that may read it",
        ) from error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.FileMetadataError | json.JSONDecodeError):
            fail_stranger(wanted, error)
        cause = cause.__cause__
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise DownloadError(
        f"{wanted} cannot be downloaded: {reason}",
        hint="check the network and proxy, and try again: a download goes on where it broke off",
    ) from error


def fail_stranger(wanted: RepoReference, error: Exception) -> NoReturn:
    """What answered is not the Hub, but a proxy or the login page of a network."""
    from huggingface_hub import constants

    document = error.doc if isinstance(error, json.JSONDecodeError) else ""
    is_page = stand_in(document[:200].encode(errors="replace")) is not None
    what = "answered with an HTML page" if is_page else "did not answer as the Hub does"
    raise DownloadError(
        f"{wanted} cannot be downloaded: {constants.ENDPOINT} {what}", hint=STRANGER_HINT
    ) from error
