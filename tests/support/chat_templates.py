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
# Thoughts are asked for, and written behind the last question even where nothing was thought; one
# system message, at the beginning.
QWEN35 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
) + QWEN3_CODER.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n"
    "{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}{{ m.content }}",
).replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
# Messages in channels. The one before the system's is about the model, and says its effort; a
# message that calls has one call and no text, and its thoughts are left out once it was answered.
HARMONY = """
{%- macro message(header, text, end) %}{{ '<|start|>' ~ header ~ '<|message|>' ~ text ~ end }}
{%- endmacro %}
{{- message('system', 'Reasoning: ' ~ (reasoning_effort | default('medium')), '<|end|>') }}
{%- set system = messages[0].content if messages[0].role in ('system', 'developer') else '' %}
{%- if system %}{% set messages = messages[1:] %}{% endif %}
{%- set functions = namespace(text='') %}
{%- for tool in tools or [] %}
{%- set functions.text = functions.text ~ '// ' ~ tool.function.description ~ '\ntype ' %}
{%- set functions.text = functions.text ~ tool.function.name ~ ' = ' %}
{%- set functions.text = functions.text ~ tool.function.parameters | tojson ~ ';\n' %}{% endfor %}
{%- if system or tools %}{{ message('developer', system ~ functions.text, '<|end|>') }}{% endif %}
{%- set called = namespace(name=none) %}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}{% set called.name = call.name %}
{%- set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') %}
{%- if not (later | rejectattr('tool_calls') | list) %}
{%- if m.content and m.thinking %}{{ raise_exception('Content or thinking, not both.') }}{% endif %}
{%- if m.content or m.thinking %}
{{- message('assistant<|channel|>analysis', m.content or m.thinking, '<|end|>') }}{% endif %}
{%- endif %}
{{- message('assistant to=functions.' ~ call.name ~ '<|channel|>commentary json',
            call.arguments | tojson, '<|call|>') }}
{%- elif m.role == 'assistant' %}
{%- set ends = loop.last and not add_generation_prompt %}
{{- message('assistant<|channel|>final', m.content, '<|return|>' if ends else '<|end|>') }}
{%- elif m.role == 'tool' %}
{%- if not called.name %}{{ raise_exception('Nothing was called.') }}{% endif %}
{{- message('functions.' ~ called.name ~ ' to=assistant<|channel|>commentary',
            m.content | tojson, '<|end|>') }}
{%- elif m.role == 'user' %}{{ message('user', m.content, '<|end|>') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
# Results are in the message that calls, and end no turn; what is said beside calls comes behind
# them.
GEMMA4 = """
{%- macro value(v) %}
{%- if v is string %}{{ '<|"|>' ~ v ~ '<|"|>' }}
{%- elif v is mapping %}{{ '{' }}{% for k, x in v | dictsort %}{{ k ~ ':' ~ value(x) }}
{{- ',' if not loop.last }}{% endfor %}{{ '}' }}
{%- else %}{{ v | tojson }}{% endif %}{% endmacro %}
{{- bos_token }}
{%- if tools or messages[0].role in ('system', 'developer') %}{{ '<|turn>system\n' }}
{%- if messages[0].role in ('system', 'developer') %}{{ messages[0].content | trim }}
{%- set messages = messages[1:] %}{% endif %}
{%- for tool in tools or [] %}
{{- '<|tool>' ~ tool.function.name ~ value(tool.function) ~ '<tool|>' }}{% endfor %}
{{- '<turn|>\n' }}{% endif %}
{%- for m in messages %}
{{- '<|turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}
{%- if m.tool_calls and m.reasoning_content %}
{{- '<|channel>thought\n' ~ m.reasoning_content ~ '\n<channel|>' }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '<|tool_call>call:' ~ call.function.name }}
{%- if call.function.arguments is mapping %}{{ value(call.function.arguments) }}
{%- else %}{{ '{' ~ call.function.arguments ~ '}' }}{% endif %}{{ '<tool_call|>' }}{% endfor %}
{%- for response in m['tool_responses'] or [] %}
{{- '<|tool_response>response:' ~ response.name ~ '{value:' ~ value(response.response) ~ '}' }}
{{- '<tool_response|>' }}{% endfor %}
{{- m.content | trim }}
{%- if m.content or not m['tool_responses'] %}{{ '<turn|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt and not messages[-1]['tool_responses'] %}{{ '<|turn>model\n' }}
{%- if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}
{%- endif %}"""
# Turns have no ends; old thoughts are left out, and what closes them is not.
GLM = """
{{- '[gMASK]<sop>' }}
{%- if tools %}<|system|>
{% for tool in tools %}{{ tool | tojson ~ '\n' }}{% endfor %}
{{- '<tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}
{{- '<tool_response>' ~ m.content ~ '</tool_response>' }}
{%- elif m.role == 'assistant' %}<|assistant|>
{%- if m.reasoning_content and loop.index0 > ns.last %}{{ '<think>' ~ m.reasoning_content }}
{%- endif %}{{ '</think>' ~ m.content }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>' ~ call.function.name }}
{%- for key, v in call.function.arguments.items() %}
{{- '<arg_key>' ~ key ~ '</arg_key><arg_value>' ~ (v if v is string else v | tojson) }}
{{- '</arg_value>' }}{% endfor %}</tool_call>{% endfor %}
{%- else %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{{- '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}
{%- endif %}"""
# Tells which tools there are, and takes results, but writes no calls.
LFM2 = """
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if system %}{% set messages = messages[1:] %}{% endif %}
{%- if tools %}{% set system = system ~ '\nList of tools: ' ~ tools | tojson %}{% endif %}
{%- if system %}{{ '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Thoughts are blocks of an answer's content.
MINISTRAL = MISTRAL_NEW.replace(
    "{%- elif m.role == 'assistant' %}{{ m.content }}",
    """{%- elif m.role == 'assistant' %}
{%- if m.content is string %}{{ m.content }}{% else %}{% for block in m.content %}
{%- if block.type == 'thinking' %}{{ '[THINK]' ~ block.thinking ~ '[/THINK]' }}
{%- else %}{{ block.text }}{% endif %}{% endfor %}{% endif %}""",
)

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
    "qwen 3.5": QWEN35,
    "harmony": HARMONY,
    "gemma 4": GEMMA4,
    "glm": GLM,
    "lfm2": LFM2,
    "ministral": MINISTRAL,
}
