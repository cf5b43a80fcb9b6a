"""Small models with random weights for the tests of this folder."""

import torch
from transformers import GPT2Config, LlamaConfig, Qwen2Config

import zoo
from zoo.lm import VisualLM
from zoo.lm.text import train_text_tokenizer
from zoo.tokenizers.mingtok.head import FlowHeadConfig

CAPTIONS = ["a small red cube", "two blue spheres and a large green ring on a gray floor", "red", "a cone and a cube"]
TOKENIZER = {
    **{"image_size": 16, "latent_dim": 4, "head_dim": 16},
    **{f"{part}_{name}": n for part in ("encoder", "semantic", "pixel") for name, n in (("width", 32), ("depth", 1))},
}
HEAD = {
    **{"latent_dim": 4, "hidden_size": 24, "feature_dim": 32, "condition_dim": 16, "width": 16},
    **{"depth": 1, "num_steps": 3},
}
SIZES = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "max_position_embeddings": 64,
}
LANGUAGE_MODELS = {
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=64),
}
N = 4
"""Latents of an image."""


def language_model(lm, sizes=SIZES):
    """A name of LANGUAGE_MODELS, a configuration, or sizes of a Qwen2."""
    if isinstance(lm, dict):
        return Qwen2Config(**{**sizes, "num_key_value_heads": 1} | lm)
    return LANGUAGE_MODELS[lm] if isinstance(lm, str) else lm


def make(lm="qwen2", std=0.1, captions=CAPTIONS, **head):
    torch.manual_seed(0)
    tokenizer = zoo.create_tokenizer("mingtok-tiny", **TOKENIZER)
    config = language_model(lm)
    model = VisualLM.create(config, train_text_tokenizer(captions, 280), tokenizer, FlowHeadConfig(**HEAD | head))
    with torch.no_grad():  # a fresh flow head is zero, and hears no condition
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return model.eval()


def pictures(count, seed=1):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def draws(count, seed=2):
    """Times and noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, N, generator=generator), torch.randn(count, N, 4, generator=generator)


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


CODE_TOKENIZERS = {
    "plain": (
        "vqgan-tiny",
        {"image_size": 16, "codebook_size": 12, "ema_decay": 0.0, "restart_below": 0.0},
    ),
    "residual": (
        "dualtoken-tiny",
        {
            **{"image_size": 16, "encoder": {"image_size": 16}, "decoder": {"image_size": 16}},
            **{"semantic": {"codebook_size": 6, "levels": 2}, "pixel": {"codebook_size": 5, "levels": 3}},
        },
    ),
}
CODE_SIZES = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 96}


def code_tokenizer(kind="plain"):
    torch.manual_seed(0)
    name, sizes = CODE_TOKENIZERS[kind]
    tokenizer = zoo.create_tokenizer(name, **sizes).eval()
    with torch.no_grad():  # so that images differ
        for parameter in tokenizer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return tokenizer


def text_words(captions=CAPTIONS, bos=False):
    words = train_text_tokenizer(captions, 280)
    if bos:
        words.add_special_tokens({"bos_token": "<s>"})
    return words


def make_codes(kind="plain", lm=None, std=0.1, bos=False, **settings):
    """A model of ids with random weights; kind: of CODE_TOKENIZERS, or a tokenizer."""
    tokenizer = code_tokenizer(kind) if isinstance(kind, str) else kind
    config = language_model(lm or {}, CODE_SIZES)
    torch.manual_seed(0)
    model = VisualLM.create(config, text_words(bos=bos), tokenizer, bos=bos, **settings)
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return model.eval()
