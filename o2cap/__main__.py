"""``python -m o2cap``: the command line (also under torchrun)."""

from o2cap.cli import main

raise SystemExit(main())
