"""A job: a table of the paper on your data.

    ray job submit --working-dir . -- python jobs/ablate.py table1 --config s3://bucket/config.yaml --workspace s3://bucket/runs

Its arguments are those of `pistoseg ablate`; submit it again to go on where it stopped.
"""

import sys

from pistoseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
