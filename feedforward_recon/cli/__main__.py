"""``python -m feedforward_recon.cli`` is ``ffrecon`` where the command is not installed."""

import sys

from feedforward_recon.cli import main

sys.exit(main())
