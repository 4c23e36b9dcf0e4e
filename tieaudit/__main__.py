"""`python -m tieaudit` is the command."""

from tieaudit.cli import main

if __name__ == "__main__":
    main(prog_name="tieaudit")
