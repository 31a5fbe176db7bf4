"""The machine that a plan is made for."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
from pathlib import Path

import attrs

from qwenft.errors import SpecError, nearest

GIB = 2**30


@attrs.frozen
class Machine:
    """What a plan needs to know of the hardware.

    Args:
        name: for people.
        device: "cpu" or "cuda".
        cores: processor cores of the host.
        host_bytes: memory of the host, in bytes.
        accelerators: how many GPUs.
        accelerator_bytes: memory of one GPU, in bytes.
        compute_capability: of the GPUs, such as (9, 0).
        native_bfloat16: the device multiplies bfloat16 in hardware.
    """

    name: str
    device: str
    cores: int
    host_bytes: int
    accelerators: int = 0
    accelerator_bytes: int = 0
    compute_capability: tuple[int, int] | None = None
    native_bfloat16: bool = False

    @classmethod
    def detect(cls) -> Machine:
        """This machine, without loading torch."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gpus = _gpus() if _torch_has_cuda() else []
        if gpus:
            name, memory, capability = gpus[0]
            return cls(
                name=name if len(gpus) == 1 else f"{len(gpus)} x {name}",
                device="cuda",
                cores=cores,
                host_bytes=host_bytes,
                accelerators=len(gpus),
                accelerator_bytes=memory,
                compute_capability=capability,
                native_bfloat16=capability >= (8, 0),
            )
        return cls(
            name=f"this computer ({platform.machine()})",
            device="cpu",
            cores=cores,
            host_bytes=host_bytes,
            native_bfloat16=_cpu_has_bfloat16(),
        )

    @classmethod
    def named(cls, name: str) -> Machine:
        """A machine known by name, such as "RTX4090" or "8xH100-80GB"; it need not be this one.

        Raises:
            SpecError: no such name is known.
        """
        count, card = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", str(name), flags=re.DOTALL).groups()  # type: ignore[union-attr]
        found = {known.lower(): known for known in CARDS}.get(card.lower())
        if found is None:
            raise SpecError(
                f"Machine.named: no machine {name!r} is known{nearest(card, CARDS)}",
                fix=f"one of {', '.join(CARDS)}, with a count before it for several: 8xH100-80GB",
                got=name,
                expected=tuple(CARDS),
            )
        memory, capability = CARDS[found]
        return cls(
            name=name,
            device="cuda",
            cores=8 * int(count or 1),
            host_bytes=4 * memory * int(count or 1),
            accelerators=int(count or 1),
            accelerator_bytes=memory,
            compute_capability=capability,
            native_bfloat16=capability >= (8, 0),
        )


#: Memory in bytes and compute capability, from NVIDIA's data sheets and CUDA's table of GPUs.
CARDS: dict[str, tuple[int, tuple[int, int]]] = {
    "T4": (16 * GIB, (7, 5)),
    "RTX3090": (24 * GIB, (8, 6)),
    "RTX4090": (24 * GIB, (8, 9)),
    "RTX5090": (32 * GIB, (12, 0)),
    "L4": (24 * GIB, (8, 9)),
    "L40S": (48 * GIB, (8, 9)),
    "A100-40GB": (40 * GIB, (8, 0)),
    "A100-80GB": (80 * GIB, (8, 0)),
    "H100-80GB": (80 * GIB, (9, 0)),
    "H200-141GB": (141 * GIB, (9, 0)),
    "B200-180GB": (180 * GIB, (10, 0)),
}


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read from its version file: importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda[^=]*= *'", version, flags=re.MULTILINE) is not None


def _cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 (AVX512_BF16 or AMX); without, it is many times slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


def _gpus(library: str = "libcuda.so.1") -> list[tuple[str, int, tuple[int, int]]]:
    """Name, memory in bytes and compute capability of each GPU that the CUDA driver shows to this process."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    return [_gpu(driver, index) for index in range(count.value)]


def _gpu(driver: ctypes.CDLL, index: int) -> tuple[str, int, tuple[int, int]]:
    device, memory, major, minor = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(100)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    return name.value.decode(), memory.value, (major.value, minor.value)
