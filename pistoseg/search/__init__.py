"""Many pipelines that differ in a few settings and share everything upstream of them."""
