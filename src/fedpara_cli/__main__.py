"""``python -m fedpara_cli``."""

import sys

from .launch import main

sys.exit(main())
