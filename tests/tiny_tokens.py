"""Tiny tokenizers on disk, and the chat templates that checkpoints bring.

In: an empty folder. Out: `tokenizer.json`, `tokenizer_config.json`; ids are small and the vocabulary needs no training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moextend_jax.checkpoints.gguf_tokenizer import PRE_TOKENIZERS

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helper<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As SmolLM2's: it says something where no system turn does."""

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|header|>' + message['role'] + '<|/header|>\n\n' + message['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
"""It drops the outer blanks of every text."""

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|header|>' + role + '\n' + message['content'] | trim + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|header|>model\n'}}{% endif %}"
)
"""It refuses system turns."""

THINKING = (
    "{%- set ns = namespace(last=messages|length - 1) -%}"
    "{%- for message in messages -%}{%- if message.role == 'assistant' and loop.last -%}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content.lstrip('\n') + '<|im_end|>\n' -}}"
    "{%- elif message.role == 'assistant' -%}{%- set content = message.content.split('</think>')[-1].lstrip('\n') -%}"
    "{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""As Qwen3's: the last answer is written otherwise than those before it."""

TEXT_ONLY = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '\n### Answer:\n' + message['content'] + eos_token }}{% else %}"
    "{{ '\n### ' + message['role'] | capitalize + ':\n' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### Answer:\n' }}{% endif %}"
)
"""Roles are text; only the end is a control token."""

OPENED = (
    "{%- for message in messages -%}"
    "{{- {'system': '<|eot|>', 'user': '<|im_start|>', 'assistant': '<|header|>\n<think></think>'}[message.role] -}}"
    "{{- '\n' + message.content -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|header|>' -}}{%- endif -%}"
)
"""As GLM-4.5's: a turn has a beginning and no end."""

TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "thinking": THINKING, "text": TEXT_ONLY, "opened": OPENED,
}  # fmt: skip

CONTROL = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>")
CODE = ("<repo>", "<file>", "<cell>", "<output>")
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ a", "i n", "Ċ Ċ", "Ġ Ġ", "1 2", "< |", "i m", "u s", "us e", "use r"]


def write_byte_level(
    folder: Path, *, template: str | None = CHATML, control: tuple[str, ...] = (*CONTROL, *CODE),
    added: tuple[AddedToken, ...] = (AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)),
    bos: str | None = None, pre: str = "gpt-2", **settings: Any,
) -> Path:  # fmt: skip
    """Byte-level BPE as GPT-2's: 256 bytes, some merges, control tokens first, added ones last.

    Args:
      pre: how text is cut before merging, as a GGUF file names it.
      bos: what the tokenizer puts before every text; None: nothing.
      settings: more of tokenizer_config.json.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = [*control, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in MERGES]))  # pyright: ignore[reportArgumentType]
    made.pre_tokenizer = PRE_TOKENIZERS[pre]
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    made.add_tokens(list(added))
    if bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return write(folder, made, template=template, **({"bos_token": bos} | settings))


def write_llama(folder: Path, *, template: str | None = TEXT_ONLY, legacy: bool = True, **settings: Any) -> Path:
    """A SentencePiece vocabulary as transformers 5 saves it: spaces are ▁, one goes before a text (legacy: and after
    every control token), bytes for what has no piece."""
    control = ("<unk>", "<s>", "</s>")
    letters = "▁abcdefghijklmnopqrstuvwxyzQA?.#:"
    pieces = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "he", "▁the"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore[reportAttributeAccessIssue]
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    made.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return write(folder, made, template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings)


def write(folder: Path, made: Tokenizer, *, template: str | None, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"} | settings
    known = {name: value for name, value in known.items() if value is not None}
    if template is not None:
        known["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    return folder
