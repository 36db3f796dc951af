"""Training images in: published layouts, labels, decoding, the patches artifact and `pistoseg data check`."""
