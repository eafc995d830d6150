"""``python -m cvxdistill``: the command line."""

from __future__ import annotations

from cvxdistill.command_line import main

if __name__ == "__main__":
    main(prog_name="cvxdistill")
