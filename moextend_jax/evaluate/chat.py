"""A conversation at the terminal: lines in, a model's answers out as they are made; it sees pictures and remembers.

Each answer is made from all that was said, laid out as conversations are in training. `/image PATH` shows a picture
with the next question, `/reset` forgets everything, `/quit` (or the end of the input) leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator

from moextend_jax.config import IMAGE, MoextendError
from moextend_jax.data.missing import without_marks
from moextend_jax.evaluate.speak import Item, Items, Turn, cannot, is_question, question, speak
from moextend_jax.evaluate.speak import show as read
from moextend_jax.generate import Sampling
from moextend_jax.runs.askable import Askable
from moextend_jax.terminal import lines_of_stdin

HELP = (
    "/image PATH shows a picture with the next question, /show MEDIUM PATH a sound or the like (after a sound an empty "
    "line is a question, too), /reset forgets what was said, /quit leaves"
)


@dataclasses.dataclass(kw_only=True)
class Conversation:
    """What was said so far, and the pictures that were shown with it. system: what the model is told at first."""

    opened: Askable
    system: str | None = None
    max_new_tokens: int = 512
    sampling: Sampling = Sampling()
    seed: int = 0
    turns: list[Turn] = dataclasses.field(default_factory=list)
    items: dict[str, list[Item]] = dataclasses.field(default_factory=dict)

    @property
    def told(self) -> list[Turn]:
        """What the model was told at first, and all turns."""
        return [*([Turn({"from": "system", "value": self.system})] if self.system else []), *self.turns]

    def ask(self, text: str, *, items: Items | None = None) -> Iterator[str]:
        """Yields the answer as it is made. It is remembered with its question, also where `max_new_tokens` cut it: "go
        on" then goes on. One that a mistake or an interrupt broke off, or an empty one, is not."""
        new = {name: list(of) for name, of in (items or {}).items() if of}
        asked, pieces = question(self.opened, text, new), []
        every = {name: [*self.items.get(name, ()), *new.get(name, ())] for name in {**self.items, **new}}
        for piece in speak(
            self.opened, [*self.told, asked], items=every, plain=False, max_new_tokens=self.max_new_tokens,
            sampling=self.sampling, seed=self.seed + len(self.turns),
        ):  # fmt: skip
            pieces.append(piece)
            yield piece
        if answer := remembered(self.opened, "".join(pieces)):
            self.turns, self.items = [*self.turns, asked, {"from": "gpt", "value": answer}], every

    def reset(self) -> None:
        """Forgets what was said and shown."""
        self.turns, self.items = [], {}


def remembered(opened: Askable, answer: str) -> str:
    """An answer as later questions have it before them: marks of media that it spells would stand for items."""
    return without_marks(answer, [marked.mark for marked in opened.tokenizer.media.values()]).strip()


def chat(conversation: Conversation, lines: Iterable[str], *, show: Callable[[str], None]) -> None:
    """Answers lines until there are no more. A mistake is shown, and the conversation goes on.

    Args:
      show: takes text that is to be shown at once.
    """
    waiting: dict[str, list[Item]] = {}
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            conversation.reset()
            waiting = {}
        elif command in ("/image", "/show"):
            name, _, file = (IMAGE, "", rest) if command == "/image" else rest.strip().partition(" ")
            if not file.strip():
                show(f"{HELP}\n")
                continue
            with _mistakes_shown(show):
                if name not in conversation.opened.config.media:
                    raise MoextendError(cannot(conversation.opened, name))
                read(conversation.opened, {name: [file.strip()]})  # what cannot be read is said now
                waiting.setdefault(name, []).append(file.strip())
        elif command.startswith("/"):
            show(f"{HELP}\n")
        elif command or is_question(conversation.opened, "", waiting):
            with _mistakes_shown(show):
                for piece in conversation.ask(line.strip(), items=waiting):
                    show(piece)
                waiting = {}
            show("\n")


def chat_command(conversation: Conversation) -> None:
    """`moextend chat` on standard input and output.

    Raises:
      MoextendError: the model continues text and does not answer.
    """
    if conversation.opened.plain:
        raise MoextendError(
            f"the {conversation.opened.name} model continues text, it was not taught to answer: choose another, or "
            "`moextend generate`"
        )
    chat(conversation, _typed(), show=lambda text: print(text, end="", flush=True))


def _typed() -> Iterator[str]:
    """Lines of a terminal, which can be edited, or of a pipe."""
    if not sys.stdin.isatty():
        yield from lines_of_stdin()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` arrow keys)
    print(HELP)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")


@contextlib.contextmanager
def _mistakes_shown(show: Callable[[str], None]) -> Iterator[None]:
    """Inside, a mistake or an interrupt ends what is being done, not the conversation."""
    try:
        yield
    except MoextendError as error:
        show(f"{error}\n")
    except KeyboardInterrupt:
        show(" (interrupted, and not remembered)\n")
