"""Words of a language model that is trained from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zoo.errors import ZooError

END_OF_TEXT = "<|endoftext|>"


def train_text_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE (arXiv 1508.07909, on bytes as in GPT-2) with up to vocab_size words, END_OF_TEXT one of them.

    Any text can be written with it. Raises ZooError for a vocabulary without room for the 256 bytes and END_OF_TEXT.
    """
    if vocab_size < 257:
        raise ZooError(f"vocab_size must be at least 257, the bytes and {END_OF_TEXT}, got {vocab_size}.")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END_OF_TEXT)
