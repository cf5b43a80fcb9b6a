"""A causal language model that reads and writes images through a tokenizer of the zoo, at any size.

Words and images go through one vocabulary: an image in a sequence is a begin word, a word for each of its tokens, and
an end word. What stands behind these words, how the model reads it and how it is written is the matter of its visual
side: ids of a discrete tokenizer (zoo.lm.codes, as in SEED-LLaMA, arXiv 2310.01218), their codebook embeddings behind a
projector (zoo.lm.embeddings, as in ETT, arXiv 2505.10562) or latents behind a flow head (zoo.lm.latents, as in
Ming-UniVision, arXiv 2510.06590).
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo import registry
from zoo.errors import ZooError, one_line, shortened
from zoo.hub import pretrained
from zoo.lm.codes import CodeVision
from zoo.lm.embeddings import EmbeddingConfig, EmbeddingVision
from zoo.lm.latents import FlowVision
from zoo.lm.vision import Seen, Vision, patches
from zoo.tokenizer import Tokenizer, Tokens
from zoo.tokenizers.mingtok.head import FlowHead, FlowHeadConfig
from zoo.tokenizers.mingtok.tokenizer import MingTokTokenizer
from zoo.vocabulary import Stream, Vocabulary

VISIONS = FlowVision, CodeVision, EmbeddingVision


class VisualLM(nn.Module):
    """A causal language model of transformers, its text tokenizer, and a visual side.

    Args:
        lm: with rows for all words.
        words: the text tokenizer, with the words of the visual side last; see `create`.
        vision: how images are read and written.
        bos: sequences begin with the text tokenizer's bos_token, as those of LLaMA do.

    Raises:
        ZooError: the parts do not fit together.
    """

    def __init__(self, lm: PreTrainedModel, words: PreTrainedTokenizerFast, vision: Vision, bos: bool = False):
        super().__init__()
        self.lm, self.words, self.vision, self.bos = lm, words, vision, bos
        added = sum(len(stream.words()) for stream in vision.streams)
        self.vocabulary = Vocabulary(len(words) - added, vision.streams)
        self._check()
        # by its name in the transformers at hand, older ones say past_key_values
        self._cache = "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"

    def _check(self) -> None:
        added = self.vocabulary.words
        if self.words.convert_tokens_to_ids(added) != list(range(self.vocabulary.text_size, len(self.vocabulary))):
            named = ", ".join(added if len(added) < 7 else [*added[:3], "...", added[-1]])
            raise ZooError(f"the last words of the text tokenizer must be {named}; VisualLM.create adds them.")
        if self.words.eos_token_id is None:
            raise ZooError("the text tokenizer has no eos_token, which ends a caption; set one.")
        if self.bos and self.words.bos_token_id is None:
            raise ZooError("the text tokenizer has no bos_token to begin with; set one, or bos=False.")
        rows = self.lm.get_input_embeddings().weight.shape[0]
        if rows < (needed := len(self.vocabulary) - self.vision.unembedded):
            raise ZooError(
                f"the language model has {rows} words and the text tokenizer {needed}; "
                "extend it as VisualLM.create does."
            )
        self.vision.check(self.lm.config.get_text_config().hidden_size)

    @classmethod
    def create(
        cls,
        lm: PretrainedConfig | str | Path,
        words: PreTrainedTokenizerFast | str | Path,
        tokenizer: Tokenizer,
        head: FlowHeadConfig | None = None,
        streams: Sequence[Stream | str] | None = None,
        num_tokens: int | None = None,
        bos: bool = False,
        embeddings: EmbeddingConfig | None = None,
    ) -> VisualLM:
        """A model to be trained: a flow head is fresh, and the words of images are added.

        Args:
            lm: sizes of a fresh language model, but for its number of words, or hub id or folder of a trained one.
            words: a text tokenizer, which receives the new words, or hub id or folder of one.
            tokenizer: of images, frozen from now on.
            head: sizes of the flow head that MingTok needs.
            streams: of a discrete tokenizer whose ids are words, see CodeVision.
            num_tokens: of a discrete tokenizer of variable length, see CodeVision.
            bos: see VisualLM.
            embeddings: read the codebook embeddings of a discrete tokenizer; None: its ids are words.

        Raises:
            ZooError: the parts cannot be had, or do not fit together.
        """
        if not isinstance(lm, PretrainedConfig):
            options = {"use_safetensors": True, "trust_remote_code": False}
            lm = pretrained(AutoModelForCausalLM, lm, dtype=torch.float32, **options)
        config = lm if isinstance(lm, PretrainedConfig) else lm.config
        hidden_size = config.get_text_config().hidden_size
        vision = _vision(tokenizer, head, streams, num_tokens, embeddings, hidden_size)
        if isinstance(words, (str, Path)):
            words = pretrained(PreTrainedTokenizerFast, words)
        vocabulary = Vocabulary(len(words), vision.streams)
        vocabulary.extend_tokenizer(words)
        if isinstance(lm, PretrainedConfig):
            lm = copy.deepcopy(lm)
            lm.vocab_size = len(vocabulary) - vision.unembedded
            lm = AutoModelForCausalLM.from_config(lm)
        # many models have more rows than words, and those serve
        elif lm.get_input_embeddings().weight.shape[0] < len(vocabulary) - vision.unembedded:
            vocabulary.extend_embedding(lm)
        return cls(lm, words, vision, bos)

    @property
    def context(self) -> int:
        """Positions of the longest sequence; without a limit where the language model states none."""
        return getattr(self.lm.config.get_text_config(), "max_position_embeddings", sys.maxsize)

    # Sequences

    def text_ids(self, text: str) -> list[int]:
        """A text as ids, without words for its beginning or end."""
        return self.words(text, add_special_tokens=False)["input_ids"]

    def join(self, *pieces: Sequence[int] | Tokens | int) -> Tensor:
        """Text, as ids, and images to one sequence of ids (T,), which begins with the bos_token where the model has it.

        An image is Tokens of one, as Vision.see gives them; one of latents can be their number.
        """
        start = [[self.words.bos_token_id]] if self.bos else []
        pieces = [patches(1, piece) if isinstance(piece, int) else piece for piece in pieces]
        return self.vocabulary.join([*start, *pieces])

    def pad(self, sequences: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
        """Ids (B, T) of sequences of different lengths, filled at their "left" or "right", and which are live; both on
        the CPU."""
        live = [torch.ones_like(ids, dtype=torch.bool) for ids in sequences]
        ids = pad_sequence(sequences, True, self.words.eos_token_id, side)
        return ids, pad_sequence(live, True, False, side)

    def embed(self, ids: Tensor, images: Tensor | None = None) -> Tensor:
        """Inputs (B, T, hidden_size) for ids: embedded words and, where it is not the words that are read of images,
        the inputs (n, N, hidden_size) of Vision.see, in the order in which they come."""
        embedding = self.lm.get_input_embeddings()
        if images is None:
            return embedding(ids)
        places = self.vocabulary.stream_of(ids) >= 0
        inputs = embedding(ids.masked_fill(places, 0))  # their words may have no rows
        return inputs.masked_scatter(places[..., None], images.to(inputs.dtype))

    def run(
        self, inputs: Tensor, live: Tensor, keep: int | Tensor, cache: DynamicCache | None = None
    ) -> CausalLMOutputWithPast:
        """The language model over inputs (B, n, hidden_size), the last of the positions of live (B, T).

        keep: whose logits are computed: so many of the last positions, or these indices; as logits_to_keep in
        transformers. cache: of the positions before, which receives these.
        """
        # positions count what a row sees, so that a hidden prompt and one that is not there are the same
        positions = (live.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        return self.lm(
            inputs_embeds=inputs,
            attention_mask=live.long(),
            position_ids=positions,
            use_cache=cache is not None,
            logits_to_keep=keep,
            output_hidden_states=True,
            **{} if cache is None else {self._cache: cache},
        )

    def forward(
        self,
        texts: Sequence[str],
        images: Tensor | Seen,
        to_image: Tensor,
        dropped: Tensor,
        *draws: Tensor,
        all_words: bool = False,
        prompts: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses of pairs of a text and an image, each in one of two directions:

            text, image            tokens of the image are learned
            image, text, its end   words behind the image are learned

        Texts too long for the context are cut off.

        Args:
            texts: B, none empty.
            images: (B, C, H, W) in [0, 1], or what `vision.see` gave of them.
            to_image: (B,) bool on the CPU, True: text to image; False: image to text.
            dropped: (B,) bool on the CPU: without the text, for guidance, where it leads to an image.
            draws: of Vision.draws for B images, rows of the images; a flow head's are times (B, N) and noise (B, N, C).
            all_words: every word that has one before it is learned, as in SEED-LLaMA: the text before an image, an
                image before a text, the words around it, and the end of every sequence.
            prompts: B texts that are read and not learned, between an image and the text that follows it.

        Returns:
            Cross entropy (n,) of each word of a text, and (m,) that of each word of an image, where these are tokens,
            or the error of each latent.

        Raises:
            ZooError: an empty text, one without which nothing stands before its image, or no room for any.
        """
        if all_words and not self.vision.spoken:
            raise ZooError("all_words is for images of words, and these have latents; leave it out.")
        seen = images if isinstance(images, Seen) else self.vision.see(images)
        sequences, learned, end = [], [], [self.words.eos_token_id]
        alone = not (self.bos or self.vision.streams[0].begin)  # whether an image can be the first in a sequence
        for i, (text, image_last, drop) in enumerate(zip(texts, to_image.tolist(), dropped.tolist(), strict=True)):
            image = self.vocabulary.join([seen.tokens[i]])
            prompt = [] if prompts is None or image_last else self.text_ids(prompts[i])
            room = self.context - self.bos - len(image) - len(prompt) - 1  # for the end
            if room < 1:
                asked = f", a prompt of {len(prompt)}" if prompt else ""
                raise ZooError(
                    f"an image of {len(image)} words{asked} and a text do not fit into a context of {self.context}."
                )
            ids = self.text_ids(text)[:room]
            if not ids:
                raise ZooError(f"text {i} of the batch is empty; leave such samples out of the data.")
            if image_last and drop and alone:
                raise ZooError("an image without its text needs a word to begin with: set embeddings.marks or bos.")
            before, after = (ids, end if all_words else []) if image_last else ([], [*ids, *end])
            before = [] if image_last and drop else before
            sequences.append(torch.cat([self.join(before), image, self.vocabulary.join([prompt, after])]))
            first = len(sequences[-1]) - (0 if image_last else len(after))
            learned.append(torch.arange(len(sequences[-1])) >= first)
        ids, live = self.pad(sequences, "right")
        learned = pad_sequence(learned, batch_first=True)

        # what is learned where is known on the CPU: from here on a training step does not wait for the device
        following = ids[:, 1:]
        if all_words:
            tokens = following >= self.vocabulary.text_size
            words = ~tokens & live[:, 1:]
        else:
            words, tokens = learned[:, 1:], (self.vocabulary.stream_of(following) >= 0) & to_image[:, None]
        said = words | tokens if self.vision.spoken else words
        keep, device = said.any(0).nonzero()[:, 0], self.lm.device
        place = lambda chosen: tuple(index.to(device) for index in chosen.nonzero(as_tuple=True))  # noqa: E731
        inputs = self.embed(ids.to(device), seen.inputs)
        output = self.run(inputs, live.to(device), keep.to(device))

        def cross_entropy(chosen: Tensor) -> Tensor:
            logits = output.logits[place(chosen[:, keep])]
            return F.cross_entropy(logits.float(), following[chosen].to(device), reduction="none")

        if self.vision.spoken:
            return cross_entropy(words), cross_entropy(tokens)
        if seen.latents is None:  # images are only read
            if to_image.any():
                raise ZooError(f"images are not written: {self.vision.obstacle}; or set image_share=0.")
            return cross_entropy(words), inputs.new_zeros(0)
        targets = (one[place(to_image)].flatten(0, 1) for one in (seen.latents, *draws))
        return cross_entropy(words), self.vision.loss(output.hidden_states[-1][place(tokens)], *targets)

    # Files

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads and, for the language model and its words alone, transformers does too."""
        folder = Path(folder)
        registry.preset(self.vision.tokenizer.info.name)  # by which load finds its class
        self.lm.save_pretrained(folder)
        self.words.save_pretrained(folder)
        for kind in VISIONS:  # of another model that was here
            (folder / kind.FILE).unlink(missing_ok=True)
        self.vision.save(folder, {"bos": self.bos})

    @classmethod
    def load(
        cls, folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> VisualLM:
        """What `save` wrote, in evaluation mode; device and dtype as in torch. Raises ZooError for anything else."""
        folder = Path(folder).expanduser()
        kind = next((kind for kind in VISIONS if (folder / kind.FILE).is_file()), None)
        if kind is None:
            files = " nor ".join(kind.FILE for kind in VISIONS)
            raise ZooError(f"{folder} is no folder that VisualLM.save wrote: it has neither {files}.")
        try:
            vision, about = kind.load(folder)
            options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
            lm, loading = pretrained(AutoModelForCausalLM, folder, **options)
            model = cls(lm, pretrained(PreTrainedTokenizerFast, folder), vision, about["bos"])
        except ZooError:
            raise
        except Exception as error:  # there is no limit to what damaged files raise in transformers and tokenizers
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ZooError(f"{folder} is not what VisualLM.save wrote ({reason}); copy it again.") from error
        # of which transformers makes new ones, with a warning
        wrong = [name for kind, names in loading.items() if kind != "unexpected_keys" for name in names]
        wrong += [name for name, tensor in lm.state_dict().items() if not tensor.isfinite().all()]
        if wrong:
            raise ZooError(f"the language model in {folder} lacks right values of {shortened(wrong)}; copy it again.")
        return model.to(device=device, dtype=dtype).eval()


def _vision(
    tokenizer: Tokenizer,
    head: FlowHeadConfig | None,
    streams: Sequence[Stream | str] | None,
    num_tokens: int | None,
    embeddings: EmbeddingConfig | None,
    hidden_size: int,
) -> Vision:
    info = tokenizer.info
    if info.kind == "discrete" and head is not None:
        raise ZooError(f"a flow head writes latents, and {info.name} has ids; leave the head out.")
    if embeddings is not None:
        if streams is not None:
            raise ZooError("codebook embeddings are of all streams and no words; leave streams out.")
        return EmbeddingVision(tokenizer, hidden_size, embeddings, num_tokens)
    if info.kind == "discrete":
        return CodeVision(tokenizer, streams, num_tokens)
    if not isinstance(tokenizer, MingTokTokenizer):
        raise ZooError(
            f"a language model reads ids, or the features that MingTok makes of latents, and {info.name} has latents "
            "alone; choose another tokenizer."
        )
    if head is None or streams is not None or num_tokens is not None:
        raise ZooError(f"{info.name} has latents, which need a head to write them, and no streams or num_tokens.")
    return FlowVision(tokenizer, FlowHead(head))
