"""Chat templates of checkpoints: the ids are transformers' own, labels are on answers, text stays text."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import tiny
import tiny_tokens
from transformers import AutoTokenizer

from moextend_jax import families
from moextend_jax.config import IGNORE, RECIPES, DecoderConfig, MoextendError, Recipe, of_pictures
from moextend_jax.data import templates
from moextend_jax.data.conversations import Encoded, encode_conversation, encode_dialogue, encode_prompt
from moextend_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from moextend_jax.data.writing import encoder_of, template_identity
from moextend_jax.faults import Fault

PAPER = RECIPES["paper"]
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return [{"from": "system", "value": system}] * (system is not None) + said


def encode(turns, tokenizer: Tokenizer, *, images=0, recipe=PAPER, patches=4, **more) -> Encoded:
    return encode_conversation(
        turns, example_id="ex7", items={"image": [patches] * images}, tokenizer=tokenizer, recipe=recipe, **more
    )


def answers_of(encoded: Encoded) -> list[list[int]]:
    """Labels of each answer."""
    starts = np.flatnonzero(np.diff((encoded.labels_L != IGNORE).astype(int), prepend=0, append=0))
    return [encoded.labels_L[a:b].tolist() for a, b in starts.reshape(-1, 2)]


TALKS = [
    talk("what is the badger?", "the badger"),
    talk(" in the\n\n12 ", "a 12  ", "user", "the\n\nthe"),
    talk("a", "b", "c", "d", "e", "f", system="be in the  best"),
    talk("naïve 中文 😀 </q>", "[INST] x"),
]


@pytest.fixture(
    scope="module", params=["chatml", "llama3", "gemma", "thinking", "opened", "text", "llama", "llama, new"]
)
def folder(request, tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("tokenizer")
    if request.param.startswith("llama,") or request.param == "llama":
        return tiny_tokens.write_llama(at, legacy=request.param == "llama")
    bos = None if request.param in ("chatml", "opened") else "<|end|>"
    template = tiny_tokens.TEMPLATES[request.param]
    return tiny_tokens.write_byte_level(at, template=template, bos=bos, pre="llama3" if bos else "gpt-2")


def messages_of(turns, *, fold: bool):
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    if not fold or messages[0]["role"] != "system":
        return messages
    system, question, *_ = (message["content"] for message in messages)
    return [messages[1] | {"content": f"{system}\n\n{question}"}, *messages[2:]]


@pytest.mark.parametrize("turns", TALKS)
def test_ids_are_those_of_transformers_and_labels_are_the_answers(folder, turns):
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    messages = messages_of(turns, fold="System role not supported" in theirs.chat_template)
    encoded = encode(turns, ours)
    written = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    # Where turns have no end, the last answer ends with what would open another question.
    ends = [ours.pieces.control["<|im_start|>"].id] if theirs.chat_template == tiny_tokens.OPENED else []
    assert encoded.ids_L.tolist() == written + ends
    last = 0
    for n, labels in enumerate(answers_of(encoded)):
        place = [row for row, message in enumerate(messages) if message["role"] == "assistant"][n]
        prompt = theirs.apply_chat_template(
            messages[:place], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        # The prompt that asks for an answer is what stands before it, and the answer runs to its end.
        assert (
            encoded.ids_L[: len(prompt)].tolist() == prompt and (encoded.labels_L[last : len(prompt)] == IGNORE).all()
        )
        assert encoded.labels_L[len(prompt) : (last := len(prompt) + len(labels))].tolist() == labels
        assert labels[-1] in ours.ends and not set(labels[:-1]) & set(ours.ends)
        said = theirs.decode(labels[:-1]).removeprefix("<think>\n\n</think>\n\n").removeprefix("\n<think></think>")
        assert said.strip() == messages[place]["content"].strip()
    assert n == sum(turn["from"] == "gpt" for turn in turns) - 1
    assert (encoded.labels_L[last:] == IGNORE).all()


def test_a_prompt_is_the_beginning_of_its_conversation(folder):
    ours = pickle.loads(pickle.dumps(load_tokenizer(folder)))
    whole = encode(talk("<image>\nwhat?", "a", system="be brief"), ours, images=1)
    prompt = encode_prompt("what?", items={"image": [4]}, system="be brief", tokenizer=ours, recipe=PAPER)
    count = len(prompt.ids_L)
    np.testing.assert_array_equal(whole.ids_L[:count], prompt.ids_L)
    np.testing.assert_array_equal(whole.places_L[:count], prompt.places_L)
    assert whole.labels_L[count] != IGNORE and (whole.labels_L[:count] == IGNORE).all()
    start = int(np.flatnonzero(prompt.ids_L == ours.tags.start)[0])
    tags = ours.tags
    assert prompt.ids_L[start : start + 6].tolist() == [tags.start, *[tags.pad] * 4, tags.end]
    without = encode_prompt("\nwhat?", system="be brief", tokenizer=ours, recipe=PAPER)
    assert ours.decode(prompt.ids_L).replace("\n", "") == ours.decode(without.ids_L).replace("\n", "")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(tiny_tokens.write_byte_level(tmp_path_factory.mktemp("chatml")))


def test_text_that_spells_control_tokens_stays_text(chatml):
    control = {token.id for token in chatml.pieces.control.values()}
    sound = encode(talk("a", "b", system="c"), chatml).ids_L.tolist()
    marks = [id for id in sound if id in control]
    for spelled in chatml.pieces.control:
        said = encode(talk(f"a{spelled}", f"{spelled} b", system=f"{spelled}c"), chatml)
        assert [id for id in said.ids_L.tolist() if id in control] == marks
        assert chatml.pieces.decode(said.ids_L.tolist()).count(spelled) == 3
        assert control.isdisjoint(chatml.encode(f"x{spelled}y")) and control.isdisjoint(
            chatml.encode_continued(spelled)
        )
    # What the vocabulary only adds is a token in text too, as for transformers.
    assert chatml.pieces.piece_to_id("<think>") in chatml.encode("a <think>b")


def test_what_would_not_be_what_the_prompt_asks_for_is_refused(tmp_path):
    """A template that asks with other words than it writes before the answer."""
    asks = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    template = tiny_tokens.CHATML.rpartition("{% if add")[0] + asks
    ours = load_tokenizer(tiny_tokens.write_byte_level(tmp_path, template=template))
    with pytest.raises(
        MoextendError, match="prompt for answer 1 is not what stands before it.*recipe.prompt to chatml"
    ):
        encode(talk("a", "b"), ours)
    other = encode(talk("a", "b"), ours, recipe=replace(PAPER, prompt="chatml"))
    assert chatml_text(ours, other) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"


def chatml_text(tokenizer: Tokenizer, encoded: Encoded) -> str:
    names = {token.id: name for name, token in tokenizer.pieces.control.items()}
    return "".join(names.get(id) or tokenizer.pieces.decode([id]) for id in encoded.ids_L.tolist())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "does not write every turn once"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "ends an answer with no control token"),
        ("{{ nothing.here }}", "UndefinedError"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_templates_of_no_use_are_refused_by_name(tmp_path, template, message):
    ours = load_tokenizer(tiny_tokens.write_byte_level(tmp_path, template=template))
    with pytest.raises(MoextendError, match=f"the chat template in {tmp_path}.*{message}"):
        encode(talk("a", "b"), ours)


def test_a_conversation_that_its_template_rewrites_is_a_fault(tmp_path):
    ours = load_tokenizer(tiny_tokens.write_byte_level(tmp_path, template=tiny_tokens.THINKING))
    with pytest.raises(Fault, match="example ex7: .*changes the text of this conversation"):
        encode(talk("a", "<think>b</think>c", "d", "e"), ours)


def test_turns_are_dropped_until_the_rest_fits(chatml):
    turns = talk("one", "1", "two", "2", "three", "3", system="s")
    for pairs in (1, 2, 3):
        fits = encode(turns[: 1 + 2 * pairs], chatml)
        for room in (len(fits.ids_L), len(fits.ids_L) + 3):
            cut = encode(turns, chatml, length=room, too_long="drop_turns")
            np.testing.assert_array_equal(cut.ids_L, fits.ids_L)
    with pytest.raises(Fault, match="do not fit a row of 9"):
        encode(turns, chatml, length=9, too_long="drop_turns")


# --- which template ---------------------------------------------------------------------------------------------------

MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('roles') }}"
    "{% endif %}{% endfor %}"
)


def embedded(folder: Path, *, template: str | None = None, **settings) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes((tiny.ASSETS / "base" / "tokenizer.model").read_bytes())
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def test_a_mixtral_instruct_is_encoded_as_its_own_code_does(tmp_path):
    plain, own = load_tokenizer(tiny.ASSETS / "base"), embedded(tmp_path, template=MIXTRAL)
    assert (plain.prompt, own.prompt) == ("mixtral", "mixtral")
    turns = talk("<image>\nhello", "hi", "what?", "a cat", system="be brief")
    ids = encode(turns, own, images=1).ids_L
    for recipe in (PAPER, replace(PAPER, prompt="mixtral")):
        assert encode(turns, plain, images=1, recipe=recipe).ids_L.tolist() == ids.tolist()
        assert template_identity(plain, recipe) == "mixtral"
    assert own.decode(ids).startswith("[INST] be brief\n\n")
    other = MIXTRAL.replace("+ eos_token", "+ ' ' + eos_token").replace("'[INST] '", "bos_token + '[INST] '")
    (tmp_path / "llama").mkdir()
    assert embedded(tmp_path / "llama", template=other).prompt == "own"


def test_families_are_known_by_their_tokens(tmp_path):
    assert load_tokenizer(tiny_tokens.write_byte_level(tmp_path / "a", template=None)).prompt == "chatml"
    llama3 = ("<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<x>", "<y>", "<z>")
    ours = load_tokenizer(
        tiny_tokens.write_byte_level(
            tmp_path / "b", template=None, control=llama3, eos_token="<|eot_id|>", bos="<|end|>"
        )
    )
    assert ours.prompt == "llama3" and ours.ends == (3,)
    assert chatml_text(ours, encode_prompt(" a ", tokenizer=ours, recipe=PAPER)) == (
        "<|end|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert load_tokenizer(tiny_tokens.write_llama(tmp_path / "c", template=None)).prompt == "mixtral"
    plain = tiny_tokens.write_byte_level(
        tmp_path / "d", template=None, control=("<|end|>", "<x>", "<y>", "<z>"), eos_token="<|end|>"
    )
    ours = load_tokenizer(plain)
    with pytest.raises(MoextendError, match=f"{plain} has no chat template.*set recipe.prompt to mixtral"):
        encoder_of(ours, PAPER)
    with pytest.raises(MoextendError, match=r"chatml needs the tokens <\|im_start\|> <\|im_end\|>, and"):
        encoder_of(ours, replace(PAPER, prompt="chatml"))
    assert (
        ours.decode(encode_prompt("a?", tokenizer=ours, recipe=replace(PAPER, prompt="mixtral")).ids_L)
        == "[INST] a? [/INST]"
    )


WRITTEN = {
    "granite": "<|start_of_role|>system<|end_of_role|>be<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>a"
    "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>b<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>c"
    "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "glm4": "[gMASK]<sop><|system|>\nbe<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>\n",
    "ernie": "<|begin_of_sentence|>be\nUser: a\nAssistant: b</s>User: c\nAssistant: ",
    "tulu": "<|system|>\nbe\n<|user|>\na\n<|assistant|>\nb<|end|>\n<|user|>\nc\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_base_without_a_template_gets_that_of_its_family(tmp_path, name: str):
    control = ("<|end|>", *templates.FAMILIES[name].tokens, "<x>", "<y>", "<z>")
    folder = tiny_tokens.write_byte_level(tmp_path, template=None, control=control, eos_token="<|end|>")
    family = next(family for family, row in families.FAMILIES.items() if row.template == name)
    decoder = DecoderConfig(family=family, vocab_size=load_tokenizer(folder).vocab_size)
    ours = tokenizer_of(folder, of_pictures(decoder=decoder))
    assert ours.prompt == name and ours.tags.ids == tuple(ours.pieces.control[tag].id for tag in ("<x>", "<y>", "<z>"))
    assert load_tokenizer(folder).prompt == (name if templates.FAMILIES[name].tokens else None)
    theirs = AutoTokenizer.from_pretrained(folder)
    turns = talk("a", "b", "c", system="be")
    written = theirs.apply_chat_template(
        messages_of(turns, fold=False), chat_template=templates.FAMILIES[name].source, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert written == WRITTEN[name]
    asked = encode_dialogue(turns, items={}, tokenizer=ours, recipe=PAPER)
    assert asked.ids_L.tolist() == theirs(written, add_special_tokens=False).input_ids
    (answer,) = answers_of(encode(talk("a", "b"), ours))
    assert answer[-1] in ours.ends and ours.decode(answer) == "b"


def test_tulu_s_begins_as_a_text_does_and_needs_an_end(tmp_path):
    base = load_tokenizer(tiny.ASSETS / "base")
    asked = encode_prompt("a", tokenizer=base, recipe=replace(PAPER, prompt="tulu"))
    assert asked.ids_L[0] == base.bos == 1 and base.decode(asked.ids_L[1:]) == "<|user|>\na\n<|assistant|>\n"
    endless = load_tokenizer(tiny_tokens.write_byte_level(tmp_path, template=None, eos_token=None), ends=[2])
    with pytest.raises(MoextendError, match="ends an answer with no control token: .* or its tokenizer an eos_token"):
        encoder_of(endless, replace(PAPER, prompt="tulu"))


def test_every_family_has_a_template_that_is_known():
    assert {row.template for row in families.FAMILIES.values()} - {""} <= templates.FAMILIES.keys()
    names = get_args(get_type_hints(Recipe)["prompt"])
    assert names == ("checkpoint", "mixtral", *templates.FAMILIES, "released")
    assert families.FAMILIES["qwen3_moe"].template == "chatml"


def test_a_changed_template_is_another_run(tmp_path):
    ours = load_tokenizer(tiny_tokens.write_byte_level(tmp_path))
    before = template_identity(ours, PAPER)
    (tmp_path / "chat_template.jinja").write_text(tiny_tokens.CHATML.replace("helper", "cat"))  # it goes first
    after = load_tokenizer(tmp_path)
    assert template_identity(after, PAPER) != before != "own"
    assert "You are a cat" in after.decode(encode_prompt("a", tokenizer=after, recipe=PAPER).ids_L)


def test_todays_date_is_in_no_prompt(tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}" + tiny_tokens.CHATML
    ours = load_tokenizer(tiny_tokens.write_byte_level(tmp_path, template=dated))
    assert ours.decode(encode_prompt("a", tokenizer=ours, recipe=PAPER).ids_L).startswith("26 Jul 2024")


def test_marks_of_what_an_assistant_says_are_read_over(tmp_path):
    marked = tiny_tokens.CHATML.replace(
        "{{'<|im_start|>' + message", "{% generation %}{{'<|im_start|>' + message"
    ).replace("'\n'}}{% endfor %}", "'\n'}}{%- endgeneration -%}{% endfor %}")
    assert "endgeneration" in marked and marked != tiny_tokens.CHATML
    ours = load_tokenizer(tiny_tokens.write_byte_level(tmp_path, template=marked))
    assert len(answers_of(encode(talk("a", "b"), ours))) == 1
