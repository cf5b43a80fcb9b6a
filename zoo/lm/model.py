"""A causal language model that reads MingTok's features and writes its latents (arXiv 2510.06590), at any size.

Words go through one vocabulary: an image in a sequence is <image>, one <imagePatch> for each latent, </image>. At a
patch the model reads the projected feature of its latent instead of an embedded word, and what it has read before a
patch, at <image> or at the patch before, is the condition under which a flow head writes that patch's latent.
"""

from __future__ import annotations

import copy
import json
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

from zoo import registry, weights
from zoo.errors import ZooError
from zoo.tokenizer import Tokens, config_fields, make_config
from zoo.tokenizers.mingtok.head import FlowHead, FlowHeadConfig
from zoo.tokenizers.mingtok.tokenizer import MingTokTokenizer
from zoo.vocabulary import Stream, Vocabulary

IMAGE = Stream("image", 1, "<imagePatch>", begin="<image>", end="</image>")

HEAD_FILE, TOKENIZER_FILE = "head.safetensors", "visual_tokenizer.safetensors"


class FlowVision(nn.Module):
    """The visual side: a frozen MingTok, and the head between it and the language model.

    Raises ZooError when the widths of the two differ.
    """

    def __init__(self, tokenizer: MingTokTokenizer, head: FlowHead):
        super().__init__()
        self.tokenizer, self.head = tokenizer.eval().requires_grad_(False), head
        for field, ours in (
            ("feature_dim", tokenizer.config.semantic_width),
            ("latent_dim", tokenizer.config.latent_dim),
        ):
            if getattr(head.config, field) != ours:
                raise ZooError(
                    f"the flow head has {field} {getattr(head.config, field)} and {tokenizer.info.name} needs {ours}; "
                    f"set head.{field}."
                )

    def inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] to what the model reads for them (B, N, hidden_size), and writes (B, N, C).

        Unchecked, since checks would wait for the device in each training step; see tokenizer.check_images.
        """
        with torch.no_grad():
            latents = self.tokenizer.encoder(self.tokenizer.to_values(images))[:, :-1]
            features = self.tokenizer.semantic_decoder(latents)
        return self.head.project(features), self.tokenizer.normalize(latents)

    def loss(self, hidden: Tensor, targets: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Errors (n,) of the targets (n, C) after the hidden states (n, hidden_size), see FlowHead.loss."""
        return self.head.loss(self.head.condition(hidden), targets, t, noise)


