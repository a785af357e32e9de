"""The page on the Python API: each public name with its signature and docstring, by module.

All is read from the source, not from objects: a page is the same under every version of Python.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

#: The modules whose names are public.
DOORS = ("qplug", "qplug.numerics", "qplug.text", "qplug.testing", "qplug.hookspecs")

_WIDTH = 88  # of a signature on one line

Definition = ast.FunctionDef | ast.ClassDef
Assignment = ast.Assign | ast.AnnAssign


def api_page() -> Iterator[str]:
    """The parts of the page, in order."""
    yield "# Python API"
    doors = ", ".join(f"`{door}`" for door in DOORS)
    yield (
        f"Names in the `__all__` of {doors} are public, and this page has each of them. Names of "
        "other modules may change in any release. A public name that goes stays for one minor "
        "release, and warns."
    )
    for door in DOORS:
        module = importlib.import_module(door)
        yield f"## {door}"
        yield prose(inspect.getdoc(module) or "")
        for name in module.__all__:
            yield f"### {name}"
            yield from _entry(module, name)


def undocumented() -> Iterator[str]:
    """Public names, and public members of public classes, that nothing is written on."""
    for door in DOORS:
        module = importlib.import_module(door)
        for name in module.__all__:
            definition, home = _definition(module, name)
            if not _docstring(definition, home):
                yield f"{door}.{name}"
            if isinstance(definition, ast.ClassDef):
                for member in _methods(definition):
                    if not (_is_check(member) or _written_on(getattr(module, name), member)):
                        yield f"{door}.{name}.{member.name}"


def prose(docstring: str) -> str:
    """Markdown of a docstring, without the example at its end."""
    text = docstring.partition("Example::")[0].strip()
    text = re.sub(r"::\n\n((?:    .*\n?|\n)+)", _literal_block, text)
    text = re.sub(r"(?<!`)``([^`]+)``(?!`)", r"`\1`", text)
    return text.replace("<", "&lt;") if "<" in _outside_of_code(text) else text


def _literal_block(match: re.Match[str]) -> str:
    code = textwrap.dedent(match[1]).strip()
    return f":\n\n<!-- not run: a sketch -->\n```python\n{code}\n```\n"


def _outside_of_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`]*`|<!--.*?-->", "", text, flags=re.DOTALL)


# --- entries -------------------------------------------------------------------------------------


def _entry(module: ModuleType, name: str) -> Iterator[str]:
    definition, home = _definition(module, name)
    if isinstance(definition, ast.ClassDef):
        yield _signature(_class_lines(definition, home))
        yield prose(_docstring(definition, home))
        kind = getattr(module, name)
        if members := [_member(kind, method) for method in _methods(definition)]:
            yield "\n".join(members)
    elif isinstance(definition, ast.FunctionDef):
        yield _signature([f"{_call(definition)}: ..."])
        yield prose(_docstring(definition, home))
    else:
        yield _signature([_value_line(definition, name)])
        yield prose(_docstring(definition, home))


def _signature(lines: list[str]) -> str:
    code = "\n".join(lines)
    return f"<!-- not run: a signature -->\n```python\n{code}\n```"


def _value_line(assignment: Assignment, name: str) -> str:
    """``NAME: TYPE`` of a value whose type is written down, ``NAME = VALUE`` of others."""
    if isinstance(assignment, ast.AnnAssign):
        return f"{name}: {_code(assignment.annotation)}"
    return f"{name} = {_code(_value_of(assignment, name))}"


def _class_lines(definition: ast.ClassDef, home: Path) -> list[str]:
    bases = ", ".join(_code(base) for base in definition.bases)
    head = f"class {definition.name}({bases}):" if bases else f"class {definition.name}:"
    fields = [line for field in _fields(definition) for line in _field_lines(field, home)]
    decorators = [f"@{_code(decorator)}" for decorator in definition.decorator_list]
    if not fields:
        return [*decorators, f"{head} ..."]
    return [*decorators, head, *(f"    {line}" for line in fields)]


def _fields(definition: ast.ClassDef) -> list[ast.AnnAssign]:
    return [
        node
        for node in definition.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
    ]


def _field_lines(field: ast.AnnAssign, home: Path) -> list[str]:
    """A field of a class, below what its ``#:`` comment or its ``Param`` says of it."""
    kind, said = field.annotation, _comment(home, field.lineno)
    if isinstance(kind, ast.Subscript) and _code(kind.value) == "Annotated":
        assert isinstance(kind.slice, ast.Tuple)
        kind, param = kind.slice.elts[:2]
        if isinstance(param, ast.Call) and param.args and isinstance(param.args[0], ast.Constant):
            said = said or str(param.args[0].value)
    default = f" = {_code(field.value)}" if field.value else ""
    comment = [f"# {line}" for line in textwrap.wrap(said, _WIDTH)]
    return [*comment, f"{_code(field.target)}: {_code(kind)}{default}"]


