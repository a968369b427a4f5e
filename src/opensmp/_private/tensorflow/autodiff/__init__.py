"""Private names of TensorFlow's automatic differentiation."""
