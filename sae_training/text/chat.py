"""Write conversations as text, by the chat template of a tokenizer."""

from __future__ import annotations

from typing import Any

from sae_training.machine.errors import first_line
from sae_training.text.row_values import Render, WrongValue


def renderer(tokenizer: Any) -> Render | None:
    """The function from a conversation (a list of messages) to its text; None without a chat template.

    The text holds the special tokens that the template writes, and ends where the last message does.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None

    def render(messages: Any) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        except Exception as error:  # a template is a program, which may refuse in any way
            raise WrongValue(f"a conversation that the chat template refuses ({first_line(error)})") from error

    return render
