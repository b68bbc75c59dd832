"""Files and data sets -> verified rows -> tokens and labels -> sequences -> the batches of each step."""
