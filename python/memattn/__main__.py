"""`python -m memattn`."""

from memattn.cli import main

raise SystemExit(main())
