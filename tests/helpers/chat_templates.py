"""Small chat templates with all that published ones have: thinking, tools, and tool calls in both forms."""

_CHAT = """\
{%- if tools %}<|im_start|>system
You may call these tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
CALL
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>
{%- else %}<think>
{% endif %}{% endif %}"""

_JSON_CALL = """\
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}"""

_XML_CALL = """\
<function={{ call.function.name }}>
{% for name, value in call.function.arguments.items() %}
<parameter={{ name }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}
</function>"""

TEMPLATES = {
    "json": _CHAT.replace("\nCALL\n", f"\n{_JSON_CALL}\n"),
    "xml": _CHAT.replace("\nCALL\n", f"\n{_XML_CALL}\n"),
}
