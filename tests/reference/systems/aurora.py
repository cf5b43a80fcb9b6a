"""AURORA: outputs of the reference cases by name."""

from __future__ import annotations

import io
import json
import zlib

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from vectors import Vectors, uniform

from zoo import weights
from zoo.data.images import Decoder
from zoo.losses import reconstruction_loss
from zoo.metrics.depth import depth_errors
from zoo.quantizers import squared_distances
from zoo.tokenizers.aurora import published
from zoo.tokenizers.aurora.curriculum import CurriculumSampler
from zoo.tokenizers.aurora.language import (
    DepthConstraint,
    aurora_vocabulary,
    boxes_to_text,
    depth_to_text,
    text_to_boxes,
)
from zoo.tokenizers.aurora.tokenizer import AuroraConfig, AuroraTokenizer
from zoo.tokenizers.aurora.training import aurora_losses


def run(vectors: Vectors, case: str) -> dict[str, Tensor]:
    about = vectors.cases[case]
    if case in CASES:
        return CASES[case](vectors, about)
    return network(vectors, about)


def published_state(config: dict) -> dict[str, Tensor]:
    tokenizer = AuroraTokenizer(published.config_from_published(config))
    return published.to_published(tokenizer.state_dict(), tokenizer.config)


def build(vectors: Vectors, module: str, counts: bool = True) -> AuroraTokenizer:
    """The tokenizer with the weights of the file; counts=False leaves the running counts at zero."""
    config = vectors.modules[module]["config"]
    tokenizer = AuroraTokenizer(published.config_from_published(config)).eval()
    state = vectors.state(module)
    key = "_vq_vae._ema_cluster_size"
    size = config["num_tokens"]
    state[key] = torch.from_numpy(1 + 0.5 * uniform(key, (size,))).float() if counts else torch.zeros(size)
    # BatchNorm statistics are not filled: they start as the constructor leaves them
    theirs = published.to_published(tokenizer.state_dict(), tokenizer.config)
    weights.load(tokenizer, published.from_published(theirs | state, tokenizer.config))
    return tokenizer


def network(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    name, module = about["name"], about["module"]
    loss = vectors.modules[module]["config"].get("loss_type", "mse")
    image = vectors.input(name, "img")
    label = vectors.input(name, "label_img")
    target = image if label is None else label

    tokenizer = build(vectors, module)
    blocks, downs = tokenizer.config.num_blocks, tokenizer.config.downsample.bit_length() - 1
    with torch.no_grad():
        output = tokenizer(image)
        scaled = tokenizer.scale(image)
        codes = output.quantized
        out = {
            "enc_first_conv": tokenizer.encoder[:1](scaled),
            "enc_pre_res": tokenizer.encoder[: 2 * downs](scaled),
            "enc_res0": tokenizer.encoder[: 2 * downs + 1](scaled),
            "z": output.z,
            "dist_first_token": squared_distances(output.z[:1, :, 0, 0], tokenizer.quantizer.codebook)[0],
            "indices": output.ids,
            "quantized": codes,
            "vq_loss_eval": output.quantizer_loss[None],
            "perplexity": output.perplexity[None],
            "dec_conv_in": tokenizer.decoder[:1](codes),
            "dec_res_last": tokenizer.decoder[: 2 + blocks](codes),
            "dec_up0": tokenizer.decoder[: 3 + blocks](codes),
            "dec_raw": output.raw,
            "recon": output.reconstruction,
            "loss_eval": torch.stack(aurora_losses(tokenizer, output, target, loss)),
            "decode": tokenizer.decode_ids(output.ids),
            "recon_from_codes": tokenizer.decoder(tokenizer.quantizer.codebook[output.ids[:1]].movedim(-1, 1)),
            "depth_string_image0": depth_to_text(output.ids[0]),
        }

    tokenizer.train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=about["adam_lr"])
    for suffix in ("", "_2"):
        output = tokenizer(image)
        total, reconstruction = aurora_losses(tokenizer, output, target, loss)
        out[f"train_losses{suffix}"] = torch.stack([total, reconstruction, output.quantizer_loss])
        out[f"embedding{suffix or '_1'}"] = tokenizer.quantizer.codebook.clone()
        if not suffix:
            optimizer.zero_grad()
            total.backward()
            out["ema_cluster_size_1"] = tokenizer.quantizer.cluster_size.clone()
            out["ema_w_1"] = tokenizer.quantizer.embed_sum.clone()
            out |= {f"grad:{key}": p.grad.clone() for key, p in tokenizer.named_parameters()}
            out |= {f"bn1:{key}": buffer.clone() for key, buffer in tokenizer.named_buffers()}
            optimizer.step()
            out |= {f"adam_1:{key}": p.detach().clone() for key, p in tokenizer.named_parameters()}
    out["indices_2"] = output.ids

    fresh = build(vectors, module, counts=False).train()
    with torch.no_grad():
        fresh(image)
    out["init0_ema_cluster_size_1"] = fresh.quantizer.cluster_size
    out["init0_embedding_1"] = fresh.quantizer.codebook
    return out


