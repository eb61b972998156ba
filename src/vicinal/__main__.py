"""`python -m vicinal` is the command line: what `torchrun -m vicinal` and `accelerate launch -m vicinal` start."""

from vicinal.cli import main

if __name__ == "__main__":
    main()
