"""Writer for TensorFlow's checkpoint file format (tensor bundle)."""
