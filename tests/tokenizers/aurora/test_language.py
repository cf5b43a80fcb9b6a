import pytest
import torch

import zoo
from zoo import ZooError
from zoo.tokenizers.aurora import language as lang

SMALL = lang.aurora_vocabulary(text_size=10, num_codes=6)
"""Text 0..9, start 10, end 11, codes 12..17."""


def test_a_map_survives_its_words_and_blanks_between_them():
    ids = torch.arange(100)
    text = lang.depth_to_text(ids.view(10, 10))
    assert torch.equal(lang.text_to_depth(f"Sure: {text} so A is nearer"), ids)
    assert torch.equal(lang.text_to_depth(text.replace("><", "> \n<")), ids)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no map here", "has none"),
        ("<DEPTH_START><DEPTH_1>", "has none"),
        ("<DEPTH_START><DEPTH_1><DEPTH_END>", "100 words, got 1"),
        ("<DEPTH_START>" + "<DEPTH_1>" * 99 + "<DEPTH_128><DEPTH_END>", "got <DEPTH_128>"),
        ("<DEPTH_START>" + "<DEPTH_1>" * 100 + "oops<DEPTH_END>", "got also 'oops'"),
    ],
)
def test_malformed_maps_are_reported_not_repaired(text, complaint):
    with pytest.raises(ZooError, match=complaint):
        lang.text_to_depth(text)


def test_boxes_survive_their_words():
    boxes = torch.tensor([[10.0, 20.0, 320.0, 479.9]])
    words = lang.quantize_boxes(boxes, width=640, height=480)
    assert words.tolist() == [[5, 14, 168, 335]]
    assert torch.equal(lang.text_to_boxes("I see\n" + lang.boxes_to_text(words)), words)
    assert (lang.dequantize_boxes(words, 640, 480) - boxes).abs().max() < 640 / 336
    assert lang.text_to_boxes("none at all").shape == (0, 4)
    spaced = "Bounding box 1 : ( <PIXEL_1> , <PIXEL_2> ,<PIXEL_3>, <PIXEL_4> )"
    assert lang.text_to_boxes(spaced).tolist() == [[1, 2, 3, 4]]


def test_malformed_boxes_are_reported():
    with pytest.raises(ZooError, match="box 1 as four words"):
        lang.text_to_boxes("Bounding box 1: (<PIXEL_1>,<PIXEL_2>)")
    with pytest.raises(ZooError, match="four words"):
        lang.text_to_boxes("Bounding box 1: (<PIXEL_1>,<PIXEL_2>,<PIXEL_3>,<PIXEL_336>)")
    with pytest.raises(ZooError, match="quantize_boxes"):
        lang.boxes_to_text([[0, 0, 336, 1]])


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}])
def test_generation_writes_whole_maps_once_in_every_row(settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, eos_token_id=19, pad_token_id=19)).eval()
    prompt = torch.tensor([[3, 10, 12, 11, 4], [19, 3, 5, 1, 2]])  # a map in the prompt does not count
    constraint = lang.DepthConstraint(SMALL, prompt_length=prompt.shape[1], length=4)

    def begin(input_ids, scores):  # a model that wants to draw
        scores = scores.clone()
        scores[:, 10] += 50
        return scores

    out = model.generate(prompt, logits_processor=[begin, constraint], max_new_tokens=12, min_new_tokens=12, **settings)
    for row in out[:, prompt.shape[1] :].tolist():
        start = row.index(10)
        assert not any(10 < word < 18 for word in row[:start])
        drawn, after = row[start + 1 : start + 5], row[start + 5 :]
        assert all(12 <= word < 18 for word in drawn)
        assert after[:1] in ([], [11])  # a map begun late is cut off by the length limit
        assert not any(10 <= word < 18 for word in after[1:])


def test_a_model_without_the_words_is_refused():
    constraint = lang.DepthConstraint(SMALL, prompt_length=0)
    with pytest.raises(ZooError, match="extend its embedding"):
        constraint(torch.zeros(1, 0).long(), torch.zeros(1, 12))


def test_the_answer_alone_is_learned():
    logits = torch.zeros(1, 4, 10)
    logits[0, 2, 7] = 100.0  # the word after position 2
    labels = torch.tensor([[-100, -100, -100, 7]])
    assert lang.answer_loss(logits, labels).item() == pytest.approx(0)
    assert lang.answer_loss(logits, torch.tensor([[-100, -100, -100, 3]])).item() == pytest.approx(100)


def test_the_map_of_certain_words_is_the_map_of_their_ids_and_its_loss_reaches_the_logits():
    torch.manual_seed(0)
    tokenizer = zoo.create_tokenizer("aurora-tiny", codebook_init="published").eval()
    ids = torch.randint(128, (2, 8, 8))
    logits = (1000.0 * torch.nn.functional.one_hot(ids, 128).movedim(-1, 1)).requires_grad_()
    assert lang.map_loss(tokenizer, logits, ids).item() == pytest.approx(0, abs=1e-9)
    soft = torch.randn(2, 128, 8, 8, requires_grad=True)
    lang.map_loss(tokenizer, soft, ids).backward()
    assert soft.grad.abs().sum() > 0
