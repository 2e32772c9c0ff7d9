"""Whether a chat joins a daemon that runs, in place of loading the model a second time."""

from contextlib import suppress
from typing import TYPE_CHECKING

from edgekv.cli.progress import say
from edgekv.cli.render import one_line
from edgekv.config import user_path
from edgekv.errors import ConfigError, DaemonGone, ModelError, ServeError

if TYPE_CHECKING:
    from edgekv.client import Connection

CHAT_APP = "chat"


def join(model: str | None, prefill: str | None) -> "Connection | None":
    """The daemon at the usual socket, if it serves this model and can do what is asked.

    Args:
        model: As the user names it; None takes what there is.
        prefill: As the user wants it; None is as the daemon does.

    Raises:
        ServeError: A daemon runs that does not let in who chats.
    """
    from edgekv.server.keys import socket_path

    with suppress(ConfigError):  # no home folder, and so no daemon there
        path = socket_path()
        if not path.is_socket():
            return None
        from edgekv.client import connect

        try:
            daemon = connect(path, app=CHAT_APP)
        except DaemonGone:  # it was killed
            return None
        except ServeError as error:
            error.hint = error.hint or "edgekv chat --local does without the daemon"
            raise
        can = prefill in (None, "exact") or daemon.predicts
        if can and (model is None or _serves(daemon, model)):
            daemon.app(CHAT_APP).prefill = prefill  # type: ignore[assignment]  # it checks
            say(one_line(f"joined the daemon that serves {daemon.model_name}"))
            return daemon
        daemon.close()
    return None


def _serves(daemon: "Connection", model: str) -> bool:
    """Whether it is this model, by whatever name."""
    from edgekv.models.hub import resolve

    if model == daemon.model_name and not user_path(model).exists():
        return True
    with suppress(ModelError):  # what is wrong with it says who opens it
        return resolve(model, offline=True).resolve() == daemon.path.resolve()
    return False
