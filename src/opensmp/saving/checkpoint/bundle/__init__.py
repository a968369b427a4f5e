"""TensorFlow's file format of checkpoints."""