def soft(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    tokenizer = build(vectors, about["module"])
    logits = vectors.input("soft", "logits").requires_grad_()
    decoded = tokenizer.decode_soft(logits, temperature=1 / about["tau"])
    mse = F.mse_loss(decoded, vectors.input("soft", "target"))
    mse.backward()
    with torch.no_grad():
        ids = tokenizer(vectors.input("soft", "img")).ids
        return {
            "decode_soft": decoded.squeeze(1),
            "mse_to_target": mse[None],
            "grad_logits": logits.grad,
            "encode_tokens": ids.flatten(1),
            "decode_tokens": tokenizer.decode_ids(ids).squeeze(1),
        }


def criterion(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    pred, target = vectors.input("criterion", "pred"), vectors.input("criterion", "target")
    errors = depth_errors(pred.abs() + 0.1, target.abs() + 0.2)
    order = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
    return {
        "si_log": reconstruction_loss("si_log")(pred.abs() + 0.1, target)[None],
        "mse_ignore_zero": reconstruction_loss("mse_ignore_zero")(pred.abs() + 0.1, target)[None],
        "eval_depth": torch.stack([torch.as_tensor(errors[name]) for name in order]),
    }


def curriculum(vectors: Vectors, about: dict) -> dict:
    """Answers stand in the file for stand-in records: perception samples 0..N-1, multi-task samples from 100000."""
    answers = {}
    for task, expected in about["expected"].items():
        if not isinstance(expected, dict):
            answers[task] = expected  # a note on how the answers were made
            continue
        per_epoch, total = expected["per_epoch_perception"], expected["multitask_total"]
        perception = per_epoch[0]
        multitask = {20_000: 1_000, 5_000: 500}.get(perception, perception // 10)
        sampler = CurriculumSampler(perception, multitask, epochs=len(per_epoch))
        epochs = list(sampler.epochs())
        records = [i if i < perception else 100_000 + i - perception for i in sampler]
        answers[task] = {
            "len": len(sampler),
            "multitask_total": sum(r >= 100_000 for r in records) if total else 0,
            "per_epoch_perception": [len(drawn) for drawn, _ in epochs],
            "per_epoch_multitask": [repetitions * multitask for _, repetitions in epochs],
            "first8_per_epoch": [drawn[:8] for drawn, _ in epochs],
            "crc32_of_comma_joined": zlib.crc32(",".join(map(str, records)).encode()),
        }
    return json.loads(json.dumps(answers))


def prep(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    """A PNG of a depth folder, as the data set reads it and the published tokenizer scales it."""
    file = io.BytesIO()
    Image.fromarray(vectors.input("prep", "gray").numpy()).save(file, "PNG")
    raw = {"__key__": "map", "depth.png": file.getvalue()}
    depth = Decoder(["depth"], about["size"])(raw, "relative", squash=True)["depth"]
    return {"preprocessed": AuroraTokenizer(AuroraConfig()).to_values(torch.as_tensor(depth))}


def lm(vectors: Vectors, about: dict) -> dict[str, Tensor]:
    """Greedy decoding over logits that are a function of the step."""
    words = vectors.inputs["lm/logits"]
    constraint = DepthConstraint(aurora_vocabulary(depth=True, pixels=True), prompt_length=0)
    ids = torch.zeros(1, 0, dtype=torch.int64)
    for step in range(words["max_new"]):
        logits = torch.from_numpy(uniform(f"{words['key']}/{step}", (words["vocab"],))).float()
        for at, word, bump in words["bumps"]:
            if at == step:
                logits[word] += bump
        ids = torch.cat([ids, constraint(ids, logits[None]).argmax(1, keepdim=True)], 1)
        if ids[0, -1] == 2:
            break
    return {"ids": ids[0]}


def text(vectors: Vectors, about: dict) -> dict:
    answers = {}
    for name, expected in about["expected"].items():
        if name.startswith("ids_"):
            vocabulary = aurora_vocabulary(depth=name != "ids_pixel_only", pixels=name != "ids_depth_only")
            answers[name] = {w: len(vocabulary) if w == "vocab" else vocabulary.id_of(w) for w in expected}
    boxes = about["expected"]["boxes_xyxy"]
    return answers | {"boxes_xyxy": text_to_boxes(boxes_to_text(boxes)).tolist(), "box_lines": boxes_to_text(boxes)}


CASES = {
    "soft": soft,
    "criterion": criterion,
    "prep": prep,
    "lm": lm,
    "text": text,
    "curriculum": curriculum,
}
