"""Downloading one wheel with pip, watched: its own index, mirror, proxy and cache settings hold."""

import contextlib
import errno
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

from edgekv.errors import DownloadError

POLL_S = 0.2
END_WAIT_S = 5.0

# -P: a pip.py in the current folder is not pip.
PIP = (sys.executable, "-P", "-m", "pip")

_FLAGS = (
    "--no-deps",
    "--only-binary=:all:",
    "--no-input",
    "--progress-bar=off",
    "--disable-pip-version-check",
)


def download_wheel(
    requirement: str, workspace: pathlib.Path, watch: Callable[[int], None]
) -> pathlib.Path:
    """Let pip download a requirement's wheel into `workspace`; returns the wheel's path.

    `workspace` is an empty folder of ours; `watch` is told now and then how many bytes there are.
    pip is ended when this function is left in any other way than by its own exit.

    Raises:
        DownloadError: pip is absent or failed; the message has its last error line.
        OSError: ENOSPC where pip met a full disk.
    """
    target = workspace / "wheel"
    command = [*PIP, "download", *_FLAGS, f"--dest={target}", requirement]
    # pip downloads into its temporary folder: here it can be watched, and it goes when we go.
    env = os.environ | {"TMPDIR": str(workspace)}
    with (workspace / "pip.log").open("w+b") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=env
            )
        except (FileNotFoundError, PermissionError) as error:
            raise _no_pip(requirement, command[0]) from error
        try:
            while process.poll() is None:
                watch(_largest_file_bytes(workspace))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            _end(process)
        log.seek(0)
        report = log.read().decode("utf-8", "replace")
    wheels = sorted(target.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in report:
        raise _no_pip(requirement, command[0])
    if f"[Errno {errno.ENOSPC}]" in report:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise DownloadError(
        f"pip could not download {requirement}: {_reason(report, process.returncode)}",
        hint="check the network, and pip's index, mirror and proxy settings (pip config list)",
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(END_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _largest_file_bytes(folder: pathlib.Path) -> int:
    """Size of the largest file below `folder`: while pip runs, the wheel as far as it came."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves files while we look
                largest = max(largest, (pathlib.Path(parent) / name).stat().st_size)
    return largest


def _no_pip(requirement: str, python: str) -> DownloadError:
    return DownloadError(
        f"{requirement} comes through pip, which {python or 'this Python'} lacks",
        hint="python -m ensurepip, or install pip into this environment",
    )


def _reason(report: str, code: int) -> str:
    """The last error line of pip; the last line of any kind where it printed no error."""
    if "after connection broken by" in report:  # its last error would be "no distribution found"
        return "the package index cannot be reached"
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR:").strip() if errors else f"exit status {code}"
