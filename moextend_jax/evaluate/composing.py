"""TABLE of the ways to put extensions together that were trained apart: a name and a model's sizes in, the same model
with that rule out. Nothing is trained and no array changes: a rule says which experts a token may choose.

DAMC (2402.12750) keeps modalities apart by token and mixes what text sees by shares. Experts stand beside each other;
of low-rank updates the products add up, which is NaiveMC's sum of models, or with shares of 1/N its mean.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from moextend_jax.config import ModelConfig, extension_of


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
    share = 1 / max(len({*map(extension_of, config.added)}), 1) if rule.evenly else 1.0
    shared = config.with_added(lambda _, of: dataclasses.replace(of, share=share))
    return dataclasses.replace(shared, composition=rule.composition, text_isolation=rule.text_isolation)
