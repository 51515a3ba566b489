"""Models at the widths that people train, from configurations, with random weights and few of their layers.

A layer saves the same whatever the number of layers, so that two of them tell the shares; heads over a vocabulary are
scaled with the layers that are left, as they would count too much. Dropout is off, as models of today train, so that
all methods can be compared on one loss: what masks take is in docs/how-much.md. Nothing is downloaded.
Needs transformers; the diffusion models need diffusers, LoRA peft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.architectures import Example, mean_square


@dataclass(frozen=True)
class Scale:
    """How much of a model is built.

    Attributes:
        layers: Blocks, of each kind where there are several.
        batch: Sequences or images.
        tokens: In a sequence of text.
        image: Pixels of a side.
        narrower: What widths and numbers of heads are divided by.
    """

    layers: int = 2
    batch: int = 2
    tokens: int = 256
    image: int = 224
    narrower: int = 1

    def vocabulary(self, size: int, layers: int) -> int:
        """Of a real model with so many words and layers."""
        return max(64, size * self.layers // (layers * self.narrower))


QUICK = Scale(layers=1, batch=2, tokens=64, image=64, narrower=4)
"""Seconds on two cores."""
OF_DEVICE: Mapping[str, Scale] = {"cpu": Scale(), "cuda": Scale(layers=4, batch=8, tokens=1024)}
"""Real widths."""
_SMALL, _IMAGES, _CONVOLUTIONS = {"batch": 16}, {"batch": 128}, {"batch": 128, "layers": 1}
_ON_A_GPU: Mapping[str, Mapping[str, int]] = {
    **dict.fromkeys(("RoBERTa", "GPT-2", "T5", "Whisper"), _SMALL),
    "ViT": _IMAGES,
    **dict.fromkeys(("diffusion U-Net", "ConvNeXt", "ResNet"), _CONVOLUTIONS),
}
"""What else than its scale suits a model on a GPU, which has to be busy for longer than Python needs to launch."""

Build = Callable[[Scale], Example]


def scale_for(model: str, device: str) -> Scale:
    """What suits a model and a device."""
    scale = OF_DEVICE[device]
    return replace(scale, **_ON_A_GPU.get(model, {})) if device == "cuda" else scale


def model_named(name: str) -> Build:
    """How a model is built. Raises ValueError where there is none of that name."""
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; allowed is {', '.join(MODELS)}")
    return MODELS[name]


def _text(model: nn.Module, vocabulary: int, scale: Scale) -> Example:
    tokens = torch.randint(3, vocabulary, (scale.batch, scale.tokens))
    return Example(model, {"input_ids": tokens, "labels": tokens})


def _image(model: nn.Module, scale: Scale) -> Example:
    images = torch.randn(scale.batch, 3, scale.image, scale.image)
    return Example(model, {"pixel_values": images, "labels": torch.randint(2, (scale.batch,))})


def _roberta(scale: Scale) -> Example:
    import transformers as hf

    vocabulary = scale.vocabulary(50265, 12)
    config = hf.RobertaConfig(
        **_encoder(scale), vocab_size=vocabulary, max_position_embeddings=2 + scale.tokens, pad_token_id=1
    )
    return _text(hf.RobertaForMaskedLM(config), vocabulary, scale)


def _encoder(scale: Scale) -> dict[str, Any]:
    """BERT-base's sizes, which many share."""
    return {
        "num_hidden_layers": scale.layers,
        "hidden_size": 768 // scale.narrower,
        "intermediate_size": 3072 // scale.narrower,
        "num_attention_heads": 12 // scale.narrower,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _gpt2(scale: Scale) -> Example:
    import transformers as hf

    vocabulary = scale.vocabulary(50257, 12)
    config = hf.GPT2Config(
        n_layer=scale.layers,
        n_embd=768 // scale.narrower,
        n_head=12 // scale.narrower,
        vocab_size=vocabulary,
        use_cache=False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return _text(hf.GPT2LMHeadModel(config), vocabulary, scale)


def _vit(scale: Scale) -> Example:
    import transformers as hf

    return _image(hf.ViTForImageClassification(hf.ViTConfig(**_encoder(scale), image_size=scale.image)), scale)


def _convnext(scale: Scale) -> Example:
    import transformers as hf

    widths = [width // scale.narrower for width in (96, 192, 384, 768)]
    config = hf.ConvNextConfig(depths=[1, 1, 1 + scale.layers, 1], hidden_sizes=widths)
    return _image(hf.ConvNextForImageClassification(config), scale)


def _resnet(scale: Scale) -> Example:
    import transformers as hf

    widths = [width // scale.narrower for width in (256, 512, 1024, 2048)]
    config = hf.ResNetConfig(embedding_size=64 // scale.narrower, hidden_sizes=widths, depths=[scale.layers] * 4)
    return _image(hf.ResNetForImageClassification(config), scale)


def _decoder(name: str, vocabulary: int, layers: int, width: int, inner: int, heads: int, shared: int) -> Build:
    """A gated language model of transformers.

    Args:
        name: Of its classes, such as ``Llama``.
        vocabulary, layers: Of the real one.
        width, inner: Of the residual stream and of the MLP.
        heads, shared: Of queries, and of keys and values.
    """

    def build(scale: Scale) -> Example:
        import transformers as hf

        words = scale.vocabulary(vocabulary, layers)
        config = getattr(hf, f"{name}Config")(
            num_hidden_layers=scale.layers,
            hidden_size=width // scale.narrower,
            intermediate_size=inner // scale.narrower,
            num_attention_heads=heads // scale.narrower,
            num_key_value_heads=shared // scale.narrower,
            vocab_size=words,
            use_cache=False,
        )
        return _text(getattr(hf, f"{name}ForCausalLM")(config), words, scale)

    return build


def _t5(scale: Scale) -> Example:
    import transformers as hf

    vocabulary = scale.vocabulary(32128, 24)
    config = hf.T5Config(
        num_layers=scale.layers,
        num_decoder_layers=scale.layers,
        d_model=768 // scale.narrower,
        d_ff=2048 // scale.narrower,
        num_heads=12 // scale.narrower,
        vocab_size=vocabulary,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return _text(hf.T5ForConditionalGeneration(config), vocabulary, scale)


def _whisper(scale: Scale) -> Example:
    import transformers as hf

    vocabulary, width, heads = scale.vocabulary(51865, 24), 768 // scale.narrower, 12 // scale.narrower
    config = hf.WhisperConfig(
        encoder_layers=scale.layers,
        decoder_layers=scale.layers,
        d_model=width,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        max_source_positions=scale.tokens,
        vocab_size=vocabulary,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    )
    labels = torch.randint(3, vocabulary, (scale.batch, scale.tokens // 4))
    sound = torch.randn(scale.batch, config.num_mel_bins, 2 * scale.tokens)
    return Example(hf.WhisperForConditionalGeneration(config), {"input_features": sound, "labels": labels})


def _sd3(scale: Scale) -> Example:
    from diffusers import SD3Transformer2DModel

    heads, side = 24 // scale.narrower, scale.image // 8  # of a latent image
    model = SD3Transformer2DModel(
        sample_size=side,
        num_layers=scale.layers,
        num_attention_heads=heads,
        attention_head_dim=64,
        caption_projection_dim=64 * heads,
        joint_attention_dim=4096 // scale.narrower,
        pooled_projection_dim=2048 // scale.narrower,
        pos_embed_max_size=side,
    )
    inputs = {
        "hidden_states": torch.randn(scale.batch, 16, side, side),
        "encoder_hidden_states": torch.randn(scale.batch, 77, 4096 // scale.narrower),
        "pooled_projections": torch.randn(scale.batch, 2048 // scale.narrower),
        "timestep": torch.linspace(10, 900, scale.batch),
    }
    return Example(model, inputs, mean_square)


def _unet(scale: Scale) -> Example:
    from diffusers import UNet2DModel

    widths = tuple(width // scale.narrower for width in (128, 256, 512))
    model = UNet2DModel(
        sample_size=scale.image // 4,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    side = scale.image // 4
    inputs = {"sample": torch.randn(scale.batch, 3, side, side), "timestep": torch.linspace(10, 900, scale.batch)}
    return Example(model, inputs, mean_square)


def _with_lora(build: Build, where: list[str]) -> Build:
    def built(scale: Scale) -> Example:
        from peft import LoraConfig, get_peft_model

        example = build(scale)
        adapters = LoraConfig(r=16, target_modules=where, lora_dropout=0.0)
        return replace(example, model=get_peft_model(example.model, adapters, autocast_adapter_dtype=False))

    return built


_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_llama = _decoder("Llama", 128256, 16, 2048, 8192, 32, 8)  # Llama-3.2-1B
MODELS: Mapping[str, Build] = {
    "RoBERTa": _roberta,
    "GPT-2": _gpt2,
    "ViT": _vit,
    "Llama-3": _llama,
    "Llama-3, LoRA on attention": _with_lora(_llama, _ATTENTION),
    "Llama-3, LoRA on everything": _with_lora(_llama, [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]),
    "Qwen3": _decoder("Qwen3", 151936, 28, 1024, 3072, 16, 8),  # Qwen3-0.6B
    "T5": _t5,
    "Whisper": _whisper,
    "SD3": _sd3,
    "diffusion U-Net": _unet,
    "ConvNeXt": _convnext,
    "ResNet": _resnet,
}
"""By name, in the order of tables: base sizes, Llama-3.2-1B, Qwen3-0.6B, T5 1.1 base, Whisper small, SD3 medium."""


def sizes_of(scales: Iterable[Mapping[str, int]]) -> str:
    """What the models of a table are measured at, for its caption.

    Args:
        scales: Each a Scale, as a file has it.
    """
    scales = list(scales)
    each = {name: sorted({scale[name] for scale in scales}) for name in asdict(QUICK)}
    layers, batch, tokens, image = (_range(each[name]) for name in ("layers", "batch", "tokens", "image"))
    (narrower,) = each["narrower"]
    widths = "real widths" if narrower == 1 else f"widths divided by {narrower}"
    return f"{layers} layers of {widths}, batch {batch}, {tokens} tokens, images of {image} pixels"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def built(name: str, scale: Scale, dtype: torch.dtype, device: torch.device, seed: int) -> Example:
    """A model and its inputs, to be trained, from a seed."""
    torch.manual_seed(seed)
    example = model_named(name)(scale).of(dtype)
    inputs = {key: x.to(device) for key, x in example.inputs.items()}
    return replace(example, model=example.model.to(device), inputs=inputs)
