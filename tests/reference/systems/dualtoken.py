"""DualToken: outputs of the reference cases by name."""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vectors import Vectors

from zoo import weights
from zoo.losses.adversarial import ResidualPatchDiscriminator
from zoo.quantizers import ResidualQuantizer
from zoo.tokenizer import Tokens
from zoo.tokenizers.dualtoken import published
from zoo.tokenizers.dualtoken.projection import AttentionProjection
from zoo.tokenizers.dualtoken.tokenizer import DualTokenTokenizer
from zoo.tokenizers.dualtoken.training import DualTokenTraining
from zoo.tokenizers.siglip import published as siglip


def run(vectors: Vectors, case: str) -> dict[str, Tensor]:
    return FUNCTIONS[vectors.cases[case]["function"]](vectors, vectors.cases[case])


def published_state(config: dict) -> dict[str, Tensor]:
    config_of = published.config_from_published(config["rqvaesiglip"], config["siglip"])
    return published.to_published(DualTokenTokenizer(config_of).state_dict(), config_of)


def filled(vectors: Vectors, module: str) -> dict[str, Tensor]:
    """The authors' state dict; set_after_fill names a stored tensor, or takes the absolute value."""
    state = vectors.state(module)
    for name, action in vectors.modules[module].get("set_after_fill", {}).items():
        state[name] = vectors.tensors[action] if action in vectors.tensors else state[name].abs()
    return state


def dualtoken(vectors: Vectors, module: str) -> DualTokenTokenizer:
    config = vectors.modules[module]["config"]
    tokenizer = DualTokenTokenizer(published.config_from_published(config["rqvaesiglip"], config["siglip"]))
    weights.load(tokenizer, published.from_published(filled(vectors, module), tokenizer.config))
    return tokenizer.eval()


