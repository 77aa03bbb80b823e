"""``python -m iresnet_fast``: the command, as ``torchrun -m iresnet_fast train ...`` starts it."""

from .cli import main

if __name__ == "__main__":
    main()