class VisualLM(nn.Module):
    """A causal language model of transformers, its text tokenizer, and a visual side.

    Args:
        lm: with rows for all words.
        words: the text tokenizer, with the words of IMAGE last; see `create`.
        vision: images to inputs and targets.

    Raises:
        ZooError: the three do not fit together.
    """

    def __init__(self, lm: PreTrainedModel, words: PreTrainedTokenizerFast, vision: FlowVision):
        super().__init__()
        self.lm, self.words, self.vision = lm, words, vision
        self.vocabulary = Vocabulary(len(words) - len(IMAGE.words()), [IMAGE])
        self._check()

    def _check(self) -> None:
        if any(self.words.convert_tokens_to_ids(word) != self.vocabulary.id_of(word) for word in IMAGE.words()):
            raise ZooError(
                f"the last words of the text tokenizer must be {', '.join(IMAGE.words())}; VisualLM.create adds them."
            )
        if self.words.eos_token_id is None:
            raise ZooError("the text tokenizer has no eos_token, which ends a caption; set one.")
        rows = self.lm.get_input_embeddings().weight.shape[0]
        if rows < len(self.vocabulary):
            raise ZooError(
                f"the language model has {rows} words and the text tokenizer {len(self.vocabulary)}; "
                "extend it as VisualLM.create does."
            )
        width, head = self.lm.config.get_text_config().hidden_size, self.vision.head.config
        if head.hidden_size != width:
            raise ZooError(
                f"the flow head has hidden_size {head.hidden_size} and the language model {width}; "
                "set head.hidden_size."
            )

    @classmethod
    def create(
        cls,
        lm: PretrainedConfig | str | Path,
        words: PreTrainedTokenizerFast | str | Path,
        tokenizer: MingTokTokenizer,
        head: FlowHeadConfig,
    ) -> VisualLM:
        """A model to be trained: the head is fresh, and the words of images are added.

        Args:
            lm: sizes of a fresh language model, but for its number of words, or hub id or folder of a trained one.
            words: a text tokenizer, which receives the new words, or hub id or folder of one.
            tokenizer: frozen from now on.
            head: its sizes.

        Raises:
            ZooError: the parts cannot be had, or do not fit together.
        """
        if isinstance(words, (str, Path)):
            words = _pretrained(PreTrainedTokenizerFast, words)
        vocabulary = Vocabulary(len(words), [IMAGE])
        vocabulary.extend_tokenizer(words)
        if isinstance(lm, PretrainedConfig):
            lm = copy.deepcopy(lm)
            lm.vocab_size = len(vocabulary)
            lm = AutoModelForCausalLM.from_config(lm)
        else:
            lm = _pretrained(AutoModelForCausalLM, lm, dtype=torch.float32, use_safetensors=True)
            # many models have more rows than words, and those serve
            if lm.get_input_embeddings().weight.shape[0] < len(vocabulary):
                vocabulary.extend_embedding(lm)
        return cls(lm, words, FlowVision(tokenizer, FlowHead(head)))

    @property
    def context(self) -> int:
        """Positions of the longest sequence; without a limit where the language model states none."""
        return getattr(self.lm.config.get_text_config(), "max_position_embeddings", sys.maxsize)

    # Sequences

    def text_ids(self, text: str) -> list[int]:
        """A text as ids, without words for its beginning or end."""
        return self.words(text, add_special_tokens=False)["input_ids"]

    def join(self, *pieces: Sequence[int] | int) -> Tensor:
        """Text, as ids, and images, as numbers of tokens, to one sequence of ids (T,)."""
        image = lambda count: Tokens(ids={"image": torch.zeros(1, count, dtype=torch.int64)})  # noqa: E731
        return self.vocabulary.join([image(piece) if isinstance(piece, int) else piece for piece in pieces])

    def pad(self, sequences: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
        """Ids (B, T) of sequences of different lengths, filled at their "left" or "right", and which are live; both on
        the CPU."""
        live = [torch.ones_like(ids, dtype=torch.bool) for ids in sequences]
        ids = pad_sequence(sequences, True, self.words.eos_token_id, side)
        return ids, pad_sequence(live, True, False, side)

    def embed(self, ids: Tensor, images: Tensor | None = None) -> Tensor:
        """Inputs (B, T, hidden_size) for ids: embedded words and, at the patches, the images (n, N, hidden_size), as
        FlowVision.inputs gives them, in the order in which they come."""
        inputs = self.lm.get_input_embeddings()(ids)
        if images is None:
            return inputs
        patches = ids == self.vocabulary.id_of(IMAGE.word)
        return inputs.masked_scatter(patches[..., None], images.to(inputs.dtype))

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
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
            output_hidden_states=True,
        )

    def forward(
        self, texts: Sequence[str], images: Tensor, to_image: Tensor, dropped: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of pairs of a text and an image, each in one of two directions:

            text <image> patches </image>           latents are targets
            <image> patches </image> text, its end  words behind the image are targets

        Texts too long for the context are cut off.

        Args:
            texts: B.
            images: (B, 3, H, W) in [0, 1].
            to_image: (B,) bool on the CPU, True: text to image; False: image to text.
            dropped: (B,) bool on the CPU: without the text, for guidance, where it leads to an image.
            t: (B, N) times in [0, 1].
            noise: (B, N, C) standard normal.

        Returns:
            Cross entropy (n,) of each word, and squared error (m,) of the velocity of each latent.
        """
        inputs, latents = self.vision.inputs(images)
        count = inputs.shape[1]
        room = self.context - count - 3  # marks, end of text
        if room < 1:
            raise ZooError(f"an image of {count} tokens and a text do not fit into a context of {self.context}.")
        sequences = []
        for text, image_last, drop in zip(texts, to_image.tolist(), dropped.tolist(), strict=True):
            ids = self.text_ids(text)[:room]
            before, after = ([] if drop else ids, []) if image_last else ([], [*ids, self.words.eos_token_id])
            sequences.append(self.join(before, count, after))
        ids, live = self.pad(sequences, "right")

        # what is learned where is known on the CPU: a training step never waits for the device
        following = ids[:, 1:]
        words = (following < self.vocabulary.text_size) & live[:, 1:] & ~to_image[:, None]
        patches = (following == self.vocabulary.id_of(IMAGE.word)) & to_image[:, None]
        keep = words.any(0).nonzero()[:, 0]
        place = lambda chosen: tuple(index.to(inputs.device) for index in chosen.nonzero(as_tuple=True))  # noqa: E731
        output = self.run(self.embed(ids.to(inputs.device), inputs), live.to(inputs.device), keep.to(inputs.device))
        logits, hidden = output.logits[place(words[:, keep])], output.hidden_states[-1][place(patches)]
        text_loss = F.cross_entropy(logits.float(), following[words].to(inputs.device), reduction="none")
        targets = (one[place(to_image)].flatten(0, 1) for one in (latents, t, noise))
        return text_loss, self.vision.loss(hidden, *targets)

    # Files

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads and, for the language model and its words alone, transformers does too."""
        folder, tokenizer = Path(folder), self.vision.tokenizer
        registry.preset(tokenizer.info.name)  # by which load finds its class
        self.lm.save_pretrained(folder)
        self.words.save_pretrained(folder)
        about = {"tokenizer": tokenizer.info.name, "config": config_fields(self.vision.head.config)}
        weights.save(folder / HEAD_FILE, self.vision.head.state_dict(), about)
        registry.save(tokenizer, folder / TOKENIZER_FILE)

    @classmethod
    def load(
        cls, folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> VisualLM:
        """What `save` wrote, in evaluation mode; device and dtype as in torch. Raises ZooError for anything else."""
        folder = Path(folder).expanduser()
        if not (folder / HEAD_FILE).is_file():
            raise ZooError(f"{folder} is no folder that VisualLM.save wrote: it has no {HEAD_FILE}.")
        state, metadata = weights.read(folder / HEAD_FILE)
        about = json.loads(metadata["zoo"])
        head = FlowHead(make_config(FlowHeadConfig(), about["config"]))
        weights.load(head, state, folder / HEAD_FILE)
        tokenizer = registry.load_tokenizer(about["tokenizer"], folder / TOKENIZER_FILE)
        lm = _pretrained(AutoModelForCausalLM, folder, use_safetensors=True)
        model = cls(lm, _pretrained(PreTrainedTokenizerFast, folder), FlowVision(tokenizer, head))
        return model.to(device=device, dtype=dtype).eval()


def _pretrained(kind: type, source: str | Path, **settings):
    try:
        return kind.from_pretrained(source, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ZooError(
            f"transformers finds no language model with its words in '{source}' ({reason}); "
            "give a hub id or a folder of save_pretrained."
        ) from error
