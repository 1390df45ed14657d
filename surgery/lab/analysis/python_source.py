"""Python source as words, by `tokenize`, and the relations between them."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from bisect import bisect_left

from surgery.lab.analysis.bindings import Bindings
from surgery.lab.analysis.relations import Related

# How words hang together, dependent → head.
RELATIONS = {
    "name": "a name → where it was last bound in the same scope",
    "call": "the bracket that ends a call → the name that is called",
    "argument": "the first word of an argument → the name that is called",
    "bracket": "a closing bracket → the one that it closes",
    "attribute": "the name of an attribute → the name that it belongs to",
    "branch": "elif, else, except, finally → the if, for, while, try that they belong to",
    "return": "return → the def that it returns from",
}
_CLOSING = {")": "(", "]": "[", "}": "{"}
_OPENERS = ("if", "for", "while", "try")
_BRANCHES = ("elif", "else", "except", "finally")
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)
# Strings in pieces, from Python 3.12 on.
_STRING_STARTS = {getattr(tokenize, name, -1) for name in ("FSTRING_START", "TSTRING_START")}
_STRING_ENDS = {getattr(tokenize, name, -1) for name in ("FSTRING_END", "TSTRING_END")}


def python_relations(source: str) -> Related | None:
    """Names, keywords, numbers and operators as words, and what of `RELATIONS` holds among them.

    Strings and comments are no words. ``None`` for what this Python cannot parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that some Python will refuse
            source = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
            syntax = ast.parse(source)
        words = _Words(source)
    except _UNREADABLE:
        return None
    found = Related(source, words.spans)
    _brackets_and_branches(words, found)
    _Tree(words, found).visit(syntax)
    for use, binding in Bindings(words.named, words.at).of(syntax):
        found.relate("name", use, binding)
    return found


class _Words:
    """The words of a source, found by their places; a place is (line from 1, bytes)."""

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
                stands = inside or token.type == tokenize.STRING
                first = token.type == tokenize.NEWLINE or (first and not stands)
                continue
            number, column = token.start
            at = starts[number - 1] + column
            self.spans.append((at, at + len(token.string)))
            self.texts.append(token.string)
            self.first.append(first)
            self.columns.append(column)
            self._places.append((number, len(lines[number - 1][:column].encode())))
            first = False

    def exactly(self, node: ast.AST) -> int | None:
        """The word that a node begins with; ``None`` where it begins with a string."""
        place = (node.lineno, node.col_offset)  # type: ignore[attr-defined]
        number = self.at(*place)
        return number if number < len(self.texts) and self._places[number] == place else None

    def at(self, line: int | None, column: int | None) -> int:
        """The first word at that place or after it."""
        return bisect_left(self._places, (line or 0, column or 0))

    def named(self, start: int, text: str) -> int | None:
        """The first word from number `start` on that reads `text`."""
        for number in range(start, min(start + 64, len(self.texts))):
            if self.texts[number] == text:
                return number
        return None


def _brackets_and_branches(words: _Words, found: Related) -> None:
    open_brackets: list[int] = []
    openers: dict[int, int] = {}  # column → the keyword that began the statement
    for number, text in enumerate(words.texts):
        if text in _CLOSING.values():
            open_brackets.append(number)
        elif text in _CLOSING and open_brackets:
            found.relate("bracket", number, open_brackets.pop())
        if words.first[number]:
            column = words.columns[number]
            openers = {at: word for at, word in openers.items() if at <= column}
            if text in _OPENERS:
                openers[column] = number
            elif text in _BRANCHES and column in openers:
                found.relate("branch", number, openers[column])
            else:
                openers.pop(column, None)


class _Tree(ast.NodeVisitor):
    """Relations that the syntax tree knows: calls, arguments, attributes, returns."""

    def __init__(self, words: _Words, found: Related) -> None:
        self.words, self.found = words, found
        self._functions: list[int] = []

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Places inside formatted strings are not to be trusted before Python 3.12."""

    visit_TemplateStr = visit_JoinedStr  # noqa: N815  (named by ast)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        word = self.words.named(self.words.at(node.lineno, node.col_offset), "def")
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
            at = self.words.exactly(node)
            if at is not None:
                self.found.relate("return", at, self._functions[-1])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        callee = self._name(node.func)
        if callee is not None:
            last = self.words.at(node.end_lineno, (node.end_col_offset or 1) - 1)
            self.found.relate("call", last, callee)
            for argument in (*node.args, *node.keywords):
                at = self.words.exactly(argument)
                # The one generator of `f(x for x in y)` begins with the bracket of the call.
                if at is not None and not isinstance(argument, ast.GeneratorExp):
                    self.found.relate("argument", at, callee)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        base, own = self._name(node.value), self._name(node)
        if base is not None and own is not None:
            self.found.relate("attribute", own, base)
        self.generic_visit(node)

    def _name(self, node: ast.expr) -> int | None:
        """The word that names what an expression is of: of ``a.b(c)[d]`` it is ``b``."""
        while isinstance(node, (ast.Call, ast.Subscript)):
            node = node.func if isinstance(node, ast.Call) else node.value
        if isinstance(node, ast.Name):
            return self.words.at(node.lineno, node.col_offset)
        if isinstance(node, ast.Attribute):
            after = self.words.at(node.value.end_lineno, node.value.end_col_offset)
            return self.words.named(after, node.attr)
        return None
