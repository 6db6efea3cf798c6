"""Values as they are typed: what is printed can be copied into a shell and means the same."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from finetune.typed import quoted, shown, to_type

TEXTS = [
    "plain", "runs/2024", "a b", "it's", "a,b", "a=b", "ü.jpg", "[x]", "{y}", "$z", "a\\b", "a\\",
    "a\\'b", "(c", "~/d", "e#f", "`g`", 'h"i', "j!", "5", "2024_01", "1e3", "-.5", "null", "True",
    "nan", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_to_be_typed_means_the_text_in_hydra_and_in_a_shell(text):
    parser = OverridesParser.create()
    assert parser.parse_override(f"key={quoted(text)}").value() == text
    (argument,) = shlex.split(to_type("key", text))
    assert parser.parse_override(argument).value() == text


def test_what_needs_no_quotes_gets_none():
    assert to_type("resume", "logs/run-1") == "resume=logs/run-1"
    assert to_type("resume", "a,b") == "\"resume='a,b'\""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "true"), (False, "false"), (0, "0"), (0.5, "0.5"), ("a", "a"),
        ([1, None], "[1,null]"), ({"a": True}, "{a:true}"),
    ],
)  # fmt: skip
def test_a_value_is_shown_as_it_is_typed(value, text):
    assert shown(value) == text
