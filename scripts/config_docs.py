"""Writes docs/config.md, the page of all fields, from the declarations of the fields.

python scripts/config_docs.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from alignprop.settings.fields import GROUPS  # noqa: E402
from alignprop.settings.fields.field import Field  # noqa: E402

HEAD = """# All fields of the configuration

This page lists every field of the configuration. You set a field on the command line with
`--config.<field>=<value>`. A preset in `config/` starts from the defaults below and changes some of them. The file
`config.json` in a run's folder has the values that the run used.

The last column says under which conditions a field has an effect. If you set a field that has no effect in your
configuration, the program prints a warning.

`python scripts/config_docs.py` makes this page from `alignprop/settings/fields/`. To change the page, change the fields
there and run the script again.
"""


def page() -> str:
    parts = [HEAD]
    for group, fields in GROUPS.items():
        parts += [f"\n## {group}\n", "| field | default | what it does | allowed values | has an effect with |"]
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
    print("wrote docs/config.md")
