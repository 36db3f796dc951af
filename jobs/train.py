"""A job: labelled images -> a trained, scored model.

    ray job submit --working-dir . -- python jobs/train.py --config s3://bucket/config.yaml --workspace s3://bucket/runs

Its arguments are those of `pistoseg train`; submit it again to go on where it stopped.
"""

import sys

from pistoseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
