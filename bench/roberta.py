"""RoBERTa for the classification of sequences, by Hugging Face, as the paper fine-tunes it; random weights."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

CONFIG = RobertaConfig()  # its defaults are roberta-base's
LONGEST = CONFIG.max_position_embeddings - CONFIG.pad_token_id - 1
FIRST_WORD = CONFIG.eos_token_id + 1  # tokens below are padding and the like


class RobertaClassifier(nn.Module):
    """Tokens in, the mean cross-entropy of their classes out (in nats); dropout 0.1.

    Args:
        layers: Of the encoder; roberta-base has 12.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.roberta = RobertaForSequenceClassification(RobertaConfig(num_hidden_layers=layers))

    def forward(self, tokens: Tensor, classes: Tensor) -> Tensor:
        return self.roberta(input_ids=tokens, labels=classes).loss
