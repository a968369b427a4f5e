"""Files of Keras 2, and HDF5 files of whole models."""
