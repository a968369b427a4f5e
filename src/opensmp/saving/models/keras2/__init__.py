"""Loads Keras 2 files, and HDF5 files of whole models."""
