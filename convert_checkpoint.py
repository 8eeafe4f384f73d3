"""Convert a checkpoint: `python convert_checkpoint.py --help`. The same as the command `lsg-convert`."""

import sys

from lsg_converter.__main__ import main


if __name__ == "__main__":
    sys.exit(main())
