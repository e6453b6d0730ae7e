"""`python -m undiffuse`."""

from undiffuse.cli import main

if __name__ == "__main__":
    main()
