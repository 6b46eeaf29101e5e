"""The one exception for what a user can cause and mend, and what its sentences must not say."""

import re


class UserError(ValueError):
    """A mistake outside the code: one sentence that says where, what was found, what was expected, what to do.

    The command line prints it without a stack trace and exits with status 2.
    """


def without_secrets(text: str) -> str:
    """A text without the user names, passwords and queries of its URLs."""
    text = re.sub(r"//\S*@", "//", text)  # a password may hold @ and / itself
    return re.sub(r"(\w+://[^\s?]+)\?\S*", r"\1", text)
