"""One file out of those that the published training of SEED is spread over.

    python -m zoo.tokenizers.seed.merge eva_vit_g.pth checkpoint_0.pth checkpoint_499.pth --output seed.safetensors
    python -m zoo.tokenizers.seed.merge eva_vit_g.pth blip2_pretrained.pth --text --output start.safetensors

The image tower comes as LAVIS publishes it; a checkpoint of either stage holds only what that stage trained, and the
first stage starts from BLIP-2's file. Later files go before earlier ones. Parts that no file has begin anew, and are
named. The result is what `zoo.load_tokenizer(NAME, weights=...)` and `zoo train ... weights=...` take.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo import weights
from zoo.errors import ZooError
from zoo.tokenizers.seed import published
from zoo.tokenizers.seed.tokenizer import SeedConfig, SeedTokenizer

STAGES = (
    ("qformer", "query_tokens", "encoder_norm"),
    ("image_proj", "text_proj", "temperature"),
    ("encode_task", "quantizer", "decode_task", "pos_embed_image", "blocks_image", "head"),
    ("pos_embed", "blocks"),
)
"""Parts that come from one file, and of which all may be missing."""


def merge(files: Sequence[str | Path], name: str = "seed-2", text: bool = False) -> tuple[SeedTokenizer, list[str]]:
    """A tokenizer with what is in the files, and the names of the parts that none has and that begin anew.

    text: with the text side of the first stage. Raises ZooError where a part is there in part, or does not fit.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        found = weights.read(file)[0]
        state |= {f"visual_encoder.{n}": t for n, t in found.items()} if "patch_embed.proj.weight" in found else found
    fields = published.fields_of(state)
    if text and not fields["qformer"]["vocab_size"]:
        raise ZooError("none of the files has a text side (word embeddings, vision_proj, text_proj, temp).")
    if "quantize.embedding.weight" not in state:  # nothing of the second stage, whose sizes are the name's then
        fields = {"qformer": fields["qformer"]}
    tokenizer = zoo.create_tokenizer(name, **fields | ({} if text else {"qformer": {"vocab_size": 0}}))
    own, fresh = tokenizer.state_dict(), []
    ours = published.from_published(fitted(state, tokenizer.config), tokenizer.config)
    ours = {n: t for n, t in ours.items() if n in own or not n.startswith("encoder.")}  # last block, norm, head
    for parts in STAGES:
        missing = {n: tensor for n, tensor in own.items() if n.split(".")[0] in parts}
        if missing.keys().isdisjoint(ours):
            ours |= missing
            fresh += sorted({n.split(".")[0] for n in missing})
    weights.load(tokenizer, ours, " + ".join(map(str, files)))
    return tokenizer, fresh


def fitted(state: dict[str, Tensor], config: SeedConfig) -> dict[str, Tensor]:
    """With position embeddings of the tower for the images of the configuration: those of another grid are resampled
    (bicubic), but for that of the class token."""
    name, side = "visual_encoder.pos_embed", config.image_size // config.encoder.patch_size
    positions = state.get(name)
    if positions is None or positions.shape[1] == side**2 + 1:
        return state
    first, grid = positions[:, :1].float(), positions[:, 1:].float()
    grid = grid.transpose(1, 2).unflatten(2, (math.isqrt(grid.shape[1]),) * 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return state | {name: torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--name", default="seed-2")
    parser.add_argument("--text", action="store_true", help="with the text side of the first stage")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer, fresh = merge(args.files, args.name, args.text)
    zoo.save_tokenizer(tokenizer, args.output)
    print(f"{args.output} is written; {'new, to be trained: ' + ', '.join(fresh) if fresh else 'it is complete'}")


if __name__ == "__main__":
    main()
