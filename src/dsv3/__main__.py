"""``python -m dsv3``: the same as the console script (what torchrun launches)."""

from dsv3.cli.main import main

if __name__ == "__main__":
    main()
