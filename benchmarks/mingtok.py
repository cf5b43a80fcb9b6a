"""The parts of MingTok on the CPU against timm's blocks, and token by token against recomputation.

    python benchmarks/mingtok.py [--threads 1] [--rounds 3] [--name mingtok-vision] [--depth 2]

Peer: timm's ViT Block of the same width, heads and feed-forward layer, with the same weights; the largest difference
of the outputs is shown. A part is all that it does, its blocks included. Token by token: the features of one image as a
language model asks for them, with the cache or by a parallel pass over all latents so far. Contenders take turns and
the tables have the best of the rounds; --depth is the number of blocks of each part (0: those of the name).
"""

import argparse
from functools import partial

import torch
from _timing import best_of
from rich.console import Console
from rich.table import Table
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import zoo
from zoo.nn.transformer import SwiGLU
from zoo.weights import rename


def timm_blocks(blocks: nn.ModuleList) -> nn.ModuleList:
    """The same blocks, made by timm."""
    made = []
    for ours in blocks:
        width, options = ours.attn.proj.in_features, {}
        if isinstance(ours.mlp, SwiGLU):
            hidden = ours.mlp.w12.out_features
            options["mlp_layer"] = lambda in_features, hidden_features, act_layer, hidden=hidden, **rest: SwiGLUPacked(
                in_features, hidden, **rest
            )
        norm = partial(nn.LayerNorm, eps=ours.norm1.eps)
        block = Block(width, ours.attn.num_heads, qkv_bias=True, norm_layer=norm, **options).eval()
        block.load_state_dict(rename(ours.state_dict(), {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}))
        made.append(block)
    return nn.ModuleList(made)


def run(blocks: nn.ModuleList, x: Tensor, is_causal: bool) -> Tensor:
    for block in blocks:
        x = block(x, is_causal=is_causal)
    return x


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="more only where nothing else runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="mingtok-vision")
    parser.add_argument("--depth", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    parts = ("encoder", "semantic", "pixel")
    depths = {f"{part}_depth": args.depth for part in parts} if args.depth else {}
    tokenizer = zoo.create_tokenizer(args.name, **depths).eval()
    config = tokenizer.config
    values = torch.rand(1, config.in_channels, config.image_size, config.image_size) * 2 - 1
    encoder, semantic_decoder, pixel_decoder = tokenizer.encoder, tokenizer.semantic_decoder, tokenizer.pixel_decoder
    raw = encoder(values)[:, :-1]
    features = semantic_decoder(raw)

    console, title = Console(width=110), f"{args.name}, one image, {args.threads} thread(s), best of {args.rounds}"
    table = Table(
        *("", "tokens", "blocks", "part, ms", "zoo, ms / block", "timm, ms / block", "ratio", "difference"), title=title
    )
    tokens = config.grid**2
    for name, network, count, is_causal, call in (
        ("encode", encoder, tokens + 1, False, lambda: encoder(values)),
        ("semantic", semantic_decoder, tokens, True, lambda: semantic_decoder(raw)),
        ("pixels", pixel_decoder, tokens * pixel_decoder.ratio**2, False, lambda: pixel_decoder(features)),
    ):
        blocks, peers = network.blocks, timm_blocks(network.blocks)
        x = torch.randn(1, count, blocks[0].attn.proj.in_features)
        seconds, results = best_of(
            args.rounds,
            {
                "part": call,
                "zoo": partial(run, blocks, x, is_causal),
                "timm": partial(run, peers, x, is_causal),
            },
        )
        table.add_row(
            name,
            str(count),
            str(len(blocks)),
            f"{seconds['part'] * 1e3:.1f}",
            f"{seconds['zoo'] / len(blocks) * 1e3:.2f}",
            f"{seconds['timm'] / len(blocks) * 1e3:.2f}",
            f"{seconds['zoo'] / seconds['timm']:.2f}",
            f"{(results['zoo'] - results['timm']).abs().max():.1e}",
        )
    console.print(table)

    def cached() -> Tensor:
        cache = tokenizer.new_cache(1)
        return torch.stack([tokenizer.step(latent, cache) for latent in latents.unbind(1)], dim=1)

    def recomputed() -> Tensor:
        return torch.stack([tokenizer.features_of(latents[:, : i + 1])[:, -1] for i in range(tokens)], dim=1)

    latents = tokenizer.normalize(raw)
    seconds, results = best_of(args.rounds, {"cached": cached, "recomputed": recomputed})
    table = Table("token by token", "s", "/ cached", "difference", title=f"{tokens} features of {title}")
    for name, found in seconds.items():
        difference = (results[name] - features).abs().max()
        table.add_row(name, f"{found:.3f}", f"{found / seconds['cached']:.1f}", f"{difference:.1e}")
    table.caption = "difference: from one parallel pass"
    console.print(table)


if __name__ == "__main__":
    main()
