import pytest
import torch

from qwenft.errors import CheckpointError, QwenftError, SpecError
from qwenft.testing import TinySizes, stock_logits, tiny_checkpoint

DOCUMENTS = [[5, 6, 7, 8, 9, 10], [100], list(range(20, 90))]
LABELS = [[-100, 7, 8, 9, 10, -100], [3], [*range(21, 90), -100]]


@pytest.fixture(scope="module", params=["dense", "moe"])
def checkpoint(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("stock") / request.param, request.param, "bfloat16", a_log=-3)


@pytest.fixture(scope="module")
def result(checkpoint):
    return stock_logits(checkpoint, DOCUMENTS, labels=LABELS, gradients=True)


def test_each_document_has_its_logits(result):
    """There is a row of float32 logits for every position of every document."""
    assert [tuple(logits.shape) for logits in result.logits] == [(6, 576), (1, 576), (70, 576)]
    assert all(logits.dtype == torch.float32 and logits.isfinite().all() for logits in result.logits)


def test_the_loss_is_the_mean_over_all_supervised_tokens(result):
    """The loss weighs tokens alike, not documents, and label t belongs to the logits of position t."""
    logits = torch.cat(result.logits)
    labels = torch.tensor([label for row in LABELS for label in row])
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_every_parameter_has_a_gradient(result):
    """Gradients come by parameter name, and none is zero: every part of the model takes part."""
    assert "model.layers.0.linear_attn.A_log" in result.gradients
    assert "model.layers.3.self_attn.q_norm.weight" in result.gradients
    assert [name for name, gradient in result.gradients.items() if gradient.abs().max() == 0] == []


@pytest.mark.long
def test_a_gradient_is_the_slope_of_the_loss(tmp_path):
    """Moving a bias of the decay along its gradient changes the loss by what the gradient says."""
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint(tmp_path / "dense", sizes=TinySizes(hidden=32))
    name = "model.language_model.layers.1.linear_attn.dt_bias"
    before = stock_logits(folder, DOCUMENTS, labels=LABELS, gradients=True)
    gradient = before.gradients["model.layers.1.linear_attn.dt_bias"]
    weights = load_file(folder / "model.safetensors")
    step = 0.01
    weights[name] += step * gradient / gradient.norm()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    after = stock_logits(folder, DOCUMENTS, labels=LABELS)
    assert (after.loss - before.loss) / step == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.long
def test_without_labels_there_is_no_loss(checkpoint):
    """Logits alone come without loss and gradients, and do not depend on what else was asked."""
    result = stock_logits(checkpoint, DOCUMENTS[:1])
    assert (result.loss, result.gradients) == (None, {})
    other = stock_logits(checkpoint, DOCUMENTS[1:] + DOCUMENTS[:1])
    torch.testing.assert_close(result.logits[0], other.logits[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "gradients", "message"),
    [
        (None, True, "there are no labels"),
        ([[1]], False, r"labels have lengths \[1\], the documents \[2\]"),
        ([[-100, -100]], False, "every label is -100"),
    ],
)
def test_labels_that_do_not_fit_are_refused(checkpoint, labels, gradients, message):
    """Labels of another length, none where gradients are asked for, and none supervised are refused."""
    with pytest.raises(SpecError, match=message):
        stock_logits(checkpoint, [[1, 2]], labels=labels, gradients=gradients)


def test_a_folder_without_a_config_is_refused(tmp_path):
    """A path that is no checkpoint is refused before a process is started."""
    with pytest.raises(CheckpointError, match=r"has no config.json\n  Fix: tiny_checkpoint"):
        stock_logits(tmp_path, [[1]])


def test_a_failure_shows_what_stock_said(checkpoint):
    """Where the fresh process fails its last words are in the message."""
    with pytest.raises(
        QwenftError,
        match=r"stock transformers failed with exit status 1:\n(.|\n)*index out of range",
    ):
        stock_logits(checkpoint, [[100_000]])


def test_kernel_packages_are_out_of_reach(checkpoint, monkeypatch, tmp_path):
    """The fresh process never imports flash-linear-attention, even where it stands first on the path."""
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise SystemExit('fla was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert stock_logits(checkpoint, [[1, 2]]).logits[0].isfinite().all()
