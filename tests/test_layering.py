"""Imports run downwards: what a module may import is read off its layer, so that each part can be read by itself."""

import ast
import re
from pathlib import Path

import pytest

from alignprop.models import FAMILIES

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    [
        "alignprop.effects",
        "alignprop.fields",
        "alignprop.policies",
        "alignprop.seeding",
        "alignprop.settings",
        "alignprop.stopping",
    ],
    [
        "alignprop.accounting",
        "alignprop.adjoint",
        "alignprop.background",
        "alignprop.estimators",
        "alignprop.guards",
        "alignprop.kohya",
        "alignprop.kohya_names",
        "alignprop.lean",
        "alignprop.losses",
        "alignprop.memory",
        "alignprop.models",
        "alignprop.models.base",
        "alignprop.models.latent",
        "alignprop.models.loading",
        "alignprop.models.text",
        "alignprop.parts",
        "alignprop.pictures",
        "alignprop.plans",
        "alignprop.processes",
        "alignprop.prompts",
        "alignprop.quadrature",
        "alignprop.samplers",
        "alignprop.sharding",
        "alignprop.speed",
        "alignprop.tracking",
    ],
    [
        "alignprop.adapters",
        "alignprop.callbacks",
        "alignprop.divergence",
        "alignprop.guidance",
        "alignprop.guide",
        "alignprop.judges",
        "alignprop.lora",
        "alignprop.lora_file",
        "alignprop.manifest",
        "alignprop.models.configs",
        "alignprop.models.flux",
        "alignprop.models.flux2",
        "alignprop.models.sd",
        "alignprop.models.sd3",
        "alignprop.models.sdxl",
        "alignprop.models.skeleton",
        "alignprop.models.z_image",
        "alignprop.rollout",
        "alignprop.scaling",
        "alignprop.soups",
        "alignprop.sweep",
    ],
    [
        "alignprop.checkpoint",
        "alignprop.evaluate",
        "alignprop.forecast",
        "alignprop.merging",
        "alignprop.planner",
        "alignprop.rereading",
        "alignprop.weights",
    ],
    ["alignprop.card", "alignprop.export", "alignprop.hub", "alignprop.records", "alignprop.run"],
    ["alignprop.ddpo", "alignprop.loop", "alignprop.tasks", "alignprop.trainer"],
    ["alignprop"],  # the package itself: the names that it fetches for a library's user
    ["main", "scripts", "tests"],  # with everything inside them, which may import each other
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
SIDEWAYS = {
    "alignprop.models.latent": {"alignprop.models.base", "alignprop.models.loading", "alignprop.models.text"},
    "alignprop.models.loading": {"alignprop.models", "alignprop.models.base"},
    "alignprop.models.text": {"alignprop.models.base"},
    "alignprop.adapters": {"alignprop.lora"},
    "alignprop.ddpo": {"alignprop.loop"},
    "alignprop.divergence": {"alignprop.lora", "alignprop.rollout", "alignprop.scaling"},
    "alignprop.estimators": {"alignprop.plans", "alignprop.quadrature", "alignprop.samplers"},
    "alignprop.fields": {"alignprop.policies"},
    "alignprop.guide": {"alignprop.rollout"},
    "alignprop.kohya": {"alignprop.kohya_names", "alignprop.parts"},
    "alignprop.kohya_names": {"alignprop.models.base", "alignprop.parts"},
    "alignprop.lora_file": {"alignprop.lora"},
    "alignprop.memory": {"alignprop.lean", "alignprop.models.base"},
    "alignprop.forecast": {"alignprop.weights"},
    "alignprop.merging": {"alignprop.rereading"},
    "alignprop.parts": {"alignprop.models.base"},
    "alignprop.planner": {"alignprop.forecast"},
    "alignprop.quadrature": {"alignprop.samplers"},
    "alignprop.rollout": {"alignprop.guidance", "alignprop.sweep"},
    "alignprop.hub": {"alignprop.card"},
    "alignprop.run": {"alignprop.hub", "alignprop.records"},
    "alignprop.scaling": {"alignprop.lora"},
    "alignprop.settings": {"alignprop.fields", "alignprop.policies"},
    "alignprop.soups": {"alignprop.lora"},
    "alignprop.speed": {"alignprop.models.base"},
    "alignprop.sweep": {"alignprop.guidance"},
    "alignprop.stopping": {"alignprop.settings"},
    "alignprop.tracking": {"alignprop.pictures"},
    "alignprop.trainer": {"alignprop.loop"},
}
REWARD_USERS = {
    f"alignprop.{name}"
    for name in (
        "callbacks", "ddpo", "forecast", "guards", "guide", "judges", "loop", "planner", "run", "tasks", "trainer",
    )
} | {*LAYERS[-1]}  # fmt: skip
OPTIONAL = {"hpsv2", "matplotlib", "tensorboard", "wandb"}  # to be imported where they are used


