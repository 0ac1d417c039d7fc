"""`python -m hf_kd_ranking VERB`."""

from .cli import main

if __name__ == "__main__":
    main()
