"""A job: whole slides -> tissue maps, outlines, areas.

    ray job submit --working-dir . -- python jobs/segment.py --model s3://b/model --slides s3://b/slides --out s3://b/maps

Its arguments are those of `pistoseg segment`; submit it again to go on where it stopped.
"""

import sys

from pistoseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
