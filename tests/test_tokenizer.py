import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_tokens
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from moextend_jax.config import DecoderConfig, ImageTags, ModelConfig, MoextendError, of_pictures
from moextend_jax.data.tokenizer import load_tokenizer, tokenizer_of

BASE = Path(__file__).parents[1] / "moextend_jax" / "assets" / "base"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


def test_equals_the_transformers_tokenizer(tokenizer, tmp_path):
    # Beside a Mixtral config.json transformers 5 takes another class, which drops the space before the first word.
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size)
        == (1, 2, 32000)
        == (
            theirs.bos_token_id,
            theirs.eos_token_id,
            len(theirs),
        )
    )
    for text in ("[INST] What color is the shape? [/INST]", "In the beginning God created", "café 😀 x\ny", "<= 2"):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_inst_is_plain_pieces(tokenizer):
    assert tokenizer.encode("[INST]") == [733, 16289, 28793]


def test_continued_text_has_no_space_before_it(tokenizer):
    assert tokenizer.encode(" this")[1:] == tokenizer.encode("this")
    assert tokenizer.encode_continued(" this") == tokenizer.encode("this")
    assert tokenizer.encode_continued("\nthis")[0] == 13


def test_text_never_produces_an_image_tag(tokenizer):
    tags = {tokenizer.tags.start, tokenizer.tags.end, tokenizer.tags.pad}
    for code in range(0x250):
        for encode in (tokenizer.encode, tokenizer.encode_continued):
            try:
                assert tags.isdisjoint(encode(f"a{chr(code)}b"))
            except MoextendError:
                assert chr(code) in "\0\2\3"
    with pytest.raises(MoextendError, match="control character"):
        tokenizer.encode("a\0b")


