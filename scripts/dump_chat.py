#!/usr/bin/env python3
"""Write chat template fixtures: templates, and the text that transformers renders from them.

This script writes tests/fixtures/chat.json. Its templates cover the features that published ones use: white space
control, Python's methods and printing, `tojson`, `{% generation %}`, tools, namespaces, macros, loop controls and
special tokens by name.

Needs transformers and jinja2.
"""
import json
import sys
from pathlib import Path

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parent.parent / "tests/fixtures/chat.json"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

TEMPLATES = [
    "{% if tools is not none %}TOOLS{% endif %}{% if documents is not none %}DOCS{% endif %}" + TURNS,
    "{% if tools %}TOOLS{% endif %}{{ tools }}|{{ documents }}|{{ tools is defined }}|{{ tools | length if tools else 0 }}",
    "{{ messages | tojson }}",
    "{{ messages[0] | tojson(indent=2) }}\n{{ {'a': [], 'b': {}, 'c': [1, [2]]} | tojson(indent=4) }}",
    "{{ {'b': 1, 'a': {'z': 1, 'y': none}} | tojson(sort_keys=true) }} {{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}",
    "{{ {'text': 'naïve 世界 😀 \"quoted\" \\\\ tab\\t', 'x': 1.5, 'y': 1e20, 'z': 0.00001, 't': true, 'n': none} | tojson }}",
    "{{ 'naïve 😀' | tojson(ensure_ascii=true) }} {{ '<a>&\\'b\\'' | tojson }} {{ [1, 2] | tojson(true, 2) }}",
    "{%- for m in messages -%}\n{% generation %}\n[{{ m.content }}]\n{% endgeneration %}\n{%- endfor -%}\n",
    "{% generation %}{{ messages[-1].content }}{% endgeneration -%}   \n  end {% raw %}{% generation %}{% endraw %}{# {% generation %} #}",
    "{{ '{% generation %}' }}{% set generation = 'g' %}{{ generation }}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ unk_token }}{{ mask_token is defined }}",
    "{{ bos_token + messages[0]['content'] | trim + eos_token }}",
    "{{ true }} {{ none }} {{ [1, 'a', true, none, 2.0] }} {{ {'k': 'it\\'s'} }} {{ 1.0 }} {{ 3 / 2 }} {{ 7 // 2 }} {{ missing }}",
    "{{ (true) | string }} {{ none | string }} {{ [1, 'b'] | string }} {{ 1.5 | string }}",
    "{{ messages[0].content.strip().upper().replace('H', 'J') }}|{{ 'a,b,c'.split(',')[-1] }}|{{ 'abc'[::-1] }}|{{ 'x'.startswith('x') }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = true %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ ns.found }} {{ ns.n }}",
    "{% macro turn(role, text='none') %}<{{ role }}>{{ text }}\n{% endmacro %}{% for m in messages %}{{ turn(m.role, text=m.content) }}{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{% else %}none{% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|system|>\\n' + messages[0]['content'] + '\\n' }}\n    {%- set rest = messages[1:] %}\n"
    "{%- else %}\n    {%- set rest = messages %}\n{%- endif %}\n{%- for m in rest %}\n    {{- '<|' ~ m['role'] ~ '|>\\n' ~ m['content'] }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '\\n<|assistant|>\\n' }}\n{%- endif %}\n",
    "  {% for m in messages %}\n  {{ m.role }}\n    {% endfor %}\n tail\n\n",
    "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value }};{% endfor %}{% endfor %}{{ messages[0].keys() | list }}",
    "{{ messages[0].get('name', 'nobody') }} {{ messages[0].name is defined }} {{ 'content' in messages[0] }} {{ messages | length }}",
    "{% for m in messages %}{{ m.content | replace('\\n', ' ') | title }}{% endfor %}{{ dict(a=1)['a'] }}{{ messages | map(attribute='role') | join('+') }}",
    "{% if messages[0].role not in ['system', 'user'] %}{{ raise_exception('unknown role') }}{% endif %}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages[0].content is string }} {{ messages is iterable }} {{ messages[0] is mapping }} {{ none is none }} {{ 5 is number }}",
    "{{ raise_exception('Only user turns are supported!') }}",
]
CHATS = [(None, "Hi"), ("Be brief.", "  What is <b>this</b> & that?\nTell 'me' \"all\".  ")]


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    tokens = {k: v for k, v in tokenizer.special_tokens_map.items()}
    cases = []
    for template in TEMPLATES:
        for system, user in CHATS:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": user})
            case = {"template": template, "system": system, "user": user}
            try:
                case["text"] = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True)
            except jinja2.exceptions.TemplateError as e:
                case["refused"] = str(e)
            cases.append(case)
    versions = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    OUT.write_text(json.dumps({"versions": versions, "tokens": tokens, "cases": cases}, ensure_ascii=False, indent=1) + "\n")
    print(f"{OUT}: {len(cases)} cases", file=sys.stderr)


if __name__ == "__main__":
    main()
