"""What rank 0 concludes from the reports of all ranks: values to values, without processes."""
