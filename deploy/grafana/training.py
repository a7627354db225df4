"""Training: does it go on, does it learn, may one believe it, and where does the time go."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    PROCESS,
    RATE,
    Panels,
    Question,
    anywhere,
    chosen,
    dashboard,
    mean,
    quantiles,
    query,
    ratio,
    series,
    total_rate,
)

_STAGES = chosen("foundry_trainer_stage_seconds", 'stage=~"rollout|teacher|update|publish"')
_BETWEEN = chosen("foundry_trainer_stage_seconds", 'stage=~"evaluate|checkpoint"')
_AT_WORK = chosen("foundry_trainer_run_state", 'state=~"running|waiting"')
_STEP = chosen("foundry_trainer_stage_seconds", 'stage="total"')


def training() -> Dashboard:
    return dashboard(
        "foundry-training",
        "Training",
        "Does a run go on, does it learn, is what it learns from what it claims to be, and where does the time go?",
        [
            Question("Does it go on?", _going_on()),
            Question("How do runs end, and what do they wait for?", _ends()),
            Question("Does it learn?", _learning(), 4),
            Question("Is it trained on what it claims?", _identity()),
            Question("Are the answers fit to learn from?", _answers()),
            Question("Where does a step's time go?", _time()),
            Question("Does the teacher keep up?", _teacher()),
        ],
        processes="foundry_trainer_run_state",
        label="Trainer",
    )


def _going_on() -> Panels:
    return [
        series(
            "Workers by state",
            "short",
            "What do the trainers do? Idle: no run. Waiting: a run, and a peer that does not answer.",
            query(f"sum by (state) ({chosen('foundry_trainer_run_state')})", "{{state}}"),
            stacked=True,
        ),
        series(
            "Runs that wait for a worker",
            "short",
            "Are there too few trainers? Queued runs have no worker, held ones have.",
            query(f"max by (state) ({anywhere('foundry_store_runs')})", "{{state}}"),
        ),
        series(
            "Progress",
            "percentunit",
            "How far is the active run? A flat line is a run that stalls, or one that is over.",
            query(f"{chosen('foundry_trainer_step')} / ({chosen('foundry_trainer_num_steps')} > 0)", PROCESS),
            maximum=1,
        ),
        series(
            "Time since the last step",
            "s",
            "Is a run stalled? Only of workers that have a run; compare it with the time of a step below.",
            query(
                f"time() - {chosen('foundry_trainer_last_step_timestamp_seconds')} and on (namespace, job, instance) "
                f"{_AT_WORK} == 1",
                PROCESS,
            ),
            limit=900,
        ),
        series(
            "Version",
            "short",
            "Does every step publish? The latest version that the active run published.",
            query(chosen("foundry_trainer_version"), PROCESS),
        ),
        series(
            "Tokens trained on",
            "tok/s",
            "How fast does it learn? Answer tokens that went into an update.",
            query(total_rate(chosen("foundry_trainer_tokens_total"), "pod", "instance"), PROCESS),
        ),
    ]


def _ends() -> Panels:
    return [
        series(
            "Runs let go of",
            "short",
            "How do runs end? Fenced ones went on elsewhere; requeued ones were given back by a stopping worker.",
            query(f"sum by (end) (increase({chosen('foundry_trainer_runs_total')}{RATE}))", "{{end}}"),
            stacked=True,
        ),
        series(
            "Jobs",
            "short",
            "Where runs are Jobs: does the cluster run them? Refused: by its API; failed: with their runs.",
            query(f"sum by (outcome) (increase({anywhere('foundry_gateway_jobs_total')}{RATE}))", "{{outcome}}"),
        ),
        series(
            "Repeated calls",
            "ops",
            "Which peer does not answer? Calls that a trainer repeats, by what it called and by the type of error.",
            query(total_rate(chosen("foundry_trainer_retries_total"), "call", "reason"), "{{call}} {{reason}}"),
        ),
    ]


def _learning() -> Panels:
    return [
        series(
            "Held-out KL",
            "none",
            "Does the cartridge come closer to the document? Nats a token to the teacher on answers never trained on.",
            query(chosen("foundry_trainer_heldout_kl"), PROCESS),
        ),
        series(
            "General KL",
            "none",
            "Does the model stay itself elsewhere? Nats a token to the model without any document, on general prompts.",
            query(chosen("foundry_trainer_general_kl"), PROCESS),
        ),
        series(
            "Loss",
            "none",
            "Does the objective fall? Nats a token, of the last step's own answers, so it moves with what is asked.",
            query(chosen("foundry_trainer_loss"), PROCESS),
        ),
        series(
            "Gradient norm",
            "none",
            "Is training stable? Peaks that grow ask for a lower learning rate.",
            query(chosen("foundry_trainer_grad_norm"), PROCESS),
        ),
        series(
            "Entropy",
            "none",
            "Does the student collapse? Nats at the scored positions; towards 0 it says one thing only.",
            query(chosen("foundry_trainer_entropy"), PROCESS),
        ),
    ]


def _identity() -> Panels:
    return [
        series(
            "Policy mismatch",
            "none",
            "Were the answers decoded with the policy that they claim? KL in nats; past the threshold the run stops.",
            query(chosen("foundry_trainer_policy_mismatch_kl"), PROCESS),
            query(f"max ({chosen('foundry_trainer_policy_mismatch_threshold')})", "threshold"),
            logarithmic=True,
        ),
        series(
            "Refused by a guard",
            "short",
            "Was anything wrong kept out? Any is worth a look: docs/policy-identity.md.",
            query(f"sum by (reason) (increase({chosen('foundry_trainer_refused_total')}{RATE}))", "{{reason}}"),
            limit=1,
        ),
        series(
            "Staleness",
            "short",
            "How old is the policy that answered? Versions that a step's oldest answer was behind; 0: on policy.",
            query(chosen("foundry_trainer_staleness_versions"), PROCESS),
        ),
        series(
            "Importance weights",
            "none",
            "Do older answers still count? Mean weight of the last step's tokens, and the share that is truncated.",
            query(chosen("foundry_trainer_importance_weight"), f"mean {PROCESS}"),
            query(chosen("foundry_trainer_importance_truncated_ratio"), f"truncated {PROCESS}"),
        ),
    ]


def _answers() -> Panels:
    truncated, answers = "foundry_trainer_truncated_answers_total", "foundry_trainer_answers_total"
    return [
        series(
            "Truncated answers",
            "percentunit",
            "Do answers end by themselves? Those cut at the token limit teach not to stop.",
            query(chosen("foundry_trainer_truncated_ratio"), f"last step {PROCESS}"),
            query(ratio(chosen(truncated), chosen(answers)), "all"),
            limit=0.5,
            maximum=1,
        ),
        series(
            "Repetition",
            "percentunit",
            "Do answers go round in circles? Share of 4-grams seen before in the same answer.",
            query(chosen("foundry_trainer_repetition_ratio"), PROCESS),
            maximum=1,
        ),
        series(
            "Answer length",
            "short",
            "Do answers grow or shrink? Mean tokens of the last step's.",
            query(chosen("foundry_trainer_answer_tokens"), PROCESS),
        ),
    ]


def _time() -> Panels:
    return [
        series(
            "Stages of a step",
            "s",
            "What would make a step faster? Mean time of each stage, one on the other.",
            query(mean(_STAGES, "stage"), "{{stage}}"),
            stacked=True,
        ),
        series("Step", "s", "How long does a step take, all stages together?", *quantiles(_STEP)),
        series(
            "Between steps",
            "s",
            "What do evaluation and checkpoints cost? Mean time of one.",
            query(mean(_BETWEEN, "stage"), "{{stage}}"),
        ),
    ]


def _teacher() -> Panels:
    return [
        series(
            "Tokens scored",
            "tok/s",
            "How much do the teachers do?",
            query(total_rate(anywhere("foundry_teacher_scored_tokens_total"), "pod", "instance"), PROCESS),
        ),
        series(
            "Forward and prefill",
            "s",
            "What takes the teacher's time? A micro-batch's forward, the KV of a whole document, and its return.",
            *quantiles(anywhere("foundry_teacher_micro_batch_seconds"), "micro-batch"),
            *quantiles(anywhere("foundry_teacher_prefill_seconds"), "prefill"),
            *quantiles(anywhere("foundry_teacher_context_reload_seconds"), "reload"),
        ),
        series(
            "Pending calls",
            "percentunit",
            "Is a teacher full? Calls that wait for the device or use it, of the most that are let in.",
            query(
                f"{anywhere('foundry_teacher_pending_requests')} / {anywhere('foundry_teacher_max_pending_requests')}",
                PROCESS,
            ),
            limit=0.9,
            maximum=1,
        ),
        *_documents(),
        series(
            "Teacher errors",
            "ops",
            "What do teachers refuse? CONTEXT_NOT_FOUND once after a restart is normal: the document is put again.",
            query(
                total_rate(
                    anywhere("foundry_rpc_server_errors_total", 'method=~"Score|PutContext"'), "method", "reason"
                ),
                "{{method}} {{reason}}",
            ),
        ),
    ]


def _documents() -> Panels:
    return [
        series(
            "Documents asked for",
            "ops",
            "Is a document's KV computed once? Misses are prefills; absent ones had left all tiers.",
            query(total_rate(anywhere("foundry_teacher_context_requests_total"), "result"), "{{result}}"),
            query(total_rate(anywhere("foundry_teacher_context_evictions_total"), "tier"), "left {{tier}}"),
        ),
        series(
            "Documents found in",
            "ops",
            "Do documents come back instead of being computed? Where their KV was, and files that failed.",
            query(total_rate(anywhere("foundry_teacher_context_hits_total"), "tier"), "{{tier}}"),
            query(
                total_rate(anywhere("foundry_teacher_context_file_errors_total"), "operation"), "{{operation}} failed"
            ),
        ),
        series(
            "Memory of documents",
            "bytes",
            "Do all documents in work fit? At a tier's budget each new one there makes another leave.",
            query(anywhere("foundry_teacher_context_bytes"), f"{{{{tier}}}} {PROCESS}"),
            query(anywhere("foundry_teacher_context_budget_bytes"), f"{{{{tier}}}} budget {PROCESS}"),
        ),
    ]
