"""Compiles what the "fla" backend launches, without a GPU, for test_fla.py; a process of its own.

Takes a compute capability such as 90, and writes to standard output how many binaries each kernel gave and what
the compiler refused. A stand-in for Triton's CUDA driver names that GPU and launches nothing, so that FLA's own
calls choose kernels, block sizes and specialisations. Triton's cache should be empty: see TRITON_CACHE_DIR.
"""

import collections
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources

from qwenft.backends.fla import FlaDeltaRule
from qwenft.kernels.layout import SequenceLayout

#: Bytes of shared memory that a block may have (CUDA programming guide, technical specifications).
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


class _CompilingDriver(DriverBase):
    """Counts what is loaded and runs nothing; its own ``utils``, as the CUDA driver's are a C module."""

    def __init__(self, capability):
        self.capability = capability
        self.loaded = collections.Counter()
        self.refused = []
        self.utils = self

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name):
        return name

    def get_device_properties(self, _device):
        return {"max_shared_mem": SHARED_BYTES[self.capability], "multiprocessor_count": 100}

    def load_binary(self, name, binary, _shared, _device):
        assert binary.startswith(b"\x7fELF"), name
        self.loaded[name] += 1
        module, function, registers, spills, threads = 1, 1, 0, 0, 1024
        return module, function, registers, spills, threads

    def unload_module(self, _module):
        pass

    def launcher_cls(self, _source, _metadata):
        return lambda *_arguments: None

    def get_benchmarker(self):
        return self.compile_configuration

    def compile_configuration(self, launch, quantiles):
        """In place of a timing; the autotuner passes over what does not fit a GPU, and over errors of ptxas."""
        try:
            launch()
        except OutOfResources as error:
            self.refused.append(["does not fit", str(error)])
            raise
        except Exception as error:
            self.refused.append([type(error).__name__, str(error)])
            raise
        return [1.0 for _ in quantiles]


def pretend(driver):
    """Let FLA find the driver's GPU when it is imported: it chooses block sizes by what torch says of it."""
    triton.runtime.driver.set_active(driver)
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_name = lambda _device=None: "NVIDIA"
    torch.cuda.get_device_capability = lambda _device=None: divmod(driver.capability, 10)


def tuners_of(create):
    """Keep the autotuners that FLA's modules make."""
    made = []

    def keep(self, *arguments, **options):
        create(self, *arguments, **options)
        made.append(self)

    Autotuner.__init__ = keep
    return made


def train(layout, *, states):
    """Both halves of a layer of Qwen3.5-4B in bfloat16, forward and backward."""
    backend, (K, V, D, E, W) = FlaDeltaRule(), (16, 32, 128, 128, 4)
    N, T, C = len(layout), layout.total, 2 * K * D + V * E
    half, single = {"dtype": torch.bfloat16, "requires_grad": True}, {"requires_grad": True}
    scanned = backend.delta_rule(
        torch.randn(T, K, D, **half),
        torch.randn(T, K, D, **half),
        torch.randn(T, V, E, **half),
        torch.zeros(T, V, **single),
        torch.rand(T, V, **half),
        layout=layout,
        initial_state=torch.randn(N, V, D, E, **single) if states else None,
        return_state=states,
    )
    convolved = backend.short_conv(
        torch.randn(T, C, **half),
        torch.randn(C, W, **half),
        None,
        layout=layout,
        initial_state=torch.randn(N, W - 1, C, **half) if states else None,
        return_state=states,
    )
    outputs = [*scanned, *convolved] if states else [scanned, convolved]
    torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])


if __name__ == "__main__":
    torch.set_num_threads(1)
    driver = _CompilingDriver(int(sys.argv[1]))
    pretend(driver)
    tuners = tuners_of(Autotuner.__init__)
    documents = SequenceLayout([65, 3, 50])
    train(documents, states=False)
    # With states the kernels differ by a few loads: one configuration of each is enough of them.
    for tuner in tuners:
        tuner.configs = tuner.configs[:1]
    train(documents, states=True)
    json.dump({"loaded": driver.loaded, "refused": driver.refused}, sys.stdout)
