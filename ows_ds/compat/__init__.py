"""Private names of libraries, each with its reason, bounded and tested: nowhere else."""