def place(name: str) -> str | None:
    """The module of ours that a dotted name belongs to (its longest known prefix), None for other people's."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((p for p in prefixes if p in LEVEL or p in ("rewards", "config")), None)


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
    own = place(module)
    if own is None or (own.startswith("alignprop") and own != module):
        return [f"{module} has no layer: place it in tests/test_layering.py"]
    wrong = []
    for name, line, on_loading in imports(source, module if is_package else module.rpartition(".")[0]):
        target = place(name)
        if name.split(".")[0] in OPTIONAL and on_loading and own not in LAYERS[-1]:
            wrong.append(f"{module}:{line} imports {name} on loading; import it in the function that needs it")
        if target is not None and not _allowed(own, target):
            wrong.append(f"{module}:{line} imports {target}, which is not below it")
    return wrong


def _allowed(own: str, target: str) -> bool:
    if own == target:
        return own in LAYERS[-1] or own in ("rewards", "config")
    if own == "rewards":
        return False
    if own == "config":
        return target == "alignprop.settings"
    if target == "rewards":
        return own in REWARD_USERS
    if target == "config":
        return own in LAYERS[-1]
    return LEVEL[target] < LEVEL[own] or target in SIDEWAYS.get(own, ()) or {own, target} <= set(LAYERS[-1])


def source_files():
    folders = ("alignprop", "rewards", "config", "scripts")
    return [ROOT / "main.py"] + [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", source_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert not violations(module, file.read_text(encoding="utf-8"), is_package)


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


def core_files():
    return [file for file in source_files() if file.relative_to(ROOT).parts[0] in ("main.py", "alignprop", "rewards")]


@pytest.mark.parametrize("file", core_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_family_is_named_outside_its_own_file_and_the_registry(file):
    own = file.relative_to(ROOT).as_posix()
    if own == "alignprop/models/__init__.py":
        return
    others = {f for f, facts in FAMILIES.items() if facts.module.replace(".", "/") + ".py" != own}
    # The registry's tables of what is known of a released model are data, in assets/.
    assert not family_names(file.read_text(encoding="utf-8"), set().union(*map(names_of, others)))


@pytest.mark.parametrize("source", [
    "if family == 'sdxl': pass", "from alignprop.models.flux import pack", "StableDiffusion3()", "x.z_image = 1",
    "def load(sd3): pass", "name = 'the FluxPipeline of'", "import alignprop.models.sd as model",
])  # fmt: skip
def test_a_familys_name_is_found(source):
    assert family_names(source, set().union(*map(names_of, FAMILIES)))


def test_prose_may_name_a_family():
    source = '"""sdxl and FluxPipeline"""\n# sd3\nsd15 = "fluxes"'
    assert not family_names(source, set().union(*map(names_of, FAMILIES)))


# ---- the checker itself


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("alignprop.seeding", "import alignprop.trainer"),
        ("alignprop.rollout", "from alignprop.trainer import AlignPropTrainer"),
        ("alignprop.rollout", "def lazily():\n    from alignprop import evaluate"),
        ("alignprop.rollout", "from . import evaluate"),
        ("alignprop.models.sd", "from ..trainer import AlignPropTrainer"),
        ("alignprop.models.sd", "from alignprop.models.sdxl import anything"),
        ("alignprop.lora", "from alignprop import soups"),
        ("alignprop.rollout", "from rewards import build_reward"),
        ("alignprop.evaluate", "from config.align_prop import base"),
        ("alignprop.trainer", "import main"),
        ("alignprop.trainer", "from scripts.tiny import judge"),
        ("rewards.clip", "from alignprop.settings import ConfigError"),
        ("config.align_prop", "from alignprop.trainer import AlignPropTrainer"),
        ("alignprop.pictures", "import matplotlib.figure"),
        ("rewards.hps", "if True:\n    import hpsv2"),
    ],
)
def test_a_violation_is_caught(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("alignprop.trainer", "from alignprop.evaluate import Evaluator\nfrom rewards import build_reward"),
        ("alignprop.soups", "from alignprop.lora import LoraWeights"),
        ("alignprop.models.sd", "from .base import Conditioning\nimport torch, diffusers.models"),
        ("alignprop.pictures", "def draw():\n    import matplotlib"),
        ("rewards.hps", "from rewards.base import Reward"),
        ("config.align_prop", "from alignprop.settings import one_of"),
        ("main", "from alignprop.trainer import AlignPropTrainer"),
        ("scripts.tiny.judge", "from scripts.tiny import world\nimport wandb"),
    ],
)
def test_what_the_design_allows_is_allowed(module, source):
    assert violations(module, source) == []


def test_a_package_resolves_relative_imports_from_itself():
    assert violations("scripts.bakeoff", "def load():\n    from . import run", is_package=True) == []
    assert violations("alignprop.models", "from ..trainer import x", is_package=True)


@pytest.mark.parametrize("module", ["alignprop.unheard_of", "alignprop.models.unheard_of", "unheard_of"])
def test_a_module_without_a_layer_is_to_be_placed(module):
    assert "place it" in violations(module, "")[0]


@pytest.mark.parametrize("file", source_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_from_a_file_is_executed(file):
    forbidden = r"trust_remote_code|shell=True|os\.system|weights_only=False|pickle\.load|(?<![.\w])(?:eval|exec)\("
    assert not re.findall(forbidden, file.read_text(encoding="utf-8"))
