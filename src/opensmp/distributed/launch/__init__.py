"""How processes are launched, meet, and form a TensorFlow cluster."""
