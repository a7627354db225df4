"""What the trainer reports on /metrics. One worker trains one run at a time, so nothing is labelled by run."""

from prometheus_client import Counter, Gauge, Histogram

STEP = Gauge("foundry_trainer_step", "Steps finished in the run in hand.")
LOSS = Gauge("foundry_trainer_loss", "Mean loss per token of the last step.")
HELDOUT_KL = Gauge("foundry_trainer_heldout_kl", "Mean forward KL to the teacher on held-out answers, in nats.")
POLICY_MISMATCH_KL = Gauge(
    "foundry_trainer_policy_mismatch_kl", "KL between the rollout's and the trainer's logprobs of the sampled tokens."
)
ENTROPY = Gauge("foundry_trainer_entropy", "Mean entropy of the student at the scored positions, in nats.")
TRUNCATED = Gauge("foundry_trainer_truncated_ratio", "Share of answers cut at the token limit.")
REPETITION = Gauge("foundry_trainer_repetition_ratio", "Share of 4-grams seen before in the same answer.")
MEAN_LENGTH = Gauge("foundry_trainer_answer_tokens", "Mean answer length of the last step.")
TRAINED_TOKENS = Counter("foundry_trainer_tokens", "Answer tokens trained on.")
STAGE_SECONDS = Histogram(
    "foundry_trainer_stage_seconds",
    "Time of one stage of a step.",
    ["stage"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
RETRIES = Counter("foundry_trainer_retries", "Calls that had to be repeated.", ["call", "reason"])
