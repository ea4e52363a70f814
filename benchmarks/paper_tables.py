"""The tables of the PTQ papers, reproduced on the embedded model, as docs/paper-tables.md has them.

(a) calibration source, (b) its timesteps, (c) range metric, (d) operation selection, (e) unit of weight reconstruction,
(f) scales at skip concatenations, (g) step-aware gains, (h) other quantizers. Every row is measured under several
calibration seeds; median and spread are shown. Finished rows are kept in the cache, so a run that was interrupted goes
on. Nothing is timed.

    python benchmarks/paper_tables.py --images DIR --cache DIR --save zen5
    python benchmarks/paper_tables.py --device cuda --cache DIR --save h200
    python benchmarks/paper_tables.py --only h g --calibration-seeds 0 --seeds 2 --steps 3
"""

from lab.runner import run
from lab.tables import TABLES

if __name__ == "__main__":
    run("paper-tables", __doc__, TABLES, slow="e")
