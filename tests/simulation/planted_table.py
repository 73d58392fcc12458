"""Faults put in by hand (`planted_faults`), what the lab says of each, and what shows it.

Each line: the fault, words of the verdict, and a seed or a schedule that shows it. There is one at
least for each thing that the lab judges: what cannot fail judges nothing.
"""

import planted_faults as faults
from quiet_worlds import fault, plan

CUT_OFF = [fault(4.0, "server_cut_off", server, 25.0) for server in (0, 1)]
LATE = [fault(4.0, "worker_late", number, 20.0) for number in (0, 1)]

PLANTED = (
  # Contract 2: stale tokens, and tokens of weights that did not make them.
  (faults.stale_is_kept, "contract 2", 22),
  (faults.the_lag_is_not_kept, "contract 2", 32),
  (faults.no_canary, "contract 2", 2),
  (faults.a_segment_has_one_version, "contract 2", 0),
  (faults.a_continuation_forgets, "contract 2", 0),
  (faults.a_broken_load_is_believed, "contract 2", plan(fault(4.0, "load_fails"), *LATE)),
  (
    faults.distrust_ends_with_the_process,
    "contract 2",
    plan(
      fault(3.2, "load_fails"),
      fault(3.2, "worker_late", 0, 20.0),
      fault(3.2, "worker_late", 1, 20.0),
      fault(8.2, "orchestrator_killed"),
      journal_seconds=0.0,
    ),
  ),
  (faults.experts_are_one_token_late, "experts", 1),
  # Contract 3: each rollout once.
  (faults.dispatches_are_not_kept, "contract 3", 2),
  (faults.a_resume_forgets_what_ran, "contract 3", 2),
  (faults.a_resume_numbers_groups_anew, "contract 3: rollout 0 is trained twice", 22),
  (faults.a_dispatch_that_comes_twice_runs_twice, "contract 3: a rollout was sent", 17),
  (faults.a_summary_that_comes_twice_counts_twice, "contract 3", 17),
  (faults.what_is_trained_counts_as_cancelled, "contract 3: 4 rollouts are in batches", 0),
  (faults.a_batch_lacks_a_group, "groups, got", 0),
  # Contract 4: what was given is what is trained on.
  (faults.a_failure_is_a_zero, "contract 4", 1),
  (faults.the_advantage_is_logged_as_the_reward, "contract 4", 0),
  # Contract 7: what was done is not done again.
  (faults.a_result_is_kept_later, "contract 7", 6),
  (faults.journals_are_not_read, "contract 7", 6),
  # Pools.
  (faults.pools_are_not_kept, "sampled again", 36),
  (faults.pools_move_the_wrong_way, "its groups were", plan(pools="easy")),
  # Versions only grow.
  (
    faults.old_weights_are_told,
    "versions",
    plan(fault(2.0, "server_slow", 0, 30.0), fault(5.4, "server_restarted_stale", 1, 3.0, "0")),
  ),
  (faults.a_version_is_told_too_high, "is the newest", 0),
  # Half a file is no file.
  (faults.a_cut_batch_is_trusted, "in the log", plan(fault(1.0, "shard_cut"))),
  (faults.a_batch_is_committed_before_it_is_written, "no fault excuses", 1),
  (faults.damaged_weights_are_sent, "no fault excuses", plan(fault(1.0, "weights_cut"))),
  # A full disk ends the run.
  (
    faults.a_full_disk_is_kept_quiet_by_a_worker,
    "stuck",
    plan(fault(3.1553, "disk_full", 0, 0.003), journal_seconds=None),
  ),
  (
    faults.a_full_disk_is_kept_quiet_by_the_orchestrator,
    "is committed after",
    plan(fault(3.4393, "disk_full", 0, 0.045), journal_seconds=None),
  ),
  # Nothing waits for ever.
  (faults.nobody_looks_for_weights, "stuck", 12),
  (
    faults.a_refusal_leaves_out_the_lost,
    "stuck",
    plan(fault(5.0, "weights_cut"), *CUT_OFF, train_seconds=12.0),
  ),
)
