"""transformers chooses its kernels at import, so what it computes without FLA is seen in a process of its own."""

import subprocess
import sys

import pytest
import torch

from qwenft.backends.transformers import StockDeltaRule
from qwenft.kernels.layout import SequenceLayout
from qwenft.machine import Machine

CHECK = """
import sys
sys.modules["fla"] = None
{before}
import torch
torch.set_num_threads(1)
from qwenft.backends.transformers import StockDeltaRule
from qwenft.machine import Machine
from qwenft.testing import check_linear_attention
assert StockDeltaRule().availability(Machine.detect()).usable
print(check_linear_attention(StockDeltaRule(), dtype="{dtype}"))
{after}
"""

# With the names and the argument order of causal-conv1d 1.5 (causal_conv1d/causal_conv1d_interface.py).
STAND_IN = """
import torch
from torch.nn import functional

calls = 0


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):
    global calls
    calls += 1
    assert activation in (None, "silu", "swish") and x.shape[1] == weight.shape[0]
    padded = functional.pad(x, (weight.shape[1] - 1, 0))
    y = functional.conv1d(padded, weight[:, None], bias, groups=len(weight))
    return functional.silu(y) if activation else y


def causal_conv1d_update(*arguments, **options):
    raise NotImplementedError
"""


def check(tmp_path, dtype="float32", before="", after=""):
    """What the suite prints of the stock backend in a process without FLA."""
    script = CHECK.format(dtype=dtype, before=before, after=after)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_the_stock_rule_conforms_one_document_at_a_time(tmp_path, dtype):
    """Without FLA the stock functions equal the reference, states and gradients too; nothing is packed."""
    printed = check(tmp_path, dtype)
    assert printed.startswith(f"StockDeltaRule() on cpu in {dtype}: ")
    assert "final state" in printed
    assert "other documents unchanged" not in printed


@pytest.mark.long
def test_the_stock_rule_uses_causal_conv1d_where_it_is_installed(tmp_path):
    """With a package of that name and interface the convolution goes through it, and conforms all the same."""
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    printed = check(
        tmp_path,
        before=f"sys.path.insert(0, {str(tmp_path)!r})",
        after="import causal_conv1d; print('calls', causal_conv1d.calls)",
    )
    assert int(printed.split()[-1]) > 20


def test_it_is_not_available_where_fla_is_importable_without_a_gpu():
    """Stock code would choose FLA, which cannot run here; on a GPU it may."""
    here = StockDeltaRule().availability(Machine.detect())
    assert not here.usable
    assert (
        here.reason
        == "transformers chooses flash-linear-attention wherever it can be imported, and it needs a GPU"
    )
    assert here.remedy == "pip uninstall flash-linear-attention fla-core"
    assert StockDeltaRule().availability(Machine.named("H100-80GB")).usable


def test_it_takes_one_document_a_row():
    """A layout of several documents is refused by name, in both halves."""
    layout = SequenceLayout([2, 3])
    x, heads = torch.randn(5, 8), torch.randn(5, 2, 4)
    with pytest.raises(ValueError, match="layout: transformers takes one document a row, got 2"):
        StockDeltaRule().short_conv(x, torch.randn(8, 4), None, layout=layout)
    with pytest.raises(ValueError, match="layout: transformers takes one document a row, got 2"):
        StockDeltaRule().delta_rule(heads, heads, heads, -heads[..., 0].abs(), heads[..., 0].abs(), layout=layout)