def as_map(tokens: Tensor) -> Tensor:
    """(B, N, ...) to (B, h, w, ...)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side))


class Recorder:
    """Outputs of modules while it is open."""

    def __init__(self, outputs: dict[str, nn.Module]):
        self.found: dict[str, Tensor] = {}
        self.hooks = [m.register_forward_hook(self._keep(name)) for name, m in outputs.items()]

    def _keep(self, name):
        def keep(module, args, output):
            self.found[name] = output

        return keep

    def __enter__(self):
        return self.found

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def encode(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, values = dualtoken(vectors, about["module"]), vectors.input(about["name"], "image")
    tower = tokenizer.encoder.vision
    parts = {"prequant_pix": tokenizer.prequant_pixel, "prequant_sem": tokenizer.prequant_semantic}
    if hasattr(tokenizer, "prequant_shortcut"):
        parts["prequant_shortcut"] = tokenizer.prequant_shortcut
    with Recorder(parts | {f"hidden_{i + 1}": block for i, block in enumerate(tower.blocks)}) as found:
        output = tokenizer(values, decode=False)
        # the tower runs on quantised features from layer_semantic on
        latents = tokenizer.latents(values)
        tokenizer.finish(output.features)
    pixel, semantic = output.quantized["pixel"], output.quantized["semantic"]
    return found | {
        "hidden_0": tower.embed(values),
        "z_q_pix": pixel.quantized,
        "loss_pix": pixel.loss,
        "code_pix": as_map(pixel.ids),
        "z_q_sem": output.features,
        "loss_sem": semantic.loss,
        "code_sem": as_map(semantic.ids),
        "pooler": output.pooled,
        "pix_latent": as_map(latents.pixel),
        "sem_latent": as_map(latents.semantic),
    }


@torch.no_grad()
def decode(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer = dualtoken(vectors, about["module"])
    decoder, stages = tokenizer.decoder, {}
    for i, level in enumerate(decoder.up):
        stages |= {f"up_{i}_block_{b}": block for b, block in enumerate(level.block)}
        stages |= {f"up_{i}_attn_{b}": block for b, block in enumerate(level.attn)}
        stages[f"up_{i}_block_last"] = level.block[-1]
        if hasattr(level, "upsample"):
            stages[f"up_{i}_upsample"] = level.upsample
    stages |= {"postquant_pix": tokenizer.postquant_pixel, "post_quant_conv": tokenizer.bridge}
    stages |= {"conv_in": decoder.conv_in, "mid": decoder.mid.block_2}
    inputs = {}
    hook = tokenizer.bridge.register_forward_pre_hook(lambda module, args: inputs.update(resized_latent=args[0]))
    with Recorder(stages) as found:
        reconstruction = tokenizer.to_values(vectors.input(about["name"], "z_q_pix"))
    hook.remove()
    return found | inputs | {"recon": reconstruction}


@torch.no_grad()
def forward(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, case = dualtoken(vectors, about["module"]), about["name"]
    values, text = vectors.input(case, "image"), vectors.input(case, "text")
    output = tokenizer(values)
    ids = {name: one.ids for name, one in output.quantized.items()}
    tokens = Tokens(ids)
    embeddings = tokenizer.code_embeddings(tokens)
    found = {
        "z_q_sem": output.features,
        "pooler": output.pooled,
        "recon": output.reconstruction,
        "code_pix": as_map(ids["pixel"]),
        "code_sem": as_map(ids["semantic"]),
        "loss_pix": output.quantized["pixel"].loss,
        "loss_sem": output.quantized["semantic"].loss,
        "recon_from_codes": tokenizer.to_values(embeddings["pixel"].sum(2)),
        "z_q_sem_from_codes": tokenizer.to_features(tokenizer.quantizers["semantic"].codes(ids["semantic"])),
        "emb_pix_with_depth": as_map(embeddings["pixel"]),
        "emb_sem_with_depth": as_map(embeddings["semantic"]),
        "image_features": tokenizer.embedding_of(tokens),
        "logit_scale": tokenizer.encoder.logit_scale,
        "logit_bias": tokenizer.encoder.logit_bias,
    }
    if text is not None:
        embeds = tokenizer.encoder.text(text)
        found |= {"text_embeds": embeds, "text_features": F.normalize(embeds, dim=-1)}
    return found


@torch.no_grad()
def prefix(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer, z = dualtoken(vectors, about["module"]), vectors.input(about["name"], "z")
    return {"postquant_pix": tokenizer.postquant_pixel(z), "postquant_sem": tokenizer.to_features(z)}


class Draws:
    """Gives the stored draws of code restarts in place of torch.randperm and torch.rand_like."""

    def __init__(self, vectors: Vectors, case: str):
        self.vectors, self.case, self.count, self.order = vectors, case, 0, None

    def randperm(self, n: int, **_) -> Tensor:
        self.order = self.vectors.input(self.case, f"randperm_{self.count}")
        assert len(self.order) == n, f"draw {self.count} is of {n} vectors, {len(self.order)} are stored"
        self.count += 1
        return self.order

    def rand_like(self, drawn: Tensor, **_) -> Tensor:
        """Stored for all copies of all vectors; asked for those that were chosen."""
        noise = self.vectors.input(self.case, f"rand_{self.count - 1}")
        return noise[self.order[: len(drawn)]]

    def __enter__(self):
        self.patches = [mock.patch("torch.randperm", self.randperm), mock.patch("torch.rand_like", self.rand_like)]
        for patch in self.patches:
            patch.start()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()


def quantizer_names(about: dict) -> dict:
    """Ours of what describes a quantizer of theirs."""
    stream = published.stream_from_published(about | {"bottleneck_type": about["kind"]})
    (height, width, dim), (rows, columns, _) = about["latent_shape"], about["code_shape"]
    return dict(
        num_codes=stream.codebook_size,
        dim=dim,
        levels=stream.levels,
        decay=stream.decay,
        kind=stream.kind,
        shared=stream.shared,
        restart=stream.restart,
        cell=(height // rows, width // columns),
    )


def quant(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    module = vectors.modules[about["module"]]
    config = {"restart_unused_codes": True} | module["config"] | {"kind": module["kind"]}
    quantizer = ResidualQuantizer(**quantizer_names(config)).eval()
    theirs, state = filled(vectors, about["module"]), {}
    for name, tensor in theirs.items():
        _, level, kind = name.split(".")
        if int(level) < len(quantizer.codebooks):
            tensor = tensor[:-1] if kind == "weight" else tensor
            state[f"codebooks.{level}.{published.CODEBOOK_NAMES[kind]}"] = tensor
    weights.load(quantizer, state)
    x, w = vectors.input(about["name"], "x"), vectors.input(about["name"], "w")
    with torch.no_grad():
        given = quantizer(x)
        embeddings = quantizer.embeddings(given.ids)
    found = {
        "eval_z_q": given.quantized,
        "eval_loss": given.loss,
        "eval_codes": given.ids,
        "eval_embed_code": quantizer.codes(given.ids),
        "eval_embed_code_with_depth": embeddings,
        "to_code_shape": quantizer.to_cells(x),
    }
    for i, total in enumerate(embeddings.cumsum(-2).unbind(-2)):
        found[f"eval_level_{i}"] = total
    x.requires_grad_()
    quantizer.train()
    with Draws(vectors, about["name"]):
        output = quantizer(x)
    (5 * output.loss + (output.quantized * w).sum()).backward()
    found |= {
        "train_z_q": output.quantized,
        "train_loss": output.loss,
        "train_codes": output.ids,
        "train_grad_x": x.grad,
    }
    for level in range(quantizer.levels):
        book = quantizer.codebook(level)
        for theirs_name, ours in published.CODEBOOK_NAMES.items():
            tensor = getattr(book, ours)
            found[f"after/codebooks.{level}.{theirs_name}"] = (
                F.pad(tensor, (0, 0, 0, 1)) if ours == "codebook" else tensor
            )
    return found


def proj(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    c = vectors.modules[about["module"]]["config"]
    projection = AttentionProjection(c["in_dim"], c["out_dim"], c["num_heads"], c["is_causal"])
    weights.load(projection, filled(vectors, about["module"]))
    x, w = (vectors.input(about["name"], name) for name in ("x", "w"))
    x.requires_grad_()
    with Recorder({"attn": projection.attn, "mlp": projection.mlp}) as found:
        y = projection(x)
    (y * w).sum().backward()
    grads = {f"grad/{name}": p.grad for name, p in projection.named_parameters()}
    return found | {"y": y, "grad_x": x.grad} | grads


FUNCTIONS = {
    "encode": encode,
    "decode": decode,
    "forward": forward,
    "prefix": prefix,
    "quant": quant,
    "proj": proj,
}
