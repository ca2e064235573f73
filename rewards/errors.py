"""The mistakes that a person can make and mend."""


class UserError(Exception):
    """A mistake that a person can mend; its text is one line that says what is wrong and what is allowed."""


class RewardError(UserError, ValueError):
    """A mistake of the person who named, configured or wrote a reward."""
