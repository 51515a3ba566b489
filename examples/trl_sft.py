"""TRL's SFTTrainer with adapters of PEFT: python examples/trl_sft.py.

A Llama of one layer learns the bytes of a module of Python's. The first line that it prints is

{'loss': '6.007', ..., 'fewbit/saved_bytes': 1670656, 'fewbit/saved_bytes_inductor': 5039104, 'fewbit/saving': '0.6685'}
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from fewbit_fx.integrations.transformers import FewBitCallback


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train, print the trainer's log, and return it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    flags = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer()  # a token is a byte: there is nothing to download
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    text = Path(argparse.__file__).read_text()
    data = Dataset.from_dict({"text": [text[start : start + 127] for start in range(0, len(text) - 127, 127)]})

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=flags.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        adapters = LoraConfig(r=8, target_modules="all-linear")
        trainer = SFTTrainer(
            model, arguments, None, data, processing_class=tokenizer, peft_config=adapters, callbacks=[FewBitCallback()]
        )
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
