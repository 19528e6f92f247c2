"""Chat templates in Jinja: the checkpoint's own, or a family's. Roles in, text with places for what is said out.

A template is asked once for each shape of conversation (how many turns, with a system turn or not), with marks in place
of the texts. What it writes between them is split at control tokens and remembered: a conversation then costs no more
than the tokenising of its texts, no text can become a control token, and the ids up to an answer are those of the
prompt that asks for it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moextend_jax.config import MoextendError
from moextend_jax.data.pieces import Control

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


GRANITE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>{{ message['content'] }}"
    "<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ERNIE = (
    "<|begin_of_sentence|>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] }}</s>"
    "{% else %}{{ 'User: ' if message['role'] == 'user' }}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
TULU = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Tulu's, and OLMoE-Instruct's: roles are text, so that it fits every tokenizer."""


class Family(NamedTuple):
    """A template that many checkpoints share, and the control tokens that it writes besides the end of a text."""

    source: str
    tokens: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": Family(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "granite": Family(GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    "glm4": Family(GLM4, ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")),
    "ernie": Family(ERNIE, ("<|begin_of_sentence|>", "</s>")),
    "tulu": Family(TULU, ()),
}
"""For checkpoints without a template of their own: known by their family of decoders (`families.Family.template`), else
by their tokens. Mixtral's is in `writing.py`."""
OTHERS = f"set recipe.prompt to {', '.join(FAMILIES)} or mixtral, or give the base another template"


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """A template of one checkpoint.

    where: names it in messages. roles: what it calls some tokens, as `bos_token`, with their texts. control: all
    control tokens of the tokenizer.
    """

    source: str
    where: str
    roles: Mapping[str, str]
    control: Mapping[str, Control]

    def render(self, messages: Sequence[Mapping[str, str]], *, open: bool) -> str:
        """The text of a conversation. `open`: it ends where the next answer begins.

        Raises:
          MoextendError: the template is none, or refuses the conversation.
        """
        try:
            given = {**self.roles, "tools": None, "documents": None}
            return _compiled(self.source).render(messages=messages, add_generation_prompt=open, **given)
        except Exception as error:  # the engine's own, and whatever a template's code runs into
            raise MoextendError(f"{self.where}: {type(error).__name__}: {str(error):.300}") from None


class Shape(NamedTuple):
    """questions: how many. system: whether a system turn goes first. open: the last question has no answer yet."""

    questions: int
    system: bool
    open: bool

    @property
    def roles(self) -> list[str]:
        turns = ["user", "assistant"] * self.questions
        return ["system"] * self.system + turns[: len(turns) - self.open]


class Place(NamedTuple):
    """Where the text of turn `turn` stands, without its outer blanks where `left` or `right`."""

    turn: int
    left: bool
    right: bool


class Span(NamedTuple):
    """What is tokenised together: fixed text, places, control tokens. answer: the model has to say it."""

    items: tuple[str | Place | Control, ...]
    answer: bool


class Script(NamedTuple):
    """A shape of conversation, written out. folded: the template knows no system turns, so that such a text goes before
    the first question. text: fixed texts and places in order, to check a conversation by."""

    spans: tuple[Span, ...]
    text: tuple[str | Place, ...]
    folded: bool


@functools.lru_cache(maxsize=4096)
def script(template: Template, shape: Shape) -> Script:
    """How the template writes conversations of a shape.

    Raises:
      MoextendError: it leaves turns out, an answer has no end, or an answer's prompt is not what stands before it.
    """
    written = _written(template, shape)
    if written is None and shape.system:
        return script(template, shape._replace(system=False))._replace(folded=True)
    if written is None:
        raise MoextendError(f"{template.where} does not write every turn once, in order: {OTHERS}")
    spans: list[Span] = []
    question: list[str | Place | Control] = []
    fixed, places = written
    between = _split(fixed[0], template.control)
    for turn, place in enumerate(places):
        after = _split(fixed[turn + 1], template.control)
        if shape.roles[turn] != "assistant":
            question += [*between, place]
            between = after
            continue
        begins = _prompt_length(template, shape, turn)
        prompt, started = (_split(text, template.control) for text in (fixed[turn][:begins], fixed[turn][begins:]))
        if not any(isinstance(item, Control) for item in after) and turn + 1 == len(places):
            after = _opens_a_question(template, shape)
        end = next((n for n, item in enumerate(after, 1) if isinstance(item, Control)), None)
        if end is None:
            hint = f"{OTHERS}, or its tokenizer an eos_token"
            raise MoextendError(f"{template.where} ends an answer with no control token: {hint}")
        spans.append(Span((*question, *prompt), answer=False))
        spans.append(Span((*started, place, *after[:end]), answer=True))
        question, between = [], after[end:]
    if last := (*question, *between):
        spans.append(Span(last, answer=False))
    text = [item for pair in zip(fixed, [*places, ""], strict=True) for item in pair]
    return Script(tuple(spans), tuple(text), folded=False)


