"""Line numbers of a TOML file, past every decoy."""
# ruff: noqa: E501 (one case a line)

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycoswarmd.core.policy.lines import scan_lines

DECOYS = [
    "",
    "# [[rule]]",
    "  \t# id = 3",
    's = "[[rule]]"',
    "s = '[[rule]] # \"'",
    's = """\n[[rule]]\nid = 1\n"""',
    's = """a\\"""\n[[rule]]"""""',
    "s = '''\n[[rule]]\n'''''",
    's = ["[[rule]]", # ]\n "x", [1,\n 2]]',
    's = { a = "}", b = [1,\n[[2]]] }',
    's = "\\\\" # "',
    'a."b.c".d = 1',
    '"quo\\u0074ed" = 1',
    "s = 1979-05-27T07:32:00Z",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DECOYS), st.sampled_from(["\n", "\r\n"])), max_size=8))
def test_headers_are_found_past_decoys(drawn: list[tuple[str, str]]) -> None:
    text, expected = "", []
    for decoy, newline in drawn:
        expected.append(text.count("\n") + 1)
        text += f"[[rule]]{newline}{decoy}{newline}id = 1{newline}"
    lines = scan_lines(text.replace("\r\n", "\n"), tomllib.loads(text))
    assert [lines.at(("rule", i)) for i in range(len(drawn))] == expected
    for i, (decoy, _) in enumerate(drawn):
        assert lines.at(("rule", i, "id")) == expected[i] + decoy.count("\n") + 2


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="[]{}\"'#=.,ab1 \n\\", max_size=40))
def test_any_toml_gets_lines_or_is_refused(text: str) -> None:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    try:
        lines = scan_lines(text, document)
    except ValueError:
        return
    for key in document:
        assert 1 <= lines.at((key,)) <= text.count("\n") + 1


def test_tables_and_the_keys_in_them_are_found() -> None:
    text = '[labels]\norder = [\n "a",\n]\ndefault = "a"\n\n[agents.x.limit]\nwall = "1s"\n[[rule]]\n[rule.label]\nmax = "a"\n'
    lines = scan_lines(text, tomllib.loads(text))
    assert lines.at(("labels", "order")) == 2
    assert lines.at(("labels", "default")) == 5
    assert lines.at(("agents", "x", "limit", "wall")) == 8
    assert lines.at(("rule", 0, "label", "max")) == 11
    assert lines.at(("rule", 0, "label", "min")) == 10
    assert lines.at(("nothing",)) == 1


@pytest.mark.parametrize(
    "other",
    [{"rule": [{}]}, {"rule": [{"id": 1}, {}]}, {"rule": [{"id": 1}], "more": 1}, {"rule": {"id": 1}}],
)
def test_a_document_that_differs_is_refused(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cannot be told apart"):
        scan_lines("[[rule]]\nid = 1\n", other)
