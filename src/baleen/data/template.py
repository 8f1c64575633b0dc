"""The chat template: messages -> the text a model is trained on and prompted with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from baleen.config import UserError

# DeepSeek's manner: a turn of the user ends where the assistant's marker stands, a turn of the assistant in
# end-of-sentence, at which generation stops. Earlier reasoning is not shown again, as R1's own template has it.
# Tools, their calls and their outputs are the OpenAI protocol's.
BALEEN_TEMPLATE = """\
{{- bos_token -}}
{%- set last_user = namespace(index=-1) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{%- set last_user.index = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools is defined and tools -%}
  {{- '<|system|>Tools:' -}}
  {%- for tool in tools -%}{{- '\\n' + (tool['function'] | tojson) -}}{%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- '<|system|>' + message['content'] -}}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user|>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- set content = message['content'] or '' -%}
    {%- if loop.index0 < last_user.index and '</think>' in content -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|assistant|>' -}}
    {%- generation -%}
      {{- content -}}
      {%- if message['tool_calls'] -%}
        {{- '<|tool_calls_begin|>' -}}
        {%- for call in message['tool_calls'] -%}
          {%- set arguments = call['function']['arguments'] -%}
          {{- '<|tool_call_begin|>' + call['function']['name'] + '<|tool_sep|>' -}}
          {{- (arguments if arguments is string else arguments | tojson) + '<|tool_call_end|>' -}}
        {%- endfor -%}
        {{- '<|tool_calls_end|>' -}}
      {%- endif -%}
      {{- eos_token -}}
    {%- endgeneration -%}
  {%- elif message['role'] == 'tool' -%}
    {{- '<|tool_output_begin|>' + message['content'] + '<|tool_output_end|>' -}}
  {%- else -%}
    {{- raise_exception('a message has role ' + message['role'] + ': it must be system, user, assistant or tool') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
  {%- if thinking is defined and thinking is true -%}{{- '<think>\\n' -}}{%- endif -%}
  {%- if thinking is defined and thinking is false -%}{{- '</think>' -}}{%- endif -%}
{%- endif -%}
"""


class ChatTemplate:
    """A Hugging Face chat template, rendered as transformers renders it, in a sandbox: templates are foreign code.

    Raises UserError if the template does not compile, or refuses the messages.
    """

    def __init__(self, source: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template does not compile: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        try:
            return self._template.render(messages=messages, **variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for transformers' masks; here it only shows its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own filter escapes HTML, which a prompt must not.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
