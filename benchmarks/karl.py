"""KARL at its published size on the CPU: one pass against the recurrent passes of its predecessor; live tokens alone
against masks.

    python benchmarks/karl.py [--threads 1] [--rounds 3] [--name karl-small-vqgan]

Peer: ALIT (arXiv 2411.02393), whose encoder reads n tokens in n / 32 passes of the same blocks, pass k over a class
token, 256 grid places and 32 k latents. Decoding is that of the transformer, without the base, which is the same for
any number of tokens. Contenders take turns and the table has the best of the rounds. Weights are random: they do not
change the time.
"""

import argparse
from collections.abc import Callable

import torch
from _timing import best_of
from rich.console import Console
from rich.table import Table

import zoo
from zoo.tokenizers.karl.tokenizer import gather_live, halting_mask

COUNTS = (32, 64, 96, 128, 160, 192, 224, 256)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="more only where nothing else runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="karl-small-vqgan")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = zoo.create_tokenizer(args.name).eval()
    config, encoder, decoder = tokenizer.config, tokenizer.encoder, tokenizer.decoder
    side = config.image_size // config.base.downsample
    places = side**2
    grid = torch.randn(1, config.encoder_width, side, side)
    bins = torch.tensor([5])

    def alit(num_tokens: int) -> None:
        carried = torch.randn(1, 1 + places, config.encoder_width)
        for k in range(num_tokens // 32):
            carried = torch.cat([carried, encoder.latent_tokens[32 * k : 32 * (k + 1)][None]], dim=1)
            x = encoder.norm_pre(carried)
            for block in encoder.blocks:
                x = block(x)
            carried = x

    def rows(counts, make):
        return {n: best_of(args.rounds, make(n))[0] for n in counts}

    title = f"{args.name}, batch 1, {args.threads} thread(s), best of {args.rounds}"
    console = Console(width=100)
    encoding = rows(COUNTS, lambda n: {"karl": lambda: encoder(grid, bins, n), "alit": lambda: alit(n)})
    table = Table("tokens", "KARL, s", "ALIT's passes, s", "ALIT / KARL", title=f"encoder of {title}")
    for n, seconds in encoding.items():
        ratio = seconds["alit"] / seconds["karl"]
        table.add_row(str(n), f"{seconds['karl']:.2f}", f"{seconds['alit']:.2f}", f"{ratio:.2f}")
    console.print(table)

    available = config.max_tokens
    latents = torch.randn(1, available, config.latent_dim)

    def decoding(n: int) -> dict[str, Callable]:
        keep = (torch.randperm(available) < n)[None]

        def gathered():
            live, slots, _ = gather_live(latents, keep)
            decoder(live, (side, side), slots)

        def masked():
            decoder(latents, (side, side), mask=halting_mask(keep, places)[:, None])

        return {"gathered": gathered, "masked": masked}

    found = rows((0, *COUNTS), decoding)
    first, last = (found[n]["gathered"] for n in (0, available))
    table = Table(
        "live tokens", "gathered, s", "on the line", "masked, s", "masked / gathered", title=f"decoder of {title}"
    )
    for n, seconds in found.items():
        line = first + (last - first) * n / available
        table.add_row(
            str(n),
            f"{seconds['gathered']:.2f}",
            f"{seconds['gathered'] / line:.2f}",
            f"{seconds['masked']:.2f}",
            f"{seconds['masked'] / seconds['gathered']:.2f}",
        )
    table.caption = "on the line: time over that of the straight line from 0 to all tokens"
    console.print(table)


if __name__ == "__main__":
    main()
