import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from qwenft.kernels.layout import SequenceLayout
from qwenft.models.bind import hidden_states, neftune_noise

from .helpers import batch_of, bound, documents


class Training:
    """What transformers' hook looks at."""

    training = True
    neftune_noise_alpha = 5.0


def test_the_noise_of_one_document_is_that_of_transformers():
    """From equal random states, a document alone gets the noise of transformers' own hook."""
    embeddings = torch.zeros(1, 37, 16)
    torch.manual_seed(0)
    wanted = neftune_post_forward_hook(Training(), None, embeddings)
    torch.manual_seed(0)
    noise = neftune_noise(embeddings, SequenceLayout.from_lengths([37]), 5.0)
    torch.testing.assert_close(noise, wanted, rtol=1e-5, atol=1e-8)


def test_the_noise_of_a_document_knows_its_own_length_alone():
    """In a row of many documents each has noise of up to alpha / sqrt(its own tokens times the width)."""
    lengths = [4, 400, 40]
    torch.manual_seed(0)
    noise = neftune_noise(torch.zeros(1, sum(lengths), 64), SequenceLayout.from_lengths(lengths), 5.0)
    for part, length in zip(noise[0].split(lengths), lengths, strict=True):
        limit = 5.0 / (length * 64) ** 0.5
        assert part.abs().max() <= limit
        assert part.abs().max().item() == pytest.approx(limit, rel=0.05)
        assert part.abs().mean().item() == pytest.approx(limit / 2, rel=0.1)


def test_noise_reaches_the_hidden_states_and_gradients_flow(dense_checkpoint):
    """With alpha the hidden states differ from those without, by more the larger it is; embeddings are trained."""
    model, batch = bound(dense_checkpoint), batch_of(documents([5, 30]))
    plain = hidden_states(model, batch.input_ids, batch.layout)
    distances = []
    for alpha in (0.01, 0.1):
        torch.manual_seed(0)
        noisy = hidden_states(model, batch.input_ids, batch.layout, neftune_alpha=alpha)
        distances.append((noisy - plain).abs().max().item())
    assert 0 < distances[0] < distances[1]
    noisy.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
