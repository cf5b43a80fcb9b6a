"""SEED's ids on the CPU against transformers' Q-Former of BLIP-2 behind the same image tower.

    python benchmarks/seed.py [--threads 1] [--rounds 3] [--name seed-2] [--batch 2] [--depth 2]

Peer: Blip2QFormerModel with the same weights, then the same layers to a code and the same search. It has no causal
mask, so that outputs are compared with ours without one (tokenizer.qformer.causal=never). The first line is what stands
behind the tower, the second everything from an image to its ids. Contenders take turns and the table has the best of
the rounds; --depth is the number of blocks of the tower (0: those of the name).
"""

import argparse
from dataclasses import replace

import torch
from _timing import best_of
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel

import zoo
from zoo.tokenizers.seed import published
from zoo.tokenizers.seed.tokenizer import SeedTokenizer


def blip2(tokenizer: SeedTokenizer) -> Blip2QFormerModel:
    """transformers' Q-Former with the weights of ours."""
    c = tokenizer.config.qformer
    config = Blip2QFormerConfig(
        hidden_size=c.width,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        intermediate_size=c.hidden,
        cross_attention_frequency=c.cross_every,
        encoder_hidden_size=tokenizer.config.encoder.width,
        vocab_size=max(c.vocab_size, 1),
    )
    peer = Blip2QFormerModel._from_config(config, attn_implementation="sdpa").eval()
    state = published.to_published(tokenizer.state_dict(), tokenizer.config)
    state = {name.removeprefix("Qformer.bert."): t for name, t in state.items() if name.startswith("Qformer.bert.")}
    state = {name.replace("embeddings.LayerNorm", "layernorm"): tensor for name, tensor in state.items()}
    state = {name.replace("attention.self.", "attention.attention."): tensor for name, tensor in state.items()}
    own = peer.state_dict()
    peer.load_state_dict({name: tensor for name, tensor in state.items() if name in own})
    return peer


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="more only where nothing else runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="seed-2")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--depth", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    encoder = {"encoder": {"depth": args.depth}} if args.depth else {}
    tokenizer = zoo.create_tokenizer(args.name, **encoder).eval()
    config = tokenizer.config
    peer, queries = blip2(tokenizer), tokenizer.query_tokens.expand(args.batch, -1, -1)
    images = torch.rand(args.batch, 3, config.image_size, config.image_size)
    read = tokenizer.read(tokenizer.to_values(images))

    def ids_of(queries: Tensor) -> Tensor:
        return tokenizer.quantizer.encode(tokenizer.encode_task(queries))

    def of_peer(read: Tensor) -> Tensor:
        return peer(query_embeds=queries, encoder_hidden_states=read).last_hidden_state

    contenders = {
        "behind the tower": (
            lambda: ids_of(tokenizer.qformer(tokenizer.query_tokens, read)),
            lambda: ids_of(of_peer(read)),
        ),
        "image to ids": (
            lambda: tokenizer.encode(images).ids["image"],
            lambda: ids_of(of_peer(tokenizer.read(tokenizer.to_values(images)))),
        ),
    }
    blocks = len(tokenizer.encoder.blocks)
    title = (
        f"{args.name}, {args.batch} images, tower of {blocks} blocks, {args.threads} thread(s), best of {args.rounds}"
    )
    table = Table("", "zoo, ids / s", "transformers, ids / s", "time ratio", title=title)
    for name, (ours, theirs) in contenders.items():
        seconds, found = best_of(args.rounds, {"zoo": ours, "transformers": theirs})
        rates = (f"{found[one].numel() / seconds[one]:.1f}" for one in ("zoo", "transformers"))
        table.add_row(name, *rates, f"{seconds['zoo'] / seconds['transformers']:.2f}")
    causal = tokenizer.qformer.config
    tokenizer.qformer.config = replace(causal, causal="never")
    difference = (tokenizer.qformer(tokenizer.query_tokens, read) - of_peer(read)).abs().max()
    table.caption = f"largest difference of queries without the causal mask: {difference:.1e}"
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
