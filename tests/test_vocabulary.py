import pytest
import torch

import zoo
from zoo import Tokens, ZooError
from zoo.vocabulary import Stream, Vocabulary, latent_slot

DEPTH = Stream("depth", 5, "<D_{}>", begin="<D>", end="</D>")
RESIDUAL = Stream("pixel", 4, "<P_{:02d}>", levels=3, begin="<P>", end="</P>", marks_first=False)


@pytest.fixture
def vocabulary():
    return Vocabulary(10, [DEPTH, RESIDUAL])


def test_words_get_contiguous_ids_in_order(vocabulary):
    assert len(vocabulary) == 10 + 7 + 14
    assert [vocabulary.id_of(w) for w in ("<D>", "</D>", "<D_0>", "<D_4>")] == [10, 11, 12, 16]
    assert [vocabulary.id_of(w) for w in ("<P_00>", "<P_11>", "<P>", "</P>")] == [17, 28, 29, 30]
    assert all(vocabulary.id_of(vocabulary.word_of(i)) == i for i in range(10, 31))


def test_codes_become_ids_and_come_back(vocabulary):
    codes = torch.tensor([[0, 4, 2]])
    assert vocabulary.to_ids("depth", codes).tolist() == [[12, 16, 14]]
    assert torch.equal(vocabulary.to_codes("depth", vocabulary.to_ids("depth", codes)), codes)
    many = Vocabulary(32000, [DEPTH])  # ids do not fit the small integers that codes may come in
    assert many.to_ids("depth", codes.to(torch.uint8)).tolist() == [[32002, 32006, 32004]]
    levels = torch.tensor([[[0, 1, 3], [3, 0, 0]]])
    assert vocabulary.to_ids("pixel", levels).tolist() == [[[17, 22, 28], [20, 21, 25]]]
    assert torch.equal(vocabulary.to_codes("pixel", vocabulary.to_ids("pixel", levels)), levels)
    assert vocabulary.stream_of(torch.tensor([3, 10, 12, 17, 29])).tolist() == [-1, -1, 0, 1, -1]


