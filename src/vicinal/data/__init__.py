"""Tables of images: read, checked, split, decoded, sampled and loaded."""
