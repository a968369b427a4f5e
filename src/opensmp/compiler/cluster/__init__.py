"""What a plan or a simulation may run on: devices, their links, and clusters of them."""