def test_text_and_images_join_and_split_again(vocabulary):
    image = Tokens(
        ids={"depth": torch.tensor([[1, 2, 3]]), "pixel": torch.tensor([[[0, 1, 2], [3, 3, 3], [1, 1, 1]]])},
        mask=torch.tensor([[True, False, True]]),
    )
    ids = vocabulary.join([[1, 2], image, torch.tensor([3])])
    assert ids.tolist() == [1, 2, 10, 13, 15, 11, 29, 17, 22, 27, 18, 22, 26, 30, 3]
    pieces = vocabulary.split(ids)
    assert [name for name, _ in pieces] == ["text", "depth", "pixel", "text"]
    assert pieces[1][1].tolist() == [1, 3]
    assert pieces[2][1].tolist() == [[0, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda v: v.to_ids("depth", torch.tensor([5])), r"0\.\.4, got 5 to 5"),
        (lambda v: v.to_ids("depth", torch.tensor([0.5])), "must be integers"),
        (lambda v: v.to_ids("dept", torch.tensor([0])), "did you mean depth"),
        (lambda v: v.to_ids("pixel", torch.zeros(1, 2).long()), "3 levels last"),
        (lambda v: v.to_codes("depth", torch.tensor([11])), r"12\.\.16"),
        (lambda v: v.to_codes("pixel", torch.tensor([[17, 17, 17]])), "range of its level"),
        (lambda v: v.split([31]), r"0\.\.30"),
        (lambda v: v.split([17, 21]), "no whole number of positions"),
        (lambda v: v.join([[10]]), "ids of text"),
        (lambda v: v.join([Tokens(ids={"other": torch.zeros(1, 1).long()})]), "stream of"),
        (lambda v: v.id_of("<D_5>"), "did you mean"),
        (lambda v: v.word_of(9), "no added word"),
        (lambda v: Vocabulary(10, [DEPTH, Stream("other", 3, "<D_{}>")]), "come twice: <D_0>, <D_1>, <D_2>"),
        (lambda v: Vocabulary(10, [DEPTH, Stream("depth", 3, "<E_{}>")]), "come twice: depth"),
    ],
)
def test_what_does_not_belong_is_refused(vocabulary, call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call(vocabulary)


@pytest.mark.parametrize("stream", [DEPTH, RESIDUAL])
def test_images_survive_a_text_and_blanks_in_it(stream):
    images = [torch.tensor([[0, 1, 3], [3, 3, 3]]), torch.tensor([[1, 1, 0], [0, 2, 2]])]
    images = images if stream.levels > 1 else [image[:, 0] for image in images]
    text = f"a {stream.to_text(images[0])} and {stream.to_text(images[1])}."
    for one in (text, text.replace("><", "> \n<")):
        found = list(stream.from_text(one, 2))
        assert len(found) == 2
        assert all(torch.equal(*pair) for pair in zip(found, images, strict=True))
    assert list(stream.from_text("none", 2)) == []


def test_whole_images_are_found_in_ids_that_a_model_wrote(vocabulary):
    images = [
        Tokens(ids={"depth": torch.tensor([[1, 2]]), "pixel": torch.tensor([[[0, 1, 2], [3, 3, 3]]])}),
        Tokens(ids={"depth": torch.tensor([[4, 0]])}),
    ]
    ids = vocabulary.join([[1, 2], *images, torch.tensor([3])])
    assert [codes.tolist() for codes in vocabulary.images_in(ids, "depth", 2)] == [[1, 2], [4, 0]]
    assert [codes.tolist() for codes in vocabulary.images_in(ids.tolist(), "pixel", 2)] == [[[0, 1, 2], [3, 3, 3]]]
    assert vocabulary.images_in([1, 2, 3], "depth", 2) == []


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (
            lambda v: list(DEPTH.from_text("<D><D_1></D> and <D><D_1>", 1)),
            "expected </D> behind <D>, the text has none",
        ),
        (lambda v: list(DEPTH.from_text("<D><D_1><D_2></D>", 1)), "an image of 1 words, got 2"),
        (lambda v: list(DEPTH.from_text("<D><D_5></D>", 1)), "words <D_0> to <D_4>, got <D_5>"),
        (lambda v: list(DEPTH.from_text("<D><D_1>?</D>", 1)), r"only words .* got also '\?'"),
        (lambda v: list(RESIDUAL.from_text("<P><P_00><P_04><P_1></P>", 1)), "got also"),
        (lambda v: list(RESIDUAL.from_text("<P><P_00><P_04><P_07></P>", 1)), "got <P_07> at level 2"),
        (lambda v: v.images_in([10, 12], "depth", 1), "expected </D> .11. behind <D>"),
        (lambda v: v.images_in([10, 12, 12, 11], "depth", 1), "an image of 1 words, got 2"),
        (lambda v: v.images_in([10, 3, 11], "depth", 1), r"12\.\.16"),
        (lambda v: v.images_in([29, 17, 17, 17, 30], "pixel", 1), "range of its level"),
    ],
)
def test_malformed_images_are_reported_not_repaired(vocabulary, call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call(vocabulary)


def text_tokenizer(size=10):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def test_a_text_tokenizer_reads_and_writes_the_words(vocabulary):
    tokenizer = text_tokenizer()
    vocabulary.extend_tokenizer(tokenizer)
    ids = tokenizer("w1 <D><D_3><D_0></D> w2", add_special_tokens=False)["input_ids"]
    assert ids == [1, 10, 15, 12, 11, 2]
    assert "<D_3>" in tokenizer.decode(ids, skip_special_tokens=True)
    with pytest.raises(ZooError, match="10 words, got 31"):
        vocabulary.extend_tokenizer(tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_gets_rows_for_the_words_and_keeps_its_own(vocabulary, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, tie_word_embeddings=tied, **sizes))
    before = model.get_input_embeddings().weight.clone()
    vocabulary.extend_embedding(model)
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:10], before)
    assert 0 < after[10:].abs().max() < 0.2
    assert model(torch.arange(31)[None]).logits.shape == (1, 31, 31)
    with pytest.raises(ZooError, match="got one of 31"):
        Vocabulary(10, [DEPTH]).extend_embedding(model)


@pytest.fixture(scope="module")
def tokenizers():
    """Two that call their stream "image", one with streams and levels of its own, and two of latents."""
    names = ("seed-tiny", "ibq-tiny", "dualtoken-tiny", "mingtok-tiny", "kl-tiny")
    return {name: zoo.create_tokenizer(name).eval() for name in names}


@pytest.fixture(scope="module")
def images(tokenizers):
    """Tokens of one picture by tokenizer."""
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {name: tokenizer.encode(picture) for name, tokenizer in tokenizers.items()}


def test_tokenizers_stand_side_by_side(tokenizers):
    words = text_tokenizer()
    vocabulary = Vocabulary.of(words, list(tokenizers.values()))
    shared = {name: f"{name}.image" for name in ("seed-tiny", "ibq-tiny", "mingtok-tiny", "kl-tiny")}
    assert list(vocabulary.streams) == [
        *(shared["seed-tiny"], shared["ibq-tiny"], "semantic", "pixel", shared["mingtok-tiny"], shared["kl-tiny"])
    ]
    sizes = [tokenizers[n].info.codebook_sizes["image"] for n in ("seed-tiny", "ibq-tiny")]
    dual = sum(tokenizers["dualtoken-tiny"].info.codebook_sizes[s] * 4 + 2 for s in ("semantic", "pixel"))
    assert len(vocabulary) == 10 + sizes[0] + 2 + sizes[1] + 2 + dual + 3 + 3
    assert vocabulary.word_of(10) == "<seed-tiny.image>"
    assert vocabulary.word_of(12) == "<seed-tiny.image_0>"
    assert vocabulary.id_of("<kl-tiny.imagePatch>") == len(vocabulary) - 1
    alone = Vocabulary.of(10, [tokenizers["mingtok-tiny"]])
    assert alone.words == ["<image>", "</image>", "<imagePatch>"]
    twice = Vocabulary.of(10, {"a": tokenizers["seed-tiny"], "b": tokenizers["seed-tiny"]})
    assert list(twice.streams) == ["a.image", "b.image"]


