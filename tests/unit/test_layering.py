"""Imports run downwards: what a file may import is read off its room, so that each room can be read by itself."""

import ast
import re
from pathlib import Path

import pytest

from alignprop.models import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
# From the bottom to the top. A room is a folder of alignprop/ or a file beside the folders; what stands in one line is
# level, and may not import one another. A new file in a folder needs no entry.
ROOMS = [
    ["settings"],
    ["models"],
    ["engine"],
    ["lora"],
    ["method"],
    ["prompts", "weights"],
    ["callbacks"],
    ["evaluation"],
    ["memory", "runs"],
    ["publish"],
    ["run"],
    ["build", "trial"],
    ["loop", "tasks"],
    ["trainer", "ddpo"],
    ["command"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
WITHOUT_REWARDS = ("settings", "models", "engine", "lora")
# Of rewards, what loads no torch. Everybody may import it.
LIGHT = ("rewards.errors", "rewards.registry", "rewards.rules")
POSIX_ONLY = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}  # the package imports on Windows, too
# To be imported where they are used.
OPTIONAL = {
    "bitsandbytes", "gradio", "hpsv2", "imageio", "imageio_ffmpeg", "matplotlib", "onnxruntime", "prodigyopt",
    "rapidocr", "tensorboard", "wandb",
}  # fmt: skip


def source_files():
    folders = ("alignprop", "rewards", "config", "scripts")
    return [ROOT / "main.py"] + [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, package: str) -> list[tuple[str, int, bool]]:
    """(dotted name, line, whether it is imported on loading) of everything that the source imports, anywhere."""
    found = []

    def visit(node, on_loading):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, on_loading) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) + 1 - child.level] if child.level else []
                base += [child.module] if child.module else []
                found.extend((".".join([*base, alias.name]), child.lineno, on_loading) for alias in child.names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, on_loading and not inside)

    visit(ast.parse(source), True)
    return found


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of ``module``, a dotted name, in words."""
    wrong = []
    for name, line, on_loading in imports(source, module if is_package else module.rpartition(".")[0]):
        if name.split(".")[0] in OPTIONAL and on_loading and module.split(".")[0] not in ("scripts", "tests"):
            wrong.append(f"{module}:{line} imports {name} on loading; import it in the function that needs it")
        if name.split(".")[0] in POSIX_ONLY and module.split(".")[0] not in ("scripts", "tests"):
            wrong.append(f"{module}:{line} imports {name}, which Windows does not have")
        if not _allowed(module, name):
            wrong.append(f"{module}:{line} imports {name}, which is not below it")
    return wrong


def _allowed(module: str, imported: str) -> bool:
    (own, *rest), (target, *inner) = module.split("."), imported.split(".")
    if target not in ("alignprop", "rewards", "config", "scripts", "tests", "main") or own in ("main", "scripts"):
        return True
    if own in ("rewards", "config"):
        return own == target or (own == "config" and inner[:1] == ["settings"])
    if not rest:  # alignprop itself: the names that it fetches for a library's user
        return target in ("alignprop", "rewards", "config")
    if target == "rewards":
        return rest[0] not in WITHOUT_REWARDS or imported.startswith(LIGHT)
    if target != "alignprop" or not inner or inner[0] not in LEVEL:
        return False
    return rest[0] == inner[0] or LEVEL[inner[0]] < LEVEL[rest[0]]


@pytest.mark.parametrize("file", source_files(), ids=dotted)
def test_imports_run_downwards(file):
    assert not violations(dotted(file), file.read_text(encoding="utf-8"), file.stem == "__init__")


def _entries() -> list[Path]:
    """Of the package, without its data."""
    return [path for path in (ROOT / "alignprop").iterdir() if path.name not in ("assets", "__pycache__")]


def test_every_room_has_a_level_and_says_what_lives_there():
    rooms = [path for path in _entries() if path.name != "__init__.py"]
    assert {path.stem for path in rooms} == {*LEVEL}
    for folder in filter(Path.is_dir, rooms):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder.name


def test_the_house_is_read_at_a_glance():
    entries = _entries()
    assert len([path for path in entries if path.is_file()]) <= 12
    assert len([path for path in entries if path.is_dir()]) <= 10


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("alignprop.engine.seeding", "import alignprop.trainer"),
        ("alignprop.method.rollout", "from alignprop.trainer import AlignPropTrainer"),
        ("alignprop.method.rollout", "def lazily():\n    from alignprop.evaluation import evaluate"),
        ("alignprop.method.rollout", "from ..evaluation import evaluate"),
        ("alignprop.method.rollout", "from alignprop.prompts import load_prompts"),
        ("alignprop.models.sd", "from ..trainer import AlignPropTrainer"),
        ("alignprop.memory.forecast", "from alignprop.runs import checkpoint"),
        ("alignprop.tasks", "from alignprop.loop import TrainingLoop"),
        ("alignprop.lora.soups", "from rewards import build_reward"),
        ("alignprop.evaluation.evaluate", "from config.align_prop import base"),
        ("alignprop.trainer", "import main"),
        ("alignprop.trainer", "from scripts.tiny import judge"),
        ("alignprop.trainer", "from alignprop import evaluate"),
        ("rewards.clip", "from alignprop.settings.resolve import ConfigError"),
        ("config.align_prop", "from alignprop.trainer import AlignPropTrainer"),
        ("alignprop.evaluation.pictures", "import matplotlib.figure"),
        ("rewards.hps", "if True:\n    import hpsv2"),
        ("alignprop.runs.records", "def lock():\n    import fcntl"),
    ],
)
def test_a_violation_is_caught(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("alignprop.trainer", "from alignprop.evaluation import evaluate\nfrom rewards import build_reward"),
        ("alignprop.lora.soups", "from alignprop.lora.factors import LoraWeights"),
        ("alignprop.models.sd", "from .base import Conditioning\nimport torch, diffusers.models"),
        ("alignprop.evaluation.pictures", "def draw():\n    import matplotlib"),
        ("rewards.hps", "from rewards.base import Reward"),
        ("config.align_prop", "from alignprop.settings.resolve import one_of"),
        ("main", "from alignprop.trainer import AlignPropTrainer"),
        ("scripts.tiny.judge", "from scripts.tiny import world\nimport wandb"),
    ],
)
def test_what_the_design_allows_is_allowed(module, source):
    assert violations(module, source) == []


def test_a_package_resolves_relative_imports_from_itself():
    assert violations("alignprop.models", "from ..trainer import x", is_package=True)
    assert not violations("alignprop.models", "from .base import x", is_package=True)


# ---- a family's name stands in its own file and in the registry alone


def family_names(source: str, names) -> list[str]:
    """Where code, not prose, has one of the names as a word of an identifier or of a text."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        texts = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module", "asname")]
        if isinstance(node, ast.Constant) and id(node) not in prose:
            texts.append(node.value)
        words = {word for text in texts if isinstance(text, str) for word in re.findall(r"[A-Za-z0-9_]+", text)}
        found += [f"line {getattr(node, 'lineno', '?')}: {word}" for word in sorted(words & names)]
    return found


