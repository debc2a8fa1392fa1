"""``python -m diffalign``, also under ``accelerate launch -m diffalign`` and ``torchrun -m diffalign``."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
