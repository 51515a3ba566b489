"""The matrix: models of Hugging Face unlike the rest, from tiny configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recording import LEAN, run

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "Mamba": {**SIZES, "state_size": 4, "use_mambapy": False},
    "Qwen3Moe": {
        **SIZES,
        "moe_intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
    },
    "Whisper": {
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("vocab_size", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
        **dict.fromkeys(("max_source_positions", "max_target_positions"), 16),
        **dict.fromkeys(("decoder_start_token_id", "bos_token_id"), 1),
        "d_model": 32,
        "num_mel_bins": 8,
        "dropout": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 2,
    },
}
HEADS = {"Mamba": "ForCausalLM", "Qwen3Moe": "ForCausalLM", "Whisper": "ForConditionalGeneration"}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_what_the_codes_say(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    model, tokens = getattr(transformers, name + HEADS[name])(config).train(), torch.randint(3, 64, (2, 8))
    sources = {"input_features": torch.randn(2, 8, 32)} if name == "Whisper" else {"input_ids": tokens}

    def loss() -> torch.Tensor:
        return model(**sources, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]

    recording, _ = run(loss, [p for p in model.parameters() if p.requires_grad], LEAN)
    assert recording.check() == len(recording.graphs)
    assert recording.coded
    assert recording.fewbit_bytes < recording.plain_bytes / 2
