import pickle
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moextend_jax.config import MoextendError
from moextend_jax.data.tokenizer import load_tokenizer

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


def test_survives_pickling_for_worker_processes(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode_continued("\nhi") == tokenizer.encode_continued("\nhi")


def test_missing_or_broken_files_are_one_clear_line(tmp_path):
    with pytest.raises(MoextendError, match="no tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(MoextendError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
