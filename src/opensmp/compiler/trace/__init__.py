"""Tracing: turns a Keras model into one graph whose variables are inputs."""
