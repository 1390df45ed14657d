"""Find which binding each use of a name reads: the last one before it in the same scope."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

# (line, column) from which a binding holds.
_Place = tuple[int, int]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Bindings:
    """Uses and bindings of the names in a module.

    Bindings are assignments, loops, ``with``, ``import``, ``except``, ``def``, ``class``,
    parameters and ``:=``. A binding holds from the end of its value, so in ``x = x + 1`` the
    second x reads an earlier binding. Names declared ``global`` or ``nonlocal`` belong to another
    scope and are left out.

    Args:
        find_named: returns the first word with a text, from a word number on.
        find_at: returns the first word at a line (from 1) and column (bytes), or after it.
    """

    def __init__(
        self,
        find_named: Callable[[int, str], int | None],
        find_at: Callable[[int | None, int | None], int],
    ) -> None:
        self._find_named, self._find_at = find_named, find_at

    def find_pairs(self, syntax: ast.Module) -> list[tuple[int, int]]:
        """Find (use, binding) of every use that has a binding, as numbers of words."""
        pairs: list[tuple[int, int]] = []
        scopes: list[list[ast.AST]] = [list(syntax.body)]
        while scopes:
            scope = _Scope(self, scopes)
            for node in scopes.pop():
                scope.take(node)
            pairs += scope.find_pairs()
        return sorted(pairs)

    def find_word(self, node: ast.AST, name: str, after: ast.AST | None = None) -> int | None:
        """Find the word `name`, from the start of `node` or from the end of `after`."""
        if after is not None:
            start = self._find_at(after.end_lineno, after.end_col_offset)  # type: ignore[attr-defined]
        else:
            start = self._find_at(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return self._find_named(start, name)


class _Scope:
    def __init__(self, all_of: Bindings, others: list[list[ast.AST]]) -> None:
        self._all = all_of
        self._others = others  # scopes inside this one are added here
        self._bound: dict[str, list[tuple[_Place, int]]] = {}
        self._uses: list[tuple[str, _Place, int]] = []
        self._elsewhere: set[str] = set()

    def find_pairs(self) -> Iterator[tuple[int, int]]:
        for name, place, word in self._uses:
            earlier = [one for one in self._bound.get(name, ()) if one[0] <= place]
            if earlier and name not in self._elsewhere:
                yield word, max(earlier)[1]

    def take(self, node: ast.AST, since: _Place | None = None) -> None:
        """Note what `node` uses and binds; bindings below it hold from `since`."""
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            self._take_definition(node)
        elif isinstance(node, _COMPREHENSIONS):
            # The first iterable belongs to the scope outside.
            self.take(node.generators[0].iter)
            self._others.insert(0, _list_inner(node))
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            self._elsewhere.update(node.names)
        elif isinstance(node, ast.Name):
            self._take_name(node, since)
        elif isinstance(node, ast.arg):
            self._bind(node.arg, node, _get_start(node))
            self._take_below(node, None)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                self._take_alias(alias)
        elif isinstance(node, ast.ExceptHandler):
            self._take_handler(node)
        elif not isinstance(node, ast.JoinedStr):  # its positions are wrong before Python 3.12
            self._take_below(node, _find_start(node) or since)

    def _take_below(self, node: ast.AST, since: _Place | None) -> None:
        for child in ast.iter_child_nodes(node):
            self.take(child, None if isinstance(child, ast.stmt) else since)

    def _take_name(self, node: ast.Name, since: _Place | None) -> None:
        if isinstance(node.ctx, ast.Load):
            word = self._all.find_word(node, node.id)
            if word is not None:
                self._uses.append((node.id, _get_start(node), word))
        elif isinstance(node.ctx, ast.Store):
            self._bind(node.id, node, since or _get_start(node))

    def _bind(self, name: str, node: ast.AST, place: _Place, after: ast.AST | None = None) -> None:
        word = self._all.find_word(node, name, after)
        if word is not None:
            self._bound.setdefault(name, []).append((place, word))

    def _take_definition(self, node: ast.AST) -> None:
        if isinstance(node, _FUNCTIONS):
            arguments = node.args
            own = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            own += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
            for default in (*arguments.defaults, *arguments.kw_defaults):
                if default is not None:
                    self.take(default)
            body = node.body if isinstance(node.body, list) else [node.body]
            for one in own:
                if one.annotation is not None:
                    self.take(one.annotation)
            bare = [ast.copy_location(ast.arg(arg=one.arg), one) for one in own]
            self._others.insert(0, [*bare, *body])
        if isinstance(node, ast.ClassDef):
            for part in (*node.bases, *(one.value for one in node.keywords)):
                self.take(part)
            self._others.insert(0, list(node.body))
        if not isinstance(node, ast.Lambda):
            for decorator in node.decorator_list:  # type: ignore[attr-defined]
                self.take(decorator)
            self._bind(node.name, node, _get_start(node))  # type: ignore[attr-defined]

    def _take_alias(self, alias: ast.alias) -> None:
        bound = alias.asname or alias.name.partition(".")[0]
        if alias.asname is None:
            self._bind(bound, alias, _get_start(alias))
        elif alias.end_col_offset is not None:  # in `x as x` the second x is the binding
            last = ast.Name(id=bound)
            last.lineno = alias.end_lineno or alias.lineno
            last.col_offset = alias.end_col_offset - len(bound.encode())
            self._bind(bound, last, _get_start(last))

    def _take_handler(self, node: ast.ExceptHandler) -> None:
        if node.type is not None:
            self.take(node.type)
            if node.name is not None:
                self._bind(node.name, node, _get_end(node.type), after=node.type)
        for statement in node.body:
            self.take(statement)


def _list_inner(node: ast.AST) -> list[ast.AST]:
    """List what a comprehension reads and binds in its own scope, loops first."""
    loops: list[ast.AST] = []
    for number, loop in enumerate(node.generators):  # type: ignore[attr-defined]
        loops += [loop.target, *loop.ifs, *([loop.iter] if number else [])]
    return [
        *loops,
        *(getattr(node, name) for name in ("elt", "key", "value") if hasattr(node, name)),
    ]


def _find_start(node: ast.AST) -> _Place | None:
    """Find the end of the value that a statement binds, from where the binding holds."""
    value = None
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
        value = node.value
    elif isinstance(node, (ast.For, ast.AsyncFor)):
        value = node.iter
    elif isinstance(node, ast.withitem):
        value = node.context_expr
    return None if value is None else _get_end(value)


def _get_start(node: ast.AST) -> _Place:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _get_end(node: ast.AST) -> _Place:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
