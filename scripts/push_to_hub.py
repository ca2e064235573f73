"""Uploads a run to the Hugging Face hub: its best weights, a model card, curves and pictures.

    python scripts/push_to_hub.py logs/my_run --repo user/name --private

The token is that of HF_TOKEN or of `hf auth login`. The run may be finished or not; only its folder is needed.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what its client warns of, we say ourselves
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs as a script, from any folder

from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS
from alignprop.stopping import plain_endings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--repo", required=True, help="user/name; made where it is not there yet")
    parser.add_argument("--private", action="store_true", help="nobody else sees it")
    options = parser.parse_args()
    rule = FIELDS["hub.repo"].rule
    if not options.repo or not rule.accepts(options.repo):
        raise ConfigError(f"--repo = {options.repo!r} must be {rule.wanted.removeprefix('empty or ')}")
    from alignprop.publish.hub import check_hub, push
    from alignprop.publish.run_folder import read_run  # with torch, which takes seconds

    read_run(options.run)  # mistakes here are found without the network
    check_hub(options.repo, options.private, "--repo")
    print(f"uploaded to {push(options.run, options.repo, options.private, '--repo')}")


if __name__ == "__main__":
    with plain_endings():
        main()
