"""ETT: outputs of the cases in which a language model reads IBQ's codebook embeddings."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from vectors import Vectors

import zoo
from zoo.lm import EmbeddingConfig, EmbeddingVision, VisualLM, generate_image
from zoo.lm.vision import Seen
from zoo.tokenizer import Tokenizer, Tokens
from zoo.tokenizers.ibq.training import IBQTraining
from zoo.vocabulary import Vocabulary

ALPHA = 0.25


def language_model(config: dict) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**{name: value for name, value in config.items() if name != "class"}))


def model_of(vectors: Vectors, tokenizer: Tokenizer, writes: bool = False) -> VisualLM:
    """The language model, projector and, if it writes, the head of the file, on that tokenizer."""
    lm = language_model(vectors.modules["ett_llm"]["config"])
    missing = lm.load_state_dict(vectors.state("ett_llm"), strict=False).missing_keys
    assert missing == ["lm_head.weight"]  # which is that of the embedding
    size = lm.config.vocab_size
    words = Words(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    vision = EmbeddingVision(tokenizer, lm.config.hidden_size, EmbeddingConfig(visual_head=writes))
    vision.projector.load_state_dict(vectors.state("ett_projector"))
    if writes:
        vision.visual_head.load_state_dict(vectors.state("ett_visual_head"))
    Vocabulary(size, vision.streams).extend_tokenizer(words)
    return VisualLM(lm, words, vision)


def spelled(text: Tensor) -> list[str]:
    return [" ".join(f"w{i}" for i in row) for row in text.tolist()]


def caption_errors(model: VisualLM, text: Tensor, seen: Seen) -> Tensor:
    """(B, N) cross entropy of each word; theirs have no word for the end."""
    never = torch.zeros(len(text), dtype=torch.bool)
    return model(spelled(text), seen, never, never)[0].view(len(text), -1)[:, :-1]


def grads(loss: Tensor, prefix: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    return {f"{prefix}.{name}": grad for name, grad in zip(parameters, found, strict=True)}


def parameters_of(model: VisualLM, *names: str) -> dict[str, Tensor]:
    """By their names in the files."""
    ours = {"projector": "vision.projector", "visual_head": "vision.visual_head", "llm": "lm"}
    return {name: model.get_parameter(ours[name.split(".")[0]] + name[name.index(".") :]) for name in names}


def alignment(vectors: Vectors, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Stage 1: the projector alone learns."""
    values, text = vectors.input("ett_stage1", "image"), vectors.input("ett_stage1", "text")
    model, images = model_of(vectors, tokenizer.eval()), (values + 1) / 2
    model.lm.requires_grad_(False)
    seen = model.vision.see(images)
    errors = caption_errors(model, text, seen)
    loss = torch.cat([errors[:-1].flatten(), errors[-1, :-2]]).mean()
    inputs = torch.cat([seen.inputs, model.lm.get_input_embeddings()(text)], dim=1)
    live = torch.ones(inputs.shape[:2], dtype=torch.bool)
    logits = model.run(inputs, live, keep=text.shape[1] + 1).logits
    names = (f"projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
    found = {"ids": tokenizer.encode(images).ids["image"].flatten(), "image_embeddings": seen.inputs}
    found |= {"text_logits": logits, "L_cap": loss}
    return found | grads(loss, "grad", parameters_of(model, *names))


def tuning(vectors: Vectors, autoencoder: IBQTraining) -> dict[str, Tensor]:
    """Stage 2: everything learns."""
    values, text = vectors.input("ett_stage2", "image"), vectors.input("ett_stage2", "text")
    model = model_of(vectors, autoencoder.tokenizer)
    tokenizer = autoencoder.tokenizer.train().requires_grad_(True)
    made = autoencoder.regularized(values)
    caption = caption_errors(model, text, model.vision.seen(made.codes)).mean()
    own, logs = autoencoder.autoencoder_loss(values, made)
    found = {"ids": tokenizer.encode((values + 1) / 2).ids["image"].flatten(), "L_cap": caption, "total_G": own}
    found |= {"total": caption + ALPHA * own, "log.nll_loss": logs["nll"], "log.codebook_quant_loss": logs["quantizer"]}
    found |= {"log.codebook_entropy_loss": logs["entropy"], "log.unsacled_g_loss": logs["adversarial"]}
    theirs = {"quantize.embedding.weight": tokenizer.quantizer.codebook}
    theirs |= {f"{n}.weight": tokenizer.get_submodule(n).weight for n in ("encoder.conv_in", "quant_conv")}
    found |= grads(caption, "cap_grad", theirs)
    theirs["decoder.conv_out.weight"] = tokenizer.decoder.conv_out.weight
    names = ("layers.0.self_attn.q_proj", "norm", "embed_tokens")
    theirs |= parameters_of(
        model, "projector.0.weight", "projector.2.weight", *(f"llm.model.{n}.weight" for n in names)
    )
    return found | grads(found["total"], "grad", theirs)


def generation(vectors: Vectors, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Stage 3, codes behind captions; and six greedy ones."""
    text, ids = vectors.input("ett_gen", "text"), vectors.input("ett_gen", "ids")
    model, always = model_of(vectors, tokenizer.eval(), writes=True), torch.ones(len(text), dtype=torch.bool)
    seen = model.vision.seen(tokenizer.embed(Tokens({"image": ids})), ids)
    _, errors = model(spelled(text), seen, always, ~always)
    inputs = torch.cat([model.lm.get_input_embeddings()(text), seen.inputs], dim=1)
    hidden = model.run(inputs, torch.ones(inputs.shape[:2], dtype=torch.bool), keep=1).hidden_states[-1]
    logits = model.vision.visual_head(hidden[:, text.shape[1] - 1 :][:, :4])
    written = generate_image(model, spelled(text[:1]), do_sample=False).tokens.ids["image"][0]
    found = {"visual_logits_first4": logits, "L_gen": errors.mean(), "greedy_ids": written[:6]}
    return found | grads(errors.mean(), "grad", parameters_of(model, "visual_head.weight", "projector.0.weight"))


def published_state(config: dict) -> dict[str, Tensor]:
    """Everything but the tokenizer, by the names of the layout."""
    lm = language_model(config)
    state = {f"llm.{name}": tensor for name, tensor in lm.state_dict().items() if name != "lm_head.weight"}
    tokenizer = zoo.create_tokenizer("ett-131072")
    return (
        state
        | EmbeddingVision(tokenizer, lm.config.hidden_size, EmbeddingConfig(visual_head=True)).parts().state_dict()
    )