def names_of(family: str) -> set[str]:
    facts = FAMILIES[family]
    return {family, facts.pipeline, facts.cls, f"{family}_"}


def test_no_family_is_named_outside_its_own_file_and_the_registry():
    """The registry's tables of what is known of a released model are data, in alignprop/assets/."""
    named = {}
    for file in source_files():
        own = file.relative_to(ROOT).as_posix()
        if own.startswith(("scripts", "config")) or own == "alignprop/models/__init__.py":
            continue
        others = {f for f, facts in FAMILIES.items() if facts.module.replace(".", "/") + ".py" != own}
        named[own] = family_names(file.read_text(encoding="utf-8"), set().union(*map(names_of, others)))
    assert not {own: names for own, names in named.items() if names}


@pytest.mark.parametrize("source", [
    "if family == 'sdxl': pass", "from alignprop.models.flux import pack", "StableDiffusion3()", "x.z_image = 1",
    "def load(sd3): pass", "name = 'the FluxPipeline of'", "import alignprop.models.sd as model",
])  # fmt: skip
def test_a_familys_name_is_found(source):
    assert family_names(source, set().union(*map(names_of, FAMILIES)))


def test_prose_may_name_a_family():
    source = '"""sdxl and FluxPipeline"""\n# sd3\nsd15 = "fluxes"'
    assert not family_names(source, set().union(*map(names_of, FAMILIES)))


def test_nothing_from_a_file_is_executed():
    forbidden = r"trust_remote_code|shell=True|os\.system|weights_only=False|pickle\.load|(?<![.\w])(?:eval|exec)\("
    found = {dotted(file): re.findall(forbidden, file.read_text(encoding="utf-8")) for file in source_files()}
    assert not {module: words for module, words in found.items() if words}
