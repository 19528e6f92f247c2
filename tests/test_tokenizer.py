import pickle
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from moextend_jax.config import DecoderConfig, ImageTags, ModelConfig, MoextendError
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
        return ModelConfig(decoder=DecoderConfig(vocab_size=rows), **more)

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


@pytest.mark.parametrize("ends", [2, [32000, 2], None])
def test_a_base_that_ends_answers_as_its_tokenizer_does_is_fine(tokenizer, ends):
    check_end({"eos_token_id": ends}, tokenizer, where="base")


def test_a_base_that_ends_answers_with_an_added_token_is_refused(tokenizer):
    """As ChatML tunes do: their <|im_end|> is a row of the vocabulary that tokenizer.model does not have."""
    with pytest.raises(MoextendError, match="config.json ends answers with token 32000, tokenizer.model with 2"):
        check_end({"eos_token_id": 32000}, tokenizer, where="base")
