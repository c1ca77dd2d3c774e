"""What `make` calls and no notebook imports: running and publishing notebooks, pages with numbers, long experiments, checks."""

import os

# Before torch is imported: idle worker threads sleep instead of spinning, so other work on the same cores costs less.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
