import math

import pytest
import yaml

from pipeline.config.yaml_text import read, write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("off", "on", "yes", "no", "Off", "NO", "y", "n", "2026-01-01", "12:30", "1_000")),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("1e-3", 1e-3), ("5E2", 500.0), ("-.5", -0.5), ("5.", 5.0), ("1e+3", 1e3), (".inf", math.inf),
        ("7", 7), ("-7", -7), ("010", 10), ("0x1f", 31), ("0o17", 15), ("'1e-3'", "1e-3"), ("4g", "4g"), ("e5", "e5"),
        ("[learned, off]", ["learned", "off"]), ("{off: on}", {"off": "on"}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)  # fmt: skip
def test_plain_scalars_mean_what_yaml_1_2_says(text, value):
    assert read(text) == value
    assert type(read(text)) is type(value)


def test_texts_stay_as_they_are_written():
    assert read("{a: 3.10, b: true, c: 'x', d: [0x1f, null]}", as_texts=True) == {
        "a": "3.10", "b": "true", "c": "x", "d": ["0x1f", "null"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "value",
    ["off", "true", "1e-3", "1.5", "null", "", "~", "<<", "0x10", "# x", "[a", " a", "a: b", "é", "two\nlines",
     "a\nb: 1", "\n", "tab\t", "cr\r\n", "\x85", "a\u2028b", "\u2029", "\ufeff", "\x07", "\x7f",
     ["a\nb", {"c\nd": "e\nf"}],
     "-", "=", 1e-5, 0.1, 1e22, math.inf, 10**20, True, None, [1, "2", None, "off"], {"a.b": "1", "c": [1.0]}, {}, []],
    ids=repr,
)  # fmt: skip
def test_what_is_written_is_read_back(value):
    assert read(write(value)) == value
    assert type(read(write(value))) is type(value)
    assert read(f"  key: {write(value)}  # comment") == {"key": value}
    assert "\n" not in write(value)


def test_what_is_no_yaml_is_an_error():
    with pytest.raises(yaml.YAMLError):
        read("[1, 2")
    with pytest.raises(yaml.YAMLError):
        read("!!python/object/apply:os.getcwd []")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  rate: 0.1\n  seed: 1\n  rate: 0.2\n", "'rate' stands twice in one section, in line 2 and again"),
        ("train: {rate: 0.1}\nname: a\ntrain: {seed: 1}\n", "'train' stands twice in one section, in line 1 and again"),
    ],
)
def test_a_setting_that_stands_twice_is_an_error(text, words):
    for as_texts in (False, True):
        with pytest.raises(yaml.YAMLError, match=words):
            read(text, as_texts=as_texts)


def test_a_merged_mapping_may_say_otherwise_what_it_merges():
    text = "a: &a {rate: 1, seed: 1}\nb: &b {<<: *a, rate: 2}\nc: {<<: *b, rate: 3}\n1: x\n'1': y\n"
    assert read(text)["c"] == {"rate": 3, "seed": 1}
