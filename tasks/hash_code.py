"""Stage hash_code: our code -> for every stage a file that changes when what it runs changes.

in   tasks/, src/hauberk/, constraints.txt
out  .code/STAGE.json   every module that the stage imports, at any depth, with the sha256 of what
     it does: a comment, a docstring or another layout changes nothing; and constraints.txt

Every other stage depends on its own file and on no other code, so that a changed module makes stale
what imports it, and nothing else.  dvc.yaml needs no list of modules, and dvc.lock, which DVC reads
and writes for every stage, stays small.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from hauberk.errors import BadData
from tasks.params import Params
from tasks.stage import main, write_json

NAME = "hash_code"
CODE = Path(".code")
CONSTRAINTS = Path("constraints.txt")
HOMES = ((Path(), "tasks"), (Path("src"), "hauberk"))
"""Our packages, and where they lie."""
_MAIN = '__name__ == "__main__"'
"""What a module has that is started as a stage."""


def run(params: Params) -> Path:
    """Hash the code of every stage; return the folder."""
    from hauberk.files import file_hash, replacing

    versions = {CONSTRAINTS.name: file_hash(CONSTRAINTS)}
    with replacing(CODE) as folder:
        for name, hashes in _stages().items():
            write_json(hashes | versions, folder / f"{name}.json")
    return CODE


def _stages() -> dict[str, dict[str, str]]:
    """Give for every stage its modules, each with its hash."""
    import grimp

    hashes = {
        _module(path, home): _hash_of(path)
        for home, package in HOMES
        for path in sorted((home / package).rglob("*.py"))
    }
    graph = grimp.build_graph(
        *(package for _, package in HOMES), cache_dir=None, exclude_type_checking_imports=True
    )
    stages = {path.stem for path in Path("tasks").glob("*.py") if _MAIN in path.read_text("utf-8")}
    return {
        name: {
            module: hashes[module]
            for imported in {f"tasks.{name}", *graph.find_upstream_modules(f"tasks.{name}")}
            for module in _with_packages(imported)
        }
        for name in sorted(stages - {NAME})
    }


def _hash_of(path: Path) -> str:
    try:
        return code_hash(path.read_text("utf-8"))
    except SyntaxError as error:
        raise BadData(
            f"{path}, line {error.lineno}: {error.msg}; correct it and run again."
        ) from None


def code_hash(source: str) -> str:
    """Hash what Python code does: its syntax tree without docstrings.

    Another minor version of Python may write another tree, and so give another hash.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, [line for line in block if not _is_text(line)])
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(line: ast.AST) -> bool:
    """Tell whether a line is a string by itself, which does nothing but tell the reader."""
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


def _with_packages(module: str) -> Iterator[str]:
    """Give a module and the packages that it lies in, which are imported before it."""
    parts = module.split(".")
    for depth in range(1, 1 + len(parts)):
        yield ".".join(parts[:depth])


def _module(path: Path, home: Path) -> str:
    parts = path.relative_to(home).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    main(NAME, run, computes=False)
