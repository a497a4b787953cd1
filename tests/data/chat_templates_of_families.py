"""Chat templates in the formats of well-known families, written for these tests, and chats to render."""

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = messages[0]['content'] %}
{% else %}
    {% set rest = messages %}
    {% set system = false %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if loop.index0 == 0 and system != false %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {% elif message['role'] == 'assistant' %}
        {%- generation %}{{- ' ' + content.strip() + ' ' + eos_token -}}{% endgeneration %}
    {% endif %}
{% endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- set state = namespace(system='Today is ' + day) %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set state.system = state.system ~ '\\n\\n' ~ message['content'] | trim %}
{%- endfor %}
{%- macro turn(role, content) -%}
<|start_header_id|>{{ role }}<|end_header_id|>

{{ content | trim }}<|eot_id|>
{%- endmacro %}
{{- turn('system', state.system) }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{- turn(message.role, message.content) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}
{{ raise_exception('no system role') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

MISTRAL_TOOLS = """{{ bos_token }}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if loop.last and tools is not none and tools | length > 0 -%}
            [AVAILABLE_TOOLS] [
            {%- for tool in tools -%}
                {{ tool | tojson }}{% if not loop.last %}, {% endif %}
            {%- endfor -%}
            ][/AVAILABLE_TOOLS]
        {%- endif -%}
        {{ '[INST] ' ~ message.content ~ '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls -%}
        [TOOL_CALLS] {{ message.tool_calls | map(attribute='function') | list | tojson(indent=2) }}{{ eos_token }}
    {%- elif message.content is string -%}
        {{ ' ' ~ message.content | trim ~ eos_token }}
    {%- else -%}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor -%}
    {%- endif -%}
{%- endfor -%}"""

TEMPLATES = {
    'chatml': CHATML,
    'llama2': LLAMA2,
    'llama3': LLAMA3,
    'gemma': GEMMA,
    'mistral_tools': MISTRAL_TOOLS,
}

ASKED = [{'role': 'user', 'content': ' Wie heißt du? 🦙 <b>&'}]
ANSWERED = [*ASKED, {'role': 'assistant', 'content': 'Lama.\n'}, {'role': 'user', 'content': 'Und sonst?'}]
WITH_SYSTEM = [{'role': 'system', 'content': 'Sei kurz. '}, *ANSWERED, {'role': 'assistant', 'content': 'Nichts'}]
TOOL_CALL = [
    *ASKED,
    {
        'role': 'assistant',
        'content': [{'type': 'text', 'text': 'Moment'}],
        'tool_calls': [{'function': {'name': 'ask', 'arguments': {'who': 'Äsop', 'n': 2.5, 'deep': [None, True]}}}],
    },
    *ASKED,
]
TOOLS = [{'type': 'function', 'function': {'name': 'ask', 'parameters': {'type': 'object', 'properties': {}}}}]
CHATS = {'asked': ASKED, 'answered': ANSWERED, 'with_system': WITH_SYSTEM, 'tool_call': TOOL_CALL}
