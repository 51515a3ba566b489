"""Architectures that people train, from configurations: few layers, real ratios of widths, random weights.

A vocabulary is scaled by layers and width, so that logits keep their share of what is saved. Nothing is downloaded.
Needs transformers; the diffusion models need diffusers, the LoRA ones peft.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH = 3, 256
BATCH, TOKENS = 2, 256
FLOAT32_ADAPTERS = ", float32 adapters"
"""What names of rows end with where LoRA's weights are float32, as PEFT makes them, and the model is not."""


def quiet_libraries() -> None:
    """What models from configurations warn of is meant so."""
    for name in ("transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Example:
    """A model, what it is called with, and how its loss follows from what it returns.

    Attributes:
        model: The model.
        inputs: Its keyword arguments.
        loss: Of what it returns.
        float32: A part of the names of the parameters that are float32 whatever the others are.
    """

    model: nn.Module
    inputs: Mapping[str, Tensor]
    loss: Callable[[Any], Tensor] = lambda result: result.loss
    float32: str | None = None

    def of(self, dtype: torch.dtype) -> Example:
        """The same with floating-point parameters and inputs of a dtype, to be trained."""
        model = self.model.to(dtype).train()
        for name, parameter in model.named_parameters():
            if self.float32 and self.float32 in name:
                parameter.data = parameter.data.float()
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs.items()}
        return replace(self, model=model, inputs=inputs)


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: Such as ``Llama-3``.
        group: ``transformer``, ``other`` or ``lora``.
        build: Makes the example.
    """

    name: str
    group: str
    build: Callable[[], Example]


def architectures() -> list[Architecture]:
    """All of them, in the order of the table."""
    return [
        *(Architecture(name, "transformer", build) for name, build in _TRANSFORMERS.items()),
        *(Architecture(name, "other", build) for name, build in _OTHERS.items()),
        *(
            Architecture(f"Llama-3, LoRA on {name}{suffix}", "lora", _with_adapters(_llama, where, float32))
            for name, where in (("attention", _ATTENTION), ("all linear layers", [*_ATTENTION, *_MLP]))
            for suffix, float32 in (("", False), (FLOAT32_ADAPTERS, True))
        ),
        *(
            Architecture(
                f"{name}, LoRA on attention{FLOAT32_ADAPTERS}", "lora", _with_adapters(_TRANSFORMERS[name], where, True)
            )
            for name, where in (("Qwen3", _ATTENTION), ("Gemma-3", _ATTENTION), ("Phi-3", ["qkv_proj", "o_proj"]))
        ),
    ]


def _vocabulary(size: int, layers: int, width: int) -> int:
    """A vocabulary that is to ours as the real one to a model of so many layers and such a width."""
    return round(size / (layers * width) * LAYERS * WIDTH)


def _text(model: nn.Module, vocabulary: int) -> Example:
    tokens = torch.randint(3, vocabulary, (BATCH, TOKENS))
    return Example(model, {"input_ids": tokens, "labels": tokens})


def _language_model(name: str, task: str, real: tuple[int, int, int], **sizes: Any) -> Callable[[], Example]:
    """A language model of transformers.

    Args:
        name: What its classes begin with, such as ``Llama``.
        task: What its model ends with, such as ``ForCausalLM``.
        real: Vocabulary, layers and width of the real one.
        **sizes: Of its configuration, beside layers, width and vocabulary.
    """

    def build() -> Example:
        import transformers as hf

        vocabulary = _vocabulary(*real)
        make = getattr(hf, _CONFIGURATIONS.get(name, f"{name}Config"))
        config = make(num_hidden_layers=LAYERS, hidden_size=WIDTH, vocab_size=vocabulary, **sizes)
        return _text(getattr(hf, f"{name}{task}")(config), vocabulary)

    return build


_CONFIGURATIONS = {"Gemma3": "Gemma3TextConfig"}  # of those that are not named like the model


def _vit() -> Example:
    import transformers as hf

    config = hf.ViTConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=4,
        image_size=128,
        patch_size=8,
    )
    return _image(hf.ViTForImageClassification(config), 128)


def _image(model: nn.Module, size: int) -> Example:
    return Example(model, {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": torch.tensor([0, 1])})


def _gpt2() -> Example:
    import transformers as hf

    vocabulary = _vocabulary(50257, 12, 768)
    config = hf.GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=vocabulary)
    return _text(hf.GPT2LMHeadModel(config), vocabulary)


def _whisper() -> Example:
    import transformers as hf

    vocabulary, frames = _vocabulary(51865, 12, 768), 256
    config = hf.WhisperConfig(
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        d_model=WIDTH,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_source_positions=frames,
        vocab_size=vocabulary,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    labels = torch.randint(3, vocabulary, (BATCH, TOKENS // 4))
    features = torch.randn(BATCH, config.num_mel_bins, 2 * frames)
    return Example(hf.WhisperForConditionalGeneration(config), {"input_features": features, "labels": labels})


def _dit() -> Example:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=LAYERS, sample_size=32, num_embeds_ada_norm=1000
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 32, 32),
        "timestep": torch.tensor([10, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    return Example(model, inputs, mean_square)


def mean_square(result: Any) -> Tensor:
    """A loss for what predicts noise, with a target of its own."""
    sample = result.sample
    target = torch.linspace(-1, 1, sample.shape[-1], device=sample.device)
    return (sample.float() - target).square().mean()


def _resnet50() -> Example:
    import transformers as hf

    return _image(hf.ResNetForImageClassification(hf.ResNetConfig()), 64)


def _unet() -> Example:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    inputs = {"sample": torch.randn(BATCH, 3, 32, 32), "timestep": torch.tensor([10, 500])}
    return Example(model, inputs, mean_square)


def _convnext() -> Example:
    import transformers as hf

    config = hf.ConvNextConfig(depths=[1, 1, 3, 1], hidden_sizes=[48, 96, 192, 384], drop_path_rate=0.0)
    return _image(hf.ConvNextForImageClassification(config), 128)


def _with_adapters(build: Callable[[], Example], where: list[str], float32: bool) -> Callable[[], Example]:
    """With LoRA on the linear layers of these names, in float32, which is PEFT's default, or in the model's dtype."""

    def adapted() -> Example:
        from peft import LoraConfig, get_peft_model

        example, adapters = build(), LoraConfig(r=8, target_modules=where, lora_dropout=0.0)
        return replace(example, model=get_peft_model(example.model, adapters), float32="lora_" if float32 else None)

    return adapted


_ATTENTION, _MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


_llama = _language_model(
    "Llama", "ForCausalLM", (128256, 32, 4096), intermediate_size=896, num_attention_heads=8, num_key_value_heads=2
)
_QWEN3 = {"intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
_TRANSFORMERS = {
    "Llama-3": _llama,
    "Qwen3": _language_model("Qwen3", "ForCausalLM", (151936, 36, 4096), **_QWEN3),
    "Gemma-3": _language_model(
        "Gemma3",
        "ForCausalLM",
        (262144, 34, 2560),
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=128,
    ),
    "Phi-3": _language_model(
        "Phi3",
        "ForCausalLM",
        (32064, 32, 3072),
        intermediate_size=683,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
    ),
    "ModernBERT": _language_model(
        "ModernBert",
        "ForMaskedLM",
        (50368, 22, 768),
        intermediate_size=384,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "ViT": _vit,
    "GPT-2": _gpt2,
    "BERT": _language_model(
        "Bert", "ForMaskedLM", (30522, 12, 768), intermediate_size=4 * WIDTH, num_attention_heads=4
    ),
    "Whisper": _whisper,
    "DiT": _dit,
}
_OTHERS = {
    "Qwen3-MoE": _language_model(
        "Qwen3Moe",
        "ForCausalLM",
        (151936, 48, 2048),
        moe_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        **_QWEN3,
    ),
    "ResNet-50": _resnet50,
    "diffusion U-Net": _unet,
    "ConvNeXt": _convnext,
}
