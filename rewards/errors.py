"""The errors that a user can make and fix."""


class UserError(Exception):
    """A mistake that the user can fix. Its text is one line that says what is wrong and what is allowed."""


class RewardError(UserError, ValueError):
    """A mistake of the user who named, configured or wrote a reward."""
