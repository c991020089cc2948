"""``python -m selfrepair.cli``."""

import sys

from selfrepair.cli.main import main

sys.exit(main())
