"""`python -m tfm` is `tfm`."""

from tfm.cli import main

if __name__ == "__main__":
    main()
