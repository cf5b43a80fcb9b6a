"""Folders of language models that are damaged, and settings of writing that are not possible."""

import json
import shutil

import pytest
import torch
from fuzz_helpers import anything, attempt, fuzz, loaded, refused
from hypothesis import example
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_fuzz_checkpoints import JSON, damaged
from test_fuzz_images import noise
from transformers import Qwen2Config

import zoo
from zoo.lm import VisualLM
from zoo.lm.generate import generate_image, generate_text
from zoo.lm.text import train_text_tokenizer
from zoo.tokenizers.mingtok.head import FlowHeadConfig

SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
FILES = {
    "codes": ("codes.json", "config.json", "tokenizer.json", "model.safetensors", "visual_tokenizer.safetensors"),
    "flow": ("head.safetensors", "visual_tokenizer.safetensors", "generation_config.json", "tokenizer_config.json"),
}


def language_model(kind):
    lm = Qwen2Config(**SIZES, intermediate_size=32, max_position_embeddings=160)
    words = train_text_tokenizer(["a small red cube", "two blue spheres"], 280)
    if kind == "codes":
        return VisualLM.create(lm, words, loaded("tokenizer", "vqgan-tiny"), num_tokens=None).eval()
    tokenizer = zoo.create_tokenizer("mingtok-tiny", image_size=16)
    head = FlowHeadConfig(latent_dim=8, hidden_size=24, feature_dim=192, condition_dim=16, width=16, depth=1)
    return VisualLM.create(lm, words, tokenizer, head).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of each kind, and the folder that it was saved to."""
    torch.manual_seed(0)
    made = {}
    for kind in FILES:
        model, folder = language_model(kind), tmp_path_factory.mktemp(kind)
        model.save(folder)
        made[kind] = (model, folder)
    return made


def copied(folder):
    copy = folder.with_name(f"{folder.name}-copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


@fuzz(data=st.data(), kind=st.sampled_from(sorted(FILES)))
def test_a_damaged_folder_is_refused_or_loads_whole(saved, data, kind):
    model, folder = saved[kind]
    folder = copied(folder)
    path = folder / data.draw(st.sampled_from(FILES[kind]))
    if data.draw(st.booleans()):
        path.write_bytes(damaged(data, path.read_bytes()))
    else:
        path.unlink()
        data.draw(st.sampled_from([lambda: None, path.mkdir, path.touch]))()
    found = attempt(VisualLM.load, folder)
    if found is not None:
        assert found.state_dict().keys() == model.state_dict().keys()
        assert all(tensor.isfinite().all() for tensor in found.state_dict().values())


@fuzz(
    file=st.sampled_from(["codes.json", "config.json"]),
    key=st.sampled_from(["tokenizer", "streams", "num_tokens", "bos", "hidden_size", "model_type", "auto_map", "x"]),
    value=JSON,
)
@example(file="codes.json", key="streams", value=[{"name": "image", "size": 64, "word": "<{:99999999999}>"}])
@example(file="codes.json", key="streams", value=[{"name": "image", "size": 64, "word": "<{0.__class__}>"}])
@example(file="config.json", key="auto_map", value={"AutoModelForCausalLM": "evil.Model"})
@example(file="config.json", key="hidden_size", value="24")
def test_a_description_of_other_values_is_refused_or_not_needed(saved, file, key, value):
    folder = copied(saved["codes"][1])
    about = json.loads((folder / file).read_text()) | {key: value}
    (folder / file).write_text(json.dumps(about))
    attempt(VisualLM.load, folder)


def test_weights_that_are_missing_or_nan_are_not_made_anew(saved):
    folder = copied(saved["codes"][1])
    path = folder / "model.safetensors"
    whole = load_file(path)
    name = next(one for one in whole if "self_attn" in one)
    for state in ({k: v for k, v in whole.items() if k != name}, whole | {name: whole[name] * torch.nan}):
        save_file(state, path, {"format": "pt"})
        refused(VisualLM.load, folder, says=["copy it again", name])


@fuzz(
    prompts=anything | st.lists(st.text(max_size=9), max_size=2) | st.just(["a red cube"]),
    settings=st.dictionaries(
        st.sampled_from(
            [*("text_scale", "image_scale", "temperature", "num_steps", "top_p", "top_k", "do_sample"), "generator"]
        ),
        anything | st.sampled_from([0.5, 1, 2]),
        max_size=2,
    ),
    images=st.none()
    | anything
    | st.sampled_from([noise((1, 3, 16, 16)), noise((2, 3, 16, 16)), noise((1, 1, 16, 16))]),
    kind=st.sampled_from(sorted(FILES)),
)
def test_writing_takes_settings_or_refuses_them(saved, kind, prompts, settings, images):
    made = attempt(generate_image, saved[kind][0], prompts, images, **settings)
    if made is not None:
        assert len(made.images) == len(prompts)
        assert made.images.isfinite().all()
    attempt(generate_text, saved[kind][0], images, max_new_tokens=2, **settings)
    attempt(generate_text, saved[kind][0], noise((1, 3, 16, 16)), prompts, **settings)
