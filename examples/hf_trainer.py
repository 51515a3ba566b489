"""transformers' Trainer: python examples/hf_trainer.py [--bf16] [--gradient-checkpointing] [--lora] [--every 5].

A Llama of one layer learns the bytes of a module of Python's. The first line that it prints is

{'loss': '5.552', ..., 'fewbit/saved_bytes': 2680900, 'fewbit/saved_bytes_inductor': 6410308, 'fewbit/saving': '0.5818'}
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fewbit_fx.integrations.transformers import FewBitCallback


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train, print the Trainer's log, and return it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--bf16", "--gradient-checkpointing", "--lora"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("--every", type=int, help="steps from one measurement of the gradient's error to the next")
    parser.add_argument("--steps", type=int, default=10)
    flags = parser.parse_args(argv)

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    if flags.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // 128 * 128].split(128)]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=flags.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            bf16=flags.bf16,
            gradient_checkpointing=flags.gradient_checkpointing,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[FewBitCallback(every=flags.every)])
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
