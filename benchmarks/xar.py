"""Sampling of xAR on the CPU against three others in one run.

    python benchmarks/xar.py [--threads 1] [--rounds 3] [--width 256] [--depth 4] [--steps 10] [--batch 4]

(a) No cache: the whole context is computed again at each step. (b) A plain transcription of the published sampler: the
half without class always computed, conditions and modulations at every call and for every token, caches that grow by
copying, a dense mask. (c) DiT of diffusers with about as many parameters and as many steps; it reads all 256 tokens at
each. All with random weights; (a) and (b) must give the same latents.
"""

import argparse

import torch
import torch.nn.functional as F
from _timing import best_of
from einops import rearrange
from rich.console import Console
from rich.table import Table

from zoo.flow import euler_maruyama, guide, linear_scale
from zoo.tokenizers.xar.generator import Condition, XARConfig, XARGenerator, sde_times, time_ids


def without_cache(generator: XARGenerator, labels, steps, scale, start, noises):
    """Each call is a pass over everything so far, for the rows that guidance needs."""
    lengths, batch, finished = generator.partition.lengths, len(labels), []
    none = torch.full_like(labels, generator.no_class)
    for s in range(len(lengths)):
        weight = linear_scale(scale, s, len(lengths))
        rows = torch.cat([labels, none]) if weight > 1 else labels
        context = torch.cat(finished, dim=1) if finished else start[0][:, :0]

        def velocity(x, t, rows=rows, context=context, s=s, weight=weight):
            tokens = torch.cat([context, x.float()], dim=1).repeat(len(rows) // batch, 1, 1)
            ids = torch.zeros(len(rows), s + 1, dtype=torch.int64)
            ids[:, -1] = time_ids(torch.tensor(t))
            condition = Condition.of_entities(generator.condition(rows[:, None], ids), lengths[: s + 1])
            end = tokens.shape[1]
            v = generator.network(tokens, condition, slice(0, end), generator.mask[:end, :end])[
                :, -lengths[s] :
            ].double()
            return guide(v[:batch], v[batch:], weight) if len(rows) > batch else v

        finished.append(euler_maruyama(velocity, start[s].double(), sde_times(steps), noises[s]).float())
    return generator.partition.to_grid(torch.cat(finished, dim=1))


def rms_norm(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def swapped(x):
    """Neighbouring channels (a, b) to (-b, a)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-b, a], dim=-1).flatten(-2)


def transcription(generator: XARGenerator, labels, steps, scale, start, noises):
    """The published algorithm call by call, with its waste."""
    lengths, batch = generator.partition.lengths, len(labels)
    begins, length = generator.partition.starts, lengths[0]
    rows = torch.cat([labels, torch.full_like(labels, generator.no_class)])
    dense = torch.zeros(generator.mask.shape).masked_fill(~generator.mask, -torch.inf)
    caches = [None] * len(generator.blocks)

    def call(tokens, ids, span, mask, keep):
        """ids: (2 B, entities); keep: tokens whose keys and values stay."""
        condition = generator.condition(rows[:, None], ids)
        x = generator.embed_norm(generator.embed(tokens) + generator.encoder_positions[:, span])
        angles = generator.encoder_angles[:, span]
        for number, block in enumerate(generator.blocks):
            if number == generator.config.encoder_depth:
                x = generator.decoder_embed(generator.encoder_norm(x)) + generator.decoder_positions[:, span]
                angles = generator.decoder_angles[:, span]
            modulation = block.modulation(condition).repeat_interleave(length, dim=1)
            gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
            h = rms_norm(x) * (1 + scale1) + shift1
            q, k, v = rearrange(block.attn.qkv(h), "b n (t h d) -> t b h n d", t=3, h=block.attn.num_heads)
            q, k = (one * angles[0] + swapped(one) * angles[1] for one in (q, k))
            cached = caches[number]
            keys, values = (
                (k, v) if cached is None else (torch.cat([c, o], 2) for c, o in zip(cached, (k, v), strict=True))
            )
            if keep:
                size = 0 if cached is None else cached[0].shape[2]
                caches[number] = keys[:, :, : size + keep], values[:, :, : size + keep]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + gate1 * block.attn.proj(rearrange(out, "b h n d -> b n (h d)"))
            x = x + gate2 * block.mlp(rms_norm(x) * (1 + scale2) + shift2)
        return generator.head(generator.decoder_norm(x))[:, -length:].double()

    finished = []
    for s, begin in enumerate(begins):
        weight, first = linear_scale(scale, s, len(lengths)), True

        def velocity(x, t, s=s, begin=begin, weight=weight):
            nonlocal first
            tokens = x.float().repeat(2, 1, 1)
            ids = time_ids(torch.tensor(t)).expand(2 * batch, 1)
            if first and s:
                tokens = torch.cat([finished[-1].repeat(2, 1, 1), tokens], dim=1)
                ids = torch.cat([torch.zeros_like(ids), ids], dim=1)
                span = slice(begin - length, begin + length)
                v = call(tokens, ids, span, dense[span, : begin + length], keep=length)
            else:
                v = call(tokens, ids, slice(begin, begin + length), None, keep=0)
            first = False
            return guide(v[:batch], v[batch:], weight) if weight > 1 else v[:batch]

        finished.append(euler_maruyama(velocity, start[s].double(), sde_times(steps), noises[s]).float())
    return generator.partition.to_grid(torch.cat(finished, dim=1))


def dit(generator: XARGenerator, labels, steps, scale):
    """Diffusers' DiT pipeline without its decoder."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    c = generator.config
    heads = c.encoder_heads
    wanted = sum(p.numel() for p in generator.blocks[0].parameters()) * len(generator.blocks)
    make = lambda layers: DiTTransformer2DModel(  # noqa: E731
        num_attention_heads=heads, attention_head_dim=c.width // heads, in_channels=c.latent_dim,
        out_channels=c.latent_dim, num_layers=layers, sample_size=c.grid, patch_size=1,
        num_embeds_ada_norm=c.num_classes,
    ).eval()  # fmt: skip
    layer = sum(p.numel() for p in make(1).transformer_blocks.parameters())
    model, scheduler = make(max(1, round(wanted / layer))), DDIMScheduler()
    scheduler.set_timesteps(steps)

    def sample():
        x = torch.randn(len(labels), c.latent_dim, c.grid, c.grid)
        for t in scheduler.timesteps:
            if scale > 1:
                both = torch.cat([labels, torch.full_like(labels, c.num_classes)])
                e = model(torch.cat([x, x]), timestep=t.expand(2 * len(x)), class_labels=both).sample
                e = guide(e[: len(x)], e[len(x) :], scale)
            else:
                e = model(x, timestep=t.expand(len(x)), class_labels=labels).sample
            x = scheduler.step(e, t, x).prev_sample
        return x

    return sample, sum(p.numel() for p in model.parameters())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("threads", 1),
        ("rounds", 3),
        ("width", 256),
        ("depth", 4),
        ("heads", 4),
        ("steps", 10),
        ("batch", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = XARConfig(
        width=args.width, encoder_depth=args.depth, decoder_depth=args.depth,
        encoder_heads=args.heads, decoder_heads=args.heads,
    )  # fmt: skip
    generator = XARGenerator(config).eval()
    labels = torch.randint(config.num_classes, (args.batch,))
    shape = (args.batch, generator.partition.lengths[0], config.latent_dim)
    start = [torch.randn(shape) for _ in generator.partition.lengths]
    noises = [[torch.randn(shape, dtype=torch.float64) for _ in range(args.steps - 1)] for _ in start]
    count = sum(p.numel() for p in generator.parameters())
    table = Table(
        "guidance", "", "s", "/ zoo", "largest difference",
        title=f"{args.batch} images, width {args.width}, {args.depth} + {args.depth} blocks ({count / 1e6:.1f} M), "
        f"{args.steps} steps, {args.threads} thread(s)",
    )  # fmt: skip
    for scale in (2.7, 1.0):
        given = (labels, args.steps, scale, start, noises)
        peer, parameters = dit(generator, labels, args.steps, scale)
        contenders = {
            "zoo": lambda given=given: generator.sample(given[0], given[1], given[2], "sde", given[3], given[4]),
            "(a) no cache": lambda given=given: without_cache(generator, *given),
            "(b) transcription": lambda given=given: transcription(generator, *given),
            f"(c) diffusers' DiT, {parameters / 1e6:.1f} M": peer,
        }
        best, results = best_of(args.rounds, contenders)
        for name, seconds in best.items():
            difference = "" if name.startswith("(c)") else f"{(results[name] - results['zoo']).abs().max():.1e}"
            table.add_row(str(scale), name, f"{seconds:.2f}", f"{seconds / best['zoo']:.2f}", difference)
        table.add_section()
    Console(width=110).print(table)
    floats = sum(
        2 * b.attn.num_heads * generator.partition.length * args.width // b.attn.num_heads for b in generator.blocks
    )
    print(f"keys and values of an image: {4 * floats / 2**20:.1f} MiB, twice that with guidance")


if __name__ == "__main__":
    main()