def vocabulary(
    folder: Path, *, control: tuple[str, ...] = (), bytes_too: bool = True, normal: str = "abcdefghij"
) -> Path:
    """A folder whose tokenizer has control tokens before the byte pieces, as Mistral's from version 2 on."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((piece, 3) for piece in control)]
    kinds += [(f"<0x{byte:02X}>", 6) for byte in range(256 if bytes_too else 0)]
    for piece, kind in [*kinds, *((character, 1) for character in "▁" + normal), ("spare", 5)]:
        model.pieces.add(piece=piece, type=kind, score=0.0)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = bytes_too
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder


V3 = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]")


def test_tags_are_the_byte_pieces_wherever_a_vocabulary_has_them(tokenizer, tmp_path):
    assert tokenizer.tags == ImageTags(start=5, end=6, pad=3)
    other = load_tokenizer(vocabulary(tmp_path, control=V3))
    assert other.tags == ImageTags(start=9, end=10, pad=7)
    assert [other.pieces.id_to_piece(id) for id in other.tags.ids] == ["<0x02>", "<0x03>", "<0x00>"]
    with pytest.raises(MoextendError, match="control character"):
        other.encode("a\2b")
    assert other.encode("a\4b") and other.decode([*other.encode("ab"), *other.tags.ids]) == "ab"


def test_tags_that_are_something_else_are_refused_with_what_would_do(tmp_path):
    folder = vocabulary(tmp_path, control=V3)
    would = r"there <0x02> 9, <0x03> 10, <0x00> 7 would do"
    spare = load_tokenizer(folder).vocab_size - 1
    for tags, message in [
        (ImageTags(), rf"image tag start = 5 is \[TOOL_CALLS\], a control token in .*; {would}"),
        (ImageTags(start=9, end=10, pad=17), rf"image tag pad = 17 is <0x0A>, what text is made of in .*; {would}"),
        (ImageTags(start=9, end=spare - 1, pad=7), rf"image tag end = {spare - 1} is j, what text is made of"),
        (ImageTags(start=0, end=10, pad=7), "image tag start = 0 is <unk>, "),
        (ImageTags(start=-1, end=10, pad=7), "image tag start = -1 is no id, "),
        (ImageTags(start=9, end=9, pad=7), "image tags 9, 9, 7 must be ids of their own"),
    ]:
        with pytest.raises(MoextendError, match=message):
            load_tokenizer(folder, tags=tags)
    appended = ImageTags(start=spare, end=spare + 1, pad=spare + 2)  # an unused piece, and rows of the released layout
    assert load_tokenizer(folder, tags=appended).tags == appended
    with pytest.raises(MoextendError, match="has no byte pieces <0x02>, <0x03>, <0x00> for image tags"):
        load_tokenizer(vocabulary(tmp_path, bytes_too=False))


def test_the_model_s_rows_fit_the_tokenizer(tmp_path):
    def config(rows: int, **more):
        return of_pictures(decoder=DecoderConfig(vocab_size=rows), vision=tiny.VISION, **more)

    folder = vocabulary(tmp_path, control=V3)
    count = load_tokenizer(folder).vocab_size
    assert tokenizer_of(folder, config(count)).tags == ImageTags(start=9, end=10, pad=7)
    assert tokenizer_of(folder, config(count)).unspeakable(count) == (9, 10, 7)
    released = ImageTags(start=count, end=count + 1, pad=count + 2)
    assert tokenizer_of(folder, config(count + 3, tags=released)).tags == released
    for rows, tags in [(count - 1, ImageTags()), (count + 2, released)]:
        with pytest.raises(MoextendError, match=f"need {rows + 1} rows, but the model's vocabulary has {rows}"):
            tokenizer_of(folder, config(rows, tags=tags))


def test_ids_that_no_piece_has_are_never_said_and_no_crash(tokenizer):
    """ChatML tunes have two rows more than their tokenizer.model."""
    assert tokenizer.unspeakable(32_002) == (5, 6, 3, 32_000, 32_001)
    assert tokenizer.decode([*tokenizer.encode("hello"), 32_000, 32_001]) == "hello"


def test_survives_pickling_for_worker_processes(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode_continued("\nhi") == tokenizer.encode_continued("\nhi")


def test_missing_or_broken_files_are_one_clear_line(tmp_path):
    with pytest.raises(MoextendError, match="no tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(MoextendError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


# --- tokenizer.json ---------------------------------------------------------------------------------------------------

TEXTS = ["what is the badger?", "  two  spaces\n\n1,234", "naïve 中文 😀", "<|im_end|> x", ""]


@pytest.mark.parametrize("kind", ["byte level", "with BOS", "llama", "llama, new"])
def test_tokenizer_json_gives_the_ids_of_transformers(tmp_path, kind):
    llama = kind.startswith("llama")
    if llama:
        tiny_tokens.write_llama(tmp_path, legacy=kind == "llama")
    else:
        tiny_tokens.write_byte_level(tmp_path, bos="<|end|>" if kind == "with BOS" else None)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        if llama or "<|im_end|>" not in text:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
            assert [*ours.prefix, *ours.encode(text)] == theirs.encode(text)
        theirs_decoded = theirs.decode(theirs.encode(text, add_special_tokens=False))
        assert ours.decode(ours.encode(text)) == theirs_decoded
        assert pickle.loads(pickle.dumps(ours)).encode(text) == ours.encode(text)
    assert ours.decode([*ours.prefix, *ours.encode("a b"), *ours.ends, *ours.tags.ids]) == "a b"
    assert ours.decode([*ours.encode("a"), *ours.encode_continued("the")]) == "athe"
    assert (ours.encode("the") == ours.encode_continued(" the")) == llama


def test_whether_bos_goes_first_is_what_the_folder_says(tmp_path):
    def bos(**more) -> int | None:
        return load_tokenizer(tiny_tokens.write_byte_level(tmp_path, **more)).bos

    assert bos() is None and bos(bos="<|end|>") == 0
    # SmolLM2 names a BOS that nothing puts before a text.
    assert bos(bos_token="<|im_start|>") is None
    assert bos(bos_token="<|im_start|>", add_bos_token=True) == 1
    assert bos(bos="<|end|>", add_bos_token=False) is None


def test_all_ends_that_the_folder_names_end_an_answer(tmp_path):
    tiny_tokens.write_byte_level(tmp_path, template=tiny_tokens.GEMMA, eos_token="<|end|>")
    ends = load_tokenizer(tmp_path).ends
    assert ends[:1] == (0,) and 5 in ends  # the tokenizer's, and that of the template
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert load_tokenizer(tmp_path, ends=(4,)).ends[:4] == (0, 4, 2, 3)
    tiny_tokens.write_byte_level(tmp_path, template=None, eos_token=None)
    assert load_tokenizer(tmp_path).eos == 2
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(MoextendError, match="names no token that ends a text: give it an eos_token"):
        load_tokenizer(tmp_path)


def test_tags_of_a_byte_level_vocabulary_are_tokens_without_a_use(tmp_path):
    def tags(*control: str, rows: int | None = None, template: str | None = None, added=(), **more) -> list[str | None]:
        names = ("<|end|>", *control)
        settings = {"template": template, "added": added, "eos_token": "<|end|>"} | more
        folder = tiny_tokens.write_byte_level(tmp_path, control=names, **settings)
        ours = load_tokenizer(folder, rows=rows)
        assert set(ours.tags.ids).isdisjoint({*ours.encode("".join(names)), *ours.prefix, *ours.ends})
        assert load_tokenizer(folder, tags=ours.tags).tags == ours.tags
        return [ours.pieces.id_to_piece(id) for id in ours.tags.ids]

    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    assert tags("<a>", *vision, "<|reserved_special_token_0|>") == vision
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(3)]
    assert tags("<a>", "<b>", *reserved, "<c>") == reserved
    unused = [f"<unused{n}>" for n in range(3)]
    assert tags("<a>", added=[AddedToken(token, normalized=False) for token in unused]) == unused
    assert tags("<a>", "<b>", "<c>", "<d>", rows=1000) == [None] * 3  # rows that only round the number
    assert tags("<a>", "<b>", "<c>", "<d>") == ["<b>", "<c>", "<d>"]
    # What the template or a role names has its use.
    chatml = ("<|im_start|>", "<|im_end|>")
    assert tags("<a>", "<b>", "<c>", *chatml, template=tiny_tokens.CHATML) == ["<a>", "<b>", "<c>"]
    assert tags("<a>", "<b>", "<c>", "<d>", pad_token="<d>") == ["<a>", "<b>", "<c>"]
    with pytest.raises(MoextendError, match="no byte pieces .* and only 2 of the 3 unused .* append three rows"):
        tags("<a>", "<b>")
    with pytest.raises(MoextendError, match="image tag start = 1 is <a>, a control token"):
        tiny_tokens.write_byte_level(tmp_path, control=("<|end|>", "<a>", "<b>"), eos_token="<a>", template=None)
        load_tokenizer(tmp_path, tags=ImageTags(start=1, end=900, pad=901))


def test_what_published_vocabularies_call_their_unused_tokens(tmp_path):
    """Llama 3, gpt-oss, Gemma, BERT, Qwen 1, Phi 3, Mistral's Tekken and version 3, DeepSeek 3."""
    spare = ("<|reserved_special_token_7|>", "<|reserved_200013|>", "<unused7>", "[unused7]", "<|extra_7|>",
             "<|placeholder7|>", "<SPECIAL_7>", "[control_7]", "<｜place▁holder▁no▁7｜>")  # fmt: skip
    used = ("<|end|>", "<|fim_prefix|>", "[INST]", "<0x07>", "unused7", "<h1>", "<|vision_pad|>")
    folder = tiny_tokens.write_byte_level(tmp_path, control=(*used, *spare), template=None, eos_token="<|end|>")
    pieces = load_tokenizer(folder).pieces
    assert [pieces.id_to_piece(id) for id in pieces.spare()] == list(spare)


