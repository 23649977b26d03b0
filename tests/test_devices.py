"""Device and precision: what was asked for is what is used, or an error says why not."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from itemkit import devices
from itemkit.decode import DecodeConfig
from itemkit.errors import InputError


def test_auto_is_cpu_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.choose_device("auto") == torch.device("cuda")


def test_missing_cuda_is_an_error_not_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="'cuda' was asked for, but torch .* sees 0 .* that torch is a CUDA"):
        devices.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(InputError, match=r"'cuda:1' was asked for, but torch .* sees 1 of that kind"):
        devices.choose_device("cuda:1")


@pytest.mark.parametrize("name", ["cpu:99", "cpu:1", "mps:2"])
def test_there_is_one_processor_only(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' was asked for, but torch .* sees [01] of that kind"):
        devices.choose_device(name)
    assert devices.choose_device("cpu:0").type == "cpu"


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", devices.THREADS_VARIABLE):
        monkeypatch.setenv(name, "7")
    before = torch.get_num_threads()
    try:
        devices.set_threads(None)
        assert torch.get_num_threads() == before
        devices.set_threads(1)
        assert torch.get_num_threads() == 1 == DecodeConfig().n_threads()
        assert os.environ["OMP_NUM_THREADS"] == "1"  # for notebooks, and processes that train side by side
    finally:
        torch.set_num_threads(before)
    with pytest.raises(InputError, match="got 0 threads; expected 1 or more"):
        devices.set_threads(0)


@pytest.mark.parametrize("name", ["gpu", "cdua", "xpu", "meta", "cuda:x", None])
def test_unknown_devices(name: str | None) -> None:
    with pytest.raises(InputError, match=f"device {name!r} is (unknown|not supported)"):
        devices.choose_device(name)


@pytest.mark.parametrize(
    ("amx", "avx", "expected"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_auto_precision_on_a_cpu(monkeypatch, amx: bool, avx: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    assert devices.choose_precision("auto", "cpu") is expected
    assert devices.choose_precision("float32", "cpu") is torch.float32


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((9, 0), torch.bfloat16)])
def test_auto_precision_on_cuda(monkeypatch, capability, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.choose_precision("auto", "cuda") is expected
    assert devices.choose_precision("float16", "cuda") is torch.float16


def test_bad_precision() -> None:
    with pytest.raises(InputError, match="precision 'fp16' is unknown; use one of auto, float32"):
        devices.choose_precision("fp16")
    with pytest.raises(InputError, match="'float16' is not for the CPU"):
        devices.choose_precision("float16", "cpu")


def test_dtype_name() -> None:
    assert devices.dtype_name(torch.bfloat16) == "bfloat16"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("std::bad_alloc"),
        OSError("out of memory error when reading image file"),
        np._core._exceptions._ArrayMemoryError((9, 9), np.dtype(float)),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_out_of_memory_in_all_its_words(error: Exception) -> None:
    assert devices.is_out_of_memory(error)


@pytest.mark.parametrize(
    "text",
    ["CUDA error: device-side assert triggered", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
     "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", "could not allocate a name"],
)  # fmt: skip
def test_other_troubles_are_not_of_memory(text: str) -> None:
    assert not devices.is_out_of_memory(RuntimeError(text))


def test_tensors_that_lie_there_are_not_copied() -> None:
    x = torch.zeros(3)
    assert devices.to_device(x, torch.device("cpu")) is x


@pytest.mark.gpu
def test_pinned_copies() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.arange(12.0).reshape(3, 4).T
    there = devices.to_device(x, torch.device("cuda"))
    assert there.is_cuda and torch.equal(there.cpu(), x)
    assert devices.to_device(there, torch.device("cuda")) is there
