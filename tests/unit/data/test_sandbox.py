"""Templates are programs from strangers: they cannot reach out, run long, or fill the memory."""

import jinja2
import pytest

from finetune.data.sandbox import compile_template


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * ['x'] }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 9 ** 999999999 }}",
        "{% set r = range(9999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}"
        + "{% endfor %}" * 2,
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% for i in range(99999) %}{{ big }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ items.append(1) }}",
    ],
    ids=[
        "text times",
        "list times",
        "percent",
        "format",
        "ljust",
        "center",
        "power",
        "nested loops",
        "tilde",
        "plus",
        "output",
        "class",
        "globals",
        "mutation",
    ],
)
@pytest.mark.timeout(20)
def test_a_hostile_template_is_stopped(source):
    with pytest.raises(jinja2.TemplateError):
        compile_template(source)({"items": [1], "big": "x" * 10_000})


def test_ordinary_templates_keep_their_loop_variables_and_filters():
    source = (
        "{% for m in ms %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %} "
        "{{ {'b': 1, 'a': '\u00e9'} | tojson }} {{ 'a' ~ 1 ~ none }} {{ '%s!' % 'x' }}"
    )

    assert compile_template(source)({"ms": iter("abc")}) == '1/3,2/3,3/3 {"b": 1, "a": "\u00e9"} a1None x!'


def test_the_date_that_a_template_prints_does_not_change_from_day_to_day():
    assert compile_template("{{ strftime_now('%d %b %Y') }}")({}) == "26 Jul 2024"


def test_raise_exception_reaches_the_caller_with_its_message():
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        compile_template("{{ raise_exception('roles must alternate') }}")({})