def _opens_a_question(template: Template, shape: Shape) -> list[str | Control]:
    """What a longer conversation has between the last answer and the next question, up to its first control token. That
    token ends an answer if the template writes none after the last one (GLM-4.5's: <|user|>)."""
    longer = _written(template, shape._replace(questions=shape.questions + 1, open=True))
    items = [] if longer is None else _split(longer.fixed[-2], template.control)
    return items[: 1 + next((n for n, item in enumerate(items) if isinstance(item, Control)), -1)]


class Written(NamedTuple):
    """Fixed texts, and the places between them."""

    fixed: tuple[str, ...]
    places: tuple[Place, ...]


@functools.lru_cache(maxsize=4096)
def _written(template: Template, shape: Shape) -> Written | None:
    """None where a turn is left out, or a system turn is refused."""
    messages = [
        {"role": role, "content": f"{BLANK}{LEFT}{turn}{RIGHT}{BLANK}"} for turn, role in enumerate(shape.roles)
    ]
    try:
        text = template.render(messages, open=shape.open)
    except MoextendError:
        if shape.system:
            return None
        raise
    parts = re.split(f"({BLANK}?){LEFT}([0-9]+){RIGHT}({BLANK}?)", text)
    marks = zip(parts[1::4], parts[2::4], parts[3::4], strict=True)
    places = tuple(Place(int(turn), not left, not right) for left, turn, right in marks)
    in_order = [place.turn for place in places] == list(range(len(messages)))
    return Written(tuple(parts[::4]), places) if in_order else None


BLANK, LEFT, RIGHT = "\x0b", "\ue000", "\ue001"
"""A blank that no template writes: whether it is still there shows whether a text's outer blanks are dropped."""


CHECKED = 32
"""Answers whose whole prompts are compared; for later ones only the text just before the answer is."""


def _prompt_length(template: Template, shape: Shape, turn: int) -> int:
    """How much of the text before an answer is its prompt's: what the model reads when it is asked."""
    number = (turn - shape.system) // 2
    written = _written(template, shape)
    prompt = _written(template, Shape(min(number, CHECKED) + 1, shape.system, open=True))
    assert written is not None
    alike = prompt is not None and written.fixed[turn].startswith(prompt.fixed[-1])
    if prompt is not None and number <= CHECKED:
        alike = alike and prompt.fixed[:-1] == written.fixed[:turn] and prompt.places == written.places[:turn]
    if prompt is None or not alike:
        raise MoextendError(
            f"{template.where}: the prompt for answer {number + 1} is not what stands before it in the conversation; "
            f"{OTHERS}"
        )
    return len(prompt.fixed[-1])


def end_of(template: Template) -> int:
    """The control token with which the template ends an answer.

    Raises:
      MoextendError: as `script`.
    """
    answer = script(template, Shape(1, system=False, open=False)).spans[1]
    token = answer.items[-1]
    assert isinstance(token, Control)
    return token.id


def is_mixtral(template: Template) -> bool:
    """Whether it is the template of Mixtral-8x7B-Instruct, whatever blanks it writes."""
    says = [("user", "Q"), ("assistant", "A"), ("user", "R")]
    try:
        text = template.render([{"role": role, "content": text} for role, text in says], open=True)
    except MoextendError:
        return False
    first, last = template.roles.get("bos_token", ""), template.roles.get("eos_token", "")
    wanted = f"{first}[INST]Q[/INST]A{last}[INST]R[/INST]"
    return "[INST]" not in template.control and re.sub(r"\s", "", text) == wanted


def _split(text: str, control: Mapping[str, Control]) -> list[str | Control]:
    parts = re.split(f"({_pattern(tuple(control))})", text) if control else [text]
    return [control[part] if n % 2 else part for n, part in enumerate(parts) if part]


@functools.lru_cache(maxsize=16)
def _pattern(names: tuple[str, ...]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    """As transformers compiles templates, but with a fixed date: with today's, a resumed run would be another run."""
    import datetime

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.date(2024, 7, 26).strftime  # Llama 3's own, where there is no clock
    # Marks of what an assistant says are transformers' own extension.
    generation = r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})"
    source = re.sub(generation, lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", source)
    return environment.from_string(source)
