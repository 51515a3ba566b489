"""Rows sum to totals for architectures of Hugging Face, from configurations, without generating kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import check_sums

import fewbit_fx

transformers = pytest.importorskip("transformers")

LANGUAGE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
IMAGE: dict[str, Any] = {"image_size": 32, "num_labels": 4}
GROUPED = {**LANGUAGE, "num_key_value_heads": 2, "head_dim": 16}
GPT2: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 128}
CONVNEXT: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
ViT = {**{k: v for k, v in LANGUAGE.items() if k != "vocab_size"}, **IMAGE, "patch_size": 8}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED),
    "GPT2": ("GPT2LMHeadModel", GPT2),
    "Bert": ("BertForMaskedLM", LANGUAGE),
    "ViT": ("ViTForImageClassification", ViT),
    "ConvNext": ("ConvNextForImageClassification", {**CONVNEXT, **IMAGE}),
}


def model_and_inputs(name: str) -> tuple[Any, dict[str, Any]]:
    class_name, options = ARCHITECTURES[name]
    model = getattr(transformers, class_name)(getattr(transformers, f"{name}Config")(**options)).train()
    if "image_size" in options:
        return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    tokens = torch.randint(0, 128, (2, 64))
    return model, {"input_ids": tokens, "labels": tokens}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("budget", [1.0, 0.7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_sum_to_totals(name: str, budget: float) -> None:
    model, inputs = model_and_inputs(name)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        report = fewbit_fx.explain(
            model, **inputs, fewbit_config=fewbit_fx.FewBitConfig(recipe="derivatives", strict=True, min_numel=1024)
        )
    assert report.plain_bytes > 0
    for graph in report.graphs:
        check_sums(graph)
    assert len(str(report).splitlines()) <= 38
