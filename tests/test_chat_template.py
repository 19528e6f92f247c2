"""Chat templates and tokenizers as they are exported: transformers renders and tokenises what training was taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_tokens
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from moextend_jax.checkpoints.chat_template import chat_template
from moextend_jax.checkpoints.tokenizer_json import tokenizer_files
from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.data.conversations import encode_dialogue
from moextend_jax.data.tokenizer import Tokenizer, load_tokenizer

PAPER = RECIPES["paper"]
TALK = [
    {"from": "system", "value": "Say it."}, {"from": "human", "value": "<image>\nwhat is  the thing?"},
    {"from": "gpt", "value": "the q."}, {"from": "human", "value": "  and there: é🙂"},
]  # fmt: skip
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def exported(folder: Path, tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers opens what is written."""
    files = tokenizer_files(folder, tokenizer, media=["image"])
    out = folder / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(files.content))
    (out / "tokenizer_config.json").write_text(json.dumps(files.settings))
    (out / "chat_template.jinja").write_text(chat_template(tokenizer, PAPER, files))
    return PreTrainedTokenizerFast.from_pretrained(out)


@pytest.mark.parametrize("name", [*tiny_tokens.TEMPLATES, "family", "base", "llama, not legacy"])
def test_a_chat_has_the_ids_of_training(name: str, tmp_path: Path):
    if name == "base":
        folder = tiny.ASSETS / "base"
        for file in ("tokenizer.model", "tokenizer_config.json"):
            (tmp_path / file).write_bytes((folder / file).read_bytes())
    elif name == "llama, not legacy":
        tiny_tokens.write_llama(tmp_path, legacy=False)
    else:
        bos = "<|end|>" if name in ("llama3", "gemma", "text") else None
        template = tiny_tokens.TEMPLATES.get(name)
        tiny_tokens.write_byte_level(tmp_path, template=template, bos=bos, pre="llama3" if bos else "gpt-2")
    ours = load_tokenizer(tmp_path)
    theirs: Any = exported(tmp_path, ours)
    again = load_tokenizer(tmp_path / "out", tags=ours.tags)
    for first in (0, 1):  # with a system turn and without one
        turns = TALK[first:]
        wanted = encode_dialogue(turns, items={"image": [1]}, tokenizer=ours, recipe=PAPER).ids_L.tolist()
        assert encode_dialogue(turns, items={"image": [1]}, tokenizer=again, recipe=PAPER).ids_L.tolist() == wanted
        messages: list[Any] = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
        said = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert said == wanted
        parts = [{"type": "text", "text": turn["value"].removeprefix("<image>\n")} for turn in turns]
        messages = [message | {"content": [part]} for message, part in zip(messages, parts, strict=True)]
        messages[1 - first]["content"].append({"type": "image"})  # pictures go first, wherever they are named
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"] == wanted
    assert theirs("a the")["input_ids"] == [*ours.prefix, *ours.encode("a the")] or name == "text"


def test_what_transformers_cannot_be_told_is_refused(tmp_path: Path):
    """Its normalizer puts a space after every token, also after a picture, where training has none."""
    ours = load_tokenizer(tiny_tokens.write_llama(tmp_path, legacy=True))
    with pytest.raises(MoextendError, match="no chat template makes transformers give the ids"):
        exported(tmp_path, ours)


def test_a_vocabulary_of_scores_goes_out_where_no_tags_are_asked_for(tmp_path: Path):
    made = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "▁abc")], unk_id=0))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    ours = load_tokenizer(tmp_path, rows=20)
    assert tokenizer_files(tmp_path, ours, media=[]).content["model"]["vocab"][2] == ["▁", -2.0]
    with pytest.raises(MoextendError, match="Unigram has no place for image tags"):
        tokenizer_files(tmp_path, ours, media=["image"])
