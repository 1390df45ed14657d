"""Split Python source into words with `tokenize`, and find the relations between them."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from bisect import bisect_left

from surgery.lab.analysis.bindings import Bindings
from surgery.lab.analysis.spans import RelatedText

# The relations between words, dependent → head.
RELATIONS = {
    "name": "a name → its last binding in the same scope",
    "call": "the bracket that ends a call → the name that is called",
    "argument": "the first word of an argument → the name that is called",
    "bracket": "a closing bracket → its opening bracket",
    "attribute": "the name of an attribute → the name that it belongs to",
    "branch": "elif, else, except, finally → the if, for, while, try that they belong to",
    "return": "return → the def that it returns from",
}
_CLOSING = {")": "(", "]": "[", "}": "{"}
_OPENERS = ("if", "for", "while", "try")
_BRANCHES = ("elif", "else", "except", "finally")
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)
# From Python 3.12 on, formatted strings are several tokens.
_STRING_STARTS = {getattr(tokenize, name, -1) for name in ("FSTRING_START", "TSTRING_START")}
_STRING_ENDS = {getattr(tokenize, name, -1) for name in ("FSTRING_END", "TSTRING_END")}


def find_python_relations(source: str) -> RelatedText | None:
    """Find the words of a source (names, keywords, numbers, operators) and their `RELATIONS`.

    Strings and comments are not words. The result is ``None`` if this Python cannot parse the
    source.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a later Python will refuse
            source = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
            syntax = ast.parse(source)
        words = _Words(source)
    except _UNREADABLE:
        return None
    text = RelatedText(source, words.spans)
    _relate_brackets_and_branches(words, text)
    _Tree(words, text).visit(syntax)
    for use, binding in Bindings(words.find_named, words.find_at).find_pairs(syntax):
        text.relate("name", use, binding)
    return text


class _Words:
    """The words of a source, which can be found by their places: (line from 1, bytes)."""

    def __init__(self, source: str) -> None:
        self.spans: list[tuple[int, int]] = []
        self.texts: list[str] = []
        self.first: list[bool] = []  # whether a word is the first of its logical line
        self.columns: list[int] = []
        self._places: list[tuple[int, int]] = []
        lines = source.split("\n")
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line) + 1)
        inside, first = 0, True
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            inside += (token.type in _STRING_STARTS) - (token.type in _STRING_ENDS)
            if inside or token.type not in (tokenize.NAME, tokenize.NUMBER, tokenize.OP):
                is_string = inside or token.type == tokenize.STRING
                first = token.type == tokenize.NEWLINE or (first and not is_string)
                continue
            number, column = token.start
            at = starts[number - 1] + column
            self.spans.append((at, at + len(token.string)))
            self.texts.append(token.string)
            self.first.append(first)
            self.columns.append(column)
            self._places.append((number, len(lines[number - 1][:column].encode())))
            first = False

    def find_exactly(self, node: ast.AST) -> int | None:
        """Find the word at the start of a node; ``None`` if the node starts with a string."""
        place = (node.lineno, node.col_offset)  # type: ignore[attr-defined]
        number = self.find_at(*place)
        return number if number < len(self.texts) and self._places[number] == place else None

    def find_at(self, line: int | None, column: int | None) -> int:
        """Find the first word at a place or after it."""
        return bisect_left(self._places, (line or 0, column or 0))

    def find_named(self, start: int, text: str) -> int | None:
        """Find the first word `text` from number `start` on."""
        for number in range(start, min(start + 64, len(self.texts))):
            if self.texts[number] == text:
                return number
        return None


def _relate_brackets_and_branches(words: _Words, text: RelatedText) -> None:
    open_brackets: list[int] = []
    openers: dict[int, int] = {}  # column → the keyword that began the statement
    for number, word in enumerate(words.texts):
        if word in _CLOSING.values():
            open_brackets.append(number)
        elif word in _CLOSING and open_brackets:
            text.relate("bracket", number, open_brackets.pop())
        if words.first[number]:
            column = words.columns[number]
            openers = {at: opener for at, opener in openers.items() if at <= column}
            if word in _OPENERS:
                openers[column] = number
            elif word in _BRANCHES and column in openers:
                text.relate("branch", number, openers[column])
            else:
                openers.pop(column, None)


class _Tree(ast.NodeVisitor):
    """Finds the relations in the syntax tree: calls, arguments, attributes, returns."""

    def __init__(self, words: _Words, text: RelatedText) -> None:
        self.words, self.text = words, text
        self._functions: list[int] = []

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skip formatted strings: positions in them are wrong before Python 3.12."""

    visit_TemplateStr = visit_JoinedStr  # noqa: N815  (named by ast)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        word = self.words.find_named(self.words.find_at(node.lineno, node.col_offset), "def")
        for outer in (*node.decorator_list, node.args, *([node.returns] if node.returns else [])):
            self.visit(outer)
        if word is not None:
            self._functions.append(word)
        for statement in node.body:
            self.visit(statement)
        if word is not None:
            self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Return(self, node: ast.Return) -> None:
        if self._functions:
            at = self.words.find_exactly(node)
            if at is not None:
                self.text.relate("return", at, self._functions[-1])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        callee = self._find_name(node.func)
        if callee is not None:
            last = self.words.find_at(node.end_lineno, (node.end_col_offset or 1) - 1)
            self.text.relate("call", last, callee)
            for argument in (*node.args, *node.keywords):
                at = self.words.find_exactly(argument)
                # The generator in `f(x for x in y)` starts at the bracket of the call.
                if at is not None and not isinstance(argument, ast.GeneratorExp):
                    self.text.relate("argument", at, callee)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        base, own = self._find_name(node.value), self._find_name(node)
        if base is not None and own is not None:
            self.text.relate("attribute", own, base)
        self.generic_visit(node)

    def _find_name(self, node: ast.expr) -> int | None:
        """Find the word that names the object of an expression: ``b`` in ``a.b(c)[d]``."""
        while isinstance(node, (ast.Call, ast.Subscript)):
            node = node.func if isinstance(node, ast.Call) else node.value
        if isinstance(node, ast.Name):
            return self.words.find_at(node.lineno, node.col_offset)
        if isinstance(node, ast.Attribute):
            after = self.words.find_at(node.value.end_lineno, node.value.end_col_offset)
            return self.words.find_named(after, node.attr)
        return None
