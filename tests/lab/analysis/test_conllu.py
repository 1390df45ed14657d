"""CoNLL-U: a hand-written excerpt with everything the format allows, and what breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import ConfigError
from surgery.lab.analysis.conllu import read_conllu

# Comments, a multi-word token, an empty node, a subtype, no space before the comma.
EXCERPT = """\
# newdoc id = one
# sent_id = 1
# text = Vámonos al mar, Sue.
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\t_\t_\t5\tcase\t_\t_
4\tel\tel\tDET\t_\t_\t5\tdet\t_\t_
5\tmar\tmar\tNOUN\t_\t_\t1\tobl:arg\t_\tSpaceAfter=No|Gloss=sea
5.1\tvamos\t_\t_\t_\t_\t_\t_\t_\t_
6\t,\t,\tPUNCT\t_\t_\t7\tpunct\t_\t_
7\tSue\tSue\tPROPN\t_\t_\t1\tvocative\t_\tSpaceAfter=No
8\t.\t.\tPUNCT\t_\t_\t1\tpunct\t_\t_

# sent_id = 2
1\tGo\tgo\tVERB\t_\t_\t0\troot\t_\t_
2\taway\taway\tADV\t_\t_\t1\tadvmod\t_\t_
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_excerpt_is_read_as_it_stands(tmp_path: Path, end: str) -> None:
    file = tmp_path / "some.conllu"
    file.write_bytes(EXCERPT.replace("\n", end).encode())
    first, second = read_conllu(file)
    assert first.text == "Vámonos al mar, Sue."
    spelt = [first.text[a:b] for a, b in first.words]
    assert spelt == ["Vámonos", "Vámonos", "al", "al", "mar", ",", "Sue", "."]
    assert first.pairs == {
        "obj": [(1, 0)],
        "case": [(2, 4)],
        "det": [(3, 4)],
        "obl": [(4, 0)],
        "punct": [(5, 6), (7, 0)],
        "vocative": [(6, 0)],
    }
    assert (second.text, second.pairs) == ("Go away", {"advmod": [(1, 0)]})


GOOD = "1\tGo\tgo\tVERB\t_\t_\t0\troot\t_\t_\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# text = Go\n1\tGo\tgo\n", "line 2 has 3 columns, not 10"),
        (GOOD + "3\taway\ta\tADV\t_\t_\t1\tadvmod\t_\t_\n", "line 2 has the ID 3 after word 1"),
        (GOOD + "x\taway\ta\tADV\t_\t_\t1\tadvmod\t_\t_\n", "line 2 has the ID x after word 1"),
        (GOOD + "2\taway\ta\tADV\t_\t_\t9\tadvmod\t_\t_\n", "line 2 has the HEAD 9 in 2 words"),
        (GOOD + "2\taway\ta\tADV\t_\t_\t_\tadvmod\t_\t_\n", "line 2 has the HEAD _ in 2 words"),
        ("1-2\tGo\t_\t_\t_\t_\t_\t_\t_\t_\n" + GOOD, "line 2 ends before word 2"),
        ("2-3\tGo\t_\t_\t_\t_\t_\t_\t_\t_\n" + GOOD, "line 1 has the ID 2-3 after word 0"),
        ("# only a comment\n\n", "has no sentences"),
    ],
)
def test_what_breaks_the_format_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "broken.conllu"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_conllu(file)
    assert caught.value.key == "analysis.probes"
    assert str(file) in str(caught.value.given)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(GOOD.replace("Go", "G\xe9").encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_conllu(tmp_path / "latin")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_conllu(tmp_path / "nowhere")
