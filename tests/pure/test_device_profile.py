"""What a device's description becomes: budgets, types, warnings. No device is asked."""

import importlib.metadata
from dataclasses import replace

import pytest

from edgekv import device
from edgekv.errors import ConfigError

GIB = 1 << 30
RTX_4090 = {
    "device_name": "NVIDIA GeForce RTX 4090",
    "architecture": "sm_89",
    "compute_capability_major": 8,
    "compute_capability_minor": 9,
    "total_memory": 24 * GIB,
    "free_memory": 23 * GIB,
}


def test_cuda_is_run_as_metal_is():
    profile = device._cuda(RTX_4090)
    assert (profile.backend, profile.name) == ("cuda", RTX_4090["device_name"])
    assert profile.compute_dtype == "bfloat16"
    assert profile.keeps_quantised
    assert profile.fused_rope
    assert profile.fused_attention
    assert profile.warning == ""
    metal = device._metal({"max_recommended_working_set_size": profile.memory_bytes})
    assert profile.pool_bytes == metal.pool_bytes


def test_cuda_s_budgets_are_a_part_of_its_memory():
    profile = device._cuda(RTX_4090)
    assert profile.memory_bytes == 24 * GIB * 9 // 10
    assert profile.pool_bytes == (profile.memory_bytes - profile.freed_bytes_max) // 4


def test_what_others_have_on_the_gpu_is_not_ours():
    profile = device._cuda(RTX_4090 | {"free_memory": 6 * GIB})
    assert profile.memory_bytes == 6 * GIB
    assert profile.pool_bytes < 6 * GIB // 4
    assert device._cuda(RTX_4090 | {"free_memory": 1 << 20}).pool_bytes == 0


@pytest.mark.parametrize(("major", "dtype"), [(7, "float32"), (8, "bfloat16"), (12, "bfloat16")])
def test_gpus_before_ampere_compute_in_float32(major, dtype):
    assert device._cuda(RTX_4090 | {"compute_capability_major": major}).compute_dtype == dtype


def test_an_unnamed_gpu_without_its_free_memory():
    profile = device._cuda({"total_memory": 8 * GIB})
    assert profile.name == "NVIDIA GPU"
    assert profile.memory_bytes == 8 * GIB * 9 // 10


@pytest.mark.parametrize("info", [{}, {"device_name": "x", "total_memory": 0}])
def test_cuda_without_a_device_is_an_error(info):
    with pytest.raises(ConfigError, match="finds no device") as raised:
        device._cuda(info)
    assert "nvidia-smi" in raised.value.hint


@pytest.mark.parametrize("installed", ["mlx-cuda-13", "mlx-cuda-12", None])
def test_a_cuda_wheel_that_is_hidden_is_told_with_its_cure(installed, monkeypatch):
    def version(name):
        if name != installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.4"

    monkeypatch.setattr(importlib.metadata, "version", version)
    hidden = device._installed_cuda_wheel()
    assert hidden == (installed or "")
    warning = replace(device._cuda(RTX_4090), backend="cpu", hidden_wheel=hidden).warning
    if installed is None:
        assert warning == ""
    else:
        assert warning.endswith(f"cure: pip install --force-reinstall --no-deps {installed}")


def test_what_helps_if_mlx_cannot_be_loaded():
    no_driver = ImportError("libcuda.so.1: cannot open shared object file")
    assert "mlx-cpu" in device.loading_hint(no_driver)
    assert "driver" in device.loading_hint(no_driver)
    other = ImportError("libmlx.so: cannot open shared object file")
    assert device.loading_hint(other) == "pip install --force-reinstall edgekv"
