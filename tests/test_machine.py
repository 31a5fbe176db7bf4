import os
import platform
import shutil
import subprocess

import attrs
import pytest

from qwenft import machine
from qwenft.errors import SpecError
from qwenft.machine import CARDS, GIB, Machine

DRIVER = """
#include <string.h>
static int cards = %(cards)d;
int cuInit(unsigned flags) { return %(status)d; }
int cuDeviceGetCount(int *count) { *count = cards; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device == 40 ? "NVIDIA Stand-in" : "NVIDIA Other", size);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 6000000000ul + device; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : -1;
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Compiles a stand-in for libcuda.so.1."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("driver")

    def compile_driver(cards=1, status=0):
        source, library = folder / f"cuda-{cards}-{status}.c", folder / f"libcuda-{cards}-{status}.so"
        source.write_text(DRIVER % {"cards": cards, "status": status})
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        return str(library)

    return compile_driver


@pytest.fixture
def with_driver(driver, monkeypatch):
    """Makes this machine look as if it had these cards, and torch as if it were built for them."""

    def install(**options):
        library, gpus = driver(**options), machine._gpus
        monkeypatch.setattr(machine, "_gpus", lambda: gpus(library))
        monkeypatch.setattr(machine, "_torch_has_cuda", lambda: True)

    return install


def test_the_driver_is_asked_for_each_card(driver):
    """Name, memory above 4 GiB and compute capability come from the driver, by the handle of each card."""
    assert machine._gpus(driver(cards=2)) == [
        ("NVIDIA Stand-in", 6_000_000_040, (8, 9)),
        ("NVIDIA Other", 6_000_000_041, (8, 9)),
    ]


def test_a_driver_that_is_absent_or_broken_means_no_card(driver):
    """No library, a driver that does not start and one that shows nothing all mean that there is no GPU."""
    assert machine._gpus("libno-such-driver.so.1") == []
    assert machine._gpus(driver(cards=3, status=100)) == []
    assert machine._gpus(driver(cards=0)) == []


def test_a_machine_with_one_card_is_detected(with_driver):
    """A card makes this a cuda machine of its name, with the host's own cores and memory."""
    with_driver(cards=1)
    found = Machine.detect()
    assert (found.name, found.device, found.accelerators) == ("NVIDIA Stand-in", "cuda", 1)
    assert found.accelerator_bytes == 6_000_000_040
    assert found.compute_capability == (8, 9)
    assert found.native_bfloat16


def test_a_machine_with_several_cards_is_detected(with_driver):
    """Several cards are counted in the name."""
    with_driver(cards=2)
    found = Machine.detect()
    assert (found.name, found.accelerators) == ("2 x NVIDIA Stand-in", 2)


def test_cards_that_torch_cannot_use_do_not_count(with_driver, monkeypatch):
    """A torch built for the CPU sees no card, whatever the driver shows."""
    with_driver(cards=1)
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: False)
    assert Machine.detect().device == "cpu"


def test_this_machine_is_detected():
    """What is detected agrees with torch, the operating system, and itself a second time."""
    import torch

    found = Machine.detect()
    assert found == Machine.detect()
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.host_bytes > GIB / 4
    assert (found.device == "cuda") == torch.cuda.is_available()
    assert machine._torch_has_cuda() == (torch.version.cuda is not None)
    if found.device == "cpu":
        assert found.name == f"this computer ({platform.machine()})"
        assert (found.accelerators, found.accelerator_bytes, found.compute_capability) == (0, 0, None)


@pytest.mark.parametrize("card", CARDS)
def test_every_card_is_known_by_name(card):
    """A name gives the card's memory and capability, in any case, and a number before it gives several."""
    known = CARDS[card]
    one, eight = Machine.named(card.lower()), Machine.named(f"8x{card}")
    assert (one.device, one.accelerators, one.accelerator_bytes) == ("cuda", 1, known.memory)
    assert (eight.accelerators, eight.accelerator_bytes, eight.name) == (8, known.memory, f"8x{card}")
    assert one.compute_capability == known.compute_capability
    assert (one.bandwidth, dict(one.operations)["bfloat16"]) == (known.bandwidth, known.halves)
    assert one.version_of("triton") == "3.7.1"
    assert one.version_of("flash-attn") is None
    assert one.native_bfloat16 is (card != "T4")
    assert one != eight


@pytest.mark.parametrize(
    ("name", "gigabytes", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 80, "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 40, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 79, "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX4090"),
        ("NVIDIA L40S", 45, "L40S"),
        ("NVIDIA L4", 23, "L4"),
        ("Tesla T4", 15, "T4"),
        ("NVIDIA Stand-in", 6, None),
    ],
)
def test_rates_of_a_card_are_found_by_what_the_driver_calls_it(name, gigabytes, card):
    """A card of the table is known under the driver's name, by its memory where two share it; others have none."""
    assert machine._known_as(name, gigabytes * GIB) == CARDS.get(card)


def test_a_cpu_is_named_by_its_memory():
    """A computer without a GPU, of so much memory, with rates that are assumed."""
    found = Machine.named("cpu:16GB")
    assert (found.device, found.memory_bytes, found.accelerators) == ("cpu", 16 * GIB, 0)
    assert found.bandwidth > 0


def test_a_named_machine_is_a_value():
    """Machines are frozen, hashable and equal by field."""
    assert Machine.named("RTX4090") == Machine.named("RTX4090")
    assert hash(Machine.named("RTX4090")) == hash(Machine.named("RTX4090"))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Machine.named("RTX4090").cores = 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "RTX4080",
            r"no machine 'RTX4080' is known; did you mean 'RTX\d090'\?\n  Fix: one of T4, .*8xH100-80GB; or cpu:16GB",
        ),
        ("8xH100-80", r"no machine '8xH100-80' is known; did you mean 'H100-80GB'\?"),
        ("0xT4", r"no machine '0xT4' is known"),
        ("8x", r"no machine '8x' is known\n  Fix: "),
        ("", r"no machine '' is known"),
        ("a\nb", r"no machine 'a\\nb' is known"),
        (4090, r"no machine 4090 is known"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    """A machine that is not known is refused with those that are."""
    with pytest.raises(SpecError, match=r"Machine\.named: " + message) as caught:
        Machine.named(name)
    assert caught.value.got == name
    assert caught.value.expected == tuple(CARDS)


@pytest.mark.parametrize(
    ("flags", "native"),
    [("avx2 avx512_bf16 sse", True), ("amx_bf16", True), ("avx2 xavx512_bf16x avx512f", False)],
)
def test_bfloat16_of_the_processor_is_read_from_its_flags(flags, native, tmp_path, monkeypatch):
    """AVX512_BF16 and AMX multiply bfloat16, and no other flag does."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags}\n")
    monkeypatch.setattr(machine, "Path", lambda _: cpuinfo)
    assert machine._cpu_has_bfloat16() is native
    cpuinfo.unlink()
    assert machine._cpu_has_bfloat16() is False
