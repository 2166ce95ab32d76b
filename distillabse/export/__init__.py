"""From a student folder to a bundle: ONNX graphs, INT8, checksums and the gates they must pass."""
