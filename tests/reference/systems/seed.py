"""SEED: outputs of the reference cases by name."""

from __future__ import annotations

import re
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from vectors import Vectors

from systems.seed_unclip import unclip_class_labels
from zoo import weights
from zoo.data.images import fit, to_float
from zoo.tokenizers.seed import published
from zoo.tokenizers.seed.tokenizer import MEAN, STD, SeedTokenizer
from zoo.tokenizers.seed.training import SeedCodebookTraining, SeedContrastiveTraining
from zoo.training.schedules import epoch_cosine

WEIGHTS = {"codebook": 5.0, "queries": 2.0, "embedding": 0.5}
"""Of the published second stage."""
STAGE_ONE = ("qformer.", "query_tokens", "encoder", "image_proj", "text_proj", "temperature")
"""What a model of the first stage consists of, in our names."""


def run(vectors: Vectors, case: str) -> dict[str, Tensor]:
    name = next(name for name in CASES if case.startswith(name))
    return CASES[name](vectors, case)


def published_state(config: dict) -> dict[str, Tensor]:
    ours = published.config_from_published(config)
    state = SeedTokenizer(ours).state_dict()
    if config["class"] != "Blip2QformerCasual":
        return published.to_published(state, ours)
    state = {name: tensor for name, tensor in state.items() if name.startswith(STAGE_ONE)}
    theirs = published.to_published(state, ours)
    return theirs | captioning_head(config["bert"])


def captioning_head(bert: dict) -> dict[str, Tensor]:
    """What the published stage 1 has and no stage of the recipe runs."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertOnlyMLMHead

    sizes = {"hidden_size": bert["hidden_size"], "vocab_size": bert["vocab_size"]}
    head = BertOnlyMLMHead(BertConfig(**sizes)).state_dict()
    return {f"Qformer.cls.{name}": tensor for name, tensor in head.items()}


def module(vectors: Vectors, case: str) -> SeedTokenizer:
    """The tokenizer that a case names, in evaluation mode, with the weights of the file."""
    name = vectors.cases[case]["module"]
    tokenizer = SeedTokenizer(published.config_from_published(vectors.modules[name]["config"])).eval()
    state = published.from_published(vectors.state(name), tokenizer.config)
    own = tokenizer.state_dict()
    if tokenizer.config.qformer.vocab_size:  # of the first stage, which has nothing behind the queries
        state |= {n: t for n, t in own.items() if not n.startswith(STAGE_ONE)} | {"temperature": torch.tensor(0.07)}
    weights.load(tokenizer, state)
    return tokenizer


class Recorder(dict):
    """Receives what modules return, by the names given to them."""

    def watch(self, name: str, part: nn.Module, taken=lambda out: out) -> None:
        part.register_forward_hook(lambda m, args, out: self.__setitem__(name, taken(out)))

    def watch_input(self, name: str, part: nn.Module) -> None:
        part.register_forward_pre_hook(lambda m, args: self.__setitem__(name, args[0]))

    def watch_layers(self, name: str, layers, first: int = 0) -> None:
        for i, layer in enumerate(layers, first):
            self.watch(f"{name}{i}", layer)


@torch.no_grad()
def vit_stages(vectors: Vectors, case: str) -> dict[str, Tensor]:
    tokenizer, found = module(vectors, case), Recorder()
    tower = tokenizer.encoder
    found.watch("patch_embed", tower.patch_embed)
    found.watch_input("embeddings", tower.blocks[0])
    found.watch("block0_attn", tower.blocks[0].attn)
    found.watch_layers("block", tower.blocks)
    return found | {"ln_vision": tokenizer.read(vectors.input(case, "image"))}


@torch.no_grad()
def qformer(vectors: Vectors, case: str) -> dict[str, Tensor]:
    tokenizer, found = module(vectors, case), Recorder()
    given = vectors.input(case, "query_tokens")
    queries = tokenizer.query_tokens if given is None else given
    if count := re.search(r"_(\d+)_queries", case):
        queries = queries[:, : int(count[1])]
    net = tokenizer.qformer
    found.watch("hidden0", net.norm)
    found.watch_layers("hidden", net.layers, 1)
    context = tokenizer.read(vectors.input(case, "image"))
    last, layer = net(queries, context), net.layers[0]
    causal = net.config.is_causal(queries.shape[1])
    found = for_each(found, len(context))
    x = found["hidden0"]
    found["self_attention0"] = probabilities(*layer.attn.heads(x)[:2], causal)[:1]
    read = layer.cross_attn.heads(layer.attn(x, is_causal=causal), context)
    found["cross_attention0"] = probabilities(*read[:2], False)[:1]
    return found | {"last": last}


def probabilities(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1)


@torch.no_grad()
def encode(vectors: Vectors, case: str) -> dict[str, Tensor]:
    tokenizer = module(vectors, case)
    z = tokenizer.encode_task(tokenizer.query(vectors.input(case, "image")))
    found = tokenizer.quantizer(z)
    decoded = tokenizer.decoded(found.quantized)
    return {"z": z, "ids": found.ids, "quant": found.quantized, "loss_embed": found.loss, "decode_task": decoded}


def quantizer(vectors: Vectors, case: str) -> dict[str, Tensor]:
    net, z = module(vectors, case).quantizer, vectors.input(case, "z").requires_grad_()
    found = net(z)
    (found.loss + (found.quantized * vectors.input(case, "cotangent")).sum()).backward()
    out = {"quant": found.quantized, "loss": found.loss, "ids": found.ids.flatten()}
    return out | {"grad_z": z.grad, "grad_codebook": net.codebook.grad}


@torch.no_grad()
def decode_embed(vectors: Vectors, case: str) -> dict[str, Tensor]:
    tokenizer, found = module(vectors, case), Recorder()
    found.watch_input("with_pos", tokenizer.blocks_image)
    found.watch_layers("block", tokenizer.blocks_image)
    if hasattr(tokenizer.head, "down"):
        found.watch("image_down", tokenizer.head.down)
    else:
        found.watch("reverse_hidden0", tokenizer.head.qformer.norm)
        found.watch_layers("reverse_hidden", tokenizer.head.qformer.layers, 1)
    decoded = tokenizer.decoded(tokenizer.quantizer.codes(vectors.input(case, "ids")))
    embedding = tokenizer.to_embedding(decoded)
    return for_each(found, len(embedding)) | {"decode_task": decoded, "image_embed": embedding}


def for_each(found: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Where one set of queries served all images of a batch, a copy for each."""
    return {name: one.expand(count, *one.shape[1:]) if len(one) == 1 else one for name, one in found.items()}


