"""Chats as tokens: Jinja templates from model makers, run in a sandbox, and which tokens the assistant wrote.

A template is a program from elsewhere. It runs as transformers runs it (`apply_chat_template`), in Jinja's sandbox, and
besides with a budget: so many loop steps and calls, so many characters. What it lacks, asks for or overruns is one
UserError.
"""

import dataclasses
import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.data.vocabularies import Vocabulary, read_chat_templates
from llm.data.vocabularies.vocabulary import Spans
from llm.errors import UserError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
# Around what the assistant wrote, while a template renders; private characters that `_checked` keeps out of messages.
_BEGIN, _END = '\U0010fff0', '\U0010fff1'


@dataclasses.dataclass(frozen=True)
class RenderedChat:
    """A chat as text.

    Attributes:
        text: all of it.
        assistant: first and last + 1 character of each part that the template's {% generation %} blocks hold.
    """

    text: str
    assistant: Spans


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template.

    Args:
        source: the template. Raises UserError where its syntax is wrong.
        name: what errors call it.
    """

    source: str
    name: str = 'the chat template'

    def __post_init__(self) -> None:
        self._template  # noqa: B018  (compiles it)

    @classmethod
    def load(cls, path: str | Path, name: str = 'default') -> 'ChatTemplate':
        """A template from a .jinja file, or that of this name in a Hugging Face directory. Raises UserError."""
        path = Path(path).expanduser()
        if path.is_dir():
            templates = read_chat_templates(path)
            if name not in templates:
                known = f'It has {", ".join(templates)}' if templates else 'Give the path of a .jinja file'
                raise UserError(f'has no chat template {name!r}', where=str(path), fix=known)
            return cls(templates[name], f'{path} ({name})')
        try:
            return cls(path.read_text(encoding='utf-8'), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'cannot read a chat template ({error})', where=str(path), fix='Check the path') from error

    @property
    def marks_assistant(self) -> bool:
        """Whether the template says which parts are the assistant's, by {% generation %} blocks."""
        return re.search(r'{%-?\+?\s*generation\s*-?\+?%}', self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        vocabulary: Vocabulary,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> RenderedChat:
        """The chat as text.

        Args:
            messages: each with 'role' and 'content' and whatever else the template reads; JSON types only.
            vocabulary: its special tokens are what the template knows as bos_token, eos_token and so on.
            add_generation_prompt: end with what the assistant's next message begins with.
            tools: JSON schemas of functions that may be called.
            now: what `strftime_now` gives; default: the time. Give one where the result must stay the same.
            variables: more of what the template reads.

        Raises:
            UserError: the template fails, refuses the messages or overruns its budget; or a message holds the name of
                a special token, which would be taken for the token.
        """
        special = {f'{role}_token': name for role, name in vocabulary.roles.items() if name is not None}
        forbidden = _forbidden(frozenset(vocabulary.special_ids))
        given = _checked({'messages': list(messages), 'tools': tools and list(tools), **variables}, forbidden, 0)
        from llm.data import template_sandbox

        values = {**special, **given, 'add_generation_prompt': add_generation_prompt}
        text = template_sandbox.render(self._template, values, now or datetime.datetime.now(), self.name)
        return _take_out_marks(text)

    def encode(
        self, messages: Sequence[Message], vocabulary: Vocabulary, **options: Any
    ) -> tuple[list[int], list[bool]]:
        """The chat's ids, and which of them hold a character that the assistant wrote. Options and errors: `render`.

        Without {% generation %} in the template the mask is False everywhere: see `marks_assistant`.
        """
        chat = self.render(messages, vocabulary, **options)
        ids, spans = vocabulary.encode_marked(chat.text)
        return ids, [any(a < end and start < b for a, b in chat.assistant) for start, end in spans]

    @functools.cached_property
    def _template(self) -> 'jinja2.Template':
        from llm.data import template_sandbox

        return template_sandbox.compile_template(self.source, (_BEGIN, _END), self.name)


@functools.lru_cache(maxsize=16)
def _forbidden(names: frozenset[str]) -> re.Pattern[str]:
    return re.compile('|'.join([*map(re.escape, sorted(names, key=len, reverse=True)), f'[{_BEGIN}{_END}]']))


def _checked(value: Any, forbidden: re.Pattern[str], depth: int) -> Any:
    """The same of plain JSON types, so that a template gets at nothing else; without the names of special tokens."""
    if depth > 100:
        raise UserError('a message is nested more than 100 deep')
    if isinstance(value, str):
        if found := forbidden.search(value):
            raise UserError(
                f'a message holds {found[0]!r}, which is the name of a special token',
                fix='Take it out: what follows could pass for another speaker.',
            )
        return str(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {_checked(k, forbidden, depth + 1): _checked(v, forbidden, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(each, forbidden, depth + 1) for each in value]
    raise UserError(f'a message holds a {type(value).__name__}', fix='Use the types of JSON.')


def _take_out_marks(text: str) -> RenderedChat:
    parts = re.split(f'([{_BEGIN}{_END}])', text)
    plain: list[str] = []
    spans: Spans = []
    at = start = 0
    for part in parts:
        if part == _BEGIN:
            start = at
        elif part == _END:
            spans.append((start, at))
        else:
            plain.append(part)
            at += len(part)
    return RenderedChat(''.join(plain), [span for span in spans if span[0] < span[1]])
