"""Time and memory of a million keys in object storage, with the server left out.

python benchmarks/listing.py
"""

import resource
import time

from pistoseg import object_store, storage
from pistoseg.patches import digest

KEYS, PAGE = 1_000_000, 1000


class Bucket:
    """What s3fs says of `s3://bucket/folder/`, a page at a time."""

    def call_s3(self, method, **request):
        start = int(request.get("ContinuationToken", 0))
        stop = min(start + PAGE, KEYS)
        keys = [{"Key": f"folder/x-{n:07d}[1, 0].png", "Size": n, "ETag": f'"{n:032x}"'} for n in range(start, stop)]
        return {"Contents": keys, "IsTruncated": stop < KEYS, "NextContinuationToken": str(stop)}

    def unstrip_protocol(self, path):
        return f"s3://{path}"


def measure(name, call):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    call()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(f"{name}: {time.perf_counter() - began:.1f} s, {grown:.0f} MB")


if __name__ == "__main__":
    object_store.filesystem = Bucket
    measure("hash of a data set", lambda: digest.files_digest("s3://bucket/folder"))
    measure("list of its URIs", lambda: storage.list_files("s3://bucket/folder"))