@torch.no_grad()
def roundtrip(vectors: Vectors, case: str) -> dict[str, Tensor]:
    tokenizer = module(vectors, case)
    ids = tokenizer.quantizer.encode(tokenizer.encode_task(tokenizer.query(vectors.input(case, "image"))))
    return {"ids": ids, "image_embed": tokenizer.to_embedding(tokenizer.decoded(tokenizer.quantizer.codes(ids)))}


def stage2_losses(vectors: Vectors, case: str) -> dict[str, Tensor]:
    tokenizer, found = module(vectors, case), Recorder()
    training = SeedCodebookTraining(tokenizer, target=None, weights=WEIGHTS, optimizers={})
    found.watch("z", tokenizer.encode_task)
    found.watch("decode_task", tokenizer.decode_task)
    found.watch("recon_s", tokenizer.blocks)
    found.watch("ids", tokenizer.quantizer, lambda out: out.ids)
    found.watch("image_embed", tokenizer.head)
    terms, _ = training.terms(vectors.input(case, "image"), vectors.input(case, "clip_embed"))
    total = sum(terms.values())
    total.backward()
    found |= {
        "loss_embed": terms["codebook"],
        "loss_recon_s": terms["queries"],
        "loss_distil_image": terms["embedding"],
    }
    return found | {"loss": total} | gradients(tokenizer)


def gradients(tokenizer: SeedTokenizer) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None}
    return {f"grad.{name}": grad for name, grad in published.to_published(found, tokenizer.config).items()}


@torch.no_grad()
def stage2_features(vectors: Vectors, case: str) -> dict[str, Tensor]:
    tokenizer = module(vectors, case)
    output = tokenizer(tokenizer.query(vectors.input(case, "image")))
    return {"image_embed": output.embedding, "ids": output.quantized.ids, "forward_image": output.reconstruction}


