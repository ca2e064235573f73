"""Trains the bundled model with every estimator and with DDPO under equal budgets of samples and of seconds.

    .venv/bin/python scripts/bakeoff/run.py             takes hours on two cores; the same command continues it
    .venv/bin/python scripts/bakeoff/run.py --report    only writes tables and figures of the results so far

Every run continues, epoch by epoch, until its evaluations cover both budgets (schedule.py). The results (report.py,
claims.py, figures.py) are report.md, results.json and bakeoff_*.png in the folder. Flags such as
--config.train.learning_rate=1e-3 are passed on to every run.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from alignprop.settings.errors import ConfigError  # noqa: E402
from scripts.bakeoff.report import write_report  # noqa: E402
from scripts.bakeoff.schedule import METHODS, REWARDS, Bakeoff, Budget, runs_of  # noqa: E402


def keep_flags(folder: Path, more: list[str]) -> None:
    """Writes the flags into the folder.

    Raises:
        ConfigError: The folder's runs were made with other flags, so they cannot be compared with new ones.
    """
    file = folder / "flags.json"
    before = json.loads(file.read_text()) if file.exists() else more
    if before != more:
        raise ConfigError(f"{str(folder)!r} holds runs with the flags {before}, now they are {more}; name another")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(more))


def names(allowed):
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return chosen

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("--folder", type=Path, default=ROOT / "logs" / "bakeoff")
    parser.add_argument("--methods", type=names(METHODS), default=METHODS, help="comma-separated; all by default")
    parser.add_argument("--rewards", type=names(REWARDS), default=list(REWARDS), help="comma-separated; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--samples", type=int, default=Budget.samples, help="budget of a run")
    parser.add_argument("--seconds", type=float, default=Budget.seconds, help="budget of a run, of training")
    parser.add_argument("--ddpo_samples", type=int, default=Budget.ddpo_samples, help="budget of a run of DDPO")
    parser.add_argument("--epoch", type=int, default=Budget.epoch, help="samples between evaluations")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options, more = parser.parse_known_args()
    if wrong := [flag for flag in more if not flag.startswith("--config.")]:
        parser.error(f"{wrong[0]!r} is not a flag; those of main.py look like --config.eta=1")
    budget = Budget(options.samples, options.seconds, options.ddpo_samples, options.epoch)
    runs = runs_of(options.methods, options.rewards, options.seeds)
    failed = []
    try:
        if not options.report:
            keep_flags(options.folder, more)
            failed = Bakeoff(options.folder, runs, budget, more).run(options.jobs)
        curves = Bakeoff(options.folder, runs, budget, more).curves
        print(write_report(options.folder, {(r.reward, r.method, r.seed): c for r, c in curves.items()}, budget))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the runs have saved, and the same command goes on")
    sys.exit("\n".join(["failed:", *failed]) if failed else 0)


if __name__ == "__main__":
    main()
