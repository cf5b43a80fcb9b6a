"""xAR and its autoencoder: outputs of the reference cases by name."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from vectors import Vectors

from zoo import weights
from zoo.nn.rotary import rotate, turns
from zoo.quantizers import GaussianPosterior
from zoo.tokenizers.kl.tokenizer import KLConfig, KLTokenizer
from zoo.tokenizers.xar import published
from zoo.tokenizers.xar.generator import Condition, XARGenerator, ode_times, sde_times, time_ids
from zoo.tokenizers.xar.training import drop_labels, flow_loss
from zoo.training.module import parameter_groups
from zoo.training.schedules import plateau


def run(vectors: Vectors, case: str) -> dict[str, Tensor]:
    about = vectors.cases[case]
    function = CASES.get(case) or next(
        f for name, f in CASES.items() if name.endswith("*") and case.startswith(name[:-1])
    )
    return function(vectors, about)


def published_state(config: dict) -> dict[str, Tensor]:
    if "ch" in config:
        return KLTokenizer(kl_config(config)).state_dict()
    generator = XARGenerator(published.config_from_published(config))
    return published.to_published(generator.state_dict(), generator.config)


def kl_config(config: dict) -> KLConfig:
    return KLConfig(
        image_size=config["resolution"],
        channels=config["ch"],
        multipliers=tuple(config["ch_mult"]),
        num_blocks=config["num_res_blocks"],
        embed_dim=config["embed_dim"],
        attention=tuple(config["attn_resolutions"]),
    )


def kl(vectors: Vectors, module: str) -> KLTokenizer:
    tokenizer = KLTokenizer(kl_config(vectors.modules[module]["config"]))
    weights.load(tokenizer, vectors.state(module))
    return tokenizer.eval()


def xar(vectors: Vectors, module: str) -> XARGenerator:
    generator = XARGenerator(published.config_from_published(vectors.modules[module]["config"]))
    weights.load(generator, published.from_published(vectors.state(module), generator.config))
    return generator


def record(modules: dict[str, nn.Module], found: dict) -> None:
    for name, module in modules.items():
        module.register_forward_hook(partial(lambda n, m, a, out: found.__setitem__(n, out), name))


def cells(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    cut = xar(vectors, about["module"]).partition
    grid = vectors.input("cells", "grid")
    sequence = cut.to_sequence(grid)
    return {"sequence": sequence, "back": cut.to_grid(sequence)}


def rope(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    generator, q = xar(vectors, about["module"]), vectors.input("rope", "q")
    parts = {"full": slice(None), "cell2": slice(128, 192), "cells1and2": slice(64, 192)}
    return {n: rotate(q[:, :, s], turns(*generator.encoder_angles[:, s])) for n, s in parts.items()}


def ids(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    out = {}
    for steps in vectors.input("time-ids", "num_steps").tolist():
        for name, times in (("sde", sde_times(steps)), ("ode", ode_times(steps))):
            out[f"{name}_{steps}"] = torch.stack([time_ids(torch.tensor(t)) for t in times[:-1]])
    return out


def schedules(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    epochs = vectors.input("schedules", "epochs").double().tolist()
    factors = [plateau(e, 800, 1, warmup_epochs=100, decay_after_epochs=600, min_ratio=1e-5 / 4e-4) for e in epochs]
    return {"lr": 4e-4 * torch.tensor(factors)}


def forward(vectors: Vectors, about: dict) -> tuple[dict[str, Tensor], XARGenerator, Tensor]:
    generator, found = xar(vectors, about["module"]).train(), {}
    given = partial(vectors.input, "train-forward")
    blocks = generator.encoder_blocks
    record(
        {
            "time_embedding": generator.time_embedding,
            "embedded": generator.embed_norm,
            "encoder_block0_modulation": blocks[0].modulation,
            "encoder_block0_attention": blocks[0].attn,
            "encoder_block0_mlp": blocks[0].mlp,
            "encoder_block0": blocks[0],
            "encoder_norm": generator.encoder_norm,
            "decoder_last_block": generator.decoder_blocks[-1],
        },
        found,
    )
    labels = drop_labels(given("labels"), generator.no_class, generator.config.label_dropout, given("drop_uniform"))
    batch, entities = len(labels), len(generator.partition.lengths)
    times = torch.sigmoid(given("time_normal")).view(entities, batch).T
    noise = given("noise").transpose(0, 1).flatten(1, 2)
    condition = generator.condition(labels[:, None], time_ids(times)).transpose(0, 1).flatten(0, 1)
    result = flow_loss(generator, given("latents"), labels, times, noise)
    for name in ("time_embedding", "encoder_block0_modulation"):
        found[name] = found[name].transpose(0, 1).flatten(0, 1)  # index entity * B + sample
    for name in (
        "embedded",
        "encoder_norm",
        "decoder_last_block",
        *(f"encoder_block0{s}" for s in ("", "_attention", "_mlp")),
    ):
        found[name] = found[name].reshape(batch, -1, generator.config.width)[:1, ::2]
    found |= {
        "time": times.T.flatten(),
        "time_ids": time_ids(times.T.flatten()).to(vectors.answers("train-forward")["time_ids"].dtype),
        "condition": condition,
        "model_input": result.noisy,
        "prediction": result.prediction,
        "loss": result.loss[None],
    }
    return found, generator, result.loss


def gradients(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    _, generator, loss = forward(vectors, about)
    loss.backward()
    grads = published.to_published({n: p.grad for n, p in generator.named_parameters()}, generator.config)
    norm = torch.nn.utils.get_total_norm([p.grad for p in generator.parameters()])
    rows = "class_emb.weight[3,11,207,640,999,1000]"
    for name in vectors.answers("train-gradients"):
        if "[" in name:
            rows = name
    chosen = [int(i) for i in rows.split("[")[1][:-1].split(",")]
    return grads | {"norm": norm[None], rows: grads["class_emb.weight"][chosen]}


def step(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    _, generator, loss = forward(vectors, about)
    before = {name: p.detach().clone() for name, p in generator.named_parameters()}
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
    torch.optim.AdamW(parameter_groups(generator), lr=4e-4, betas=(0.9, 0.96), weight_decay=0.02).step()
    after = dict(generator.named_parameters())
    average = {name: before[name].lerp(p, 1 - 0.9999) for name, p in after.items()}
    theirs = published.to_published(after, generator.config)
    averages = published.to_published(average, generator.config)
    return theirs | {"grad_norm": norm[None]} | {f"ema/{name}": value for name, value in averages.items()}


def sampling(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    name, arguments = about["name"], about["arguments"]
    generator = xar(vectors, about["module"]).eval()
    labels, start = vectors.input(name, "labels"), vectors.input(name, "start")
    noises, steps = vectors.input(name, "step_noise"), arguments["num_steps"]
    if noises is not None:
        noises = noises.double()
    calls, caches, original = [], [], generator._call

    def call(x, t, conditions, rows, begin, cache, output=True):
        out = original(x, t, conditions, rows, begin, cache, output)
        if output:
            calls.append((x, t, begin, out))
        caches.append(cache)
        return out

    generator._call = call
    tokens = generator.sample(
        labels, steps, arguments["cfg"], {"euler": "euler"}.get(arguments.get("sampler"), "sde"), start, noises
    )
    states = torch.stack([x for x, *_ in calls]).unflatten(0, (-1, steps))
    answer = vectors.answers(name)["states"]
    out = {"tokens": tokens, "states": states.to(answer.dtype)}

    sequence = generator.partition.to_sequence(tokens)
    velocities = []
    for s in range(len(generator.partition.lengths)):
        for i in (0, steps - 1):
            x, t, begin, v = calls[s * steps + i]
            # the half without class is computed where it is needed alone; here by a pass over everything so far
            passes = [
                uncached(generator, sequence[:1, :begin], x[:1].float(), t, label)
                for label in (int(labels[0]), generator.no_class)
            ]
            rows = [v[:1], *([v[len(labels)][None]] if len(v) > len(labels) else [])]
            for row, other in zip(rows, passes, strict=False):
                torch.testing.assert_close(row.float(), other, rtol=1e-4, atol=1e-4)
            velocities.append(torch.cat([v[:1].float(), passes[1]]))
    out["velocity"] = torch.stack(velocities).unflatten(0, (-1, 2)).to(vectors.answers(name)["velocity"].dtype)
    if "cache_keys_first_block" in vectors.answers(name):
        end = generator.partition.starts[-1]
        out["cache_keys_first_block"] = caches[-1].buffers[0][0, :1, :, :end]
        # values of the half without class, which is not computed when there is no guidance
        kept = {}

        def keep(number, k, v):
            kept[number] = v
            return k, v

        lengths = generator.partition.lengths[:-1]
        none = torch.tensor([generator.no_class])
        ids = torch.zeros(1, len(lengths), dtype=torch.int64)
        condition = Condition.of_entities(generator.condition(none[:, None], ids), lengths)
        with torch.no_grad():
            generator.network(sequence[:1, :end], condition, slice(0, end), generator.mask[:end, :end], keep)
        out["cache_values_last_block"] = kept[len(generator.blocks) - 1]
    return out


@torch.no_grad()
def uncached(generator: XARGenerator, context: Tensor, x: Tensor, t: float, label: int) -> Tensor:
    """Velocity of an entity by one pass over the clean context (1, m, C) and itself (1, n, C)."""
    lengths = generator.partition.lengths
    count = generator.partition.starts.index(context.shape[1]) + 1
    ids = torch.zeros(1, count, dtype=torch.int64)
    ids[0, -1] = time_ids(torch.tensor(t))
    condition = Condition.of_entities(generator.condition(torch.tensor([[label]]), ids), lengths[:count])
    tokens = torch.cat([context, x], dim=1)
    end = tokens.shape[1]
    return generator.network(tokens, condition, slice(0, end), generator.mask[:end, :end])[:, context.shape[1] :]


@torch.no_grad()
def encode(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, found = kl(vectors, about["module"]), {}
    encoder = tokenizer.encoder
    last = encoder.down[-1]
    stages = {f"down{i}": level.downsample for i, level in enumerate(encoder.down) if hasattr(level, "downsample")}
    stages |= {"last_level": last.attn[-1] if last.attn else last.block[-1], "mid": encoder.mid}
    stages |= {"mid_block_1": encoder.mid.block_1, "mid_attn_1": encoder.mid.attn_1}
    record(stages | {"encoder": encoder, "moments": tokenizer.quant_conv}, found)
    posterior = tokenizer.posterior(vectors.input("vae-encode", "image"))
    sample = posterior.sample(vectors.input("vae-encode", "posterior_noise"))
    answers = vectors.answers("vae-encode")
    found = {n: v[: len(answers[n])] for n, v in found.items()}
    return found | {
        "mean": posterior.mean,
        "std": (posterior.logvar / 2).exp(),
        "kl": posterior.kl(),
        "scaled_sample": tokenizer.config.scale_factor * sample,
        "reconstruction": tokenizer.decode_latents(posterior.mean),
    }


@torch.no_grad()
def decode(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, found = kl(vectors, about["module"]), {}
    decoder = tokenizer.decoder
    stages = {f"up{i}": level.upsample for i, level in enumerate(decoder.up) if hasattr(level, "upsample")}
    record(stages | {"post_quant": tokenizer.post_quant_conv, "conv_in": decoder.conv_in, "mid": decoder.mid}, found)
    image = tokenizer.decode_latents(vectors.input("vae-decode", "latent") / tokenizer.config.scale_factor)
    answers = vectors.answers("vae-decode")
    found = {n: v[: len(answers[n])] for n, v in found.items() if n in answers}
    stored = tokenizer.config.to_images(answers["image"])
    return found | {"image": image, "uint8": (255 * stored[:1]).clamp(0, 255).round().byte()}


def posterior(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    found = GaussianPosterior.from_moments(vectors.input("vae-posterior", "moments"))
    return {
        "mean": found.mean,
        "logvar": found.logvar,
        "std": (found.logvar / 2).exp(),
        "sample": found.sample(vectors.input("vae-posterior", "noise")),
        "kl": found.kl(),
    }


CASES = {
    "cells": cells,
    "rope": rope,
    "time-ids": ids,
    "schedules": schedules,
    "train-forward": lambda vectors, about: forward(vectors, about)[0],
    "train-gradients": gradients,
    "train-step": step,
    "sample-*": sampling,
    "vae-encode": encode,
    "vae-decode": decode,
    "vae-posterior": posterior,
}
