"""`python -m easyedit_mdm.cli`."""

import sys

from easyedit_mdm.cli import main

if __name__ == "__main__":
    sys.exit(main())
