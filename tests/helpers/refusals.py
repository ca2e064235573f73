"""How rewards are refused. Apart from the files that rewards are made of, which scripts need without pytest."""

import pytest

from rewards import RewardError, build_reward


def error_of(function, *arguments, **keywords) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(RewardError) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refusal(name: str, **options) -> str:
    """The one line with which a reward is not built from its options."""
    return error_of(build_reward, name, {name: options})
