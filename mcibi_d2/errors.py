"""The one error for what a user can mend: a config value, a file, a folder, a checkpoint."""


class InputError(ValueError):
    """A wrong input, said in one sentence: the file or key, what was found, what was expected.

    ``train_net.py`` prints the sentence without a traceback.
    """


def sentence(error: InputError) -> str:
    """The message alone; a data loader's worker sends its whole traceback along."""
    prefix = f"{InputError.__module__}.{InputError.__qualname__}: "
    return str(error).strip().splitlines()[-1].removeprefix(prefix)
