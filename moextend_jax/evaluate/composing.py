"""TABLE of the ways to put extensions together that were trained apart: a name and a model's sizes in, the same model
with that rule out. Nothing is trained and no array changes: a rule says which experts a token may choose.

DAMC (2402.12750) keeps modalities apart by token and mixes what text sees by shares; here the parts are experts beside
each other instead of low-rank updates.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from moextend_jax.config import ModelConfig, Named


class Rule(NamedTuple):
    """composition, text_isolation: of `ModelConfig`. evenly: every one of N extensions has the share 1/N, else 1."""

    composition: Literal["shared", "decoupled"]
    text_isolation: Literal["none", "strict"]
    evenly: bool = False


RULES: dict[str, Rule] = {
    "shared": Rule("shared", "strict"),
    "shared 1/N": Rule("shared", "strict", evenly=True),
    "decoupled, text strict": Rule("decoupled", "strict"),
    "decoupled, text shared": Rule("decoupled", "none"),
    "decoupled, text shared 1/N": Rule("decoupled", "none", evenly=True),
}
"""shared: every token of a conversation chooses among the extensions of all its media. decoupled: the tokens of a
medium's span choose its own extension alone; the text around them none (strict), or all (shared)."""


def composed(config: ModelConfig, rule: Rule) -> ModelConfig:
    """The model under a rule."""
    share = 1 / len(config.extensions) if rule.evenly else 1.0
    extensions = {name: dataclasses.replace(added, share=share) for name, added in config.extensions.items()}
    return dataclasses.replace(
        config, composition=rule.composition, text_isolation=rule.text_isolation, extensions=Named(extensions)
    )
