"""Makes the HTML report of a finished run anew: `python workflows/report.py run_dir=runs/first`."""

import sys

from moe_ray.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
