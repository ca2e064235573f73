"""The built-in rewards by name, and their options, read without importing them.

A reward is one file and one line here. Its options are the arguments of its constructor. Their names, defaults and
annotations are read from the source, and their help from "Args:" in the class's docstring. So a wrong option is found
before torch is loaded.

An annotation is str, int, float, bool, tuple[float, float, …], Literal[…], Annotated[…, (lowest, highest)],
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
    """The place of a reward.

    Attributes:
        module: The file in rewards/.
        cls: The class in that file.
        options: The group of its options in the configuration. Empty: the name of the reward.
    """

    module: str
    cls: str
    options: str = ""


REWARDS = {
    "aesthetic": Entry("aesthetic", "AestheticReward"),
    "aesthetic_v2_5": Entry("aesthetic_v2_5", "AestheticV25Reward"),
    "hps": Entry("hps", "HPSReward"),
    "hpsv3": Entry("hpsv3", "HPSv3Reward"),
    "pickscore": Entry("pickscore", "PickScoreReward"),
    "imagereward": Entry("imagereward", "ImageReward"),
    "cyclereward": Entry("cyclereward", "CycleReward"),
    "mps": Entry("mps", "MpsReward"),
    "clip": Entry("clip", "ClipReward"),
    "siglip": Entry("siglip", "SiglipReward"),
    "vqascore": Entry("vqascore", "VQAScoreReward"),
    "clip_image": Entry("clip", "ClipImageReward", options="clip"),
    "dino": Entry("dino", "DinoReward"),
    "lpips": Entry("lpips", "LpipsReward"),
    "count": Entry("count", "CountReward"),
    "count_hard": Entry("count", "HardCountReward", options="count"),
    "geneval": Entry("geneval", "GenEvalReward"),
    "tiny_count": Entry("count", "TinyCountReward"),
    "colour": Entry("colour", "ColourReward"),
    "jpeg_compressibility": Entry("jpeg", "JpegCompressibility", options="jpeg"),
    "jpeg_incompressibility": Entry("jpeg", "JpegIncompressibility", options="jpeg"),
    "jpeg_proxy": Entry("jpeg", "JpegProxy", options="jpeg"),
    "ocr": Entry("ocr", "OcrReward"),
    "vlm_judge": Entry("vlm_judge", "VlmJudge"),
    "unifiedreward": Entry("vlm_judge", "UnifiedReward"),
}


@dataclass(frozen=True)
class Option:
    """One argument of a reward's constructor.

    Attributes:
        name: The name of the argument.
        default: Its value if none is given.
        help: What it does.
        type: The type of its values.
        choices: The allowed values, if there are only a few.
        limits: The lowest and the highest allowed number.
        exclusive: The limits themselves are not allowed.
        length: The length of a tuple.
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
    """Returns the class of a built-in reward. This imports its file and torch."""
    return getattr(import_module(f"rewards.{REWARDS[name].module}"), REWARDS[name].cls)


def options_name(name: str) -> str:
    """Returns the group of a reward's options in the configuration."""
    return REWARDS[name].options or name


@cache
def options_of(name: str) -> tuple[Option, ...]:
    """Returns the options of a built-in reward, read from its source.

    Raises:
        TypeError: An argument has no default, no annotation of those above, or no help.
    """
    entry = REWARDS[name]
    source = (Path(__file__).parent / f"{entry.module}.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    cls = classes[entry.cls]
    constructor = _constructor(cls)
    while constructor is None and cls.bases and ast.unparse(cls.bases[0]) in classes:  # the constructor is inherited
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
    """Returns the arguments except self, each with its default."""
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
    """Returns {argument: its help} from the "Args:" of a docstring."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", section[1] if section else "", flags=re.MULTILINE)
    pairs = (entry.partition(": ")[::2] for entry in entries if entry.strip())
    return {name: " ".join(text.split()) for name, text in pairs}


def _parsed(annotation: ast.expr, option: Option) -> Option:
    """Returns the option, completed by what its annotation says."""
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
