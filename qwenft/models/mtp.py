"""The layer that predicts the token after next (``mtp.*`` of a checkpoint's files), which transformers leaves out.

It is that of vLLM (vllm/model_executor/models/qwen3_5_mtp.py), which drafts with it: the embedding of the next
token first and the hidden state behind the model's final norm second, each normed, are joined by ``fc``; then come
a decoder layer of full attention, at the position of the hidden state (vllm/v1/spec_decode/eagle.py shifts the ids
and not the positions), a last norm, and the model's own head. It is trained as in DeepSeek-V3 (arXiv:2412.19437,
section 2.2) with one layer: no gradient is cut, neither to the model nor to the embedding and the head.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import attrs
import torch

from qwenft.data.masking import IGNORED

if TYPE_CHECKING:
    from qwenft.data.stream import Batch
    from qwenft.kernels.layout import SequenceLayout


class MultiTokenPrediction(torch.nn.Module):
    """The layer, with the names of the checkpoint's files.

    Args:
        decoder: transformers' text decoder, whose classes of layers and norms it takes. Embedding and rotary table
            are shared: the decoder is handed in with each call.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        config = copy.deepcopy(decoder.config)
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        layer, norm, width = type(decoder.layers[0]), type(decoder.norm), config.hidden_size
        self.pre_fc_norm_embedding = norm(width, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(width, eps=config.rms_norm_eps)
        self.fc = torch.nn.Linear(2 * width, width, bias=False)
        self.layers = torch.nn.ModuleList([layer(config, 0)])
        self.norm = norm(width, eps=config.rms_norm_eps)

    def forward(
        self,
        decoder: Any,
        hidden_TC: torch.Tensor,
        next_ids_T: torch.Tensor,
        layout: SequenceLayout,
        *,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the output head is given to predict the token after next.

        Args:
            decoder: the model's.
            hidden_TC: [T, H], what the head is given to predict the next token.
            next_ids_T: [T], the token behind each.
            layout: where the documents begin.
            wanted: [S] int64, the positions that are asked for; all T where None.

        Returns:
            [T, H], or [S, H].
        """
        embeddings = decoder.embed_tokens(next_ids_T[None])
        joined = torch.cat(
            [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden_TC[None])], dim=-1
        )
        # Time, height and width of a text are one.
        rotary = decoder.rotary_emb(embeddings, layout.position_ids.expand(3, 1, -1))
        mixed = self.layers[0](self.fc(joined), position_embeddings=rotary, layout=layout, wanted=wanted)
        normed: torch.Tensor = self.norm(mixed)[0]
        return normed


def one_token_on(batch: Batch) -> Batch:
    """The micro-batch with the next token, label and weight of its document in each place.

    A document's last token has none behind it: it stays in its place, and is not trained.
    """
    following = torch.arange(1, batch.layout.total + 1)
    last = torch.tensor(batch.layout.starts[1:]) - 1
    following[last] = last
    following, last = following.to(batch.input_ids.device), last.to(batch.input_ids.device)
    return attrs.evolve(
        batch,
        input_ids=batch.input_ids[following],
        labels=batch.labels[following].index_fill(0, last, IGNORED),
        weights=None if batch.weights is None else batch.weights[following],
        positions=None,
    )
