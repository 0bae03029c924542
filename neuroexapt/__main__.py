"""``python -m neuroexapt``: the command line."""

from neuroexapt.cli.app import main

if __name__ == "__main__":
    main()
