"""Puts the evaluations of runs, soups and base models side by side in one page, comparison.html.

    python scripts/compare.py logs/base/eval/base logs/run_a logs/run_b --output comparison.html

Each argument is the folder of an evaluation, or a run folder, of which the last evaluation counts. All must have
evaluated the same prompts in the same order. Differences are those to the first folder, picture by picture.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from alignprop.evaluation.report.page import write_comparison  # noqa: E402
from alignprop.evaluation.report.source import read_entry  # noqa: E402
from alignprop.settings.errors import ConfigError  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="default comparison.html")
    options = parser.parse_args()
    try:
        entries = {name: read_entry(folder) for name, folder in names_of(options.folders).items()}
        check_prompts(entries)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(entries, options.output)
    print(f"wrote {options.output}")


def names_of(folders: list[Path]) -> dict[str, Path]:
    """Returns the folders by their names. Folders of the same name are named by their whole path.

    Raises:
        ConfigError: a folder does not exist, or is named twice.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"{str(missing[0])!r} is not a folder")
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else str(f) for name, f in zip(short, folders, strict=True)]
    if len(set(names)) < len(names):
        raise ConfigError("a folder is named twice")
    return dict(zip(names, folders, strict=True))


def check_prompts(entries: dict) -> None:
    """Raises ConfigError if the evaluations do not have the same prompts."""
    (first, (point, _)), *others = entries.items()
    for name, (other, _) in others:
        if other.prompts != point.prompts:
            raise ConfigError(
                f"the {len(other.prompts)} pictures of {name} do not have the prompts of the {len(point.prompts)} of "
                f"{first}: evaluate both with the same eval_prompt_fn, num_eval_prompts and num_eval_images"
            )


if __name__ == "__main__":
    main()
