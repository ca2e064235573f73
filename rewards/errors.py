"""The errors that a user can make and fix."""


class UserError(Exception):
    """A mistake that the user can fix. Its text is one line that says what is wrong and what is allowed."""


class RewardError(UserError, ValueError):
    """A mistake of the user who named, configured or wrote a reward."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
