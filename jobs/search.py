r"""A job: a search over settings.

    ray job submit --working-dir . -- python jobs/search.py --space synthesis --config s3://bucket/config.yaml \
        --workspace s3://bucket/runs

Its arguments are those of `pistoseg search`; submit it again to go on where it stopped.
"""

import sys

from pistoseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
