"""Joint training of a visual language model: captions from images, and images from captions.

MingTok's authors have not released theirs, and that part is the zoo's own; for ids it can be that of SEED-LLaMA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from zoo import registry
from zoo.data import Loader, TokenDataset
from zoo.distributed import sum_over_ranks, world_size
from zoo.errors import ZooError
from zoo.lm.embeddings import EmbeddingConfig, EmbeddingVision
from zoo.lm.generate import generate_image
from zoo.lm.model import VisualLM
from zoo.lm.vision import Seen
from zoo.tokenizer import Tokenizer
from zoo.tokenizers.mingtok.head import FlowHeadConfig
from zoo.training.module import Losses, TrainingModule, batch_size
from zoo.vocabulary import Stream


def captions(source) -> Iterator[str]:
    """Every caption of a data source (see zoo.data.sources.resolve), or of a folder of `zoo pretokenize`, to train a
    text tokenizer on."""
    if isinstance(source, (str, Path)) and (Path(source) / "manifest.json").is_file():
        source = TokenDataset(source, ["caption"])
    for batch in Loader(source, batch_size=256, fields=["caption"]):
        yield from batch["caption"]


class VisualLMTraining(TrainingModule):
    """One optimizer for language model and head, one pass for both directions; the visual tokenizer is frozen.

    The loss is text_weight times the mean over words of texts plus that over what is written of images, flow_weight
    times the mean over latents or code_weight times the mean over codes; means are over all ranks. A batch has the
    field "caption" and, where there are questions to answer, "prompt", which is read between the image and the caption.

    Args:
        tokenizer: of images.
        lm, text_tokenizer: of VisualLM.create, where there is no start.
        start: a folder of an earlier run's model (VisualLM.save), to go on from, its tokenizer included.
        head: of VisualLM.create, for a tokenizer of latents; one of ids takes none.
        tokenizer_weights: a file, where the tokenizer's name alone has none.
        streams, num_tokens, bos, embeddings, by_direction: of VisualLM.create.
        token_share: instead of num_tokens: this share of the greatest number, rounded, of a tokenizer of variable
            length; others always have all.
        keep_tokens: encode each image once and keep what the tokenizer made of it by the key of the sample, for data
            that comes without random crops and flips and has room in memory.
        train_lm: False: the language model is frozen, and the visual side alone learns.
        text_weight, flow_weight, code_weight: of the losses.
        all_words: learn every word of every sequence, see VisualLM.forward, as SEED-LLaMA does: the loss is then one
            mean over all of them, each with the weight of its kind.
        image_share: of a batch (over all ranks), rounded: images from captions; the rest are captions from images.
        condition_dropout: share of those images that are learned without their caption, for guidance.
        others: of TrainingModule.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        lm: PretrainedConfig | str | None = None,
        text_tokenizer: PreTrainedTokenizerFast | str | None = None,
        start: str | Path | None = None,
        head: FlowHeadConfig | Mapping[str, int] | None = None,
        tokenizer_weights: str | Path | None = None,
        streams: Sequence[Stream | str] | None = None,
        num_tokens: int | None = None,
        bos: bool = False,
        embeddings: EmbeddingConfig | None = None,
        by_direction: bool = False,
        token_share: float | None = None,
        keep_tokens: bool = False,
        train_lm: bool = True,
        text_weight: float = 1.0,
        flow_weight: float = 1.0,
        code_weight: float = 1.0,
        all_words: bool = False,
        image_share: float = 0.5,
        condition_dropout: float = 0.1,
        **arguments,
    ):
        for name, share in (("image_share", image_share), ("condition_dropout", condition_dropout)):
            if not 0 <= share <= 1:
                raise ZooError(f"{name} must be a share from 0 to 1, got {share}.")
        if start is not None:
            model = started(start, tokenizer, embeddings)
        elif lm is None or text_tokenizer is None:
            raise ZooError(
                "this experiment goes on from an earlier one; set module.start to OUTPUT_DIR/model of that, or "
                "module.lm and module.text_tokenizer to begin with others."
            )
        else:
            info = tokenizer.info
            head = head if info.kind == "continuous" else None
            if token_share is not None and info.variable_length:
                num_tokens = round(token_share * info.max_tokens)
            space = registry.tokenizers.with_weights(tokenizer, tokenizer_weights)
            settings = {"bos": bos, "embeddings": embeddings, "by_direction": by_direction}
            model = VisualLM.create(lm, text_tokenizer, space, head, streams, num_tokens, **settings)
        super().__init__(model.vision.tokenizer, **arguments)
        self.model = model
        self.train_lm = train_lm
        self.model.lm.requires_grad_(train_lm)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ZooError("train_lm=false leaves nothing to learn where ids are words; set module.embeddings.")
        self.loss_weights = text_weight, {"flow": flow_weight, "code": code_weight}[self.model.vision.kind]
        self.all_words, self.image_share, self.condition_dropout = all_words, image_share, condition_dropout
        self._kept: dict[str, Seen] | None = {} if keep_tokens else None

    def optimized(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def compiled(self) -> list[nn.Module]:
        return [self.model.lm]

    def train(self, mode: bool = True) -> VisualLMTraining:
        super().train(mode)
        self.tokenizer.eval()
        if not self.train_lm:
            self.model.lm.eval()
        return self

    def on_fit_start(self) -> None:
        options = getattr(self.trainer.datamodule, "options", {})
        if self._kept is not None and (options.get("flip") or options.get("crop") in ("random", "resized")):
            raise ZooError("images that are encoded once cannot change: set keep_tokens=false, or no flips and crops.")

    def checked(self, batch: dict) -> dict:
        if "tokens" in batch:
            batch["tokens"] = self.model.vision.check_tokens(batch["tokens"])
        return batch

    def seen(self, batch: dict) -> Seen:
        """What the model reads and writes of the images of a batch, or of their tokens (data=tokens)."""
        vision = self.model.vision
        if "tokens" in batch:
            return vision.project(vision.read(batch["tokens"]))
        images = batch[self.tokenizer.info.input]
        if self._kept is None:
            return vision.see(images)
        new = [i for i, key in enumerate(batch["key"]) if key not in self._kept]
        if new:
            found = vision.perceive(images[new])
            self._kept |= {batch["key"][i]: found.rows(slice(n, n + 1)) for n, i in enumerate(new)}
        return vision.project(Seen.cat([self._kept[key] for key in batch["key"]]))

    def losses(self, batch: dict) -> Losses:
        directions, count = self.shared_generator(), batch_size(batch) * self.trainer.world_size
        to_image = torch.randperm(count, generator=directions) < round(self.image_share * count)
        dropped = torch.rand(count, generator=directions) < self.condition_dropout
        seed = int(torch.randint(2**62, (), generator=directions))
        draws = torch.Generator(self.device).manual_seed(seed)
        losses = self.pair_losses(batch, self.own_rows(to_image), self.own_rows(dropped), draws, self.all_words)
        yield "model", *self.weighted(*losses)

    def weighted(self, text: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step, from this rank's losses (n,) and (m,) of texts and images, and what to log."""
        sums = torch.stack([text.sum(), image.sum()])
        all_sums, counts = sum_over_ranks(sums, sums.new_tensor([len(text), len(image)]))
        means = (all_sums / counts.clamp(min=1)).detach()
        if self.all_words:
            counts = counts.sum().expand(2)
        scales = sums.new_tensor(self.loss_weights) / counts.clamp(min=1)
        logs = {"loss": (scales * all_sums).sum().detach(), "text_loss": means[0]}
        if self.image_share:
            logs[f"{self.model.vision.kind}_loss"] = means[1]
        # gradients are averaged over ranks, and each rank has its part of the sums
        return world_size() * (scales * sums).sum(), logs

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The losses of the directions that are learned, each of all pairs and without dropout, of what is learned by
        default, at random numbers that are the same in every run."""
        draws, count = torch.Generator(self.device).manual_seed(batch_idx), batch_size(batch)
        never = torch.zeros(count, dtype=torch.bool)
        text, _ = self.pair_losses(batch, never, never, draws)
        loss = self.loss_weights[0] * text.mean()
        found = [("text_loss", text.mean(), len(text))]
        if self.image_share:
            _, image = self.pair_losses(batch, ~never, never, draws)
            loss = loss + self.loss_weights[1] * image.mean()
            found.append((f"{self.model.vision.kind}_loss", image.mean(), len(image)))
        for name, value, weight in (*found, ("loss", loss, count)):
            self.log(f"val/{name}", value, batch_size=weight, sync_dist=True, prog_bar=True)

    def pair_losses(
        self,
        batch: dict,
        to_image: Tensor,
        dropped: Tensor,
        draws: torch.Generator,
        all_words: bool = False,
        seen: Seen | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses of this rank's texts and images, see VisualLM.forward; random numbers are drawn for all ranks.

        seen: what the model's visual side gave of the images; default: what it gives now.
        """
        if "caption" not in batch:
            raise ZooError("a batch has no field 'caption'; add it to data.fields.")
        rows = self.model.vision.draws(batch_size(batch) * self.trainer.world_size, draws)
        settings = {"all_words": True} if all_words else {}
        settings |= {"prompts": batch["prompt"]} if "prompt" in batch else {}
        given = self.seen(batch) if seen is None else seen
        return self.model(batch["caption"], given, to_image, dropped, *map(self.own_rows, rows), **settings)

    @torch.no_grad()
    def pictures(self, batch: dict, count: int) -> Tensor:
        """The first images and, if it can write any, what the model makes of their captions."""
        draws = [torch.Generator().manual_seed(self.seed + i) for i in range(count)]
        if "tokens" in batch:
            images = self.tokenizer.decode(batch["tokens"][:count])
        else:
            images = batch[self.tokenizer.info.input][:count]
        if self.model.vision.obstacle:
            return images
        return torch.cat([images, generate_image(self.model, batch["caption"][:count], generator=draws).images])

    def save(self, folder: Path) -> Path:
        """A folder for VisualLM.load."""
        path = folder / "model"
        self.model.save(path)
        return path


def started(folder: str | Path, tokenizer: Tokenizer, embeddings: EmbeddingConfig | None) -> VisualLM:
    """The model of an earlier run in training mode, with a fresh visual head where it had none and gets one.

    tokenizer, embeddings: what the run at hand asks for. Raises ZooError where that is not what the model has.
    """
    model = VisualLM.load(folder)
    own, vision, had = model.vision.tokenizer, model.vision, getattr(model.vision, "config", None)
    if (own.info.name, own.config) != (tokenizer.info.name, tokenizer.config):
        raise ZooError(
            f"{folder} is a model on {own.info.name} of {own.config}, got {tokenizer.info.name} of {tokenizer.config}; "
            "choose its tokenizer."
        )
    if had != embeddings:
        if had is None or embeddings != replace(had, visual_head=True):
            raise ZooError(f"{folder} reads images with embeddings {had}, got {embeddings}; choose its own.")
        model.vision = EmbeddingVision(own, vision.projector[2].out_features, embeddings, vision.num_tokens)
        model.vision.projector = vision.projector
    return model.train()
