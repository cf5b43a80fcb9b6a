"""MingTok and the flow head of Ming-UniVision: outputs of the reference cases by name."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from vectors import Vectors

from zoo import weights
from zoo.data.images import fit, to_float
from zoo.flow import falling, interpolate
from zoo.nn.autoencoder import to_tokens
from zoo.nn.patches import patchify
from zoo.tokenizers.mingtok import published
from zoo.tokenizers.mingtok.head import FlowHead
from zoo.tokenizers.mingtok.losses import patch_loss
from zoo.tokenizers.mingtok.tokenizer import MingTokTokenizer

LOSSES = {
    "L1": {"kind": "L1"},
    "L1-tanh": {"kind": "L1-tanh"},
    "L1-plain": {"kind": "L1-plain"},
    "L2.normpix": {"kind": "L2", "norm_pix": True},
    "L2.plainpix": {"kind": "L2"},
}


def run(vectors: Vectors, case: str) -> dict[str, Tensor]:
    about = vectors.cases[case]
    function = next(f for name, f in CASES.items() if case == name or (name[-1] == "-" and case.startswith(name)))
    return function(vectors, about, partial(vectors.input, case))


def published_state(config: dict) -> dict[str, Tensor]:
    if "low_level_encoder" in config:
        tokenizer = MingTokTokenizer(published.config_from_published(config))
        return published.to_published(tokenizer.state_dict(), tokenizer.config)
    head = FlowHead(published.head_config_from_published(config))
    return published.head_to_published(head.state_dict(), head.config)


def modules(vectors: Vectors, about: dict) -> tuple[MingTokTokenizer | None, FlowHead | None]:
    """The modules that a case names, with the weights of the file."""
    tokenizer = head = None
    if "tokenizer" in about["module"]:
        tokenizer = MingTokTokenizer(published.config_from_published(vectors.modules["tokenizer"]["config"])).eval()
        weights.load(tokenizer, published.from_published(vectors.state("tokenizer"), tokenizer.config))
    if "generator" in about["module"]:
        head = FlowHead(published.head_config_from_published(vectors.modules["generator"]["config"])).eval()
        weights.load(head, published.head_from_published(vectors.state("generator"), head.config))
    return tokenizer, head


def record(outputs: dict[str, nn.Module], inputs: dict[str, nn.Module] | None = None) -> dict[str, Tensor]:
    """A dict that receives what these modules return, or their first input."""
    found = {}
    for name, module in outputs.items():
        module.register_forward_hook(lambda m, args, out, name=name: found.__setitem__(name, out))
    for name, module in (inputs or {}).items():
        module.register_forward_pre_hook(lambda m, args, name=name: found.__setitem__(name, args[0]))
    return found


@torch.no_grad()
def enc(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, _ = modules(vectors, about)
    encoder = tokenizer.encoder
    stages = {"patch_embed": encoder.patch_embed, "block0": encoder.blocks[0], "out_proj": encoder.out_proj}
    found = record(stages | {"blocks_out": encoder.blocks[-1]}, {"tokens": encoder.blocks[0]})
    raw = encoder(given("image"))
    found["patch_embed"] = to_tokens(found["patch_embed"])
    return found | {"latent_raw": raw, "latent_norm": tokenizer.normalize(raw)}


@torch.no_grad()
def sem(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, _ = modules(vectors, about)
    first = tokenizer.semantic_decoder.blocks[0]
    found = record({"block0.attn": first.attn, "block0": first}, {"in_proj": first})
    normed = tokenizer.semantic_decoder(tokenizer.encoder(given("image")))
    return found | {"x_norm": normed, "patchtokens": normed[:, :-1], "clstoken": normed[:, -1]}


def prediction(tokenizer: MingTokTokenizer, values: Tensor) -> Tensor:
    """Patches of the pixel decoder for values in [-1, 1]."""
    return tokenizer.pixel_decoder.patches(tokenizer.semantic_decoder(tokenizer.encoder(values)[:, :-1]))


@torch.no_grad()
def pix(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, _ = modules(vectors, about)
    decoder, values = tokenizer.pixel_decoder, given("image")
    stages = {"sem_to_pix": decoder.embed, "block0": decoder.blocks[0], "norm": decoder.norm, "pred": decoder.head}
    found = record(stages, {"in": decoder.blocks[0]})
    preclamp = decoder(tokenizer.semantic_decoder(tokenizer.encoder(values)[:, :-1]))
    return found | {"recon_preclamp": preclamp, "recon": tokenizer.to_values(tokenizer.to_images(preclamp))}


@torch.no_grad()
def loss(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, _ = modules(vectors, about)
    values, mask, patch = given("image"), given("mask"), tokenizer.config.pixel_patch_size
    patches = prediction(tokenizer, values)
    out = {"patchify_target": patchify(values, patch)}
    for name, options in LOSSES.items():
        out[name] = patch_loss(patches, values, patch, **options)
        if mask is not None:
            out[f"{name}.masked"] = patch_loss(patches, values, patch, **options, mask=mask)
    return out


def loss_gradients(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, _ = modules(vectors, about)
    kind = about["name"].removeprefix("grad-").replace("-normpix", ".normpix").replace("-plainpix", ".plainpix")
    values = given("image")
    patch_loss(prediction(tokenizer, values), values, tokenizer.config.pixel_patch_size, **LOSSES[kind]).backward()
    grads = {name: p.grad for name, p in tokenizer.named_parameters()}
    return published.to_published(grads, tokenizer.config)


@torch.no_grad()
def big(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, _ = modules(vectors, about)
    values = given("image")
    raw = tokenizer.encoder(values)
    features = tokenizer.semantic_decoder(raw[:, :-1])
    rows, columns = (side // tokenizer.config.patch_size for side in values.shape[2:])
    out = {
        "pos_embed": tokenizer.encoder.positions(rows, columns),
        "latent_norm": tokenizer.normalize(raw),
        "sem.patchtokens": features,
    }
    if rows == columns:
        out["recon"] = tokenizer.to_values(tokenizer.decode_features(features))
    return out


@torch.no_grad()
def cache(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, _ = modules(vectors, about)
    latents = tokenizer.normalize(tokenizer.encoder(given("image"))[:, :-1])
    features = stepwise(tokenizer, latents)
    return {"features": features, "recon": tokenizer.to_values(tokenizer.decode_features(features))}


def stepwise(tokenizer: MingTokTokenizer, latents: Tensor) -> Tensor:
    earlier = tokenizer.new_cache(*latents.shape[:2])
    return torch.stack([tokenizer.step(latent, earlier) for latent in latents.unbind(1)], dim=1)


def flow_loss(vectors: Vectors, about: dict, given) -> tuple[dict[str, Tensor], FlowHead]:
    _, head = modules(vectors, about)
    net = head.net
    stages = {"t_emb": net.time_embed, "c_emb": net.cond_embed, "input_proj": net.input_proj, "v": net}
    stages |= {"block0": net.blocks[0], "blocks_out": net.blocks[-1]}
    found = record(stages, {"t_freq": net.time_embed.mlp})
    z, x0, noise, t = head.condition(given("hidden"))[:, 0], given("x0"), given("noise"), given("t")
    rows = head.loss(z, x0, t, noise)
    return found | {"z": z, "xt": interpolate(x0, noise, t), "loss_per_row": rows, "loss": rows.mean()}, head


def flow_gradients(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    found, head = flow_loss(vectors, about, given)
    found["loss"].backward()
    return published.head_to_published({n: p.grad for n, p in head.named_parameters()}, head.config)


def settings_of(about: dict) -> dict:
    """The authors' settings in the words of FlowHead.sample."""
    theirs = about["settings"]
    if theirs.get("cfg_renorm_type") not in (None, "channel"):
        raise ValueError(f"unknown cfg_renorm_type {theirs['cfg_renorm_type']!r}")
    return {
        "text_scale": theirs["text_cfg"],
        "image_scale": theirs["image_cfg"],
        "temperature": theirs["temperature"],
        "renorm": theirs.get("cfg_renorm_type") == "channel",
        "time_shift": theirs.get("time_shifting_factor") or 1.0,
    }


