"""Continues a prompt's conversation as the student's chat template writes it, in the tokens that are already there."""

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cluster.config.sections import PromptsConfig
from cluster.contracts.trajectory import Ints
from rollout_workers.prompt_row import Messages, PromptRow
from rollout_workers.rendering import messages_of, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat:
    """Renders conversations with the student's chat template, as the run's prompts were."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: PromptsConfig, now: datetime) -> None:
        """Take what the prompts were rendered with; `now` is what chat templates take for the time."""
        self._tokenizer, self._settings, self._now = tokenizer, settings, now

    def text(self, row: PromptRow, further: Messages) -> str:
        """Return the text that the student reads of a prompt and the messages after it, up to where it answers."""
        messages = [*messages_of(row), *further]
        whole = msgspec.structs.replace(row, prompt=messages, ends_in_answer=False)
        return render(whole, self._tokenizer, self._settings, self._now, "the student")

    def encode(self, text: str) -> Ints:
        """Return the tokens of a text, none added."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int32)

    def decode(self, token_ids: Ints) -> str:
        """Return the text of all tokens, special ones too."""
        return str(self._tokenizer.decode(token_ids.tolist(), clean_up_tokenization_spaces=False))

    def content(self, token_ids: Ints) -> str:
        """Return what a completion says, without the special tokens that end it."""
        special = set(self._tokenizer.all_special_ids)
        end = len(token_ids)
        while end and int(token_ids[end - 1]) in special:
            end -= 1
        return self.decode(token_ids[:end])


class Conversation:
    """Holds what the student has read and written of one conversation, as messages and as text."""

    def __init__(self, chat: Chat, row: PromptRow) -> None:
        self._chat, self._row = chat, row
        self._further: Messages = []
        self._text = chat.text(row, [])

    def add_completion(self, token_ids: Ints) -> str:
        """Take what the student has sampled as the next message, word for word, and return its content."""
        content = self._chat.content(token_ids)
        self._further.append({"role": "assistant", "content": content})
        self._text += self._chat.decode(token_ids)
        return content

    def add(self, messages: Messages) -> tuple[Ints, bool]:
        """Take further messages; return the tokens that the student reads next, and whether these are all tokens.

        They are what follows in the template's text, if that begins with all that the student has read and written;
        where the template writes what is past in another way, such as without its thoughts, they are the whole text.
        """
        self._further += messages
        before, self._text = self._text, self._chat.text(self._row, self._further)
        is_whole = not self._text.startswith(before)
        return self._chat.encode(self._text if is_whole else self._text[len(before) :]), is_whole
