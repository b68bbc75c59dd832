"""What a model can do: benchmarks by lm-evaluation-harness, and answers that another model judges (MT-Bench)."""
