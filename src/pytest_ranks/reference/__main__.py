"""`python -m pytest_ranks.reference`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; leave a rank without interpreter teardown.

    gloo's threads may outlive the process group and abort a Python that is shutting down, after all
    the work is done and with a failing exit status; so a rank flushes and goes at once.
    """
    status = 0
    try:
        from pytest_ranks.reference.cli import app

        app(prog_name="python -m pytest_ranks.reference")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        print(
            f"error: {package} is not installed; pip install 'pytest-ranks[trainer]'",
            file=sys.stderr,
        )
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