def _methods(definition: ast.ClassDef) -> list[ast.FunctionDef]:
    return [
        node
        for node in definition.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def _is_check(method: ast.FunctionDef) -> bool:
    """Whether ``method`` is a check of a contract: its name is a sentence."""
    return method.name.startswith("test_")


def _written_on(kind: type, method: ast.FunctionDef) -> str:
    """The docstring of a method, or of the method of qplug that it overrides."""
    for base in kind.__mro__:
        if base.__module__.startswith("qplug") and method.name in vars(base):
            found = vars(base)[method.name]
            if text := getattr(found, "__func__", found).__doc__:
                return inspect.cleandoc(text)
    return ""


def _member(kind: type, method: ast.FunctionDef) -> str:
    """A method or a property, as an item of a list."""
    if _is_check(method):
        return f"- `{method.name}`"
    decorators = [_code(decorator) for decorator in method.decorator_list]
    returns = _code(method.returns) if method.returns else "None"
    if not {"property", "cached_property"}.isdisjoint(decorators):
        title = f"{method.name}: {returns}"
    else:
        title = f"{method.name}({_arguments(method, bound='staticmethod' not in decorators)})"
        title += f" -> {returns}"
    words = [word for word in ("abstractmethod", "classmethod") if word in decorators]
    how = f" ({', '.join(words)})" if words else ""
    text = prose(_written_on(kind, method))
    said = f": {textwrap.indent(text, '    ').strip()}" if text else ""
    return f"- `{title}`{how}{said}"


def _call(function: ast.FunctionDef) -> str:
    returns = _code(function.returns) if function.returns else "None"
    line = f"def {function.name}({_arguments(function)}) -> {returns}"
    if len(line) <= _WIDTH:
        return line
    inner = "".join(f"    {part},\n" for part in _argument_parts(function))
    return f"def {function.name}(\n{inner}) -> {returns}"


def _arguments(function: ast.FunctionDef, *, bound: bool = False) -> str:
    return ", ".join(_argument_parts(function)[1 if bound else 0 :])


def _argument_parts(function: ast.FunctionDef) -> list[str]:
    """The parameters of ``function``, each as it is written in a signature."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults))
    parts = [_argument(*pair) for pair in zip(plain, [*defaults, *given.defaults], strict=True)]
    if given.posonlyargs:
        parts.insert(len(given.posonlyargs), "/")
    if given.vararg:
        parts.append(f"*{_argument(given.vararg, None)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [_argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return parts


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {_code(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return f"{argument.arg}{kind}"
    return f"{argument.arg}{kind}{' = ' if kind else '='}{_code(default)}"


# --- the source ----------------------------------------------------------------------------------


def _code(node: ast.AST) -> str:
    """The source of ``node`` on one line, with the quotes that the formatter of pages wants."""
    return re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(node))


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _definition(module: ModuleType, name: str) -> tuple[Definition | Assignment, Path]:
    """The statement that defines ``name`` of ``module``, and the file in which it is."""
    assert module.__file__ is not None
    path = Path(module.__file__)
    for node in _statements(_parsed(path)):
        if isinstance(node, Definition) and node.name == name:
            return node, path
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            assert node.module is not None
            return _definition(importlib.import_module(node.module), name)
        if isinstance(node, Assignment) and name in _targets(node):
            return node, path
    raise LookupError(f"{module.__name__} has no {name}")


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a module, also those for type checkers alone."""
    for node in tree.body:
        if isinstance(node, ast.If):
            yield from node.body
        else:
            yield node


def _targets(node: Assignment) -> list[str]:
    """The names that an assignment gives a value."""
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    return [_code(name) for name in names]


def _value_of(node: ast.Assign, name: str) -> ast.expr:
    """The value that an assignment gives ``name``, also where it gives several names one each."""
    if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
        return node.value.elts[_targets(node).index(name)]
    return node.value


def _docstring(definition: Definition | Assignment, home: Path) -> str:
    """The docstring of a class or a function, or the ``#:`` comment above a value."""
    if isinstance(definition, Definition):
        return ast.get_docstring(definition) or ""
    return _comment(home, definition.lineno)


def _comment(path: Path, line: int) -> str:
    """The lines that begin with ``#:`` right above ``line``, as one text."""
    above = []
    for text in reversed(_lines(path)[: line - 1]):
        if not text.strip().startswith("#:"):
            break
        above.append(text.strip()[2:].strip())
    return " ".join(reversed(above))
