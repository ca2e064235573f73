"""The built-in rewards by name, and their options, read without importing them.

A reward is one file and one line here. Its options are the arguments of its constructor, read from the source: name,
default, annotation, and the help in the class's docstring, under "Args:". So mistakes in them are found before torch is
loaded. An annotation is str, int, float, bool, tuple[float, float, …], Literal[…], Annotated[…, (lowest, highest)] or
Annotated[float, (lowest, highest), "exclusive"], one of the aliases below, or one of these with "| None".
"""

import ast
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Precision = Literal["float32", "bfloat16", "float16"]
ALIASES = {"Precision": get_args(Precision)}


class Entry(NamedTuple):
    """Where a reward is.

    Attributes:
        module: the file in rewards/.
        cls: the class in it.
        options: the group of its options in the configuration; empty: its name.
    """

    module: str
    cls: str
    options: str = ""


REWARDS = {
    "aesthetic": Entry("aesthetic", "AestheticReward"),
    "hps": Entry("hps", "HPSReward"),
    "pickscore": Entry("pickscore", "PickScoreReward"),
    "imagereward": Entry("imagereward", "ImageReward"),
    "clip": Entry("clip", "ClipReward"),
    "siglip": Entry("siglip", "SiglipReward"),
    "count": Entry("count", "CountReward"),
    "count_hard": Entry("count", "HardCountReward", options="count"),
    "tiny_count": Entry("count", "TinyCountReward"),
    "colour": Entry("colour", "ColourReward"),
    "jpeg_compressibility": Entry("jpeg", "JpegCompressibility", options="jpeg"),
    "jpeg_incompressibility": Entry("jpeg", "JpegIncompressibility", options="jpeg"),
    "jpeg_proxy": Entry("jpeg", "JpegProxy", options="jpeg"),
}


@dataclass(frozen=True)
class Option:
    """One argument of a reward's constructor.

    Attributes:
        type: of its values.
        choices: the allowed values, where there are few.
        limits: the lowest and the highest allowed number.
        exclusive: the limits themselves are not allowed.
        length: of a tuple.
        optional: None is allowed, too.
    """

    name: str
    default: object
    help: str
    type: type = str
    choices: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None
    exclusive: bool = False
    length: int | None = None
    optional: bool = False


def reward_class(name: str) -> type:
    """The class of a built-in reward; imports it, and with it torch."""
    return getattr(import_module(f"rewards.{REWARDS[name].module}"), REWARDS[name].cls)


def options_name(name: str) -> str:
    """The group of a reward's options in the configuration."""
    return REWARDS[name].options or name


@cache
def options_of(name: str) -> tuple[Option, ...]:
    """The options of a built-in reward, from its source.

    Raises:
        TypeError: an argument has no default, no annotation of the above, or no help.
    """
    entry = REWARDS[name]
    source = (Path(__file__).parent / f"{entry.module}.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    cls = classes[entry.cls]
    constructor = _constructor(cls)
    while constructor is None and cls.bases and ast.unparse(cls.bases[0]) in classes:  # inherited
        cls = classes[ast.unparse(cls.bases[0])]
        constructor = _constructor(cls)
    if constructor is None:
        return ()
    helps = _helps(ast.get_docstring(cls) or "")
    return tuple(
        _option(f"{entry.cls}({argument.arg})", argument, default, helps)
        for argument, default in _arguments(constructor)
    )


def _constructor(cls: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def _arguments(constructor: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """The arguments but self, each with its default."""
    taken = constructor.args
    plain = taken.args[1:]
    defaults = [None] * (len(plain) - len(taken.defaults)) + taken.defaults
    return [*zip(plain, defaults, strict=True), *zip(taken.kwonlyargs, taken.kw_defaults, strict=True)]


def _option(place: str, argument: ast.arg, default: ast.expr | None, helps: dict[str, str]) -> Option:
    try:
        return _parsed(argument.annotation, Option(argument.arg, ast.literal_eval(default), helps[argument.arg]))
    except (KeyError, ValueError, AttributeError) as error:
        raise TypeError(
            f"{place} needs a default that is a plain value, an annotation that rewards/registry.py names, and a help "
            "under 'Args:' in the class's docstring"
        ) from error


def _helps(docstring: str) -> dict[str, str]:
    """{argument: its help} of a docstring's "Args:"."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", section[1] if section else "", flags=re.MULTILINE)
    pairs = (entry.partition(": ")[::2] for entry in entries if entry.strip())
    return {name: " ".join(text.split()) for name, text in pairs}


def _parsed(annotation: ast.expr, option: Option) -> Option:
    """The option with what its annotation says."""
    if isinstance(annotation, ast.BinOp):  # … | None
        return replace(_parsed(annotation.left, option), optional=True)
    if isinstance(annotation, ast.Subscript):
        kind, inner = ast.unparse(annotation.value), annotation.slice
        if kind == "Annotated":
            base, limits, *exclusive = inner.elts
            return replace(_parsed(base, option), limits=ast.literal_eval(limits), exclusive=bool(exclusive))
        if kind == "Literal":
            values = ast.literal_eval(inner)
            return replace(option, choices=values if isinstance(values, tuple) else (values,))
        return replace(option, type=tuple, length=len(inner.elts))
    name = ast.unparse(annotation)
    if name in ALIASES:
        return replace(option, choices=ALIASES[name])
    return replace(option, type={"str": str, "int": int, "float": float, "bool": bool}[name])
