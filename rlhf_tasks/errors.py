"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """A mistake outside the code: one sentence that says where, what was found, what was expected, what to do.

    The command line prints it without a stack trace and exits with status 2.
    """
