"""A job: labelled images -> mosaics with masks.

    ray job submit --working-dir . -- python jobs/synthesize.py --config s3://bucket/config.yaml --workspace s3://bucket/runs

Its arguments are those of `pistoseg synthesize`; submit it again to go on where it stopped.
"""

import sys

from pistoseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
