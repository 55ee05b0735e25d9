"""`python -m finetune` is `ft`."""

from finetune.cli.main import main

if __name__ == "__main__":
    main()