def stage1_itc(vectors: Vectors, case: str) -> dict[str, Tensor]:
    size, _, rank = re.search(r"world(\d+)(_rank(\d+))?", case).groups()
    size, rank = int(size), int(rank or 0)

    def features(tokenizer: SeedTokenizer, of: str) -> tuple[Tensor, Tensor]:
        ids, live = vectors.input(of, "input_ids"), vectors.input(of, "attention_mask").bool()
        seen = tokenizer.to_text_space(tokenizer.query(vectors.input(of, "image")))
        return F.normalize(seen, dim=-1), F.normalize(tokenizer.embed_ids(ids, live), dim=-1)

    tokenizer = module(vectors, case)
    images, texts = features(tokenizer, case)
    others = [case] if size == 1 else [re.sub(r"rank\d+", f"rank{r}", case) for r in range(size)]
    with torch.no_grad():
        everyone = [features(tokenizer, other) for other in others]
    gathered = iter([torch.cat([image for image, _ in everyone]), torch.cat([text for _, text in everyone])])
    with (
        mock.patch("zoo.losses.contrastive.gather_over_ranks", side_effect=gathered),
        mock.patch("zoo.losses.contrastive.rank", return_value=rank),
    ):
        training = SeedContrastiveTraining(tokenizer, optimizers={})
        loss = training.contrastive(images, texts)
    loss.backward()
    return {"loss": loss, "loss_itc": loss, "image_feat": images, "text_feat": texts} | gradients(tokenizer)


@torch.no_grad()
def stage1_text(vectors: Vectors, case: str) -> dict[str, Tensor]:
    net, found = module(vectors, case).qformer, Recorder()
    found.watch("hidden0", net.norm)
    found.watch_layers("hidden", net.layers, 1)
    net(ids=vectors.input(case, "input_ids"), live=vectors.input(case, "attention_mask").bool())
    return found


@torch.no_grad()
def stage1_multimodal(vectors: Vectors, case: str) -> dict[str, Tensor]:
    tokenizer = module(vectors, case)
    context = tokenizer.read(vectors.input(case, "image"))
    ids, live = vectors.input(case, "input_ids"), vectors.input(case, "attention_mask").bool()
    return {"last": tokenizer.qformer(tokenizer.query_tokens, context, ids, live)}


def lr_schedule(vectors: Vectors, case: str) -> dict[str, Tensor]:
    """Of the published recipes: peak, lowest and first rate, and epochs; an epoch of 100,000 steps."""
    found, per_epoch = {}, 100_000
    for stage, peak, lowest, first, epochs in (("stage1", 3e-5, 3e-6, 3e-7, 10), ("stage2", 1e-4, 1e-5, 1e-6, 500)):
        rates = [
            peak
            * epoch_cosine(epoch * per_epoch + step, epochs * per_epoch, per_epoch, 2000, first / peak, lowest / peak)
            for epoch, step in vectors.input(case, f"{stage}_epoch_step").tolist()
        ]
        found[f"{stage}_lr"] = torch.tensor(rates)
    return found


def preprocess(vectors: Vectors, case: str) -> dict[str, Tensor]:
    picture = Image.fromarray(vectors.input(case, "rgb").byte().numpy())
    size = next(iter(vectors.answers(case).values())).shape[-1]
    made = {
        "script": fit(picture, size, "squash", resample=Image.BILINEAR),
        "keep_ratio": fit(picture, size, "center", resample=Image.BILINEAR),
        "processor": fit(picture, size, "squash", resample=Image.BICUBIC),
    }
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = {name: torch.from_numpy(to_float(np.asarray(one).transpose(2, 0, 1))) for name, one in made.items()}
    return {name: (one - mean) / std for name, one in pixels.items()}


CASES = {
    "vit_stages": vit_stages,
    "qformer": qformer,
    "encode": encode,
    "quantizer": quantizer,
    "decode_embed": decode_embed,
    "roundtrip": roundtrip,
    "stage2_losses": stage2_losses,
    "stage2_features": stage2_features,
    "stage1_itc": stage1_itc,
    "stage1_text": stage1_text,
    "stage1_multimodal": stage1_multimodal,
    "lr_schedule": lr_schedule,
    "preprocess": preprocess,
    "unclip_class_labels": unclip_class_labels,
}
