"""One update: the gradient of a step, the proof of its answers, the optimiser; and how far there is to go."""
