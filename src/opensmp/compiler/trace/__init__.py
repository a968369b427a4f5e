"""Trace: from a Keras model to one graph whose variables are inputs."""