def test_the_language_model_has_the_same_words(tokenizers):
    from zoo.lm.codes import CodeVision
    from zoo.lm.latents import FlowVision

    dual = Vocabulary.of(10, [tokenizers["dualtoken-tiny"]])
    assert Vocabulary(10, CodeVision(tokenizers["dualtoken-tiny"]).streams).words == dual.words
    assert Vocabulary(10, FlowVision.streams).words == Vocabulary.of(10, [tokenizers["mingtok-tiny"]]).words


def test_text_and_images_of_several_tokenizers_come_back(tokenizers, images, tmp_path):
    from transformers import AutoTokenizer

    words = text_tokenizer()
    made = Vocabulary.of(words, list(tokenizers.values()))
    made.extend_tokenizer(words)
    words.save_pretrained(tmp_path)
    read, vocabulary = AutoTokenizer.from_pretrained(tmp_path), Vocabulary.from_pretrained(tmp_path)
    assert (vocabulary.text_size, vocabulary.streams) == (made.text_size, made.streams)
    assert Vocabulary.from_pretrained(read).words == made.words == read.convert_ids_to_tokens(range(10, len(made)))

    pieces = [
        [1, 2],
        *images.items(),
        [3],
        ("seed-tiny", images["seed-tiny"]),
        ("dualtoken-tiny", images["dualtoken-tiny"]),
    ]
    ids = vocabulary.join(pieces)
    assert torch.equal(ids, made.join(pieces))
    assert read(read.decode(ids), add_special_tokens=False)["input_ids"] == ids.tolist()
    found = vocabulary.parse(ids)
    assert [piece[0] if isinstance(piece, tuple) else piece.tolist() for piece in found] == [
        *([1, 2], *images, [3], "seed-tiny", "dualtoken-tiny")
    ]
    for piece in found:
        if isinstance(piece, tuple):
            name, tokens = piece
            for stream, ids in images[name].ids.items():
                assert torch.equal(tokens.ids[stream], ids)
            for latents in images[name].latents.values():
                assert torch.equal(tokens.ids["image"], torch.zeros(1, latents.shape[1]).long())
    decoded = tokenizers["ibq-tiny"].decode(dict(found[1:-3])["ibq-tiny"])
    torch.testing.assert_close(decoded, tokenizers["ibq-tiny"].decode(images["ibq-tiny"]))
    names = [name for name, _ in vocabulary.split(vocabulary.join(pieces))]
    assert names == ["text", *vocabulary.streams, "text", "seed-tiny.image", "semantic", "pixel"]


def test_places_of_latents_survive_a_text():
    slot = latent_slot("image")
    text = f"a {slot.to_text([0, 0, 0])}."
    assert text == "a <image><imagePatch><imagePatch><imagePatch></image>."
    assert [codes.tolist() for codes in slot.from_text(text, 3)] == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda t, i: Vocabulary.of(10, []), "at least one tokenizer"),
        (lambda t, i: Vocabulary.of(10, ["seed-tiny"]), "load it first"),
        (lambda t, i: Vocabulary.of(10, {"a": "seed-tiny"}), "load it first"),
        (lambda t, i: Vocabulary.of(10, [t["kl-tiny"]] * 2), "two tokenizers are called kl-tiny"),
        (
            lambda t, i: Vocabulary.of(10, [t["kl-tiny"], t["mingtok-tiny"]]).join([i["kl-tiny"]]),
            "with one of the names kl-tiny, mingtok-tiny",
        ),
        (
            lambda t, i: Vocabulary.of(10, [t["kl-tiny"], t["mingtok-tiny"]]).join([("kl-tinny", i["kl-tiny"])]),
            "no tokenizer 'kl-tinny'; did you mean kl-tiny",
        ),
        (lambda t, i: Vocabulary.of(10, [t["ibq-tiny"]]).join([i["dualtoken-tiny"]]), "stream of"),
        (lambda t, i: Vocabulary.from_pretrained(text_tokenizer()), "text tokenizer has no vocabulary of the zoo"),
        (lambda t, i: Vocabulary.from_pretrained("/nowhere"), "'/nowhere' is not on this machine"),
    ],
)
def test_tokenizers_that_do_not_belong_together_are_refused(tokenizers, images, call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call(tokenizers, images)


def test_a_tokenizer_that_gives_other_ids_is_refused(vocabulary):
    words = text_tokenizer()
    vocabulary.extend_tokenizer(words)
    other = text_tokenizer()
    other.add_tokens(["before", *vocabulary.words])
    other.init_kwargs |= words.init_kwargs
    with pytest.raises(ZooError, match="other ids for some of the words: <D>, </D>"):
        Vocabulary.from_pretrained(other)
