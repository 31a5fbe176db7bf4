from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_cut_cross_entropy_equals_torch_in_the_interpreter():
    """The kernels of the package, run by Triton's interpreter, give torch's loss and gradient, and 0 for nothing."""
    script = Path(__file__).with_name("cce_interpreter.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "equal\n", run.stderr
