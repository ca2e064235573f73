"""Writes docs/config.md, the page of all fields, from their declarations.

python scripts/config_docs.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from alignprop.settings.fields import GROUPS  # noqa: E402
from alignprop.settings.fields.field import Field  # noqa: E402

HEAD = """# All fields of the configuration

`python scripts/config_docs.py` makes this page of alignprop/settings/fields/, where each field has its only entry.
A field is given as `--config.<field>=<value>`; presets (config/) are the defaults below but for what they say. A field
that has no effect in a configuration is warned of.
"""


def page() -> str:
    parts = [HEAD]
    for group, fields in GROUPS.items():
        parts += [f"\n## {group}\n", "| field | default | what it does | what it may be | has an effect with |"]
        parts += ["|---|---|---|---|---|"]
        parts += [row(field) for field in fields]
    return "\n".join(parts) + "\n"


def row(field: Field) -> str:
    default = "empty" if field.default == "" else f"`{field.default}`"
    where = "; ".join(effect.where for effect in field.effects) or "everything"
    cells = [f"`{field.name}`", default, field.help, field.rule.wanted, where]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page(), encoding="utf-8")
