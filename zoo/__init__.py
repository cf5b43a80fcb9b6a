"""A model zoo of unified visual tokenizers: one contract, one way to train, the authors' weights."""

from zoo.errors import ZooError
from zoo.registry import (
    create_decoder,
    create_encoder,
    create_generator,
    create_tokenizer,
    list_decoders,
    list_encoders,
    list_generators,
    list_tokenizers,
    load_decoder,
    load_encoder,
    load_generator,
    load_tokenizer,
    register_tokenizer,
    save_tokenizer,
)
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights

__all__ = [
    "Preset",
    "Tokenizer",
    "TokenizerInfo",
    "Tokens",
    "Weights",
    "ZooError",
    "create_decoder",
    "create_encoder",
    "create_generator",
    "create_tokenizer",
    "list_decoders",
    "list_encoders",
    "list_generators",
    "list_tokenizers",
    "load_decoder",
    "load_encoder",
    "load_generator",
    "load_tokenizer",
    "register_tokenizer",
    "save_tokenizer",
]
