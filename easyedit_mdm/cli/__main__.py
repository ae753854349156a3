"""`python -m easyedit_mdm.cli`."""

import sys

from easyedit_mdm.cli import main

sys.exit(main())