def test_tags_of_a_vocabulary_with_bytes_are_these_in_either_file(tmp_path):
    ours = load_tokenizer(tiny_tokens.write_llama(tmp_path))
    assert [ours.pieces.id_to_piece(id) for id in ours.tags.ids] == ["<0x02>", "<0x03>", "<0x00>"]
    with pytest.raises(MoextendError, match="control character"):
        ours.encode("a\0b")


def both(folder: Path, *added: str) -> Path:
    """The embedded base's tokenizer as tokenizer.model and as tokenizer.json, which has more tokens."""
    shutil.copy(BASE / "tokenizer.model", folder)
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString((BASE / "tokenizer.model").read_bytes())
    vocabulary = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    tokens = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokens.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", *added)])
    return tiny_tokens.write(folder, tokens, template=None, bos_token="<s>", eos_token=added[0] if added else "</s>")


def test_sentencepiece_is_preferred_where_both_files_have_the_same_pieces(tmp_path):
    (tmp_path / "tune").mkdir()
    assert load_tokenizer(both(tmp_path)).pieces.kind == "sentencepiece"
    ours = load_tokenizer(both(tmp_path / "tune", "<|im_end|>", "<|im_start|>"))
    assert (ours.pieces.kind, ours.eos, ours.ends, ours.prompt) == ("tokenizer.json", 32000, (32000,), "chatml")


def test_a_chatml_tune_with_its_tokens_beside_tokenizer_model(tmp_path):
    shutil.copy(BASE / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 32000, "<|im_start|>": 32001, "<pad>": 32002}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    config = ModelConfig(decoder=DecoderConfig(vocab_size=32002))
    ours = tokenizer_of(tmp_path, config, ends=[32000])  # no row for <pad>, and none is needed
    assert (ours.bos, ours.eos, ours.ends, ours.prompt) == (1, 2, (2, 32000), "chatml")
    assert ours.tags == ImageTags() and ours.unspeakable(32002) == (5, 6, 3)
    assert {32000, 32001}.isdisjoint(ours.encode("<|im_end|><|im_start|>"))
    assert ours.decode([*ours.encode("hello"), 32000]) == "hello"
    with pytest.raises(MoextendError, match="need 32001 rows, but the model's vocabulary has 32000"):
        tokenizer_of(tmp_path, ModelConfig(decoder=DecoderConfig(vocab_size=32000)), ends=[32000])


def test_a_template_that_writes_tokens_without_rows_is_refused(tmp_path):
    added = [AddedToken(token, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    control = ("<|end|>", "<a>", "<b>", "<c>")
    tiny_tokens.write_byte_level(tmp_path, control=control, added=tuple(added), eos_token="<|end|>")
    rows = load_tokenizer(tmp_path).vocab_size
    assert load_tokenizer(tmp_path, rows=rows).prompt == "own"
    with pytest.raises(MoextendError, match=rf"writes <\|im_start\|>.*vocabulary ends at row {rows - 2}"):
        load_tokenizer(tmp_path, rows=rows - 2)


@pytest.mark.parametrize(
    "text, message",
    [("{}", "no 'added_tokens' in it"), ("[]", ""), ("no json", ""), ('{"model": 3, "added_tokens": []}', "")],
)
def test_a_tokenizer_json_that_cannot_be_read_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(MoextendError, match=f"cannot read the tokenizer in {tmp_path}: {message}"):
        load_tokenizer(tmp_path)
