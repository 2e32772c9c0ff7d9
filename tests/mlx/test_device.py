"""Which device is asked for what; MLX's answers are a GPU's, which need not be there."""

import importlib.metadata

import mlx.core as mx
import pytest

from edgekv import device

GPU = {
    "device_name": "NVIDIA H200",
    "compute_capability_major": 9,
    "total_memory": 140 << 30,
    "max_recommended_working_set_size": 8 << 30,
}


@pytest.fixture
def machine(monkeypatch):
    """Call it to say what MLX answers; nobody else is told the profile that comes of it."""

    def answers(*, gpu, cuda=False, metal=False):
        default = mx.Device(mx.gpu if gpu else mx.cpu, 0)
        monkeypatch.setattr(mx, "default_device", lambda: default)
        monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
        monkeypatch.setattr(mx, "device_info", lambda: GPU)
        return device.profile.__wrapped__()

    return answers


def test_the_profile_is_of_the_default_device(machine):
    assert machine(gpu=True, cuda=True).backend == "cuda"
    assert machine(gpu=True, metal=True).backend == "metal"
    for there in ("cuda", "metal"):  # somebody has made the CPU the default
        assert machine(gpu=False, **{there: True}).backend == "cpu"


def test_a_cuda_wheel_whose_library_is_not_loaded_is_noticed(machine, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.4")
    assert "mlx-cuda-13 is installed" in machine(gpu=False).warning
    assert machine(gpu=False, cuda=True).hidden_wheel == ""


def test_cuda_works_in_no_forked_process_and_is_not_asked(monkeypatch):
    def asked():
        raise AssertionError("that would make a context, which no child survives")

    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "get_active_memory", asked)
    assert not device.works_after_fork()
