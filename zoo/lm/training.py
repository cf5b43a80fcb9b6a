"""Joint training of a visual language model: captions from images, and images from captions.

The authors' training is not released; this is the zoo's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from zoo import registry
from zoo.data import Loader
from zoo.distributed import sum_over_ranks, world_size
from zoo.errors import ZooError
from zoo.lm.generate import generate_image
from zoo.lm.model import VisualLM
from zoo.tokenizers.mingtok.head import FlowHeadConfig
from zoo.tokenizers.mingtok.tokenizer import MingTokTokenizer
from zoo.training.module import Losses, TrainingModule, batch_size


def captions(source) -> Iterator[str]:
    """Every caption of a data source (see zoo.data.sources.resolve), to train a text tokenizer on."""
    for batch in Loader(source, batch_size=256, fields=["caption"]):
        yield from batch["caption"]


class VisualLMTraining(TrainingModule):
    """One optimizer for language model and head, one pass for both directions; the visual tokenizer is frozen.

    The loss is text_weight times the mean over words plus flow_weight times the mean over latents, of all ranks.

    Args:
        tokenizer: of images.
        lm, text_tokenizer, head: of VisualLM.create.
        tokenizer_weights: a file, where the tokenizer's name alone has none.
        text_weight, flow_weight: of the two losses.
        image_share: of a batch (over all ranks), rounded: images from captions; the rest are captions from images.
        condition_dropout: share of those images that are learned without their caption, for guidance.
        others: of TrainingModule.
    """

    def __init__(
        self,
        tokenizer: MingTokTokenizer,
        lm: PretrainedConfig | str,
        text_tokenizer: PreTrainedTokenizerFast | str,
        head: FlowHeadConfig,
        tokenizer_weights: str | Path | None = None,
        text_weight: float = 1.0,
        flow_weight: float = 1.0,
        image_share: float = 0.5,
        condition_dropout: float = 0.1,
        **arguments,
    ):
        for name, share in (("image_share", image_share), ("condition_dropout", condition_dropout)):
            if not 0 <= share <= 1:
                raise ZooError(f"{name} must be a share from 0 to 1, got {share}.")
        space = registry.tokenizers.with_weights(tokenizer, tokenizer_weights)
        super().__init__(space, **arguments)
        self.model = VisualLM.create(lm, text_tokenizer, space, head)
        self.text_weight, self.flow_weight = text_weight, flow_weight
        self.image_share, self.condition_dropout = image_share, condition_dropout

    def optimized(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def compiled(self) -> list[nn.Module]:
        return [self.model.lm]

    def train(self, mode: bool = True) -> VisualLMTraining:
        super().train(mode)
        self.tokenizer.eval()
        return self

    def losses(self, batch: dict) -> Losses:
        directions, count = self.shared_generator(), batch_size(batch) * self.trainer.world_size
        to_image = torch.randperm(count, generator=directions) < round(self.image_share * count)
        dropped = torch.rand(count, generator=directions) < self.condition_dropout
        seed = int(torch.randint(2**62, (), generator=directions))
        draws = torch.Generator(self.device).manual_seed(seed)  # of times and noise
        text, flow = self.pair_losses(batch, self.own_rows(to_image), self.own_rows(dropped), draws)
        sums = torch.stack([text.sum(), flow.sum()])
        all_sums, counts = sum_over_ranks(sums, sums.new_tensor([len(text), len(flow)]))
        scales = sums.new_tensor([self.text_weight, self.flow_weight]) / counts.clamp(min=1)
        means = (all_sums / counts.clamp(min=1)).detach()
        logs = {"loss": (scales * all_sums).sum().detach(), "text_loss": means[0], "flow_loss": means[1]}
        # gradients are averaged over ranks, and each rank has its part of the sums
        yield "model", world_size() * (scales * sums).sum(), logs

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Both losses, each of all pairs and without dropout, at times and noise that are the same in every run."""
        draws, count = torch.Generator(self.device).manual_seed(batch_idx), batch_size(batch)
        never = torch.zeros(count, dtype=torch.bool)
        text, _ = self.pair_losses(batch, never, never, draws)
        _, flow = self.pair_losses(batch, ~never, never, draws)
        loss = self.text_weight * text.mean() + self.flow_weight * flow.mean()
        for name, value, weight in (
            ("text_loss", text.mean(), len(text)),
            ("flow_loss", flow.mean(), len(flow)),
            ("loss", loss, count),
        ):
            self.log(f"val/{name}", value, batch_size=weight, sync_dist=True, prog_bar=True)

    def pair_losses(
        self, batch: dict, to_image: Tensor, dropped: Tensor, draws: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Losses of this rank's words and latents, see VisualLM.forward; times and noise are drawn for all ranks."""
        if "caption" not in batch:
            raise ZooError("a batch has no field 'caption'; add it to data.fields.")
        images = batch["image"]
        info, count = self.tokenizer.info, len(images) * self.trainer.world_size
        t = self.own_rows(torch.rand(count, info.max_tokens, device=self.device, generator=draws))
        noise_shape = (count, info.max_tokens, info.latent_dims["image"])
        noise = self.own_rows(torch.randn(noise_shape, device=self.device, generator=draws))
        return self.model(batch["caption"], images, to_image, dropped, t, noise)

    @torch.no_grad()
    def pictures(self, batch: dict, count: int) -> Tensor:
        """The first images, and what the model makes of their captions."""
        draws = [torch.Generator().manual_seed(self.seed + i) for i in range(count)]
        images = batch["image"][:count]
        return torch.cat([images, generate_image(self.model, batch["caption"][:count], generator=draws).images])

    def save(self, folder: Path) -> Path:
        """A folder for VisualLM.load."""
        path = folder / "model"
        self.model.save(path)
        return path
