"""The machine that a plan is made for."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

import attrs

from qwenft.display import Shown, bytes_text
from qwenft.errors import SpecError, nearest

GIB = 2**30


@attrs.frozen(repr=False)
class Machine(Shown):
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
        bandwidth: bytes a second of the memory that the model computes in, as its maker says; 0 if not known.
        operations: (dtype, floating-point operations a second of matrix products at most), dense, added up in
            float32.
        link: bytes a second that a device can send to another, in one direction.
        libraries: (distribution, version) of what is assumed to be installed there; None of this machine, where
            that is looked up.
    """

    name: str
    device: str
    cores: int
    host_bytes: int
    accelerators: int = 0
    accelerator_bytes: int = 0
    compute_capability: tuple[int, int] | None = None
    native_bfloat16: bool = False
    bandwidth: float = 0.0
    operations: tuple[tuple[str, float], ...] = ()
    link: float = 0.0
    libraries: tuple[tuple[str, str], ...] | None = None

    def shown(self) -> list[tuple[str, str]]:
        """What a plan needs to know of it."""
        gpus = f"{self.accelerators} x {bytes_text(self.accelerator_bytes)}" if self.accelerators else "none"
        rates = ", ".join(f"{dtype} {rate / 1e12:,.3g} TFLOP/s" for dtype, rate in self.operations)
        assumed = ", ".join(f"{name} {version}" for name, version in self.libraries or ())
        return [
            ("name", self.name),
            ("GPUs", gpus),
            ("host", f"{self.cores} cores, {bytes_text(self.host_bytes)}"),
            *((("bandwidth", f"{self.bandwidth / 1e9:,.0f} GB/s"),) if self.bandwidth else ()),
            *((("rates", rates),) if rates else ()),
            *((("assumed libraries", assumed or "none"),) if self.libraries is not None else ()),
        ]

    @property
    def memory_bytes(self) -> int:
        """Of one device, where a process computes."""
        return self.accelerator_bytes if self.device == "cuda" else self.host_bytes

    def version_of(self, distribution: str) -> str | None:
        """Of a distribution that is installed, or assumed to be; None of one that is not.

        Asked of its metadata: packages can share a folder, and a folder of the user's may bear any name.
        """
        if self.libraries is not None:
            return dict(self.libraries).get(distribution)
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    @classmethod
    def detect(cls) -> Machine:
        """This machine, without loading torch."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gpus = _gpus() if _torch_has_cuda() else []
        if gpus:
            name, memory, capability = gpus[0]
            known = _known_as(name, memory)
            return cls(
                name=name if len(gpus) == 1 else f"{len(gpus)} x {name}",
                device="cuda",
                cores=cores,
                host_bytes=host_bytes,
                accelerators=len(gpus),
                accelerator_bytes=memory,
                compute_capability=capability,
                native_bfloat16=capability >= (8, 0),
                **({} if known is None else known.rates),
            )
        native = _cpu_has_bfloat16()
        return cls(
            name=f"this computer ({platform.machine()})",
            device="cpu",
            cores=cores,
            host_bytes=host_bytes,
            native_bfloat16=native,
            **_cpu_rates(cores, native_bfloat16=native),
        )

    @classmethod
    def named(cls, name: str) -> Machine:
        """A machine known by name, such as "RTX4090", "8xH100-80GB" or "cpu:16GB"; it need not be this one.

        A GPU is assumed to have what ``qwenft[cuda]`` installs, and a CPU to have 8 cores; say more with
        ``attrs.evolve(machine, libraries=(("flash-attn", "2.8.3"), ...))``.

        Raises:
            SpecError: no such name is known.
        """
        if (host := re.fullmatch(r"cpu:([1-9]\d*) ?GB", str(name), flags=re.IGNORECASE)) is not None:
            return cls(
                name=name,
                device="cpu",
                cores=CPU_CORES,
                host_bytes=int(host[1]) * GIB,
                libraries=(),
                **_cpu_rates(CPU_CORES, native_bfloat16=False),
            )
        count, card = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", str(name), flags=re.DOTALL).groups()  # type: ignore[union-attr]
        found = {known.lower(): known for known in CARDS}.get(card.lower())
        if found is None:
            raise SpecError(
                f"Machine.named: no machine {name!r} is known{nearest(card, CARDS)}",
                fix=f"one of {', '.join(CARDS)}, with a count before it for several: 8xH100-80GB; or cpu:16GB",
                got=name,
                expected=tuple(CARDS),
            )
        card_of = CARDS[found]
        return cls(
            name=name,
            device="cuda",
            cores=8 * int(count or 1),
            host_bytes=4 * card_of.memory * int(count or 1),
            accelerators=int(count or 1),
            accelerator_bytes=card_of.memory,
            compute_capability=card_of.compute_capability,
            native_bfloat16=card_of.compute_capability >= (8, 0),
            libraries=ASSUMED,
            **card_of.rates,
        )


@attrs.frozen
class Card:
    """A GPU.

    Args:
        memory: bytes.
        compute_capability: such as (9, 0).
        bandwidth: of its memory, bytes a second.
        halves: operations a second of dense products of bfloat16 (of a T4, float16), added up in float32.
        floats: likewise of float32.
        link: bytes a second to another card in one direction: NVLink, or PCIe.
    """

    memory: int
    compute_capability: tuple[int, int]
    bandwidth: float
    halves: float
    floats: float
    link: float

    @property
    def rates(self) -> dict[str, Any]:
        """What a :class:`Machine` has of them."""
        operations = (("bfloat16", self.halves), ("float32", self.floats))
        return {"bandwidth": self.bandwidth, "operations": operations, "link": self.link}


#: From NVIDIA's data sheets (those of the SXM boards of A100, H100, H200 and B200) and CUDA's table of GPUs.
CARDS: dict[str, Card] = {
    "T4": Card(16 * GIB, (7, 5), 320e9, 65e12, 8.1e12, 16e9),
    "RTX3090": Card(24 * GIB, (8, 6), 936e9, 71e12, 35.6e12, 32e9),
    "RTX4090": Card(24 * GIB, (8, 9), 1008e9, 165e12, 82.6e12, 32e9),
    "RTX5090": Card(32 * GIB, (12, 0), 1792e9, 209e12, 104.8e12, 64e9),
    "L4": Card(24 * GIB, (8, 9), 300e9, 121e12, 30.3e12, 32e9),
    "L40S": Card(48 * GIB, (8, 9), 864e9, 362e12, 91.6e12, 32e9),
    "A100-40GB": Card(40 * GIB, (8, 0), 1555e9, 312e12, 19.5e12, 300e9),
    "A100-80GB": Card(80 * GIB, (8, 0), 2039e9, 312e12, 19.5e12, 300e9),
    "H100-80GB": Card(80 * GIB, (9, 0), 3350e9, 989e12, 67e12, 450e9),
    "H200": Card(141 * GIB, (9, 0), 4800e9, 989e12, 67e12, 450e9),
    "B200": Card(180 * GIB, (10, 0), 7700e9, 2250e12, 75e12, 900e9),
}
#: What ``qwenft[cuda]`` installs, in the oldest versions that are right on every card.
ASSUMED = (("flash-linear-attention", "0.6"), ("triton", "3.7.1"))
#: Of a named CPU; and of any, what a core of AVX2 with a clock of 3 GHz and its share of two memory channels give.
CPU_CORES = 8
_CORE_OPERATIONS, _CORE_BANDWIDTH = 96e9, 5e9


def _cpu_rates(cores: int, *, native_bfloat16: bool) -> dict[str, Any]:
    floats = cores * _CORE_OPERATIONS
    operations = (("bfloat16", 2 * floats if native_bfloat16 else floats), ("float32", floats))
    return {"bandwidth": cores * _CORE_BANDWIDTH, "operations": operations, "link": 10e9}


def _known_as(name: str, memory: int) -> Card | None:
    """The card that the driver calls by a name such as "NVIDIA H100 80GB HBM3"."""
    words = re.sub(r"[^a-z0-9]", "", name.lower())
    of_kind = {card: known for card, known in CARDS.items() if card.partition("-")[0].lower() in words}
    longest = max((card.partition("-")[0] for card in of_kind), key=len, default="")
    same = [known for card, known in of_kind.items() if card.partition("-")[0] == longest]
    return min(same, key=lambda known: abs(known.memory - memory), default=None)


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