def guided(rows: Tensor) -> dict[str, Tensor]:
    """Arguments of FlowHead.sample; in the authors' code two or three rows are those of guidance, others are not."""
    if len(rows) not in (2, 3):
        return {"z": rows}
    return dict(zip(("z", "unconditional", "text_unconditional"), rows.split(1), strict=False))


@torch.no_grad()
def sample(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    _, head = modules(vectors, about)
    count, options = about["settings"]["rows"], settings_of(about)
    conditions = guided(head.condition(given("hidden"))[:count, 0])
    noise = given("noise")[: len(conditions["z"])]
    states, velocities = [], []
    head.net.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    head.net.register_forward_hook(lambda m, args, out: velocities.append(out))
    end = head.sample(**conditions, **options, noise=noise)
    times = falling(head.config.num_steps, options["time_shift"])[:-1]
    states.append(end.expand(count, -1))
    return {"x": torch.stack(states), "v": torch.stack(velocities), "t": torch.tensor(times, dtype=torch.float32)}


@torch.no_grad()
def gen(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, head = modules(vectors, about)
    hidden, noise, options = given("hidden"), given("noise"), settings_of(about)
    latents = []
    for states, start in zip(hidden, noise, strict=True):
        conditions = guided(head.condition(states)[:, 0])
        latents.append(head.sample(**conditions, **options, noise=start).expand(len(states), -1))
    latents = torch.stack(latents, dim=1)
    features = stepwise(tokenizer, latents)
    return {
        "latents": latents,
        "features": features,
        "llm_inputs": head.project(features),
        "image": tokenizer.to_values(tokenizer.decode_features(features)),
    }


def pre(vectors: Vectors, about: dict, given) -> dict[str, Tensor]:
    tokenizer, _ = modules(vectors, about)
    picture = fit(Image.fromarray(given("picture").numpy()), tokenizer.config.image_size)
    pixels = to_float(np.asarray(picture).transpose(2, 0, 1))
    return {"out": tokenizer.to_values(torch.from_numpy(pixels))[None]}


CASES = {
    "enc": enc,
    "sem": sem,
    "pix": pix,
    "loss": loss,
    "grad-flow": flow_gradients,
    "grad-": loss_gradients,
    "big": big,
    "rect": big,
    "cache": cache,
    "flow": lambda *arguments: flow_loss(*arguments)[0],
    "sample-": sample,
    "gen": gen,
    "pre": pre,
}
