"""The script by itself, as a person calls it."""

import pytest

from tests.helpers import warm


@pytest.mark.parametrize(("arguments", "message"), [
    (["{here}", "--repo", "me/a--b"], "error: --repo = 'me/a--b' must be 'user/name'"),
    (["{here}", "--repo", ""], "error: --repo = '' must be 'user/name'"),
    (["{here}", "--repo", "me/toy", "--private"], "error: '{here}' is not a run folder"),
])  # fmt: skip
def test_a_mistake_is_one_plain_line(tmp_path, arguments, message):
    words = [argument.replace("{here}", str(tmp_path)) for argument in arguments]
    done = warm.call("scripts/push_to_hub.py", *words)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(message.replace("{here}", str(tmp_path)))
