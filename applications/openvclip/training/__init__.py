"""Fine-tuning: the loop, how it steps, and the state to resume it from."""
