"""A job: a model, or the masks of a stage, against true masks.

    ray job submit --working-dir . -- python jobs/evaluate.py --model s3://bucket/model --data s3://bucket/test --out s3://bucket/scores

Its arguments are those of `pistoseg evaluate`; submit it again to go on where it stopped.
"""

import sys

from pistoseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
