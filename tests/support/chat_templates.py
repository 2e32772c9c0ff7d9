"""Chat templates with the structure, and the refusals, of those of well-known families."""

# Any role, any order; knows no tools.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tools in the system message, calls in tags, several results in one user turn, thoughts that are
# left out before the last question.
QWEN3 = """
{%- macro system(text) %}<|im_start|>system
{{ text }}
{%- if tools %}{{ '\n\n# Tools\n<tools>' }}
{%- for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}
{{- '\n</tools>' }}{% endif %}<|im_end|>
{% endmacro %}
{%- if messages[0].role == 'system' %}{{ system(messages[0].content) }}
{%- elif tools %}{{ system('') }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning_content and loop.index0 > ns.last %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>
{{ '{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
# One system message, at the beginning; arguments as one element each, so they must be an object.
QWEN3_CODER = """
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}
{{- raise_exception('System message must be at the beginning.') }}{% endif %}
{%- if loop.first and tools %}<|im_start|>system
{{ m.content if m.role == 'system' }}<tools>
{%- for tool in tools %}<function><name>{{ tool.function.name }}</name>
<description>{{ tool.function.description }}</description>
{%- for name, schema in tool.function.parameters.properties | items %}
<parameter>{{ name }}: {{ schema.type | string }}</parameter>{% endfor %}</function>
{%- endfor %}</tools><|im_end|>
{% endif %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call><function={{ call.function.name }}>
{%- for name, value in call.function.arguments | items %}
<parameter={{ name }}>
{{ value if value is string else value | tojson }}
</parameter>{% endfor %}</function></tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Writes any role, but a message that calls has one call and says nothing.
LLAMA3 = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}
{{- bos_token ~ '<|im_start|>system\n\n' ~ ('Environment: ipython\n' if tools) ~ system }}
{%- for tool in tools or [] %}{{ '\n\n' ~ tool | tojson(indent=4) }}{% endfor %}<|im_end|>
{%- for m in messages %}
{%- if m.role == 'tool' or m.role == 'ipython' %}{{ '<|im_start|>ipython\n\n' }}
{%- if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
{%- set call = m.tool_calls[0].function %}{{ '<|im_start|>assistant\n\n' }}
{{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ '}' }}<|im_end|>
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\n\n' ~ m.content | trim }}<|im_end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"""
# Turns must alternate, ids have nine characters, and it loses what is said beside calls; the
# system prompt wanders to the last user message.
MISTRAL_OLD = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set messages = messages[1:] %}{% endif %}
{%- set ns = namespace(index=0) %}
{%- for m in messages %}
{%- if not (m.role == 'tool' or m.tool_calls is defined) %}
{%- if (m.role == 'user') != (ns.index % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- set ns.index = ns.index + 1 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools is not none and m == users[-1] %}{{ '[AVAILABLE_TOOLS]' ~ tools | tojson }}{% endif %}
{{- '[INST]' ~ (system ~ '\n\n' if loop.last and system is defined) ~ m.content ~ '[/INST]' }}
{%- elif m.tool_calls is defined %}{{ '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('IDs should have length 9!') }}{% endif %}
{{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' ~ (', ' if not loop.last) }}
{%- endfor %}{{ ']' ~ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content ~ eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('IDs should have length 9!') }}{% endif %}
{{- '[TOOL_RESULTS]{"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id ~ '"}' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""
# Turns must alternate, apart from calls; the rest it takes.
MISTRAL_NEW = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ '[SYSTEM]' ~ messages[0].content ~ '[/SYSTEM]' }}
{%- set messages = messages[1:] %}{% endif %}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- set ns = namespace(index=0) %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{%- if (m.role == 'user') != (ns.index % 2 == 0) %}
{{- raise_exception('roles must alternate except for tool calls and results.') }}{% endif %}
{%- set ns.index = ns.index + 1 %}{% endif %}
{%- if m.role == 'user' %}{{ '[INST]' ~ m.content ~ '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{% set arguments = call.function.arguments %}
{{- '[TOOL_CALLS]' ~ call.function.name ~ '[ARGS]' }}
{{- arguments if arguments is string else arguments | tojson }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' ~ m.content ~ '[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user, assistant and tool roles are supported.') }}{% endif %}
{%- endfor %}"""
# User and assistant in turn, nothing else; a system prompt joins the first user message.
GEMMA3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\n\n' %}
{%- set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<|im_start|>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}
{{- (first if loop.first) ~ m.content | trim ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"""
# The same, and no system prompt at all.
GEMMA1 = (
    """
{{- raise_exception('System role not supported') if messages[0].role == 'system' }}"""
    + GEMMA3
)
# Moves system messages to the front; a call is one that says nothing, with arguments as text.
DEEPSEEK = """
{{- bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|User|>' ~ m.content }}
{%- elif m.role == 'assistant' and m.content is none %}{{ '<|Assistant|>' }}
{%- for call in m.tool_calls %}
{{- '<|call|>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}
{%- endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}
{{- '<|Assistant|>' ~ m.content.split('</think>')[-1] ~ eos_token }}
{%- elif m.role == 'tool' %}{{ '<|output|>' ~ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
# Prints arguments as Python prints them; content must be blocks; knows developers.
BLOCKS = """
{%- for m in messages %}<|im_start|>{{ 'developer' if m.role == 'system' else m.role }}
{% for block in m.content %}{{ block.text }}{% endfor %}
{%- for call in m.tool_calls or [] %}
{{- '<call>' ~ call.function.name ~ ' ' ~ call.function.arguments ~ '</call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

FAMILIES = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "qwen3 coder": QWEN3_CODER,
    "llama 3": LLAMA3,
    "mistral, old": MISTRAL_OLD,
    "mistral, new": MISTRAL_NEW,
    "gemma 3": GEMMA3,
    "gemma 1": GEMMA1,
    "deepseek": DEEPSEEK,
    "blocks": BLOCKS,
}
