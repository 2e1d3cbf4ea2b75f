"""Does the method do what the paper says? Every method on the miniature, over seeds: `python -m benchmarks.study`."""
