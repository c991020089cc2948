"""What was measured, on disk: labelled stores with checksums, names, manifests and code versions."""
